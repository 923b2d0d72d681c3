"""utils: the statistics, and from run folders to figures, tables and evaluations."""

import contextlib
import csv
import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import evaluate
import figures
import gymnasium as gym
import imageio.v2 as imageio
import noise
import noisy_tasks
import numpy as np
import pytest
import table
import torch
import value_estimates
from PIL import Image
from runs import (
    Run,
    bootstrap_interval,
    interquartile_mean,
    probability_of_improvement,
    ratio_interval,
    read_noise,
    read_published,
    read_runs,
    t_interval,
)
from scipy import stats

import ddpg_continuous
import smoothie_closed_form
import smoothie_continuous

ROOT = Path(__file__).parent.parent
DATA = ROOT / "results" / "data"
HEADER = "global_step,episode,episodic_return,episodic_length\n"
# Its rewards depend on the state and the action. Episodes end early, if far from the origin.
TASK = """
import gymnasium as gym
import numpy as np


class Drift(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-0.5, 2.0, (2,))
    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 10}
    dt = 0.05
    modes = []

    def __init__(self, render_mode=None, width=48, height=32):
        self.render_mode = render_mode
        self.modes.append(render_mode)
        self.shape = (height, width, 3)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.standard_normal(2).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        noise = self.np_random.standard_normal(2).astype(np.float32)
        self.obs = self.obs + 0.3 * action + 0.3 * noise
        far = bool(np.abs(self.obs).max() > 5)
        return self.obs, float(self.obs[0] - np.square(action).sum()), far, False, {}

    def render(self):
        return np.full(self.shape, 128 + 20 * self.obs[0], np.uint8)


gym.register("Drift-v0", entry_point=Drift, max_episode_steps=20)
gym.register("Unseen-v0", entry_point=lambda: Drift(), max_episode_steps=20)  # no render_mode
"""


def write_run(folder, returns, task="Hopper-v4", script="ddpg_continuous", seed=1, **flags):
    """Make a run folder, with two episodes every 5,000 steps, as many steps long as the seed."""
    folder = Path(folder, f"{task}__{script}__{seed}__{len(list(Path(folder).glob('*')))}")
    folder.mkdir(parents=True)
    config = {"env_id": task, "task": task, "exp_name": script, "seed": seed} | flags
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        f"{5000 * i},{episode},{value + offset},{seed}\n"
        for i, value in enumerate(returns)
        for episode, offset in enumerate((-1.0, 1.0))
    ]
    (folder / "evaluations.csv").write_text(HEADER + "".join(rows))
    return folder


def command_line(monkeypatch, capsys, name, *words):
    """Call python utils/name.py in this process. Return what it prints."""
    monkeypatch.setattr("sys.argv", [name, *map(str, words)])
    capsys.readouterr()
    runpy.run_path(str(ROOT / "utils" / name), run_name="__main__")
    return capsys.readouterr().out


def test_statistics_of_a_run():
    returns = np.array([1.0, 3, 2, 6, 6, 6, 6, 6, 5, 7, 9])
    run = Run({}, np.arange(0, 101, 10), returns, lengths=10 * returns)
    assert run.final_return() == 7.0, "the mean at the steps 80, 90 and 100"
    assert run.final_length() == 70.0
    assert run.area() == pytest.approx(57 / 11)
    assert run.swings() == pytest.approx((2 + 1 + 4 + 1 + 2 + 2) / 10 / (57 / 11))
    falling = Run({}, np.array([0, 10]), np.array([-1.0, -3.0]), np.ones(2))
    assert falling.swings() == 1.0
    assert math.isnan(Run({}, np.array([0]), np.array([5.0]), np.ones(1)).swings())


def test_interquartile_mean():
    samples = [np.array([9.0, 1.0, 5.0]), np.array([3.0, 100.0, 4.0, 6.0, -50.0])]
    assert interquartile_mean(samples) == np.mean([3.0, 4.0, 5.0, 6.0])


def test_probability_of_improvement():
    samples = [np.array([1.0, 3.0]), np.array([5.0])]
    others = [np.array([2.0, 3.0]), np.array([4.0])]
    first = (0 + 0 + 1 + 0.5) / 4  # 1 < 2, 1 < 3, 3 > 2, 3 = 3
    assert probability_of_improvement(samples, others) == pytest.approx((first + 1) / 2)


