"""utils: from run folders to data, figures and tables, and the committed results."""

import csv
import dataclasses
import filecmp
import glob
import importlib
import json
import os
import re
import resource
import runpy
from collections import defaultdict

import collect
import figures
import numpy as np
import pytest
import table
import torch
import value_estimates
from evaluations import LABELS, align, bootstrap_interval, interquartile_mean, read_data, read_run, t_interval
from scipy import stats

import ddpg_continuous
import smoothie_closed_form
from tests.conftest import ROOT, run

DATA = os.path.join(ROOT, "results", "data")
MORE_DATA = os.path.join(ROOT, "results", "data_more_seeds")
LONG_DATA = os.path.join(ROOT, "results", "data_million")


def collect_runs(*run_dirs, output="data"):
    collect.main(collect.Args(run_dirs, output))


def print_table(capsys, *data, **options):
    capsys.readouterr()
    table.main(table.Args(data or ("data",), **options))
    return capsys.readouterr().out


def run_folder(folder, script="ddpg_continuous", seed=1, returns=((100.0, 300.0), (400.0, 600.0)), env_id="Hopper-v4", **flags):
    """Make a run folder: evaluations of two episodes each, 5,000 steps apart."""
    os.makedirs(folder)
    config = {"env_id": env_id, "exp_name": script, "seed": seed, "provenance": [{"commit": "abc"}]} | flags
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config, file)
    rows = [f"{5000 * i},{j},{r},10\n" for i, episodes in enumerate(returns) for j, r in enumerate(episodes)]
    with open(f"{folder}/evaluations.csv", "w") as file:
        file.write("global_step,episode,episodic_return,episodic_length\n" + "".join(rows))
    return folder


def test_from_run_folders_to_figures_and_table(capsys):
    for seed, offset in [(1, 0.0), (2, 100.0), (3, 500.0)]:
        returns = np.array([[100.0, 300.0], [400.0, 600.0]])
        run_folder(f"runs/d{seed}", seed=seed, returns=returns + offset)
        run_folder(f"runs/s{seed}", "smoothie_continuous", seed, (returns + offset)[: 1 if seed == 3 else 2] - 1000)
    run_folder("runs/n1", "smoothie_no_kl")
    collect_runs(*glob.glob("runs/*"))
    assert filecmp.cmp("runs/d2/evaluations.csv", "data/Hopper-v4__ddpg_continuous__2.csv", shallow=False)
    assert filecmp.cmp("runs/d2/config.json", "data/Hopper-v4__ddpg_continuous__2.json", shallow=False)
    figures.main(figures.Args("data", "pictures"))
    names = [f"figure_{number}{version}.png" for number in (3, 4) for version in ("", "_iqm")]
    assert sorted(os.listdir("pictures")) == sorted(names)
    text = print_table(capsys)
    # DDPG: (200 + 500) / 2 + offset; Smoothie's third run stopped after its first evaluation: 200 + 500 - 1000.
    # With three seeds an interval extends 4.3027 standard errors to each side; they are 152.75 and 104.08.
    assert "| **DDPG** | 3 | 5k | 350, 450, 850 | 550 (-107 to 1,207) | 550 |  | 1,000 |" in text
    assert "| **Smoothie** | 3 | 0k to 5k | -650, -550, -300 | -500 (-948 to -52) | -500 | -1,050 (" in text
    assert "| **Smoothie without KL** | 1 | 5k | 350 | 350 | 350 | -200 | 500 |" in text
    assert "| DDPG, CleanRL (v4, training return) | 3 | 1000k | | 1,577 ± 819 |" in text


