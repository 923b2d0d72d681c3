"""What the tests share: the scripts, short runs in this process or their own, quadrature."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ddpg_continuous
import smoothie_closed_form
import smoothie_continuous
import smoothie_no_kl

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
torch.set_num_threads(1)  # pytest-xdist runs one process a core

SCRIPTS = [smoothie_continuous, smoothie_no_kl, smoothie_closed_form, ddpg_continuous]
SMOOTHIES = SCRIPTS[:3]
SHORT = {
    "cuda": False,
    "compile": False,
    "learning_starts": 100,
    "batch_size": 32,
    "total_timesteps": 300,
    "eval_frequency": 100,
    "eval_episodes": 2,
    "env_id": "tests.fake_envs:ShortHopper-v4",
}


def agent_class(script):
    return script.DDPG if script is ddpg_continuous else script.Smoothie


def run(script, **flags):
    """Call main() with the flags of a short run where none are given. Return the run folder."""
    return script.main(script.Args(**SHORT | flags))


def command(script, **flags):
    """Return the command line of a short run."""
    words = []
    for name, value in (SHORT | flags).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return [sys.executable, script.__file__, *words]


def start(script, env=(), **flags):
    """Run the script in a process of its own."""
    env = os.environ | {"PYTHONPATH": ROOT} | dict(env)
    return subprocess.run(command(script, **flags), env=env, capture_output=True, text=True)


def scalars(run_dir):
    """Return {key: [(step, value), ...]} of what TensorBoard shows, but for the speed."""
    events = EventAccumulator(str(run_dir))
    events.Reload()
    keys = set(events.Tags()["scalars"]) - {"charts/SPS"}
    return {key: [(e.step, e.value) for e in events.Scalars(key)] for key in keys}


def gauss_hermite(order, dim=1):
    """Nodes (order^dim, dim) and weights (order^dim,) of an expectation under N(0, I)."""
    x, w = np.polynomial.hermite_e.hermegauss(order)
    nodes = np.stack(np.meshgrid(*[x] * dim, indexing="ij"), -1).reshape(-1, dim)
    w = np.stack(np.meshgrid(*[w / w.sum()] * dim, indexing="ij"), -1).reshape(-1, dim)
    return torch.tensor(nodes), torch.tensor(w.prod(1))


def pytest_generate_tests(metafunc):
    for fixture, modules in [("script", SCRIPTS), ("smoothie", SMOOTHIES)]:
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, modules, ids=lambda module: module.__name__)


@pytest.fixture(autouse=True)
def empty_folder_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # so that no test depends on those before it


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
