"""Draw the learning curves of runs, and the ratios of their returns.

    python utils/figures.py results/data --output results

learning_curves.png has a panel for each task: the return of the mean action, smoothed over the last
five evaluations. Thin lines are seeds; a bold line is their mean and ends with the shortest run.
Horizontal lines are public returns of TD3 and SAC.

ratios.png shows the mean return of each script over that of the baseline, with 95% intervals. It
needs two scripts with two seeds each.

noise.png, drawn from a file of noise.py, shows the return against the noise on the actions: thin
lines are seeds, bold ones their means with 95% intervals.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from runs import (
    LABELS,
    final_returns,
    in_order,
    longest,
    published_for,
    ratio_interval,
    read_noise,
    read_published,
    read_runs,
    span,
    t_interval,
)

WINDOW = 5  # evaluations that a smoothed value averages
PUBLIC_STYLES = {  # Tianshou has all six tasks
    ("TD3", "Tianshou"): {"color": "black", "linestyle": "--"},
    ("TD3", "sfujim/TD3"): {"color": "black", "linestyle": "-."},
    ("SAC", "Tianshou"): {"color": "#555555", "linestyle": ":"},
}
# The colour-blind-safe palette of Okabe and Ito.
COLORS = {
    "smoothie_continuous": "#0072B2",
    "smoothie_no_kl": "#009E73",
    "smoothie_closed_form": "#CC79A7",
    "ddpg_continuous": "#D55E00",
}
OTHER_COLORS = ["#E69F00", "#56B4E9", "#F0E442", "#332288", "#882255"]  # the last two are Tol's


@dataclass
class Args:
    data: tyro.conf.Positional[tuple[Path, ...]] = (Path("results/data"),)  # folders of run folders
    output: Path = Path(".")  # folder for the pictures
    baseline: str = "ddpg_continuous"  # the script that ratios.png compares the others with
    last_step: float = float("inf")  # leave out later evaluations, to compare unequal runs
    noise: Path | None = None  # file of noise.py, for noise.png


def choose_colors(data):
    """Return {exp_name: colour} for the series of all tasks, in order."""
    names = in_order(set().union(*data.values()), LABELS)
    others = [name for name in names if name not in COLORS]
    colors = dict(COLORS)
    for i, name in enumerate(others):
        colors[name] = OTHER_COLORS[i % len(OTHER_COLORS)]
    return {name: colors[name] for name in names}


def smooth(returns):
    """Return the mean of each evaluation and up to WINDOW - 1 before it, (n,)."""
    return np.array([returns[max(0, i + 1 - WINDOW) : i + 1].mean() for i in range(len(returns))])


def make_panels(count):
    """Return a figure and its axes, one for each task."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    size = (max(3.4 * columns, 6), 2.7 * rows + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, axes.flat[:count]


def draw_legend(figure, axes, colors):
    """Draw one legend for all panels: the scripts in order, then the public returns."""
    lines = {}
    for axis in axes:
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            lines[label] = line
    labels = [LABELS.get(name, name) for name in colors]
    labels += [label for label in lines if label not in labels]
    handles = [lines[label] for label in labels]
    columns = min(len(axes), 2)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def mean_curve(runs):
    """Return the steps that all runs have evaluated, and their mean smoothed return there."""
    steps = sorted(set.intersection(*[set(run.steps.tolist()) for run in runs]))
    curves = [smooth(run.returns)[np.isin(run.steps, steps)] for run in runs]
    return np.array(steps), np.mean(curves, 0)


def draw_public(axis, task, published):
    """Draw the horizontal lines of a task."""
    for row in published_for(task, published):
        style = PUBLIC_STYLES.get((row["algorithm"], row["source"]))
        if style:
            steps = f"{int(row['steps']):,} steps"
            label = f"{row['algorithm']} after {steps} ({row['source']}, {row['version']})"
            axis.axhline(float(row["return"]), **style, linewidth=1.2, label=label)


def learning_curves(data):
    """Return the figure with a panel for each task."""
    colors = choose_colors(data)
    published = read_published(longest(data))
    figure, axes = make_panels(len(data))

    for (task, scripts), axis in zip(data.items(), axes, strict=True):
        for name, runs in reversed(scripts.items()):  # so that the first script ends up on top
            for run in runs:
                x = run.steps / 1e6
                axis.plot(x, smooth(run.returns), color=colors[name], linewidth=0.6, alpha=0.5)
            steps, curve = mean_curve(runs)
            label = LABELS.get(name, name)
            axis.plot(steps / 1e6, curve, color=colors[name], linewidth=2, label=label)
        draw_public(axis, task, published)
        axis.set_title(f"{task} (seeds: {span([len(runs) for runs in scripts.values()])})")
        axis.set_xlim(0, None)
        axis.grid(alpha=0.25)

    draw_legend(figure, axes, colors)
    figure.supxlabel("million environment steps")
    figure.supylabel("return of the mean action")
    return figure


