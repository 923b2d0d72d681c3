"""Steps per second and memory of our scripts, CleanRL, Stable-Baselines3 and SBX on the same work.

    pip install -r benchmarks/requirements.txt
    git clone https://github.com/vwxyzjn/cleanrl && git -C cleanrl checkout fe8d8a0
    python benchmarks/speed.py --cleanrl cleanrl --output speed.md

Each contestant trains in a process of its own: Walker2d-v4, two hidden layers of 256 units, one
critic update per step, on one core that all of them share. They take turns: each runs a
window of steps while the others wait. The scripts run as they are, with their logging.

The floor replays the matrix products of ddpg_continuous.py's updates, the fewest of all, and steps
the environment with random actions. With the same matrix library, nothing does this work faster.
"""

import functools
import importlib
import importlib.metadata
import multiprocessing
import os
import platform
import re
import runpy
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
TASK = "Walker2d-v4"
LEARNING_STARTS = 1000  # random steps
WARMUP = 300  # steps with updates before the first window; compilation falls into them
NEVER = 10**9  # steps
SCRIPTS = ["smoothie_continuous", "smoothie_no_kl", "smoothie_closed_form", "ddpg_continuous"]
SIZES = {
    "TD3": {"critics": 2, "policy_delay": 2, "batch_size": 256},
    "DDPG": {"critics": 1, "policy_delay": 1, "batch_size": 128},
}


@dataclass
class Args:
    cleanrl: str | None = None  # a clone of CleanRL, to compare with it
    repetitions: int = 7  # windows of each contestant
    steps: int = 500  # environment steps in a window
    output: str | None = None  # a file for the tables


def paced(env, pipe, window, warmup=LEARNING_STARTS + WARMUP):
    """Make env.step wait for its turn after `warmup` steps and then after every `window` steps.

    Each time it sends the seconds that they took and the peak memory in MB.
    """
    step = env.step
    left = warmup
    start = time.perf_counter()

    def paced_step(action):
        nonlocal left, start
        if left == 0:
            seconds = time.perf_counter() - start
            status = Path("/proc/self/status").read_text()
            kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
            pipe.send((seconds, kibibytes * 1024 / 1e6))
            if pipe.recv() == "stop":
                sys.exit()
            left = window
            start = time.perf_counter()
        left -= 1
        return step(action)

    env.step = paced_step
    return env


def train_script(pace, algorithm, args, module, compile):
    script = importlib.import_module(module)
    make_env = script.make_env

    def make_paced_env(*env_args, **kwargs):  # evaluations end long before a window does
        return pace(make_env(*env_args, **kwargs))

    script.make_env = make_paced_env
    script_args = script.Args(
        env_id=TASK,
        compile=compile,
        cuda=False,
        learning_starts=LEARNING_STARTS,
        total_timesteps=NEVER,
        eval_frequency=NEVER,
        eval_episodes=1,
        **SIZES[algorithm],
    )
    script.main(script_args)


def train_cleanrl(pace, algorithm, args):
    # CleanRL's loop takes one step for each step of the vector environment, which may be a reset.
    # It cannot read what gymnasium 1 says of a time limit, so there is none.
    make_vector_env = gym.vector.SyncVectorEnv
    gym.vector.SyncVectorEnv = lambda makers: pace(make_vector_env(makers))
    gym.spec(TASK).max_episode_steps = None

    path = f"{args.cleanrl}/cleanrl/{algorithm.lower()}_continuous_action.py"
    sys.argv = [
        path,
        f"--env-id={TASK}",
        f"--batch-size={SIZES[algorithm]['batch_size']}",
        f"--policy-frequency={SIZES[algorithm]['policy_delay']}",
        f"--learning-starts={LEARNING_STARTS}",
        f"--total-timesteps={NEVER}",
        "--no-cuda",
    ]
    sys.path.insert(0, args.cleanrl)
    runpy.run_path(path, run_name="__main__")


def train_baselines(pace, algorithm, args, module):
    """Stable-Baselines3 or SBX. The algorithm implies SIZES' critics and policy delay."""
    from stable_baselines3.common.noise import NormalActionNoise

    env = pace(gym.make(TASK))
    action_dim = env.action_space.shape[0]
    agent_class = getattr(importlib.import_module(module), algorithm)
    model = agent_class(
        "MlpPolicy",
        env,
        policy_kwargs={"net_arch": [256, 256]},
        action_noise=NormalActionNoise(np.zeros(action_dim), np.full(action_dim, 0.1)),
        batch_size=SIZES[algorithm]["batch_size"],
        learning_starts=LEARNING_STARTS,
        train_freq=1,
        gradient_steps=1,
        seed=1,
        device="cpu",
    )
    model.learn(NEVER, log_interval=None)


