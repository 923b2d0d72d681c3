"""Small environments for the tests, registered for `--env-id tests.fake_envs:NAME`."""

import os
import time

import gymnasium as gym
import numpy as np


class Recorder(gym.Env):
    """Remembers its seeds and, for each step, the observation before it and the action.

    Each reward is 1. The episodes end in turn by a termination (5 steps) and by the time limit (7), if `in_turn`.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(np.float32([-3.0, 0.0]), np.float32([1.0, 0.4]))
    instances = []  # noqa: RUF012  (shared on purpose: gym.make hides the instance behind wrappers)
    in_turn = True

    def __init__(self, nan_after=None, nan_in="reward"):
        self.episode, self.count, self.nan_after, self.nan_in = -1, 0, nan_after, nan_in
        self.seeds, self.seen, self.received = [], [], []
        self.instances.append(self)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        self.obs = self.np_random.standard_normal(3)
        return self.obs, {}

    def step(self, action):
        self.seen.append(self.obs.copy())
        self.received.append(np.array(action))
        self.obs = self.np_random.standard_normal(3)
        self.step_in_episode += 1
        self.count += 1
        broken = self.nan_after is not None and self.count > self.nan_after
        if broken and self.nan_in == "observation":
            self.obs[1] = np.nan
        reward = np.nan if broken and self.nan_in == "reward" else 1.0
        terminated = self.in_turn and self.episode % 2 == 0 and self.step_in_episode == 5
        return self.obs, reward, terminated, False, {}


class InPlace(Recorder):
    """Returns one array over and over, changed in place."""

    in_turn = False

    def step(self, action):
        array = self.obs
        _, *rest = super().step(action)
        array[:], self.obs = self.obs, array
        return array, *rest


class Strict(Recorder):
    """Accepts the actions that its action space contains, and no others."""

    action_space = gym.spaces.Box(np.float32([-0.1, -0.3, -7.7]), np.float32([0.7, 0.1, 1.3]))

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return super().step(action)


class StrictDouble(Strict):
    action_space = gym.spaces.Box(np.array([-3.0, 0.1]), np.array([1.7, 0.4]), dtype=np.float64)


class Filmed(Recorder):
    """Can be filmed, but does not say how many frames make a second."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 48, 3), 40 * self.step_in_episode, np.uint8)


class Discrete(Recorder):
    action_space = gym.spaces.Discrete(3)


class Unbounded(Recorder):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Square(Recorder):
    """Actions are a matrix, which the scripts refuse."""

    action_space = gym.spaces.Box(-1.0, 1.0, (2, 2), np.float32)


class Scalar(Recorder):
    action_space = gym.spaces.Box(-1.0, 1.0, (), np.float32)


class IntegerActions(Recorder):
    action_space = gym.spaces.Box(0, 3, (2,), np.int64)


class FixedAction(Recorder):
    action_space = gym.spaces.Box(np.float32([-1.0, 0.5]), np.float32([1.0, 0.5]))


class Sequence(Recorder):
    observation_space = gym.spaces.Sequence(gym.spaces.Box(-9.0, 9.0, (3,)))


class Dict(Recorder):
    """Shows the recorder's observation in two parts."""

    in_turn = False
    observation_space = gym.spaces.Dict({"angle": gym.spaces.Box(-9.0, 9.0, (1,)), "place": gym.spaces.Box(-9.0, 9.0, (2,))})

    def in_parts(self, obs):
        return {"angle": np.float32(obs[:1]), "place": np.float32(obs[1:])}

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed)
        return self.in_parts(obs), info

    def step(self, action):
        obs, *rest = super().step(action)
        return self.in_parts(obs), *rest


class RandomState(Recorder):
    """Its generator is NumPy's legacy one, as that of dm_control through shimmy."""

    in_turn = False
    np_random = np.random.RandomState(0)

    def reset(self, seed=None, options=None):
        self.np_random = np.random.RandomState(seed)
        self.seeds.append(seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        self.obs = self.np_random.standard_normal(3)
        return self.obs, {}


class Integers(gym.Env):
    """A 2x3 picture of integers, each step another. It depends on all actions of the episode."""

    observation_space = gym.spaces.Box(0, 255, (2, 3), np.uint8)
    action_space = Recorder.action_space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.sum = 0.0
        return self.np_random.integers(256, size=(2, 3), dtype=np.uint8), {}

    def step(self, action):
        self.sum += float(action.sum())
        picture = self.np_random.integers(256, size=(2, 3)) + int(1000 * self.sum)
        return np.uint8(picture % 256), float(action.sum()), False, False, {}


class Forgetful(Integers):
    """Its randomness is its own, so that a seed does not decide it."""

    def step(self, action):
        return np.random.default_rng().integers(256, size=(2, 3), dtype=np.uint8), 0.0, False, False, {}


class Alarm(Integers):
    """Sends its own process signals when the training (0) or the evaluation environment (1) takes a given step."""

    made, alarm = 0, None

    @classmethod
    def set(cls, instance, step, *numbers):
        cls.made, cls.alarm = 0, (instance, step, numbers)

    def __init__(self):
        self.instance, self.count = Alarm.made, 0
        Alarm.made += 1

    def step(self, action):
        self.count += 1
        if self.alarm and self.alarm[:2] == (self.instance, self.count):
            for number in self.alarm[2]:
                os.kill(os.getpid(), number)
        return super().step(action)


class Stuck(Integers):
    """Its first step takes forever."""

    def step(self, action):
        print("stuck", flush=True)
        while True:
            time.sleep(1)


gym.register("Integers-v0", entry_point=Integers, max_episode_steps=40)
gym.register("Endless-v0", entry_point=Integers)
gym.register("Forgetful-v0", entry_point=Forgetful, max_episode_steps=40)
gym.register("Alarm-v0", entry_point=Alarm, max_episode_steps=40)
gym.register("Stuck-v0", entry_point=Stuck)
gym.register("Recorder-v0", entry_point=Recorder, max_episode_steps=7)
for kind in (InPlace, Strict, StrictDouble, Filmed, Dict, RandomState):
    gym.register(f"{kind.__name__}-v0", entry_point=kind, max_episode_steps=7)
for kind in (Sequence, Discrete, Unbounded, Square, Scalar, IntegerActions, FixedAction):  # which the scripts refuse
    gym.register(f"{kind.__name__}-v0", entry_point=kind, max_episode_steps=7)
gym.register("NaNReward-v0", entry_point=Recorder, max_episode_steps=7, kwargs={"nan_after": 250})
gym.register("NaNObservation-v0", entry_point=Recorder, max_episode_steps=7, kwargs={"nan_after": 250, "nan_in": "observation"})
# the real tasks with a time limit that a short run reaches, and one that a film can show
gym.register("ShortHopper-v4", entry_point="gymnasium.envs.mujoco.hopper_v4:HopperEnv", max_episode_steps=10)
gym.register("FilmedHopper-v4", entry_point="gymnasium.envs.mujoco.hopper_v4:HopperEnv", max_episode_steps=30)
gym.register("ShortHumanoid-v4", entry_point="gymnasium.envs.mujoco.humanoid_v4:HumanoidEnv", max_episode_steps=10)


class Slow(Integers):
    """Takes 20 ms for each step, so that a short run lasts a while."""

    def step(self, action):
        time.sleep(0.02)
        return super().step(action)


gym.register("Slow-v0", entry_point=Slow, max_episode_steps=10)
