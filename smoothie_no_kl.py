"""Smoothie: learn a Gaussian policy from a smoothed Q-function (Nachum et al., ICML 2018, Algorithm 1 without the KL penalty).

Smoothie's critic does not answer "what is action a worth?" but "what is it worth to act with Gaussian noise around a?":

    Q~(s, a) = E[Q(s, a~)],  a~ ~ N(a, Sigma)                                                                    (9)

Its gradient and its Hessian in the action are then the exact gradients of the expected return in the mean and in the
covariance of the policy pi(.|s) = N(mu_theta(s), Sigma_phi), so neither update samples an action:

    grad_theta O = E_s[ dQ~/da  at a = mu(s), times grad_theta mu(s) ]                                          (13)
    grad_phi   O = E_s[ 1/2 d2Q~/da2 at a = mu(s), times grad_phi Sigma ]        (Theorem 1)              (14), (15)

Q~ is learned from replayed (s, a~, r, s'): a phantom action a ~ N(a~, Sigma) is regressed on r + gamma Q~'(s', mu'(s')),
whose average is the smoothed Bellman equation where the buffer is near-uniform in a~ (Section 4.2)       (12), (18)

    theta        actor.parameters()     theta', phi', w'   target_actor, target_qf (Polyak averages at rate tau)
    phi          actor.log_var          mu_theta(s)        actor(observations)
    Sigma_phi    exp(actor.log_var)     dQ~/da, d2Q~/da2   qf.action_derivatives(observations, actions)
    w            qf.parameters()

Actions are in normalised units everywhere but inside the environment: 1 is half the range of that dimension.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==3.3.7",
#     "numpy==2.4.6",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "wandb==0.31.0",
#     "imageio-ffmpeg==0.8.1",
# ]
# ///

import contextlib
import csv
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None

LOG_FREQUENCY = 100  # environment steps between two records of the losses, each also a check that training is sane
EVAL_SEED_OFFSET = 10_000  # evaluation episodes start from another seed than training
CHECKPOINT_FORMAT = 1  # raised when a checkpoint of before can no longer be read
MAX_STD = 1.0  # half an action's range: of a wider policy the environment sees mostly the bounds, and nothing narrows it


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of this experiment, part of the run's folder"""
    seed: int = 1
    """seed of everything random: networks, exploration, replay, environment"""
    torch_deterministic: bool = True
    """let cuDNN use deterministic algorithms only"""
    cuda: bool = True
    """use the GPU if there is one"""
    compile: bool = False
    """compile the whole update into one graph: half a minute to start the first time, then faster (needs a C++ compiler)"""
    track: bool = False
    """mirror every logged value to Weights & Biases"""
    wandb_project_name: str = "smoothie"
    """the project on Weights & Biases"""
    wandb_entity: str | None = None
    """the user or team on Weights & Biases"""

    env_id: str = "Hopper-v4"
    """the gymnasium task: a one-agent task with Box observations and bounded Box actions (Section 6.2)"""
    total_timesteps: int = 1_000_000
    """environment steps to train for: N of Algorithm 1"""
    learning_starts: int = 1_000
    """first steps, taken with uniformly random actions and without updates, for the near-uniform buffer of Section 4.2"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer keeps"""
    batch_size: int = 64
    """transitions in each of the two batches of an update: B of Algorithm 1"""
    gamma: float = 0.99
    """discount factor (Section 2.1)"""
    tau: float = 0.01
    """rate of the Polyak averages theta', phi', w': the target network lag of Algorithm 1"""
    reward_scale: float = 0.1
    """factor on the rewards that the critic sees (Section 6.2); logged returns are never scaled"""
    policy_lr: float = 1e-4
    """learning rate of theta, by Adam: eta_pi of Algorithm 1"""
    q_lr: float = 1e-3
    """learning rate of w, by Adam: eta_Q of Algorithm 1"""
    max_grad_norm: float = 4.0
    """bound on the norm of the critic's gradient; inf leaves it alone"""
    log_var_init: float = -2.0
    """phi_0, the initial logarithm of the variance of each action dimension, in normalised units (Section 6.2)"""
    log_var_lr: float = 0.3
    """learning rate of phi, by plain gradient ascent, relative to the running size of the values: eta_pi of Algorithm 1"""
    eval_frequency: int = 5_000
    """environment steps between two evaluations of the mean action"""
    eval_episodes: int = 10
    """episodes of each evaluation"""

    checkpoint_frequency: int = 0
    """environment steps between two checkpoints; with 0 only Ctrl-C and SIGTERM write one"""
    save_model: bool = False
    """write the policy to policy.pt at each evaluation"""
    capture_video: bool = False
    """write an MP4 and a GIF of the first episode of each evaluation"""
    resume: str | None = None
    """go on with the run in this folder, from its last checkpoint and with its flags"""
    evaluate: str | None = None
    """do not train: evaluate the policy.pt in this run's folder"""
    render: bool = False
    """with --evaluate: show the episodes in a window"""


