"""benchmark.sh: cells that are finished, interrupted, failed and waiting."""

import fcntl
import glob
import json
import os
import shlex
import signal
import subprocess
import sys

from tests.conftest import ROOT, wait_for

SHORT = ["--learning-starts", "100", "--batch-size", "16", "--eval-frequency", "100", "--eval-episodes", "1"]


def command(**settings):
    env = {"SCRIPTS": "smoothie_no_kl ddpg_continuous", "SEEDS": "1", "TOTAL_TIMESTEPS": "300", "RUNS": os.path.abspath("out")}
    env |= {"ENVS": "tests.fake_envs:ShortHopper-v4", "PYTHON": sys.executable, "WORKERS": "2"} | settings
    return [os.path.join(ROOT, "benchmark.sh")], os.environ | env


def benchmark(*flags, **settings):
    args, env = command(**settings)
    return subprocess.run([*args, *flags], capture_output=True, text=True, env=env)


def start(preexec_fn=None, **settings):
    """Start benchmark.sh; preexec_fn makes a signal one that can be trapped, which it is not if a background job ignores it."""
    args, env = command(**settings)
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*args, *SHORT], env=env, preexec_fn=preexec_fn, **output)


def run_folder(seed, rows, **flags):
    """A run folder of ddpg_continuous on Hopper-v4 with these rows of evaluations.csv."""
    folder = f"out/runs/Hopper-v4__ddpg_continuous__{seed}__5"
    os.makedirs(folder)
    with open(f"{folder}/evaluations.csv", "w") as file:
        file.write("global_step,episode,episodic_return,episodic_length\n" + rows)
    with open(f"{folder}/config.json", "w") as file:
        json.dump({"env_id": "Hopper-v4", "exp_name": "ddpg_continuous", "seed": seed} | flags, file)


def states(**settings):
    """What --status tells: {(task, script): (cells done, running, failed, waiting)}."""
    lines = benchmark("--status", **settings).stdout.splitlines()[1:]
    return {
        tuple(line.split()[:2]): tuple(map(int, line.split()[2:6]))
        for line in lines
        if line.split()[1].endswith(("_kl", "_continuous"))
    }


def running():
    """Return the process ids of the runs that benchmark.sh has started: they work in the folder it was given."""
    pids = []
    for path in glob.glob("/proc/[0-9]*"):
        try:
            if os.readlink(f"{path}/cwd") == os.path.realpath("out"):
                pids.append(int(path.split("/")[-1]))
        except OSError:  # it has ended, or is another user's
            pass
    return pids


HOPPER = {"ENVS": "Hopper-v4", "SCRIPTS": "ddpg_continuous"}
DONE, RUNNING, FAILED, WAITING = [tuple(map(int, row)) for row in ("1000", "0100", "0010", "0001")]


def test_what_is_finished_is_skipped_and_what_failed_is_reported():
    tasks = {"ENVS": "tests.fake_envs:ShortHopper-v4 tests.fake_envs:NaNReward-v0", "SCRIPTS": "ddpg_continuous"}
    good, bad = [(task, "ddpg_continuous") for task in tasks["ENVS"].split()]
    assert states(**tasks) == {good: WAITING, bad: WAITING}
    result = benchmark(*SHORT, **tasks)
    assert result.returncode == 1
    message = "NaNReward-v0 ddpg_continuous 1: exit code 1 after 200 steps: step 300: losses/"
    assert "failed:\n" in result.stderr and message in result.stderr
    assert states(**tasks) == {good: DONE, bad: FAILED}
    with open("out/results/table.md") as file:  # a run that diverged counts
        assert "| **DDPG** | 1 | 0k |" in file.read().split("NaNReward-v0")[1]
    again = benchmark(*SHORT, ENVS=good[0], SCRIPTS="ddpg_continuous")
    assert again.returncode == 0 and "finished before" in again.stdout and len(glob.glob("out/runs/*Hopper*")) == 1
    assert benchmark("--dry-run", ENVS=good[0], SCRIPTS="ddpg_continuous").stdout == ""


def test_ctrl_c_and_hang_up_stop_everything_and_the_next_call_goes_on():
    cells = [("tests.fake_envs:ShortHopper-v4", script) for script in ("smoothie_no_kl", "ddpg_continuous")]
    cores = sorted(os.sched_getaffinity(0))
    for number in (signal.SIGHUP, signal.SIGINT):
        process = start(TOTAL_TIMESTEPS="1500", preexec_fn=lambda number=number: signal.signal(number, signal.SIG_DFL))
        wait_for(lambda: len(running()) == len(glob.glob("out/runs/*/policy.pt")) == 2, "two runs and their first evaluations")
        assert states(TOTAL_TIMESTEPS="1500") == dict.fromkeys(cells, RUNNING)
        pinned = sorted(tuple(os.sched_getaffinity(pid)) for pid in running())
        assert pinned == sorted((cores[i % len(cores)],) for i in range(2)), "a core each"
        process.send_signal(number)
        assert process.wait() == 130, process.stderr.read()
        assert not running() and states(TOTAL_TIMESTEPS="1500") == dict.fromkeys(cells, WAITING)
        assert len(glob.glob("out/runs/*/checkpoint/state.pt")) == 2
    result = benchmark(*SHORT, TOTAL_TIMESTEPS="1500")
    assert result.returncode == 0 and result.stdout.count("--resume") == 2, result.stderr
    assert states(TOTAL_TIMESTEPS="1500") == dict.fromkeys(cells, DONE)


