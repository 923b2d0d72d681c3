"""Whole runs: what they print, log and write; that a seed decides everything; that bad input is refused clearly."""

import csv
import difflib
import glob
import hashlib
import inspect
import json
import math
import os
import re
import struct

import pytest
import torch
from wandb.proto import wandb_internal_pb2

import ddpg_continuous
import smoothie_closed_form
import smoothie_continuous
import smoothie_no_kl
from tests.conftest import ROOT, SCRIPTS, SHORT, SMOOTHIES, agent_class, command_line, run, scalars, start


def readme_table(heading):
    """Rows of the table below a heading of README, as lists of cells without their backquotes."""
    with open(os.path.join(ROOT, "README.md")) as file:
        section = file.read().split(f"\n{heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "|" in line]
    return rows[2:]


def documented_keys(name):
    """The keys that README's table lists for the script. Its column says all, Smoothie (all but DDPG) or names scripts."""
    names = {name, "all"} | ({"Smoothie"} if name.startswith("smoothie") else set())
    return {row[0] for row in readme_table("## Logged values") if names & set(re.findall(r"\w+", row[1]))}


def test_short_run(finished, script):
    """Long enough to reach learning, logging, a truncated episode and evaluations."""
    folder, result = finished
    assert (result.returncode, result.stderr) == (0, "")
    assert [int(s) for s in re.findall(r"^step (\d+): eval return ", result.stdout, re.M)] == [0, 100, 200, 300]
    (name,) = os.listdir(folder / "runs")
    assert re.fullmatch(rf"my_envs-ShortHopper-v4__{script.__name__}__1__\d+", name)
    assert result.stdout.splitlines()[-1] == f"finished; the results are in runs/{name}"

    run_dir = folder / "runs" / name
    logged = scalars(run_dir)
    assert max(length for _, length in logged["charts/episodic_length"]) == 10, "an episode reached the time limit"
    assert [step for step, _ in logged["losses/qf1_loss"]] == [200, 300]
    assert [step for step, _ in logged["eval/episodic_return"]] == [0, 100, 200, 300]
    assert all(math.isfinite(value) for series in logged.values() for _, value in series)
    assert {re.sub(r"std_\d+", "std_i", key) for key in logged} == documented_keys(script.__name__)

    with open(run_dir / "evaluations.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["global_step"]) for row in rows] == [0, 0, 100, 100, 200, 200, 300, 300]
    mean_at_300 = sum(float(row["episodic_return"]) for row in rows[-2:]) / 2
    assert mean_at_300 == pytest.approx(logged["eval/episodic_return"][-1][1], rel=1e-5)
    assert f"step 300: eval return {mean_at_300:.2f}" in result.stdout

    config = json.loads((run_dir / "config.json").read_text())
    assert config["total_timesteps"] == 300 and config["gamma"] == 0.99 and config["script"] == f"{script.__name__}.py"
    (made_by,) = config["provenance"]
    with open(script.__file__, "rb") as file:
        assert made_by["script_sha256"] == hashlib.sha256(file.read()).hexdigest()
    assert made_by["torch"].split("+")[0] == torch.__version__.split("+")[0]  # the package can lack the "+cu130"
    assert made_by["commit"] is None, "no repository is around"
    policy = torch.load(run_dir / "policy.pt", weights_only=True)
    assert policy["fc1.weight"].shape == (400, 11) and policy["fc_mean.weight"].shape == (3, 300)


def test_a_seed_decides_everything(script):
    flags = {"total_timesteps": 200, "eval_frequency": 50}
    run_dirs = [run(script, f"run {i}", seed=seed, **flags) for i, seed in enumerate([1, 1, 2])]
    first, second, other = map(scalars, run_dirs)
    for logged in (first, second, other):
        del logged["charts/SPS"]
    assert first == second
    assert all(first[key] != other[key] for key in first if key.startswith("losses/") or key.endswith("return"))
    assert first["charts/episodic_return"][0] != other["charts/episodic_return"][0], "nor do the first random actions agree"
    weights = [torch.load(run_dir / "policy.pt", weights_only=True)["fc1.weight"] for run_dir in run_dirs]
    assert (weights[2] - weights[0]).abs().mean() > 0.1, "the networks start elsewhere, too"


def test_evaluation_leaves_training_alone():
    """Evaluating more often must not change what is learned."""

    def losses(eval_frequency):
        flags = {"total_timesteps": 200, "eval_frequency": eval_frequency, "eval_episodes": 1}
        logged = scalars(run(smoothie_continuous, str(eval_frequency), **flags))
        return {key: series for key, series in logged.items() if key.startswith(("losses/", "charts/episodic"))}

    assert losses(30) == losses(1000)


ENVS = "tests.fake_envs"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"env_id": "Pusher-v4"}, "Pusher-v4.*mujoco<3"),
        ({"env_id": "Hoper-v4"}, "Hoper.*Did you mean.*Hopper"),
        ({"env_id": "nowhere:Hopper-v4"}, "nowhere"),
        ({"env_id": "a:b:c"}, "env-id a:b:c"),
        ({"env_id": "Hopper-v3"}, "gymnasium-robotics"),
        ({"env_id": f"{ENVS}:Discrete-v0"}, "Discrete-v0: .*Box"),
        ({"env_id": f"{ENVS}:Sequence-v0"}, "Sequence-v0: needs .* observations of a fixed size"),
        ({"env_id": f"{ENVS}:Unbounded-v0"}, "Unbounded-v0: .*bound"),
        ({"env_id": f"{ENVS}:Square-v0"}, "Square-v0: "),
        ({"env_id": f"{ENVS}:Scalar-v0"}, "Scalar-v0: "),
        ({"env_id": f"{ENVS}:IntegerActions-v0"}, "IntegerActions-v0: needs .* real actions"),
        ({"env_id": f"{ENVS}:FixedAction-v0"}, "FixedAction-v0: needs .* real actions"),
        ({"gamma": 1.5}, "gamma 1.5: must lie between 0 and 1"),
        ({"gamma": math.nan}, "gamma nan"),
        ({"q_lr": math.nan}, "q-lr nan"),
        ({"policy_lr": -0.1}, "policy-lr -0.1"),
        ({"tau": 0.0}, "tau 0.0"),
        ({"tau": 2.0}, "tau 2.0"),
        ({"seed": -1}, "seed -1"),
        ({"batch_size": 200, "learning_starts": 100}, "batch-size 200.*100 transitions"),
        ({"batch_size": 200, "buffer_size": 150, "learning_starts": 250}, "batch-size 200.*150 transitions"),
        ({"eval_frequency": 0}, "eval-frequency 0"),
        ({"eval_episodes": 0}, "eval-episodes 0"),
        ({"threads": 0}, "threads 0"),
        ({"checkpoint_frequency": -1}, "checkpoint-frequency -1"),
        ({"learning_starts": 300}, "learning-starts 300: nothing is learned in --total-timesteps 300"),
    ],
    ids=lambda value: ",".join(value) + " " + ",".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_bad_input(flags, sentence):
    result = command_line(smoothie_continuous, **SHORT | flags)
    assert result.returncode == 1 and re.fullmatch(f"--.*{sentence}.*\n", result.stderr), result.stderr
    assert not os.path.exists("runs"), "refused before anything is written"