def test_the_figures_show_whatever_was_measured(capsys):
    cells = [("Hopper-v4", script) for script in ("ddpg_continuous", "smoothie_closed_form", "smoothie_continuous", "sac")]
    cells += [("Swimmer-v4", "smoothie_no_kl"), ("Swimmer-v4", "smoothie_continuous"), ("Pendulum-v1", "ddpg_continuous")]
    cells += [("Acrobot-v9", "smoothie_no_kl"), ("Pendulum-v1", "ppo")]
    for i, (task, script) in enumerate(cells):
        run_folder(f"runs/{i}", script, env_id=task)
    collect_runs(*glob.glob("runs/*"))
    data = read_data("data")
    drawn = {name: [(task, *scripts) for task, scripts in panels.items()] for name, panels in figures.select(data).items()}
    assert drawn["figure_3"] == [
        ("Swimmer-v4", "smoothie_continuous"),
        ("Hopper-v4", "smoothie_continuous", "smoothie_closed_form", "ddpg_continuous", "sac"),
        ("Pendulum-v1", "ddpg_continuous", "ppo"),
    ]
    assert drawn["figure_4"] == [("Swimmer-v4", "smoothie_continuous", "smoothie_no_kl"), ("Acrobot-v9", "smoothie_no_kl")]

    styles = figures.line_styles(data)
    labels = {"figure_3": ["Smoothie", "Smoothie in closed form", "DDPG", "ppo", "sac"]}
    labels["figure_4"] = ["Smoothie", "Smoothie without KL"]
    colors = {}
    for name, panels in figures.select(data).items():
        figure = figures.draw(panels, styles, figures.mean_and_clipped_deviation, show_seeds=False)
        assert [axis.get_title() for axis in figure.axes] == [f"{task} (seeds: 1)" for task in panels]
        legend = figure.legends[0]
        assert [text.get_text() for text in legend.texts] == labels[name]
        for line, label in zip(legend.get_lines(), labels[name], strict=True):
            assert colors.setdefault(label, line.get_color()) == line.get_color(), "the same colour in both figures"
        figures.plt.close(figure)
    assert len(set(colors.values())) == 6
    rows = [line.split("|")[1].strip(" *") for line in print_table(capsys).splitlines() if line.startswith("| **")]
    assert rows == ["Smoothie", "Smoothie without KL", *labels["figure_3"][:3], "sac", "Smoothie without KL", "DDPG", "ppo"]


def test_many_other_scripts_look_different():
    styles = figures.line_styles({"Hopper-v4": [f"variant_{i}" for i in range(12)]})
    assert len({tuple(style.values()) for style in styles.values()}) == 12


def test_the_bold_line_ends_with_the_shortest_run():
    run_folder("runs/1", seed=1, returns=((1.0, 3.0), (5.0, 5.0), (6.0, 8.0)))
    run_folder("runs/2", seed=2, returns=((2.0, 2.0), (4.0, 8.0)))
    collect_runs("runs/1", "runs/2")
    steps, returns = align(read_data("data")["Hopper-v4"]["ddpg_continuous"])
    assert steps.tolist() == [0, 5000] and returns.tolist() == [[2.0, 5.0], [2.0, 6.0]]


def test_runs_of_different_lengths_are_compared_up_to_the_same_step(capsys):
    collect_runs(run_folder("runs/1", seed=1, returns=((1.0, 3.0), (4.0, 6.0), (70.0, 90.0))), output="data")
    collect_runs(run_folder("runs/2", seed=2, returns=((2.0, 4.0), (7.0, 9.0))), output="more")
    rows = [line for line in print_table(capsys, "data", "more", last_step=5000).splitlines() if line.startswith("| **")]
    assert [cell.strip() for cell in rows[0].split("|")[2:5]] == ["2", "5k", "4, 6"] and len(rows) == 1
    with pytest.raises(SystemExit, match="some seeds of ddpg_continuous on Hopper-v4 appear twice"):
        print_table(capsys, "data", "more", "data")


