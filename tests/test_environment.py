"""What reaches the environment, what reaches the buffer, and what the critic bootstraps from."""

import numpy as np
import pytest
import torch

from tests.fake_envs import Recorder


@pytest.fixture
def trained(script, monkeypatch):
    """Train on the recording environment with wide exploration; return the buffer and the actions the environment saw."""
    buffers, make_buffer = [], script.make_buffer
    monkeypatch.setattr(script, "make_buffer", lambda *args: buffers.append(make_buffer(*args)) or buffers[-1])
    Recorder.received.clear()
    wide = {"ou_sigma": 1.0} if script.__name__ == "ddpg_continuous" else {"log_var_init": 0.0}
    script.train(
        script.Args(
            env_id="tests.fake_envs:Recorder-v0",
            total_timesteps=120,
            learning_starts=20,
            batch_size=8,
            eval_frequency=1000,
            eval_episodes=1,
            **wide,
        )
    )
    return buffers[0], np.array(Recorder.received)


def test_actions_are_clipped_per_dimension_only_on_their_way_out(trained):
    buffer, received = trained
    rows = torch.from_numpy(buffer.rows[:120])
    actions = rows.split(buffer.widths, 1)[1].numpy()
    assert (np.abs(actions[20:]) > 1).any(), "the buffer must keep samples from beyond the bounds"
    low, high = Recorder.action_space.low, Recorder.action_space.high
    assert (received >= low).all() and (received <= high + 1e-6).all()
    assert np.isclose(received.max(0), high).all() and np.isclose(received.min(0), low).all(), "both bounds are reached"
    # 5 steps of the first evaluation, up to its termination; 120 of training; 7 of the last evaluation, up to its time limit
    assert len(received) == 5 + 120 + 7
    expected = (high + low) / 2 + (high - low) / 2 * np.clip(actions, -1, 1)
    np.testing.assert_allclose(received[5:125], expected, atol=1e-6)


def test_time_limits_are_not_terminations_in_the_buffer(trained):
    buffer, _ = trained
    terminated = buffer.rows[:120, -1]
    period = np.array([0, 0, 0, 0, 1] + 7 * [0])  # a termination after 5 steps, then an episode that the time limit ends
    np.testing.assert_array_equal(terminated, np.tile(period, 10))


def test_next_observation_of_the_last_step_is_not_the_next_episodes_first(trained):
    buffer, _ = trained
    obs, _, _, next_obs, _ = (part.numpy() for part in torch.from_numpy(buffer.rows[:120]).split(buffer.widths, 1))
    ends = np.isin(np.arange(120) % 12, [4, 11])
    same = (next_obs[:-1] == obs[1:]).all(1)
    np.testing.assert_array_equal(same, ~ends[:-1])


def test_buffer_overwrites_the_oldest_and_samples_what_it_holds(script):
    buffer = script.ReplayBuffer(5, 2, 1, np.random.default_rng(0))
    for i in range(3):
        buffer.add([i, i], [i], i, [i, i], False)
    assert set(buffer.sample(100)[2].tolist()) == {0, 1, 2}
    for i in range(3, 7):
        buffer.add([i, -i], [10 + i], 100 + i, [i + 1, i + 2], i % 2)
    obs, actions, rewards, next_obs, terminated = buffer.sample(200)
    assert set(rewards.tolist()) == {2, 103, 104, 105, 106}
    k = (rewards == 105).nonzero()[0]
    assert [x[k].flatten().tolist() for x in (obs, actions, next_obs, terminated)] == [[5, -5], [15], [6, 7], [1]]
    assert [x.shape for x in (obs, actions, rewards, next_obs, terminated)] == [(200, 2), (200, 1), (200,), (200, 2), (200,)]


def test_buffer_claims_memory_only_as_it_fills(script):
    def resident():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024

    before = resident()
    buffer = script.ReplayBuffer(1_000_000, 376, 17, np.random.default_rng(0))
    for _ in range(1000):
        buffer.add(np.ones(376), np.ones(17), 1.0, np.ones(376), False)
    assert buffer.rows.nbytes > 3e9
    assert resident() - before < 50e6


def test_ornstein_uhlenbeck_has_its_stationary_moments():
    import ddpg_continuous

    noise = ddpg_continuous.OrnsteinUhlenbeck(2000, 0.15, 0.2, np.random.default_rng(0))
    for _ in range(60):
        x = noise.sample().copy()
    y = noise.sample()
    variance = 0.2**2 / (1 - 0.85**2)
    assert np.var(x) == pytest.approx(variance, rel=0.1)
    assert np.mean(x * y) == pytest.approx(0.85 * variance, rel=0.1)
    noise.reset()
    assert not noise.state.any()