def make_env(env_id, render_mode=None):
    """Return the environment behind normalised actions: it receives bias + scale * clip(action, -1, 1), per dimension."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date")  # v4 is what the literature reports
            env = gym.make(env_id, **({"render_mode": render_mode} if render_mode else {}))
    except (gym.error.Error, ImportError, ValueError) as error:
        sys.exit(f"--env-id {env_id}: {' '.join(str(error).split())}")
    except AttributeError as error:  # what MuJoCo raises where the library for drawing is not there
        if not (library := os.environ.get("MUJOCO_GL")):
            raise
        sys.exit(f"MUJOCO_GL={library}: its library cannot be loaded ({error}); install it, or unset MUJOCO_GL to draw nothing")
    for what, space in [("observations", env.observation_space), ("actions", env.action_space)]:
        if not isinstance(space, gym.spaces.Box):
            sys.exit(f"--env-id {env_id}: {what} must be a Box, not {type(space).__name__}")
    low, high = env.action_space.low, env.action_space.high
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        sys.exit(f"--env-id {env_id}: needs finite action bounds, not {low.min():g} to {high.max():g}")
    bias, scale = (high + low) / 2, (high - low) / 2
    unit_box = gym.spaces.Box(-1.0, 1.0, (low.size,), low.dtype)
    env = gym.wrappers.TransformAction(env, lambda a: bias + scale * np.clip(a, -1.0, 1.0).reshape(bias.shape), unit_box)
    return env if len(env.observation_space.shape) == 1 else gym.wrappers.FlattenObservation(env)


class Actor(nn.Module):
    """The Gaussian policy N(mu_theta(s), diag(exp(phi))): forward gives mu (batch, action_dim), log_var is phi."""

    def __init__(self, obs_dim, action_dim, log_var_init):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim, 400)
        self.fc2 = nn.Linear(400, 300)
        self.fc_mean = nn.Linear(300, action_dim)
        nn.init.uniform_(self.fc_mean.weight, -3e-3, 3e-3)
        nn.init.uniform_(self.fc_mean.bias, -3e-3, 3e-3)
        self.log_var = nn.Parameter(torch.full((action_dim,), log_var_init))

    def forward(self, observations):
        x = F.relu(self.fc1(observations))
        x = F.relu(self.fc2(x))
        return torch.tanh(self.fc_mean(x))


class QNetwork(nn.Module):
    """Q~_w(s, a) (batch,). Its units are tanh because a ReLU network has no Hessian in the action."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim, 400)
        self.fc2 = nn.Linear(400 + action_dim, 300)
        self.fc_q = nn.Linear(300, 1)
        nn.init.uniform_(self.fc_q.weight, -3e-3, 3e-3)
        nn.init.uniform_(self.fc_q.bias, -3e-3, 3e-3)

    def hidden(self, observations, actions):
        x = torch.tanh(self.fc1(observations))
        return torch.tanh(self.fc2(torch.cat([x, actions], 1)))

    def forward(self, observations, actions):
        return self.fc_q(self.hidden(observations, actions)).squeeze(1)

    def action_derivatives(self, observations, actions):
        """Return dQ~/da and the diagonal of d2Q~/da2, each (batch, action_dim), in closed form.

        With h = tanh(z), z = W_s e(s) + W_a a + b, q = w.h + c: dq/da = ((1 - h^2) * w) W_a and
        d2q/da_i^2 = (-2 h (1 - h^2) * w) (W_a^2)_i.
        """
        h = self.hidden(observations, actions)
        action_weight = self.fc2.weight[:, -actions.shape[1] :]
        slope = (1 - h * h) * self.fc_q.weight
        return slope @ action_weight, (-2 * h * slope) @ action_weight.square()


