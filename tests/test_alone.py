"""Each script on its own: copied into an empty folder, its inline metadata, its videos, its length."""

import os
import re
import subprocess
import sys
import tomllib

import numpy as np

import ddpg_continuous
import smoothie_closed_form
import smoothie_continuous
import smoothie_no_kl
from tests.conftest import ROOT, SCRIPTS, SHORT, run, start


def test_a_copied_script_runs_on_a_module_in_the_current_folder(finished):
    folder, result = finished
    assert result.returncode == 0, result.stderr
    assert set(os.listdir(folder)) - {"__pycache__"} == {"copied", "my_envs.py", "runs"}


def test_inline_metadata_is_requirements(script):
    """PEP 723, as uv run and pipx run read it: every package of requirements.txt that the script imports, with its version."""
    with open(script.__file__) as file:
        source = file.read()
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+)# ///$", source)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    with open(os.path.join(ROOT, "requirements.txt")) as file:
        required = [line.strip() for line in file if not line.startswith("#")]
    tools = ("matplotlib", "scipy", "pytest")  # of the plots, the tables and the tests
    assert metadata["dependencies"] == [line for line in required if not line.startswith(tools)]
    assert metadata["requires-python"] == ">=3.11"


def test_importing_a_script_has_no_side_effects():
    names = [script.__name__ for script in SCRIPTS]
    code = f"import signal, sys; sys.path.insert(0, {ROOT!r}); path, handler = sys.path[:], signal.getsignal(signal.SIGTERM)\n"
    code += f"import {', '.join(names)}\nassert (path, handler) == (sys.path, signal.getsignal(signal.SIGTERM))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr, os.listdir()) == ("", "", [])


def test_scripts_are_short(script):
    with open(script.__file__) as file:
        assert len(file.readlines()) <= 450


def test_scripts_differ_in_few_lines():
    """In the KL penalty; in the critic; in what a smoothed Q-value needs and a Q-value does not."""

    def changed_lines(first, second):
        diff = subprocess.run(["diff", first.__file__, second.__file__], capture_output=True, text=True).stdout
        return len(re.findall(r"(?m)^[<>]", diff))

    assert 0 < changed_lines(smoothie_continuous, smoothie_no_kl) <= 40
    assert 0 < changed_lines(smoothie_continuous, smoothie_closed_form) <= 100
    assert 0 < changed_lines(smoothie_no_kl, ddpg_continuous) <= 140


def test_videos_show_something_that_moves():
    import imageio.v3 as iio

    env = {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
    flags = SHORT | {"env_id": "tests.fake_envs:FilmedHopper-v4", "total_timesteps": 101, "eval_frequency": 101}
    result = start(smoothie_continuous, env, capture_video=True, **flags)
    assert result.returncode == 0, result.stderr
    run_dir = re.search(r"results are in (\S+)", result.stdout)[1]
    result = start(smoothie_continuous, env, evaluate=run_dir)
    assert result.returncode == 0, result.stderr
    videos = sorted(name for name in os.listdir(run_dir) if name.endswith(".mp4"))
    assert videos == ["evaluate.mp4", "step_0.mp4", "step_101.mp4"]
    with open(f"{run_dir}/evaluations.csv") as file:
        lengths = [int(line.split(",")[3]) for line in list(file)[1::2]]  # of the first episode of each evaluation
    for name, length in zip(videos, [lengths[1], *lengths], strict=True):
        frames = iio.imread(f"{run_dir}/{name}")
        assert frames.shape == (length, 480, 480, 3), "one frame for each step"
        assert frames.std((1, 2, 3)).min() > 10, "no frame is blank"
        assert np.abs(frames.astype(float) - frames[0]).mean((1, 2, 3)).max() > 1.0, "and they are not all alike"


def test_a_task_without_render_fps_is_filmed():
    import imageio.v3 as iio

    run_dir = run(smoothie_continuous, env_id="tests.fake_envs:Filmed-v0", total_timesteps=101, capture_video=True)
    film = iio.imread(run_dir / "step_0.mp4").mean((1, 2, 3))
    np.testing.assert_allclose(film, 40 * np.arange(5), atol=3)
