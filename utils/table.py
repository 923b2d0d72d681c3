"""Print a Markdown table for each task, of the evaluations that collect.py gathered and of what others have published.

    python utils/table.py results/data

The headline of a run is the mean of its last 10 evaluations, a diverged run's too. IQM is the interquartile mean over seeds
(with fewer than four seeds, their mean); intervals are 95% percentile bootstrap intervals over seeds, which are too narrow
where seeds are few. Published returns come from utils/published.csv and are after a million steps.
"""

import csv
import os
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from evaluations import LABELS, TASKS, difference, interquartile_mean, interval, read_data

LAST = 10  # evaluations that a headline return is the mean of
BASELINE = "ddpg_continuous"
HEADER = (
    f"| | seeds | steps | last {LAST} evaluations, each seed | their mean | IQM (95% interval) | minus DDPG (95% interval) "
    "| best evaluation |\n"
    "|---|---|---|---|---|---|---|---|"
)


@dataclass
class Args:
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """the folder that collect.py wrote"""


def thousands(steps):
    low, high = min(steps) // 1000, max(steps) // 1000
    return f"{low}k" if low == high else f"{low}k to {high}k"


def with_interval(value, ends, sign=""):
    low, high = (float(end) for end in ends)
    return f"{value:{sign},.0f}" + ("" if np.isnan(low) else f" ({low:{sign},.0f} to {high:{sign},.0f})")


def measured_rows(scripts):
    """Return the rows of the scripts {name: [Run]} of one task."""
    last = {name: np.array([run.returns[-LAST:].mean() for run in runs]) for name, runs in scripts.items()}
    rows = []
    for name in sorted(scripts, key=lambda name: list(LABELS).index(name) if name in LABELS else len(LABELS)):
        runs, minus = scripts[name], ""
        if name != BASELINE and BASELINE in scripts:
            ends = interval(last[name], last[BASELINE], statistic=difference)
            minus = with_interval(difference(last[name], last[BASELINE]), ends, sign="+")
        cells = [
            f"**{LABELS.get(name, name)}**",
            len(runs),
            thousands([run.steps[-1] for run in runs]),
            ", ".join(f"{value:,.0f}" for value in last[name]),
            f"{last[name].mean():,.0f}",
            with_interval(interquartile_mean(last[name]), interval(last[name])),
            minus,
            f"{max(run.returns.max() for run in runs):,.0f}",
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def published_rows(task):
    """Return a row for each published return on this task, whatever its version."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "published.csv")) as file:
        rows = [row for row in csv.DictReader(file) if task.startswith(row["task"] + "-")]
    return [
        f"| {row['algorithm']}, {row['source']} ({row['version']}, {row['metric']}) | {row['seeds']} | 1000k | | "
        f"{int(row['return']):,}{' ± ' + row['spread'] if row['spread'] else ''} | | | |"
        for row in rows
    ]


def main(args):
    data = read_data(args.data)
    for task in sorted(data, key=lambda task: [*TASKS, task].index(task)):
        print(f"### {task}\n\n{HEADER}", *measured_rows(data[task]), *published_rows(task), "", sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