def recorded_products(update, batch):
    """Return the two factors of each matrix product in an update."""
    aten = torch.ops.aten
    products = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
                products.append([factor.detach().clone() for factor in args[-2:]])
            return func(*args, **(kwargs or {}))

    with Record():
        update(*batch)
    return products


def train_floor(pace, algorithm, args):
    script = importlib.import_module("ddpg_continuous")
    env = pace(script.make_env(TASK))
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    size = SIZES[algorithm]
    agent = script.DDPG(*dims, script.Args(**size))
    buffer = script.ReplayBuffer(size["batch_size"], *dims, np.random.default_rng(0), "cpu")
    buffer.count = size["batch_size"]  # rows of zeros
    batch = buffer.sample(size["batch_size"])
    critics = recorded_products(agent.update_critics, batch)
    policy = recorded_products(agent.update_policy, batch)

    env.reset(seed=1)
    for step in range(NEVER):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
        for left, right in critics:
            torch.matmul(left, right)
        if step % size["policy_delay"] == 0:
            for left, right in policy:
                torch.matmul(left, right)


def contestants(args):
    """Return {name: function that trains forever}."""
    trainers = {}
    for name in SCRIPTS:
        compiled = functools.partial(train_script, module=name, compile=True)
        trainers[f"`{name}.py`"] = compiled
        trainers[f"`{name}.py --no-compile`"] = functools.partial(compiled, compile=False)
    if args.cleanrl:
        trainers["CleanRL"] = train_cleanrl
    trainers["SB3"] = functools.partial(train_baselines, module="stable_baselines3")
    trainers["SBX"] = functools.partial(train_baselines, module="sbx")
    trainers["floor"] = train_floor
    return trainers


def run(train, algorithm, args, pipe, folder):
    """Train forever, in windows. Each contestant does this in a process of its own."""
    os.chdir(folder)
    sys.stdout = open(os.devnull, "w")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    train(functools.partial(paced, pipe=pipe, window=args.steps), algorithm, args)


def measure(trainers, algorithm, args):
    """Return {name: (steps per second in each window, peak memory in MB)}."""
    spawn = multiprocessing.get_context("spawn")
    processes = []
    pipes = {}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, train in trainers.items():
                pipes[name], child = spawn.Pipe()
                run_args = (train, algorithm, args, child, folder)
                processes.append(spawn.Process(target=run, args=run_args))
                processes[-1].start()
                child.close()  # so that the pipe ends when the process does
                pipes[name].recv()
                print(f"{algorithm}: {name} is ready", file=sys.stderr)
            rates = {name: [] for name in trainers}
            for _ in range(args.repetitions):
                for name, pipe in pipes.items():
                    pipe.send("go")
                    seconds, memory = pipe.recv()
                    rates[name].append(args.steps / seconds)
                    results[name] = (rates[name], memory)
            for process, pipe in zip(processes, pipes.values(), strict=True):
                pipe.send("stop")
                process.join()
        finally:
            for process in processes:
                process.terminate()
    return results


def table(results):
    """Return a Markdown table: the fastest first, ratios pair by pair, as the machine drifts."""
    peers = [name for name in results if "`" not in name]  # the floor is the last
    times = [f"times {peer}" for peer in peers]
    header = ["", "steps/s", "lowest to highest", *times, "peak memory, MB"]
    rows = [header, ["---"] * len(header)]
    medians = {name: statistics.median(rates) for name, (rates, _) in results.items()}
    for name in sorted(medians, key=medians.get, reverse=True):
        rates, memory = results[name]
        ratios = []
        for peer in peers:
            pairs = zip(rates, results[peer][0], strict=True)
            ratios.append(f"{statistics.median(own / other for own, other in pairs):.2f}")
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        rows.append([name, f"{medians[name]:.0f}", spread, *ratios, f"{memory:.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(args):
    if args.cleanrl:
        args.cleanrl = os.path.abspath(args.cleanrl)
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # the contestants inherit it
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # one thread for SBX, too
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = names[0] if names else platform.machine()
    torch_version = importlib.metadata.version("torch")

    text = ""
    for algorithm, size in SIZES.items():
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in size.items())
        results = measure(contestants(args), algorithm, args)
        text += f"Against the {algorithm} of others: `{flags}`, `{TASK}`, one core of {processor}, "
        text += f"PyTorch {torch_version}. Medians of {args.repetitions} windows of {args.steps} "
        text += f"steps.\n\n{table(results)}\n\n"
    print(text, end="")
    if args.output:
        Path(args.output).write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Args))
