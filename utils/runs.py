"""Read run folders and files of noise.py; compute what figures.py and table.py show.

Both take data folders: any folder with `*/evaluations.csv` and `*/config.json`, one pair per run,
so benchmark_runs/ itself. To keep these two small files of each run:

    (cd benchmark_runs && tar -cf - */evaluations.csv */config.json) | tar -xf - -C results/data
"""

import csv
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

LABELS = {
    "smoothie_continuous": "Smoothie",
    "smoothie_no_kl": "Smoothie without KL",
    "smoothie_closed_form": "Smoothie in closed form",
    "ddpg_continuous": "DDPG",
}
TASKS = ["Swimmer-v4", "HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4"]
# What may differ between the runs of a series.
MAY_DIFFER = {
    "seed",
    "total_timesteps",
    "run_dir",
    "run_id",
    "versions",
    "cuda",
    "compile",
    "threads",
    "track",
    "wandb_project_name",
    "capture_video",
    "checkpoint_frequency",
}


@dataclass
class Run:
    """A run's config, its evaluated steps, and each evaluation's mean return and length, (n,)."""

    config: dict
    steps: np.ndarray
    returns: np.ndarray
    lengths: np.ndarray

    def is_late(self):
        """Whether each evaluation lies in the last fifth of the steps, (n,)."""
        return self.steps >= 0.8 * self.steps[-1]

    def final_return(self):
        """Mean return of the evaluations in the last fifth of the steps: the primary metric."""
        return self.returns[self.is_late()].mean()

    def final_length(self):
        """Mean length in steps of the episodes of these evaluations."""
        return self.lengths[self.is_late()].mean()

    def area(self):
        """Area under the learning curve: the mean return of all evaluations."""
        return self.returns.mean()

    def swings(self):
        """Mean absolute change from one evaluation to the next, over the mean return, or nan."""
        if len(self.returns) < 2:
            return math.nan
        return np.abs(np.diff(self.returns)).mean() / abs(self.returns.mean())


def read_run(run_dir, last_step=math.inf):
    config = json.loads((run_dir / "config.json").read_text())
    rows = np.loadtxt(run_dir / "evaluations.csv", delimiter=",", skiprows=1, ndmin=2)
    rows = rows[rows[:, 0] <= last_step]
    steps = np.unique(rows[:, 0])
    means = np.array([rows[rows[:, 0] == step, 2:].mean(0) for step in steps])
    return Run(config, steps.astype(int), returns=means[:, 0], lengths=means[:, 1])


def check_series(runs, name):
    """Exit if the runs of a series repeat a seed or differ in a flag that matters."""
    seeds = [run.config["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        sys.exit(f"{name}: a seed appears twice; give ablations an --exp-name of their own")
    shared = set.intersection(*[set(run.config) for run in runs])
    for key in sorted(shared - MAY_DIFFER):
        values = {str(run.config[key]) for run in runs}
        if len(values) > 1:
            sys.exit(f"{name}: the runs differ in {key} ({', '.join(sorted(values))})")


def in_order(names, known):
    """Return the names sorted: the known ones in their order, then the others by name."""
    rank = {name: i for i, name in enumerate(known)}
    return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))


def read_runs(folders, last_step=math.inf):
    """Return {task: {exp_name: [Run of each seed]}}, in order."""
    data = {}
    for folder in map(Path, folders):
        paths = list(folder.glob("*/evaluations.csv"))
        if not paths:
            sys.exit(f"{folder}: holds no run folders (no {folder}/*/evaluations.csv)")
        for path in paths:
            run = read_run(path.parent, last_step)
            scripts = data.setdefault(run.config["task"], {})
            scripts.setdefault(run.config["exp_name"], []).append(run)

    for task, scripts in data.items():
        for name, runs in scripts.items():
            check_series(runs, f"{name} on {task}")
            runs.sort(key=lambda run: run.config["seed"])
        data[task] = {name: scripts[name] for name in in_order(scripts, LABELS)}
    return {task: data[task] for task in in_order(data, TASKS)}


def longest(data):
    """Return the last step of the longest run."""
    return max(
        run.steps[-1] for scripts in data.values() for runs in scripts.values() for run in runs
    )


