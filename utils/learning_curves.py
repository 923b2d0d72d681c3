"""Draw the evaluations of run folders, one colour a script, and print their table.

    python utils/learning_curves.py results/Hopper-v4__* --output results/hopper.png

A run folder needs config.json and evaluations.csv. Every run counts, a diverged one too.
"""

import csv
import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "smoothie_continuous": ("Smoothie", "#0072B2"),
    "smoothie_no_kl": ("Smoothie without KL", "#009E73"),
    "ddpg_continuous": ("DDPG", "#D55E00"),
}
LAST = 10  # evaluations that a headline return is the mean of


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[str, ...]]
    """run folders, all of one task"""
    output: str = "learning_curves.png"
    """the picture to write"""


def read_run(run_dir):
    """Return the config, the evaluated steps (n,) and the mean return of each evaluation (n,)."""
    try:
        with open(os.path.join(run_dir, "config.json")) as file:
            config = json.load(file)
        returns = defaultdict(list)
        with open(os.path.join(run_dir, "evaluations.csv")) as file:
            for row in csv.DictReader(file):
                returns[int(row["global_step"])].append(float(row["episodic_return"]))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{run_dir}: not a run folder with config.json and evaluations.csv ({error})")
    return config, np.array(list(returns)), np.array([np.mean(r) for r in returns.values()])


def main(args):
    if not args.run_dirs:
        sys.exit("no run folders were named; name some, as in runs/Hopper-v4__*")
    runs = defaultdict(list)
    for run_dir in args.run_dirs:
        config, steps, returns = read_run(run_dir)
        runs[config["exp_name"]].append((config["seed"], config["env_id"], steps, returns))
    tasks = {run[1] for group in runs.values() for run in group}
    if len(tasks) > 1:
        sys.exit(f"the runs are of {len(tasks)} tasks, {', '.join(sorted(tasks))}: draw one task at a time")

    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    print(
        f"| script | runs | mean of the last {LAST} evaluations of each seed | their mean | best evaluation |\n"
        "|---|---|---|---|---|"
    )
    for name in sorted(runs, key=lambda name: list(STYLES).index(name) if name in STYLES else len(STYLES)):
        label, color = STYLES.get(name, (name, "0.4"))
        group = sorted(runs[name], key=lambda run: run[0])
        for _, _, steps, returns in group:
            axis.plot(steps / 1e3, returns, color=color, alpha=0.35, linewidth=1)
        common = min((run[2] for run in group), key=len)
        mean = np.mean([run[3][: len(common)] for run in group], 0)
        axis.plot(common / 1e3, mean, color=color, linewidth=2.4, label=label)
        last = [run[3][-LAST:].mean() for run in group]
        each = ", ".join(f"{value:.0f} (seed {run[0]})" for run, value in zip(group, last, strict=True))
        print(f"| `{name}` | {len(group)} | {each} | {np.mean(last):.0f} | {max(run[3].max() for run in group):.0f} |")
    axis.set(title=tasks.pop(), xlabel="thousand environment steps", ylabel="return of the mean action", ylim=(0, None))
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(args.output, dpi=130)
    print(f"wrote {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args))
