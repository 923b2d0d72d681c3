"""Smoothie: learn a Gaussian policy from a smoothed Q-function (Nachum et al., ICML 2018).

DDPG's critic estimates the value of an action. Smoothie's critic estimates the value of acting
with Gaussian noise around it:

    Q~(s, a) = E[Q(s, a~)],  a~ ~ N(a, Sigma)                                               (9)

At a = mu(s), averaged over the states that the policy visits, its gradient and half its Hessian
with respect to the action are the exact gradients of the expected return with respect to the mean
and the covariance of the policy pi(.|s) = N(mu_theta(s), Sigma_phi). So the policy learns how
widely to explore:

    grad_theta O = E_s[ dQ~/da at mu(s), times grad_theta mu(s) ]                          (13)
    grad_phi   O = E_s[ 1/2 d2Q~/da2 at mu(s), times grad_phi Sigma ]                (14), (15)
    max O_TR = O - lambda E_s[ KL(pi || pi_old) ]                                          (20)

Q~ is learned from replayed (s, a~, r, s') with targets r + gamma Q~'(s', mu'(s')), fitted at a
phantom action a such that a~ given a is N(a, Sigma), as the smoothed Bellman equation (12) asks.
The replayed a~ was drawn from N(m, S): m was the policy's mean, and S its covariance times
args.exploration^2. That is the same as a ~ N(m, S - Sigma) followed by a~ ~ N(a, Sigma), so the
posterior of a given a~ is

    a ~ N(m + (1 - k) (a~ - m), (1 - k) Sigma),  k = Sigma / S, at most 1

This draw is ours. The paper takes the buffer to be near-uniform and draws a ~ N(a~, Sigma) (18),
which is the case k = 0. The random first actions count as S = infinity, so for them k is 0.

    theta       the actor's layers    theta', phi', w'  target_actor, target_qfs
    phi         actor.log_var         mu_theta, phi     actor(observations)
    Sigma_phi   exp(actor.log_var)    dQ~/da, d2Q~/da2  qf.action_derivatives(...)
    w           qfs.parameters()      lambda            args.kl_coef * value_scale

In E_s, replayed states stand in for the policy's. Actions are in normalised units, with bounds at
-1 and 1, everywhere but in the environment.

The second critic, the delay of the policy and the random first actions are TD3's (Fujimoto et al.,
ICML 2018).
"""
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.3.0", "mujoco==3.3.7", "numpy==2.4.6",
#     "tyro==1.0.17", "tensorboard==2.21.0", "tqdm==4.70.1", "wandb==0.31.0", "moviepy==2.2.1"]
# ///

import contextlib
import copy
import csv
import importlib.metadata
import json
import math
import re
import sys
import time
import uuid
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_FREQUENCY = 100  # environment steps between two records of the losses
PACKAGES = ["torch", "gymnasium", "mujoco", "numpy"]  # whose versions are recorded
MAY_CHANGE = {  # flags that may change when a run resumes
    "total_timesteps",
    "checkpoint_frequency",
    "track",
    "wandb_project_name",
    "capture_video",
    "run_dir",
}


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # seed of the networks, exploration, replay and environment
    cuda: bool = True  # use the GPU if there is one
    compile: bool = True  # compile the updates: a minute to start, then faster training
    threads: int = 1  # CPU threads that PyTorch uses
    track: bool = False  # mirror every logged value to Weights & Biases
    wandb_project_name: str = "smoothie"  # the Weights & Biases project
    capture_video: bool = False  # film the first episode of each evaluation
    run_dir: str | None = None  # run folder; a run resumes from the checkpoint in it
    checkpoint_frequency: int = 50_000  # minimum steps between checkpoints, which hold the buffer

    env_id: str = "Hopper-v4"  # gymnasium task with bounded Box actions (Section 6.2)
    total_timesteps: int = 1_000_000  # environment steps
    learning_starts: int = 10_000  # initial steps with random actions and no updates
    buffer_size: int = 1_000_000  # transitions that the replay buffer keeps
    batch_size: int = 128  # transitions in a batch; the critics and the policy draw their own
    gamma: float = 0.99  # discount factor (Section 2.1)
    tau: float = 0.005  # rate of the Polyak averages theta', phi', w'
    policy_lr: float = 3e-4  # learning rate of theta, by Adam
    q_lr: float = 1e-3  # learning rate of w, by Adam
    critics: int = 2  # number of critics: targets take the lowest (TD3), the policy takes the mean
    policy_delay: int = 2  # critic updates per update of the policy and the targets (TD3)
    exploration: float = 1.5  # std of the actions, as a multiple of the policy's: sqrt(S / Sigma)
    exact_phantom_actions: bool = True  # if not, a ~ N(a~, Sigma), as in the paper (18)
    log_var_init: float = -3.2  # phi_0, the initial log-variance of each action (Section 6.2)
    log_var_min: float = -20.0  # lower bound on phi
    log_var_lr: float = 0.03  # learning rate of phi, by gradient ascent; divided by value_scale
    kl_coef: float = 1e-5  # weight of the KL penalty; times value_scale it is lambda of (20)

    eval_frequency: int = 5_000  # environment steps between two evaluations, without noise
    eval_episodes: int = 10  # episodes of each evaluation