def span(numbers):
    """Return "6", or "3 to 6" where the numbers differ."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def read_published(last_step):
    """Return the rows of published.csv to compare runs with.

    They are those after the least published number of steps that is no less than last_step, or else
    after the greatest.
    """
    with open(Path(__file__).parent / "published.csv") as file:
        rows = list(csv.DictReader(file))
    published_steps = sorted({int(row["steps"]) for row in rows})
    steps = min((n for n in published_steps if n >= last_step), default=published_steps[-1])
    return [row for row in rows if int(row["steps"]) == steps]


def published_for(task, rows):
    """Return the published rows of a v4 task. A v5 task has none, as its robots differ."""
    return [row for row in rows if task == f"{row['task']}-v4"]


def read_noise(path):
    """Return {task: {exp_name: {seed: [(noise, return)]}}} of a file of noise.py, in order."""
    data = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            scripts = data.setdefault(row["task"], {})
            seeds = scripts.setdefault(row["exp_name"], {})
            point = (float(row["noise"]), float(row["return"]))
            seeds.setdefault(int(row["seed"]), []).append(point)
    for task, scripts in data.items():
        data[task] = {name: scripts[name] for name in in_order(scripts, LABELS)}
    return {task: data[task] for task in in_order(data, TASKS)}


def final_returns(runs):
    return np.array([run.final_return() for run in runs])


def interquartile_mean(samples):
    """Mean over the last axis of all samples, without the lowest and the highest quarter.

    The quarter is rounded down to whole values, as in Agarwal et al. (2021).
    """
    return stats.trim_mean(np.concatenate(samples, -1), 0.25, axis=-1)


def probability_of_improvement(samples, others):
    """Probability that a value of a sample exceeds one of its counterpart, mean over the tasks.

    A tie counts half (Agarwal et al., 2021). Values lie along the last axis.
    """
    probabilities = []
    for sample, other in zip(samples, others, strict=True):
        comparisons = np.sign(sample[..., :, None] - other[..., None, :])
        probabilities.append(0.5 + 0.5 * comparisons.mean((-2, -1)))
    return np.mean(probabilities, 0)


def bootstrap_interval(statistic, *arguments, resamples=10_000):
    """Return the 95% percentile bootstrap interval of statistic(*arguments).

    Each argument is a list with one sample per task. The seeds of each are drawn again with
    replacement, so the tasks are strata (Agarwal et al., 2021). With few seeds it is too narrow.
    The ends are nan where a sample has fewer than three values.
    """
    if min(len(sample) for samples in arguments for sample in samples) < 3:
        return np.full(2, np.nan)
    rng = np.random.default_rng(0)
    resampled = [
        [rng.choice(sample, (resamples, len(sample))) for sample in samples]
        for samples in arguments
    ]
    return np.quantile(statistic(*resampled), [0.025, 0.975])


def t_interval(sample, other=None):
    """Return the 95% t interval of the mean, or Welch's of the difference to the other's mean.

    The ends are nan where a sample has a single value.
    """
    if min(len(sample), len(sample if other is None else other)) < 2:
        return np.full(2, np.nan)
    if other is None:
        test = stats.ttest_1samp(sample, 0)
    else:
        test = stats.ttest_ind(sample, other, equal_var=False)
    return np.array(test.confidence_interval(0.95))


def ratio_interval(samples, others):
    """Return the geometric mean over the tasks of mean(sample) / mean(other), and its 95% interval.

    The interval is Welch's, on the logarithm, whose variance is that of the delta method. All means
    must be positive.
    """
    log_ratio = 0.0
    variances = []
    degrees = []
    for sign, side in [(1, samples), (-1, others)]:
        for sample in side:
            log_ratio += sign * math.log(np.mean(sample)) / len(samples)
            relative_error = np.std(sample, ddof=1) / np.mean(sample) / math.sqrt(len(sample))
            variances.append((relative_error / len(samples)) ** 2)
            degrees.append(len(sample) - 1)
    variances = np.array(variances)
    freedom = variances.sum() ** 2 / (variances**2 / degrees).sum()  # Welch and Satterthwaite
    margin = stats.t.ppf(0.975, freedom) * math.sqrt(variances.sum())
    return np.exp([log_ratio, log_ratio - margin, log_ratio + margin])
