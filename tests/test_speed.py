"""The speed benchmark measures what it says."""

import importlib.util
import io
import json
import os
import sys

import gymnasium
import numpy as np
import pytest

import smoothie_closed_form
import smoothie_continuous
import smoothie_no_kl
from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("speed", os.path.join(ROOT, "benchmarks", "speed.py"))
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)


def test_the_floor_replays_the_products_of_one_update():
    """Ten products with the 400x300 matrices, nine without the KL penalty: forward 6 (5), backward 4."""
    for script, expected in [(smoothie_continuous, 10), (smoothie_no_kl, 9), (smoothie_closed_form, 10)]:
        shapes = speed.recorded_products(script, 17, 6, 128)
        sizes = [(*left, right[1]) for (left, _), (right, _) in shapes]
        assert sum(sorted(size) in ([128, 300, 400], [128, 300, 406]) for size in sizes) == expected, sizes


def test_windows_are_as_long_as_they_say():
    floor = "floor: matrix products and environment alone"
    args = speed.Args(env_id="Hopper-v4", batch_size=16, repetitions=2, steps=40)
    np.ones(300_000_000)  # 2.4 GB of this process that must not count as theirs
    results = speed.measure(["ddpg_continuous.py --no-compile", floor], args)
    for name, (rates, memory) in results.items():
        assert len(rates) == 2 and min(rates) > 0, name
        assert 50e6 < memory < 2e9, name


@pytest.mark.parametrize("count_resets, windows", [(True, 5), (False, 2)])
def test_a_window_ends_on_time_though_it_ends_with_a_reset(monkeypatch, count_resets, windows):
    """Ten steps, each after a reset; a window ends before the third of what counts and every fourth after it."""
    output, now = io.StringIO(), [0.0]

    class Waits(io.StringIO):
        def readline(self):
            now[0] += 1000.0
            return super().readline()

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys, "__stdout__", output)
    monkeypatch.setattr(sys, "stdin", Waits("go\n" * windows))
    env = speed.paced(gymnasium.make("Hopper-v4"), first=2, steps=4, count_resets=count_resets)
    for _ in range(10):
        env.reset()
        env.step(env.action_space.sample())
    seconds = [json.loads(line)["seconds"] for line in output.getvalue().splitlines()]
    assert seconds == windows * [0.0], "the time in which the others run does not count"


def test_cleanrl_gets_our_layers_and_updates_its_actor_at_every_step(tmp_path):
    """A stand-in for CleanRL's script that stops if it does not."""
    (tmp_path / "cleanrl").mkdir()
    (tmp_path / "cleanrl" / "ddpg_continuous_action.py").write_text(
        "import sys, gymnasium as gym\n"
        "from torch.nn import Linear\n"
        "actor = [Linear(11, 256), Linear(256, 256), Linear(256, 3)]\n"
        "critic = [Linear(14, 256), Linear(256, 256), Linear(256, 1)]\n"
        "assert [layer.out_features for layer in actor + critic] == [400, 300, 3, 400, 300, 1]\n"
        "assert {'--policy-frequency=1', '--batch-size=16', '--env-id=Hopper-v4'} < set(sys.argv)\n"
        "envs = gym.vector.SyncVectorEnv([lambda: gym.make('Hopper-v4')])\n"
        "envs.reset()\n"
        "while True:\n"
        "    envs.step(envs.action_space.sample())\n"
    )
    args = speed.Args(env_id="Hopper-v4", batch_size=16, repetitions=2, steps=40, cleanrl=str(tmp_path))
    ((rates, _),) = speed.measure(["CleanRL DDPG"], args).values()
    assert len(rates) == 2 and min(rates) > 0


def test_the_table_compares_windows_pair_by_pair(monkeypatch):
    """The machine gets slower; the ratio of each pair stays the same, that of other pairs does not."""
    drift = [4.0, 2.0, 1.0]
    speeds = {"ddpg_continuous.py": 150, "CleanRL DDPG": 75, "Stable-Baselines3 DDPG": 100, "SBX DDPG (JAX)": 120}
    speeds["floor: matrix products and environment alone"] = 300
    results = {name: ([rate * d for d in drift], 2e6) for name, rate in speeds.items()}
    monkeypatch.setattr(speed, "measure", lambda names, args: results)
    rows = speed.table(speed.Args(cleanrl="clone")).splitlines()
    assert "| `ddpg_continuous.py` | 300 | 150 to 600 | 2.00 | 1.50 | 1.25 | 2.00 | 2 |" in rows
    assert rows[-1].startswith("| CleanRL DDPG | 150 | 75 to 300 | 1.00 | 0.75 | 0.62 | 4.00 |"), "the fastest come first"