def test_no_collected_data_is_lost():
    first = run_folder("runs/first")
    longer = run_folder("runs/longer", returns=((100.0, 300.0), (400.0, 600.0), (7.0, 8.0)))
    other = run_folder("runs/other", returns=((1.0, 2.0), (3.0, 4.0)))
    with pytest.raises(SystemExit, match="are both Hopper-v4__ddpg_continuous__1"):
        collect_runs(first, longer)
    assert not os.path.exists("data")
    collect_runs(first)
    collect_runs(longer)
    for refused in (first, other):
        with pytest.raises(SystemExit, match="holds evaluations that"):
            collect_runs(refused)
    with pytest.raises(SystemExit, match=r"other flags than runs/flags/evaluations.csv \(tau\)"):  # though it begins alike
        collect_runs(run_folder("runs/flags", returns=((100.0, 300.0), (400.0, 600.0), (7.0, 8.0), (9.0, 9.0)), tau=0.1))
    longest = run_folder("runs/longest", returns=((100.0, 300.0), (400.0, 600.0), (7.0, 8.0), *[(9.0, 9.0)] * 99))
    csv = "data/Hopper-v4__ddpg_continuous__1.csv"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # fails like a full disk
        for output in ("data", csv):
            with pytest.raises(SystemExit, match=f"{output}: cannot write [^\n]*$"):
                collect_runs(longest, output=output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert filecmp.cmp(csv, f"{longer}/evaluations.csv", shallow=False)
    with pytest.raises(SystemExit, match=f"{csv}/figure_3.png: cannot write [^\n]*$"):
        figures.main(figures.Args("data", csv))


def test_seeds_with_different_settings_are_not_averaged():
    run_folder("runs/1", seed=1, tau=0.1, compile=True, threads=1)
    run_folder("runs/2", seed=2, tau=0.2, compile=False, capture_video=True)
    collect_runs("runs/1", "runs/2")
    with pytest.raises(SystemExit, match=r"the seeds of ddpg_continuous on Hopper-v4 differ in tau \(0.1, 0.2\)"):
        read_data("data")
    os.remove("data/Hopper-v4__ddpg_continuous__1.csv")
    collect_runs(run_folder("runs/old", seed=1))  # an older version without the flag
    with pytest.raises(SystemExit, match=r"differ in tau \(0.2, None\)"):
        read_data("data")


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        (collect, [("nowhere",)], "nowhere/evaluations.csv: cannot read the evaluations"),
        (collect, [("begun",)], "begun/evaluations.csv: cannot read the evaluations"),
        (collect, [()], "name at least one run folder"),
        (figures, ["nowhere"], "nowhere: no evaluations found"),
        (table, [("nowhere",)], "nowhere: no evaluations found"),
        (table, [()], "name at least one folder of data"),
        (value_estimates, [("nowhere",)], "nowhere: config.json or checkpoint.pt is missing"),
        (value_estimates, [("begun",)], "begun: config.json or checkpoint.pt is missing"),
        (value_estimates, [()], "name at least one run folder"),
    ],
)
def test_bad_input_gets_one_sentence(module, args, message):
    run_folder("begun", returns=())
    with pytest.raises(SystemExit, match=f"^{message}[^\n]*$"):
        module.main(module.Args(*args))