BAD = [("log_var_init", 0.1), ("log_var_lr", -1.0), ("kl_coef", math.nan), ("ou_theta", 1.1)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_flags_of_one_algorithm_are_checked(script, name, value):
    if hasattr(script.Args, name):
        with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} {value}: must lie between"):
            script.main(script.Args(**{name: value}))
    else:
        with pytest.raises(TypeError):
            script.Args(**{name: value})


def test_an_unknown_flag():
    result = command_line(smoothie_continuous, gama=1)
    assert result.returncode == 2 and "--gamma" in result.stderr and "Traceback" not in result.stderr


def test_an_unwritable_folder():
    open("runs", "w").close()  # a file where the folder should be
    result = command_line(smoothie_continuous, **SHORT)
    assert result.returncode == 1 and re.fullmatch("cannot read, write or allocate: .*runs.*\n", result.stderr)


def test_without_a_compiler_the_run_says_so_and_goes_on():
    """In a folder without the code that was compiled before. For a GPU the compiler gets far enough to complain itself."""
    flags = {"total_timesteps": 101, "learning_starts": 100, "env_id": SHORT["env_id"], "eval_episodes": 1, "cuda": False}
    env = {"PATH": "/nowhere", "CXX": "g++", "TORCHINDUCTOR_CACHE_DIR": os.path.abspath("cache")}
    result = start(smoothie_continuous, env, **flags)
    assert result.returncode == 0 and re.fullmatch(r"cannot compile, so updates will be slower \(\w+\)\n", result.stderr)
    assert "finished" in result.stdout


