"""What reaches the environment, what reaches the buffer, and how the policy explores and is evaluated."""

import csv
import math
import re

import numpy as np
import pytest
import torch

import ddpg_continuous
import smoothie_continuous
from tests.conftest import agent_class, run, scalars
from tests.fake_envs import InPlace, Recorder

WARM_UP, STEPS = 36, 480


class Trained:
    """A run on the recorder whose updates are counted and change nothing."""

    def __init__(self, script, folder, **flags):
        class Agent(agent_class(script)):
            def __init__(self, *args):
                super().__init__(*args)
                agents.append(self)
                self.batches = []
                with torch.no_grad():
                    self.actor.fc_mean.bias += 0.5  # another policy than the target's
                    if hasattr(self.actor, "log_var"):
                        self.actor.log_var -= torch.tensor([0.5, 1.0])  # and another than at the start

            def update(self, observations, batch):
                self.batches.append((observations, batch))
                return {}

        def mean_action(actor, obs):
            self.acted += 1
            return act(actor, obs)

        agents, self.acted, act = [], 0, script.Actor.mean_action
        Recorder.instances.clear()
        flags |= {"seed": 3, "env_id": "tests.fake_envs:Recorder-v0", "learning_starts": WARM_UP, "eval_episodes": 3}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, agent_class(script).__name__, Agent)
            patch.setattr(script.Actor, "mean_action", mean_action)
            self.run_dir = run(script, folder, total_timesteps=STEPS, eval_frequency=200, checkpoint_frequency=STEPS, **flags)
        self.agent, (self.training, self.evaluation) = agents[0].cpu(), Recorder.instances
        self.rows = np.fromfile(self.run_dir / "transitions.f32", np.float32).reshape(STEPS, 3 + 2 + 1 + 3 + 1)
        self.obs, self.actions, self.rewards, self.next_obs, self.terminated = np.split(self.rows, [3, 5, 6, 9], 1)

    def mean_action(self, obs):
        with torch.no_grad():
            return self.agent.actor(torch.tensor(np.array(obs), dtype=torch.float32)).numpy()


@pytest.fixture(scope="session")
def trained(script, tmp_path_factory):
    wide = {"ou_sigma": 1.0} if script is ddpg_continuous else {"log_var_init": 0.0}
    return Trained(script, tmp_path_factory.mktemp(script.__name__), **wide)


def test_actions_are_clipped_per_dimension_only_on_their_way_out(trained):
    low, high = Recorder.action_space.low, Recorder.action_space.high
    received = np.array(trained.training.received)
    assert (np.abs(trained.actions[WARM_UP:]) > 1).any(), "the buffer keeps samples from beyond the bounds"
    assert np.isclose(received.max(0), high).all() and np.isclose(received.min(0), low).all(), "both bounds are reached"
    expected = (high + low) / 2 + (high - low) / 2 * np.clip(trained.actions, -1, 1)
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)


