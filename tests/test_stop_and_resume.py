"""Checkpoints: a resumed run matches an uninterrupted one, however it was stopped; what does not fit is refused."""

import contextlib
import csv
import filecmp
import glob
import json
import math
import os
import pickle
import random
import re
import resource
import select
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpg_continuous
import smoothie_closed_form
import smoothie_continuous
import smoothie_no_kl
from tests.conftest import SHORT, command_line, popen, run, scalars, start, wait_for
from tests.fake_envs import Alarm

ENVS = "tests.fake_envs"


def load(run_dir):
    return torch.load(f"{run_dir}/checkpoint.pt", weights_only=True)


def assert_same(value, other, name=""):
    if isinstance(value, torch.Tensor):
        assert torch.equal(value, other), name
    elif isinstance(value, dict):
        assert value.keys() == other.keys()
        for key in value:
            assert_same(value[key], other[key], f"{name}.{key}")
    elif isinstance(value, list):
        assert len(value) == len(other)
        for i, item in enumerate(value):
            assert_same(item, other[i], f"{name}[{i}]")
    else:
        assert value == other, name


def assert_same_run(run_dir, other):
    """Bit for bit the same returns, losses, weights, generators and transitions."""
    for name in ("evaluations.csv", "transitions.f32"):
        assert filecmp.cmp(f"{run_dir}/{name}", f"{other}/{name}", shallow=False), name
    logged, logged_in_other = scalars(run_dir), scalars(other)
    del logged["charts/SPS"], logged_in_other["charts/SPS"]
    assert logged == logged_in_other and logged["losses/qf1_loss"]
    assert_same(load(run_dir), load(other))
    assert_same(*(torch.load(f"{folder}/policy.pt", weights_only=True) for folder in (run_dir, other)))


