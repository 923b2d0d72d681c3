"""Print the results of runs as Markdown: a summary, then a table for each task.

    python utils/table.py results/data --noise results/noise.csv

The return of a run is the mean return of its evaluations in the last fifth of its steps, those of
the mean action. `length` is the mean number of steps of the same episodes. Spreads are standard
deviations over seeds. `area` is the mean return of all evaluations, the area under the learning
curve. `swings` is the mean absolute change from one evaluation to the next, over the mean return.
Intervals are 95% intervals: of a mean Student's t, of a difference Welch's t, in the last two
columns of the summary a bootstrap over seeds (Agarwal et al., 2021), which is too narrow with few
seeds and takes the published return as exact. Published returns are from utils/published.csv, where
`last fifth` is the same statistic, computed from public data of each seed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from runs import (
    LABELS,
    bootstrap_interval,
    final_returns,
    in_order,
    interquartile_mean,
    longest,
    probability_of_improvement,
    published_for,
    read_noise,
    read_published,
    read_runs,
    span,
    t_interval,
)

PUBLIC = {"algorithm": "TD3", "source": "Tianshou", "version": "v3"}  # has all six tasks
TD3_BY_ITS_AUTHOR = {"algorithm": "TD3", "source": "sfujim/TD3", "version": "v1"}  # has four


@dataclass
class Args:
    data: tyro.conf.Positional[tuple[Path, ...]] = (Path("results/data"),)  # folders of run folders
    baseline: str = "ddpg_continuous"  # the script to compare the others with
    tasks: tuple[str, ...] = ()  # only these tasks; by default all
    last_step: float = float("inf")  # leave out later evaluations, to compare unequal runs
    noise: Path | None = None  # file of noise.py, for a table of each task's returns under noise


def print_row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |")


def print_header(*cells):
    print_row(*cells)
    print("|" + "---|" * len(cells))


def with_spread(values):
    """Return "mean ± standard deviation", the latter of two values or more."""
    if len(values) == 1:
        return f"{values[0]:,.0f}"
    return f"{np.mean(values):,.0f} ± {np.std(values, ddof=1):,.0f}"


def percent(value):
    """Return the value as a percentage, or nothing for nan."""
    return "" if np.isnan(value) else f"{value:.0%}"


def interval(ends, number=",.0f"):
    """Return "low to high", or nothing where there is no interval."""
    low, high = (float(end) for end in ends)
    return "" if np.isnan(low) else f"{low:{number}} to {high:{number}}"


def with_interval(value, ends, number):
    """Return "value (low to high)", or the value where there is no interval."""
    in_words = interval(ends, number)
    return f"{value:{number}} ({in_words})" if in_words else f"{value:{number}}"


def with_bootstrap(statistic, *samples):
    ends = bootstrap_interval(statistic, *samples)
    return with_interval(statistic(*samples), ends, ".2f")


def public_return(task, published, public=PUBLIC):
    """Return what PUBLIC or another source has for a task, (mean, standard deviation), or None."""
    for row in published_for(task, published):
        if all(row[key] == value for key, value in public.items()):
            return float(row["return"]), float(row["spread"])
    return None


def print_summary(data, published, baseline):
    names = in_order(set().union(*data.values()), LABELS)
    all_runs = [runs for scripts in data.values() for runs in scripts.values()]
    seeds = span([len(runs) for runs in all_runs])
    steps = span([int(run.steps[-1]) for runs in all_runs for run in runs])
    print(f"### {steps} steps, {seeds} seed{'' if seeds == '1' else 's'}\n")
    print("Mean return in the last fifth of the steps ± standard deviation over seeds\n")
    public = {task: public_return(task, published) for task in data}
    has_public = all(public.values())
    columns = []
    if has_public:
        ratio = "interquartile mean of return / {algorithm}'s return ({source})".format(**PUBLIC)
        columns.append(ratio)
    columns.append(f"probability of a higher return than {LABELS.get(baseline, baseline)}")
    print_header("", *data, *columns)

    def samples(name):
        return [final_returns(scripts[name]) for scripts in data.values() if name in scripts]

    for name in names:
        returns = [
            with_spread(final_returns(scripts[name])) if name in scripts else ""
            for scripts in data.values()
        ]

        # The last columns need every task, lest a script gain from what it leaves out, and the
        # first of them, which pools the seeds, needs as many on each.
        relative = ""
        better = ""
        is_complete = all(returns)
        is_balanced = len({len(sample) for sample in samples(name)}) == 1
        if is_complete and is_balanced and has_public:
            scores = [
                sample / td3[0] for sample, td3 in zip(samples(name), public.values(), strict=True)
            ]
            relative = with_bootstrap(interquartile_mean, scores)
        if is_complete and name != baseline and len(samples(baseline)) == len(data):
            better = with_bootstrap(probability_of_improvement, samples(name), samples(baseline))
        statistics = [relative, better] if has_public else [better]
        print_row(f"**{LABELS.get(name, name)}**", *returns, *statistics)

    label = "{algorithm}, {source} ({version}, {steps:,} steps)"
    published_steps = int(published[0]["steps"])
    for source in (PUBLIC, TD3_BY_ITS_AUTHOR):
        td3_returns = [public_return(task, published, source) for task in data]
        spreads = ["{:,.0f} ± {:,.0f}".format(*td3) if td3 else "" for td3 in td3_returns]
        if any(td3_returns):
            empty = [""] * len(columns)
            print_row(label.format(**source, steps=published_steps), *spreads, *empty)
    print()


def print_task(task, scripts, published, baseline):
    print(f"### {task}\n")
    minus = f"minus {LABELS.get(baseline, baseline)}, 95% interval"
    print_header("", "seeds", "steps", "return", "95% interval", minus, "area", "swings", "length")
    returns = {name: final_returns(runs) for name, runs in scripts.items()}
    for name, runs in scripts.items():
        difference = ""
        if name != baseline and baseline in scripts:
            value = returns[name].mean() - returns[baseline].mean()
            ends = t_interval(returns[name], returns[baseline])
            difference = with_interval(value, ends, "+,.0f")
        print_row(
            f"**{LABELS.get(name, name)}**",
            len(runs),
            span([int(run.steps[-1]) for run in runs]),
            with_spread(returns[name]),
            interval(t_interval(returns[name])),
            difference,
            f"{np.mean([run.area() for run in runs]):,.0f}",
            percent(np.mean([run.swings() for run in runs])),
            with_spread([run.final_length() for run in runs]),
        )
    for row in published_for(task, published):
        spread = f" ± {int(row['spread']):,}" if row["spread"] else ""
        print_row(
            f"{row['algorithm']}, {row['source']} ({row['version']}, {row['metric']})",
            row["seeds"],
            f"{int(row['steps']):,}",
            f"{int(row['return']):,}{spread}",
            "",
            "",
            f"{int(row['area']):,}" if row["area"] else "",
            percent(float(row["swings"] or np.nan)),
            "",
        )
    print()


def print_noise(task, scripts, baseline):
    curves = {name: np.array(list(seeds.values())) for name, seeds in scripts.items()}
    noise = next(iter(curves.values()))[0, :, 0]
    returns = {name: curve[:, :, 1].T for name, curve in curves.items()}  # (noises, seeds)
    print(f"### {task}, by the standard deviation of noise on the actions\n")
    print_header("", "seeds", *[f"{std:g}" for std in noise])
    for name, samples in returns.items():
        seeds = len(samples.T)
        print_row(f"**{LABELS.get(name, name)}**", seeds, *map(with_spread, samples))
        if name != baseline and baseline in returns:
            differences = [
                with_interval(sample.mean() - other.mean(), t_interval(sample, other), "+,.0f")
                for sample, other in zip(samples, returns[baseline], strict=True)
            ]
            print_row(f"minus {LABELS.get(baseline, baseline)}, 95% interval", "", *differences)
    print()


def main(args):
    data = read_runs(args.data, args.last_step)
    for task in args.tasks:
        if task not in data:
            sys.exit(f"--tasks {task}: there are no runs of it")
    if args.tasks:
        data = {task: data[task] for task in args.tasks}
    published = read_published(longest(data))
    print_summary(data, published, args.baseline)
    for task, scripts in data.items():
        print_task(task, scripts, published, args.baseline)
    if args.noise:
        for task, scripts in read_noise(args.noise).items():
            if not args.tasks or task in args.tasks:
                print_noise(task, scripts, args.baseline)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