@pytest.mark.parametrize("name", ["collect", "figures", "table", "value_estimates"])
def test_help(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(os.path.join(ROOT, "utils", f"{name}.py"), run_name="__main__")
    assert f"python utils/{name}.py" in capsys.readouterr().out


def test_statistics():
    """The interquartile mean equals its definition; 95% intervals hold the truth 95% of the time, with six seeds 90%."""
    values = np.array([9.0, 1.0, 5.0, 3.0, 100.0, 4.0, 6.0, -50.0])
    assert interquartile_mean(values) == np.mean([3.0, 4.0, 5.0, 6.0])
    assert interquartile_mean(values[:3]) == 5.0
    rng = np.random.default_rng(0)
    values = rng.normal(10.0, 2.0, (30, 600))  # 600 experiments with 30 seeds each
    low, high = bootstrap_interval(values, resamples=500)
    deviation = 2.0 * np.sqrt(1.195 / 30)  # of the interquartile mean of 30 values from N(10, 2)
    assert 0.92 < np.mean((low < 10.0) & (10.0 < high)) < 0.97
    assert np.mean(high - low) == pytest.approx(2 * stats.norm.ppf(0.975) * deviation, rel=0.06)
    low, high = bootstrap_interval(rng.normal(10.0, 2.0, (6, 2_000)), resamples=500)
    assert 0.88 < np.mean((low < 10.0) & (10.0 < high)) < 0.93
    assert np.isnan(bootstrap_interval(values[:4])).all()


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_intervals_of_few_seeds_hold_the_truth(seeds):
    """Student's interval is exact for normal values; Welch's holds the truth at least as often, to a percent or two."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(10.0, 2.0, (2000, seeds)), rng.normal(4.0, 1.0, (2000, seeds))
    one, two = np.array([t_interval(x) for x in a]), np.array([t_interval(x, y) for x, y in zip(a, b, strict=True)])
    assert 0.935 < np.mean((one[:, 0] < 10.0) & (10.0 < one[:, 1])) < 0.965
    assert 0.93 < np.mean((two[:, 0] < 6.0) & (6.0 < two[:, 1])) < 0.99
    assert np.isnan(t_interval(a[0, :1])).all() and np.isnan(t_interval(a[0], b[0, :1])).all()


def test_value_estimates(script, capsys, monkeypatch):
    """Each reward is 1, and an episode ends by a termination, then one by the time limit. Smoothie explores, DDPG does not."""
    flags = {} if script is ddpg_continuous else {"log_var_init": -5.0, "log_var_lr": 0.0}
    flags |= {"env_id": "tests.fake_envs:Recorder-v0", "total_timesteps": 110, "checkpoint_frequency": 110}
    run_dir = run(script, seed=3, **flags)
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    checkpoint["agent"]["qfs.0.fc_q.weight"][:] = 0.1  # so that value and curvature depend on the state and the action
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    args, env, agent, step = value_estimates.load(str(run_dir))
    assert step == 110
    returns, expected, actual, _ = value_estimates.compare(args, env, agent, 20)
    assert returns.tolist() == 10 * [5, 7]

    recorder = env.unwrapped
    assert recorder.seeds == list(range(10_003, 10_023)), "the starts of the run's evaluations, and ten more"
    low, high = recorder.action_space.low, recorder.action_space.high
    actions, s = (np.array(recorder.received) - low) / (high - low) * 2 - 1, torch.tensor(np.float32(recorder.seen))
    with torch.no_grad():
        mean, std = agent.actor(s), 0.0 if script is ddpg_continuous else np.exp(-2.5)
        values, error = agent.qfs[0](s, mean), 1e-4
        if script is smoothie_closed_form:  # which smooths Q, so a mean over many actions gives the value
            samples = torch.stack([agent.qfs[0](s, mean + std * torch.randn(len(s), 2)) for _ in range(4_000)])
            values, error, unsmoothed = samples.mean(0), 5 * samples.std(0) / len(samples) ** 0.5, values
            assert ((values - unsmoothed).abs() > error).any()
    assert np.allclose(np.std(actions - mean.numpy(), 0), std, rtol=0.2, atol=1e-6)
    assert ((torch.tensor(expected) * args.reward_scale - values).abs() < error).all()

    left, last = np.arange(7, 0, -1), value_of_last_state(script, env, agent, args)
    assert np.allclose(actual[:5], (1 - args.gamma ** left[2:]) / (1 - args.gamma))
    assert np.allclose(actual[-7:], (1 - args.gamma**left) / (1 - args.gamma) + args.gamma**left * last)

    middle = 1.001 * mean.abs().median().item()  # nothing is beyond 0.97 here
    monkeypatch.setattr(value_estimates, "SATURATED", middle)
    saturated = value_estimates.compare(*value_estimates.load(str(run_dir))[:3], 20)[3]
    assert np.allclose(saturated, (mean.abs() > middle).float().mean(1)) and 0.3 < saturated.mean() < 0.7
    value_estimates.main(value_estimates.Args((str(run_dir),)))
    returns, expected, actual, saturated = value_estimates.compare(*value_estimates.load(str(run_dir))[:3], 10)
    row = f"| {args.env_id} | {table.LABELS[script.__name__]} | 3 | 0k | 6 | {expected.mean():,.0f} | {actual.mean():,.0f} |"
    row += f" {saturated.mean():.0%} |"
    assert capsys.readouterr().out.splitlines()[-1] == row and f"{expected.mean():,.0f}" != f"{actual.mean():,.0f}"


def value_of_last_state(script, env, agent, args):
    """Return the critic's value of the policy in the state that the environment is in, in units of rewards."""
    s = torch.tensor(np.float32(env.unwrapped.obs))[None]
    with torch.no_grad():
        qf, action = agent.qfs[0], agent.actor(s)
        value = qf.smoothed(s, action, agent.actor.log_var)[0] if script is smoothie_closed_form else qf(s, action)
    return value.item() / args.reward_scale


def test_the_deviation_is_clipped_to_the_seeds():
    returns = np.array([[0.0, 1.0], [0.0, 2.0], [9.0, 3.0]])
    mean, low, high = figures.mean_and_clipped_deviation(returns)
    assert np.allclose(mean, [3.0, 2.0])
    assert np.allclose(low, [0.0, 2.0 - np.sqrt(2 / 3)])  # 3 - 4.24 is below the lowest seed
    assert np.allclose(high, [3.0 + np.sqrt(18), 2.0 + np.sqrt(2 / 3)])


def test_committed_figures_and_tables_come_from_the_committed_data(capsys):
    figures.main(figures.Args(DATA, "results"))  # in the temporary folder
    figures.main(figures.Args(LONG_DATA, "results/million"))
    drawn = glob.glob("results/**/*.png", recursive=True)
    assert len(drawn) == 6
    for path in drawn:
        assert filecmp.cmp(path, os.path.join(ROOT, path), shallow=False), f"{path} is out of date"
    with open(os.path.join(ROOT, "results", "README.md")) as file:
        readme = file.read().splitlines()
    for line in (print_table(capsys, DATA) + print_table(capsys, LONG_DATA)).splitlines():
        assert line in readme, f"results/README.md lacks {line!r}: paste the output of utils/table.py"
    more = print_table(capsys, DATA, MORE_DATA, last_step=235_000)
    lines = [line for task in ("HalfCheetah-v4", "Walker2d-v4") for line in re.findall(rf"### {task}\n\n((?:\|.*\n)+)", more)]
    assert len(lines) == 2
    for line in "".join(lines).splitlines():
        assert "1000k" in line or line in readme, f"results/README.md lacks {line!r}"


def read_csv(name):
    with open(os.path.join(ROOT, "results", name)) as file:
        return list(csv.DictReader(file))


def test_readmes_quote_the_committed_runs():
    """The return of a run is the mean of its last 10 evaluations, in the CSV files and in the tables written by hand."""
    with open(os.path.join(ROOT, "README.md")) as main, open(os.path.join(ROOT, "results", "README.md")) as detailed:
        readme, results = main.read(), detailed.read().replace("–, ", "")
    quotes, runs = [], defaultdict(list)
    for folder, steps in [(DATA, "300k"), (LONG_DATA, "1000k")]:
        for scripts in read_data(folder).values():
            cells = [", ".join(f"{run.returns[-10:].mean():,.0f}" for run in scripts.get(script, [])) for script in LABELS]
            quotes.append((readme, re.sub(" +", " ", f"| {steps} | {' | '.join(cells)} |")))
    for row in read_csv("training_returns.csv"):
        runs[row["task"], "", row["script"]].append(f"{int(row['mean_return']):,}")
    for task in {task for task, *_ in runs}:
        smoothie, ddpg = (", ".join(runs[task, "", script]) for script in ("smoothie_continuous", "ddpg_continuous"))
        quotes.append((results, f"| {task} | {smoothie} | {ddpg} |"))
    runs.clear()
    for row in (row for name in ("two_critics", "tuning", "tuning_300k", "continued") for row in read_csv(f"{name}.csv")):
        curve = [float(value) for step, value in row.items() if step.isdigit() and value]
        assert abs(np.mean(curve[-10:]) - int(row["last_10"])) <= 1, row
        if "expected" in row and int(row["seed"]) < 200:  # two critics, without the tuning seeds
            value = f"{int(row['last_10']):,}"
            quotes.append((results, f"{value} ({row['full_length_percent']}%)"))
            quotes.append((results, f"| {row['expected']} / {row['actual']} |"))
            runs[row["task"], row["flags"], row["script"]].append(value)
    quotes += [(readme, ", ".join(values)) for values in runs.values()]
    for scripts in read_data(LONG_DATA, last_step=300_000).values():
        for script in ("smoothie_continuous", "ddpg_continuous"):
            first, second, third = (f"{run.returns[-10:].mean():,.0f}" for run in scripts[script])
            quotes.append((results.replace("\n", " "), f"{first}, {second} and {third}"))
    for text, quote in quotes:
        assert quote in text, f"README.md lacks {quote}"


def test_the_table_of_falls_comes_from_the_committed_data():
    with open(os.path.join(ROOT, "results", "README.md")) as file:
        section = re.search("### Falls\n\n.*\n.*\n((?:\\|.*\n)+)", file.read())
    scripts = {label: script for script, label in LABELS.items()}
    for line in section[1].splitlines():
        task, steps, label, share, unhurt, others = line.strip("| ").split(" | ")
        folder = {"300k": DATA, "1000k": LONG_DATA}[steps]
        paths = glob.glob(os.path.join(folder, f"{task}__{scripts[label]}__*.csv"))
        episodes = np.concatenate([np.loadtxt(path, delimiter=",", skiprows=1)[-100:] for path in paths])
        full = episodes[:, 3] == 1000
        means = [f"{episodes[rows, 2].mean():,.0f}" for rows in (full, ~full)]
        assert [share.split(",")[0], unhurt, others] == [f"{full.mean():.0%}", *means], line


def test_committed_data_name_their_versions():
    paths = glob.glob(os.path.join(DATA + "*", "*.json"))
    assert {os.path.dirname(path) for path in paths} == {DATA, MORE_DATA, LONG_DATA}
    for path in paths:
        with open(path) as file:
            provenance = json.load(file)["provenance"]
        for made_by in provenance:
            assert re.fullmatch("[0-9a-f]{40}", made_by["commit"]), path
            assert {"torch", "gymnasium", "mujoco", "numpy"} <= made_by.keys()


@pytest.mark.parametrize("path", sorted(glob.glob(os.path.join(DATA + "*", "*.json"))), ids=os.path.basename)
def test_committed_data_have_the_flags_of_the_benchmark(path):
    """The defaults of the scripts and benchmark_settings.txt, as they are now, repeat the committed runs."""
    config = read_run(path.removesuffix("json") + "csv", path).config
    flags = dataclasses.asdict(importlib.import_module(config["exp_name"]).Args())
    with open(os.path.join(ROOT, "benchmark_settings.txt")) as file:
        settings = [line.partition("#")[0].split() for line in file]
    for task, script, *given in filter(None, settings):
        if task in ("*", config["env_id"]) and script in ("*", config["exp_name"]):
            names = [flag.removeprefix("--").replace("-", "_") for flag in given[::2]]
            flags |= dict(zip(names, map(float, given[1::2]), strict=True))
    own = {"env_id", "seed", "total_timesteps", "threads", "script", "provenance"}
    assert {k: v for k, v in config.items() if k not in own} == {k: v for k, v in flags.items() if k not in own}