@pytest.mark.parametrize("what", ["Reward", "Observation"])
def test_nan_from_the_environment_is_reported_as_such(what):
    sentence = "step 251: the environment returned a reward or an observation that is not finite"
    with pytest.raises(SystemExit, match=sentence):
        run(smoothie_continuous, env_id=f"{ENVS}:NaN{what}-v0")
    (run_dir,) = glob.glob("runs/*")
    assert [step for step, _ in scalars(run_dir)["losses/qf1_loss"]] == [200]
    with open(f"{run_dir}/evaluations.csv") as file:
        assert [row["global_step"] for row in csv.DictReader(file)][::2] == ["0", "100", "200"]


@pytest.mark.parametrize("what", ["losses/qf1_loss", "qfs.0.fc2.weight", "actor.fc1.bias"])
def test_divergence_stops_the_run(script, monkeypatch, what):
    """In a loss or in a weight, whichever it shows in; the environment is not blamed. What was logged stays."""

    class Agent(agent_class(script)):
        def update(self, observations, batch):
            if what.startswith("losses"):
                return {what: torch.tensor(math.inf)}
            with torch.no_grad():
                self.get_parameter(what).view(-1)[7] = math.nan
            return {"losses/qf1_loss": torch.ones(())}

    monkeypatch.setattr(script, agent_class(script).__name__, Agent)
    with pytest.raises(SystemExit, match=rf"step \d+: {what} is not finite, training has diverged"):
        run(script)
    assert len(scalars(*glob.glob("runs/*"))["eval/episodic_return"]) == 2


def test_a_changed_critic_needs_a_changed_closed_form(script, monkeypatch):
    """One more layer before the last would make the derivatives wrong, silently."""

    class Deeper(script.QNetwork):
        def __init__(self, obs_dim, action_dim):
            super().__init__(obs_dim, action_dim)
            self.fc3 = torch.nn.Linear(300, 300)

        def forward(self, observations, actions):
            return self.fc_q(torch.relu(self.fc3(torch.relu(self.hidden(observations, actions))))).squeeze(1)

    monkeypatch.setattr(script, "QNetwork", Deeper)
    with pytest.raises(SystemExit, match=r"^QNetwork: .* together$"):
        run(script)
    assert not os.path.exists("runs")


def test_a_wrong_gaussian_average_is_noticed(monkeypatch):
    """Values and derivatives that agree with each other, but belong to another covariance."""
    smoothed = smoothie_closed_form.QNetwork.smoothed
    monkeypatch.setattr(smoothie_closed_form.QNetwork, "smoothed", lambda qf, s, a, log_var: smoothed(qf, s, a, 2 * log_var))
    with pytest.raises(SystemExit, match=r"^QNetwork: smoothed must return the Gaussian average"):
        run(smoothie_closed_form)


