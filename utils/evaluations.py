"""The evaluations that collect.py gathered, and the statistics that figures.py and table.py make of them."""

import glob
import json
import os
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy import stats

LABELS = {"smoothie_continuous": "Smoothie", "smoothie_no_kl": "Smoothie without KL", "ddpg_continuous": "DDPG"}
TASKS = ["Swimmer-v4", "HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4"]
# Flags in which the seeds of one script may differ without making another experiment of it.
MAY_DIFFER = {"seed", "total_timesteps", "provenance", "cuda", "compile", "track", "wandb_project_name", "wandb_entity"}
MAY_DIFFER |= {"checkpoint_frequency", "save_model", "capture_video", "resume", "evaluate", "render"}


@dataclass
class Run:
    """The run of one cell: config.json, the steps (n,) evaluated and the returns (n,), each the mean over its episodes."""

    config: dict
    steps: np.ndarray
    returns: np.ndarray


def read_run(csv_path, config_path):
    """Return the Run that the two files hold, or exit with a sentence."""
    try:
        with open(config_path) as file:
            config = json.load(file)
        with warnings.catch_warnings(action="ignore"):  # no evaluation yet: the next line says so
            rows = np.loadtxt(csv_path, delimiter=",", skiprows=1, ndmin=2)
        steps, _, returns, _ = rows.T
        config["env_id"], config["exp_name"], config["seed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{csv_path}: not the evaluations of a run with its config beside them ({error})")
    evaluated = np.unique(steps)
    return Run(config, evaluated.astype(int), np.array([returns[steps == step].mean() for step in evaluated]))


def read_data(folder):
    """Return {task: {script: [Run of each seed, in order]}} of a folder that collect.py wrote, or exit with a sentence."""
    data = defaultdict(lambda: defaultdict(list))
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.csv"))):
        run = read_run(path, path[: -len("csv")] + "json")
        data[run.config["env_id"]][run.config["exp_name"]].append(run)
    if not data:
        sys.exit(f"{folder}: there are no evaluations here; python utils/collect.py runs/* --output {folder} puts some there")
    for task, scripts in data.items():
        for script, runs in scripts.items():
            runs.sort(key=lambda run: run.config["seed"])
            for key in set().union(*[run.config for run in runs]) - MAY_DIFFER:
                values = {str(run.config.get(key)) for run in runs}
                if len(values) > 1:
                    different = f"differ in {key} ({', '.join(sorted(values))})"
                    sys.exit(f"{folder}: the seeds of {script} on {task} {different}: keep them apart")
    return data


def together(runs):
    """Return the steps (n,) that every run has evaluated and the returns (runs, n) there."""
    steps = sorted(set.intersection(*[set(run.steps.tolist()) for run in runs]))
    return np.array(steps), np.array([run.returns[np.isin(run.steps, steps)] for run in runs])


def interquartile_mean(values, axis=0):
    """Mean of the middle half, a quarter cut at each end; with fewer than four values nothing is cut (Agarwal et al., 2021)."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(*samples, statistic=interquartile_mean, resamples=10_000):
    """Return the ends of a 95% percentile bootstrap interval over axis 0, each sample (one or more) resampled by itself.

    nan where a sample has a single value, which tells nothing about its spread.
    """
    if min(len(sample) for sample in samples) < 2:
        return np.full(np.shape(samples[0])[1:], np.nan), np.full(np.shape(samples[0])[1:], np.nan)
    result = stats.bootstrap(samples, statistic, axis=0, n_resamples=resamples, batch=500, method="percentile", rng=0)
    return result.confidence_interval


def difference(a, b, axis=0):
    """Interquartile mean of a minus that of b."""
    return interquartile_mean(a, axis) - interquartile_mean(b, axis)