def test_bootstrap_interval():
    """It agrees with SciPy's, and draws the seeds of each task on their own."""
    rng = np.random.default_rng(0)
    sample = rng.normal(10.0, 2.0, 12)
    expected = stats.bootstrap(
        [sample],
        lambda values, axis: stats.trim_mean(values, 0.25, axis=axis),
        n_resamples=10_000,
        method="percentile",
        rng=1,
    ).confidence_interval
    ends = bootstrap_interval(interquartile_mean, [sample])
    assert np.allclose(ends, expected, atol=0.1 * np.ptp(expected))

    two_tasks = [np.zeros(3), np.ones(3)]
    assert bootstrap_interval(interquartile_mean, two_tasks).tolist() == [0.5, 0.5]
    better, worse = [np.array([3.0, 4.0, 5.0])], [np.array([0.0, 1.0, 2.0])]
    assert bootstrap_interval(probability_of_improvement, better, worse).tolist() == [1.0, 1.0]
    assert np.isnan(bootstrap_interval(interquartile_mean, [np.array([1.0, 2.0])])).all()


def test_t_interval():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])
    assert np.allclose(t_interval(a), 2 + 4.302653 / math.sqrt(3) * np.array([-1, 1]))
    error = math.sqrt(1 / 3 + 4 / 3)
    freedom = (1 / 3 + 4 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)  # Welch
    margin = stats.t.ppf(0.975, freedom) * error
    assert np.allclose(t_interval(a, b), [-2 - margin, -2 + margin])
    assert np.isnan(t_interval(a[:1])).all() and np.isnan(t_interval(a, b[:1])).all()


def test_ratio_interval():
    a, b = np.array([1.0, 3.0]), np.array([4.0, 6.0])  # means 2 and 5, both variances 2
    squares = np.array([2 / 2**2 / 2, 2 / 5**2 / 2])
    freedom = squares.sum() ** 2 / (squares**2).sum()
    factor = math.exp(stats.t.ppf(0.975, freedom) * math.sqrt(squares.sum()))
    assert np.allclose(ratio_interval([a], [b]), [0.4, 0.4 / factor, 0.4 * factor])

    ratio, low, high = ratio_interval([a, b], [b, 10 * a])
    assert ratio == pytest.approx(math.sqrt(2 / 5 * 5 / 20)), "a geometric mean"
    assert math.sqrt(low * high) == pytest.approx(ratio)


