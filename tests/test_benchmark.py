"""benchmark.sh: finished, interrupted, failed and waiting cells."""

import fcntl
import glob
import json
import os
import pathlib
import pty
import shlex
import signal
import subprocess
import sys
import termios
import time

import pytest

from tests.conftest import ROOT, wait_for

SHORT = ["--no-compile", "--learning-starts=100", "--batch-size=16", "--eval-frequency=100", "--eval-episodes=1"]
NO_PYTHON = "/bin/true"  # saves the seconds that new figures take
HOPPER = {"ENVS": "Hopper-v4", "SCRIPTS": "ddpg_continuous"}
DONE, RUNNING, FAILED, WAITING = [tuple(map(int, row)) for row in ("1000", "0100", "0010", "0001")]


def command(**settings):
    env = {"SCRIPTS": "smoothie_no_kl ddpg_continuous", "SEEDS": "1", "TOTAL_TIMESTEPS": "300", "RUNS": os.path.abspath("out")}
    env |= {"ENVS": "tests.fake_envs:ShortHopper-v4", "PYTHON": sys.executable, "WORKERS": "2"} | settings
    return [os.path.join(ROOT, "benchmark.sh")], os.environ | env


def benchmark(*flags, **settings):
    args, env = command(**settings)
    return subprocess.run([*args, *flags], capture_output=True, text=True, env=env)


