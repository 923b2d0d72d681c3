"""Draw Figures 3 and 4 of the paper from the data that collect.py wrote.

    python utils/figures.py results/data --output results

Figure 3 compares Smoothie with DDPG, Figure 4 compares it with and without the KL penalty. Each has a panel for every task
that has data for it. Other scripts in the data are added to Figure 3.

figure_3.png and figure_4.png show the mean and the standard deviation over seeds, clipped to the seeds' minimum and maximum,
as in the paper. figure_3_iqm.png and figure_4_iqm.png show the interquartile mean, a thin line for each seed and,
from five seeds on, a 95% bootstrap interval (about 90% with five or six seeds). Bold lines end with the shortest run.
"""

import math
import os
import sys
from dataclasses import dataclass
from typing import Annotated

import matplotlib
import numpy as np
import tyro
from evaluations import LABELS, align, bootstrap_interval, in_order, interquartile_mean, read_data

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The colour-blind-safe palette of Okabe and Ito.
COLORS = {
    "smoothie_continuous": "#0072B2",
    "smoothie_no_kl": "#009E73",
    "smoothie_closed_form": "#CC79A7",
    "ddpg_continuous": "#D55E00",
}
OTHER_COLORS = ["#E69F00", "#56B4E9", "#000000"]
LINE_STYLES = ["-", "--", ":", "-."]


@dataclass
class Args:
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """the folder that collect.py wrote"""
    output: str = "."
    """the folder for the pictures"""


def select(data):
    """Return {figure: {task: {script: runs}}}, without empty figures and panels."""
    figures = {"figure_3": {}, "figure_4": {}}
    for task, scripts in data.items():
        if others := {name: runs for name, runs in scripts.items() if name != "smoothie_no_kl"}:
            figures["figure_3"][task] = others
        if "smoothie_no_kl" in scripts:
            pair = ("smoothie_continuous", "smoothie_no_kl")
            figures["figure_4"][task] = {name: scripts[name] for name in pair if name in scripts}
    return {name: panels for name, panels in figures.items() if panels}


def line_styles(data):
    """Return {script: colour and line style} for the scripts of all tasks, in order."""
    names = in_order(set().union(*data.values()), LABELS)
    styles = {name: {"color": color, "linestyle": "-"} for name, color in COLORS.items() if name in names}
    for i, name in enumerate(name for name in names if name not in COLORS):
        line_style = LINE_STYLES[i // len(OTHER_COLORS) % len(LINE_STYLES)]
        styles[name] = {"color": OTHER_COLORS[i % len(OTHER_COLORS)], "linestyle": line_style}
    return styles


def mean_and_clipped_deviation(returns):
    """Return the mean and the lower and upper end of the band, each (n,), of returns (runs, n)."""
    mean, deviation = returns.mean(0), returns.std(0)
    return mean, np.maximum(mean - deviation, returns.min(0)), np.minimum(mean + deviation, returns.max(0))


def iqm_and_interval(returns):
    """Return the interquartile mean and the ends of its 95% interval, each (n,), of returns (runs, n)."""
    return interquartile_mean(returns), *bootstrap_interval(returns)


def draw(panels, styles, curves, show_seeds):
    """Return the figure: a panel for each task, with a line and a band for each script."""
    columns = 4 if len(panels) == 4 else min(len(panels), 3)
    rows, legend_columns = math.ceil(len(panels) / columns), max(columns, 2)
    names = [name for name in styles if any(name in scripts for scripts in panels.values())]
    size = (min(2 + 3 * columns, 10), 0.6 + 0.25 * math.ceil(len(names) / legend_columns) + 2.6 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    lines = {}
    for (task, scripts), axis in zip(panels.items(), axes.flat, strict=False):
        for name, runs in reversed(scripts.items()):  # the first script ends up on top
            steps, returns = align(runs)
            middle, lower, upper = curves(returns)
            axis.fill_between(steps / 1e6, lower, upper, color=styles[name]["color"], alpha=0.18, linewidth=0)
            (lines[name],) = axis.plot(steps / 1e6, middle, **styles[name], linewidth=2, label=LABELS.get(name, name))
            for run in runs if show_seeds else ():
                axis.plot(run.steps / 1e6, run.returns, **styles[name], linewidth=0.6, alpha=0.55)
        low, high = min(map(len, scripts.values())), max(map(len, scripts.values()))
        axis.set_title(f"{task} (seeds: {low if low == high else f'{low} to {high}'})", fontsize=10)
        axis.set_xlim(0, None)
        axis.grid(alpha=0.25)
    handles = [lines[name] for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=legend_columns, frameon=False, fontsize=10)
    figure.supxlabel("million environment steps", fontsize=10)
    figure.supylabel("return of the mean action", fontsize=10)
    return figure


def main(args):
    data = read_data(args.data)
    styles = line_styles(data)
    for name, panels in select(data).items():
        for suffix, curves in [("", mean_and_clipped_deviation), ("_iqm", iqm_and_interval)]:
            path = os.path.join(args.output, name + suffix + ".png")
            figure = draw(panels, styles, curves, show_seeds=suffix == "_iqm")
            try:
                os.makedirs(args.output, exist_ok=True)
                figure.savefig(path, dpi=110)
            except OSError as error:
                sys.exit(f"{path}: cannot write ({error})")
            plt.close(figure)
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
