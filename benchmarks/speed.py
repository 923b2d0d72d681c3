"""Steps a second of our scripts and of the DDPG of CleanRL, Stable-Baselines3 and SBX on the same work, measured in one call.

Every contestant trains in its own process: one environment, one update a step, networks of 400 and 300 units, a million
transitions of replay. All of them start and warm up (random steps, compilation) at once, on separate cores if there are enough.
Then they move to the same cores and take turns: each runs `--steps` environment steps while the others wait, `--repetitions`
times. The scripts run as they are, with logging and the divergence guard. Nothing is evaluated.

The floor replays the matrix products of one update of smoothie_continuous.py, recorded from the script, and steps the
environment with random actions. On a CPU no program does this work faster with the same matrix library. On a GPU a CUDA graph
can, as the floor launches each product separately. With --cuda, SBX needs JAX for the GPU: pip install "jax[cuda13]".

    pip install -r benchmarks/requirements.txt
    git clone https://github.com/vwxyzjn/cleanrl && git -C cleanrl checkout fe8d8a0
    python benchmarks/speed.py --cleanrl cleanrl --output speed.md
    python benchmarks/speed.py --cuda --repetitions 5
    python benchmarks/speed.py --sweep --repetitions 3 --steps 200
"""

import contextlib
import importlib
import io
import json
import os
import platform
import re
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ("smoothie_continuous", "smoothie_no_kl", "smoothie_closed_form", "ddpg_continuous")
CONTESTANTS = {
    **{f"{script}.py{flag}": (script, not flag) for script in SCRIPTS for flag in ("", " --no-compile")},
    "CleanRL DDPG": ("cleanrl", False),
    "Stable-Baselines3 DDPG": ("stable_baselines3", False),
    "SBX DDPG (JAX)": ("sbx", False),
    "floor: matrix products and environment alone": ("floor", False),
}
WARMUP = 300  # steps with updates before the first window, compilation among them


@dataclass
class Args:
    env_id: str = "Walker2d-v4"
    """the gymnasium task"""
    batch_size: int = 128
    """transitions in a batch"""
    threads: int = 1
    """cores and threads that each contestant gets"""
    repetitions: int = 7
    """windows of each contestant, interleaved"""
    steps: int = 500
    """environment steps in a window"""
    cuda: bool = False
    """train on the GPU"""
    cleanrl: str | None = None
    """a clone of CleanRL, to compare with its DDPG; with gymnasium 1 that fails at a time limit, so not on HalfCheetah"""
    sweep: bool = False
    """instead of the peers, compare smoothie_continuous.py over batch sizes, tasks and threads"""
    output: str | None = None
    """the Markdown file to write; nothing is written unless every contestant has run"""


def peak_memory():
    """Return the most memory that this process has held, in bytes."""
    try:
        with open("/proc/self/status") as file:  # on Linux ru_maxrss would count what the parent held before exec, too
            return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def paced(env, first, steps, count_resets=False):
    """Return env that, at step `first` and every `steps` after it, prints the seconds since it went on and waits for a line.

    With count_resets, a reset counts as a step, too.
    """
    import gymnasium

    class Paced(gymnasium.Wrapper):
        count, start = 0, 0.0

        def tick(self):
            if self.count >= first and (self.count - first) % steps == 0:
                seconds = time.perf_counter() - self.start
                memory = peak_memory()
                print(json.dumps({"seconds": seconds, "memory": memory}), file=sys.__stdout__, flush=True)
                if not sys.stdin.readline():
                    os._exit(0)  # the benchmark is over
                self.start = time.perf_counter()
            self.count += 1

        def step(self, action):
            self.tick()
            return super().step(action)

        def reset(self, **kwargs):
            if count_resets:
                self.tick()
            return super().reset(**kwargs)

    return Paced(env)


def recorded_products(script, obs_dim, action_dim, batch_size):
    """Return the shapes ((m, k), (k, n)) of the matrix products in one update of the script."""
    import numpy as np
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                shapes.append(tuple((tuple(t.shape), t.is_contiguous()) for t in args[-2:]))
            return func(*args, **(kwargs or {}))

    agent = script.Smoothie(obs_dim, action_dim, script.Args())
    buffer = script.ReplayBuffer(1, obs_dim, action_dim, np.random.default_rng(0))
    buffer.add(np.zeros(obs_dim), np.zeros(action_dim), 0.0, np.zeros(obs_dim), False)
    with Record():
        agent.update(buffer.sample(batch_size)[0], buffer.sample(batch_size))
    return shapes


