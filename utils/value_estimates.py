"""Print a Markdown table of what the critics of runs expect, what their policies get, and how often the policies saturate.

    python utils/value_estimates.py benchmark_runs/runs/Hopper-v4__*

A run needs a checkpoint (--checkpoint-frequency), as those of benchmark.sh have. Its policy acts for ten episodes from the
starts of the run's evaluations: with noise for Smoothie, without for DDPG, as each critic assumes. `expected` is the
first critic's value of the policy, `actual` the discounted sum of the rewards that follow, in units of rewards; both are means
over all states. At a time limit the critic's own value stands for the rewards to come, which brings the two closer. `saturated`
is the share of the mean's components beyond 0.97 in absolute value, where the slope of the tanh is below 0.06.
"""

import importlib
import json
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import tyro
from evaluations import LABELS

EPISODES = 10
SATURATED = 0.97
HEADER = "| task | script | seed | steps | return | expected | actual | saturated |\n|---|---|---|---|---|---|---|---|"


@dataclass
class Args:
    run_dirs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN_DIR ...")]
    """run folders"""


def load(run_dir):
    """Return the flags of a run, its environment, its agent and the step of its checkpoint, or exit with an error message."""
    try:
        with open(os.path.join(run_dir, "config.json")) as file:
            config = json.load(file)
        script, _ = importlib.import_module(config.pop("script").removesuffix(".py")), config.pop("provenance")
        warnings.filterwarnings("ignore", message=".*is out of date")  # gymnasium, imported just now, sets filters of its own
        args = script.Args(**config)
        env = script.make_env(args.env_id)
        agent_class = script.DDPG if hasattr(script, "DDPG") else script.Smoothie
        agent = agent_class(env.observation_space.shape[0], env.action_space.shape[0], args)
        state = torch.load(os.path.join(run_dir, "checkpoint.pt"), "cpu", weights_only=True)
        agent.load_state_dict(state["agent"])
    except Exception as error:  # a damaged file can raise anything
        sys.exit(f"{run_dir}: config.json or checkpoint.pt is missing, damaged or of another version ({type(error).__name__})")
    return args, env, agent, state["step"]


@torch.no_grad()
def compare(args, env, agent, episodes=EPISODES):
    """Return the undiscounted return of each episode (episodes,), and the expected value, the actual value and the share of
    saturated components of the mean in each state (states,)."""
    rng, returns, expected, actual, saturated = np.random.default_rng(args.seed), [], [], [], []
    std = agent.actor.log_var.mul(0.5).exp().numpy() if hasattr(agent.actor, "log_var") else 0.0

    def mean_and_value(obs):
        s = torch.as_tensor(obs, dtype=torch.float32)[None]
        mean = agent.actor(s)
        smoothed = hasattr(agent.qfs[0], "smoothed")  # the closed form's critic is Q, the others give the policy's value
        value = agent.qfs[0].smoothed(s, mean, agent.actor.log_var)[0] if smoothed else agent.qfs[0](s, mean)
        return mean[0].numpy(), value.item() / args.reward_scale

    for episode in range(episodes):
        (obs, _), rewards, info = env.reset(seed=10_000 + args.seed + episode), [], {}
        while "episode" not in info:
            mean, value = mean_and_value(obs)
            obs, reward, terminated, _, info = env.step(mean + std * rng.standard_normal(len(mean), np.float32))
            expected.append(value)
            saturated.append(np.mean(np.abs(mean) > SATURATED))
            rewards.append(reward)
        value, values = 0.0 if terminated else mean_and_value(obs)[1], []
        for reward in reversed(rewards):
            values.append(value := reward + args.gamma * value)
        actual += reversed(values)
        returns.append(info["episode"]["r"])
    return tuple(map(np.array, (returns, expected, actual, saturated)))


def main(args):
    if not args.run_dirs:
        sys.exit("name at least one run folder, e.g. benchmark_runs/runs/*")
    print(HEADER)
    for run_dir in args.run_dirs:
        run, env, agent, step = load(run_dir)
        returns, expected, actual, saturated = (values.mean() for values in compare(run, env, agent))
        cells = [run.env_id, LABELS.get(run.exp_name, run.exp_name), run.seed, f"{step // 1000}k"]
        cells += [f"{returns:,.0f}", f"{expected:,.0f}", f"{actual:,.0f}", f"{saturated:.0%}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ""]  # the scripts, and your own tasks
    torch.set_num_threads(1)
    main(tyro.cli(Args, description=__doc__))