class ReplayBuffer:
    """The last `capacity` transitions, one packed float32 row (s, a~, r, s', terminated) each, sampled uniformly.

    Memory is claimed as rows are written. Actions are kept as they were drawn, in normalised units, never clipped.
    """

    def __init__(self, capacity, obs_dim, action_dim, rng, device="cpu"):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)
        self.rows = np.zeros((capacity, sum(self.widths)), dtype=np.float32)
        self.count, self.saved, self.rng, self.device = 0, 0, rng, device

    def add(self, obs, action, reward, next_obs, terminated):
        row = self.rows[self.count % len(self.rows)]
        o, a = self.widths[:2]
        row[:o], row[o : o + a], row[o + a] = obs, action, reward
        row[o + a + 1 : -1], row[-1] = next_obs, terminated
        self.count += 1

    def sample(self, batch_size):
        """Return observations (B, obs_dim), actions (B, action_dim), rewards (B,), next_observations, terminated (B,)."""
        rows = self.rows[self.rng.integers(min(self.count, len(self.rows)), size=batch_size)]
        obs, actions, rewards, next_obs, terminated = torch.from_numpy(rows).to(self.device).split(self.widths, 1)
        return obs, actions, rewards.squeeze(1), next_obs, terminated.squeeze(1)

    def save(self, folder):
        """Write the rows that were added since the last save to a file of their own, named by the first and the end."""
        start = max(self.saved, self.count - len(self.rows))
        if start < self.count:
            a, b = start % len(self.rows), self.count % len(self.rows)
            with open(os.path.join(folder, f"rows_{start}_{self.count}.f32"), "wb") as file:
                for rows in [self.rows[a:b]] if a < b else [self.rows[a:], self.rows[:b]]:
                    rows.tofile(file)
                file.flush()
                os.fsync(file.fileno())
        self.saved = self.count

    def load(self, folder, count):
        """Read back the buffer that had received `count` rows. Raise ValueError unless all of it is there."""
        self.forget(folder, lambda start, end: end > count)  # written by a save that was never finished
        self.count = self.saved = count
        found = 0
        for name, start, end in self.files(folder):
            first = min(max(start, count - len(self.rows)), end)  # end: a file of old rows that a kill left behind
            with open(os.path.join(folder, name), "rb") as file:
                file.seek((first - start) * self.rows[0].nbytes)
                for i in range(first, end, 10_000):  # in parts: all rows at once could be gigabytes
                    index = np.arange(i, min(i + 10_000, end))
                    rows = np.fromfile(file, np.float32, index.size * self.rows.shape[1])
                    self.rows[index % len(self.rows)] = rows.reshape(index.size, -1)
            found += end - first
        if found != min(count, len(self.rows)):
            raise ValueError(f"{found} of {min(count, len(self.rows))} transitions are there")

    def forget(self, folder, unwanted):
        for name, start, end in self.files(folder):
            if unwanted(start, end):
                os.remove(os.path.join(folder, name))

    @staticmethod
    def files(folder):
        names = [re.fullmatch(r"rows_(\d+)_(\d+)\.f32", name) for name in os.listdir(folder)]
        return sorted((name[0], int(name[1]), int(name[2])) for name in names if name)


class Episode:
    """The training episode in progress.

    To restore it exactly, whatever the simulator keeps to itself, it is played again: from the state that the environment's
    generator had before the reset, with the same actions.
    """

    def __init__(self, env, seed):
        self.env, self.seed, self.rng_state = env, seed, None
        self.restart()

    def restart(self):
        self.obs, _ = self.env.reset(seed=self.seed if self.rng_state is None else None)
        self.actions, self.episodic_return = [], 0.0

    def begin(self):
        """Start the next episode."""
        self.rng_state = self.env.unwrapped.np_random.bit_generator.state
        self.restart()

    def step(self, action):
        """Return what env.step does, but for the infos."""
        self.obs, reward, terminated, truncated, _ = self.env.step(action)
        self.actions.append(action)
        self.episodic_return += float(reward)
        return self.obs, reward, terminated, truncated

    def state_dict(self):
        actions = torch.from_numpy(np.array(self.actions))
        return {"rng": json.dumps(self.rng_state), "actions": actions, "obs": torch.from_numpy(np.array(self.obs))}

    def load_state_dict(self, state):
        """Raise ValueError if playing the episode again does not end at the same observation."""
        self.rng_state = json.loads(state["rng"])
        if self.rng_state is not None:
            self.env.unwrapped.np_random.bit_generator.state = self.rng_state
            self.restart()
        ended = [terminated or truncated for *_, terminated, truncated in map(self.step, state["actions"].numpy())]
        if any(ended) or not np.array_equal(self.obs, state["obs"].numpy()):
            raise ValueError("the environment did not repeat its episode, so it is not deterministic given its seed")


def policy_loss(mean, log_var, gradient, hessian):
    """Minus a surrogate of O: its gradient is minus (13) in theta, through mean, and minus (15) in phi.

    mean, gradient, hessian: (batch, action_dim), the last two constants; log_var: (action_dim,).
    """
    return -(gradient * mean).sum(1).mean() - 0.5 * (hessian.mean(0) * log_var.exp()).sum()