def contestant(module, compile, args):
    """Train forever, in windows; each contestant does this in its own process."""
    warnings.filterwarnings("ignore")
    sys.path.insert(0, ROOT)
    import gymnasium as gym
    import torch

    torch.set_num_threads(args.threads)
    learning_starts = max(1000, args.batch_size)
    pace = {"first": learning_starts + WARMUP, "steps": args.steps}
    if module in SCRIPTS:
        script = importlib.import_module(module)
        make_env, envs = script.make_env, []

        def make_paced_env(*env_args):  # the first environment of the two is the one to train in
            envs.append(make_env(*env_args))
            return paced(envs[0], **pace) if len(envs) == 1 else envs[-1]

        script.make_env = make_paced_env
        script.main(
            script.Args(
                env_id=args.env_id,
                batch_size=args.batch_size,
                learning_starts=learning_starts,
                eval_frequency=10**9,
                total_timesteps=10**9,
                compile=compile,
                threads=args.threads,
                cuda=args.cuda,
            )
        )
    elif module == "floor":
        script = importlib.import_module("smoothie_continuous")
        env = paced(script.make_env(args.env_id), 0, args.steps)
        device = "cuda" if args.cuda else "cpu"
        products = []
        shapes = recorded_products(script, env.observation_space.shape[0], env.action_space.shape[0], args.batch_size)
        for (left, left_contiguous), (right, right_contiguous) in shapes:
            a, b = (
                torch.randn(shape, device=device) if contiguous else torch.randn(shape[::-1], device=device).t()
                for shape, contiguous in [(left, left_contiguous), (right, right_contiguous)]
            )
            products.append((a, b, a @ b))
        env.reset(seed=1)
        with torch.inference_mode():
            while True:
                _, _, terminated, truncated, _ = env.step(env.action_space.sample())
                if terminated or truncated:
                    env.reset()
                for a, b, out in products:
                    torch.mm(a, b, out=out)
                if args.cuda:
                    torch.cuda.synchronize()  # the scripts wait for each action
    elif module == "cleanrl":
        path = os.path.join(args.cleanrl, "cleanrl", "ddpg_continuous_action.py")
        with open(path) as file:
            source = file.read()
        for old, new in [("Linear(256, 256)", "Linear(400, 300)"), ("Linear(256, ", "Linear(300, "), (", 256)", ", 400)")]:
            if source.count(old) != 2:  # once in the actor, once in the critic
                sys.exit(f"{path}: expected two layers {old}")
            source = source.replace(old, new)
        make = gym.make
        # gymnasium's vector environment spends one step of the loop on each reset, in which CleanRL updates, too
        gym.make = lambda env_id: paced(make(env_id), **pace, count_resets=True)
        with open("ddpg_continuous_action.py", "w") as file:  # in the contestant's own folder
            file.write(source)
        sys.path.insert(0, args.cleanrl)
        flags = {"env-id": args.env_id, "batch-size": args.batch_size, "learning-starts": learning_starts}
        flags |= {"policy-frequency": 1, "total-timesteps": 10**9}
        sys.argv = [file.name, *[f"--{name}={value}" for name, value in flags.items()], *([] if args.cuda else ["--no-cuda"])]
        runpy.run_path(file.name, run_name="__main__")
    else:
        if module == "sbx" and args.cuda and importlib.import_module("jax").default_backend() != "gpu":
            sys.exit('JAX finds no GPU: pip install "jax[cuda13]"')
        ddpg = importlib.import_module(module).DDPG
        kwargs = {"device": "cuda" if args.cuda else "cpu"} if module == "stable_baselines3" else {}
        ddpg(
            "MlpPolicy",
            paced(gym.make(args.env_id), **pace),
            policy_kwargs={"net_arch": [400, 300]},
            batch_size=args.batch_size,
            learning_starts=learning_starts,
            train_freq=1,
            gradient_steps=1,
            buffer_size=1_000_000,
            seed=1,
            **kwargs,
        ).learn(10**9, log_interval=None)