def check(args):
    """Exit if a flag has a value that makes no sense, or if the task cannot be filmed."""
    for valid, problem in [
        (0 <= args.gamma <= 1, "--gamma must lie in [0, 1]"),
        (0 < args.tau <= 1, "--tau must lie in (0, 1]"),
        (0 <= args.seed < 2**31, "--seed must lie in [0, 2^31)"),
        (args.batch_size <= args.buffer_size, "--buffer-size is below --batch-size"),
        (args.batch_size <= args.learning_starts, "--learning-starts is below --batch-size"),
        (args.learning_starts < args.total_timesteps, "--total-timesteps is <= --learning-starts"),
        (args.policy_delay >= 1, "--policy-delay is below 1"),
        (args.log_var_min <= args.log_var_init <= 0, "--log-var-init is not in [--log-var-min, 0]"),
        (args.exploration >= 1, "--exploration is below 1: phantom actions need S >= Sigma"),
    ]:
        if not valid:
            sys.exit(problem)
    for name, value in asdict(args).items():
        if value != value:  # NaN
            sys.exit(f"--{name.replace('_', '-')} must be a number")

    if args.capture_video:
        try:
            with contextlib.closing(make_env(args.env_id, render_mode="rgb_array")) as env:
                env.reset(seed=0)
                assert isinstance(env.render(), np.ndarray), "it renders no picture"
        except Exception as error:  # no render mode, no screen, no pygame
            sys.exit(f"--capture-video: cannot film {args.env_id} here: {error}")


def finite(value, what):
    """Return the value as a new float32 array, or exit if it is not finite."""
    with np.errstate(over="ignore"):
        array = np.array(value, np.float32)
    if not np.isfinite(array).all():
        sys.exit(f"{what} is not finite")
    return array


def make_env(env_id, **kwargs):
    """Return the task with flat, compressed observations and actions in [-1, 1]."""
    try:
        env = gym.make(env_id, **kwargs)
    except gym.error.Error as error:
        sys.exit(f"--env-id {env_id}: {error}")

    bounds = env.action_space
    is_vector = isinstance(bounds, gym.spaces.Box) and len(bounds.shape) == 1
    is_float = is_vector and bounds.dtype.kind == "f"
    with np.errstate(over="ignore", invalid="ignore"):
        is_bounded = is_float and np.isfinite(bounds.high - bounds.low).all()
    if not (is_bounded and env.observation_space.is_np_flattenable):
        needs = "needs a bounded 1-D Box of float actions and observations that flatten to a vector"
        sys.exit(f"--env-id {env_id}: {needs}, not {bounds} and {env.observation_space}")

    def to_bounds(action):
        """Scale an action in normalised units to its bounds, and clip it to them."""
        action = finite(action, "training has diverged: an action of the policy")
        scaled = bounds.low + 0.5 * (action + 1) * (bounds.high - bounds.low)
        return np.clip(scaled, bounds.low, bounds.high).astype(bounds.dtype)

    def compressed(obs):
        """Return obs with any excess over 10 on a log scale: Humanoid-v4 reaches thousands."""
        obs = finite(obs, "an observation of the environment")
        excess = np.maximum(np.abs(obs) - 10, 0)
        return np.clip(obs, -10, 10) + np.copysign(np.log1p(excess), obs)

    def checked_reward(reward):
        return finite(reward, "a reward of the environment").item()

    env = gym.wrappers.FlattenObservation(env)
    unbounded = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
    env = gym.wrappers.TransformObservation(env, compressed, unbounded)
    env = gym.wrappers.TransformReward(env, checked_reward)
    unit_box = gym.spaces.Box(-1.0, 1.0, bounds.shape, np.float32)
    return gym.wrappers.TransformAction(env, to_bounds, unit_box)


