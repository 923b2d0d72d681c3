"""Each script on its own: copied into an empty folder, its inline metadata, its videos."""

import glob
import os
import re
import shutil
import subprocess
import sys
import tomllib

import numpy as np

import smoothie_continuous
from tests.conftest import ROOT
from tests.test_runs import start

RUN = ["--total-timesteps", "200", "--learning-starts", "100", "--eval-frequency", "200", "--eval-episodes", "2"]


def test_a_copied_script_runs(script):
    shutil.copy(os.path.join(ROOT, script.__name__ + ".py"), "mine.py")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "mine.py", *RUN], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir()) == ["mine.py", "runs"] and "__mine__1__" in glob.glob("runs/*")[0]


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


def test_videos_show_something_that_moves():
    import imageio.v3 as iio

    script, env = smoothie_continuous, {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
    result = start(script.__name__, "--capture-video", "--save-model", *RUN, **env)
    assert result.returncode == 0, result.stderr
    (run_dir,) = glob.glob("runs/*")
    result = start(script.__name__, "--evaluate", run_dir, **env)
    assert result.returncode == 0, result.stderr
    videos = f"{run_dir}/videos"
    names = ["evaluate", "step_0", "step_200"]
    assert sorted(os.listdir(videos)) == sorted(name + ending for name in names for ending in (".mp4", ".gif"))
    length = int(re.search(r"(\d+) steps", result.stdout)[1])
    for name in names:
        frames = iio.imread(f"{videos}/{name}.mp4")
        assert frames.shape[1:] == (480, 480, 3)
        assert frames.std((1, 2, 3)).min() > 10, "no frame is blank"
        assert np.abs(frames.astype(float) - frames[0]).mean((1, 2, 3)).max() > 1.0, "and they are not all alike"
        assert os.path.getsize(f"{videos}/{name}.gif") < 2_000_000
    assert len(frames) == len(iio.imread(f"{videos}/evaluate.mp4"))
    assert abs(len(iio.imread(f"{videos}/evaluate.mp4")) - length - 1) <= 1


def test_without_a_screen_render_says_so(script, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert start(script.__name__, "--save-model", *RUN).returncode == 0
    (run_dir,) = glob.glob("runs/*")
    result = start(script.__name__, "--evaluate", run_dir, "--render")
    assert result.returncode == 1 and re.fullmatch(r"--render: there is no screen here .*\n", result.stderr)
