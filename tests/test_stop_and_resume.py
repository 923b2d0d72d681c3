"""Checkpoints: a run that was stopped, however, and resumed is the run that was not; what does not fit is refused."""

import csv
import filecmp
import glob
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import ddpg_continuous
import smoothie_continuous
import smoothie_no_kl
from tests.conftest import ROOT
from tests.test_runs import scalars, start

SHORT = ["--learning-starts", "150", "--batch-size", "32", "--eval-frequency", "150", "--eval-episodes", "2"]
SHORT += ["--total-timesteps", "450", "--checkpoint-frequency", "60", "--save-model"]
ARGS = {"learning_starts": 100, "batch_size": 32, "eval_frequency": 100, "eval_episodes": 1}
ARGS |= {"total_timesteps": 300, "checkpoint_frequency": 70}


def popen(script, *flags, **kwargs):
    command = [sys.executable, os.path.join(ROOT, script.__name__ + ".py"), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs)


def in_folder(name, run):
    """Call run() in a new folder of that name and return the folder of the run that it made."""
    os.makedirs(name)
    before = os.getcwd()
    os.chdir(name)
    try:
        run()
        (run_dir,) = glob.glob("runs/*")
    finally:
        os.chdir(before)
    return os.path.join(name, run_dir)


def assert_same(value, other):
    if isinstance(value, torch.Tensor):
        assert torch.equal(value, other)
    elif isinstance(value, dict):
        assert value.keys() == other.keys()
        for key in value:
            assert_same(value[key], other[key])
    else:
        assert value == other


def assert_same_run(run_dir, other):
    """Bit for bit the same returns, losses, weights, generators and transitions."""
    assert filecmp.cmp(f"{run_dir}/evaluations.csv", f"{other}/evaluations.csv", shallow=False)
    logged, logged_in_other = scalars(run_dir), scalars(other)
    del logged["charts/SPS"], logged_in_other["charts/SPS"]
    assert logged == logged_in_other and logged["losses/qf1_loss"]
    assert_same(*[torch.load(f"{folder}/checkpoint/state.pt", weights_only=True) for folder in (run_dir, other)])
    rows = [
        sorted(glob.glob(f"{folder}/checkpoint/rows_*"), key=lambda p: int(p.split("_")[-2])) for folder in (run_dir, other)
    ]
    first, second = [np.concatenate([np.fromfile(path, np.float32) for path in paths]) for paths in rows]
    assert np.array_equal(first, second, equal_nan=True)