class Actor(nn.Module):
    """The policy N(mu_theta(s), diag(exp(phi))): forward returns its mean and log-variance."""

    def __init__(self, obs_dim, action_dim, log_var_init):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim, 256)
        self.fc2 = nn.Linear(256, 256)
        self.fc_mean = nn.Linear(256, action_dim)
        self.log_var = nn.Parameter(torch.full((action_dim,), log_var_init))

    def forward(self, observations):
        x = torch.relu(self.fc1(observations))
        x = torch.relu(self.fc2(x))
        return torch.tanh(self.fc_mean(x)), self.log_var

    @torch.inference_mode()
    def act(self, obs):
        """Return the policy's mean and sigma at one observation, NumPy arrays (action_dim,)."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.fc_mean.bias.device)
        mean, log_var = self(obs)
        std = (0.5 * log_var).exp()
        return mean.cpu().numpy(), std.cpu().numpy()


class QNetwork(nn.Module):
    """Q~_w(s, a), (batch,). The layer that the action enters is GELU: a ReLU's Hessian is 0."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim, 256)
        self.fc2 = nn.Linear(256 + action_dim, 256)
        self.fc_q = nn.Linear(256, 1)

    def hidden(self, observations, actions):
        features = torch.relu(self.fc1(observations))
        return self.fc2(torch.cat([features, actions], 1))

    def forward(self, observations, actions):
        z = self.hidden(observations, actions)
        return self.fc_q(nn.functional.gelu(z)).squeeze(1)

    def action_derivatives(self, observations, actions):
        """Return dQ~/da and the diagonal of d2Q~/da2, each (batch, action_dim).

        The action enters z = fc2(...) linearly, through the columns w_a of fc2, so the chain rule
        needs only the derivatives of gelu(z) = z cdf(z). If you change forward, change this too;
        check_derivatives prints three lines that work for any critic.
        """
        z = self.hidden(observations, actions)
        cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        pdf = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        first = cdf + z * pdf  # gelu'
        second = pdf * (2 - z.square())  # gelu''

        v = self.fc_q.weight
        w_a = self.fc2.weight[:, -actions.shape[1] :]
        return (v * first) @ w_a, (v * second) @ w_a.square()


def check_derivatives(qf, obs_dim, action_dim):
    """Fail if action_derivatives does not return the derivatives of forward."""
    generator = torch.Generator().manual_seed(0)  # leaves the random numbers of the run alone
    qf = copy.deepcopy(qf).cpu().double()
    obs = torch.randn(1, obs_dim, generator=generator).double()
    action = torch.randn(1, action_dim, generator=generator).double()

    gradient = torch.func.jacrev(qf, 1)(obs, action)[0]
    hessian = torch.func.hessian(qf, 1)(obs, action)[0, 0, :, 0]
    exact = (gradient, hessian.diagonal().unsqueeze(0))
    found = qf.action_derivatives(obs, action)
    hint = """QNetwork: action_derivatives does not return the derivatives of forward.
    Change both together, or use these lines, which work for any critic:

        q = lambda s, a: self(s.unsqueeze(0), a.unsqueeze(0)).squeeze()
        hessian = torch.vmap(torch.func.hessian(q, 1))(observations, actions).diagonal(0, 1, 2)
        return torch.vmap(torch.func.grad(q, 1))(observations, actions), hessian"""
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9, msg=hint)


class ReplayBuffer:
    """The last `capacity` transitions, with the mean m and the variance S that a~ was drawn with.

    a~ is as drawn, not clipped. The variance of a uniform action counts as infinite, which is exact
    except near the bounds.
    """

    def __init__(self, capacity, obs_dim, action_dim, rng, device):
        self.rng = rng
        self.device = device
        self.count = 0  # transitions added so far, overwritten ones included
        self.widths = [obs_dim, action_dim, 1, obs_dim, 1, action_dim, action_dim]
        self.rows = np.zeros((capacity, sum(self.widths)), np.float32)

    def add(self, obs, action, reward, next_obs, terminated, mean, var):
        row = np.hstack([obs, action, reward, next_obs, terminated, mean, var])
        self.rows[self.count % len(self.rows)] = row
        self.count += 1

    def sample(self, batch_size):
        """Return a batch drawn with replacement, as columns in the order of add's arguments."""
        index = self.rng.integers(min(self.count, len(self.rows)), size=batch_size)
        rows = torch.from_numpy(self.rows[index]).to(self.device)
        obs, actions, rewards, next_obs, terminated, means, variances = rows.split(self.widths, 1)
        return obs, actions, rewards.squeeze(1), next_obs, terminated.squeeze(1), means, variances


