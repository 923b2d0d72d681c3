"""The same command resumes a run, which then matches an uninterrupted one bit for bit."""

import json
import os
import pickle
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import ddpg_continuous
import smoothie_closed_form
import smoothie_continuous
from tests.conftest import ROOT, SHORT, command, run, scalars, start


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(value, other, name=""):
    if isinstance(value, torch.Tensor):
        assert torch.equal(value, other), name
    elif isinstance(value, dict):
        assert value.keys() == other.keys()
        for key in value:
            assert_same(value[key], other[key], f"{name}.{key}")
    else:
        assert value == other, name


def assert_same_run(run_dir, other):
    """The same returns, losses, weights, generators and transitions."""
    run_dir = Path(run_dir)
    other = Path(other)
    assert (run_dir / "evaluations.csv").read_text() == (other / "evaluations.csv").read_text()
    logged = scalars(run_dir)
    assert logged == scalars(other) and logged["losses/qf1_loss"]
    for name in ("checkpoint.pt", "policy.pt"):
        assert_same(load(run_dir / name), load(other / name))


@pytest.mark.parametrize("module", [smoothie_continuous, ddpg_continuous])
def test_killed_at_any_moment_and_started_again(module):
    """Once while it writes a checkpoint, else at random moments. KILLS=50 kills more often."""
    kills = int(os.environ.get("KILLS", "2"))
    flags = {"checkpoint_frequency": 25, "total_timesteps": 400 + 100 * kills}
    whole = run(module, run_dir="whole", **flags)

    half = Path("killed/checkpoint.pt.new")

    def written():
        checkpoint = Path("killed/checkpoint.pt")
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    env = os.environ | {"PYTHONPATH": ROOT}
    for kill in range(kills):
        before = written()
        words = command(module, run_dir="killed", **flags)
        process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL)
        if kill == 0:
            while not half.exists():
                assert process.poll() is None, "the run ended before it could be killed"
        else:
            while written() == before:
                assert process.poll() is None, "the run ended before it could be killed"
                time.sleep(0.01)
            time.sleep(random.uniform(0.0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    time.sleep(1.1)  # TensorBoard orders its files by the second, and this process is quick
    run(module, run_dir="killed", **flags)
    assert_same_run("killed", whole)


def test_killed_in_the_middle_of_writing(script, monkeypatch):
    """A half-written file leaves the checkpoint before it."""
    flags = {"checkpoint_frequency": 30}
    whole = run(script, run_dir="whole", **flags)
    save = torch.save
    calls = []

    class Killed(BaseException):
        pass

    def cut(state, path):
        save(state, path)
        calls.append(path)
        if len(calls) == 8:
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: len(content) // 2])
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut)
        with pytest.raises(Killed):
            run(script, run_dir="killed", **flags)
    assert calls[-1].endswith("checkpoint.pt.new")
    step = load("killed/checkpoint.pt")["step"]
    assert 0 < step < 300
    run(script, run_dir="killed", **flags)
    assert_same_run("killed", whole)


def test_a_compiled_run_resumes_and_makes_the_same_updates_as_without():
    flags = {"compile": True, "total_timesteps": 250, "eval_frequency": 51}
    flags["env_id"] = "tests.fake_envs:Recorder-v0"  # with episodes of 5 and 7 steps in turn
    whole = run(smoothie_closed_form, run_dir="whole", **flags)
    run(smoothie_closed_form, run_dir="longer", **flags | {"total_timesteps": 204})
    run(smoothie_closed_form, run_dir="longer", **flags)
    assert_same_run("longer", whole)

    run(smoothie_closed_form, run_dir="plain", **flags | {"compile": False})
    for name in ("whole", "plain"):
        agent = load(f"{name}/checkpoint.pt")["agent"]
        steps = [agent[f"{key}_optimizer.steps"].item() for key in ("q", "actor")]
        assert steps == [150, 75]
    compiled, plain = (dict(scalars(name)["losses/qf1_loss"])[200] for name in ("whole", "plain"))
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_how_often_a_run_writes_checkpoints(script, monkeypatch):
    """At the first end of an episode after 30 more steps, and at the end of the run."""
    steps = []
    save = torch.save

    def record(state, path):
        if "step" in state:
            steps.append(state["step"])
        save(state, path)

    monkeypatch.setattr(torch, "save", record)
    flags = {"env_id": "tests.fake_envs:Recorder-v0", "checkpoint_frequency": 30}
    run(script, run_dir="run", **flags, total_timesteps=130)
    run(script, run_dir="run", **flags, total_timesteps=200)
    # episodes end at 5, 12, 17, 24, ..., and where a run is extended an episode begins
    assert steps == [36, 72, 108, 130, 166, 200]


def test_ctrl_c_ends_with_one_line_that_says_how_to_resume():
    flags = SHORT | {"total_timesteps": 100_000, "run_dir": "stopped"}
    env = os.environ | {"PYTHONPATH": ROOT}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored if the tests run in background
    process = subprocess.Popen(command(smoothie_continuous, **flags), env=env, **pipes)
    signal.signal(signal.SIGINT, before)
    for line in process.stdout:
        if line.startswith("step 200"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert errors == "stopped; to resume, repeat the command with --run-dir stopped\n"
    assert process.returncode == 1


def test_a_finished_run_stays_as_it_is_and_can_become_longer():
    """With a buffer that has wrapped around, and a task whose episodes end where the run does."""
    flags = {"env_id": "tests.fake_envs:Recorder-v0", "buffer_size": 150, "total_timesteps": 360}
    run(smoothie_continuous, **flags).rename("run")  # a run that was given no folder
    names = ("checkpoint.pt", "policy.pt", "evaluations.csv")
    before = {name: Path("run", name).read_bytes() for name in names}
    run_id = json.loads(Path("run/config.json").read_text())["run_id"]
    run(smoothie_continuous, run_dir="run", wandb_project_name="other", **flags)
    assert {name: Path("run", name).read_bytes() for name in names} == before

    flags["total_timesteps"] = 480
    run(smoothie_continuous, run_dir="run", checkpoint_frequency=7, **flags)
    assert json.loads(Path("run/config.json").read_text())["run_id"] == run_id
    whole = run(smoothie_continuous, run_dir="whole", **flags)
    rows = Path("run/evaluations.csv").read_text().splitlines()
    without_360 = [row for row in rows if not row.startswith("360,")]
    assert without_360 == Path(whole, "evaluations.csv").read_text().splitlines()
    state = load("run/checkpoint.pt")
    other = load("whole/checkpoint.pt")
    assert_same(state["agent"], other["agent"])
    assert_same(state["rows"], other["rows"])


@pytest.mark.parametrize(
    ("module", "flags", "sentence"),
    [
        (smoothie_continuous, {"gamma": 0.98, "seed": 2}, "a different --seed, --gamma$"),
        (smoothie_continuous, {"env_id": "Hopper-v4"}, "a different --env-id$"),
        (ddpg_continuous, {}, "made by smoothie_continuous.py$"),
        (smoothie_continuous, {"total_timesteps": 150}, "has done 300 steps"),
    ],
)
def test_another_run_in_the_folder_is_refused(module, flags, sentence):
    run(smoothie_continuous, run_dir="run", batch_size=100)
    config = Path("run/config.json").read_text()
    with pytest.raises(SystemExit, match=sentence):
        run(module, run_dir="run", **{"batch_size": 100, **flags})
    assert Path("run/config.json").read_text() == config


def test_two_runs_in_one_second(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.8e9)
    flags = {"total_timesteps": 110, "eval_frequency": 1_000, "eval_episodes": 1}
    folders = [run(smoothie_continuous, **flags).name for _ in range(3)]
    name = "ShortHopper-v4__smoothie_continuous__1__1800000000"
    assert folders == [name, f"{name}-2", f"{name}-3"]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_runs_no_code():
    run_dir = run(smoothie_continuous, run_dir="run")
    torch.save({"step": Malicious()}, run_dir / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError):
        run(smoothie_continuous, run_dir="run")
    assert not os.path.exists("evil")


def test_the_run_folder_says_what_made_the_run():
    run_dir = run(smoothie_continuous, seed=7, run_dir="run")
    config = json.loads((run_dir / "config.json").read_text())
    assert config["seed"] == 7 and config["gamma"] == 0.99
    assert config["task"] == "ShortHopper-v4" and config["script"] == "smoothie_continuous.py"
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    copied = (run_dir / "smoothie_continuous.py").read_text()
    assert copied == Path(smoothie_continuous.__file__).read_text()
    # the copy resumes its own run
    words = command(smoothie_continuous, seed=7, run_dir="run", total_timesteps=310)
    words[1] = "run/smoothie_continuous.py"
    result = subprocess.run(words, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert load("run/checkpoint.pt")["step"] == 310


def test_a_run_that_starts_over_keeps_the_new_script():
    run_dir = run(smoothie_continuous, run_dir="run")
    copied = run_dir / "smoothie_continuous.py"
    copied.write_text("# mine")
    run(smoothie_continuous, run_dir="run")
    assert copied.read_text() == "# mine"  # the copy stays the script that made the checkpoint
    (run_dir / "checkpoint.pt").unlink()
    (run_dir / "evaluations.csv").unlink()
    run(smoothie_continuous, run_dir="run")
    assert copied.read_text() == Path(smoothie_continuous.__file__).read_text()


def test_a_finished_run_without_its_checkpoint_is_not_overwritten(script):
    run_dir = run(script, run_dir="run")
    (run_dir / "checkpoint.pt").unlink()
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    for steps in (300, 400):
        with pytest.raises(SystemExit, match="this run has finished and has no checkpoint"):
            run(script, run_dir="run", total_timesteps=steps)
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


def test_a_gpu_that_cannot_be_used_does_no_harm(script, monkeypatch):
    """A driver that is too old for PyTorch still counts GPUs."""
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load(run(script, cuda=True) / "checkpoint.pt")["cuda_rng"] == []


def test_start_in_a_process_of_its_own_says_where_the_results_are():
    result = start(smoothie_continuous)
    assert (result.returncode, result.stderr) == (0, "")
    (run_dir,) = Path("runs").iterdir()
    assert result.stdout.splitlines()[0] == f"run folder: {run_dir}"
    assert result.stdout.splitlines()[-1] == f"finished; the results are in {run_dir}"
