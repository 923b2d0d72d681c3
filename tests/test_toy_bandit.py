"""The toy bandit: its closed forms against quadrature and automatic differentiation, and what Figure 2 shows."""

import os
import re

import numpy as np
import pytest
import torch

import smoothie_toy_bandit as toy


def test_smoothed_reward_by_quadrature():
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = weights / weights.sum()
    for a, std in [(-1.0, 1.0), (0.3, 0.7), (1.2, 0.4)]:
        q, gradient, hessian = toy.smoothed_reward(a, std)
        assert q == pytest.approx(weights @ toy.reward(a + std * nodes), abs=1e-6)
        # by parts: derivatives of the average are averages against the Hermite polynomials
        assert gradient == pytest.approx(weights @ (toy.reward(a + std * nodes) * nodes) / std, abs=1e-5)
        assert hessian == pytest.approx(weights @ (toy.reward(a + std * nodes) * (nodes**2 - 1)) / std**2, abs=1e-4)


def test_derivatives_of_the_tanh_critic_against_autograd(float64):
    qf = toy.QNetwork(4, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(qf.w)
    actions = torch.randn(4, 1)
    gradient, hessian = qf.action_derivatives(actions.squeeze(1), None)
    in_action = torch.func.grad(lambda a: qf(a).sum())
    torch.testing.assert_close(gradient, in_action(actions).squeeze(1))
    torch.testing.assert_close(hessian, torch.func.grad(lambda a: in_action(a).sum())(actions).squeeze(1))


def test_derivatives_of_the_smoothed_relu_critic_by_quadrature(float64):
    """By parts, from values of the critic alone, on a fine grid of noise."""
    qf = toy.ReLUNetwork(4, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(qf.w)
    mean, log_var = torch.randn(4), torch.randn(4)
    noise = torch.linspace(-7.0, 7.0, 20_001)
    weights = torch.exp(-0.5 * noise**2)
    weights, std = weights / weights.sum(), (0.5 * log_var).exp()
    q = qf(mean.unsqueeze(1) + std.unsqueeze(1) * noise)
    gradient, hessian = qf.action_derivatives(mean, log_var)
    torch.testing.assert_close(gradient, (q * noise) @ weights / std, rtol=0, atol=1e-5)
    torch.testing.assert_close(hessian, (q * (noise**2 - 1)) @ weights / std**2, rtol=0, atol=1e-4)


def test_figure_2(monkeypatch):
    paths = {}
    monkeypatch.setattr(toy, "plot", lambda p, flow, output, draw=toy.plot: (paths.update(p, flow=flow), draw(p, flow, output)))
    printed = []
    monkeypatch.setattr(toy, "print", lambda line, **_: printed.append(line), raising=False)
    toy.main(toy.Args(output="figure.png"))

    counts = {line.split(":")[0]: int(re.search(r": (\d+)/20 seeds", line)[1]) for line in printed[:4]}
    assert counts["smoothie"] >= 19 and counts["closed form"] == 20
    assert counts["ddpg"] == 0 and counts["smoothie without weights"] <= 1
    assert os.path.getsize("figure.png") > 20_000
    assert (paths["ddpg"][:, :, 1] == toy.STD_INIT).all()
    # the variance falls, rises and falls again, in the exact flow and in the median seed
    for std, margin in [(paths["flow"][:, 1], 0.01), (np.median(paths["smoothie"][:, :, 1], 1), 0.02)]:
        dip = std[: len(std) // 2].argmin()
        peak = dip + std[dip:].argmax()
        assert std[dip] < std[0] - margin and std[peak] > std[dip] + margin and std[-1] < 0.5 * std[peak]
    assert paths["smoothie"][:, :, 1].max() < toy.MAX_STD
    # in closed form every seed stays close to the exact flow
    assert np.abs(np.median(paths["closed form"], 1) - paths["flow"]).max() < 0.05
    assert np.abs(paths["closed form"] - paths["flow"][:, None]).max() < 0.25


def test_weights_are_one_over_the_density_of_the_behaviour(monkeypatch):
    """The policy does not learn here, so every action, also those before the first update, is drawn from N(-1, 1)."""
    grid, seen = torch.linspace(-6.0, 6.0, 601), []

    def spy(density, cells, count, max_weight, original=toy.importance_weights):
        weights = original(density, cells, count, max_weight)
        expected = (2 * np.pi) ** 0.5 * torch.exp(0.5 * (grid[cells] + 1) ** 2)
        torch.testing.assert_close(weights, expected.clamp(max=max_weight), rtol=1e-4, atol=0)
        seen.append((count, weights.max()))
        return weights

    monkeypatch.setattr(toy, "importance_weights", spy)
    args = toy.Args(seeds=3, prefill=100, total_timesteps=20, learning_starts=20, max_weight=20.0)
    toy.train(args, "smoothie")
    assert seen == [(count, 20.0) for count in range(101, 121)], "the cap matters"


@pytest.mark.parametrize(
    "flags",
    [
        {"seeds": 0},
        {"seed": -1},
        {"q_lr": float("nan")},
        {"policy_lr": -1.0},
        {"learning_starts": 4_500},
        {"output": "no/f.png"},
    ],
)
def test_bad_input_gets_one_sentence(flags):
    with pytest.raises(SystemExit, match=f"^--{next(iter(flags)).replace('_', '-')} [^\n]*$"):
        toy.main(toy.Args(**flags))
