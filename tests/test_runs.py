"""Whole runs: what reaches the environment, the buffer, the logs and the screen; bad input."""

import contextlib
import csv
import dataclasses
import difflib
import importlib.metadata
import inspect
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ddpg_continuous
import smoothie_closed_form
import smoothie_continuous
import smoothie_no_kl
from tests import fake_envs
from tests.conftest import (
    ROOT,
    SCRIPTS,
    SHORT,
    SMOOTHIES,
    agent_class,
    command,
    run,
    scalars,
    start,
)

ENVS = "tests.fake_envs"
MUJOCO = ["Swimmer", "HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid"]
WARM_UP, STEPS = 36, 480


class Trained:
    """A run on the recorder whose updates are counted and change nothing."""

    def __init__(self, script, monkeypatch, **flags):
        self.batches = []
        self.policy_batches = []
        test = self

        class Agent(agent_class(script)):
            def __init__(self, *args):
                super().__init__(*args)
                test.agent = self
                with torch.no_grad():
                    self.actor.fc_mean.weight *= 0.1  # so that noise finds both bounds
                    self.actor.fc_mean.bias += 0.2  # so that the policy is not its target
                    if hasattr(self.actor, "log_var"):
                        self.actor.log_var -= torch.tensor([0.5, 1.0])  # nor the initial policy

            def update_critics(self, *batch):
                test.batches.append(batch)
                return {}

            def update_policy(self, *batch):
                test.policy_batches.append(batch)
                return {}

        monkeypatch.setattr(script, agent_class(script).__name__, Agent)
        fake_envs.Recorder.instances.clear()
        flags = {"env_id": f"{ENVS}:Recorder-v0", "eval_episodes": 3, "seed": 3} | flags
        flags |= {"learning_starts": WARM_UP, "total_timesteps": STEPS, "eval_frequency": 200}
        self.run_dir = run(script, **flags)
        self.training, self.evaluation = fake_envs.Recorder.instances
        state = torch.load(self.run_dir / "checkpoint.pt", weights_only=True)
        widths = [3, 2, 1, 3, 1, 2, 2]
        self.rows = state["rows"].numpy()
        parts = np.split(self.rows, np.cumsum(widths)[: 4 if self.rows.shape[1] == 10 else 6], 1)
        self.obs, self.actions, self.rewards, self.next_obs, self.terminated = parts[:5]
        self.behaviour = parts[5:]

    def mean_action(self, obs):
        with torch.no_grad():
            out = self.agent.actor(torch.tensor(np.array(obs), dtype=torch.float32))
        return (out[0] if isinstance(out, tuple) else out).numpy()


@pytest.fixture
def trained(script, monkeypatch):
    wide = {"ou_sigma": 1.0} if script is ddpg_continuous else {"log_var_init": 0.0}
    return Trained(script, monkeypatch, policy_delay=3, **wide)


def compressed(seen):
    """What a script makes of observations: beyond 10, they grow like a logarithm."""
    size = np.abs(seen)
    return np.copysign(np.where(size <= 10, size, 10 + np.log(np.maximum(size - 9, 1))), seen)


