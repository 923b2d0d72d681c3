"""Print as Markdown what the critics of runs expect, and what their policies get.

    python utils/value_estimates.py benchmark_runs/Hopper-v4__*/

Each run's policy acts for ten episodes from the starts of its evaluations: with noise for Smoothie,
without for DDPG, as its critic assumes. `return` is the mean return of these episodes. `expected`
is the first critic's value of the policy, `actual` the discounted sum of the rewards that follow;
both are means over all states. At a time limit the critic's own value stands for the rewards to
come, which brings the two closer. `sigma` is the policy's standard deviation, from the lowest to
the highest over action dimensions and states. `saturated` is the share of the mean's components
beyond 0.97 in absolute value, where the slope of the tanh is below 0.06. `cosine` is that of the
angle between the gradients of the first two critics in the action, at the mean action; its mean
over all states says how well they agree on what to change. `smoothing` is that between the first
critic's gradients with the policy's noise and without; at 1 both have the same direction. Only the
closed form's critic has both.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from evaluate import load_script, make_agent
from runs import LABELS

EPISODES = 10
SATURATED = 0.97


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]  # run folders


def load(run_dir):
    """Return a run's Args, its environment, its agent and the step of its checkpoint."""
    script, args = load_script(run_dir)
    env = script.make_env(args.env_id)
    agent = make_agent(script, env, args)
    path = run_dir / "checkpoint.pt"
    state = torch.load(path, "cpu", weights_only=True, mmap=True)  # leaves the buffer on the disk
    agent.load_state_dict(state["agent"])
    return args, env, agent, state["step"]


def value_at(qf, observations, mean, log_var):
    """Return a critic's value of the policy, with the noise of Smoothie's, (batch,)."""
    if hasattr(qf, "smoothed"):  # the closed form's critic is Q, the others are Q~ or DDPG's Q
        return qf.smoothed(observations, mean, log_var)[0]
    return qf(observations, mean)


def policy_and_critics(agent, obs):
    """Return at one state the mean and the std of the action, (action_dim,), and the columns that
    are means over states. With one critic `cosine` is 1."""
    observations = torch.as_tensor(obs, dtype=torch.float32)[None]
    with torch.no_grad():
        policy = agent.actor(observations)
        mean, log_var = policy if isinstance(policy, tuple) else (policy, None)  # DDPG: no noise
        var = torch.zeros_like(mean) if log_var is None else log_var.exp().expand_as(mean)

    mean.requires_grad_()
    values = [value_at(qf, observations, mean, log_var) for qf in agent.qfs]
    slopes = [torch.autograd.grad(value.sum(), mean)[0] for value in values]
    cosine = torch.cosine_similarity(slopes[0], slopes[:2][-1]).item()

    value_without_noise = agent.qfs[0](observations, mean)
    slope_without_noise = torch.autograd.grad(value_without_noise.sum(), mean)[0]
    smoothing = torch.cosine_similarity(slopes[0], slope_without_noise).item()
    mean = mean[0].detach().numpy()
    return {
        "mean": mean,
        "std": var[0].sqrt().numpy(),
        "expected": values[0].item(),
        "saturated": np.mean(np.abs(mean) > SATURATED),
        "cosine": cosine,
        "smoothing": smoothing,
    }


def discounted_sums(rewards, gamma, last):
    """Return the discounted sum of the rewards from each step on, `last` being what follows."""
    sums = [last]
    for reward in reversed(rewards):
        sums.append(reward + gamma * sums[-1])
    return sums[:0:-1]


def compare(args, env, agent, episodes):
    """Return the return of each episode, (episodes,), the actual value of each state, (states,),
    and what policy_and_critics returns, with a first dimension of states."""
    rng = np.random.default_rng(args.seed)
    returns = []
    actual = []
    states = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=1_000 * args.seed + episode)
        rewards = []
        done = False
        while not done:
            state = policy_and_critics(agent, obs)
            states.append(state)
            mean = state["mean"]
            action = mean + state["std"] * rng.standard_normal(len(mean), np.float32)
            obs, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            done = terminated or truncated
        last = 0.0 if terminated else policy_and_critics(agent, obs)["expected"]
        actual += discounted_sums(rewards, args.gamma, last)
        returns.append(sum(rewards))
    in_states = {name: np.array([state[name] for state in states]) for name in states[0]}
    return np.array(returns), np.array(actual), in_states


def main(args):
    columns = ["task", "script", "seed", "steps", "return", "expected", "actual"]
    columns += ["sigma", "saturated", "cosine", "smoothing"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for run_dir in args.run_dirs:
        if not (run_dir / "checkpoint.pt").exists():
            print(f"{run_dir}: left out, as it has no checkpoint.pt", file=sys.stderr)
            continue
        run_args, env, agent, step = load(run_dir)
        returns, actual, in_states = compare(run_args, env, agent, EPISODES)
        stds = in_states["std"]
        label = LABELS.get(run_args.exp_name, run_args.exp_name)
        cells = [run_args.env_id, label, run_args.seed, f"{step:,}"]
        for values in (returns, in_states["expected"], actual):
            cells.append(f"{values.mean():,.0f}")
        cells.append(f"{stds.min():.2f} to {stds.max():.2f}" if stds.any() else "")
        cells.append(f"{in_states['saturated'].mean():.0%}")
        cells.append(f"{in_states['cosine'].mean():.2f}")
        has_both = hasattr(agent.qfs[0], "smoothed")
        cells.append(f"{in_states['smoothing'].mean():.2f}" if has_both else "")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, "")  # so that a run's --env-id my_module:MyTask-v0 finds my_module.py here
    warnings.filterwarnings("ignore", message=".*is out of date")  # papers use v4
    main(tyro.cli(Args, description=__doc__))