def start_in_terminal(**settings):
    """Start benchmark.sh in the foreground of a new terminal. Return the process and the terminal's keyboard."""

    def take_terminal():
        for number in (signal.SIGINT, signal.SIGHUP):  # pytest may run where they are ignored
            signal.signal(number, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    args, env = command(**settings)
    keyboard, terminal = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = subprocess.Popen([*args, *SHORT], env=env, start_new_session=True, preexec_fn=take_terminal, **streams)
    os.close(terminal)
    return process, keyboard


def run_folder(seed, rows, **flags):
    """Make a run folder of ddpg_continuous on Hopper-v4 with these rows in evaluations.csv."""
    folder = f"out/runs/Hopper-v4__ddpg_continuous__{seed}__5"
    os.makedirs(folder)
    with open(f"{folder}/evaluations.csv", "w") as file:
        file.write("global_step,episode,episodic_return,episodic_length\n" + rows)
    with open(f"{folder}/config.json", "w") as file:
        json.dump({"env_id": "Hopper-v4", "exp_name": "ddpg_continuous", "seed": seed} | flags, file)


def states(**settings):
    """Return the cells in --status: {(task, script): (done, running, failed, waiting)}."""
    rows = [line.split() for line in benchmark("--status", **settings).stdout.splitlines()[1:]]
    return {tuple(row[:2]): tuple(map(int, row[2:6])) for row in rows if row[1].endswith(("_kl", "_continuous"))}


def running():
    """Return the process ids of the runs: these work in the folder RUNS."""
    pids = []
    for path in glob.glob("/proc/[0-9]*"):
        try:
            if os.readlink(f"{path}/cwd") == os.path.realpath("out"):
                pids.append(int(path.split("/")[-1]))
        except OSError:  # it has ended, or belongs to another user
            pass
    return pids


@pytest.fixture(autouse=True)
def no_run_outlives_a_failed_test(in_empty_folder):
    yield
    for pid in running():
        os.kill(pid, signal.SIGKILL)


def logs():
    """Return the logs of all cells."""
    return "".join(pathlib.Path(path).read_text() for path in glob.glob("out/*.log"))


def test_finished_cells_are_skipped_and_failed_ones_reported():
    tasks = {"ENVS": "tests.fake_envs:ShortHopper-v4 tests.fake_envs:NaNReward-v0", "SCRIPTS": "ddpg_continuous"}
    good, bad = [(task, "ddpg_continuous") for task in tasks["ENVS"].split()]
    assert states(**tasks) == {good: WAITING, bad: WAITING}
    result = benchmark(*SHORT, **tasks)
    assert result.returncode == 1
    message = "NaNReward-v0 ddpg_continuous 1: exit code 1 after 200 steps: step 251: the environment returned "
    assert "failed:\n" in result.stderr and message in result.stderr
    assert states(**tasks) == {good: DONE, bad: FAILED}
    with open("out/results/table.md") as file:  # diverged runs count
        assert "| **DDPG** | 1 | 0k |" in file.read().split("NaNReward-v0")[1]
    assert "figure_3.png" in os.listdir("out/results")
    again = benchmark(*SHORT, ENVS=good[0], SCRIPTS="ddpg_continuous", PYTHON=NO_PYTHON)
    assert again.returncode == 0 and "already finished" in again.stdout and len(glob.glob("out/runs/*Hopper*")) == 1
    assert benchmark("--dry-run", ENVS=good[0], SCRIPTS="ddpg_continuous").stdout == ""


def test_the_newest_of_two_runs_of_a_cell_counts():
    """Newest by the start time in its name, whichever folder was touched last."""
    os.makedirs("out/runs/Hopper-v4__ddpg_continuous__1__10")
    pathlib.Path("out/runs/Hopper-v4__ddpg_continuous__1__10/checkpoint.pt").touch()
    run_folder(1, "100,0,1.0,5\n")
    os.utime("out/runs/Hopper-v4__ddpg_continuous__1__5")
    assert " --resume runs/Hopper-v4__ddpg_continuous__1__10 " in benchmark("--dry-run", **HOPPER).stdout


def test_ctrl_c_and_closing_the_terminal_stop_everything_and_the_next_call_resumes():
    cells = [("tests.fake_envs:Slow-v0", script) for script in ("smoothie_no_kl", "ddpg_continuous")]
    settings = {"ENVS": "tests.fake_envs:Slow-v0", "TOTAL_TIMESTEPS": "100000"}
    cores = sorted(os.sched_getaffinity(0))
    for round_, act in enumerate([lambda keyboard: os.write(keyboard, b"\x03"), os.close], 1):
        process, keyboard = start_in_terminal(**settings)
        wait_for(lambda round_=round_: logs().count("run folder: ") == 2 * round_, "two runs")
        assert states(**settings) == dict.fromkeys(cells, RUNNING)
        pinned = sorted(tuple(os.sched_getaffinity(pid)) for pid in running())
        assert pinned == sorted((cores[i % len(cores)],) for i in range(2)), "one core for each run"
        before = time.time()
        process.send_signal(signal.SIGSTOP)  # the worst case: the workers receive the terminal's signal first
        act(keyboard)
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        assert process.wait(120) == 130
        assert not running() and states(**settings) == dict.fromkeys(cells, WAITING)
        assert [os.path.getmtime(path) > before for path in glob.glob("out/runs/*/checkpoint.pt")] == [True, True]
    assert len(os.listdir("out/runs")) == 2, "the second call has resumed both runs"
    assert benchmark("--dry-run", **settings).stdout.count(" --resume ") == 2


def test_a_cell_never_runs_twice_at_once_and_fails_if_somebody_else_stops_it():
    settings = {"ENVS": "tests.fake_envs:Slow-v0", "SCRIPTS": "ddpg_continuous", "TOTAL_TIMESTEPS": "20000"}
    args, env = command(**settings)
    process = subprocess.Popen([*args, *SHORT], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: glob.glob("out/runs/*/policy.pt"), "the first evaluation")
    os.mkdir("out/results")
    result = benchmark(*SHORT, **settings, PYTHON=NO_PYTHON)
    assert result.returncode == 0 and "ddpg_continuous 1: already running" in result.stdout
    (pid,) = running()
    os.kill(pid, signal.SIGTERM)
    stderr = process.communicate()[1]
    assert process.returncode == 1 and "ddpg_continuous 1: exit code 143 after " in stderr
    assert list(states(**settings).values()) == [FAILED] and len(glob.glob("out/runs/*")) == 1


def test_a_lock_held_for_an_instant_does_not_keep_a_cell_from_running():
    """As --status holds it. A cell that ends without a step, which /bin/true does, has run and failed."""
    args, env = command(**HOPPER, PYTHON=NO_PYTHON)
    os.mkdir("out")
    with open("out/Hopper-v4__ddpg_continuous__1.log", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: waits_for_a_lock() or process.poll() is not None, "the cell to reach the lock")
    stdout, stderr = process.communicate()
    assert "already running" not in stdout and "ddpg_continuous 1: exit code 0 after 0 steps" in stderr


def waits_for_a_lock():
    """Whether a process waits for a file's lock, as /proc/locks shows by an arrow."""
    return " -> FLOCK" in pathlib.Path("/proc/locks").read_text()


LONG = ["--no-such-flag", "--a-flag-that-fills-the-line-of-the-box", "--another-flag-that-does-not-fit"]


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("Hopper-v4", LONG, "exit code 2 after 0 steps: Unrecognized options: " + ", ".join(LONG)),
        ("Hopper-v4", ["--gamma", "x"], "exit code 2 after 0 steps: Error parsing --gamma: could not convert "),
        (
            "*",
            ["--gamma", "2"],
            "exit code 1 after 0 steps: --gamma 2.0: must lie between 0 and 1\n",
        ),  # * is not a file pattern
    ],
)
def test_a_failure_is_reported_with_its_reason(task, flags, message):
    settings = {"SCRIPTS": "ddpg_continuous", "ENVS": task, "TOTAL_TIMESTEPS": "5000"}
    os.mkdir("out")
    with open(f"out/{task.replace('*', '-')}__ddpg_continuous__1.log", "w") as file:
        file.write("╭─ an earlier failure ─╮\n")
    result = benchmark(*flags, **settings)
    assert result.returncode == 1 and f"{task} ddpg_continuous 1: {message}" in result.stderr
    lines = benchmark("--status", **settings).stdout.splitlines()
    assert f"{task} ddpg_continuous 1: {message.strip()}" in lines[2]
    assert lines[3] == "1 cells: 0 done, 1 failed, 0 waiting, 0 running"


