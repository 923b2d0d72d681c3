"""DDPG: learn a deterministic policy from a Q-function (Lillicrap et al., ICLR 2016), the baseline of the Smoothie paper.

The gradient of the critic in the action gives the gradient of the expected return in the policy:

    grad_theta O = E_s[ dQ/da  at a = mu(s), times grad_theta mu(s) ]                                            (6)

Q is learned from replayed (s, a, r, s') with targets r + gamma Q'(s', mu'(s')):                                 (8)

    theta        actor.parameters()     theta', w'         target_actor, target_qfs (Polyak averages at rate tau)
    w            qfs.parameters()       mu_theta(s)        actor(observations)
                                        dQ/da              qf.action_gradient(observations, actions)
In E_s, replayed states stand in for the policy's. Actions are in normalised units, half their range, except in the environment.
Equation numbers are those of the Smoothie paper (Nachum et al., ICML 2018). Exploration is an Ornstein-Uhlenbeck process.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "gymnasium[mujoco]==1.4.0", "mujoco==3.3.7", "numpy==2.4.6", "tyro==1.0.17",
#     "tensorboard==2.21.0", "tqdm==4.70.1", "wandb==0.31.0", "imageio-ffmpeg==0.8.1"]
# ///

import copy
import hashlib
import importlib.metadata
import io
import json
import math
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import imageio
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_FREQUENCY = 100  # environment steps between two records of the losses
STOP, signals = {signal.SIGINT, signal.SIGTERM}, []  # the signals that stop a run; those received so far


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # seed of the networks, exploration, replay and environment
    cuda: bool = True  # use the GPU if there is one
    compile: bool = True  # compile the update into one graph: slower to start, then 1.4 to 2.1 times as fast
    threads: int = 1  # CPU threads that PyTorch uses
    track: bool = False  # mirror every logged value to Weights & Biases
    wandb_project_name: str = "smoothie"  # the Weights & Biases project
    env_id: str = "Hopper-v4"  # gymnasium task with bounded Box actions (Section 6.2)
    total_timesteps: int = 1_000_000  # environment steps
    learning_starts: int = 1_000  # first steps, random and without updates; 10_000 is better on HalfCheetah
    buffer_size: int = 1_000_000  # transitions that the replay buffer keeps
    batch_size: int = 64  # transitions in each of the two batches of an update
    gamma: float = 0.99  # discount factor (Section 2.1)
    tau: float = 0.01  # rate of the Polyak averages theta', w'
    reward_scale: float = 0.1  # factor on the rewards that the critic sees (Section 6.2); logged returns are not scaled
    policy_lr: float = 1e-4  # learning rate of theta, by Adam
    q_lr: float = 1e-3  # learning rate of w, by Adam
    critics: int = 1  # number of critics; the policy uses the first, the target the smallest value (TD3, Fujimoto et al., 2018)
    max_grad_norm: float = 4.0  # bound on the norm of the critics' gradient; inf turns clipping off
    ou_theta: float = 0.15  # damping of the Ornstein-Uhlenbeck exploration (Section 6.2); 1 makes the noise independent
    ou_sigma: float = 0.1  # scale of the Ornstein-Uhlenbeck exploration, in normalised units per step (Section 6.2)
    eval_frequency: int = 5_000  # environment steps between two evaluations of the mean action
    eval_episodes: int = 10  # episodes of each evaluation
    checkpoint_frequency: int = 0  # environment steps between two checkpoints; with 0, only Ctrl-C and SIGTERM write one
    capture_video: bool = False  # write an MP4 of the first episode of each evaluation
    resume: str | None = None  # continue the run in this folder from its last checkpoint, with its flags
    evaluate: str | None = None  # do not train: evaluate the policy in this run folder


def check(args):
    """Exit with an error message if a flag is out of range or NaN."""
    limits = {"seed": (0, 2**31), "gamma": (0, 1), "tau": (1e-9, 1), "ou_theta": (0, 1)}
    for name, value in asdict(args).items():
        low, high = limits.get(name, (1 if type(value) is int and name != "checkpoint_frequency" else 0, math.inf))
        if type(value) in (int, float) and not low <= value <= high:
            sys.exit(f"--{name.replace('_', '-')} {value}: must lie between {low:g} and {high:g}")
    if args.batch_size > (rows := min(args.learning_starts, args.buffer_size)):
        sys.exit(f"--batch-size {args.batch_size}: the replay buffer holds only {rows} transitions before learning starts")
    if args.learning_starts >= args.total_timesteps:
        sys.exit(f"--learning-starts {args.learning_starts}: nothing is learned in --total-timesteps {args.total_timesteps}")


def make_env(env_id, render_mode=None):
    """Return the task with flat observations, and with actions scaled from [-1, 1] to its bounds and clipped to them."""
    try:
        env = gym.make(env_id, **({"render_mode": render_mode} if render_mode else {}))
        space, states = env.action_space, env.observation_space
        box = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f" and space.is_bounded()
        if not box or (space.low == space.high).any() or not states.is_np_flattenable:
            raise ValueError(f"needs a 1-D Box of bounded real actions and observations of a fixed size, not {space}, {states}")
        env = gym.wrappers.TransformAction(env, lambda action: np.clip(action, space.low, space.high), space)
        env = gym.wrappers.RescaleAction(gym.wrappers.FlattenObservation(env), *np.array([-1, 1], space.dtype))
        return gym.wrappers.RecordEpisodeStatistics(env)
    except (gym.error.Error, ImportError, NotImplementedError, ValueError) as error:
        sys.exit(f"--env-id {env_id}: {' '.join(str(error).split())}")


class Actor(nn.Module):
    """The deterministic policy: forward gives mu_theta(s) (batch, action_dim)."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.fc1, self.fc2, self.fc_mean = nn.Linear(obs_dim, 400), nn.Linear(400, 300), nn.Linear(300, action_dim)
        nn.init.uniform_(self.fc_mean.weight, -3e-3, 3e-3)

    def forward(self, observations):
        return torch.tanh(self.fc_mean(torch.relu(self.fc2(torch.relu(self.fc1(observations))))))

    @torch.inference_mode()
    def mean_action(self, obs):
        """Return mu_theta(s) of one observation, both NumPy arrays."""
        return self(torch.as_tensor(obs, dtype=torch.float32, device=self.fc_mean.bias.device)).cpu().numpy()


