"""Draw Figures 3 and 4 of the paper from the evaluations that collect.py gathered.

    python utils/figures.py results/data --output results

figure_3.png (Smoothie and DDPG, six tasks) and figure_4.png (Smoothie with and without the KL penalty, the four harder
tasks) as the paper draws them: the mean over seeds, and its standard deviation clipped to the seeds' minimum and maximum.
figure_3_iqm.png and figure_4_iqm.png: the interquartile mean, its 95% bootstrap interval and each seed as a thin line. The
bold line ends where the shortest of its runs does.
"""

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import matplotlib
import numpy as np
import tyro
from evaluations import LABELS, TASKS, interquartile_mean, interval, read_data, together

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLORS = {"smoothie_continuous": "#0072B2", "smoothie_no_kl": "#009E73", "ddpg_continuous": "#D55E00"}
FIGURES = {
    "figure_3": (TASKS, 3, ["ddpg_continuous", "smoothie_continuous"]),
    "figure_4": (["Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4"], 4, ["smoothie_no_kl", "smoothie_continuous"]),
}


@dataclass
class Args:
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """the folder that collect.py wrote"""
    output: str = "."
    """the folder to write the pictures to"""


def clipped_deviation(returns):
    """Return mean, lower and upper curve (n,) of returns (runs, n): Figure 3's mean and standard deviation."""
    mean, deviation = returns.mean(0), returns.std(0)
    return mean, np.maximum(mean - deviation, returns.min(0)), np.minimum(mean + deviation, returns.max(0))


def bootstrapped(returns):
    """Return interquartile mean and the ends of its 95% interval, each (n,), of returns (runs, n)."""
    return interquartile_mean(returns), *interval(returns, resamples=2_000)


def draw(data, tasks, columns, scripts, curves, thin):
    """Return the figure: a panel a task, a line and a band a script, every seed thin where asked for."""
    rows = len(tasks) // columns
    figure, axes = plt.subplots(rows, columns, figsize=(10, 0.9 + 2.6 * rows), layout="constrained", squeeze=False)
    lines = {}
    for task, axis in zip(tasks, axes.flat, strict=True):
        seeds = []
        for script in scripts:
            if not (runs := data.get(task, {}).get(script)):
                continue
            steps, returns = together(runs)
            middle, lower, upper = curves(returns)
            color = COLORS[script]
            axis.fill_between(steps / 1e6, lower, upper, color=color, alpha=0.18, linewidth=0)
            (lines[LABELS[script]],) = axis.plot(steps / 1e6, middle, color=color, linewidth=2)
            seeds.append(len(runs))
            for run in runs if thin else ():
                axis.plot(run.steps / 1e6, run.returns, color=color, linewidth=0.6, alpha=0.55)
        if seeds:
            low, high = min(seeds), max(seeds)
            axis.set_title(f"{task} (seeds: {low if low == high else f'{low} to {high}'})", fontsize=11)
            axis.set_xlim(0, None)
            axis.grid(alpha=0.25)
        else:
            axis.set_title(task, fontsize=11)
            axis.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=axis.transAxes, color="0.5")
            axis.set(xticks=[], yticks=[])
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(scripts), frameon=False, fontsize=11)
    figure.supxlabel("million environment steps", fontsize=10)
    figure.supylabel("return of the mean action", fontsize=10)
    return figure


def main(args):
    data = read_data(args.data)
    for name, panels in FIGURES.items():
        for suffix, curves in [("", clipped_deviation), ("_iqm", bootstrapped)]:
            path = os.path.join(args.output, name + suffix + ".png")
            figure = draw(data, *panels, curves, thin=bool(suffix))
            try:
                os.makedirs(args.output, exist_ok=True)
                figure.savefig(path, dpi=110)
            except OSError as error:
                sys.exit(f"{path}: cannot be written ({error})")
            plt.close(figure)
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