def test_status_shows_returns_and_the_time_left_of_the_slowest():
    run_folder(1, "0,0,9.0,5\n10000,0,100.0,5\n10000,1,300.0,5\n")
    run_folder(2, "50000,0,70.0,5\n")
    with open("out/Hopper-v4__ddpg_continuous__1.log", "w") as slow, open("out/Hopper-v4__ddpg_continuous__2.log", "w") as fast:
        slow.write(
            "step 0: eval return 9.00\nstep 5000: eval return 9.00, 7 steps/s\nstep 10000: eval return 200.00, 10 steps/s\n"
        )
        fast.write("step 50000: eval return 70.00, 30 steps/s\n")
        for file in (slow, fast):
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
        lines = benchmark("--status", **HOPPER, SEEDS="1 2 3", TOTAL_TIMESTEPS="100000").stdout.splitlines()
    assert lines[1].split() == ["Hopper-v4", "ddpg_continuous", "0", "2", "0", "1", "2.5", "h", "200", "70", "-"]
    assert lines[2] == "3 cells: 0 done, 0 failed, 1 waiting, 2 running; about 1.6 h left at the present speed"


def test_figures_that_cannot_be_drawn_replace_nothing():
    result = benchmark("--figures")
    assert result.returncode == 1 and "none of these cells has an evaluation yet" in result.stderr
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


def test_paths_are_relative_to_the_caller():
    paths = {"PYTHON": os.path.relpath(sys.executable), "RUNS": "here"}
    words = benchmark("--dry-run", "--slurm", **paths).stdout
    assert f"PYTHON={os.getcwd()}/{paths['PYTHON']}" in words and f"RUNS={os.getcwd()}/here" in words


def test_slurm_gets_the_unfinished_cells():
    """Check what is submitted; slurm.py runs it."""
    submit = ["--dry-run", "--slurm", "--partition=cpu"]
    line = benchmark("--gamma=0.9", *submit, SEEDS="1 2", WORKERS="").stdout
    words = shlex.split(line)
    assert words[0] == "sbatch" and "--array=0,1,2,3" in words and words[-3:-1] == ["--partition=cpu", "--wrap"]
    assert shlex.split(words[-1])[-2:] == ["--cell", "--gamma=0.9"] and "SEEDS=1 2" in shlex.split(words[-1])
    assert "--array=0,1,2,3%2" in shlex.split(benchmark(*submit, SEEDS="1 2", WORKERS="2").stdout)
    run_folder(1, "300,0,9.0,5\n")
    words = shlex.split(benchmark(*submit, ENVS="Hopper-v4", SEEDS="1 2").stdout)
    assert "--array=0,2,3%2" in words


def test_default_cells():
    lines = benchmark("--dry-run", SCRIPTS="", ENVS="", SEEDS="").stdout.splitlines()
    assert len(lines) == 6 * 6 * 4
    scripts = [os.path.basename(line.split()[1]) for line in lines[:4]]
    assert scripts == ["smoothie_continuous.py", "smoothie_no_kl.py", "smoothie_closed_form.py", "ddpg_continuous.py"]


def test_settings_of_the_task_and_the_script_come_before_those_of_the_caller():
    lines = benchmark("--dry-run", "--gamma", "0.9", ENVS="Ant-v4", SCRIPTS="smoothie_continuous ddpg_continuous").stdout
    smoothie, ddpg = map(shlex.split, lines.splitlines())
    for words in (smoothie, ddpg):
        assert words[words.index("--checkpoint-frequency") + 1] == "10000"
        assert words[words.index("--tau") + 1] == "0.001" and words[-2:] == ["--gamma", "0.9"]
    assert smoothie[smoothie.index("--kl-coef") + 1] == "1e-4" and smoothie[smoothie.index("--policy-lr") + 1] == "3e-5"
    assert "--kl-coef" not in ddpg and ddpg[ddpg.index("--policy-lr") + 1] == "1e-5"


def test_bad_settings_are_refused():
    assert benchmark(SCRIPTS="ppo").stderr == f"SCRIPTS: {ROOT} has no ppo.py\n"
    for setting in ({"TOTAL_TIMESTEPS": "1e6"}, {"SEEDS": "1 02"}, {"WORKERS": "two"}):
        result = benchmark(**setting)
        assert result.returncode == 2 and f"whole numbers, not {setting.popitem()[1].split()[-1]}" in result.stderr
    assert benchmark(WORKERS="0").returncode == 2
    result = benchmark("--seed=3")
    assert result.returncode == 2 and "SEEDS" in result.stderr and not os.path.exists("out")