def test_ratio_interval_holds_the_truth():
    """In 95% of experiments with five seeds and a realistic spread, within 2%."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        _, low, high = ratio_interval([rng.normal(3.0, 0.9, 5)], [rng.normal(2.0, 0.4, 5)])
        held += low < 1.5 < high
    assert 930 <= held <= 970


def test_read_run_folders(tmp_path):
    write_run(tmp_path, [5.0, 7.0], task="Ant-v4", seed=2, script="closed_form_fixed_sigma")
    write_run(tmp_path, [1.0, 2.0, 4.0], task="Walker2d-v4", seed=2, critics=1, threads=4)
    write_run(tmp_path, [3.0, 6.0], task="Walker2d-v4", seed=1, critics=1)
    write_run(tmp_path, [0.0], task="my_module:Mine-v0", script="smoothie_continuous")

    data = read_runs([tmp_path])
    assert list(data) == ["Walker2d-v4", "Ant-v4", "my_module:Mine-v0"]
    assert list(data["Ant-v4"]) == ["closed_form_fixed_sigma"]
    first, second = data["Walker2d-v4"]["ddpg_continuous"]
    assert first.steps.tolist() == [0, 5000] and first.returns.tolist() == [3.0, 6.0]
    assert second.steps.tolist() == [0, 5000, 10000] and second.returns.tolist() == [1.0, 2.0, 4.0]
    assert second.lengths.tolist() == [2.0, 2.0, 2.0]
    early = read_runs([tmp_path], last_step=5000)["Walker2d-v4"]["ddpg_continuous"][1]
    assert early.returns.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seed": 1}, "ddpg_continuous on Hopper-v4: a seed appears twice"),
        ({"seed": 2, "tau": 0.2}, r"ddpg_continuous on Hopper-v4: .* differ in tau \(0.1, 0.2\)"),
    ],
)
def test_runs_that_must_not_be_averaged(tmp_path, flags, message):
    write_run(tmp_path, [1.0], seed=1, tau=0.1)
    write_run(tmp_path, [1.0], **({"tau": 0.1} | flags))
    with pytest.raises(SystemExit, match=message):
        read_runs([tmp_path])


def test_a_folder_without_runs(tmp_path):
    with pytest.raises(SystemExit, match="holds no run folders"):
        read_runs([tmp_path])


def test_committed_data_name_their_versions():
    paths = list((ROOT / "results").rglob("config.json"))
    assert paths
    for path in paths:
        config = json.loads(path.read_text())
        assert {"torch", "gymnasium", "mujoco", "numpy"} <= config["versions"].keys(), path


def test_published_rows():
    """Runs are compared with what others reach in no fewer steps."""
    for last_step, steps in [(700, 100_000), (300_000, 300_000), (300_001, 1_000_000)]:
        assert {row["steps"] for row in read_published(last_step)} == {str(steps)}
    assert {row["steps"] for row in read_published(3_000_000)} == {"1000000"}


def test_table(tmp_path, monkeypatch, capsys):
    for seed, value in [(1, 100.0), (2, 200.0), (3, 600.0)]:
        write_run(tmp_path, [0.0, 300.0, value], seed=seed)
        write_run(tmp_path, [0.0, 0.0, value + 500.0], script="smoothie_continuous", seed=seed)
    write_run(tmp_path, [0.0, 450.0], script="mine")
    lines = command_line(monkeypatch, capsys, "table.py", tmp_path).splitlines()

    # The last fifth is the last evaluation. Three seeds, standard deviation 264.58: the interval
    # is 4.3027 standard errors of 152.75 to each side, for the difference 2.7764 of 216.02.
    swings = [(300 + 200) / 2 / (400 / 3), (300 + 100) / 2 / (500 / 3), (300 + 300) / 2 / 300]
    row = "| **DDPG** | 3 | 10,000 | 300 ± 265 | -357 to 957 |  | 200 |"
    assert f"{row} {np.mean(swings):.0%} | 2 ± 1 |" in lines
    row = "| **Smoothie** | 3 | 10,000 | 800 ± 265 | 143 to 1,457 | +500 (-100 to +1,100) | 267 |"
    assert f"{row} 150% | 2 ± 1 |" in lines
    assert "| **mine** | 1 | 5,000 | 450 |  | +150 | 225 | 200% | 1 |" in lines
    (public,) = [line for line in lines if line.startswith("| TD3, sfujim/TD3 (v1, last fifth)")]
    assert public == (
        "| TD3, sfujim/TD3 (v1, last fifth) | 10 | 100,000 | 687 ± 513 |  |  | 360 | 28% |  |"
    )

    start = lines.index("### 5,000 to 10,000 steps, 1 to 3 seeds")
    header, _, smoothie, ddpg, mine, td3, author = lines[start + 4 : start + 11]
    relative = "interquartile mean of return / TD3's return (Tianshou)"
    assert header == f"|  | Hopper-v4 | {relative} | probability of a higher return than DDPG |"
    # 600, 700 and 1,100 against 100, 200 and 600: all pairs are higher but a tie
    assert re.fullmatch(
        r"\| \*\*Smoothie\*\* \| 800 ± 265 \| 1.46 \(.*\) \| 0.94 \(.*\) \|", smoothie
    )
    assert re.fullmatch(r"\| \*\*DDPG\*\* \| 300 ± 265 \| 0.55 \(.*\) \|  \|", ddpg)
    assert mine == "| **mine** | 450 | 0.82 | 0.67 |"  # with three seeds or one, the mean
    assert td3 == "| TD3, Tianshou (v3, 100,000 steps) | 549 ± 235 |  |  |"
    assert author == "| TD3, sfujim/TD3 (v1, 100,000 steps) | 687 ± 513 |  |  |"


def test_the_summary_compares_only_what_ran_on_every_task(tmp_path, monkeypatch, capsys):
    for task in ("Hopper-v4", "Ant-v4"):
        write_run(tmp_path, [0.0, 300.0], task)
    write_run(tmp_path, [0.0, 450.0], script="mine")
    lines = command_line(monkeypatch, capsys, "table.py", tmp_path).splitlines()
    assert "| **mine** | 450 |  |  |  |" in lines
    words = ["table.py", tmp_path, "--tasks", "Hopper-v4"]
    lines = command_line(monkeypatch, capsys, *words).splitlines()
    assert "| **mine** | 450 | 0.82 | 1.00 |" in lines and "### Ant-v4" not in lines
    with pytest.raises(SystemExit, match="--tasks Humanoid-v4: there are no runs of it"):
        command_line(monkeypatch, capsys, *words, "Humanoid-v4")


def test_the_summary_pools_only_as_many_seeds_on_every_task(tmp_path, monkeypatch, capsys):
    for task, seed in [("Hopper-v4", 1), ("Hopper-v4", 2), ("Ant-v4", 1)]:
        write_run(tmp_path, [100.0 * seed], task, seed=seed)
        write_run(tmp_path, [100.0 * seed], task, script="smoothie_continuous", seed=seed)
    lines = command_line(monkeypatch, capsys, "table.py", tmp_path).splitlines()
    assert "| **Smoothie** | 150 ± 71 | 100 |  | 0.50 |" in lines
    write_run(tmp_path, [200.0], "Ant-v4", script="smoothie_continuous", seed=2)
    lines = command_line(monkeypatch, capsys, "table.py", tmp_path).splitlines()
    returns = [100 / 549, 200 / 549, 100 / 853, 200 / 853]  # over those of TD3 by Tianshou
    row = "| **Smoothie** | 150 ± 71 | 150 ± 71 | {:.2f} | 0.62 |"
    assert row.format(np.mean(sorted(returns)[1:3])) in lines


def test_only_v4_tasks_have_published_returns(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, [300.0], "Hopper-v5")
    lines = command_line(monkeypatch, capsys, "table.py", tmp_path).splitlines()
    assert lines[4] == "|  | Hopper-v5 | probability of a higher return than DDPG |"
    assert lines[6:8] == ["| **DDPG** | 300 |  |", ""]
    assert lines[-2] == "| **DDPG** | 1 | 0 | 300 |  |  | 300 |  | 1 |"


def trailing_mean(values):
    return [np.mean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]


def curve_of(path):
    """Return the steps of a run and the smoothed mean of the episodes at each."""
    episodes = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            step = int(row["global_step"])
            episodes.setdefault(step, []).append(float(row["episodic_return"]))
    curve = trailing_mean([np.mean(returns) for returns in episodes.values()])
    return np.array(list(episodes)), np.array(curve)


def test_the_figures_show_the_committed_data():
    data = read_runs([DATA])
    figure = figures.learning_curves(data)
    colors = figures.choose_colors(data)
    assert len(set(colors.values())) == len(colors)
    assert len(figure.axes) == len(data)
    checked = 0
    for axis, (task, scripts) in zip(figure.axes, data.items(), strict=True):
        assert axis.get_title().startswith(task)
        for name, color in colors.items():
            curves = []
            for path in sorted(DATA.glob(f"{task}__{name}__*/evaluations.csv")):
                curves.append(curve_of(path))
            assert len(curves) == len(scripts.get(name, []))
            drawn = [line for line in axis.get_lines() if line.get_color() == color]
            thin = [line for line in drawn if line.get_linewidth() < 1]
            for line, (steps, values) in zip(thin, curves, strict=True):
                assert np.allclose(line.get_xdata() * 1e6, steps)
                assert np.allclose(line.get_ydata(), values)
            if curves:
                (bold,) = [line for line in drawn if line.get_linewidth() >= 2]
                shortest = min(len(values) for _, values in curves)
                assert np.allclose(
                    bold.get_ydata(), np.mean([values[:shortest] for _, values in curves], 0)
                )
                checked += 1
        public = [row for row in read_published(figures.longest(data)) if row["algorithm"] == "TD3"]
        for source, style in [("Tianshou", "--"), ("sfujim/TD3", "-.")]:
            expected = [
                [float(row["return"])] * 2
                for row in public
                if row["source"] == source and task.startswith(row["task"] + "-")
            ]
            lines = [line for line in axis.get_lines() if line.get_linestyle() == style]
            assert [line.get_ydata() for line in lines] == expected
    assert checked == sum(map(len, data.values()))


def test_ratios(tmp_path, monkeypatch, capsys):
    for seed, value in [(1, 1.0), (2, 3.0)]:
        write_run(tmp_path, [value], seed=seed)
        write_run(tmp_path, [3 * value], script="smoothie_continuous", seed=seed)
        write_run(tmp_path, [value], task="Ant-v4", seed=seed)
        write_run(tmp_path, [value - 9], task="Ant-v4", script="smoothie_continuous", seed=seed)
        write_run(tmp_path, [value], task="Ant-v4", script="smoothie_no_kl", seed=seed)
    write_run(tmp_path, [1.0], script="smoothie_no_kl")

    rows = figures.ratio_rows(read_runs([tmp_path]), "ddpg_continuous")
    assert list(rows) == ["smoothie_continuous", "smoothie_no_kl"]
    expected = ratio_interval([np.array([3.0, 9.0])], [np.array([1.0, 3.0])])
    assert np.array_equal(rows["smoothie_continuous"]["Hopper-v4"], expected)
    assert np.isnan(rows["smoothie_continuous"]["Ant-v4"]).all(), "a negative mean"
    assert np.isnan(rows["smoothie_continuous"]["all tasks"]).all()
    assert list(rows["smoothie_no_kl"]) == ["Ant-v4"], "one seed on Hopper-v4"

    figure = figures.ratios(read_runs([tmp_path]), "ddpg_continuous")
    (axis,) = figure.axes
    points = [line.get_xdata().item() for line in axis.get_lines() if line.get_marker() == "o"]
    assert [point for point in points if point > 0] == pytest.approx([3.0, 1.0])

    command_line(monkeypatch, capsys, "figures.py", tmp_path, "--output", tmp_path / "pictures")
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["learning_curves.png", "ratios.png"]
    alone = read_runs([write_run(tmp_path / "alone", [1.0]).parent])
    assert figures.ratios(alone, "ddpg_continuous") is None


@pytest.fixture(scope="module", params=[smoothie_continuous, smoothie_closed_form, ddpg_continuous])
def trained(request, tmp_path_factory):
    """A short run. Return the folder that its task is in and the run folder."""
    script = request.param
    folder = tmp_path_factory.mktemp(script.__name__)
    (folder / "my_task.py").write_text(TASK)
    args = script.Args(
        env_id="my_task:Drift-v0",
        total_timesteps=150,
        learning_starts=50,
        batch_size=16,
        buffer_size=1000,
        eval_frequency=60,
        eval_episodes=4,
        compile=False,
        run_dir=str(folder / "run"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder, script.main(args)


def without(run_dir, name, folder):
    """Copy a run's folder, but for the file of that name and what evaluations do not need."""
    folder.mkdir()
    for path in [run_dir / "policy.pt", run_dir / "config.json", *run_dir.glob("*.py")]:
        if path.name != name:
            shutil.copy(path, folder)
    return folder