def test_the_buffer_holds_what_the_environment_gave(trained):
    np.testing.assert_array_equal(trained.obs, np.float32(trained.training.seen))
    assert (trained.rewards == 1).all(), "rewards are scaled in the update, not before"
    period = np.array([0, 0, 0, 0, 1] + 7 * [0])  # a termination after 5 steps, then an episode that the time limit ends
    np.testing.assert_array_equal(trained.terminated[:, 0], np.tile(period, STEPS // 12))
    # the observation after an episode's last step is not the first one of the next episode
    ends = np.isin(np.arange(STEPS) % 12, [4, 11])
    np.testing.assert_array_equal((trained.next_obs[:-1] == trained.obs[1:]).all(1), ~ends[:-1])


def test_an_observation_changed_in_place(tmp_path):
    InPlace.instances.clear()
    run_dir = run(smoothie_continuous, env_id="tests.fake_envs:InPlace-v0", checkpoint_frequency=300)
    rows = np.fromfile(run_dir / "transitions.f32", np.float32).reshape(300, -1)
    assert (rows[:, :3] != rows[:, 6:9]).any(1).all()
    np.testing.assert_array_equal(rows[:, :3], np.float32(InPlace.instances[0].seen))


def test_dict_observations_are_flattened(tmp_path):
    Recorder.instances.clear()
    run_dir = run(smoothie_continuous, env_id="tests.fake_envs:Dict-v0", total_timesteps=130, checkpoint_frequency=130)
    rows = np.fromfile(run_dir / "transitions.f32", np.float32).reshape(130, -1)
    np.testing.assert_array_equal(rows[:, :3], np.float32(Recorder.instances[0].seen))


@pytest.mark.parametrize("kind", ["Strict", "StrictDouble"])
@pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, about bounds in another precision than the action space's
def test_actions_belong_to_the_action_space(kind):
    """While exploring and while evaluating, by their type and by their bounds."""
    flags = {"total_timesteps": 130, "log_var_init": 0.0}
    Recorder.instances.clear()
    run(smoothie_continuous, env_id=f"tests.fake_envs:{kind}-v0", **flags)
    assert [len(env.received) for env in Recorder.instances] == [130, 3 * (5 + 7)]


def test_warm_up_is_uniform_and_as_long_as_it_says(trained):
    warm_up = trained.actions[:WARM_UP]
    assert (np.abs(warm_up) <= 1).all() and (warm_up.min(0) < -0.8).all() and (warm_up.max(0) > 0.8).all()
    assert abs(np.corrcoef(warm_up.T)[0, 1]) < 0.5
    assert trained.acted == STEPS - WARM_UP + len(trained.evaluation.seen), "from then on the policy acts"
    assert len(trained.agent.batches) == STEPS - WARM_UP, "and learns at each step"


def test_policy_and_critic_learn_from_batches_of_their_own(trained):
    rows = {tuple(row) for row in trained.rows.tolist()}
    for observations, batch in trained.agent.batches:
        assert not torch.equal(observations, batch[0])
    for observations, batch in trained.agent.batches[:3]:
        assert {tuple(row) for row in observations.tolist()} <= {row[:3] for row in rows}
        obs, actions, rewards, next_obs, terminated = batch
        together = torch.cat([obs, actions, rewards.unsqueeze(1), next_obs, terminated.unsqueeze(1)], 1)
        assert {tuple(row) for row in together.tolist()} <= rows


def test_smoothie_explores_with_independent_noise_of_standard_deviation_e_to_half_phi(smoothie, tmp_path):
    """Mean and phi are those of the actor now, not of its target or of the start."""
    trained = Trained(smoothie, tmp_path, log_var_init=-1.5)
    noise = (trained.actions - trained.mean_action(trained.obs))[WARM_UP:]
    std = [math.exp(-1.0), math.exp(-1.25)]
    assert noise.std(0) == pytest.approx(std, rel=0.12)
    logged = scalars(trained.run_dir)
    assert [logged[f"policy/std_{i}"][-1][1] for i in range(2)] == pytest.approx(std, rel=1e-6)
    assert np.abs(noise.mean(0)).max() < 0.06
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.2
    for i in range(2):
        assert abs(np.corrcoef(noise[1:, i], noise[:-1, i])[0, 1]) < 0.2


def test_ddpg_explores_with_ornstein_uhlenbeck_noise_that_starts_anew_with_each_episode(tmp_path):
    trained = Trained(ddpg_continuous, tmp_path, ou_theta=0.15, ou_sigma=0.2)
    noise = (trained.actions - trained.mean_action(trained.obs))[WARM_UP:]
    first = np.isin(np.arange(WARM_UP, STEPS) % 12, [0, 5])
    before = np.where(first[1:, None], 0.0, noise[:-1])
    innovations = noise[1:] - 0.85 * before
    assert innovations.std(0) == pytest.approx(0.2, rel=0.12)
    assert innovations[first[1:]].std() == pytest.approx(0.2, rel=0.25)
    assert abs(np.corrcoef(innovations.T)[0, 1]) < 0.2
    within = ~first[1:]
    for i in range(2):
        assert abs(np.corrcoef(innovations[within, i], before[within, i])[0, 1]) < 0.2


def test_evaluation_runs_the_mean_action_on_seeds_of_its_own(trained):
    low, high = Recorder.action_space.low, Recorder.action_space.high
    expected = (high + low) / 2 + (high - low) / 2 * trained.mean_action(trained.evaluation.seen)
    np.testing.assert_allclose(trained.evaluation.received, expected, rtol=0, atol=1e-6)
    seeds = trained.evaluation.seeds
    assert seeds[:3] == [10_003, 10_004, 10_005], "each episode differs, and the next seed's run shares all but one"
    assert seeds == 4 * seeds[:3], "each evaluation plays the same episodes"
    assert not set(seeds) & set(trained.training.seeds)
    assert len(set(trained.training.seeds)) == len(trained.training.seeds) == 1 + STEPS // 6


def test_returns_and_lengths_are_those_of_the_environment(trained):
    episodes = [5, 7, 5, 7, 5, 7, 5, 7, 5, 7, 5, 7]  # their returns, too; three to each of the four evaluations
    with open(trained.run_dir / "evaluations.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["episodic_return"]) for row in rows] == [int(row["episodic_length"]) for row in rows] == episodes
    logged = scalars(trained.run_dir)
    means = [(step, pytest.approx(mean)) for step, mean in [(0, 17 / 3), (200, 19 / 3), (400, 17 / 3), (480, 19 / 3)]]
    assert logged["eval/episodic_return"] == logged["eval/episodic_length"] == means
    ends = [step for step in range(1, STEPS + 1) if step % 12 in (5, 0)]
    episodes = list(zip(ends, STEPS // 12 * [5, 7], strict=True))
    assert logged["charts/episodic_return"] == logged["charts/episodic_length"] == episodes


def test_buffer_overwrites_the_oldest_and_samples_what_it_holds():
    buffer = smoothie_continuous.ReplayBuffer(5, 2, 1, np.random.default_rng(0))
    for i in range(3):
        buffer.add([i, i], [i], i + 1, [i, i], False)
    assert set(buffer.sample(100)[2].tolist()) == {1, 2, 3}
    for i in range(3, 7):
        buffer.add([i, -i], [10 + i], 100 + i, [i + 1, i + 2], i % 2)
    obs, actions, rewards, next_obs, terminated = buffer.sample(200)
    assert set(rewards.tolist()) == {3, 103, 104, 105, 106}
    k = (rewards == 105).nonzero()[0]
    assert [x[k].flatten().tolist() for x in (obs, actions, next_obs, terminated)] == [[5, -5], [15], [6, 7], [1]]
    assert [x.shape for x in (obs, actions, rewards, next_obs, terminated)] == [(200, 2), (200, 1), (200,), (200, 2), (200,)]


def test_buffer_finds_its_last_rows_and_their_place_in_the_file():
    """Row i is at byte i times the row size, however often the buffer has wrapped around."""
    buffer = smoothie_continuous.ReplayBuffer(5, 2, 1, np.random.default_rng(0))
    with open("rows", "w+b") as file:
        for i in range(13):
            buffer.add([i, i], [i], i, [i, i], False)
            n = min(1 + i % 5, buffer.count)
            views = buffer.last(n, file)
            assert np.concatenate(views)[:, 0].tolist() == list(range(i + 1 - n, i + 1))
            assert file.tell() == (i + 1 - n) * 4 * 7
        assert sum(len(view) for view in buffer.last(0, file)) == 0


def test_buffer_claims_memory_only_as_it_fills():
    def resident():
        with open("/proc/self/status") as file:
            return int(re.search(r"VmRSS:\s*(\d+)", file.read())[1]) * 1024

    before = resident()
    buffer = smoothie_continuous.ReplayBuffer(1_000_000, 376, 17, np.random.default_rng(0))
    for _ in range(1000):
        buffer.add(np.ones(376), np.ones(17), 1.0, np.ones(376), False)
    assert buffer.rows.nbytes > 3e9
    assert resident() - before < 50e6
