"""From run folders to data, figures and tables; the committed figures and README's tables from the committed data."""

import filecmp
import glob
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from evaluations import difference, interquartile_mean, interval, read_data, together
from figures import clipped_deviation
from scipy import stats

from tests.conftest import ROOT

DATA = os.path.join(ROOT, "results", "data")


def command(name, *args, **kwargs):
    words = [sys.executable, os.path.join(ROOT, "utils", name + ".py"), *args]
    return subprocess.run(words, capture_output=True, text=True, **kwargs)


def run_folder(folder, script="ddpg_continuous", seed=1, returns=((100.0, 300.0), (400.0, 600.0)), env_id="Hopper-v4"):
    """A run folder with two evaluations of two episodes, 5,000 steps apart."""
    os.makedirs(folder)
    with open(f"{folder}/config.json", "w") as file:
        json.dump({"env_id": env_id, "exp_name": script, "seed": seed, "provenance": [{"commit": "abc"}]}, file)
    rows = [f"{5000 * i},{j},{r},10\n" for i, episodes in enumerate(returns) for j, r in enumerate(episodes)]
    with open(f"{folder}/evaluations.csv", "w") as file:
        file.write("global_step,episode,episodic_return,episodic_length\n" + "".join(rows))
    return folder


def test_from_run_folders_to_figures_and_table():
    for seed, offset in [(1, 0.0), (2, 100.0), (3, 500.0)]:
        returns = np.array([[100.0, 300.0], [400.0, 600.0]])
        run_folder(f"runs/d{seed}", seed=seed, returns=returns + offset)
        run_folder(f"runs/s{seed}", "smoothie_continuous", seed, (returns + offset)[: 1 if seed == 3 else 2] - 1000)
    assert command("collect", *sorted(glob.glob("runs/*")), "--output", "data").returncode == 0
    assert filecmp.cmp("runs/d2/evaluations.csv", "data/Hopper-v4__ddpg_continuous__2.csv", shallow=False)
    assert filecmp.cmp("runs/d2/config.json", "data/Hopper-v4__ddpg_continuous__2.json", shallow=False)
    result = command("figures", "data", "--output", "pictures")
    assert result.returncode == 0, result.stderr
    names = [f"figure_{number}{version}.png" for number in (3, 4) for version in ("", "_iqm")]
    assert sorted(os.listdir("pictures")) == sorted(names)
    table = command("table", "data").stdout
    # DDPG's seeds: (200 + 500) / 2 + offset; Smoothie's third run stopped after its first evaluation, of 200 + 500 - 1000
    assert "| **DDPG** | 3 | 5k | 350, 450, 850 | 550 | 550 (350 to 850) |  | 1,000 |" in table
    assert "| **Smoothie** | 3 | 0k to 5k | -650, -550, -300 | -500 | -500 (-650 to -300) | -1,050 (" in table
    assert "| DDPG, CleanRL (v4, training return) | 3 | 1000k | | 1,577 ± 819 |" in table


def test_the_bold_line_ends_where_the_shortest_run_does():
    run_folder("runs/1", seed=1, returns=((1.0, 3.0), (5.0, 5.0), (6.0, 8.0)))
    run_folder("runs/2", seed=2, returns=((2.0, 2.0), (4.0, 8.0)))
    command("collect", "runs/1", "runs/2", "--output", "data")
    steps, returns = together(read_data("data")["Hopper-v4"]["ddpg_continuous"])
    assert steps.tolist() == [0, 5000] and returns.tolist() == [[2.0, 5.0], [2.0, 6.0]]


def test_nothing_collected_is_lost():
    first = run_folder("runs/first")
    longer = run_folder("runs/longer", returns=((100.0, 300.0), (400.0, 600.0), (7.0, 8.0)))
    other = run_folder("runs/other", returns=((1.0, 2.0), (3.0, 4.0)))
    result = command("collect", first, longer, "--output", "data")
    assert result.returncode == 1 and "are of one cell, Hopper-v4__ddpg_continuous__1" in result.stderr
    assert not os.path.exists("data")
    assert command("collect", first, "--output", "data").returncode == 0
    assert command("collect", longer, "--output", "data").returncode == 0
    for refused in (first, other):
        result = command("collect", refused, "--output", "data")
        assert result.returncode == 1 and "holds other evaluations" in result.stderr
    assert filecmp.cmp("data/Hopper-v4__ddpg_continuous__1.csv", f"{longer}/evaluations.csv", shallow=False)
    run_folder("runs/longest", returns=((100.0, 300.0), (400.0, 600.0), (7.0, 8.0), *[(9.0, 9.0)] * 99))
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))}  # as a disk that is full
    for path in ("data", "data/Hopper-v4__ddpg_continuous__1.csv"):
        result = command("collect", "runs/longest", "--output", path, **full)
        assert (
            result.returncode == 1 and result.stderr.startswith(f"{path}: cannot be written") and result.stderr.count("\n") == 1
        )
    assert filecmp.cmp("data/Hopper-v4__ddpg_continuous__1.csv", f"{longer}/evaluations.csv", shallow=False)
    result = command("figures", "data", "--output", "data/Hopper-v4__ddpg_continuous__1.csv")
    assert result.returncode == 1 and "cannot be written" in result.stderr and result.stderr.count("\n") == 1