def test_what_reaches_the_environment_and_the_buffer(trained):
    low = fake_envs.Recorder.action_space.low
    high = fake_envs.Recorder.action_space.high
    received = np.array(trained.training.received)
    assert (np.abs(trained.actions[WARM_UP:]) > 1).any(), "the buffer keeps samples out of bounds"
    assert (received.max(0) == high).all() and (received.min(0) == low).all(), "both bounds"
    expected = (high + low) / 2 + (high - low) / 2 * np.clip(trained.actions, -1, 1)
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)

    assert (np.abs(trained.training.seen) > 10).any()
    np.testing.assert_allclose(trained.obs, compressed(trained.training.seen), rtol=1e-6)
    assert (trained.rewards == 1).all()
    period = np.array([0, 0, 0, 0, 1] + 7 * [0])  # a termination, then a time limit
    np.testing.assert_array_equal(trained.terminated[:, 0], np.tile(period, STEPS // 12))
    # the observation after an episode's last step is not the first one of the next episode
    ends = np.isin(np.arange(STEPS) % 12, [4, 11])
    follows = (trained.next_obs[:-1] == trained.obs[1:]).all(1)
    np.testing.assert_array_equal(follows, ~ends[:-1])

    # uniform actions at first; then the policy acts, and learns from batches of its own
    warm_up = trained.actions[:WARM_UP]
    assert (np.abs(warm_up) <= 1).all()
    assert (warm_up.min(0) < -0.8).all() and (warm_up.max(0) > 0.8).all()
    assert len(trained.batches) == STEPS - WARM_UP
    assert len(trained.policy_batches) == (STEPS - WARM_UP) / 3
    rows = {tuple(row) for row in trained.rows.tolist()}
    for batch in trained.batches[:3] + trained.policy_batches[:3]:
        columns = [part.view(len(batch[0]), -1) for part in batch]
        assert {tuple(row) for row in torch.cat(columns, 1).tolist()} <= rows
    assert not torch.equal(trained.batches[1][0], trained.policy_batches[0][0])

    # every environment has seeds of its own
    training, evaluation = trained.training.seeds, trained.evaluation.seeds
    assert len(set(training)) == len(training) and evaluation == 4 * [3_000, 3_001, 3_002]


def test_smoothie_explores_with_gaussian_noise_and_remembers_it(smoothie, monkeypatch):
    """Mean and phi are those of the actor now, not of its target or of the start."""
    factor = 1.3
    trained = Trained(smoothie, monkeypatch, log_var_init=-1.5, exploration=factor)
    std = np.array([math.exp(-1.0), math.exp(-1.25)])
    means = trained.mean_action(trained.obs)
    noise = (trained.actions - means)[WARM_UP:]
    assert noise.std(0) == pytest.approx(factor * std, rel=0.12)
    assert np.abs(noise.mean(0)).max() < 0.08
    correlations = np.corrcoef(np.hstack([noise[1:], noise[:-1]]).T)
    assert np.abs(correlations - np.eye(4)).max() < 0.2
    if trained.behaviour:
        kept_means, kept_variances = trained.behaviour
        np.testing.assert_array_equal(kept_means[:WARM_UP], trained.actions[:WARM_UP])
        assert (kept_variances[:WARM_UP] == math.inf).all()
        np.testing.assert_allclose(kept_means[WARM_UP:], means[WARM_UP:], atol=1e-5)
        expected = np.broadcast_to((factor * std) ** 2, (STEPS - WARM_UP, 2))
        np.testing.assert_allclose(kept_variances[WARM_UP:], expected, rtol=1e-5)
    logged = scalars(trained.run_dir)
    assert [logged[f"policy/std_{i}"][-1][1] for i in range(2)] == pytest.approx(std, rel=1e-6)


def test_ddpg_explores_with_ornstein_uhlenbeck_noise_anew_in_each_episode(monkeypatch):
    trained = Trained(ddpg_continuous, monkeypatch, ou_theta=0.3, ou_sigma=0.2)
    noise = (trained.actions - trained.mean_action(trained.obs))[WARM_UP:]
    first = np.isin(np.arange(STEPS - WARM_UP) % 12, [0, 5])
    before = np.vstack([np.zeros(2), noise[:-1]])
    before[first] = 0.0
    innovations = noise - 0.7 * before
    assert innovations.std(0) == pytest.approx(0.2, rel=0.12)
    assert np.abs(np.corrcoef(np.hstack([innovations, before]).T) - np.eye(4)).max() < 0.2


def test_returns_and_lengths_are_those_of_the_environment(trained):
    lengths = 6 * [5, 7]  # the returns, too; three to each of the four evaluations
    with open(trained.run_dir / "evaluations.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["episodic_return"]) for row in rows] == lengths
    assert [int(row["episodic_length"]) for row in rows] == lengths
    assert [int(row["global_step"]) for row in rows[::3]] == [0, 200, 400, 480]
    logged = scalars(trained.run_dir)
    means = [17 / 3, 19 / 3, 17 / 3, 19 / 3]
    expected = [(s, pytest.approx(m)) for s, m in zip([0, 200, 400, 480], means, strict=True)]
    assert logged["eval/episodic_return"] == logged["eval/episodic_length"] == expected
    ends = [step for step in range(1, STEPS + 1) if step % 12 in (5, 0)]
    episodes = list(zip(ends, STEPS // 12 * [5, 7], strict=True))
    assert logged["charts/episodic_return"] == logged["charts/episodic_length"] == episodes


def test_tensorboard_shows_the_flags(trained):
    events = EventAccumulator(str(trained.run_dir))
    events.Reload()
    (table,) = events.Tensors("hyperparameters/text_summary")
    rows = table.tensor_proto.string_val[0].decode().splitlines()
    assert f"|learning_starts|{WARM_UP}|" in rows
    assert len(rows) == 2 + len(dataclasses.fields(type(trained.agent.args)))


@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize("task", MUJOCO)
@pytest.mark.filterwarnings("ignore:.*is out of date")
def test_mujoco_gets_the_same_share_of_each_actuators_range(task, version):
    with contextlib.closing(smoothie_continuous.make_env(f"{task}-{version}")) as env:
        low, high = env.unwrapped.model.actuator_ctrlrange.T
        obs, _ = env.reset(seed=0)
        for action, expected in [(-3.0, low), (-0.5, 0.75 * low + 0.25 * high), (1.0, high)]:
            assert obs.dtype == np.float32 and obs.shape == env.observation_space.shape
            obs, *_ = env.step(np.full(len(low), action, np.float32))
            np.testing.assert_allclose(env.unwrapped.data.ctrl, expected, atol=1e-6)


@pytest.mark.parametrize("task", ["InPlace", "Arrays", "Dict"])
def test_tasks_that_are_unusual_but_correct(task):
    """One array and one info for all steps, which has an episode of its own; numbers as arrays of
    one element; observations in parts."""
    fake_envs.Recorder.instances.clear()
    run_dir = run(smoothie_continuous, env_id=f"{ENVS}:{task}-v0", total_timesteps=132)
    rows = torch.load(run_dir / "checkpoint.pt", weights_only=True)["rows"]
    training = fake_envs.Recorder.instances[0]
    np.testing.assert_allclose(rows[:, :3], compressed(training.seen), rtol=1e-6)
    assert (rows[:, :3] != rows[:, 6:9]).any(1).all()
    with open(run_dir / "evaluations.csv") as file:
        returns = [float(row["episodic_return"]) for row in csv.DictReader(file)]
    assert returns == [5, 7, 5, 7, 5, 7]


@pytest.mark.parametrize("task", ["Strict", "StrictDouble"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_actions_belong_to_the_action_space(task):
    """While exploring and while evaluating, by their type and by their bounds."""
    fake_envs.Recorder.instances.clear()
    flags = {"total_timesteps": 130, "log_var_init": 0.0}
    run(smoothie_continuous, env_id=f"{ENVS}:{task}-v0", **flags)
    assert [len(env.received) for env in fake_envs.Recorder.instances] == [130, 3 * (5 + 7)]


def test_a_seed_decides_everything(script):
    flags = {"total_timesteps": 200, "eval_frequency": 50}
    folders = [run(script, run_dir=f"run {i}", seed=s, **flags) for i, s in enumerate([1, 1, 2])]
    first, second, other = map(scalars, folders)
    assert first == second
    random = [key for key in first if key.startswith("losses/") or key.endswith("return")]
    assert all(first[key] != other[key] for key in random)


def test_evaluation_leaves_training_alone():
    """Evaluating more often must not change what is learned."""

    def losses(eval_frequency):
        flags = {"total_timesteps": 200, "eval_frequency": eval_frequency, "eval_episodes": 1}
        logged = scalars(run(smoothie_continuous, run_dir=str(eval_frequency), **flags))
        return {k: v for k, v in logged.items() if k.startswith(("losses/", "charts/"))}

    assert losses(30) == losses(1000)


def test_buffer_overwrites_the_oldest_and_samples_what_it_holds(script):
    buffer = script.ReplayBuffer(5, 2, 1, np.random.default_rng(0), "cpu")
    behaviour = [[0.5], [0.25]] if len(buffer.widths) == 7 else []
    for i in range(7):
        buffer.add([i, -i], [10 + i], 100 + i, [i + 1, i + 2], i % 2, *behaviour)
        held = set(range(max(0, i - 4), i + 1))
        assert {int(reward) - 100 for reward in buffer.sample(100)[2]} == held
    batch = buffer.sample(200)
    k = (batch[2] == 105).nonzero()[0]
    expected = [[5, -5], [15], [105], [6, 7], [1], *behaviour]
    assert [part[k].flatten().tolist() for part in batch] == expected


def test_buffer_claims_memory_only_as_it_fills():
    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    rng = np.random.default_rng(0)
    buffer = smoothie_continuous.ReplayBuffer(1_000_000, 376, 17, rng, "cpu")
    for _ in range(1000):
        row = [np.ones(376), np.ones(17), 1.0, np.ones(376), False, np.ones(17), np.ones(17)]
        buffer.add(*row)
    assert buffer.rows.nbytes > 3e9
    assert resident() - before < 50e6


def readme_table(heading):
    """Rows of the table below a heading of README, as lists of cells without backquotes."""
    section = Path(ROOT, "README.md").read_text().split(f"\n{heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines][
        2:
    ]


def test_logged_values_are_those_of_readme(script):
    """README's column says all, Smoothie (all but DDPG), or names scripts."""
    names = {script.__name__, "all"} | ({"Smoothie"} if script in SMOOTHIES else set())
    rows = readme_table("## Logged values")
    documented = {row[0] for row in rows if names & set(re.findall(r"\w+", row[1]))}
    logged = scalars(run(script))
    assert {re.sub(r"std_\d+", "std_i", key) for key in logged} | {"charts/SPS"} == documented
    assert all(math.isfinite(value) for series in logged.values() for _, value in series)


def test_a_copied_script_runs_on_a_module_in_the_current_folder(script):
    """Without the repository around it."""
    Path("copied").mkdir()
    Path("copied", "my_script.py").write_text(Path(script.__file__).read_text())
    Path("my_envs.py").write_text(Path(ROOT, "tests", "fake_envs.py").read_text())
    words = command(script, env_id="my_envs:ShortHopper-v4")
    words[1] = "copied/my_script.py"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(words, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert set(os.listdir()) - {"__pycache__"} == {"copied", "my_envs.py", "runs"}
    (run_dir,) = Path("runs").iterdir()
    assert re.fullmatch(r"ShortHopper-v4__my_script__1__\d+", run_dir.name)
    steps = re.findall(r"^step (\d+): eval return ", result.stdout, re.M)
    assert steps == ["0", "100", "200", "300"]


def test_readmes_snippet_uses_a_trained_policy(script):
    """README's lines for a policy that was trained, on the run of a short task."""
    text = Path(ROOT, "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(import torch\n.*?)```", text, re.S)
    run_dir = run(script)
    snippet = snippet.replace("smoothie_continuous", script.__name__)
    snippet = snippet.replace("policies/Walker2d-v4", str(run_dir))
    snippet = snippet.replace("Walker2d-v4", SHORT["env_id"])
    snippet = snippet.replace("seed=1)", "seed=1_000)")  # the first episode of each evaluation
    if script is ddpg_continuous:
        snippet = snippet.replace(", log_var_init=0.0", "").replace("mean, _ = ", "mean = ")
    names = {}
    exec(snippet, names)
    with open(run_dir / "evaluations.csv") as file:
        rows = list(csv.DictReader(file))
    (last,) = [row for row in rows if (row["global_step"], row["episode"]) == ("300", "0")]
    assert names["episode_return"] == float(last["episodic_return"])


def test_a_notebook_can_call_main(monkeypatch):
    """Twice in one process, without a handler of signals or a stream of a terminal."""
    monkeypatch.setattr(sys, "argv", ["ipykernel", "-f", "kernel.json"])
    for seed in (1, 2):
        args = smoothie_continuous.Args(**SHORT | {"seed": seed, "total_timesteps": 110})
        run_dir = smoothie_continuous.main(args)
        assert (run_dir / "policy.pt").exists()


# What public reports of similar programs complain about.


def test_environments_are_closed_however_the_run_ends(monkeypatch):
    """Else a thread of theirs keeps the process alive, and what close() writes is lost."""
    run(smoothie_continuous, env_id=f"{ENVS}:Owner-v0", total_timesteps=130)
    assert Path("log").read_text().splitlines() == ["36", "130"]
    monkeypatch.setattr(smoothie_continuous, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(smoothie_continuous, env_id=f"{ENVS}:Owner-v0")
    assert Path("log").read_text().splitlines() == ["36", "130", "0", "0"]


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("reset", "an observation"),
        ("observation", "an observation"),
        ("reward", "a reward"),
        ("overflow", "a reward"),
    ],
)
def test_the_environment_is_blamed_for_what_it_returns(where, what):
    with pytest.raises(SystemExit, match=f"^{what} of the environment is not finite$"):
        run(smoothie_continuous, env_id=f"{ENVS}:Broken-{where}-v0")
    (run_dir,) = Path("runs").iterdir()
    assert len(scalars(run_dir)["eval/episodic_return"]) == 3, "what was logged stays"


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_diverged_training_is_blamed_on_training(script, monkeypatch, what):
    """In a loss or in a weight; and the last good policy stays."""

    class Agent(agent_class(script)):
        def update_critics(self, *batch):
            if what == "loss":
                return {"losses/qf1_loss": torch.tensor(math.inf)}
            with torch.no_grad():
                self.actor.fc1.bias[7] = math.nan
            return {}

        def update_policy(self, *batch):
            return {}

    monkeypatch.setattr(script, agent_class(script).__name__, Agent)
    with pytest.raises(SystemExit, match="training has diverged"):
        run(script, eval_frequency=101)  # an evaluation meets the weight before anything else
    (run_dir,) = Path("runs").iterdir()
    policy = torch.load(run_dir / "policy.pt", weights_only=True)
    assert all(value.isfinite().all() for value in policy.values())


def test_packages_that_are_not_installed_are_not_needed(script, monkeypatch):
    """A task of one's own may need no MuJoCo."""
    found = [SimpleNamespace(name="numpy", version=version) for version in ("2", "1")]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    run_dir = run(script, env_id=f"{ENVS}:Recorder-v0", total_timesteps=110)
    versions = json.loads((run_dir / "config.json").read_text())["versions"]
    assert versions == {"torch": None, "gymnasium": None, "mujoco": None, "numpy": "2"}


def test_an_error_of_the_task_keeps_its_traceback():
    result = start(smoothie_continuous, env_id=f"{ENVS}:Faulty-v0")
    assert "Traceback" in result.stderr and "ValueError: my own mistake" in result.stderr


def test_an_evaluation_without_end_says_so(monkeypatch, capsys):
    monkeypatch.setattr(smoothie_continuous.Actor, "act", lambda *_: (np.zeros(2), np.ones(2)))
    env = smoothie_continuous.make_env(f"{ENVS}:Endless-v0")
    env.unwrapped.step = lambda action: (np.zeros(3), 1.0, False, False, {})
    args = smoothie_continuous.Args(eval_episodes=1)
    actor = smoothie_continuous.Actor(3, 2, 0.0)
    assert smoothie_continuous.evaluate(actor, env, args) == [(100_001.0, 100_001)]
    assert "max_episode_steps" in capsys.readouterr().err


@pytest.mark.parametrize("task", [task.__name__ for task in fake_envs.REFUSED])
def test_unsuitable_tasks_get_one_sentence(task):
    with pytest.raises(SystemExit, match=f"^--env-id {ENVS}:{task}-v0: needs a bounded 1-D Box"):
        run(smoothie_continuous, env_id=f"{ENVS}:{task}-v0")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"env_id": "NoSuchTask-v4"}, "--env-id NoSuchTask-v4: .*NoSuchTask"),
        ({"gamma": 1.5}, r"--gamma must lie in \[0, 1\]"),
        ({"gamma": math.nan}, r"--gamma must lie in \[0, 1\]"),
        ({"q_lr": math.nan}, "--q-lr must be a number"),
        ({"tau": 0.0}, r"--tau must lie in \(0, 1\]"),
        ({"seed": -1}, r"--seed must lie in \[0, 2\^31\)"),
        ({"batch_size": 200}, "--learning-starts is below --batch-size"),
        ({"buffer_size": 20}, "--buffer-size is below --batch-size"),
        ({"total_timesteps": 100}, "--total-timesteps is <= --learning-starts"),
        ({"policy_delay": 0}, "--policy-delay is below 1"),
        ({"capture_video": True}, "--capture-video: cannot film .* here: "),
    ],
)
def test_bad_input_gets_one_sentence(script, flags, sentence):
    flags = {"env_id": f"{ENVS}:Recorder-v0"} | flags
    with pytest.raises(SystemExit) as error:
        run(script, **flags)
    assert re.fullmatch(f"{sentence}.*", str(error.value)), error.value
    assert os.listdir() == [], "refused before anything is written"


@pytest.mark.parametrize("flags", [{"log_var_init": 0.1}, {"log_var_min": -3.0}])
def test_sigma_begins_within_its_bounds(smoothie, flags):
    with pytest.raises(SystemExit, match=r"^--log-var-init is not in \[--log-var-min, 0\]$"):
        run(smoothie, **flags)


@pytest.mark.parametrize("module", [smoothie_continuous, smoothie_no_kl])
def test_phantom_actions_refuse_a_behaviour_narrower_than_the_policy(module):
    with pytest.raises(SystemExit, match=r"^--exploration is below 1: "):
        run(module, exploration=0.9)
    assert os.listdir() == []


def test_a_critic_with_wrong_derivatives_stops_the_run(script, monkeypatch):
    """Wrong by 1% in the gradient."""
    name = {smoothie_closed_form: "smoothed", ddpg_continuous: "action_gradient"}
    name = name.get(script, "action_derivatives")
    right = getattr(script.QNetwork, name)

    def wrong(self, observations, actions, *log_var):
        found = right(self, observations, actions, *log_var)
        if script is ddpg_continuous:
            return 1.01 * found
        *value, gradient, hessian = found
        return *value, 1.01 * gradient, hessian

    monkeypatch.setattr(script.QNetwork, name, wrong)
    with pytest.raises(AssertionError, match="Change both together"):
        run(script)


def test_a_task_without_a_version_is_recorded_with_it():
    run_dir = run(smoothie_continuous, env_id="Pendulum", total_timesteps=110, eval_episodes=1)
    assert run_dir.name.startswith("Pendulum-v1__")
    assert json.loads((run_dir / "config.json").read_text())["task"] == "Pendulum-v1"


def test_videos_show_what_moves():
    import imageio.v3 as iio

    flags = {"env_id": f"{ENVS}:Filmed-v0", "total_timesteps": 130, "capture_video": True}
    run_dir = run(smoothie_continuous, **flags)
    names = sorted(os.listdir(run_dir / "videos"))
    assert names == ["step-0-episode-0.mp4", "step-100-episode-2.mp4", "step-130-episode-4.mp4"]
    for name in names:
        film = iio.imread(run_dir / "videos" / name).mean((1, 2, 3))
        np.testing.assert_allclose(film[:5], 30 * np.arange(5), atol=4)


def test_tracking_works_offline_under_any_name():
    """W&B refuses some characters in an id, so the run gets one of its own."""
    env = {"WANDB_MODE": "offline"}
    flags = {"track": True, "exp_name": "lr=0.1,tau=0.2/a", "total_timesteps": 220}
    result = start(smoothie_continuous, env, **flags)
    assert result.returncode == 0, result.stderr
    (run_dir,) = Path("runs").iterdir()
    assert run_dir.name.startswith("ShortHopper-v4__lr-0.1-tau-0.2-a__1__")
    run_id = json.loads((run_dir / "config.json").read_text())["run_id"]
    (offline,) = Path("wandb").glob("offline-run-*")
    assert offline.name.endswith(run_id)


def test_without_a_compiler_the_run_says_so_and_goes_on():
    """In a folder without the code that was compiled before."""
    flags = {"total_timesteps": 102, "eval_episodes": 1, "compile": True}
    env = {"PATH": "/nowhere", "CXX": "g++", "TORCHINDUCTOR_CACHE_DIR": os.path.abspath("cache")}
    result = start(smoothie_continuous, env, **flags)
    assert result.returncode == 0, result.stderr
    reason = r"\w+: InvalidCxxCompiler: No working C\+\+ compiler found .*"
    assert re.fullmatch(f"cannot compile, so updates will be slower: {reason}\n", result.stderr)
    assert "finished" in result.stdout


# The scripts as files.


def test_inline_metadata_is_requirements(script):
    """PEP 723, as uv run and pipx run read it: every package that the script imports."""
    source = Path(script.__file__).read_text()
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+)# ///$", source)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    lines = Path(ROOT, "requirements.txt").read_text().split("# only for")[0].splitlines()
    required = [line.split("#")[0].strip() for line in lines]
    assert metadata["dependencies"] == [line for line in required if line]
    assert metadata["requires-python"] == ">=3.11,<3.14"


def test_every_flag_has_a_help_text(script):
    source = inspect.getsource(script.Args)
    for name in vars(script.Args()):
        assert re.search(rf"(?m)^    {name}: .+ = .+  # \w.{{9,}}$", source), name


def test_help_shows_the_comments():
    words = [sys.executable, smoothie_continuous.__file__, "--help"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0 and "environment steps between two evaluations" in result.stdout


def test_importing_a_script_has_no_side_effects():
    names = ", ".join(script.__name__ for script in SCRIPTS)
    code = f"import sys; sys.path.insert(0, {ROOT!r}); before = sys.path[:]; import {names}; "
    words = [sys.executable, "-c", code + "assert sys.path == before"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr, os.listdir()) == (0, "", "", [])


def code_of(thing):
    return re.sub(r'"""(.|\n)*?"""', "", inspect.getsource(thing)).splitlines()


def test_same_shared_code():
    """What must not differ between the scripts does not, so that most tests can use one."""
    shared = ["finite", "make_env", "Adam", "compile_updates", "make_run_dir", "is_finished"]
    shared += ["start_run", "track", "make_eval_env", "record_evaluation", "save", "main"]
    shared += ["save_checkpoint", "load_checkpoint"]
    first = smoothie_continuous
    for name in shared:
        expected = code_of(getattr(first, name))
        assert all(code_of(getattr(module, name)) == expected for module in SCRIPTS), name
    for name in ("Actor", "evaluate", "log_losses"):
        expected = code_of(getattr(first, name))
        assert all(code_of(getattr(module, name)) == expected for module in SMOOTHIES), name
    for name in ("check", "QNetwork", "check_derivatives", "ReplayBuffer", "train"):
        assert code_of(getattr(smoothie_no_kl, name)) == code_of(getattr(first, name)), name
    without = [line for line in code_of(first.check) if "--exploration" not in line]
    assert code_of(smoothie_closed_form.check) == without
    without = [line for line in without if "--log-var" not in line]
    assert code_of(ddpg_continuous.check) == without
    buffers = [code_of(module.ReplayBuffer) for module in (smoothie_closed_form, ddpg_continuous)]
    assert buffers[0] == buffers[1]
    updates = [code_of(agent_class(module).update_targets) for module in SCRIPTS]
    assert all(update == updates[0] for update in updates)


ACTING = r"wider than|by the policy|mean = action|std = np.full|buffer.add"
DDPGS_OWN = r"noise|, std = |std \*= args|action = mean|Smoothie\(|DDPG\(|log_losses\("


@pytest.mark.parametrize(
    ("module", "own"),
    [(smoothie_closed_form, ACTING), (ddpg_continuous, f"{ACTING}|{DDPGS_OWN}")],
)
def test_same_loop(module, own):
    """train() differs in how the policy acts and what the buffer keeps, and in no other line."""
    lines = difflib.ndiff(code_of(smoothie_continuous.train), code_of(module.train))
    changed = [line for line in lines if line.startswith(("+", "-"))]
    assert changed and [line for line in changed if not re.search(own, line)] == []