class Adam(nn.Module):
    """torch.optim.Adam in operations that compile into one graph with the gradients."""

    def __init__(self, params, lr):
        super().__init__()
        self.params = params
        self.m = nn.ParameterList(map(torch.zeros_like, params)).requires_grad_(False)
        self.v = nn.ParameterList(map(torch.zeros_like, params)).requires_grad_(False)
        self.register_buffer("lr", torch.tensor(lr))  # for a schedule, call lr.fill_(...)
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def step(self, grads, beta1=0.9, beta2=0.999, eps=1e-8):
        self.steps += 1
        bias1 = 1 - torch.exp(self.steps * math.log(beta1))  # beta1 ** steps, compiled faster
        root_bias2 = (1 - torch.exp(self.steps * math.log(beta2))).sqrt()
        step_size = self.lr * root_bias2 / bias1
        for p, grad, m, v in zip(self.params, grads, self.m, self.v, strict=True):
            m.lerp_(grad, 1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            p -= step_size * m / (v.sqrt() + eps * root_bias2)


def kl_divergence(mean, log_var, old_mean, old_log_var):
    """Mean over the batch of KL(N(mean, exp(log_var)) || N(old_mean, exp(old_log_var))) (20)."""
    squares = log_var.exp() + (mean - old_mean).square()
    return 0.5 * (squares / old_log_var.exp() - 1 + old_log_var - log_var).sum(1).mean()


class Smoothie(nn.Module):
    """Algorithm 1: the networks, their optimisers and the update."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, action_dim, args.log_var_init)
        self.qfs = nn.ModuleList(QNetwork(obs_dim, action_dim) for _ in range(args.critics))
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_qfs = copy.deepcopy(self.qfs).requires_grad_(False)

        phi = self.actor.log_var
        self.theta = [p for p in self.actor.parameters() if p is not phi]
        self.w = list(self.qfs.parameters())
        self.actor_optimizer = Adam(self.theta, args.policy_lr)
        self.q_optimizer = Adam(self.w, args.q_lr)
        self.register_buffer("value_scale", torch.ones(()))  # running mean of |target|

    def update_policy(self, observations, *_):
        """One step of theta along (13) and of phi along (15), less the penalty's gradients (20).

        Then the targets take a step towards the networks. Return what to log.
        """
        phi = self.actor.log_var
        mean, log_var = self.actor(observations)
        with torch.no_grad():
            derivatives = [qf.action_derivatives(observations, mean) for qf in self.qfs]
            gradient = torch.stack([first for first, _ in derivatives]).mean(0)
            hessian = torch.stack([second for _, second in derivatives]).mean(0)
            old_mean, old_log_var = self.target_actor(observations)

        # gradient and hessian are constants, so that autograd turns these two into (13) and (15)
        in_theta = (gradient * mean).sum(1).mean()
        in_phi = 0.5 * (hessian * log_var.exp()).sum(1).mean()
        kl = kl_divergence(mean, log_var, old_mean, old_log_var)
        loss = self.args.kl_coef * self.value_scale * kl - in_theta - in_phi

        *theta_grads, phi_grad = torch.autograd.grad(loss, [*self.theta, phi])
        self.actor_optimizer.step(theta_grads)
        with torch.no_grad():
            phi -= self.args.log_var_lr / self.value_scale * phi_grad
            phi.clamp_(self.args.log_var_min, 0.0)  # wider policies act at the bounds: no signal
        self.update_targets()
        return {
            "losses/actor_loss": loss.detach(),
            "losses/kl": kl.detach(),
            "losses/hessian": hessian.mean(),
            "losses/value_scale": self.value_scale.clone(),
        }

    def update_critics(
        self, observations, actions, rewards, next_obs, terminated, means, variances
    ):
        """One step of w towards (12), by (18) without its weights. Return what to log."""
        with torch.no_grad():
            next_actions, _ = self.target_actor(next_obs)
            next_values = torch.stack([qf(next_obs, next_actions) for qf in self.target_qfs])
            not_done = 1 - terminated  # targets bootstrap at time limits, not at terminations
            targets = rewards + self.args.gamma * not_done * next_values.amin(0)
            self.value_scale.lerp_(targets.abs().mean(), self.args.tau).clamp_(min=1e-6)

            # The phantom actions, from their posterior; k = 0 gives the paper's.
            _, log_var = self.actor(observations)
            k = (log_var.exp() / variances).clamp(max=1.0) * self.args.exact_phantom_actions
            phantom_means = means + (1 - k) * (actions - means)
            phantom_variances = (1 - k) * log_var.exp()
            phantom_actions = phantom_means + phantom_variances.sqrt() * torch.randn_like(actions)

        values = torch.stack([qf(observations, phantom_actions) for qf in self.qfs])
        losses = (values - targets).square().mean(1)  # (critics,)
        self.q_optimizer.step(torch.autograd.grad(losses.sum(), self.w))
        return {
            "losses/qf1_loss": losses[0].detach(),
            "losses/qf1_values": values[0].detach().mean(),
        }

    @torch.no_grad()
    def update_targets(self):
        for net, target in [(self.actor, self.target_actor), (self.qfs, self.target_qfs)]:
            for p, target_p in zip(net.parameters(), target.parameters(), strict=True):
                target_p.lerp_(p, self.args.tau)


def compile_updates(device, *updates):
    """Return each update compiled into one graph, on a GPU a CUDA graph."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # no C++ compiler, say
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"cannot compile, so updates will be slower: {reason}", file=sys.stderr)
        return updates
    print("the first updates compile for a minute or more; --no-compile avoids this", flush=True)
    torch._dynamo.config.trace_autograd_ops = True  # the gradients belong to the graph
    options = {
        "fallback_random": True,  # the same random numbers as without compilation
        "cpp.use_decompose_tanh": True,  # a faster tanh
        "triton.cudagraphs": True,
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,  # shapes and flags never change
    }

    def compiled(update):
        graph = torch.compile(update, fullgraph=True, isolate_recompiles=True, options=options)

        def run(*batch):  # a copy, as the next CUDA graph to run takes the memory of the results
            return {key: torch.as_tensor(value).clone() for key, value in graph(*batch).items()}

        return run

    return [compiled(update) for update in updates]


