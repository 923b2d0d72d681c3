"""Small environments for the tests, registered for `--env-id tests.fake_envs:NAME`."""

import threading

import gymnasium as gym
import numpy as np


class Recorder(gym.Env):
    """Remembers its seeds and, for each step, the observation before it and the action.

    Each reward is 1. Episodes end in turn by a termination (5 steps) and by the time limit (7).
    The last of the three observations is often beyond 10.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(np.float32([-3.0, 0.0]), np.float32([1.0, 0.4]))
    instances = []  # noqa: RUF012  (shared on purpose: gym.make hides the instance in wrappers)

    def __init__(self):
        self.episode = -1
        self.seeds = []
        self.seen = []
        self.received = []
        self.instances.append(self)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.episode += 1
        self.step_in_episode = 0
        self.obs = self.np_random.standard_normal(3) * [1.0, 1.0, 20.0]
        return self.obs, {}

    def step(self, action):
        self.seen.append(self.obs.copy())
        self.received.append(np.array(action))
        self.obs = self.np_random.standard_normal(3) * [1.0, 1.0, 20.0]
        self.step_in_episode += 1
        terminated = self.episode % 2 == 0 and self.step_in_episode == 5
        return self.obs, 1.0, terminated, False, {}


class InPlace(Recorder):
    """Returns one array and one info over and over, changed in place; info has an episode."""

    def __init__(self):
        super().__init__()
        self.array = np.zeros(3, np.float32)
        self.info = {"episode": {"r": -1.0, "l": 99}}

    def reset(self, seed=None, options=None):
        self.array[:], _ = super().reset(seed=seed)
        return self.array, self.info

    def step(self, action):
        self.array[:], reward, terminated, truncated, _ = super().step(action)
        return self.array, reward, terminated, truncated, self.info


class Arrays(Recorder):
    """Gives its reward and its terminations as arrays of one element."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, np.array([reward]), np.array([terminated]), np.array([truncated]), info


class Strict(Recorder):
    """Accepts the actions that its action space contains, and no others."""

    action_space = gym.spaces.Box(np.float32([-0.1, -0.3, -7.7]), np.float32([0.7, 0.1, 1.3]))

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return super().step(action)


class StrictDouble(Strict):
    action_space = gym.spaces.Box(np.array([-3.0, 0.1]), np.array([1.7, 0.4]), dtype=np.float64)


class Dict(Recorder):
    """Shows the recorder's observation in two parts."""

    observation_space = gym.spaces.Dict(
        {"angle": gym.spaces.Box(-9.0, 9.0, (1,)), "place": gym.spaces.Box(-9.0, 9.0, (2,))}
    )

    def in_parts(self, obs):
        return {"angle": np.float32(obs[:1]), "place": np.float32(obs[1:])}

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return self.in_parts(obs), info

    def step(self, action):
        obs, *rest = super().step(action)
        return self.in_parts(obs), *rest


class Broken(Recorder):
    """Gives a value that is not finite as float32: `where` it is told, `after` so many steps."""

    def __init__(self, where, value, after=250):
        super().__init__()
        self.where = where
        self.value = value
        self.after = after

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        if self.where == "reset" and len(self.seen) > self.after:
            obs[1] = self.value
        return obs, info

    def step(self, action):
        obs, reward, *rest = super().step(action)
        if len(self.seen) > self.after and self.where == "observation":
            obs[1] = self.value
        if len(self.seen) > self.after and self.where == "reward":
            reward = self.value
        return obs, reward, *rest


class Owner(Recorder):
    """Has a thread, which keeps the process alive until close(), and a log, written in close()."""

    def __init__(self):
        super().__init__()
        self.closed = threading.Event()
        threading.Thread(target=self.closed.wait).start()

    def close(self):
        self.closed.set()
        with open("log", "a") as file:
            file.write(f"{len(self.seen)}\n")


class Faulty(Recorder):
    def __init__(self):
        raise ValueError("my own mistake")


class Discrete(Recorder):
    action_space = gym.spaces.Discrete(3)


class Unbounded(Recorder):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Overflowing(Recorder):
    action_space = gym.spaces.Box(-3e38, 3e38, (2,), np.float32)


class Square(Recorder):
    action_space = gym.spaces.Box(-1.0, 1.0, (2, 2), np.float32)


class Integers(Recorder):
    action_space = gym.spaces.Box(-2, 2, (2,), np.int32)


class Sequence(Recorder):
    observation_space = gym.spaces.Sequence(gym.spaces.Box(-9.0, 9.0, (3,)))


class Filmed(Recorder):
    """Can be filmed: each step has a brightness of its own."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 48, 3), 30 * self.step_in_episode, np.uint8)


TASKS = (Recorder, InPlace, Arrays, Strict, StrictDouble, Dict, Owner, Faulty, Filmed)
REFUSED = (Discrete, Unbounded, Overflowing, Square, Integers, Sequence)
for task in TASKS + REFUSED:
    gym.register(f"{task.__name__}-v0", entry_point=task, max_episode_steps=7)
for where, value in [("reset", np.nan), ("observation", np.nan), ("reward", np.inf)]:
    kwargs = {"where": where, "value": value}
    gym.register(f"Broken-{where}-v0", entry_point=Broken, max_episode_steps=7, kwargs=kwargs)
kwargs = {"where": "reward", "value": 1e39}
gym.register("Broken-overflow-v0", entry_point=Broken, max_episode_steps=7, kwargs=kwargs)
gym.register("Endless-v0", entry_point=Recorder, max_episode_steps=100_001)
# a real task, with a time limit that a short run reaches
HOPPER = "gymnasium.envs.mujoco.hopper_v4:HopperEnv"
gym.register("ShortHopper-v4", entry_point=HOPPER, max_episode_steps=10)
