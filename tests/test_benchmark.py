"""benchmark.sh: which runs it starts, skips and resumes, and what it says about failures."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmark.sh"

# In place of Python: notes each call, waits while there is a file `wait`, then writes the last
# evaluation. It fails on Bad-v0.
STUB = """#!/bin/sh
echo "$@" >> calls
case $1 in */utils/*) exit ;; esac
while [ -e wait ]; do sleep 0.1; done
[ "$5" != Bad-v0 ] || exit 3
mkdir -p "$3"
printf 'global_step,episode,episodic_return,episodic_length\\n0,0,5.0,9\\n' > "$3/evaluations.csv"
printf "$9,0,7.0,9\\n$9,1,-3.0,9\\n" >> "$3/evaluations.csv"
"""

# A task that once, at its 140th step, kills all processes of the benchmark.
MY_MODULE = """
import os, signal
import gymnasium as gym
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv

class MyTask(HopperEnv):
    steps = 0

    def step(self, action):
        MyTask.steps += 1
        if MyTask.steps == 140 and os.path.exists("alarm"):
            os.remove("alarm")
            os.killpg(0, signal.SIGKILL)
        return super().step(action)

gym.register("MyTask-v0", entry_point=MyTask, max_episode_steps=10)
"""


@pytest.fixture(autouse=True)
def stub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stub").write_text(STUB)
    Path("stub").chmod(0o755)


def start(*flags, **settings):
    """Start benchmark.sh in a process group of its own."""
    defaults = {
        "ENVS": "Hopper-v4 Ant-v4",
        "SCRIPTS": "smoothie_no_kl ddpg_continuous",
        "SEEDS": "1 2",
        "TOTAL_TIMESTEPS": "500",
        "WORKERS": "2",
        "RUNS": "my runs",
        "PYTHON": "./stub",
    }
    return subprocess.Popen(
        [BENCHMARK, *flags],
        env=os.environ | defaults | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def benchmark(*flags, **settings):
    """Run benchmark.sh. Return its exit code, output and errors."""
    process = start(*flags, **settings)
    output, errors = process.communicate()
    return process.returncode, output, errors


def calls():
    """Return the trained runs, as words, and the calls of utils/."""
    lines = Path("calls").read_text().replace("my runs", "my_runs").splitlines()
    words = [line.split() for line in lines]
    tools = [line for line in words if "/utils/" in line[0]]
    return [line for line in words if line not in tools], tools


def test_the_dry_run_lists_every_run_once():
    _, output, _ = benchmark("--dry-run", ENVS="", SCRIPTS="", SEEDS="", TOTAL_TIMESTEPS="")
    folders = {line.split("--run-dir")[1].split("--env-id")[0] for line in output.splitlines()}
    assert len(folders) == len(output.splitlines()) == 6 * 4 * 6
    assert sorted(os.listdir()) == ["stub"], "it writes nothing"


def test_the_printed_commands_make_the_benchmark():
    """As for Slurm: one process a line."""
    _, output, _ = benchmark("--eval-episodes", "5", "--dry-run")
    os.mkdir("my runs")
    for line in output.splitlines():
        subprocess.run(["bash", "-c", line], check=True)
    runs, _ = calls()
    assert len(runs) == 8
    for script, *words in runs:
        flags = dict(zip(words[::2], words[1::2], strict=True))
        name = f"{flags['--env-id']}__{Path(script).stem}__{flags['--seed']}"
        assert flags["--run-dir"] == f"my_runs/{name}"
        assert flags["--total-timesteps"] == "500"
        assert flags["--eval-episodes"] == "5"
    assert benchmark("--dry-run")[1] == "", "all runs are finished"


def test_failures_are_named_and_finished_runs_are_not_repeated():
    code, _, errors = benchmark(ENVS="Bad-v0 Hopper-v4", SEEDS="1")
    assert code == 1
    assert errors.splitlines() == [
        "failed: see my runs/Bad-v0__smoothie_no_kl__1.log",
        "failed: see my runs/Bad-v0__ddpg_continuous__1.log",
    ]
    runs, tools = calls()
    assert len(runs) == 4
    assert [Path(tool[0]).name for tool in tools] == ["figures.py", "table.py"]
    assert tools[0][1:] == ["my_runs", "--output", "my_runs", "--last-step", "500"]
    assert tools[1][1:] == ["my_runs", "--last-step", "500"]

    code, _, errors = benchmark(ENVS="Hopper-v4")
    assert (code, errors) == (0, "")
    runs, _ = calls()
    assert len(runs) == 6, "only the second seed is new"


def test_two_at_once_do_not_run_the_same_cell():
    one = {"ENVS": "my_module:MyTask-v0", "SCRIPTS": "ddpg_continuous", "SEEDS": "1"}
    Path("wait").touch()
    first = start(**one)
    while not os.path.exists("calls"):
        time.sleep(0.1)
    assert benchmark(**one)[0] == 0
    name = "my_module-MyTask-v0__ddpg_continuous__1"
    assert benchmark("--status", **one)[1].split() == [name, "running", "0", "0.0"]

    os.remove("wait")
    first.communicate()
    runs, _ = calls()
    assert len(runs) == 1
    assert benchmark("--status", **one)[1].split() == [name, "finished", "500", "2.0"]


def test_a_killed_benchmark_goes_on_to_the_same_results():
    """With a user's task, in a folder that the scripts find by themselves."""
    Path("my_module.py").write_text(MY_MODULE)
    Path("stub").write_text(
        f'#!/bin/sh\ncase $1 in */utils/*) exit ;; esac\nexec {shlex.quote(sys.executable)} "$@"\n'
    )
    flags = "--no-compile --learning-starts 50 --batch-size 16 --checkpoint-frequency 40 "
    flags += "--eval-frequency 50 --eval-episodes 1"
    one = {"ENVS": "my_module:MyTask-v0", "SCRIPTS": "ddpg_continuous", "SEEDS": "1"}
    one["TOTAL_TIMESTEPS"] = "150"

    def evaluations(runs):
        path = Path(runs, "my_module-MyTask-v0__ddpg_continuous__1", "evaluations.csv")
        return path.read_text()

    assert benchmark(*flags.split(), **one, RUNS="whole")[0] == 0
    Path("alarm").touch()
    assert benchmark(*flags.split(), **one)[0] == -signal.SIGKILL
    assert "\n100," in evaluations("my runs")
    assert "\n150," not in evaluations("my runs")
    assert benchmark(*flags.split(), **one)[0] == 0
    assert "\n150," in evaluations("whole")
    assert evaluations("my runs") == evaluations("whole")