def test_seeds_with_other_settings_are_not_averaged():
    for seed in (1, 2):
        with open(f"{run_folder(f'runs/{seed}', seed=seed)}/config.json", "r+") as file:
            config = json.load(file) | {"tau": 0.1 * seed, "compile": seed == 1}
            file.seek(0)
            json.dump(config, file)
    assert command("collect", "runs/1", "runs/2", "--output", "data").returncode == 0
    result = command("table", "data")
    assert result.returncode == 1 and "the seeds of ddpg_continuous on Hopper-v4 differ in tau (0.1, 0.2)" in result.stderr
    with open("data/Hopper-v4__ddpg_continuous__1.json", "w") as file:  # as of a version that had no such flag yet
        json.dump({key: value for key, value in config.items() if key != "tau"} | {"seed": 1}, file)
    assert "differ in tau (0.2, None)" in command("table", "data").stderr


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("collect", ["nowhere"], "nowhere/evaluations.csv: not the evaluations of a run"),
        ("collect", ["begun"], "begun/evaluations.csv: not the evaluations of a run"),
        ("collect", [], "no run folders were named"),
        ("figures", ["nowhere"], "nowhere: there are no evaluations here"),
        ("table", ["nowhere"], "nowhere: there are no evaluations here"),
    ],
)
def test_bad_input_gets_one_sentence(name, args, message):
    run_folder("begun", returns=())
    result = command(name, *args)
    assert result.returncode == 1 and result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert command(name, "--help").returncode == 0


def test_statistics():
    """The interquartile mean against its definition, the intervals against how often they hold the truth."""
    values = np.array([9.0, 1.0, 5.0, 3.0, 100.0, 4.0, 6.0, -50.0])
    assert interquartile_mean(values) == np.mean([3.0, 4.0, 5.0, 6.0])
    assert interquartile_mean(values[:3]) == 5.0
    rng = np.random.default_rng(0)
    a, b = rng.normal(10.0, 2.0, (12, 300)), rng.normal(4.0, 1.0, (12, 300))  # 300 experiments of twelve seeds each
    for (low, high), truth in [(interval(a), 10.0), (interval(a, b, statistic=difference), 6.0)]:
        assert 0.85 < np.mean((low < truth) & (truth < high)) < 0.98
    normal = 2 * stats.norm.ppf(0.975) * 2.0 / np.sqrt(12)
    assert np.mean(np.subtract(*interval(a)[::-1])) == pytest.approx(normal, rel=0.25)
    assert np.isnan(interval(a[:1])).all()


def test_the_deviation_is_clipped_to_the_seeds():
    returns = np.array([[0.0, 1.0], [0.0, 2.0], [9.0, 3.0]])
    mean, low, high = clipped_deviation(returns)
    assert np.allclose(mean, [3.0, 2.0])
    assert np.allclose(low, [0.0, 2.0 - np.sqrt(2 / 3)])  # 3 - 4.24 is under the lowest seed
    assert np.allclose(high, [3.0 + np.sqrt(18), 2.0 + np.sqrt(2 / 3)])


def test_committed_figures_and_tables_come_from_the_committed_data():
    assert command("figures", DATA, "--output", "pictures").returncode == 0
    for path in glob.glob("pictures/*.png"):
        assert filecmp.cmp(path, os.path.join(ROOT, "results", os.path.basename(path)), shallow=False), f"{path} is out of date"
    with open(os.path.join(ROOT, "README.md")) as file:
        readme = file.read()
    for line in command("table", DATA).stdout.splitlines():
        assert line in readme, f"README lacks {line!r}: paste what utils/table.py prints"


def test_committed_data_tell_their_versions():
    paths = glob.glob(os.path.join(DATA, "*.json"))
    for path in paths:
        with open(path) as file:
            config = json.load(file)
        for made_by in config["provenance"]:
            assert made_by["commit"] and not made_by["commit"].endswith("dirty"), path
            assert {"python", "torch", "gymnasium", "mujoco", "numpy"} <= made_by.keys()
    assert paths
