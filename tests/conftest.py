"""What the tests share: the scripts, short runs in this process or in one of their own, and what a run leaves behind."""

import contextlib
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ddpg_continuous
import smoothie_closed_form
import smoothie_continuous
import smoothie_no_kl

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
torch.set_num_threads(1)  # pytest-xdist runs one process a core

SCRIPTS = [smoothie_continuous, smoothie_no_kl, smoothie_closed_form, ddpg_continuous]
SMOOTHIES = SCRIPTS[:3]
processes = []  # that a test has started
SHORT = {"compile": False, "learning_starts": 100, "batch_size": 32, "total_timesteps": 300}
SHORT |= {"eval_frequency": 100, "eval_episodes": 2, "env_id": "tests.fake_envs:ShortHopper-v4"}


def agent_class(script):
    return script.DDPG if script is ddpg_continuous else script.Smoothie


def wait_before_resuming(flags):
    """TensorBoard orders the files of a run by the second in which they begin. A process of its own takes longer to start."""
    if flags.get("resume"):
        time.sleep(1.1)


def run(script, folder=".", **flags):
    """Call main() in a folder, with the flags of a short run where none are given. Return the run folder."""
    os.makedirs(folder, exist_ok=True)
    wait_before_resuming(flags)
    with contextlib.chdir(folder):
        return script.main(script.Args(**SHORT | flags)).resolve()


def as_words(**flags):
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def popen(script, env=(), preexec_fn=None, **flags):
    """Start the script in a process of its own."""
    command = [sys.executable, script.__file__, *as_words(**flags)]
    env = os.environ | {"PYTHONPATH": ROOT, "PYTHONUNBUFFERED": ""} | dict(env)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes.append(subprocess.Popen(command, env=env, preexec_fn=preexec_fn, **output))
    return processes[-1]


def start(script, env=(), preexec_fn=None, **flags):
    """Run the script in a process of its own. Return its exit code, stdout and stderr."""
    process = popen(script, env, preexec_fn, **flags)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def command_line(script, *words, **flags):
    """The same without the new process: three seconds faster."""
    argv, code = [script.__file__, *words, *as_words(**flags)], 0
    wait_before_resuming(flags)
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "path", sys.path[:])
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if isinstance(code, str):  # Python prints the sentence and exits with 1
        stderr.write(f"{code}\n")
        code = 1
    return subprocess.CompletedProcess(argv, code, *(text.buffer.getvalue().decode() for text in (stdout, stderr)))


def scalars(run_dir):
    """Return {key: [(step, value), ...]} of what TensorBoard shows."""
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()["scalars"]}


def wait_for(condition, what, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.1)


def pytest_generate_tests(metafunc):
    for fixture, modules in [("script", SCRIPTS), ("smoothie", SMOOTHIES)]:
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, modules, ids=lambda module: module.__name__, scope="session")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    for process in processes:
        process.kill()
        process.communicate()
    processes.clear()


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def finished(script, tmp_path_factory):
    """A short run of the script on its own: copied to an empty folder, on a user's environment. Return folder and result."""
    folder = tmp_path_factory.mktemp(script.__name__)
    os.mkdir(folder / "copied")
    shutil.copy(script.__file__, folder / "copied")
    shutil.copy(os.path.join(ROOT, "tests", "fake_envs.py"), folder / "my_envs.py")
    words = as_words(**SHORT | {"env_id": "my_envs:ShortHopper-v4"})
    command = [sys.executable, f"copied/{script.__name__}.py", *words]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return folder, subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