@pytest.mark.parametrize(
    ("module", "env_id"),
    [(smoothie_continuous, "Hopper-v4"), (ddpg_continuous, "Humanoid-v4")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_killed_at_random_moments_and_resumed(module, env_id):
    """KILLS=50 in the environment kills as often, in a run that is as much longer."""
    kills = int(os.environ.get("KILLS", "2"))
    flags = SHORT | {"env_id": env_id, "checkpoint_frequency": 37, "total_timesteps": 200 + 200 * kills, "eval_episodes": 1}
    whole = run(module, "whole", **flags)

    def checkpoint():
        return next((os.stat(path).st_mtime_ns for path in glob.glob("runs/*/checkpoint.pt")), None)

    for killed in range(kills):
        before = checkpoint()
        process = popen(module, **{"resume": glob.glob("runs/*")[0]} if killed else flags)
        wait_for(lambda before=before, process=process: checkpoint() != before or process.poll() is not None, "a checkpoint")
        time.sleep(random.uniform(0.0, 0.2))
        process.kill()
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors or "the run ended before it could be killed"
    (run_dir,) = glob.glob("runs/*")
    result = command_line(module, resume=run_dir)
    assert result.returncode == 0, result.stderr
    assert_same_run(run_dir, whole)


def test_interrupted_again_and_again_and_resumed(script):
    """In the first evaluation, within a training episode, in a later evaluation: each time a last checkpoint."""
    flags = SHORT | {"env_id": f"{ENVS}:Alarm-v0", "total_timesteps": 250, "eval_frequency": 80}
    Alarm.alarm = None
    whole = run(script, "whole", **flags, checkpoint_frequency=250)

    moments = [
        (0, 1, 3, [signal.SIGTERM, signal.SIGTERM]),  # schedulers send it again
        (117, 0, 117, [signal.SIGINT]),
        (160, 1, 50, [signal.SIGTERM]),  # counted from the start of the process
    ]
    for step, instance, count, numbers in moments:
        Alarm.set(instance, count, *numbers)
        result = command_line(script, **flags)
        (run_dir,) = glob.glob("runs/*")
        flags = {"resume": run_dir}
        assert result.returncode == 128 + numbers[0]
        assert result.stderr == f"step {step}: {numbers[0].name}; continue with --resume {run_dir}\n"
        assert load(run_dir)["step"] == step
        if step == 0:  # a run that leaves the checkpoint as it is; what it logged must not show up twice
            Alarm.alarm = None
            assert command_line(script, **flags).returncode == 0 and load(run_dir)["step"] == 0
    Alarm.alarm = None
    result = command_line(script, resume=run_dir, checkpoint_frequency=250)
    assert result.returncode == 0, result.stderr
    assert_same_run(run_dir, whole)


def test_an_endless_first_evaluation_can_be_watched_and_stopped():
    """Each line of stdout is flushed."""
    process = popen(smoothie_continuous, **SHORT | {"env_id": f"{ENVS}:Endless-v0"})
    assert select.select([process.stdout], [], [], 100)[0], "no line within 100 s"
    run_dir = re.match("run folder: ([^,]+)", process.stdout.readline())[1]
    time.sleep(0.5)
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (143, f"step 0: SIGTERM; continue with --resume {run_dir}\n")
    assert load(run_dir)["step"] == 0


def test_a_second_ctrl_c_ends_at_once():
    """Even where the environment never returns."""
    process = popen(smoothie_continuous, **SHORT | {"env_id": f"{ENVS}:Stuck-v0"})
    while process.stdout.readline() != "stuck\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the first one waits for the step to end"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGINT


def test_ctrl_c_while_the_first_update_compiles():
    """A terminal sends it to the compiler, too: there it must not arrive."""
    flags = SHORT | {"compile": True, "cuda": False, "total_timesteps": 10_000}  # waits for the CPU's compiler
    process = popen(ddpg_continuous, {"TORCHINDUCTOR_CACHE_DIR": os.path.abspath("cache")}, os.setsid, **flags)
    while not process.stdout.readline().startswith("step 100:"):
        assert process.poll() is None

    def compiler_runs():
        for path in glob.glob("/proc/[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, fields = re.fullmatch(r"\d+ \((.*)\) (.*)\n", Path(path).read_text()).groups()
                if name == "cc1plus" and int(fields.split()[2]) == process.pid:
                    return True

    wait_for(compiler_runs, "the compiler")
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    (run_dir,) = glob.glob("runs/*")
    assert (process.returncode, errors) == (130, f"step 101: SIGINT; continue with --resume {run_dir}\n")
    assert load(run_dir)["step"] == 101


def test_compiled_run_repeats_itself_resumes_and_says_nothing_more():
    flags = SHORT | {"compile": True, "env_id": f"{ENVS}:Alarm-v0", "total_timesteps": 201, "checkpoint_frequency": 201}
    result = start(smoothie_continuous, **flags)
    assert (result.returncode, result.stderr) == (0, "")
    (whole,) = glob.glob("runs/*")
    os.mkdir("parts")
    os.chdir("parts")
    Alarm.set(0, 117, signal.SIGTERM)
    assert command_line(smoothie_continuous, **flags).returncode == 143
    Alarm.alarm = None
    (parts,) = glob.glob("runs/*")
    run(smoothie_continuous, **flags, resume=parts)
    assert_same_run(parts, f"../{whole}")


def test_a_wrapped_buffer_and_a_longer_run():
    """The buffer is full before the stop; the run is then made longer than it was planned."""
    flags = {"buffer_size": 110, "checkpoint_frequency": 70, "env_id": f"{ENVS}:Integers-v0"}
    whole = run(smoothie_continuous, "whole", **flags)
    parts = run(smoothie_continuous, "parts", **flags | {"total_timesteps": 200})
    run(smoothie_continuous, **flags, resume=str(parts))
    assert_same_run(parts, whole)
    assert os.path.getsize(whole / "transitions.f32") == 300 * 4 * (6 + 2 + 1 + 6 + 1)
    assert load(whole)["step"] == 300, "the last step is a checkpoint, whatever the frequency"


@pytest.mark.parametrize(
    "env_id", ["Hopper-v5", *(f"{ENVS}:{kind}-v0" for kind in ("Integers", "Dict", "InPlace", "RandomState"))]
)
def test_any_environment_resumes_within_an_episode(env_id):
    flags = {"env_id": env_id, "eval_frequency": 1000, "eval_episodes": 1, "total_timesteps": 170, "checkpoint_frequency": 170}
    whole = run(smoothie_continuous, "whole", **flags)
    parts = run(smoothie_continuous, "parts", **flags | {"total_timesteps": 138, "checkpoint_frequency": 138})
    assert load(parts)["episode"][1] > 0, "138 steps end within an episode"
    run(smoothie_continuous, **flags, resume=str(parts))
    assert_same(*(load(folder)["agent"] for folder in (whole, parts)))
    assert filecmp.cmp(whole / "transitions.f32", parts / "transitions.f32", shallow=False)


def refused(sentence, run_dir, **flags):
    """The resumed run ends with one line on stderr, and changes nothing in its folder."""

    def contents():
        return {path: path.read_bytes() for path in Path(run_dir).rglob("*") if path.is_file()}

    before = contents()
    result = command_line(smoothie_continuous, resume=run_dir, **flags)
    assert result.returncode == 1 and re.fullmatch(f".*{sentence}.*\n", result.stderr), result.stderr
    assert contents() == before, "nothing that was written is lost"


def test_an_environment_that_cannot_be_repeated_is_refused():
    flags = {"env_id": f"{ENVS}:Forgetful-v0", "total_timesteps": 130, "checkpoint_frequency": 130}
    refused("cannot replay the episode", run(smoothie_continuous, **flags))


def test_an_episode_longer_than_the_buffer():
    """It cannot be replayed, for which the environment is not to blame."""
    flags = {"env_id": f"{ENVS}:Integers-v0", "total_timesteps": 159, "checkpoint_frequency": 159}
    run_dir = run(smoothie_continuous, buffer_size=34, **flags)
    assert load(run_dir)["episode"][1] == 39
    refused("--buffer-size", run_dir)


def test_another_buffer_size_is_refused(run_dir):
    """Rows that a smaller ring has overwritten before a checkpoint are nowhere."""
    refused("--buffer-size", run_dir, buffer_size=500)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """A finished run; tests work on copies of it."""
    return run(smoothie_continuous, str(tmp_path_factory.mktemp("unharmed")), total_timesteps=150, checkpoint_frequency=150)


@pytest.fixture
def run_dir(unharmed):
    return shutil.copytree(unharmed, "run")


def test_what_does_not_fit_is_refused(run_dir):
    run_of = "--env-id, --seed and --buffer-size cannot change"
    refused(run_of, run_dir, env_id="Walker2d-v4")
    refused(run_of, run_dir, seed=2)
    refused("--total-timesteps 120: this run has taken 150 steps already", run_dir, total_timesteps=120)
    for other in (smoothie_no_kl, smoothie_closed_form, ddpg_continuous):
        for flag in ("resume", "evaluate"):
            result = command_line(other, **{flag: run_dir})
            assert result.returncode == 1 and re.fullmatch("'run': .*\n", result.stderr)


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
@pytest.mark.parametrize("folder", ["nowhere", "", "empty", "no json", "another program"])
def test_another_folder_is_refused(flag, folder):
    for name, content in [("empty", None), ("no json", "{"), ("another program", '{"model": "gpt2"}')]:
        os.mkdir(name)
        if content:
            Path(name, "config.json").write_text(content)
    result = command_line(smoothie_continuous, f"--{flag}", folder)
    assert result.returncode == 1 and re.fullmatch(f"'{folder}': .*\n", result.stderr)
    assert sorted(os.listdir()) == ["another program", "empty", "no json"]


def test_an_empty_name_does_not_start_a_new_run(run_dir):
    """As where a shell variable is not set, here in the run's own folder."""
    os.chdir(run_dir)
    command_line(smoothie_continuous, "--resume", "")
    assert not os.path.exists("runs")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "weights", "transitions", "torch", "pickle"])
def test_a_damaged_or_malicious_checkpoint_is_refused(run_dir, damage):
    path, state = Path(run_dir, "checkpoint.pt"), load(run_dir)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "weights":
        torch.save(state | {"agent": state["agent"] | {"qfs.0.fc1.weight": state["agent"]["qfs.0.fc1.weight"][:7]}}, path)
    elif damage == "transitions":
        os.truncate(f"{run_dir}/transitions.f32", 1000)
    elif damage == "torch":
        torch.save(state | {"step": Malicious()}, path)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    refused(r"^run: the checkpoint is missing, damaged or of another network \(\w+\)", run_dir)
    assert not os.path.exists("pwned")


@pytest.mark.parametrize("damage", ["missing", "cut", "weights", "torch", "pickle"])
def test_a_damaged_or_malicious_policy_is_refused(run_dir, damage):
    path = Path(run_dir, "policy.pt")
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
    elif damage == "weights":
        state = torch.load(path, weights_only=True)
        torch.save(state | {"fc1.weight": state["fc1.weight"][:7]}, path)
    elif damage == "torch":
        torch.save({"fc1.weight": Malicious()}, path)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    result = command_line(smoothie_continuous, evaluate=run_dir)
    sentence = r"run: policy.pt is missing, damaged or of another network \(\w+\)\n"
    assert result.returncode == 1 and re.fullmatch(sentence, result.stderr), result.stderr
    assert not os.path.exists("pwned")


def test_a_kill_while_writing_leaves_the_checkpoint_before(monkeypatch):
    flags = {"checkpoint_frequency": 70, "env_id": f"{ENVS}:Integers-v0"}
    whole = run(smoothie_continuous, "whole", **flags)
    replace, write_bytes, written = Path.replace, Path.write_bytes, []

    def killed_half_way(path, content):
        if "checkpoint" in path.name:
            written.append(path)
            if len(written) == 3:
                write_bytes(path, content[:1000])
                raise KeyboardInterrupt
        return write_bytes(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", killed_half_way)
        run(smoothie_continuous, "broken", **flags)
    assert Path.replace is replace
    (broken,) = glob.glob("broken/runs/*")
    assert load(broken)["step"] == 140
    assert os.path.getsize(f"{broken}/transitions.f32") > 140 * 4 * 16, "rows that no checkpoint counts"
    run(smoothie_continuous, **flags, resume=broken)
    assert_same_run(broken, whole)


def test_a_full_disk_ends_the_run_in_one_sentence_and_keeps_the_checkpoint(run_dir):
    """A bound on the size of files stands for the full disk: transitions fit under it, the checkpoint does not."""
    before = load(run_dir)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    result = start(smoothie_continuous, preexec_fn=limit, resume=run_dir, total_timesteps=160, checkpoint_frequency=5)
    assert result.returncode == 1
    assert re.fullmatch(r"cannot read, write or allocate: .*File too large.*\n", result.stderr), result.stderr
    assert_same(load(run_dir), before)


def test_a_deleted_folder_ends_the_run_in_one_sentence(monkeypatch):
    evaluate = smoothie_continuous.evaluate

    def deleting(*args):
        if calls:
            shutil.rmtree("runs")
        calls.append(args)
        return evaluate(*args)

    calls = []
    monkeypatch.setattr(smoothie_continuous, "evaluate", deleting)
    with pytest.raises(FileNotFoundError, match="No such file or directory"):  # which the last lines print in one
        run(smoothie_continuous)
    assert not os.path.exists("runs"), "a deleted folder stays deleted"


@pytest.mark.parametrize("flags", [{"checkpoint_frequency": 10}, {"eval_frequency": 10}])
def test_what_was_saved_before_a_divergence_stays(monkeypatch, flags):
    """A check comes before each checkpoint and each evaluation, which saves the policy, not only at every hundredth step."""

    class Diverging(smoothie_continuous.Smoothie):
        updates = 0

        def update(self, observations, batch):
            self.updates += 1
            with torch.no_grad():
                self.actor.fc_mean.bias += math.nan if self.updates > 29 else 0.0  # before it acts
            return {}

    monkeypatch.setattr(smoothie_continuous, "Smoothie", Diverging)
    with pytest.raises(SystemExit, match=r"step 130: \S+ is not finite, training has diverged"):
        run(smoothie_continuous, **flags)
    (run_dir,) = glob.glob("runs/*")
    if "checkpoint_frequency" in flags:
        state = load(run_dir)
        assert state["step"] == 120 and all(value.isfinite().all() for value in state["agent"].values())
    assert all(value.isfinite().all() for value in torch.load(f"{run_dir}/policy.pt", weights_only=True).values())


def test_evaluate_repeats_the_last_evaluation(script):
    run_dir = run(script, total_timesteps=130, env_id="Hopper-v4")
    with open(f"{run_dir}/evaluations.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["global_step"] == "130"]
    expected = [[float(row["episodic_return"]), int(row["episodic_length"])] for row in rows]
    result = command_line(script, evaluate=run_dir)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.split("return and length of each episode: ")[1]) == expected
    assert f"mean return {np.mean(expected, 0)[0]:.2f};" in result.stdout
    result = command_line(script, evaluate=run_dir, eval_episodes=3)
    longer = json.loads(result.stdout.split("each episode: ")[1])
    assert len(longer) == 3 and longer[:2] == expected


def test_config_tells_what_made_the_run(run_dir):
    """The flags, and for each start the versions, the commit and the script's hash."""
    config = json.loads(Path(run_dir, "config.json").read_text())
    assert config["total_timesteps"] == 150 and config["resume"] is None
    (made_by,) = config["provenance"]
    assert {"torch", "gymnasium", "mujoco", "numpy", "commit", "script_sha256"} == made_by.keys()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", made_by["commit"] or 40 * "0")

    config["provenance"] = [made_by | {"torch": "1.0.0"}]
    Path(run_dir, "config.json").write_text(json.dumps(config))
    assert command_line(smoothie_continuous, resume=run_dir, total_timesteps=151, threads=2).returncode == 0
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    config = json.loads(Path(run_dir, "config.json").read_text())
    assert config["provenance"] == [made_by | {"torch": "1.0.0"}, made_by]
    assert (config["total_timesteps"], config["threads"], config["gamma"]) == (151, 2, 0.99)
