"""The toy bandit: closed forms against quadrature and autograd, phantom actions, and Figure 2."""

import math

import pytest
import torch

import smoothie_toy_bandit as toy
from tests.conftest import gauss_hermite


def normal_pdf(x, mean, var):
    return torch.exp(-0.5 * (x - mean) ** 2 / var) / math.sqrt(2 * math.pi * var)


def critic(seeds):
    qf = toy.QNetwork(seeds)
    torch.nn.init.normal_(qf.w)
    return qf


def test_smoothed_reward_by_quadrature(float64):
    nodes, weights = gauss_hermite(200)
    noise = nodes[:, 0]
    for a, std in [(-1.0, 1.0), (0.3, 0.7), (1.2, 0.4)]:
        rewards = toy.reward(a + std * noise)
        found = torch.stack(toy.smoothed_reward(torch.tensor(a), std**2))
        # by parts: derivatives of the average are averages against the Hermite polynomials
        value = weights @ rewards
        gradient = weights @ (rewards * noise) / std
        hessian = weights @ (rewards * (noise**2 - 1)) / std**2
        torch.testing.assert_close(found, torch.stack([value, gradient, hessian]))


def test_derivatives_of_the_critic_against_autograd(float64):
    qf = critic(4)
    actions = torch.randn(4, 3)
    gradient, hessian = qf.action_derivatives(actions, torch.zeros(4, 1))
    in_action = torch.func.grad(lambda a: qf(a).sum())
    torch.testing.assert_close(gradient, in_action(actions))
    torch.testing.assert_close(hessian, torch.func.grad(lambda a: in_action(a).sum())(actions))


def test_derivatives_of_the_smoothed_critic_by_quadrature(float64):
    qf = critic(4)
    mean = torch.randn(4, 1)
    std = torch.rand(4, 1) + 0.2
    noise = torch.linspace(-10.0, 10.0, 4_001)
    weights = normal_pdf(noise, 0.0, 1.0) * (noise[1] - noise[0])
    values = qf(mean + std * noise)
    gradient, hessian = qf.action_derivatives(mean, std**2)
    torch.testing.assert_close(gradient.squeeze(1), values * noise @ weights / std.squeeze(1))
    second = values * (noise**2 - 1) @ weights / std.squeeze(1) ** 2
    torch.testing.assert_close(hessian.squeeze(1), second)


def test_replayed_action_is_the_phantom_action_plus_noise_of_the_policy(float64):
    """So a~ - a has mean 0 and variance Sigma, and a slope of 0 in a, whatever m and S were."""
    n = 1_000_000
    var = torch.tensor(0.25)
    for mean, behaviour_var in [(0.3, 0.5), (-1.0, 0.3), (2.0, 4.0)]:
        behaviour_var = torch.tensor(behaviour_var)
        actions = mean + behaviour_var.sqrt() * torch.randn(n)
        a = toy.phantom_actions(actions, mean, behaviour_var, var)
        rest = actions - a
        slope = torch.cov(torch.stack([a, rest]))[0, 1] / a.var()
        # four standard errors of a mean, of a variance, of a regression's slope
        assert rest.mean().abs() < 4 * (var / n).sqrt()
        assert (rest.var() - var).abs() < 4 * var * math.sqrt(2 / n)
        assert slope.abs() < 4 * (var / a.var() / n).sqrt()


def test_phantom_action_of_a_uniform_action_is_the_papers(float64):
    actions = torch.rand(1_000)
    var = torch.tensor(0.25)
    torch.manual_seed(1)
    a = toy.phantom_actions(actions, 0.0, torch.tensor(math.inf), var)
    torch.manual_seed(1)
    torch.testing.assert_close(a, actions + 0.5 * torch.randn(1_000))


@pytest.mark.parametrize("behaviour_var", [0.25, 0.1])
def test_phantom_action_is_the_mean_if_the_behaviour_is_no_wider(float64, behaviour_var):
    actions = torch.randn(1_000)
    a = toy.phantom_actions(actions, 0.3, torch.tensor(behaviour_var), torch.tensor(0.25))
    torch.testing.assert_close(a, torch.full((1_000,), 0.3))


def test_weights_make_the_papers_phantom_actions_right(float64):
    """The least-squares fit at a is the mean reward there, over a~ of all rows, by quadrature."""
    grid = torch.linspace(-12.0, 12.0, 4_001)
    std = 0.5
    for a in torch.tensor([-1.0, 0.0, 0.7]):
        mass = torch.zeros_like(grid)  # of a~ given the phantom action a, times a constant
        for mean, var in [(-1.0, 2.0), (0.5, 1.0)]:
            weights = toy.importance_weights(grid, mean, torch.tensor(var), math.inf)
            mass += weights * normal_pdf(grid, mean, var) * normal_pdf(a, grid, std**2)
        fit = (mass * toy.reward(grid)).sum() / mass.sum()
        torch.testing.assert_close(fit, toy.smoothed_reward(a, std**2)[0])


def test_weights_are_capped(float64):
    weights = toy.importance_weights(torch.tensor([0.0, 9.0]), 0.0, torch.tensor(4.0), 50.0)
    torch.testing.assert_close(weights, torch.tensor([2 * math.sqrt(2 * math.pi), 50.0]))


@pytest.mark.parametrize("method", ["smoothie", "closed form"])
def test_figure_2_smoothie_escapes_and_narrows(method):
    args = toy.Args(seeds=4)
    path = toy.train(args, method)
    assert toy.escaped(path).all()
    assert (path[-1, :, 1] < 0.8 * toy.STD_INIT).all()
    assert (path.median(1).values - toy.gradient_flow(args)).abs().mean() < 0.05


@pytest.mark.parametrize("method", ["ddpg", "paper"])
def test_figure_2_the_others_stay(method):
    path = toy.train(toy.Args(seeds=4), method)
    assert not toy.escaped(path).any()
    assert (path[:, :, 1] == toy.STD_INIT).all() == (method == "ddpg")


def test_the_papers_form_works_with_weights_or_after_many_uniform_actions():
    """On most seeds; without either, on none."""
    args = toy.Args(seeds=6)
    assert toy.escaped(toy.train(args, "paper, weights 1/q")).sum() >= 4
    assert toy.escaped(toy.train(args, "paper", uniform=20_000)).sum() >= 4


def test_exact_flow_narrows_widens_and_narrows():
    std = toy.gradient_flow(toy.Args())[:, 1]
    dip = std[: len(std) // 2].argmin()
    peak = dip + std[dip:].argmax()
    assert std[0] > std[dip] + 0.01
    assert std[peak] > std[dip] + 0.01
    assert std[-1] < 0.5 * std[peak]


def test_main_prints_every_method_and_draws(capsys, tmp_path):
    output = tmp_path / "new" / "figure.png"
    toy.main(toy.Args(seeds=2, total_timesteps=20, learning_starts=10, output=str(output)))
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 8 + 1
    assert all("/2 |" in row for row in rows[2:10])
    assert output.stat().st_size > 20_000


@pytest.mark.parametrize("flags", [{"learning_starts": 3_000}, {"exploration": 0.9}])
def test_bad_input_gets_one_sentence(flags):
    with pytest.raises(SystemExit, match=r"^--[a-z-]+ must be [^\n]*$"):
        toy.main(toy.Args(**flags))
