import os
import time

import pytest
import torch

import ddpg_continuous
import smoothie_continuous
import smoothie_no_kl

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
torch.set_num_threads(1)  # pytest-xdist runs one process a core

SCRIPTS = [smoothie_continuous, smoothie_no_kl, ddpg_continuous]


def agent_class(script):
    return script.DDPG if script is ddpg_continuous else script.Smoothie


def wait_for(condition, what, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.1)


def pytest_generate_tests(metafunc):
    for fixture, modules in [("script", SCRIPTS), ("smoothie", SCRIPTS[:2])]:
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, modules, ids=lambda module: module.__name__)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