def ratio_rows(data, baseline):
    """Return {exp_name: {task: (ratio, low, high)}}, the last task being "all tasks".

    Tasks where one of the two has fewer than two seeds are left out, and then so are "all tasks".
    The ratio is nan where a mean is not positive, and so is that of all tasks.
    """
    rows = {}
    for name in in_order(set().union(*data.values()) - {baseline}, LABELS):
        pairs = {
            task: (final_returns(scripts[name]), final_returns(scripts[baseline]))
            for task, scripts in data.items()
            if min(len(scripts.get(name, [])), len(scripts.get(baseline, []))) > 1
        }
        if not pairs:
            continue
        samples, others = zip(*pairs.values(), strict=True)
        positive = {
            task: min(np.mean(pair[0]), np.mean(pair[1])) > 0 for task, pair in pairs.items()
        }
        nothing = (np.nan, np.nan, np.nan)
        rows[name] = {
            task: ratio_interval([a], [b]) if positive[task] else nothing
            for task, (a, b) in pairs.items()
        }
        if len(pairs) == len(data) > 1:
            whole = all(positive.values())
            rows[name]["all tasks"] = ratio_interval(samples, others) if whole else nothing
    return rows


def ratios(data, baseline):
    """Return the forest plot, or None without two scripts of two seeds."""
    rows = ratio_rows(data, baseline)
    if not rows:
        return None
    colors = choose_colors(data)
    tasks = in_order(set().union(*rows.values()), [*data, "all tasks"])
    size = (7, 1.2 + len(tasks) * (0.25 + 0.16 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    for i, (name, ratio_of) in enumerate(rows.items()):
        offset = 0.7 * ((i + 0.5) / len(rows) - 0.5)
        label = LABELS.get(name, name)
        for j, task in enumerate(tasks):
            y = j + offset
            ratio, low, high = ratio_of.get(task, (np.nan, np.nan, np.nan))
            axis.plot([low, high], [y, y], color=colors[name], linewidth=2)
            axis.plot(ratio, y, "o", color=colors[name], label=label if j == 0 else None)
            if task in ratio_of and np.isnan(ratio):
                axis.text(1, y, " no ratio: a mean below 0", color=colors[name], va="center")
    axis.axvline(1, color="black", linewidth=1)
    if "all tasks" in tasks:
        axis.axhline(len(tasks) - 1.5, color="black", linewidth=0.5)
    axis.set_xscale("log")
    left, right = axis.get_xlim()
    axis.set_xlim(max(left, 0.05), min(right, 20))  # intervals of two seeds would dwarf the others
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yticks(range(len(tasks)), tasks)
    axis.set_ylim(len(tasks) - 0.5, -0.5)  # the first task on top
    axis.grid(alpha=0.25, axis="x")
    baseline_label = LABELS.get(baseline, baseline)
    axis.set_xlabel(f"return in the last fifth of the steps, over that of {baseline_label}")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def returns_under_noise(data):
    """Return the figure with a panel for each task of read_noise."""
    colors = choose_colors(data)
    figure, axes = make_panels(len(data))
    for (task, scripts), axis in zip(data.items(), axes, strict=True):
        lowest = 0.0
        highest = 0.0
        for i, (name, seeds) in enumerate(scripts.items()):
            curves = np.array(list(seeds.values()))  # (seeds, noises, 2)
            noise = curves[0, :, 0] + 0.008 * (i - (len(scripts) - 1) / 2)  # side by side
            returns = curves[:, :, 1]
            for curve in returns:
                axis.plot(noise, curve, color=colors[name], linewidth=0.6, alpha=0.5)
            lowest = min(lowest, returns.min())
            highest = max(highest, returns.max())
            mean = returns.mean(0)
            low, high = np.array([t_interval(sample) for sample in returns.T]).T
            label = LABELS.get(name, name)
            style = {"color": colors[name], "linewidth": 2, "elinewidth": 1, "capsize": 3}
            axis.errorbar(noise, mean, [mean - low, high - mean], **style, label=label)
        axis.set_title(f"{task} (seeds: {span([len(seeds) for seeds in scripts.values()])})")
        axis.grid(alpha=0.25)
        axis.set_ylim(1.1 * lowest, 1.1 * highest)  # intervals of two seeds would dwarf the curves

    draw_legend(figure, axes, colors)
    figure.supxlabel("standard deviation of the noise on the actions, bounds at -1 and 1")
    figure.supylabel("return")
    return figure


def main(args):
    data = read_runs(args.data, args.last_step)
    args.output.mkdir(parents=True, exist_ok=True)
    figures = {
        "learning_curves.png": learning_curves(data),
        "ratios.png": ratios(data, args.baseline),
        "noise.png": returns_under_noise(read_noise(args.noise)) if args.noise else None,
    }
    for name, figure in figures.items():
        if figure:
            figure.savefig(args.output / name, dpi=120)
            print(args.output / name)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