def last_evaluation(run_dir):
    """Return (return, length) of the episodes, as strings."""
    lines = (run_dir / "evaluations.csv").read_text().splitlines()[1:]
    last_step = lines[-1].split(",")[0]
    return [tuple(line.split(",")[2:]) for line in lines if line.startswith(f"{last_step},")]


def test_evaluate_repeats_the_last_evaluation(trained, monkeypatch, capsys):
    folder, run_dir = trained
    alone = without(run_dir, None, folder / "alone")
    expected = last_evaluation(run_dir)
    assert len({length for _, length in expected}) > 1, "some episodes end early"
    results = evaluate.main(evaluate.Args(alone))
    assert [(str(value), str(length)) for value, length in results] == expected

    monkeypatch.chdir(folder)  # which --env-id my_task:Drift-v0 is looked for in
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(folder)])
    monkeypatch.delitem(sys.modules, "my_task")
    output = command_line(monkeypatch, capsys, "evaluate.py", "alone")
    for i, (value, length) in enumerate(expected):
        assert f"episode {i}: return {float(value):.2f}, length {length}\n" in output


@pytest.mark.parametrize("task", ["Ant-v4", "HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"])
def test_the_policies_return_what_their_runs_did(task):
    """Rounded to 16 bits, each returns what its run did in its last fifth, but for a fall."""
    folder = ROOT / "policies" / task
    assert sum(path.stat().st_size for path in folder.iterdir()) < 400_000
    run_id = json.loads((folder / "config.json").read_text())["run_id"]
    configs = (ROOT / "results").rglob("config.json")
    (run_dir,) = [path.parent for path in configs if run_id in path.read_text()]
    rows = np.loadtxt(run_dir / "evaluations.csv", delimiter=",", skiprows=1)
    last_fifth = rows[rows[:, 0] >= 0.8 * rows[-1, 0], 2]
    results = evaluate.main(evaluate.Args(folder, episodes=2))
    mean_return, _ = np.mean(results, 0)
    assert 0.5 * last_fifth.mean() < mean_return < last_fifth.max()


