"""Print as CSV what the final policies of runs return under Gaussian noise on their actions.

    python utils/noise.py benchmark_runs/*/ > results/noise.csv
    python utils/figures.py results/data --noise results/noise.csv --output results

The paper maximises the return of the policy with its noise, but evaluations are of the mean action.
Here the mean action gets noise of several standard deviations, in normalised units: bounds at -1
and 1. Each return is the mean over the episodes; the first of them start where the run's
evaluations do.
"""

import csv
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from evaluate import add_noise, load_actor, load_script
from runs import read_run

STDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
COLUMNS = ("task", "exp_name", "seed", "noise", "return")


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]  # run folders
    episodes: int = 20  # episodes for each standard deviation


def is_unfinished(run_dir):
    """Return whether a run has steps left. A folder that holds only a policy has none."""
    if not (run_dir / "evaluations.csv").exists():
        return False
    run = read_run(run_dir)
    return run.steps[-1] < run.config["total_timesteps"]


def returns_under_noise(run_dir, episodes):
    """Return the rows of a run, one for each of STDS."""
    script, args = load_script(run_dir)
    args.eval_episodes = episodes
    env = script.make_env(args.env_id)
    actor = load_actor(run_dir, script, env, args)
    rows = []
    for std in STDS:
        results = script.evaluate(actor, add_noise(env, std, args.seed), args)
        mean_return, _ = np.mean(results, 0)
        rows.append((env.spec.id, args.exp_name, args.seed, std, mean_return))
    env.close()
    return rows


def main(args):
    writer = csv.writer(sys.stdout)
    writer.writerow(COLUMNS)
    for run_dir in args.run_dirs:
        if is_unfinished(run_dir):
            print(f"{run_dir}: left out, as the run has not finished", file=sys.stderr)
            continue
        writer.writerows(returns_under_noise(run_dir, args.episodes))
        sys.stdout.flush()


if __name__ == "__main__":
    sys.path.insert(0, "")  # so that a run's --env-id my_module:MyTask-v0 finds my_module.py here
    warnings.filterwarnings("ignore", message=".*is out of date")  # papers use v4
    main(tyro.cli(Args, description=__doc__))