def make_run_dir(name):
    """Make and return the folder runs/name, or runs/name-2 and so on if it exists."""
    run_dir = Path("runs", name)
    number = 1
    while True:
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            number += 1
            run_dir = Path("runs", f"{name}-{number}")


def is_finished(run_dir, config):
    """Return whether the run has been evaluated at its last step."""
    path = run_dir / "evaluations.csv"
    return path.exists() and f"\n{config['total_timesteps']}," in path.read_text()


def start_run(args, task):
    """Return the run folder, with this script in it, and the config to write there.

    Exit if the folder holds a run of another script, or with flags that must not change.
    """
    config = asdict(args) | {"task": task, "script": Path(__file__).name}
    packages = reversed(list(importlib.metadata.distributions()))  # the copy found first wins
    installed = {package.name: package.version for package in packages}
    config["versions"] = {name: installed.get(name) for name in PACKAGES}
    config["run_id"] = uuid.uuid4().hex  # names the run on Weights & Biases
    if args.run_dir is None:
        name = f"{task}__{args.exp_name}__{args.seed}__{time.time():.0f}"
        run_dir = make_run_dir(re.sub(r"[^\w.-]", "-", name))
    else:
        run_dir = Path(args.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)

    if (run_dir / "config.json").exists():
        old = json.loads((run_dir / "config.json").read_text())
        if old["script"] != config["script"]:
            sys.exit(f"--run-dir {run_dir}: this run was made by {old['script']}")
        changed = [name for name in asdict(args) if old.get(name) != config[name]]
        fixed = [f"--{name.replace('_', '-')}" for name in changed if name not in MAY_CHANGE]
        if fixed:
            sys.exit(f"--run-dir {run_dir}: this run used a different {', '.join(fixed)}")
        config["run_id"] = old["run_id"]
        if is_finished(run_dir, old) and not (run_dir / "checkpoint.pt").exists():
            sys.exit(f"--run-dir {run_dir}: this run has finished and has no checkpoint")
    if not (run_dir / "checkpoint.pt").exists():  # a run that starts over may have a new script
        (run_dir / config["script"]).write_bytes(Path(__file__).read_bytes())
    print(f"run folder: {run_dir}", flush=True)
    return run_dir, config


