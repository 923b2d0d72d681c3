"""Whole runs: what they print, log and write; that a seed decides everything; that bad input is refused clearly."""

import csv
import glob
import inspect
import json
import math
import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

import smoothie_toy_bandit as toy
from tests.conftest import ROOT, SCRIPTS

SHORT = ["--total-timesteps", "400", "--learning-starts", "150", "--eval-frequency", "200", "--eval-episodes", "2"]


def start(script, *flags, **env):
    return subprocess.run(
        [sys.executable, os.path.join(ROOT, script + ".py"), *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )


def scalars(run_dir):
    events = EventAccumulator(run_dir)
    events.Reload()
    return {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()["scalars"]}


def readme_table(heading):
    """Rows of the table below a heading of README, as lists of cells without their backquotes."""
    with open(os.path.join(ROOT, "README.md")) as file:
        section = file.read().split(f"\n{heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "|" in line]
    return rows[2:]


def in_script(cell, name):
    """Whether README's column «in» names the script: all, Smoothie (both), or one script's own name."""
    return cell == "all" or cell == name or (cell == "Smoothie" and name.startswith("smoothie"))


@pytest.mark.parametrize("task", ["Hopper", "Humanoid"])
def test_short_run(script, task):
    """Long enough to reach learning, logging, a truncated episode and evaluations."""
    result = start(script.__name__, "--env-id", f"tests.fake_envs:Short{task}-v4", *SHORT)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert [int(s) for s in re.findall(r"^step (\d+): eval return ", result.stdout, re.M)] == [0, 200, 400]

    (run_dir,) = glob.glob("runs/*")
    assert re.fullmatch(rf"runs/tests.fake_envs-Short{task}-v4__{script.__name__}__1__\d+", run_dir)
    logged = scalars(run_dir)
    assert max(length for _, length in logged["charts/episodic_length"]) == 10, "an episode reached the time limit"
    assert [step for step, _ in logged["losses/qf1_loss"]] == [200, 300, 400]
    assert [step for step, _ in logged["eval/episodic_return"]] == [0, 200, 400]
    assert all(math.isfinite(value) for series in logged.values() for _, value in series)
    keys = {re.sub(r"std_\d+", "std_i", key) for key in logged}
    assert keys == {row[0] for row in readme_table("## Logged values") if in_script(row[1], script.__name__)}

    with open(f"{run_dir}/evaluations.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["global_step"]) for row in rows] == [0, 0, 200, 200, 400, 400]
    mean_at_400 = sum(float(row["episodic_return"]) for row in rows[-2:]) / 2
    assert mean_at_400 == pytest.approx(logged["eval/episodic_return"][-1][1], rel=1e-5)
    with open(f"{run_dir}/config.json") as file:
        assert json.load(file)["total_timesteps"] == 400


def test_a_seed_decides_everything(script):
    def run(seed):
        args = script.Args(total_timesteps=350, learning_starts=150, eval_frequency=175, eval_episodes=2, seed=seed)
        returns = script.train(args)
        (run_dir,) = set(glob.glob("runs/*")) - seen
        seen.add(run_dir)
        logged = scalars(run_dir)
        del logged["charts/SPS"]
        return returns, logged

    seen = set()  # the two runs may start in the same second
    first, second, other = run(1), run(1), run(2)
    assert first == second
    assert first[0] != other[0]


def test_evaluation_leaves_training_alone(script):
    """Evaluating more often must not change what is learned."""

    def last_losses(eval_frequency):
        script.train(script.Args(total_timesteps=250, learning_starts=150, eval_frequency=eval_frequency, eval_episodes=1))
        logged = scalars(max(glob.glob("runs/*"), key=os.path.getmtime))
        return {key: series for key, series in logged.items() if key.startswith("losses/")}

    assert last_losses(50) == last_losses(1000)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"env_id": "Pusher-v4"}, "Pusher-v4.*mujoco<3"),
        ({"env_id": "Hoper-v4"}, "Hoper.*Did you mean.*Hopper"),
        ({"env_id": "nowhere:Hopper-v4"}, "nowhere"),
        ({"env_id": "tests.fake_envs:Discrete-v0"}, "actions must be a Box, not Discrete"),
        ({"env_id": "tests.fake_envs:Dict-v0"}, "observations must be a Box, not Dict"),
        ({"env_id": "a:b:c"}, "--env-id a:b:c"),
        ({"env_id": "Hopper-v3"}, "gymnasium-robotics"),
        ({"env_id": "tests.fake_envs:Unbounded-v0"}, "finite action bounds"),
        ({"gamma": 1.5}, "--gamma 1.5: must lie between 0 and 1"),
        ({"gamma": math.nan}, "--gamma nan"),
        ({"tau": 0.0}, "--tau 0.0"),
        ({"tau": 2.0}, "--tau 2.0"),
        ({"batch_size": 200, "learning_starts": 100}, "--batch-size 200.*100 transitions"),
        ({"batch_size": 200, "buffer_size": 150}, "--batch-size 200.*150 transitions"),
        ({"eval_frequency": 0}, "--eval-frequency 0"),
        ({"buffer_size": 10**11, "total_timesteps": 10**11}, "--buffer-size .* fits"),
    ],
)
def test_bad_input(script, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        script.train(script.Args(**flags))
    assert re.search(sentence, stop.value.code)
    assert "\n" not in stop.value.code
    assert not os.path.exists("runs"), "refused before anything is written"


def test_bad_input_from_the_command_line(script):
    result = start(script.__name__, "--env-id", "Pusher-v4")
    assert result.returncode == 1
    assert re.fullmatch(r"--env-id Pusher-v4: .*mujoco<3.*\n", result.stderr)
    result = start(script.__name__, "--gama", "1")
    assert result.returncode == 2 and "--gamma" in result.stderr and "Traceback" not in result.stderr


def test_without_a_compiler_compile_says_so(script):
    result = start(script.__name__, "--compile", PATH="/nowhere", CXX="g++")
    assert result.returncode == 1 and re.fullmatch(r"--compile: needs a C\+\+ compiler.*\n", result.stderr)


def test_nan_stops_the_run_and_keeps_what_was_logged(script):
    flags = ["--env-id", "tests.fake_envs:NaNReward-v0", *SHORT]
    result = start(script.__name__, *flags, "--eval-frequency", "100")
    assert result.returncode == 1
    assert re.fullmatch(r"step 300: losses/\w+ is nan, training has diverged; .*\n", result.stderr)
    (run_dir,) = glob.glob("runs/*")
    assert [step for step, _ in scalars(run_dir)["losses/qf1_loss"]] == [200, 300]
    with open(f"{run_dir}/evaluations.csv") as file:
        assert [row["global_step"] for row in csv.DictReader(file)][::2] == ["0", "100", "200"]


def test_unwritable_folder(script):
    open("runs", "w").close()  # a file where the folder should be
    with pytest.raises(SystemExit, match=r"cannot write \(Not a directory\)"):
        script.train(script.Args(total_timesteps=10))


def test_importing_a_script_has_no_side_effects(script):
    code = f"import sys; sys.path.insert(0, {ROOT!r}); import {script.__name__}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr, os.listdir()) == ("", "", [])


def wandb_records(path):
    """Yield the records of a .wandb file: after 7 bytes of header, a LevelDB log of blocks of 32 KiB."""
    with open(path, "rb") as file:
        data = file.read()
    assert data[:4] == b":W&B"
    position, record = 7, b""
    while position < len(data):
        if 32768 - position % 32768 < 7:  # too short for the head of a chunk: padding up to the next block
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_tracking_works_offline(script):
    """Every scalar that TensorBoard gets is in the file that `wandb sync` would send."""
    result = start(script.__name__, "--env-id", "tests.fake_envs:ShortHopper-v4", "--track", *SHORT, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    (path,) = glob.glob("wandb/offline-run-*/*.wandb")
    history, config = {}, {}
    for record in wandb_records(path):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for key, value in row.items():
            history.setdefault(key, []).append((row.get("global_step"), value))
        for item in record.run.config.update:
            config[item.key or item.nested_key[0]] = json.loads(item.value_json)
    assert config["total_timesteps"] == 400 and config["gamma"] == 0.99
    (run_dir,) = glob.glob("runs/*")
    for key, series in scalars(run_dir).items():
        steps, values = zip(*series, strict=True)
        tracked_steps, tracked_values = zip(*history[key], strict=True)
        assert tracked_steps == steps and tracked_values == pytest.approx(values, rel=1e-5), key


def test_without_a_network_tracking_goes_on_offline():
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "a", "WANDB_INIT_TIMEOUT": "3"}
    result = start("smoothie_continuous", "--env-id", "tests.fake_envs:ShortHopper-v4", "--track", *SHORT, **nowhere)
    assert result.returncode == 0 and "tracking offline" in result.stderr, result.stderr
    (path,) = glob.glob("wandb/offline-run-*/*.wandb")
    assert sum(bool(record.history.item) for record in wandb_records(path)) > 10


def test_tracking_can_be_disabled(script):
    result = start(script.__name__, "--env-id", "tests.fake_envs:ShortHopper-v4", "--track", *SHORT, WANDB_MODE="disabled")
    assert result.returncode == 0, result.stderr
    assert len(scalars(*glob.glob("runs/*"))["eval/episodic_return"]) == 3


def test_a_compiled_run_repeats_itself_and_says_nothing_more():
    flags = ["--compile", "--env-id", "tests.fake_envs:ShortHopper-v4", *SHORT]
    logged = []
    for _ in range(2):
        result = start("smoothie_continuous", *flags)
        assert (result.returncode, result.stderr) == (0, "")
        logged.append(scalars(max(glob.glob("runs/*"), key=os.path.getmtime)))
        del logged[-1]["charts/SPS"]
    assert logged[0] == logged[1] and logged[0]["losses/kl"]


@pytest.mark.parametrize("module", [*SCRIPTS, toy], ids=lambda module: module.__name__)
def test_readme_lists_every_flag_with_its_default(module):
    heading = "## Flags of the toy bandit" if module is toy else "## Flags"
    documented = {row[0]: row[1].replace(",", "") for row in readme_table(heading) if in_script(row[2], module.__name__)}
    ours = {"--" + name.replace("_", "-"): str(value) for name, value in vars(module.Args()).items()}
    if module is not toy:
        ours["--exp-name"] = "the script's name"
    assert documented == ours


def test_help_cites_the_paper(script):
    result = start(script.__name__, "--help")
    assert result.returncode == 0 and "Section 6.2" in result.stdout and "--eval-episodes INT" in result.stdout


def test_toy_bandit_remakes_figure_2(monkeypatch):
    paths = {}
    monkeypatch.setattr(toy, "plot", lambda p, flow, output, draw=toy.plot: (paths.update(p, flow=flow), draw(p, flow, output)))
    printed = []
    monkeypatch.setattr(toy, "print", lambda line, **_: printed.append(line), raising=False)
    toy.main(toy.Args(output="figure.png"))

    counts = {line.split(":")[0]: int(re.search(r": (\d+)/20 seeds", line)[1]) for line in printed[:3]}
    assert counts["smoothie"] >= 19 and counts["ddpg"] == 0 and counts["smoothie without weights"] <= 1
    assert os.path.getsize("figure.png") > 20_000
    assert (paths["ddpg"][:, :, 1] == toy.STD_INIT).all()
    # the variance falls, rises and falls again, in the exact flow and in the median seed
    for std, margin in [(paths["flow"][:, 1], 0.01), (np.median(paths["smoothie"][:, :, 1], 1), 0.02)]:
        dip = std[: len(std) // 2].argmin()
        peak = dip + std[dip:].argmax()
        assert std[dip] < std[0] - margin and std[peak] > std[dip] + margin and std[-1] < 0.5 * std[peak]
    assert paths["smoothie"][:, :, 1].max() < toy.MAX_STD


def test_toy_bad_input():
    with pytest.raises(SystemExit, match="--seeds 0"):
        toy.main(toy.Args(seeds=0))
    with pytest.raises(SystemExit, match="--output"):
        toy.main(toy.Args(seeds=1, total_timesteps=3, output="nowhere/figure.png"))


def test_same_shared_code():
    """The parts that must not differ between the scripts do not: networks' shapes, buffer, evaluation, environment."""
    for name in (
        "make_env",
        "evaluate",
        "ReplayBuffer",
        "Episode",
        "Film",
        "Adam",
        "compiled",
        "Logger",
        "Stop",
        "read",
        "replace",
        "make_buffer",
        "td_target",
        "QNetwork",
        "critic_loss",
        "prepare",
        "provenance",
        "command_line",
    ):
        sources = {re.sub(r'"""(.|\n)*?"""', "", inspect.getsource(getattr(module, name))) for module in SCRIPTS}
        assert len(sources) == 1, name
