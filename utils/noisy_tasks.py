"""MuJoCo tasks whose actuators add Gaussian noise of 0.3 to each action.

    python ddpg_continuous.py --env-id utils.noisy_tasks:NoisyHopper-v4

The agent does not see the noise, so the Q-function of such a task is already smoothed. A
policy's return here is its return under noise of 0.3 in the original task.
"""

import gymnasium as gym
import numpy as np

STD = 0.3  # of the noise, where actions have the bounds -1 and 1


class NoisyActions(gym.ActionWrapper):
    def action(self, action):
        noisy = action + STD * self.np_random.standard_normal(len(action))
        return np.clip(noisy, -1.0, 1.0).astype(np.float32)


def make_noisy(task, **kwargs):
    return NoisyActions(gym.make(task, **kwargs))


for task in ["Hopper-v4", "Walker2d-v4", "HalfCheetah-v4"]:
    gym.register(f"Noisy{task}", make_noisy, kwargs={"task": task})