def track(args, run_dir, config):
    """Return the run on Weights & Biases, which gets all that TensorBoard gets, or nothing."""
    if not args.track:
        return contextlib.nullcontext()
    import wandb

    return wandb.init(
        project=args.wandb_project_name,
        name=run_dir.resolve().name,
        id=config["run_id"],
        resume="allow",
        config=config,
        sync_tensorboard=True,
    )


def make_eval_env(args, run_dir):
    """Return the environment for evaluations, which films the first episode of each if asked."""
    if not args.capture_video:
        return make_env(args.env_id)
    return gym.wrappers.RecordVideo(
        make_env(args.env_id, render_mode="rgb_array"),
        str(run_dir / "videos"),
        episode_trigger=lambda episode: episode % args.eval_episodes == 0,
    )


def evaluate(actor, env, args):
    """Return the undiscounted return and the length of each episode, acting without noise."""
    results = []
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=1_000 * args.seed + episode)
        episode_return = 0.0
        episode_length = 0
        done = False
        while not done:
            mean, _ = actor.act(obs)
            obs, reward, terminated, truncated, _ = env.step(mean)
            episode_return += reward
            episode_length += 1
            done = terminated or truncated
            if episode_length == 100_000:
                hint = "does this task never end? Register it with max_episode_steps"
                print(f"an evaluation episode has taken 100,000 steps: {hint}", file=sys.stderr)
        results.append((episode_return, episode_length))
    return results


def record_evaluation(step, agent, env, args, run_dir, evaluations, writer):
    """Evaluate without noise, add the results to evaluations, and write them and the policy."""
    if args.capture_video:
        env.name_prefix = f"step-{step}"
    results = evaluate(agent.actor, env, args)
    save(agent.actor.state_dict(), run_dir / "policy.pt")
    evaluations += [(step, episode, *result) for episode, result in enumerate(results)]
    with open(run_dir / "evaluations.csv", "w", newline="") as file:
        header = ("global_step", "episode", "episodic_return", "episodic_length")
        csv.writer(file).writerows([header, *evaluations])

    mean_return, mean_length = np.mean(results, 0)
    writer.add_scalar("eval/episodic_return", mean_return, step)
    writer.add_scalar("eval/episodic_length", mean_length, step)
    writer.flush()
    tqdm.write(f"step {step}: eval return {mean_return:.2f}")
    sys.stdout.flush()


def log_losses(step, losses, std, writer):
    """Write the losses and sigma, or exit if a loss is not finite."""
    for key, value in losses.items():
        if not math.isfinite(value):
            sys.exit(f"step {step}: {key} is {value}: training has diverged; try lower rates")
        writer.add_scalar(key, value, step)
    for i, std_i in enumerate(std):
        writer.add_scalar(f"policy/std_{i}", std_i, step)


def save(state, path):
    """Write a new file, then rename it over the old one, so that a kill leaves one whole."""
    torch.save(state, f"{path}.new")
    Path(f"{path}.new").replace(path)


def save_checkpoint(run_dir, step, agent, buffer, rng, evaluations):
    """Save what the rest of the run depends on. Between two episodes this is everything."""
    state = {
        "step": step,
        "agent": agent.state_dict(),
        "count": buffer.count,
        "rows": torch.from_numpy(buffer.rows[: buffer.count]),
        "rng": json.dumps(rng.bit_generator.state),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": [torch.cuda.get_rng_state()] if buffer.device.type == "cuda" else [],
        "evaluations": evaluations,
    }
    save(state, run_dir / "checkpoint.pt")


def load_checkpoint(run_dir, agent, buffer, rng):
    """Restore what save_checkpoint has saved, if anything. Return the step and the evaluations."""
    if not (run_dir / "checkpoint.pt").exists():
        return 0, []
    # weights_only runs no code from the file; mmap saves the memory of a second buffer
    state = torch.load(run_dir / "checkpoint.pt", "cpu", weights_only=True, mmap=True)
    agent.load_state_dict(state["agent"])
    buffer.count = state["count"]
    buffer.rows[: buffer.count] = state["rows"]
    rng.bit_generator.state = json.loads(state["rng"])
    torch.set_rng_state(state["torch_rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"])
    print(f"resuming from step {state['step']}", flush=True)
    return state["step"], state["evaluations"]


