"""benchmarks/speed.py: turns, windows, ratios and the floor."""

import functools
import importlib
import os
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ddpg_continuous
from tests.conftest import ROOT


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(ROOT, "benchmarks"))
    return importlib.import_module("speed")


class Diary:
    """In place of an environment: writes down who takes a step."""

    def __init__(self, path):
        self.path = path

    def step(self, name):
        with open(self.path, "a") as file:
            file.write(name)


def fake_contestant(pace, algorithm, args, name, path):
    env = pace(Diary(path))
    while True:
        env.step(name)


def test_contestants_take_turns(speed):
    path = Path("steps").absolute()
    names = ["a", "b"]
    trainers = {name: functools.partial(fake_contestant, name=name, path=path) for name in names}
    results = speed.measure(trainers, "TD3", speed.Args(repetitions=3, steps=40))

    warmup = speed.LEARNING_STARTS + speed.WARMUP
    assert path.read_text() == "a" * warmup + "b" * warmup + 3 * ("a" * 40 + "b" * 40)
    for rates, memory in results.values():
        assert len(rates) == 3
        assert memory > 50, "a process that has imported PyTorch holds more"


def test_a_window_does_not_count_the_time_of_the_others(speed, monkeypatch):
    class Clock:
        """An environment whose steps take a second, and a pipe to which others answer late."""

        def __init__(self):
            self.now = 0.0
            self.sent = []

        def step(self, action):
            self.now += 1.0

        def send(self, message):
            self.sent.append(message[0])

        def recv(self):
            self.now += 1000.0

    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    env = speed.paced(clock, pipe=clock, window=4, warmup=10)
    for _ in range(10 + 3 * 4):
        env.step("action")
    assert clock.sent == [10.0, 4.0, 4.0], "the last window ends at the next step"


def test_ratios_are_of_windows_side_by_side(speed):
    """The machine gets slower, but not while a pair of windows runs."""
    drift = [4.0, 2.0, 1.0]
    speeds = {"`ddpg_continuous.py`": 150, "SBX": 120, "floor": 300}
    results = {name: ([rate * d for d in drift], 1.0) for name, rate in speeds.items()}
    header, _, *lines = speed.table(results).splitlines()
    assert header.endswith("| lowest to highest | times SBX | times floor | peak memory, MB |")
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert rows == [
        ["floor", "600", "300 to 1200", "2.50", "1.00", "1"],
        ["`ddpg_continuous.py`", "300", "150 to 600", "1.25", "0.50", "1"],
        ["SBX", "240", "120 to 480", "1.00", "0.40", "1"],
    ]


def test_the_floor_replays_every_product(speed):
    """PyTorch's own counter finds as many operations in the update."""
    agent = ddpg_continuous.DDPG(17, 6, ddpg_continuous.Args(**speed.SIZES["TD3"]))
    observations = torch.randn(256, 17)
    actions = torch.randn(256, 6)
    batch = observations, actions, torch.randn(256), observations, torch.zeros(256)
    for update in (agent.update_critics, agent.update_policy):
        products = speed.recorded_products(update, batch)
        with FlopCounterMode(display=False) as counter:
            update(*batch)
        replayed = sum(2 * left.numel() * right.shape[1] for left, right in products)
        assert replayed == counter.get_total_flops()