def td_target(rewards, terminated, next_values, gamma):
    """r + gamma Q~'(s', mu'(s')), all (batch,): a time limit bootstraps, a termination does not."""
    return rewards + gamma * (1 - terminated) * next_values


def critic_loss(values, targets):
    """Mean squared Bellman error (18), the buffer taken as near-uniform."""
    return F.mse_loss(values, targets)


class Adam(nn.Module):
    """Adam (Kingma and Ba, 2015) on a list of parameters: torch.optim.Adam's steps, which --compile could not trace."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8):
        super().__init__()
        self.params, self.lr, self.betas, self.eps = params, lr, betas, eps
        self.m = nn.ParameterList(torch.zeros_like(p) for p in params).requires_grad_(False)
        self.v = nn.ParameterList(torch.zeros_like(p) for p in params).requires_grad_(False)
        self.register_buffer("beta1_power", torch.ones(()))
        self.register_buffer("beta2_power", torch.ones(()))

    @torch.no_grad()
    def step(self, grads):
        """Move the parameters in place, given one gradient of the same shape for each."""
        beta1, beta2 = self.betas
        bias1 = 1 - self.beta1_power.mul_(beta1)
        bias2 = (1 - self.beta2_power.mul_(beta2)).sqrt()
        step_size, eps = self.lr * bias2 / bias1, self.eps * bias2
        for p, grad, m, v in zip(self.params, grads, self.m, self.v, strict=True):
            m.lerp_(grad, 1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            p -= step_size * m / (v.sqrt() + eps)


class Smoothie(nn.Module):
    """Algorithm 1: the networks, their optimisers and the update. state_dict() is all of its state."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, action_dim, args.log_var_init)
        self.target_actor = Actor(obs_dim, action_dim, args.log_var_init).requires_grad_(False)
        self.qf = QNetwork(obs_dim, action_dim)
        self.target_qf = QNetwork(obs_dim, action_dim).requires_grad_(False)
        self.target_actor.load_state_dict(self.actor.state_dict())
        self.target_qf.load_state_dict(self.qf.state_dict())
        self.theta = [p for p in self.actor.parameters() if p is not self.actor.log_var]
        self.w = list(self.qf.parameters())
        self.actor_optimizer = Adam(self.theta, args.policy_lr)
        self.q_optimizer = Adam(self.w, args.q_lr)
        self.params = [*self.actor.parameters(), *self.w]
        self.target_params = [*self.target_actor.parameters(), *self.target_qf.parameters()]
        self.register_buffer("value_scale", torch.ones(()))  # running mean of |target|

    def update(self, observations, batch):
        """One update of Algorithm 1: the policy on one batch, the critic on another, the targets. Return what to log."""
        metrics = self.update_policy(observations) | self.update_critic(*batch)
        self.update_targets()
        return metrics

    def update_policy(self, observations):
        """One step of theta along (13) and of phi along (15)."""
        mean, log_var = self.actor(observations), self.actor.log_var
        with torch.no_grad():
            gradient, hessian = self.qf.action_derivatives(observations, mean)
        loss = policy_loss(mean, log_var, gradient, hessian)
        *theta_grads, phi_grad = torch.autograd.grad(loss, [*self.theta, log_var])
        self.actor_optimizer.step(theta_grads)
        with torch.no_grad():
            log_var -= self.args.log_var_lr / self.value_scale * phi_grad
            log_var.clamp_(max=2 * math.log(MAX_STD))
        return {"losses/actor_loss": loss.detach(), "losses/hessian": hessian.mean()}

    def update_critic(self, observations, actions, rewards, next_observations, terminated):
        """One step of w on (18): phantom actions around the replayed ones, targets from the target networks."""
        with torch.no_grad():
            next_values = self.target_qf(next_observations, self.target_actor(next_observations))
            targets = td_target(rewards * self.args.reward_scale, terminated, next_values, self.args.gamma)
            phantom_actions = actions + (0.5 * self.actor.log_var).exp() * torch.randn_like(actions)
            self.value_scale.lerp_(targets.abs().mean(), self.args.tau).clamp_(min=1e-6)
        values = self.qf(observations, phantom_actions)
        loss = critic_loss(values, targets)
        grads = torch.autograd.grad(loss, self.w)
        norm = sum(g.square().sum() for g in grads).sqrt()
        self.q_optimizer.step(torch._foreach_mul(grads, (self.args.max_grad_norm / norm).clamp(max=1.0)))
        return {
            "losses/qf1_loss": loss.detach(),
            "losses/qf1_values": values.detach().mean(),
            "losses/value_scale": self.value_scale,
        }

    @torch.no_grad()
    def update_targets(self):
        torch._foreach_lerp_(self.target_params, self.params, self.args.tau)