class QNetwork(nn.Module):
    """Q_w(s, a) (batch,). The layer that the action enters is GELU, as in Smoothie."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.fc1, self.fc2, self.fc_q = nn.Linear(obs_dim, 400), nn.Linear(400 + action_dim, 300), nn.Linear(300, 1)
        nn.init.uniform_(self.fc_q.weight, -3e-3, 3e-3)

    def hidden(self, observations, actions):
        return self.fc2(torch.cat([torch.relu(self.fc1(observations)), actions], 1))

    def forward(self, observations, actions):
        return self.fc_q(nn.functional.gelu(self.hidden(observations, actions))).squeeze(1)

    def action_gradient(self, observations, actions):
        """Return dQ/da (batch, action_dim) in closed form.

        With z = W_s e(s) + W_a a + b and q = w.gelu(z) + c: dq/da = (w * gelu'(z)) W_a, where gelu' = cdf(z) + z pdf(z) with
        the cdf and pdf of N(0, 1). For another network use torch.func.grad.
        """
        z, w, w_a = self.hidden(observations, actions), self.fc_q.weight, self.fc2.weight[:, -actions.shape[1] :]
        cdf, pdf = 0.5 * (1 + torch.erf(z / math.sqrt(2))), torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return (w * (cdf + z * pdf)) @ w_a


class ReplayBuffer:
    """The last `capacity` transitions, packed float32 rows (s, a, r, s', terminated); a is kept as drawn, not clipped."""

    def __init__(self, capacity, obs_dim, action_dim, rng, device="cpu"):
        self.widths, self.count, self.rng, self.device = (obs_dim, action_dim, 1, obs_dim, 1), 0, rng, device
        self.rows = np.zeros((capacity, sum(self.widths)), dtype=np.float32)

    def add(self, obs, action, reward, next_obs, terminated):
        self.rows[self.count % len(self.rows)] = np.concatenate([obs, action, [reward], next_obs, [terminated]])
        self.count += 1

    def sample(self, batch_size):
        """Return observations (B, obs_dim), actions (B, action_dim), rewards (B,), next_observations, terminated (B,)."""
        rows = self.rows[self.rng.integers(min(self.count, len(self.rows)), size=batch_size)]
        obs, actions, rewards, next_obs, terminated = torch.from_numpy(rows).to(self.device).split(self.widths, 1)
        return obs, actions, rewards.squeeze(1), next_obs, terminated.squeeze(1)

    def last(self, n, file):
        """Return views of the last n rows and move the file position there: row i of the run starts at byte i * row size."""
        file.seek((self.count - n) * self.rows[0].nbytes)
        i, j = (self.count - n) % len(self.rows), self.count % len(self.rows)
        return [self.rows[i:j]] if i < j or n == 0 else [self.rows[i:], self.rows[:j]]


class Adam(nn.Module):
    """torch.optim.Adam (Kingma and Ba, 2015) in operations that torch.compile can put into one graph with the gradients."""

    def __init__(self, params, lr):
        super().__init__()
        self.params, self.lr = params, lr
        self.m, self.v = (nn.ParameterList(map(torch.zeros_like, params)).requires_grad_(False) for _ in range(2))
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def step(self, grads, beta1=0.9, beta2=0.999, eps=1e-8):  # exp for beta^n: compiled code would repeat ** in its inner loop
        bias1, bias2 = 1 - (self.steps.add_(1) * math.log(beta1)).exp(), (1 - (self.steps * math.log(beta2)).exp()).sqrt()
        for p, grad, m, v in zip(self.params, grads, self.m, self.v, strict=True):
            m.lerp_(grad, 1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            p -= (self.lr * bias2 / bias1) * m / (v.sqrt() + eps * bias2)


class DDPG(nn.Module):
    """The networks, their optimisers and the update. state_dict() holds all of its state."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.args, self.actor = args, Actor(obs_dim, action_dim)
        self.qfs = nn.ModuleList(QNetwork(obs_dim, action_dim) for _ in range(args.critics))
        self.target_actor, self.target_qfs = (copy.deepcopy(net).requires_grad_(False) for net in (self.actor, self.qfs))
        self.theta, self.w = list(self.actor.parameters()), list(self.qfs.parameters())
        self.actor_optimizer, self.q_optimizer = Adam(self.theta, args.policy_lr), Adam(self.w, args.q_lr)

    def update(self, observations, batch):
        """One update: the policy on one batch, the critic on another, the targets. Return what to log."""
        metrics = self.update_policy(observations) | self.update_critic(*batch)
        with torch.no_grad():
            for net, target in [(self.actor, self.target_actor), (self.qfs, self.target_qfs)]:
                torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), self.args.tau)
        return metrics

    def update_policy(self, observations):
        """One step of theta along (6)."""
        mean = self.actor(observations)
        with torch.no_grad():
            gradient = self.qfs[0].action_gradient(observations, mean)
        loss = -(gradient * mean).sum(1).mean()  # its gradient is minus (6)
        self.actor_optimizer.step(torch.autograd.grad(loss, self.theta))
        return {"losses/actor_loss": loss.detach()}

    def update_critic(self, observations, actions, rewards, next_observations, terminated):
        """One step of w on (8). A time limit bootstraps, a termination does not."""
        with torch.no_grad():
            next_actions = self.target_actor(next_observations)
            next_values = torch.stack([qf(next_observations, next_actions) for qf in self.target_qfs])
            targets = self.args.reward_scale * rewards + self.args.gamma * (1 - terminated) * next_values.amin(0)
        values = torch.stack([qf(observations, actions) for qf in self.qfs])  # (critics, batch)
        losses = (values - targets).square().mean(1)
        norm = torch.nn.utils.get_total_norm(grads := torch.autograd.grad(losses.sum(), self.w))
        self.q_optimizer.step(torch._foreach_mul(grads, (self.args.max_grad_norm / norm).clamp(max=1.0)))
        return {"losses/qf1_loss": losses[0].detach(), "losses/qf1_values": values[0].detach().mean()}


def compile_update(update, device):
    """Return update() compiled into one graph, on a GPU a CUDA graph, or unchanged where nothing can be compiled."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # e.g. no C++ compiler or headers
        print(f"cannot compile, so updates will be slower ({type(error).__name__})", file=sys.stderr)
        return update
    tqdm.write("the first update compiles, which takes up to a minute")
    torch._dynamo.config.trace_autograd_ops = True  # the gradients belong to the graph
    options = {"fallback_random": True, "cpp.use_decompose_tanh": True}  # same random numbers as without; a faster tanh
    options |= {"triton.cudagraphs": True, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}  # shapes never change
    return torch.compile(update, fullgraph=True, isolate_recompiles=True, options=options)


def evaluate(actor, env, args, video):
    """Return [undiscounted return, length] of each episode of the mean action, or None if a signal interrupts."""
    rows, mp4 = [], args.capture_video and imageio.get_writer(video, fps=env.metadata.get("render_fps", 30), macro_block_size=2)
    for episode in range(args.eval_episodes):
        obs, info = env.reset(seed=10_000 + args.seed + episode)
        while "episode" not in info:  # RecordEpisodeStatistics puts it into the last step's
            if mp4 and episode == 0:
                mp4.append_data(env.render())
            obs, *_, info = env.step(actor.mean_action(obs))
            if signals:
                return None
        rows.append([float(info["episode"]["r"]), info["episode"]["l"]])
    return rows


def write(path, content):
    """Replace the file's content with a string or, by torch.save, a dict; a kill or a full disk leaves the old file."""
    if isinstance(content, dict):
        torch.save(content, buffer := io.BytesIO())
    Path(f"{path}.new").write_bytes(buffer.getbuffer() if isinstance(content, dict) else content.encode())
    Path(f"{path}.new").replace(path)


def check_finite(losses, agent, step):
    for name, tensor in [*losses.items(), *agent.named_parameters()]:
        if not tensor.isfinite().all():
            sys.exit(f"step {step}: {name} is not finite, training has diverged; try a lower learning rate or --reward-scale")


def main(args):
    """Train, or evaluate a trained policy."""
    check(args)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # numbers below 1e-38 change nothing and slow some processors down
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    rng = np.random.default_rng(args.seed)
    env, eval_env = make_env(args.env_id), make_env(args.env_id, "rgb_array" if args.capture_video else None)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = DDPG(obs_dim, action_dim, args).to(device)
    if args.evaluate is not None:
        try:
            agent.actor.load_state_dict(torch.load(Path(args.evaluate, "policy.pt"), device, weights_only=True))
        except Exception as error:  # a damaged or hostile file can raise anything
            sys.exit(f"{args.evaluate}: policy.pt is missing, damaged or of another network ({type(error).__name__})")
        results = evaluate(agent.actor, eval_env, args, Path(args.evaluate, "evaluate.mp4")) or sys.exit(128 + signals[0])
        return print(f"mean return {np.mean(results, 0)[0]:.2f}; return and length of each episode: {results}")
    qf, s, a = copy.deepcopy(agent.qfs[0]).cpu().double(), torch.randn(1, obs_dim).double(), torch.randn(1, action_dim).double()
    exact = torch.func.jacrev(qf, 1)(s, a)[0]
    if (qf.action_gradient(s, a) - exact).norm() > 1e-6 * exact.norm():
        sys.exit("QNetwork: action_gradient is not the gradient of forward; change both together")
    buffer = ReplayBuffer(min(args.buffer_size, args.total_timesteps), obs_dim, action_dim, rng, device)
    start, saved, episode_seed, episode_length, evaluations, history, losses = 0, 0, int(rng.integers(2**31)), 0, [], [], {}
    noise = np.zeros(action_dim, np.float32)
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    run_dir = Path("runs", name) if args.resume is None else Path(args.resume)
    run_dir.mkdir(parents=True, exist_ok=args.resume is not None)
    transitions = open(run_dir / "transitions.f32", "wb" if args.resume is None else "r+b")
    if args.resume is not None:
        try:  # weights_only: nothing in the file can run code
            state = torch.load(run_dir / "checkpoint.pt", "cpu", weights_only=True)
            agent.load_state_dict(state["agent"])
            start, evaluations, (episode_seed, episode_length) = state["step"], state["evaluations"], state["episode"]
            history = json.loads((run_dir / "config.json").read_text())["provenance"]
            rng.bit_generator.state, noise = json.loads(state["rng"]), np.float32(state["noise"])
            torch.set_rng_state(state["torch_rng"][0])
            if device.type == "cuda" and len(state["torch_rng"]) == 2:  # one if saved without a GPU
                torch.cuda.set_rng_state(state["torch_rng"][1])
            saved = buffer.count = state["count"]
            if any(transitions.readinto(v) < v.nbytes for v in buffer.last(min(saved, len(buffer.rows)), transitions)):
                raise ValueError("transitions are missing")
        except Exception as error:
            sys.exit(f"{run_dir}: the checkpoint is missing, damaged or of another network ({type(error).__name__})")
        if start > args.total_timesteps:
            sys.exit(f"--total-timesteps {args.total_timesteps}: this run has taken {start} steps already")
    obs, _ = env.reset(seed=episode_seed)
    for i in range(buffer.count - episode_length, buffer.count):  # replay the episode in progress
        row = buffer.rows[i % len(buffer.rows)]
        obs, *_ = env.step(row[obs_dim : obs_dim + action_dim])
    if episode_length and not np.array_equal(np.float32(obs), row[-obs_dim - 1 : -1]):
        sys.exit(f"{run_dir}: cannot replay the episode; the environment is not deterministic or --buffer-size is too small")
    script, git = Path(__file__).resolve(), "git describe --always --dirty --abbrev=40"
    commit = subprocess.run(git, shell=True, cwd=script.parent, capture_output=True, text=True).stdout.strip() or None
    made_by = {package: importlib.metadata.version(package) for package in ("torch", "gymnasium", "mujoco", "numpy")}
    made_by |= {"commit": commit, "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest()}
    config = asdict(args) | {"resume": None, "script": script.name, "provenance": [*history, made_by]}
    write(run_dir / "config.json", json.dumps(config, indent=2))
    if args.track:
        import wandb

        name = run_dir.resolve().name  # also the id, so that a resumed run continues there
        wandb.init(project=args.wandb_project_name, name=name, id=name, resume="allow", config=config, sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=start + bool(evaluations))  # hides what a killed run logged after its checkpoint
    print(f"run folder: {run_dir}, replay buffer: up to {buffer.rows.nbytes / 1e6:,.1f} MB")
    clock, speed, update = time.time(), "", None
    for step in tqdm(range(start, args.total_timesteps + 1), initial=start, total=args.total_timesteps + 1, disable=None):
        last, logs = step == args.total_timesteps, {}
        if step > start:  # the first pass only evaluates
            if step <= args.learning_starts:
                action = np.float32(rng.uniform(-1.0, 1.0, action_dim))
            else:
                noise += args.ou_sigma * rng.standard_normal(action_dim, np.float32) - args.ou_theta * noise
                action = agent.actor.mean_action(obs) + noise
            next_obs, reward, terminated, truncated, info = env.step(action)
            if not (math.isfinite(reward) and np.isfinite(next_obs).all()):
                check_finite(losses, agent, step)  # a diverged policy, which acts with NaN, is reported first
                sys.exit(f"step {step}: the environment returned a reward or an observation that is not finite")
            buffer.add(obs, action, reward, next_obs, terminated)
            obs = next_obs
            if terminated or truncated:
                logs |= {"charts/episodic_return": info["episode"]["r"], "charts/episodic_length": info["episode"]["l"]}
                (obs, _), noise = env.reset(seed=(episode_seed := int(rng.integers(2**31)))), np.zeros(action_dim, np.float32)
            if step > args.learning_starts:
                signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # Ctrl-C at a terminal would reach the compiler, too
                update = update or (compile_update(agent.update, device) if args.compile else agent.update)
                losses = update(buffer.sample(args.batch_size)[0], buffer.sample(args.batch_size))
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
            if step % LOG_FREQUENCY == 0:
                check_finite(losses, agent, step)
                sps, clock = min(LOG_FREQUENCY, step - start) / (time.time() - clock), time.time()
                speed = f", {sps:.0f} steps/s"
                logs |= losses | {"charts/SPS": sps}
        if (step % args.eval_frequency == 0 or last) and not (evaluations and evaluations[-1][0] == step):
            check_finite(losses, agent, step)  # so that a diverged policy does not replace policy.pt
            if results := evaluate(agent.actor, eval_env, args, run_dir / f"step_{step}.mp4"):
                evaluations += [[step, episode, *result] for episode, result in enumerate(results)]
                rows = [["global_step", "episode", "episodic_return", "episodic_length"], *evaluations]
                write(run_dir / "evaluations.csv", "".join(",".join(map(str, row)) + "\n" for row in rows))
                write(run_dir / "policy.pt", agent.actor.state_dict())
                mean, length = np.mean(results, 0)
                logs |= {"eval/episodic_return": mean, "eval/episodic_length": length}
                tqdm.write(f"step {step}: eval return {mean:.2f}{speed}")
        for key, value in logs.items():
            writer.add_scalar(key, value, step)
        writer.flush()
        stop = signals[:1]  # read once: a later signal waits for the next step
        if stop or (args.checkpoint_frequency and step > start and (step % args.checkpoint_frequency == 0 or last)):
            check_finite(losses, agent, step)
            transitions.writelines(buffer.last(min(buffer.count - saved, len(buffer.rows)), transitions))
            transitions.flush()
            saved = buffer.count
            state = {"step": step, "evaluations": evaluations, "episode": [episode_seed, env.episode_lengths], "count": saved}
            state |= {"torch_rng": [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device.type == "cuda" else [])]}
            state |= {"noise": noise.tolist()}
            write(run_dir / "checkpoint.pt", state | {"agent": agent.state_dict(), "rng": json.dumps(rng.bit_generator.state)})
        if stop:
            tqdm.write(f"step {step}: {signal.Signals(stop[0]).name}; continue with --resume {run_dir}", file=sys.stderr)
            sys.exit(128 + stop[0])
    print(f"finished; the results are in {run_dir}")
    return run_dir


def parse_args():
    """Return the flags. With --resume and --evaluate, flags that are not given come from that run."""
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    folder = args.evaluate if args.evaluate is not None else args.resume
    if folder is not None:
        try:
            config = json.loads(Path(folder, "config.json").read_text())
            script, _ = config.pop("script"), config.pop("provenance")
            args = tyro.cli(Args, default=Args(**config))
            if script != Path(__file__).name or any(getattr(args, k) != config[k] for k in ("env_id", "seed", "buffer_size")):
                raise ValueError(f"{script} made it; --env-id, --seed and --buffer-size cannot change")
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"{folder!r}: this script cannot resume or evaluate it ({error})")
    return args


if __name__ == "__main__":
    sys.path.insert(0, "")  # for --env-id my_module:MyTask-v0
    sys.stdout.reconfigure(line_buffering=True)
    warnings.filterwarnings("ignore", message=".*(is out of date|TensorFloat32)")  # v4 is what papers report; TF32 stays off

    def on_signal(number, _):
        signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once, or after compiling

    for number in STOP:
        signal.signal(number, on_signal)
    try:
        main(parse_args())
    except (OSError, MemoryError) as error:
        sys.exit(f"cannot read, write or allocate: {error}")