class Process:
    """One contestant: starts and warms up by itself, then runs one window at a time."""

    def __init__(self, name, args):
        self.name, self.seconds, self.memory = name, [], 0
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "OPENBLAS_NUM_THREADS": str(args.threads)}
        if args.threads == 1:
            env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        command = [sys.executable, os.path.abspath(__file__), "--contestant", name, json.dumps(vars(args))]
        self.folder, self.errors = tempfile.TemporaryDirectory(), tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=env,
            cwd=self.folder.name,
        )

    def pin(self, cores):
        """Keep all threads of the process, and those that it starts later, to these cores."""
        for thread in os.listdir(f"/proc/{self.process.pid}/task") if cores else []:
            with contextlib.suppress(ProcessLookupError):  # the thread has ended
                os.sched_setaffinity(int(thread), cores)

    def read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        sys.exit(f"{self.name} ended: {(self.errors.read().strip().splitlines() or ['without a word'])[-1]}")

    def window(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.read()
        self.seconds.append(answer["seconds"])
        self.memory = answer["memory"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def measure(names, args):
    """Return {name: (list of steps a second, peak memory in bytes)}, every name once before any name again."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    slots = max(1, len(cores) // args.threads)
    with contextlib.ExitStack() as stack:
        processes = []
        for i, name in enumerate(names):
            processes.append(Process(name, args))
            stack.callback(processes[-1].close)
            first = i % slots * args.threads
            processes[-1].pin(cores[first : first + args.threads])
        for process in processes:
            process.read()
            print(f"{process.name}: ready", file=sys.stderr)
            process.pin(cores[: args.threads])
        for repetition in range(args.repetitions):
            for process in processes:
                process.window()
            print(f"repetition {repetition + 1} of {args.repetitions}", file=sys.stderr)
        return {p.name: ([args.steps / s for s in p.seconds], p.memory) for p in processes}


def machine(args):
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = {line.split(":")[1].strip() for line in file if line.startswith("model name")}
    import torch

    gpu = f"{torch.cuda.get_device_name()} and " if args.cuda else ""
    cores = f"{args.threads} core{'s' if args.threads > 1 else ''} of {' and '.join(sorted(names)) or platform.processor()}"
    return f"{gpu}{cores}, PyTorch {torch.__version__.split('+')[0]}"


def table(args):
    """The table against the peers, as Markdown."""
    results = measure([name for name in CONTESTANTS if args.cleanrl or name != "CleanRL DDPG"], args)
    rates = {name: statistics.median(values) for name, (values, _) in results.items()}
    peers = {"CleanRL": "CleanRL DDPG"} if args.cleanrl else {}
    peers |= {"SB3": "Stable-Baselines3 DDPG", "SBX": "SBX DDPG (JAX)"}
    floor = "floor: matrix products and environment alone"
    lines = [
        f"`{args.env_id}`, batch {args.batch_size}, networks 400 and 300, one update a step; {machine(args)}. Median of "
        f"{args.repetitions} windows of {args.steps} steps, interleaved.",
        "",
        "| | steps/s | lowest to highest"
        + "".join(f" | times {peer}" for peer in peers)
        + " | time over the floor's | peak memory, MB |",
        "|---" * (5 + len(peers)) + "|",
    ]
    for name in sorted(rates, key=rates.get, reverse=True):
        values, memory = results[name]

        def ratio(other, values=values):  # pair by pair: the machine's own speed drifts
            return statistics.median(a / b for a, b in zip(values, results[other][0], strict=True))

        label = f"`{name}`" if ".py" in name else name
        spread = f"{min(values):.0f} to {max(values):.0f}"
        ratios = " | ".join(f"{value:.2f}" for value in [*map(ratio, peers.values()), 1 / ratio(floor)])
        lines.append(f"| {label} | {rates[name]:.0f} | {spread} | {ratios} | {memory / 1e6:.0f} |")
    return "\n".join(lines) + "\n"


def sweep(args):
    """The table of how the cost grows, as Markdown."""
    names = ["smoothie_continuous.py", "smoothie_continuous.py --no-compile", "floor: matrix products and environment alone"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    variants = [
        *[{"batch_size": size, "steps": max(50, args.steps * 64 // size)} for size in (64, 128, 256, 512, 1024)],
        *[{"env_id": env_id} for env_id in ("Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4") if env_id != args.env_id],
        *[{"threads": threads} for threads in range(2, min(cores, 4) + 1)],
    ]
    lines = [
        f"`smoothie_continuous.py`, steps/s, median of {args.repetitions} windows; {machine(args)} unless said otherwise.",
        "",
        "| task | batch | threads | default | `--no-compile` | floor |",
        "|---|---|---|---|---|---|",
    ]
    for variant in variants:
        settings = Args(**(vars(args) | variant))
        print(f"{settings.env_id}, batch {settings.batch_size}, {settings.threads} threads", file=sys.stderr)
        rates = [statistics.median(values) for values, _ in measure(names, settings).values()]
        cells = [settings.env_id, settings.batch_size, settings.threads, *[f"{rate:.0f}" for rate in rates]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(args):
    args.cleanrl = args.cleanrl and os.path.abspath(args.cleanrl)  # each contestant runs in a folder of its own
    text = sweep(args) if args.sweep else table(args)
    print(text, end="")
    if args.output:
        with open(args.output, "w") as file:
            file.write(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        module, compile = CONTESTANTS[sys.argv[2]]
        with contextlib.redirect_stdout(io.StringIO()):
            contestant(module, compile, Args(**json.loads(sys.argv[3])))
    else:
        import tyro

        main(tyro.cli(Args))
