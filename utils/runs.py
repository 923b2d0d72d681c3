"""Read the data that collect.py wrote, and compute the statistics for figures.py and table.py."""

import glob
import json
import os
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy import stats

LABELS = {
    "smoothie_continuous": "Smoothie",
    "smoothie_no_kl": "Smoothie without KL",
    "smoothie_closed_form": "Smoothie in closed form",
    "ddpg_continuous": "DDPG",
}
TASKS = ["Swimmer-v4", "HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4"]
# Flags that may differ between the seeds of an experiment.
MAY_DIFFER = {"seed", "total_timesteps", "script", "provenance", "cuda", "compile", "threads", "track", "wandb_project_name"}
MAY_DIFFER |= {"checkpoint_frequency", "capture_video", "resume", "evaluate"}


@dataclass
class Run:
    """The content of config.json, the evaluated steps (n,) and the mean return of each evaluation (n,)."""

    config: dict
    steps: np.ndarray
    returns: np.ndarray


def read_run(csv_path, config_path):
    """Return a Run, or exit with an error message."""
    try:
        with open(config_path) as file:
            config = json.load(file)
        with warnings.catch_warnings(action="ignore"):  # an empty file fails in the next line
            rows = np.loadtxt(csv_path, delimiter=",", skiprows=1, ndmin=2)
        steps, _, returns, _ = rows.T
        config["env_id"], config["exp_name"], config["seed"]
        config.setdefault("critics", 1)  # older scripts, without this flag, have one critic
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{csv_path}: cannot read the evaluations or the config.json of this run ({error})")
    evaluated = np.unique(steps)
    return Run(config, evaluated.astype(int), np.array([returns[steps == step].mean() for step in evaluated]))


def in_order(names, known):
    """Return the names sorted: the known ones in their order, then the others by name."""
    return sorted(names, key=lambda name: ([*known, name].index(name), name))


def differing(configs):
    """Return the flags that differ between the configs, apart from those that may differ between seeds."""
    return [key for key in sorted(set().union(*configs) - MAY_DIFFER) if len({str(config.get(key)) for config in configs}) > 1]


def read_data(*folders, last_step=np.inf):
    """Return {task: {script: [Run of each seed]}}, everything in order and up to last_step, or exit with an error message."""
    data = defaultdict(lambda: defaultdict(list))
    for folder in folders:
        paths = glob.glob(os.path.join(glob.escape(folder), "*.csv"))
        if not paths:
            sys.exit(f"{folder}: no evaluations found; collect some with python utils/collect.py runs/* --output {folder}")
        for path in paths:
            run = read_run(path, path[: -len("csv")] + "json")
            kept = run.steps <= last_step
            data[run.config["env_id"]][run.config["exp_name"]].append(Run(run.config, run.steps[kept], run.returns[kept]))
    for task, scripts in data.items():
        for script, runs in scripts.items():
            runs.sort(key=lambda run: run.config["seed"])
            seeds = [run.config["seed"] for run in runs]
            if len(set(seeds)) < len(seeds):
                sys.exit(f"{', '.join(folders)}: some seeds of {script} on {task} appear twice")
            for key in differing([run.config for run in runs]):
                values = ", ".join(sorted({str(run.config.get(key)) for run in runs}))
                sys.exit(f"{', '.join(folders)}: the seeds of {script} on {task} differ in {key} ({values}); separate them")
    return {task: {script: data[task][script] for script in in_order(data[task], LABELS)} for task in in_order(data, TASKS)}


def align(runs):
    """Return the steps (n,) that all runs have evaluated and the returns (runs, n) at these steps."""
    steps = sorted(set.intersection(*[set(run.steps.tolist()) for run in runs]))
    return np.array(steps), np.array([run.returns[np.isin(run.steps, steps)] for run in runs])


def interquartile_mean(values, axis=0):
    """Mean without the lowest and the highest quarter (Agarwal et al., 2021). With fewer than four values: the mean."""
    return stats.trim_mean(values, 0.25, axis=axis)


def bootstrap_interval(values, resamples=2_000):
    """Return the ends of the 95% percentile bootstrap interval of the interquartile mean along axis 0.

    With five or six values it covers the true value about 90% of the time. With fewer it covers it even less often, so the
    ends are nan.
    """
    if len(values) < 5:
        return np.full(np.shape(values)[1:], np.nan), np.full(np.shape(values)[1:], np.nan)
    options = {"n_resamples": resamples, "batch": 500, "method": "percentile", "confidence_level": 0.95, "rng": 0}
    return stats.bootstrap([values], interquartile_mean, axis=0, **options).confidence_interval


def t_interval(a, b=None):
    """Return the ends of the 95% t interval of mean(a), or by Welch of mean(a) - mean(b); nan where a sample has one value."""
    if min(len(sample) for sample in (a, b) if sample is not None) < 2:
        return np.nan, np.nan
    test = stats.ttest_1samp(a, 0) if b is None else stats.ttest_ind(a, b, equal_var=False)
    return test.confidence_interval(0.95)