def compiled(update):
    """Return update() as one graph, which on a GPU is replayed as a CUDA graph. The first call takes half a minute."""
    torch._dynamo.config.trace_autograd_ops = True  # the gradients belong to the graph
    options = {
        "fallback_random": True,  # draw the numbers that are drawn without --compile
        "cpp.use_decompose_tanh": True,  # tanh from exp: on the CPU several times as fast
        "triton.cudagraphs": True,
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,  # shapes and flags stay as they are for the whole run
    }
    return torch.compile(update, fullgraph=True, isolate_recompiles=True, options=options)


@torch.inference_mode()
def act(actor, obs):
    """Return mu_theta(s) of one observation, a NumPy array (action_dim,)."""
    return actor(torch.as_tensor(obs, dtype=torch.float32, device=actor.fc1.weight.device)).cpu().numpy()


class Film(gym.Wrapper):
    """Films the episode that follows film(path): all of it as path.mp4, every fourth frame, half as wide, as path.gif."""

    path, writers = None, None

    def film(self, path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.path = path

    def reset(self, **kwargs):
        result = self.env.reset(**kwargs)
        if self.path:
            import imageio  # with imageio-ffmpeg; nothing but videos needs them

            fps, self.frames = self.metadata.get("render_fps", 30), 0
            gif = imageio.get_writer(self.path + ".gif", duration=4000 / fps, loop=0)
            self.path, self.writers = None, (imageio.get_writer(self.path + ".mp4", fps=fps, macro_block_size=2), gif)
            self.draw()
        return result

    def step(self, action):
        result = self.env.step(action)
        if self.writers:
            self.draw()
            if result[2] or result[3]:
                for writer in self.writers:
                    writer.close()
                self.writers = None
        return result

    def draw(self):
        try:
            frame = self.env.render()
        except Exception as error:  # what a missing screen or library raises differs from one to the next
            sys.exit(f"cannot draw ({error}): without a screen, set MUJOCO_GL=egl or MUJOCO_GL=osmesa and install its library")
        if frame is None:
            sys.exit("cannot draw: the environment has no render_mode rgb_array")
        self.writers[0].append_data(frame)
        if self.frames % 4 == 0 and self.frames < 600:  # small enough for a README
            self.writers[1].append_data(frame[::2, ::2])
        self.frames += 1


def evaluate(actor, env, episodes, seed):
    """Return the undiscounted returns and the lengths of `episodes` episodes of the mean action from a seeded reset."""
    returns, lengths = [], []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        episode_return, length, done = 0.0, 0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(act(actor, obs))
            episode_return, length, done = episode_return + float(reward), length + 1, terminated or truncated
        returns.append(episode_return)
        lengths.append(length)
    return returns, lengths


def check(args):
    """Exit with one sentence on stderr if a flag is out of range."""
    for name, low, high in [
        ("seed", 0, 2**32 - 1),
        ("total_timesteps", 1, 10**12),
        ("learning_starts", 1, 10**12),
        ("buffer_size", 1, 10**12),
        ("batch_size", 1, 10**6),
        ("gamma", 0, 1),
        ("tau", 1e-9, 1),
        ("reward_scale", 1e-9, 1e9),
        ("policy_lr", 0, 1),
        ("q_lr", 0, 1),
        ("max_grad_norm", 1e-9, math.inf),
        ("log_var_init", -20, 2 * math.log(MAX_STD)),
        ("log_var_lr", 0, 1e9),
        ("eval_frequency", 1, 10**12),
        ("eval_episodes", 1, 10**6),
        ("checkpoint_frequency", 0, 10**12),
    ]:
        value = getattr(args, name)
        if not low <= value <= high:
            sys.exit(f"--{name.replace('_', '-')} {value}: must lie between {low:g} and {high:g}")
    in_buffer = min(args.learning_starts, args.buffer_size)
    if args.batch_size > in_buffer:
        sys.exit(
            f"--batch-size {args.batch_size}: the replay buffer holds only {in_buffer} transitions when learning starts; "
            "raise --learning-starts and --buffer-size, or lower --batch-size"
        )
    if args.compile and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl")):
        sys.exit("--compile: needs a C++ compiler, and there is no g++ or clang++ here; install one, or leave --compile away")


def provenance():
    """Return the versions of what the numbers depend on, and the commit of the script if it lies in a git repository."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    versions = {package: importlib.metadata.version(package) for package in ("torch", "gymnasium", "mujoco", "numpy")}
    return {"python": sys.version.split()[0], **versions, "commit": commit}


def replace(path, content):
    """Write bytes, or what torch.save makes of a dict, to a new file that takes the place of path once it is whole on disk."""
    if isinstance(content, dict):
        torch.save(content, buffer := io.BytesIO())
        content = buffer.getbuffer()
    try:
        with open(path + ".new", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(path + ".new")  # on a full disk its room is wanted
        raise


def read(path):
    """Return what torch.save wrote to path, tensors, numbers and strings only, or exit: nothing in the file can run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(
            f"{path}: not there; --checkpoint-frequency, Ctrl-C or SIGTERM write checkpoints, --save-model writes policy.pt"
        )
    except Exception as error:  # a damaged or hostile file can raise anything
        sys.exit(f"{path}: cannot be read ({type(error).__name__}), it is damaged or was not written by this script")


class Logger:
    """The run's folder: config.json, TensorBoard events, evaluations.csv (one row per episode), the checkpoint, policy.pt.

    What is logged is mirrored to W&B if tracked. One run at a time may have the folder. Where the disk is full or the folder is
    gone, the methods exit with one sentence; what is on disk stays as it is.
    """

    def __init__(self, args):
        name = re.sub(r"[^\w.-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
        self.args, self.run_dir, self.writer, self.wandb = args, args.resume or os.path.join("runs", name), None, None
        with self.writing():
            for attempt in itertools.count() if not args.resume else ():  # two runs of one name may start in the same second
                self.run_dir = os.path.join("runs", f"{name}_{attempt}" if attempt else name)
                with contextlib.suppress(FileExistsError):
                    os.makedirs(self.run_dir)
                    break
            self.lock = open(self.path("lock"), "w")
            try:
                fcntl and fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"{self.run_dir}: another run is going on in this folder; wait for its end or stop it")

    def path(self, *names):
        return os.path.join(self.run_dir, *names)

    @contextlib.contextmanager
    def writing(self):
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            sys.exit(f"{self.run_dir}: cannot write ({reason}); is there room, and is the folder still there and writable?")

    def open(self, start):
        """Begin to log after step `start`; what a killed run logged after that is dropped, as it will be logged again."""
        config = asdict(self.args) | {"resume": None, "provenance": [provenance()]}
        rows = ["global_step,episode,episodic_return,episodic_length\n"]
        with self.writing():
            if self.args.resume:
                with open(self.path("config.json")) as file:
                    before = json.load(file)["provenance"]
                config["provenance"] = before + [now for now in config["provenance"] if now != before[-1]]
                with open(self.path("evaluations.csv")) as file:
                    rows += [row for row in list(file)[1:] if row.endswith("\n") and int(row.split(",")[0]) <= start]
            replace(self.path("evaluations.csv"), "".join(rows).encode())
            replace(self.path("config.json"), json.dumps(config, indent=2).encode())
            os.makedirs(self.path("checkpoint"), exist_ok=True)
            self.writer = SummaryWriter(self.run_dir, purge_step=start + 1 if self.args.resume else None)
        if self.args.track:
            self.track(config)

    def track(self, config):
        import wandb

        name = os.path.basename(os.path.abspath(self.run_dir))  # as the id, too: a resumed run goes on in the same W&B run
        settings = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity, "id": name, "name": name}
        try:
            self.wandb = wandb.init(config=config, resume="allow", **settings)
        except wandb.Error as error:
            print(f"Weights & Biases: {error}; tracking offline, `wandb sync` sends it later", file=sys.stderr)
            wandb.teardown()  # the failed attempt still holds the run's id
            self.wandb = wandb.init(config=config, mode="offline", **settings)
        self.wandb.define_metric("*", step_metric="global_step")

    def log(self, values, global_step):
        with self.writing():
            for key, value in values.items():
                self.writer.add_scalar(key, value, global_step)
        if self.wandb:
            self.wandb.log({"global_step": global_step, **values}, step=global_step)

    def log_evaluation(self, returns, lengths, global_step):
        rows = [(global_step, i, *episode) for i, episode in enumerate(zip(returns, lengths, strict=True))]
        with self.writing(), open(self.path("evaluations.csv"), "r+", newline="") as file:  # r+: not anew in a deleted folder
            file.seek(0, os.SEEK_END)
            csv.writer(file, lineterminator="\n").writerows(rows)
        self.log({"eval/episodic_return": np.mean(returns), "eval/episodic_length": np.mean(lengths)}, global_step)

    def save_policy(self, policy):
        with self.writing():
            replace(self.path("policy.pt"), policy)

    def save_checkpoint(self, state, buffer):
        """Write the new rows of the buffer and then, in one stroke, the state that counts them."""
        with self.writing():
            buffer.save(self.path("checkpoint"))
            replace(self.path("checkpoint", "state.pt"), state)
            buffer.forget(self.path("checkpoint"), lambda start, end: end <= buffer.count - len(buffer.rows))
            self.writer.flush()

    def close(self):
        with contextlib.suppress(OSError):
            if self.writer:
                self.writer.close()
        if self.wandb:
            self.wandb.finish()
        self.lock.close()


