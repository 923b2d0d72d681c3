"""Small environments for the tests, registered for `--env-id tests.fake_envs:NAME`."""

import gymnasium as gym
import numpy as np


class Recorder(gym.Env):
    """Remembers the actions it receives. The episodes end in turn by a termination (5 steps) and by the time limit (7)."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(np.float32([-3.0, 0.0]), np.float32([1.0, 0.4]))
    received = []  # noqa: RUF012  (shared on purpose: gym.make hides the instance behind wrappers)

    def __init__(self, nan_after=None):
        self.episode, self.count, self.nan_after = -1, 0, nan_after

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        return self.np_random.standard_normal(3), {}

    def step(self, action):
        self.received.append(np.array(action))
        self.step_in_episode += 1
        self.count += 1
        reward = np.nan if self.nan_after and self.count > self.nan_after else 1.0
        terminated = self.episode % 2 == 0 and self.step_in_episode == 5
        return self.np_random.standard_normal(3), reward, terminated, False, {}


class Discrete(Recorder):
    action_space = gym.spaces.Discrete(3)


class Unbounded(Recorder):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Dict(Recorder):
    observation_space = gym.spaces.Dict({"position": Recorder.observation_space})


class Integers(gym.Env):
    """A 2x3 picture of integers, each step another."""

    observation_space = gym.spaces.Box(0, 255, (2, 3), np.uint8)
    action_space = Recorder.action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.low + self.np_random.integers(256, size=(2, 3), dtype=np.uint8), {}

    def step(self, action):
        return self.np_random.integers(256, size=(2, 3), dtype=np.uint8), float(action.sum()), False, False, {}


class Forgetful(Integers):
    """Its randomness is its own, so that a seed does not decide it."""

    def step(self, action):
        return np.random.default_rng().integers(256, size=(2, 3), dtype=np.uint8), 0.0, False, False, {}


gym.register("Integers-v0", entry_point=Integers, max_episode_steps=40)
gym.register("Forgetful-v0", entry_point=Forgetful, max_episode_steps=40)
gym.register("Recorder-v0", entry_point=Recorder, max_episode_steps=7)
gym.register("NaNReward-v0", entry_point=Recorder, max_episode_steps=7, kwargs={"nan_after": 250})
gym.register("Discrete-v0", entry_point=Discrete)
gym.register("Unbounded-v0", entry_point=Unbounded)
gym.register("Dict-v0", entry_point=Dict)
# the real tasks with a time limit that a short run reaches
gym.register("ShortHopper-v4", entry_point="gymnasium.envs.mujoco.hopper_v4:HopperEnv", max_episode_steps=10)
gym.register("ShortHumanoid-v4", entry_point="gymnasium.envs.mujoco.humanoid_v4:HumanoidEnv", max_episode_steps=10)