@pytest.mark.parametrize(
    ("module", "env_id"),
    [
        (smoothie_continuous, "Hopper-v4"),
        (smoothie_continuous, "Humanoid-v4"),
        (smoothie_no_kl, "Hopper-v4"),
        (ddpg_continuous, "Hopper-v4"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_killed_at_random_moments_and_resumed(module, env_id):
    """KILLS=50 in the environment kills as often, in a run that is as much longer."""
    kills = int(os.environ.get("KILLS", "2"))
    flags = ["--env-id", env_id, *SHORT, "--total-timesteps", str(450 + 150 * kills)]

    def uninterrupted():
        assert start(module.__name__, *flags).returncode == 0

    def killed():
        killed, resume, random_moment = 0, [], random.Random(str(os.getpid()))
        while True:
            process = popen(module, *(resume or flags))
            if killed < kills:
                while not glob.glob("runs/*/checkpoint/state.pt") and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(random_moment.uniform(0.0, 1.0) + (3.0 if killed else 0.0))  # it takes that long to start
                process.kill()
            _, errors = process.communicate()
            if process.returncode != -signal.SIGKILL:
                assert process.returncode == 0, errors
                assert killed, "the run ended before it could be killed"
                return
            killed += 1
            resume = ["--resume", *glob.glob("runs/*")]

    assert_same_run(in_folder("whole", uninterrupted), in_folder("killed", killed))


@pytest.mark.parametrize(
    ("module", "number"), [(smoothie_continuous, signal.SIGTERM), (ddpg_continuous, signal.SIGINT)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_writes_a_last_checkpoint(module, number):
    flags = [*SHORT, "--checkpoint-frequency", "0", "--total-timesteps", "600"]

    def stopped():
        process = popen(module, *flags)
        for line in process.stdout:
            if line.startswith("step 150:"):
                process.send_signal(number)
                if number == signal.SIGTERM:  # schedulers send it again, perhaps while the checkpoint is being written
                    time.sleep(random.uniform(0.0, 0.2))
                    process.send_signal(number)
        assert process.wait() in (128 + number, -signal.SIGTERM), "a second SIGTERM may find the process on its way out"
        (run_dir,) = glob.glob("runs/*")
        message = process.stderr.read()
        assert re.fullmatch(rf"step \d+: {number.name}; go on with --resume {run_dir}\n", message), message
        assert int(re.search(r"\d+", message)[0]) < 600
        assert start(module.__name__, "--resume", run_dir, "--checkpoint-frequency", "600").returncode == 0

    def uninterrupted():
        assert start(module.__name__, *flags, "--checkpoint-frequency", "600").returncode == 0

    assert_same_run(in_folder("stopped", stopped), in_folder("whole", uninterrupted))


def test_a_wrapped_buffer_and_a_longer_run(script):
    """The ring is full before the stop; the run is then made longer than it was planned."""
    args = ARGS | {"buffer_size": 110}
    whole = in_folder("whole", lambda: script.train(script.Args(**args)))
    parts = in_folder("parts", lambda: script.train(script.Args(**args | {"total_timesteps": 200})))
    with open(f"{parts}/evaluations.csv", "a") as file:
        file.write("2")  # of a row that a full disk cut off
    os.chdir("parts")
    returns = script.train(script.Args(**args, resume=os.path.relpath(parts, "parts")))
    os.chdir("..")
    assert len(returns) == 4
    assert filecmp.cmp(f"{whole}/evaluations.csv", f"{parts}/evaluations.csv", shallow=False)
    state, other = (torch.load(f"{folder}/checkpoint/state.pt", weights_only=True) for folder in (whole, parts))
    assert_same(state, other)
    on_disk = sum(os.path.getsize(path) for path in glob.glob(f"{whole}/checkpoint/rows_*"))
    assert on_disk < 4 * 27 * (110 + 70 + 1), "rows that no checkpoint needs any more are removed"


@pytest.mark.parametrize("env_id", ["tests.fake_envs:Integers-v0", "Hopper-v5"])
def test_any_environment_resumes(script, env_id):
    """Observations of integers, bounds of their own for each dimension, a v5 task."""
    args = ARGS | {"env_id": env_id, "total_timesteps": 290}
    whole = in_folder("whole", lambda: script.train(script.Args(**args)))
    parts = in_folder("parts", lambda: script.train(script.Args(**args | {"total_timesteps": 200, "eval_frequency": 50})))
    script.train(script.Args(**args, resume=parts))
    states = [torch.load(f"{folder}/checkpoint/state.pt", weights_only=True)["agent"] for folder in (whole, parts)]
    assert_same(*states)


def test_an_environment_that_cannot_be_repeated_is_refused(script):
    args = ARGS | {"env_id": "tests.fake_envs:Forgetful-v0", "total_timesteps": 210}
    run_dir = in_folder("run", lambda: script.train(script.Args(**args)))
    refused(script, "did not repeat its episode", resume=run_dir, env_id=args["env_id"])


@pytest.fixture
def run_dir(script):
    return in_folder("run", lambda: script.train(script.Args(**ARGS)))


def refused(script, sentence, **flags):
    with pytest.raises(SystemExit) as stop:
        script.train(script.Args(**ARGS | flags))
    assert re.search(sentence, str(stop.value.code)) and "\n" not in stop.value.code, stop.value.code


def test_a_kill_while_writing_leaves_the_checkpoint_before(script):
    whole = in_folder("whole", lambda: script.train(script.Args(**ARGS)))
    replace, calls = os.replace, []

    def killed_half_way(new, path):
        if path.endswith("state.pt"):
            calls.append(path)
            if len(calls) == 3:
                with open(new, "r+b") as file:
                    file.truncate(1000)
                raise KeyboardInterrupt
        replace(new, path)

    def interrupted():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed_half_way)
            script.train(script.Args(**ARGS))

    broken = in_folder("broken", interrupted)
    assert torch.load(f"{broken}/checkpoint/state.pt", weights_only=True)["global_step"] == 140
    assert glob.glob(f"{broken}/checkpoint/rows_140_210.f32"), "rows that no checkpoint counts"
    script.train(script.Args(**ARGS, resume=broken))
    assert_same_run(broken, whole)


def test_what_does_not_fit_is_refused(script, run_dir):
    before = {path: os.path.getsize(path) for path in glob.glob(f"{run_dir}/**", recursive=True) if os.path.isfile(path)}
    refused(
        script, "env_id of this checkpoint is Hopper-v4, that of this run Walker2d-v4", resume=run_dir, env_id="Walker2d-v4"
    )
    refused(script, "seed of this checkpoint is 1, that of this run 2", resume=run_dir, seed=2)
    other = ddpg_continuous if script is not ddpg_continuous else smoothie_continuous
    refused(other, f"script of this checkpoint is {script.__name__}.py", resume=run_dir)
    refused(script, "state.pt: not there", resume=os.path.dirname(run_dir))

    path = f"{run_dir}/checkpoint/state.pt"
    state = torch.load(path, weights_only=True)
    weight = state["agent"]["qf.fc1.weight"]
    for change, sentence in [
        ({"identity": state["identity"] | {"format": 0}}, "format of this checkpoint is 0, that of this run 1"),
        ({"agent": state["agent"] | {"qf.fc1.weight": weight[:7]}}, "size mismatch for qf.fc1.weight"),
        ({"count": 500}, "100 of 300 transitions are there"),
    ]:
        torch.save(state | change, path)
        refused(script, sentence, resume=run_dir)
    torch.save(state, path)
    rows = glob.glob(f"{run_dir}/checkpoint/rows_*")[0]
    with open(rows, "r+b") as file:
        file.truncate(1000)
    refused(script, "does not fit or is not whole", resume=run_dir)
    with open(path, "r+b") as file:
        file.truncate(before[path] // 2)
    refused(script, "state.pt: cannot be read", resume=run_dir)
    del before[path], before[rows]
    assert before == {name: os.path.getsize(name) for name in before}, "nothing that was written is lost"


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: pickle.dump(value, open(path, "wb"))], ids=["torch", "pickle"]
)
def test_a_malicious_file_is_refused(script, run_dir, save):
    save({"identity": Malicious()}, f"{run_dir}/checkpoint/state.pt")
    refused(script, "state.pt: cannot be read", resume=run_dir)
    save(Malicious(), f"{run_dir}/policy.pt")
    with pytest.raises(SystemExit, match=r"policy\.pt: cannot be read"):
        script.watch(script.Args(evaluate=run_dir))
    assert not os.path.exists("pwned")


def test_two_runs_in_one_folder(script, run_dir):
    logger = script.Logger(script.Args(resume=run_dir))
    refused(script, "another run is going on in this folder", resume=run_dir)
    logger.close()
    assert len(script.train(script.Args(**ARGS, resume=run_dir))) == 4, "a finished run has nothing left to do"


def test_a_deleted_folder_ends_the_run_in_one_sentence(script, monkeypatch):
    evaluate = script.evaluate

    def deleting(*args):
        if os.path.exists(f"{glob.glob('runs/*')[0]}/evaluations.csv") and len(calls) == 1:
            os.rename("runs", "gone")  # at once, as TensorBoard's thread may be writing into it; then delete it
            shutil.rmtree("gone", ignore_errors=True)
        calls.append(args)
        return evaluate(*args)

    calls = []
    monkeypatch.setattr(script, "evaluate", deleting)
    refused(script, "cannot write .No such file or directory.; is there room")


def test_a_full_disk_ends_the_run_in_one_sentence_and_keeps_the_checkpoint(script):
    """A bound on the size of files stands for the full disk: rows fit under it, the state does not."""
    run_dir = in_folder("run", lambda: script.train(script.Args(**ARGS | {"total_timesteps": 150})))
    before = torch.load(f"{run_dir}/checkpoint/state.pt", weights_only=True)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    process = popen(script, "--resume", run_dir, "--total-timesteps", "400", preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert re.fullmatch(rf"{run_dir}: cannot write \(File too large\); is there room, .*\n", errors), errors
    assert_same(torch.load(f"{run_dir}/checkpoint/state.pt", weights_only=True), before)


def test_the_checkpoint_before_a_divergence_stays(script):
    flags = ["--env-id", "tests.fake_envs:NaNReward-v0", *SHORT, "--learning-starts", "100"]
    result = start(script.__name__, *flags)
    assert result.returncode == 1 and "training has diverged" in result.stderr
    (run_dir,) = glob.glob("runs/*")
    state = torch.load(f"{run_dir}/checkpoint/state.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["agent"].values())
    assert int(re.match(r"step (\d+)", result.stderr)[1]) - state["global_step"] <= 60


def test_evaluate_repeats_the_last_evaluation(script):
    assert start(script.__name__, "--env-id", "Humanoid-v4", *SHORT).returncode == 0
    (run_dir,) = glob.glob("runs/*")
    result = start(script.__name__, "--evaluate", run_dir)
    assert result.returncode == 0, result.stderr
    with open(f"{run_dir}/evaluations.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["global_step"] == "450"]
    expected = [(row["episodic_return"], row["episodic_length"]) for row in rows]
    assert re.findall(r"^episode \d: return (\S+), (\d+) steps$", result.stdout, re.M) == expected
    assert len(start(script.__name__, "--evaluate", run_dir, "--eval-episodes", "3").stdout.splitlines()) == 4
    assert start(script.__name__, "--evaluate", run_dir, "--eval-episodes", "0").stderr.startswith(
        "--eval-episodes 0: must lie"
    )


def test_a_video_that_cannot_be_written_ends_the_run_in_one_sentence(script, monkeypatch):
    """A file stands where the folder of the videos should be."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    path = script.Logger.path
    monkeypatch.setattr(
        script.Logger, "path", lambda self, *names: path(self, *("lock" if n == "videos" else n for n in names))
    )
    refused(script, r"cannot write \((Not a directory|File exists)\)", capture_video=True)


def test_evaluate_and_resume_refuse_other_folders(script):
    for flag in ("--evaluate", "--resume"):
        result = start(script.__name__, flag, "nowhere")
        assert result.returncode == 1
        assert re.fullmatch(r"nowhere: not the folder of a run of this script .*\n", result.stderr)
    result = start(script.__name__, "--render")
    assert result.returncode == 1 and result.stderr.startswith("--render: goes with --evaluate")


def test_config_holds_flags_versions_and_commit(script, run_dir):
    with open(f"{run_dir}/config.json") as file:
        config = json.load(file)
    assert config["total_timesteps"] == 300 and config["resume"] is None
    (made_by,) = config["provenance"]
    assert made_by["torch"] == torch.__version__
    assert made_by["commit"] is None or re.match(r"[0-9a-f]{40}", made_by["commit"])

    config["provenance"] = [made_by | {"torch": "1.0.0"}]
    with open(f"{run_dir}/config.json", "w") as file:
        json.dump(config, file)
    for _ in range(2):
        script.train(script.Args(**ARGS, resume=run_dir))
        with open(f"{run_dir}/config.json") as file:
            assert json.load(file)["provenance"] == [made_by | {"torch": "1.0.0"}, made_by], (
                "every version that made the numbers"
            )
