"""Print a Markdown table for each task: the data that collect.py wrote, then published returns.

    python utils/table.py results/data

The return of a run is the mean of its last 10 evaluations, even if training diverged. IQM is the interquartile mean over seeds
(with fewer than four seeds, the mean). Intervals are 95% intervals of the mean over seeds by Student's t, of the difference by
Welch's t. Published returns are from utils/published.csv and after a million steps.
"""

import csv
import os
import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from evaluations import LABELS, interquartile_mean, read_data, t_interval

LAST = 10  # evaluations that the return of a run averages
BASELINE = "ddpg_continuous"
HEADER = (
    f"| | seeds | steps | last {LAST} evaluations of each seed | mean (95% interval) | IQM | minus DDPG (95% interval) "
    "| best evaluation |\n"
    "|---|---|---|---|---|---|---|---|"
)


@dataclass
class Args:
    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DATA ...")]
    """folders that collect.py wrote"""
    last_step: float = float("inf")
    """leave out evaluations after this step, to compare runs of different lengths"""


def thousands(steps):
    low, high = min(steps) // 1000, max(steps) // 1000
    return f"{low}k" if low == high else f"{low}k to {high}k"


def with_interval(value, ends, sign=""):
    low, high = (float(end) for end in ends)
    return f"{value:{sign},.0f}" + ("" if np.isnan(low) else f" ({low:{sign},.0f} to {high:{sign},.0f})")


def measured_rows(scripts):
    """Return the rows for the scripts {name: [Run]} of a task."""
    last = {name: np.array([run.returns[-LAST:].mean() for run in runs]) for name, runs in scripts.items()}
    rows = []
    for name, runs in scripts.items():
        minus = ""
        if name != BASELINE and BASELINE in scripts:
            difference = last[name].mean() - last[BASELINE].mean()
            minus = with_interval(difference, t_interval(last[name], last[BASELINE]), sign="+")
        cells = [
            f"**{LABELS.get(name, name)}**",
            len(runs),
            thousands([run.steps[-1] for run in runs]),
            ", ".join(f"{value:,.0f}" for value in last[name]),
            with_interval(last[name].mean(), t_interval(last[name])),
            f"{interquartile_mean(last[name]):,.0f}",
            minus,
            f"{max(run.returns.max() for run in runs):,.0f}",
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def published_rows(task):
    """Return the rows of published returns on a task, in any version of it."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "published.csv")) as file:
        rows = [row for row in csv.DictReader(file) if task.startswith(row["task"] + "-")]
    return [
        f"| {row['algorithm']}, {row['source']} ({row['version']}, {row['metric']}) | {row['seeds']} | 1000k | | "
        f"{int(row['return']):,}{' ± ' + row['spread'] if row['spread'] else ''} | | | |"
        for row in rows
    ]


def main(args):
    if not args.data:
        sys.exit("name at least one folder of data")
    for task, scripts in read_data(*args.data, last_step=args.last_step).items():
        print(f"### {task}\n\n{HEADER}", *measured_rows(scripts), *published_rows(task), "", sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