def train(args, env, eval_env, run_dir, config):
    """Algorithm 1, from the checkpoint in run_dir if there is one."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # numbers below 1e-38 change nothing and slow some processors
    rng = np.random.default_rng(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    obs_dim = env.observation_space.shape[0]
    action_dim = env.action_space.shape[0]

    agent = Smoothie(obs_dim, action_dim, args).to(device)
    check_derivatives(agent.qfs[0], obs_dim, action_dim)
    update_critics = agent.update_critics
    update_policy = agent.update_policy
    if args.compile:
        update_critics, update_policy = compile_updates(device, update_critics, update_policy)

    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, rng, device)
    start, evaluations = load_checkpoint(run_dir, agent, buffer, rng)
    if start > args.total_timesteps:
        sys.exit(f"--total-timesteps {args.total_timesteps}: the run has done {start} steps")
    # Only now, so that a command that is refused leaves the old one alone.
    (run_dir / "config.json").write_text(json.dumps(config, indent=2))
    writer = SummaryWriter(run_dir, purge_step=start + 1 if start else 0)
    flags = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|flag|value|\n|-|-|\n{flags}", start)
    if start == 0:
        record_evaluation(0, agent, eval_env, args, run_dir, evaluations, writer)

    clock = time.perf_counter()
    saved = start  # step of the last checkpoint
    done = True
    losses = {}
    steps = range(start + 1, args.total_timesteps + 1)
    bar = tqdm(steps, initial=start, total=args.total_timesteps, disable=None)
    for step in bar:
        if done:
            obs, _ = env.reset(seed=int(rng.integers(2**31)))
            episode_return = 0.0
            episode_length = 0

        # Act: uniformly at random at first, then by a policy wider than N(mu, Sigma).
        if step <= args.learning_starts:
            action = rng.uniform(-1.0, 1.0, action_dim).astype(np.float32)
            mean = action  # any will do, as S is infinite
            std = np.full(action_dim, np.inf, np.float32)
        else:
            mean, std = agent.actor.act(obs)
            std *= args.exploration
            action = mean + std * rng.standard_normal(action_dim, np.float32)

        # Step, and store the transition.
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated, mean, std**2)
        obs = next_obs
        done = terminated or truncated
        episode_return += reward
        episode_length += 1

        # Learn: the critics at every step, the policy and the targets at some.
        if step > args.learning_starts:
            losses |= update_critics(*buffer.sample(args.batch_size))
            if step % args.policy_delay == 0:
                losses |= update_policy(*buffer.sample(args.batch_size))

        # Log.
        if done:
            writer.add_scalar("charts/episodic_return", episode_return, step)
            writer.add_scalar("charts/episodic_length", episode_length, step)
            bar.set_postfix_str(f"return {episode_return:.0f}", refresh=False)
        if step % LOG_FREQUENCY == 0:
            _, std = agent.actor.act(obs)
            log_losses(step, losses, std, writer)
            steps_per_second = (step - start) / (time.perf_counter() - clock)
            writer.add_scalar("charts/SPS", steps_per_second, step)

        # Evaluate without noise.
        if step % args.eval_frequency == 0 or step == args.total_timesteps:
            record_evaluation(step, agent, eval_env, args, run_dir, evaluations, writer)

        # Save a checkpoint, between two episodes: so it holds no state of the environment.
        if (done and step - saved >= args.checkpoint_frequency) or step == args.total_timesteps:
            writer.flush()
            save_checkpoint(run_dir, step, agent, buffer, rng, evaluations)
            saved = step
    writer.close()


def main(args):
    """Train, or resume the run in args.run_dir. Return the run folder, a Path."""
    check(args)
    with contextlib.closing(make_env(args.env_id)) as env:
        run_dir, config = start_run(args, env.spec.id)
        with (
            contextlib.closing(make_eval_env(args, run_dir)) as eval_env,
            track(args, run_dir, config),
        ):
            try:
                train(args, env, eval_env, run_dir, config)
            except KeyboardInterrupt:
                sys.exit(f"stopped; to resume, repeat the command with --run-dir {run_dir}")
    print(f"finished; the results are in {run_dir}")
    return run_dir


if __name__ == "__main__":
    sys.path.insert(0, "")  # so that --env-id my_module:MyTask-v0 finds my_module.py here
    warnings.filterwarnings("ignore", message=".*(is out of date|TensorFloat32)")  # papers use v4
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