def wandb_records(path):
    """Yield the records of a .wandb file: after 7 bytes of header, a LevelDB log of blocks of 32 KiB."""
    with open(path, "rb") as file:
        data = file.read()
    assert data[:4] == b":W&B"
    position, record = 7, b""
    while position < len(data):
        if 32768 - position % 32768 < 7:  # too short for the head of a chunk: padding up to the next block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def tracked(folder):
    """Return the id, the config and {key: [(step, value), ...]} of the run that `wandb sync` would send."""
    (path,) = glob.glob(f"{folder}/*.wandb")
    history, config, run_id = {}, {}, None
    for record in wandb_records(path):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for key, value in row.items():
            history.setdefault(key, []).append((row.get("global_step"), value))
        run_id = record.run.run_id or run_id
        for item in record.run.config.update:
            config[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return run_id, config, history


def test_tracking_works_offline_and_a_resumed_run_carries_the_rest():
    """Every scalar that TensorBoard gets is in the files that `wandb sync` would send, under one id."""
    flags = {"track": True, "checkpoint_frequency": 100}
    result = start(smoothie_continuous, {"WANDB_MODE": "offline"}, **SHORT | flags | {"total_timesteps": 200})
    assert result.returncode == 0, result.stderr
    (run_dir,), (first,) = glob.glob("runs/*"), glob.glob("wandb/offline-run-*")
    result = start(smoothie_continuous, {"WANDB_MODE": "offline"}, resume=run_dir, total_timesteps=330)
    assert result.returncode == 0, result.stderr
    (second,) = set(glob.glob("wandb/offline-run-*")) - {first}
    (run_id, config, history), (other_id, _, rest) = tracked(first), tracked(second)
    assert run_id == other_id == os.path.basename(run_dir)
    assert config["total_timesteps"] == 200 and config["gamma"] == 0.99
    for key, series in scalars(run_dir).items():
        steps, values = zip(*series, strict=True)
        tracked_steps, tracked_values = zip(*history.get(key, []), *rest.get(key, []), strict=True)
        assert tracked_steps == steps and tracked_values == pytest.approx(values, rel=1e-5), key


def test_tracking_can_be_disabled():
    flags = SHORT | {"track": True, "total_timesteps": 120}
    result = start(smoothie_continuous, {"WANDB_MODE": "disabled"}, **flags)
    assert result.returncode == 0, result.stderr
    assert len(scalars(*glob.glob("runs/*"))["eval/episodic_return"]) == 3


def test_every_flag_has_a_help_text(script):
    source = inspect.getsource(script.Args)
    for name in vars(script.Args()):
        assert re.search(rf"(?m)^    {name}: .+ = .+  # \w.{{9,}}$", source), name
    result = command_line(script, "--help")
    assert result.returncode == 0 and "Section 6.2" in result.stdout and "--eval-episodes INT" in result.stdout
    words = " ".join(re.sub(r"[^\w\s.,;:()'+-]", " ", result.stdout).split())
    for text in re.findall(r"  # (.+)", source):
        assert " ".join(re.sub(r"[^\w\s.,;:()'+-]", " ", text).split()) in words, "tyro shows it"


def code_of(thing):
    return re.sub(r'"""(.|\n)*?"""', "", inspect.getsource(thing)).splitlines()


def test_same_shared_code():
    """What must not differ between the scripts does not, so that most tests can use one of them."""
    for name in ("make_env", "ReplayBuffer", "Adam", "compile_update", "evaluate", "write", "check_finite", "parse_args"):
        assert all(code_of(getattr(module, name)) == code_of(getattr(smoothie_continuous, name)) for module in SCRIPTS), name
    for module in SMOOTHIES:
        assert code_of(module.Actor) == code_of(smoothie_continuous.Actor)
    assert code_of(smoothie_closed_form.kl_divergence) == code_of(smoothie_continuous.kl_divergence)
    for name in ("QNetwork", "main", "check"):
        assert code_of(getattr(smoothie_no_kl, name)) == code_of(getattr(smoothie_continuous, name)), name


@pytest.mark.parametrize(
    ("module", "own"),
    [
        (smoothie_closed_form, r"\bqf\b"),
        (ddpg_continuous, r"\bqf\b|noise|std|DDPG|ou_theta"),
    ],
    ids=["closed form", "DDPG"],
)
def test_same_run(module, own):
    """main() and check() differ where they check the critic's derivatives and where they explore, and nowhere else."""
    for name in ("main", "check"):
        first, second = code_of(getattr(smoothie_continuous, name)), code_of(getattr(module, name))
        for kind, a, b, c, d in difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
            changed = "\n".join(first[a:b] + second[c:d])
            assert kind == "equal" or re.search(own, changed), changed
    ends = []
    for script in (smoothie_continuous, module):
        with open(script.__file__) as file:
            ends.append(file.read().split('if __name__ == "__main__":')[1])
    assert ends[0] == ends[1]