def test_evaluate_with_noise_and_video(trained, tmp_path):
    _, run_dir = trained
    args = evaluate.Args(run_dir, episodes=2, noise=0.2, video=tmp_path / "films" / "first.mp4")
    results = evaluate.main(args)
    assert len(results) == 2
    assert results != evaluate.main(evaluate.Args(run_dir, episodes=2))
    assert results == evaluate.main(evaluate.Args(run_dir, episodes=2, noise=0.2)), "seeded"
    frames = imageio.get_reader(tmp_path / "films" / "first.mp4").count_frames()
    assert frames == results[0][1] + 1
    with pytest.raises(SystemExit, match="--video and --watch exclude each other"):
        evaluate.main(evaluate.Args(run_dir, video=tmp_path / "second.mp4", watch=True))


def test_returns_under_noise(trained, monkeypatch, capsys):
    """Those of evaluate.py with the same noise."""
    folder, run_dir = trained
    monkeypatch.chdir(folder)
    output = command_line(monkeypatch, capsys, "noise.py", run_dir, "--episodes", "3")
    rows = list(csv.DictReader(output.splitlines()))
    assert [float(row["noise"]) for row in rows] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    returns = []
    for row in rows:
        assert (row["task"], row["seed"]) == ("Drift-v0", "1")
        args = evaluate.Args(run_dir, episodes=3, noise=float(row["noise"]))
        mean_return, _ = np.mean(evaluate.main(args), 0)
        returns.append(mean_return)
    assert [float(row["return"]) for row in rows] == returns and len(set(returns)) == 6