class Stop:
    """While entered, Ctrl-C or SIGTERM is kept in `signal` for the loop to see. A second Ctrl-C ends the program; a second
    SIGTERM does not, as schedulers send more than one and kill in the end anyway.
    """

    signal = None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.keep) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def keep(self, number, frame):
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            self.__exit__()

    def __exit__(self, *_):
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)


def make_buffer(args, env, rng, device):
    """Return the replay buffer for this run, after saying how much memory it will take, or exit if that is too much."""
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    capacity = min(args.buffer_size, args.total_timesteps)
    row_bytes = 4 * (2 * obs_dim + action_dim + 2)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if capacity * row_bytes > memory:
        sys.exit(
            f"--buffer-size {args.buffer_size}: takes {capacity * row_bytes / 1e9:.1f} GB of memory and the machine has "
            f"{memory / 1e9:.1f} GB; --buffer-size {int(0.8 * memory / row_bytes)} fits"
        )
    print(f"replay buffer: {capacity * row_bytes / 1e9:.2f} GB once its {capacity} transitions are written")
    return ReplayBuffer(capacity, obs_dim, action_dim, rng, device)


def prepare(args):
    """Seed torch, set how it computes, and return the device."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_flush_denormal(True)  # numbers below 1e-38 change nothing and slow some processors down
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def train(args):
    """Algorithm 1. Return the mean return of every evaluation since the beginning of the run, in order."""
    check(args)
    device = prepare(args)
    rng = np.random.default_rng(args.seed)
    env, eval_env = make_env(args.env_id), Film(make_env(args.env_id, "rgb_array" if args.capture_video else None))
    buffer = make_buffer(args, env, rng, device)
    agent = Smoothie(env.observation_space.shape[0], env.action_space.shape[0], args).to(device)
    update = compiled(agent.update) if args.compile else agent.update
    episode = Episode(env, args.seed)
    evaluations, losses = [], {}
    identity = {"format": CHECKPOINT_FORMAT, "script": os.path.basename(__file__), "env_id": args.env_id, "seed": args.seed}

    def policy_std():
        return (0.5 * agent.actor.log_var.detach()).exp().cpu().numpy()

    def restore():
        """Set everything as it was at the last checkpoint, and return its step."""
        state = read(logger.path("checkpoint", "state.pt"))
        for key, ours in identity.items():
            if (theirs := state.get("identity", {}).get(key)) != ours:
                sys.exit(f"--resume {args.resume}: the {key} of this checkpoint is {theirs}, that of this run {ours}")
        try:
            agent.load_state_dict(state["agent"])
            buffer.load(logger.path("checkpoint"), state["count"])
            episode.load_state_dict(state["episode"])
            rng.bit_generator.state = json.loads(state["rng"])
            torch.set_rng_state(state["torch_rng"])
            if device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"])
        except (KeyError, RuntimeError, TypeError, ValueError, OSError) as error:
            sys.exit(f"--resume {args.resume}: this checkpoint does not fit or is not whole: {' '.join(str(error).split())}")
        evaluations.extend(state["evaluations"])
        return state["global_step"]

    def save(step):
        state = {
            "identity": identity,
            "agent": agent.state_dict(),
            "count": buffer.count,
            "episode": episode.state_dict(),
            "rng": json.dumps(rng.bit_generator.state),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
            "evaluations": evaluations,
            "global_step": step,
        }
        logger.save_checkpoint(state, buffer)

    def report_evaluation(step):
        with logger.writing() if args.capture_video else contextlib.nullcontext():
            if args.capture_video:
                eval_env.film(logger.path("videos", f"step_{step}"))
            returns, lengths = evaluate(agent.actor, eval_env, args.eval_episodes, args.seed + EVAL_SEED_OFFSET)
        logger.log_evaluation(returns, lengths, step)
        if args.save_model:
            logger.save_policy({"env_id": args.env_id, "actor": agent.actor.state_dict()})
        evaluations.append(float(np.mean(returns)))
        status = f"eval return {evaluations[-1]:.2f}, policy std {policy_std().mean():.3f}"
        bar.set_postfix_str(status)
        bar.write(f"step {step}: {status}, {sps} steps/s", file=sys.stdout)
        sys.stdout.flush()

    def check_sane(values, step):
        """Exit if training has diverged."""
        values = values | {"a network weight": sum(p.detach().sum() for p in agent.params).item()}
        for key, value in values.items():
            if not math.isfinite(value):
                sys.exit(
                    f"step {step}: {key} is {value:g}, training has diverged; "
                    "a lower --q-lr, --log-var-lr or --reward-scale usually helps"
                )

    progress = {"total": args.total_timesteps, "unit": " steps", "dynamic_ncols": True, "disable": not sys.stderr.isatty()}
    with contextlib.closing(Logger(args)) as logger, Stop() as stop, contextlib.ExitStack() as stack:
        start = restore() if args.resume else 0
        logger.open(start)
        bar = stack.enter_context(tqdm(initial=start, **progress))
        bar.write(f"run folder: {logger.run_dir}", file=sys.stdout)
        sps, clock = 0, time.time()
        if start == 0:
            report_evaluation(0)

        for step in range(start + 1, args.total_timesteps + 1):
            obs = episode.obs
            if step <= args.learning_starts:
                action = rng.uniform(-1.0, 1.0, env.action_space.shape)
            else:
                action = act(agent.actor, obs) + policy_std() * rng.standard_normal(env.action_space.shape)
            next_obs, reward, terminated, truncated = episode.step(action)
            buffer.add(obs, action, reward, next_obs, terminated)
            if terminated or truncated:
                ended = {"charts/episodic_return": episode.episodic_return, "charts/episodic_length": len(episode.actions)}
                logger.log(ended, step)
                episode.begin()

            if step > args.learning_starts:
                losses = update(buffer.sample(args.batch_size)[0], buffer.sample(args.batch_size))

            last, stopped = step == args.total_timesteps, stop.signal
            checkpoint = stopped or (args.checkpoint_frequency and (step % args.checkpoint_frequency == 0 or last))
            if step % LOG_FREQUENCY == 0 or checkpoint:
                values = {key: value.item() for key, value in losses.items()}
                values |= {f"policy/std_{i}": std_i for i, std_i in enumerate(policy_std().tolist())}
                if step % LOG_FREQUENCY == 0:
                    sps, clock = int(LOG_FREQUENCY / (time.time() - clock)), time.time()
                    logger.log(values | {"charts/SPS": sps}, step)
                check_sane(values, step)
            if step % args.eval_frequency == 0 or last:
                report_evaluation(step)
            if checkpoint:
                save(step)
            bar.update()
            if stopped:
                bar.write(f"step {step}: {stopped.name}; go on with --resume {logger.run_dir}", file=sys.stderr)
                sys.exit(128 + stopped)
    return evaluations


def watch(args):
    """Evaluate a saved policy: the same episodes as in training, and so the same returns as its last evaluation."""
    check(args)
    policy = read(os.path.join(args.evaluate, "policy.pt"))
    device = prepare(args)
    mode = "human" if args.render else "rgb_array" if args.capture_video else None
    try:
        env = Film(make_env(policy["env_id"], mode))
        actor = Actor(env.observation_space.shape[0], env.action_space.shape[0], args.log_var_init).to(device)
        actor.load_state_dict(policy["actor"])
    except (KeyError, RuntimeError, TypeError) as error:
        sys.exit(f"--evaluate {args.evaluate}: policy.pt is not one of this script ({' '.join(str(error).split())})")
    try:
        if args.capture_video:
            env.film(os.path.join(args.evaluate, "videos", "evaluate"))
        returns, lengths = evaluate(actor, env, args.eval_episodes, args.seed + EVAL_SEED_OFFSET)
    except OSError as error:
        sys.exit(f"{args.evaluate}: cannot write the video ({error.strerror or error})")
    for i, (episode_return, length) in enumerate(zip(returns, lengths, strict=True)):
        print(f"episode {i}: return {episode_return}, {length} steps")
    print(f"mean return {np.mean(returns):.2f} over {args.eval_episodes} episodes")
    env.close()


def command_line():
    """Return the flags; with --resume and --evaluate those that are not given are as in that run."""
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    if folder := args.resume or args.evaluate:
        try:
            with open(os.path.join(folder, "config.json")) as file:
                config = json.load(file)
            args = tyro.cli(Args, default=Args(**{name: config[name] for name in asdict(args)}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"{folder}: not the folder of a run of this script ({type(error).__name__}: {error})")
    if args.render and not args.evaluate:
        sys.exit("--render: goes with --evaluate; --capture-video writes videos while training")
    if args.render and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        sys.exit("--render: there is no screen here (DISPLAY is not set); --capture-video needs none")
    return args


if __name__ == "__main__":
    args = command_line()
    watch(args) if args.evaluate else train(args)
