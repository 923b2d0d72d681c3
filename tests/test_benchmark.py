"""benchmark.sh: cells that are finished, interrupted, failed and waiting."""

import glob
import os
import shlex
import signal
import subprocess
import sys
import time

from tests.conftest import ROOT

SHORT = ["--learning-starts", "100", "--batch-size", "16", "--eval-frequency", "100", "--eval-episodes", "1"]


def command(**settings):
    env = {"SCRIPTS": "smoothie_no_kl ddpg_continuous", "SEEDS": "1", "TOTAL_TIMESTEPS": "300", "RUNS": os.path.abspath("out")}
    env |= {"ENVS": "tests.fake_envs:ShortHopper-v4", "PYTHON": sys.executable, "WORKERS": "2"} | settings
    return [os.path.join(ROOT, "benchmark.sh")], os.environ | env


def benchmark(*flags, **settings):
    args, env = command(**settings)
    return subprocess.run([*args, *flags], capture_output=True, text=True, env=env)


def states(**settings):
    lines = benchmark("--status", **settings).stdout.splitlines()[1:]
    return {tuple(line.split()[:3]): line.split()[3] for line in lines}


def test_what_is_finished_is_skipped_and_what_failed_is_reported():
    tasks = {"ENVS": "tests.fake_envs:ShortHopper-v4 tests.fake_envs:NaNReward-v0", "SCRIPTS": "ddpg_continuous"}
    good, bad = [(task, "ddpg_continuous", "1") for task in tasks["ENVS"].split()]
    assert states(**tasks) == {good: "waiting", bad: "waiting"}
    result = benchmark(*SHORT, **tasks)
    assert result.returncode == 1
    assert "failed:\n" in result.stderr and "NaNReward-v0 ddpg_continuous 1: step 300: losses/" in result.stderr
    assert states(**tasks) == {good: "done", bad: "failed"}
    with open("out/results/table.md") as file:  # a run that diverged counts
        assert "| **DDPG** | 1 | 0k |" in file.read().split("NaNReward-v0")[1]
    again = benchmark(*SHORT, ENVS=good[0], SCRIPTS="ddpg_continuous")
    assert again.returncode == 0 and "finished before" in again.stdout and len(glob.glob("out/runs/*Hopper*")) == 1
    assert benchmark("--dry-run", ENVS=good[0], SCRIPTS="ddpg_continuous").stdout == ""


def test_ctrl_c_stops_everything_and_the_next_call_goes_on():
    cells = [("tests.fake_envs:ShortHopper-v4", script, "1") for script in ("smoothie_no_kl", "ddpg_continuous")]
    args, env = command(TOTAL_TIMESTEPS="1500")
    process = subprocess.Popen(
        [*args, *SHORT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored, as in a background job, it cannot be trapped
    )
    while len(glob.glob("out/runs/*/policy.pt")) < 2:
        time.sleep(0.1)
    assert set(states(TOTAL_TIMESTEPS="1500").values()) == {"running"}
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, process.stderr.read()
    assert states(TOTAL_TIMESTEPS="1500") == dict.fromkeys(cells, "stopped")
    assert len(glob.glob("out/runs/*/checkpoint/state.pt")) == 2
    result = benchmark(*SHORT, TOTAL_TIMESTEPS="1500")
    assert result.returncode == 0 and result.stdout.count("--resume") == 2, result.stderr
    assert states(TOTAL_TIMESTEPS="1500") == dict.fromkeys(cells, "done")


def test_one_cell_is_never_run_twice_at_once():
    settings = {"SCRIPTS": "ddpg_continuous", "TOTAL_TIMESTEPS": "1500"}
    args, env = command(**settings)
    process = subprocess.Popen([*args, *SHORT], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    while not glob.glob("out/*.log"):
        time.sleep(0.01)
    result = benchmark(*SHORT, **settings)
    assert result.returncode == 0 and "ddpg_continuous 1: is running already" in result.stdout
    assert process.wait() == 0 and len(glob.glob("out/runs/*")) == 1


def test_slurm_gets_the_cells_that_are_not_finished():
    """What is submitted; that Slurm runs it is tested in slurm.py."""
    submit = ["--dry-run", "--slurm", "--partition=cpu"]
    line = benchmark("--compile", *submit, SEEDS="1 2", WORKERS="").stdout
    words = shlex.split(line)
    assert words[0] == "sbatch" and "--array=0,1,2,3" in words and words[-3:-1] == ["--partition=cpu", "--wrap"]
    assert shlex.split(words[-1])[-2:] == ["--cell", "--compile"] and "SEEDS=1 2" in shlex.split(words[-1])
    assert "--array=0,1,2,3%2" in shlex.split(benchmark(*submit, SEEDS="1 2", WORKERS="2").stdout)
    assert benchmark(*SHORT, SCRIPTS="ddpg_continuous", TOTAL_TIMESTEPS="200").returncode == 0
    words = shlex.split(benchmark(*submit, SEEDS="1 2", TOTAL_TIMESTEPS="200").stdout)
    assert "--array=0,2,3%2" in words


def test_bad_settings_are_refused():
    assert benchmark(SCRIPTS="ppo").stderr.startswith("SCRIPTS: there is no ppo.py")
    result = benchmark(TOTAL_TIMESTEPS="1e6")
    assert result.returncode == 2 and "whole numbers, not 1e6" in result.stderr