def test_runs_that_have_not_finished_are_left_out(trained, tmp_path, monkeypatch, capsys):
    folder, run_dir = trained
    monkeypatch.chdir(folder)
    half = without(run_dir, "checkpoint.pt", tmp_path / "half")
    rows = (run_dir / "evaluations.csv").read_text().splitlines()
    (half / "evaluations.csv").write_text("\n".join(rows[:-4]))  # less the last evaluation
    assert command_line(monkeypatch, capsys, "noise.py", half) == ",".join(noise.COLUMNS) + "\r\n"
    assert len(command_line(monkeypatch, capsys, "value_estimates.py", half).splitlines()) == 2


def test_the_figure_of_returns_under_noise(tmp_path, monkeypatch, capsys):
    path = tmp_path / "noise.csv"
    rows = [
        ("Ant-v4", "ddpg_continuous", seed, std, seed - std) for seed in (1, 4) for std in (0, 0.1)
    ]
    rows += [("Ant-v4", "mine", 1, 0, 7.0), ("Hopper-v4", "mine", 1, 0, 8.0)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([noise.COLUMNS, *rows])
    data = read_noise(path)
    assert list(data) == ["Hopper-v4", "Ant-v4"] and list(data["Ant-v4"]) == [
        "ddpg_continuous",
        "mine",
    ]

    figure = figures.returns_under_noise(data)
    colors = figures.choose_colors(data)
    _, axis = figure.axes
    assert axis.get_title() == "Ant-v4 (seeds: 1 to 2)"
    ddpg, mine = axis.containers
    line, _, (bars,) = ddpg
    assert line.get_color() == colors["ddpg_continuous"]
    assert line.get_xydata() == pytest.approx(np.array([[-0.004, 2.5], [0.096, 2.4]]))
    low, high = t_interval(np.array([0.9, 3.9]))
    assert bars.get_segments()[1] == pytest.approx(np.array([[0.096, low], [0.096, high]]))
    assert mine[0].get_xydata().tolist() == [[0.004, 7.0]]
    assert low < axis.get_ylim()[0] <= 0.0 and 7.0 < axis.get_ylim()[1] < high

    folder = write_run(tmp_path / "runs", [1.0]).parent
    words = ["--noise", path, "--output", tmp_path / "pictures"]
    command_line(monkeypatch, capsys, "figures.py", folder, *words)
    assert (tmp_path / "pictures" / "noise.png").exists()


def test_the_table_of_returns_under_noise(tmp_path, monkeypatch, capsys):
    path = tmp_path / "noise.csv"
    values = {1: (100.0, 10.0), 2: (200.0, 20.0), 3: (600.0, 60.0)}
    rows = [
        ("Ant-v4", script, seed, std, value + extra)
        for script, extra in [("ddpg_continuous", 0.0), ("smoothie_continuous", 500.0)]
        for seed, pair in values.items()
        for std, value in zip((0.0, 0.1), pair, strict=True)
    ]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([noise.COLUMNS, *rows])
    folder = write_run(tmp_path / "runs", [1.0, 2.0]).parent
    lines = command_line(monkeypatch, capsys, "table.py", folder, "--noise", path).splitlines()
    start = lines.index("### Ant-v4, by the standard deviation of noise on the actions")
    assert lines[start + 2] == "|  | seeds | 0 | 0.1 |"
    # Standard deviations 264.58 and 26.46: the interval is 2.7764 errors of 216.02 or 21.60.
    assert lines[start + 4 : start + 7] == [
        "| **Smoothie** | 3 | 800 ± 265 | 530 ± 26 |",
        "| minus DDPG, 95% interval |  | +500 (-100 to +1,100) | +500 (+440 to +560) |",
        "| **DDPG** | 3 | 300 ± 265 | 30 ± 26 |",
    ]


def test_evaluate_in_a_window_and_without_the_runs_own_script(trained, tmp_path):
    _, run_dir = trained
    script = json.loads((run_dir / "config.json").read_text())["script"]
    bare = without(run_dir, script, tmp_path / "bare")
    assert not (bare / script).exists()
    results = evaluate.main(evaluate.Args(bare, watch=True))
    assert gym.spec("Drift-v0").entry_point.modes[-1] == "human"
    assert results == evaluate.main(evaluate.Args(run_dir))
    config = (bare / "config.json").read_text()
    (bare / "config.json").write_text(config.replace("Drift-v0", "Unseen-v0"))
    assert results == evaluate.main(evaluate.Args(bare))


@pytest.mark.parametrize("rate", [10, 50])
def test_film(trained, tmp_path, monkeypatch, capsys, rate):
    """In real time, from the start of the first evaluation episode. A step takes 0.05 seconds."""
    folder, run_dir = trained
    output = tmp_path / "film.webp"
    task = gym.spec("Drift-v0").entry_point
    task_step = task.step
    steps = []

    def step(env, action):
        steps.append(action)
        return task_step(env, action)

    monkeypatch.setattr(task, "step", step)
    flags = ["--seconds", "1.5", "--frames-per-second", rate, "--size", "32", "--output", output]
    monkeypatch.chdir(folder)
    command_line(monkeypatch, capsys, "film.py", run_dir, run_dir, *flags)
    assert len(steps) == pytest.approx(2 * 1.5 * 20, abs=2), "two films"
    env = gym.make("Drift-v0")
    obs, _ = env.reset(seed=1_000)
    with Image.open(output) as picture:
        assert picture.size == (64, 32)
        brightness = np.asarray(picture.convert("L"), float)
        milliseconds = 0
        for i in range(picture.n_frames):  # equal frames are one
            picture.seek(i)
            picture.load()
            milliseconds += picture.info["duration"]
        assert milliseconds == 1500 and picture.n_frames > 1
    assert brightness == pytest.approx(np.full((32, 64), 128 + 20 * obs[0]), abs=4)


def test_the_camera_follows_the_robot():
    """The models' own camera does; the free one, id -1, stays behind."""
    with contextlib.closing(ddpg_continuous.make_env("Hopper-v4", render_mode="rgb_array")) as env:
        renderer = env.unwrapped.mujoco_renderer
        assert renderer.model.camera(renderer.camera_id).name == "track"


class Receiver(gym.Env):
    """Keeps the actions."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self):
        self.actions = []

    def step(self, action):
        self.actions.append(action)
        return np.zeros(1), 0.0, False, False, {}


def test_noise_has_the_standard_deviation():
    env = evaluate.add_noise(Receiver(), 0.2, seed=1)
    mean = np.array([0.5, -0.9], np.float32)
    for _ in range(4000):
        env.step(mean)
    noise = np.array(env.unwrapped.actions) - mean
    assert np.allclose(noise.std(0), 0.2, rtol=0.04)
    assert np.allclose(noise.mean(0), 0.0, atol=0.01)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.05


def test_noisy_tasks(monkeypatch):
    """Actuators add clipped noise, another for each seed; without it the task is the original."""
    received = Receiver()
    received.np_random = np.random.default_rng(1)
    env = noisy_tasks.NoisyActions(received)
    mean = np.array([0.0, 0.9], np.float32)
    for _ in range(4000):
        env.step(mean)
    actions = np.array(received.actions)
    assert np.isclose(actions[:, 0].std(), 0.3, rtol=0.04)
    assert np.isclose(actions[:, 0].mean(), 0.0, atol=0.02)
    assert np.isclose(np.mean(actions[:, 1] == 1.0), 0.369, atol=0.03)  # P(N(0, 1) > 1 / 3)
    assert actions.max() <= 1.0 and actions.min() >= -1.0

    def rewards(task, seed):
        env = gym.make(task)
        env.reset(seed=seed)
        episode = [env.step(np.zeros(3, np.float32)) for _ in range(20)]
        return [reward for _, reward, *_ in episode]

    assert rewards("NoisyHopper-v4", 1) == rewards("NoisyHopper-v4", 1)
    assert rewards("NoisyHopper-v4", 1) != rewards("NoisyHopper-v4", 2)
    assert rewards("NoisyHopper-v4", 1) != rewards("Hopper-v4", 1)
    monkeypatch.setattr(noisy_tasks, "STD", 0.0)
    assert rewards("NoisyHopper-v4", 1) == rewards("Hopper-v4", 1)


def test_evaluate_without_a_run(tmp_path):
    with pytest.raises(SystemExit, match="holds no run"):
        evaluate.main(evaluate.Args(tmp_path))


def test_discounted_sums():
    assert value_estimates.discounted_sums([1.0, 2.0, 3.0], 0.5, 4.0) == [3.25, 4.5, 5.0]


class Ones:
    """Rewards of 1. Episodes end in turn by a termination (5 steps) and by a time limit (7)."""

    def __init__(self):
        self.episode = -1
        self.states = []  # that an action was taken in
        self.actions = []
        self.seeds = []

    def reset(self, seed):
        self.rng = np.random.default_rng(seed)
        self.seeds.append(seed)
        self.episode += 1
        self.count = 0
        self.obs = self.rng.standard_normal(3).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        self.states.append(self.obs)
        self.actions.append(action)
        self.obs = self.rng.standard_normal(3).astype(np.float32)
        self.count += 1
        terminated = self.episode % 2 == 0 and self.count == 5
        return self.obs, 1.0, terminated, self.count == 7, {}


@pytest.mark.parametrize("module", [smoothie_continuous, smoothie_closed_form, ddpg_continuous])
def test_value_estimates(module):
    """`expected` is the value of the policy, smoothed for Smoothie; `actual` has a closed form."""
    torch.manual_seed(0)
    args = module.Args(seed=3, gamma=0.9)
    is_ddpg = module is ddpg_continuous
    agent = (module.DDPG if is_ddpg else module.Smoothie)(3, 2, args)
    with torch.no_grad():
        agent.qfs[0].fc_q.weight.abs_().mul_(5)  # so that the value depends on state and action
        agent.qfs[0].fc2.weight[:, -2:].mul_(100)
        agent.actor.fc_mean.weight.mul_(50)
        if not is_ddpg:
            agent.actor.log_var.copy_(torch.tensor([-2.0, -1.0]))
    env = Ones()
    returns, actual, in_states = value_estimates.compare(args, env, agent, 20)
    assert env.seeds == list(range(3_000, 3_020)), "the starts of the run's evaluations"
    assert returns.tolist() == 10 * [5, 7]

    states = torch.tensor(np.array(env.states))
    with torch.no_grad():
        output = agent.actor(states)
        mean = output if is_ddpg else output[0]
        std = torch.zeros(2) if is_ddpg else torch.tensor([-1.0, -0.5]).exp()
        values = agent.qfs[0](states, mean)
        error = 1e-4
        if module is smoothie_closed_form:  # its critic is not smoothed: so average over actions
            noisy = [mean + std * torch.randn_like(mean) for _ in range(500)]
            samples = torch.stack([agent.qfs[0](states, actions) for actions in noisy])
            error = 5 * samples.std(0) / math.sqrt(len(samples))
            assert ((values - samples.mean(0)).abs() > error).any(), "smoothing matters"
            values = samples.mean(0)
        assert ((torch.tensor(in_states["expected"]) - values).abs() < error).all()
        assert values.std() > 0.1
        slopes = []
        for qf in agent.qfs:
            if module is smoothie_closed_form:
                slopes.append(qf.smoothed(states, mean, agent.actor.log_var)[1])
            elif is_ddpg:
                slopes.append(qf.action_gradient(states, mean))
            else:
                slopes.append(qf.action_derivatives(states, mean)[0])
        products = (slopes[0] * slopes[1]).sum(1)
        lengths = slopes[0].norm(dim=1) * slopes[1].norm(dim=1)
        assert np.allclose(in_states["cosine"], products / lengths, atol=1e-4)
        assert -0.99 < in_states["cosine"].mean() < 0.99
        if module is smoothie_closed_form:
            without_noise = torch.full((2,), -80.0)
            plain = agent.qfs[0].smoothed(states, mean, without_noise)[1]
            smoothing = torch.cosine_similarity(slopes[0], plain)
            assert np.allclose(in_states["smoothing"], smoothing, atol=1e-4)
            assert 0 < smoothing.mean() < 0.998
        else:
            assert np.allclose(in_states["smoothing"], 1.0)
        last = torch.tensor(env.obs)[None]
        last_action = agent.actor(last) if is_ddpg else agent.actor(last)[0]

    noise = np.array(env.actions) - mean.numpy()
    assert np.allclose(noise.std(0), std, rtol=0.2, atol=1e-6)
    assert np.allclose(in_states["std"], np.tile(std, (len(states), 1)))
    assert np.allclose(in_states["mean"], mean, atol=1e-5)
    assert np.allclose(in_states["saturated"], (mean.abs() > 0.97).float().mean(1))
    assert 0 < in_states["saturated"].mean() < 1

    # Five rewards after a start, then nothing; seven, then the critic's own value.
    assert np.allclose(actual[:5], (1 - 0.9 ** np.arange(5, 0, -1)) / 0.1)
    left = np.arange(7, 0, -1)
    if module is smoothie_closed_form:
        final = agent.qfs[0].smoothed(last, last_action, agent.actor.log_var)[0].item()
    else:
        final = agent.qfs[0](last, last_action).item()
    assert np.allclose(actual[-7:], (1 - 0.9**left) / 0.1 + 0.9**left * final)


def test_value_estimates_of_a_run(trained, capsys):
    _, run_dir = trained
    _, _, agent, step = value_estimates.load(run_dir)
    policy = torch.load(run_dir / "policy.pt", weights_only=True)
    assert all(torch.equal(value, policy[key]) for key, value in agent.actor.state_dict().items())
    value_estimates.main(value_estimates.Args((run_dir,)))
    row = capsys.readouterr().out.splitlines()[-1]
    label = table.LABELS[next(run_dir.glob("*.py")).stem]
    assert step == 150 and row.startswith(f"| my_task:Drift-v0 | {label} | 1 | 150 | ")
    sigma = "" if label == "DDPG" else "0.20 to 0.20"
    assert row.split("|")[-5].strip() == sigma
    assert (row.split("|")[-2].strip() != "") == (label == "Smoothie in closed form")