def test_a_cell_is_never_run_twice_at_once_and_has_failed_if_another_stopped_it():
    settings = {"SCRIPTS": "ddpg_continuous", "TOTAL_TIMESTEPS": "20000"}
    process = start(**settings)
    wait_for(lambda: glob.glob("out/runs/*/policy.pt"), "the first evaluation")
    result = benchmark(*SHORT, **settings)
    assert result.returncode == 0 and "ddpg_continuous 1: is running already" in result.stdout
    (pid,) = running()
    os.kill(pid, signal.SIGTERM)
    stderr = process.communicate()[1]
    assert process.returncode == 1 and "ddpg_continuous 1: exit code 143 after " in stderr
    assert list(states(**settings).values()) == [FAILED] and len(glob.glob("out/runs/*")) == 1


def test_a_run_that_never_began_has_failed():
    result = benchmark("--no-such-flag")
    message = "ddpg_continuous 1: exit code 2 after 0 steps: Unrecognized options: --no-such-flag\n"
    assert result.returncode == 1 and message in result.stderr
    assert set(states().values()) == {FAILED}
    assert "2 cells: 0 done, 2 failed, 0 waiting, 0 running" in benchmark("--status").stdout


def test_the_status_tells_returns_and_the_time_that_is_left():
    run_folder(1, "0,0,9.0,5\n10000,0,100.0,5\n10000,1,300.0,5\n")
    with open("out/Hopper-v4__ddpg_continuous__1.log", "w") as file:
        file.write("step 5000: eval return 9.00, 7 steps/s\nstep 10000: eval return 200.00, 10 steps/s\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = benchmark("--status", **HOPPER, SEEDS="1 2", TOTAL_TIMESTEPS="100000").stdout.splitlines()
    assert lines[1].split() == ["Hopper-v4", "ddpg_continuous", "0", "1", "0", "1", "2.5", "h", "200", "-"]
    assert lines[2] == "2 cells: 0 done, 0 failed, 1 waiting, 1 running; some 5.2 h left at their speed"


def test_figures_that_cannot_be_drawn_start_nothing_and_replace_nothing():
    result = benchmark("--figures")
    assert result.returncode == 1 and result.stderr.startswith("no cell of these has been evaluated")
    assert not os.path.exists("out")
    for seed in (1, 2):
        run_folder(seed, "300,0,9.0,5\n", tau=0.1 * seed)
    assert benchmark("--figures", **HOPPER).returncode == 0
    with open("out/results/table.md") as file:
        table = file.read()
    result = benchmark(SEEDS="1 2", **HOPPER)  # both are finished
    assert result.returncode == 1 and "differ in tau" in result.stderr
    with open("out/results/table.md") as file:
        assert file.read() == table


def test_paths_are_those_of_who_calls():
    paths = {"PYTHON": os.path.relpath(sys.executable), "RUNS": "here"}
    words = benchmark("--dry-run", "--slurm", **paths).stdout
    assert f"PYTHON={os.getcwd()}/{paths['PYTHON']}" in words and f"RUNS={os.getcwd()}/here" in words


def test_slurm_gets_the_cells_that_are_not_finished():
    """What is submitted; that Slurm runs it is tested in slurm.py."""
    submit = ["--dry-run", "--slurm", "--partition=cpu"]
    line = benchmark("--compile", *submit, SEEDS="1 2", WORKERS="").stdout
    words = shlex.split(line)
    assert words[0] == "sbatch" and "--array=0,1,2,3" in words and words[-3:-1] == ["--partition=cpu", "--wrap"]
    assert shlex.split(words[-1])[-2:] == ["--cell", "--compile"] and "SEEDS=1 2" in shlex.split(words[-1])
    assert "--array=0,1,2,3%2" in shlex.split(benchmark(*submit, SEEDS="1 2", WORKERS="2").stdout)
    run_folder(1, "300,0,9.0,5\n")
    words = shlex.split(benchmark(*submit, ENVS="Hopper-v4", SEEDS="1 2").stdout)
    assert "--array=0,2,3%2" in words


def test_bad_settings_are_refused():
    assert benchmark(SCRIPTS="ppo").stderr.startswith("SCRIPTS: there is no ppo.py")
    for setting in ({"TOTAL_TIMESTEPS": "1e6"}, {"SEEDS": "1 02"}, {"WORKERS": "two"}):
        result = benchmark(**setting)
        assert result.returncode == 2 and f"whole numbers, not {setting.popitem()[1].split()[-1]}" in result.stderr
    assert benchmark(WORKERS="0").returncode == 2
    result = benchmark("--seed=3")
    assert result.returncode == 2 and "SEEDS" in result.stderr and not os.path.exists("out")
