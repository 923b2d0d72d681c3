"""The estimators of theory/ against quadrature, automatic differentiation, finite differences and exact solutions."""

import ast
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from theory import bandit, derivatives, lqr, weights

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "theory" / "README.md").read_text()
SCRIPTS = [bandit, lqr, weights, derivatives]


def gauss_hermite(order, dim=1):
    """Nodes (order^dim, dim) and weights (order^dim,) of an expectation under N(0, I), float64."""
    x, w = np.polynomial.hermite_e.hermegauss(order)
    nodes = np.stack(np.meshgrid(*[x] * dim, indexing="ij"), -1).reshape(-1, dim)
    products = np.stack(np.meshgrid(*[w / w.sum()] * dim, indexing="ij"), -1).reshape(-1, dim).prod(1)
    return torch.tensor(nodes), torch.tensor(products)


def symmetric(x):
    """Gradients by autograd see each entry of a symmetric matrix by itself; their symmetric part is the derivative."""
    return (x + x.mT) / 2


# theory/bandit.py


def test_bandit_smoothed_reward_by_quadrature(float64):
    nodes, w = gauss_hermite(200)
    for a, std in [(-1.0, 1.0), (0.3, 0.7), (1.2, 0.4)]:
        a = torch.tensor(a)
        found = bandit.smoothed_reward(a, std)
        assert found[0].item() == pytest.approx((w @ bandit.reward(a + std * nodes[:, 0])).item(), abs=1e-6)
        slope = torch.func.grad(lambda x, std=std: bandit.smoothed_reward(x, std)[0])
        torch.testing.assert_close(found[1], slope(a), rtol=0, atol=1e-12)
        torch.testing.assert_close(found[2], torch.func.grad(slope)(a), rtol=0, atol=1e-12)


def test_bandit_critic_and_its_average_in_closed_form(float64):
    critic = bandit.Critic(3, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(critic.w)
    a, std = torch.tensor([-0.7, 0.1, 0.8]), torch.tensor([0.9, 0.3, 1.4])
    grid = torch.linspace(-9, 9, 4_001)
    w = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])

    def average(a):
        return critic(a.unsqueeze(1) + std.unsqueeze(1) * grid) @ w

    for function, given in [(lambda a: critic(a.unsqueeze(1)).squeeze(1), ()), (average, (std,))]:
        x = a.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        gradient, hessian = critic.derivatives(a, *given)
        assert second.abs().max() > 0.1
        torch.testing.assert_close(gradient, first, rtol=0, atol=1e-9)
        torch.testing.assert_close(hessian, second, rtol=0, atol=1e-9)


class ExactCritic:
    """Stands in for a critic that has learned the reward perfectly."""

    @staticmethod
    def derivatives(a, std=0.0):
        return bandit.smoothed_reward(a, std)[1:]


AVERAGES = {  # of whose gradient and Hessian each estimate is the average, if its critic of Q is perfect
    bandit.score: ("Q~", "Q~"),
    bandit.dpg: ("Q", None),
    bandit.svg: ("Q~", None),
    bandit.svg_std: ("Q~", "Q~"),
    bandit.derivatives: ("Q", "Q"),
    bandit.closed_form: ("Q~", "Q~"),
}


@pytest.mark.parametrize("estimate", AVERAGES, ids=lambda estimate: estimate.__name__)
def test_what_each_estimate_averages_to(float64, estimate):
    assert set(AVERAGES) == {method[0] for method in bandit.METHODS.values()}
    mean, std = torch.tensor(-0.8), torch.tensor(0.5)
    nodes, w = gauss_hermite(200)
    noise = nodes[:, 0]
    step = SimpleNamespace(mean=mean.expand(200), std=std.expand(200), noise=noise, reward=bandit.reward(mean + std * noise))
    exact = {"Q~": bandit.smoothed_reward(mean, std), "Q": bandit.smoothed_reward(mean, 0.0)}
    for order, found, name in zip((1, 2), estimate(ExactCritic, step), AVERAGES[estimate], strict=True):
        assert abs(exact["Q~"][order] - exact["Q"][order]) > 0.1 and abs(exact["Q~"][order]) > 0.05
        assert (w @ found).item() == pytest.approx(exact[name][order].item() if name else 0.0, abs=1e-4)


def test_the_score_is_the_derivative_of_the_log_density(float64):
    mean, log_var, a, reward = torch.tensor([0.3, 1.1, -0.4, 2.0])

    def log_density(mean, log_var):
        return torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(a)

    in_mean, in_log_var = torch.func.grad(log_density, (0, 1))(mean, log_var)
    std = (0.5 * log_var).exp()
    gradient, hessian = bandit.score(None, SimpleNamespace(std=std, noise=(a - mean) / std, reward=reward))
    torch.testing.assert_close(gradient, in_mean * reward)
    torch.testing.assert_close(0.5 * hessian * log_var.exp(), in_log_var * reward)  # what ascend adds to phi
    args = bandit.Args(policy_lr=0.1, log_var_lr=0.2)
    new_mean, new_log_var = bandit.ascend(args, mean, log_var, gradient, hessian)
    torch.testing.assert_close(new_mean - mean, 0.1 * in_mean * reward)
    torch.testing.assert_close(new_log_var - log_var, 0.2 * in_log_var * reward)


def test_the_update_of_section_3_learns_the_smoothed_value_at_the_mean(float64):
    """Its loss, averaged over the action, is a parabola in the value that the critic has at the mean; the minimum is Q~."""
    mean, std = torch.tensor(0.4), torch.tensor(0.6)
    nodes, w = gauss_hermite(200)
    a = mean + std * nodes.T
    batch = SimpleNamespace(a=a, means=mean.expand_as(a), reward=bandit.reward(a))
    values = torch.tensor([0.0, 0.5, 1.0])
    losses = [(bandit.fit_at_mean([lambda x, v=v: v + (x - mean).abs()], batch) @ w).item() for v in values]
    best = 0.25 * (3 * losses[0] - 4 * losses[1] + losses[2]) / (losses[0] - 2 * losses[1] + losses[2])
    assert best == pytest.approx(bandit.smoothed_reward(mean, std)[0].item(), abs=1e-6)


CRITICS = [name for name, (_, fit, _) in bandit.METHODS.items() if fit not in (None, bandit.fit_at_mean) and "SVG" not in name]


@pytest.mark.parametrize("name", CRITICS)
def test_what_each_critic_learns_from_the_policys_own_actions(name):
    """The first step of the policy after 1,200 updates of the critic, against the values that each fit converges to."""
    estimate, fit, networks = bandit.METHODS[name]
    args = bandit.Args(seeds=10, total_timesteps=1_201, learning_starts=1_200, batch_size=128, policy_lr=1.0, log_var_lr=1.0)
    path = bandit.train(args, estimate, fit, networks)
    gradient, hessian = np.mean(path[-1, :, 0] + 1), np.mean(4 * np.log(path[-1, :, 1]))  # sigma is 1: H = 2 * change of phi
    _, *exact = (x.item() for x in bandit.smoothed_reward(torch.tensor(-1.0), 1.0))
    _, *of_q = (x.item() for x in bandit.smoothed_reward(torch.tensor(-1.0), 0.0))
    _, *narrower = (x.item() for x in bandit.smoothed_reward(torch.tensor(-1.0), math.sqrt(0.5)))
    if fit is bandit.fit_phantom:  # at (a + mu) / 2: half the slope, a quarter of the curvature
        assert gradient == pytest.approx(narrower[0] / 2, abs=0.02) and abs(gradient - exact[0]) > 0.05
        assert hessian == pytest.approx(narrower[1] / 4, abs=0.03)
    elif fit is bandit.fit_q and estimate is not bandit.closed_form:
        assert gradient == pytest.approx(of_q[0], abs=0.1)
        assert estimate is bandit.dpg or hessian == pytest.approx(of_q[1], rel=0.4)
    else:
        tolerance = 0.01 if estimate is bandit.closed_form else 0.03
        assert gradient == pytest.approx(exact[0], abs=tolerance)
        assert hessian == pytest.approx(exact[1], abs=3 * tolerance)


def test_closed_form_follows_the_flow_where_dpg_stays():
    args = bandit.Args(seeds=3, batch_size=64, total_timesteps=2_500, policy_lr=2e-2, log_var_lr=3e-2, learning_starts=500)
    flow = bandit.gradient_flow(args)
    assert flow[-1, 0] > 0.9
    path = bandit.train(args, *bandit.METHODS["Smoothie, closed form"])
    assert np.abs(path - flow[:, None]).max() < 0.25
    args.total_timesteps = 1_200
    dpg = bandit.train(args, *bandit.METHODS["DPG"])
    assert np.abs(dpg[-1, :, 0] + 1).max() < 0.2 and (dpg[:, :, 1] == 1).all()


def test_the_row_of_a_method():
    """Three seeds that stand still: one at the better bump, one at the worse, one too wide."""
    still = torch.tensor([[0.9, 0.2], [-1.0, 0.3], [1.1, 20.0]])
    path, flow = still.expand(30, -1, -1).numpy(), np.tile([0.9, 0.3], (30, 1))
    row = bandit.summarise(bandit.Args(learning_starts=10), path, flow)
    best = bandit.reward(torch.tensor(bandit.MODES[1])).item()
    values = [bandit.smoothed_reward(mean, std)[0].item() for mean, std in still]
    means = [bandit.reward(mean).item() for mean, _ in still]
    assert row[:2] == ("1/3", "0.90, 0.30")
    assert row[2:] == pytest.approx([best - np.median(values), best - np.median(means), 1.9], abs=1e-5)


# theory/weights.py: full covariance, and importance weights


def test_smoothed_reward_with_a_full_covariance_by_quadrature(float64):
    nodes, w = gauss_hermite(80, 2)
    mean, covariance = weights.MEAN.double(), weights.COVARIANCE.double()
    actions = mean + nodes @ torch.linalg.cholesky(covariance).T
    for module in (weights, derivatives):
        expected = w @ module.smoothed_reward(actions, 0 * covariance)
        torch.testing.assert_close(module.smoothed_reward(mean, covariance), expected, rtol=0, atol=1e-7)


def test_theorem_1_with_a_full_covariance(float64):
    mean, covariance = weights.MEAN.double(), weights.COVARIANCE.double()
    in_covariance = symmetric(torch.func.grad(weights.smoothed_reward, 1)(mean, covariance))
    hessian = torch.func.hessian(weights.smoothed_reward)(mean, covariance)
    assert hessian[0, 1].abs() > 0.05
    torch.testing.assert_close(in_covariance, hessian / 2, rtol=0, atol=1e-10)


@pytest.mark.parametrize("relu", [False, True], ids=["GELU", "ReLU"])
def test_closed_form_with_a_full_covariance(float64, relu):
    critic = weights.Critic(1, torch.Generator().manual_seed(0), relu, units=16)
    torch.nn.init.normal_(critic.w)
    a, covariance = torch.tensor([0.3, -0.5]), weights.COVARIANCE.double()

    def smoothed(a, covariance):
        return critic.smoothed(a.view(1, 1, 2), covariance)[0].squeeze()

    value, gradient, hessian = (x.squeeze().detach() for x in critic.smoothed(a.view(1, 1, 2), covariance))
    x = torch.linspace(-7, 7, 701)  # a fine grid, as a ReLU has a kink
    grid = torch.cartesian_prod(x, x)
    density = torch.exp(-0.5 * grid.square().sum(1)) / (2 * math.pi) * (x[1] - x[0]) ** 2
    expected = density @ critic((a + grid @ torch.linalg.cholesky(covariance).T).unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(gradient, torch.func.grad(smoothed)(a, covariance), rtol=0, atol=1e-10)
    torch.testing.assert_close(hessian, torch.func.hessian(smoothed)(a, covariance), rtol=0, atol=1e-10)
    theorem_1 = symmetric(torch.func.grad(smoothed, 1)(a, covariance))
    assert hessian[0, 1].abs() > 1e-2
    torch.testing.assert_close(theorem_1, hessian / 2, rtol=0, atol=1e-10)


def test_what_weighted_phantom_actions_converge_to(float64):
    """The loss's weights at one phantom action, over the whole buffer: the fit's limit is the weighted mean of the rewards."""
    mean, covariance = weights.MEAN.double(), weights.COVARIANCE.double()
    args = weights.Args(max_weight=math.inf)
    x = torch.linspace(-8, 8, 801)
    grid = mean + torch.cartesian_prod(x, x) @ torch.linalg.cholesky(covariance).T
    rewards, zero = weights.smoothed_reward(grid, 0 * covariance), [lambda a: torch.zeros(a.shape[:2])]
    for shift in ([0.0, 0.0], [0.4, -0.3]):
        a = mean + torch.tensor(shift)
        noise = (a - grid).view(1, -1, 1, 2)  # every action of the buffer has the same phantom action
        drawn = weights.density(grid) * torch.distributions.MultivariateNormal(a, covariance).log_prob(grid).exp()
        limits = {}
        for loss in (weights.no_weights, weights.weights, weights.ratio_weights):
            found = drawn * loss(args, zero, grid.unsqueeze(0), torch.ones(1, len(grid)), noise).squeeze(0)
            limits[loss] = (found @ rewards / found.sum()).item()
        exact = weights.smoothed_reward(a, covariance).item()
        assert limits[weights.weights] == pytest.approx(exact, abs=1e-6)
        assert limits[weights.ratio_weights] == pytest.approx(exact, abs=1e-6)
        narrower, gradient, hessian = weights.limit_without_weights(a.view(1, 1, 2))
        assert limits[weights.no_weights] == pytest.approx(narrower.item(), abs=1e-6)
        assert abs(narrower.item() - exact) > 0.005
    at = (a + mean) / 2, covariance / 2
    torch.testing.assert_close(gradient.squeeze(), torch.func.grad(weights.smoothed_reward)(*at) / 2)
    torch.testing.assert_close(hessian.squeeze(), torch.func.hessian(weights.smoothed_reward)(*at) / 4)


def test_first_route_fits_averages_of_q(float64):
    """(16) and (17) with stand-ins for the two critics."""
    args, covariance = weights.Args(samples=2_000), weights.COVARIANCE.double()
    a = torch.tensor([[0.3, -0.2]]).expand(1, 4_000, 2)
    noise = torch.randn(1, 4_000, 2_000, 2) @ torch.linalg.cholesky(covariance).T

    def q(actions):
        return weights.smoothed_reward(actions, 0 * covariance)

    def zero(actions):
        return torch.zeros(actions.shape[:2])

    errors = weights.first_route(args, [zero, q], a, torch.full((1, 4_000), 2.0), noise)
    torch.testing.assert_close(errors[:, :4_000], (q(a) - 2) ** 2)
    targets = (errors[:, 4_000:] / args.samples).sqrt()
    assert targets.shape == (1, 2) and targets.std() > 0
    torch.testing.assert_close(targets.mean(), weights.smoothed_reward(a[0, 0], covariance).abs(), rtol=0, atol=0.02)


def test_effective_sample_size():
    """1/q is C e^x with x exponentially distributed, so that both moments of the capped weights are elementary."""
    assert weights.effective_samples(weights.Args(), weights.no_weights) == 1
    scale = 2 * math.pi * torch.linalg.det(weights.COVARIANCE).sqrt().item()
    for cap in (5.0, 50.0):
        end = math.log(cap / scale)
        first, second = scale * end + cap * math.exp(-end), scale**2 * (math.exp(end) - 1) + cap**2 * math.exp(-end)
        found = weights.effective_samples(weights.Args(max_weight=cap), weights.weights)
        assert found == pytest.approx(first**2 / second, rel=0.02)


def test_errors_of_the_table_are_relative():
    """The exact values have none. Times 1.1 they are wrong by 10% of the value, the gradient and the Hessian."""

    def f(a):
        return weights.smoothed_reward(a, weights.COVARIANCE)

    def exact(a):
        flat = a.reshape(-1, 2)
        gradient, hessian = torch.vmap(torch.func.grad(f))(flat), torch.vmap(torch.func.hessian(f))(flat)
        return f(a), gradient.view(*a.shape), hessian.view(*a.shape, 2)

    args = weights.Args(runs=1)
    assert weights.errors(args, exact) == pytest.approx([0, 0, 0], abs=1e-5)
    torch.manual_seed(0)
    values = f(torch.distributions.MultivariateNormal(weights.MEAN, weights.COVARIANCE).sample((20_000,)))
    found = weights.errors(args, lambda a: [1.1 * x for x in exact(a)])
    assert found[0] == pytest.approx(0.1 * values.square().mean().sqrt().item() / values.std().item(), rel=0.1)
    assert found[1:] == pytest.approx([0.1, 0.1], abs=1e-5)


def test_closed_form_learns_the_smoothed_derivatives_with_a_full_covariance():
    args = weights.Args(runs=2, actions=3_000, updates=600, noise=0.0)
    _, gradient, hessian = weights.errors(args, weights.train(args, *weights.METHODS["closed form, GELU"]))
    assert gradient < 0.05 and hessian < 0.05


# theory/derivatives.py: derivative Bellman equations and compatible critics


def test_derivative_bellman_equations_by_quadrature(float64):
    nodes, w = gauss_hermite(80, 2)
    mean, covariance = derivatives.MEAN.double(), derivatives.COVARIANCE.double()
    d = nodes @ torch.linalg.cholesky(covariance).T
    first, second = derivatives.factors(d, covariance)
    for baseline in (0.0, 0.7):  # any baseline leaves both averages alone
        y = derivatives.smoothed_reward(mean + d, 0 * covariance) - baseline
        gradient = torch.func.grad(derivatives.smoothed_reward)(mean, covariance)
        hessian = torch.func.hessian(derivatives.smoothed_reward)(mean, covariance)
        torch.testing.assert_close(torch.einsum("n,ni,n->i", w, first, y), gradient, rtol=0, atol=1e-7)
        torch.testing.assert_close(torch.einsum("n,nij,n->ij", w, second, y), hessian, rtol=0, atol=1e-6)
    found = derivatives.derivative_bellman(d, y, covariance)
    torch.testing.assert_close(found[0], (first * y[:, None]).mean(0))
    torch.testing.assert_close(found[1], (second * y[:, None, None]).mean(0))


def test_derivative_bellman_equations_with_dynamics(float64):
    """On the regulator, y = r + gamma Q~(s', mu(s')) is quadratic, so that quadrature over action and next state is exact."""
    K, covariance = GAIN, COVARIANCE
    H, q = lqr.smoothed_action_value(K, covariance)
    nodes, w = gauss_hermite(5, 4)
    s, a = np.array([0.7, -1.2]), np.array([0.4, 0.9])
    d = nodes[:, :2].numpy() @ np.linalg.cholesky(covariance).T
    next_s = s @ lqr.A.T + (a + d) @ lqr.B.T + nodes[:, 2:].numpy() @ np.linalg.cholesky(lqr.W).T
    x = np.hstack([next_s, next_s @ K.T])
    reward = -s @ lqr.C @ s - ((a + d) @ lqr.D * (a + d)).sum(1)
    y = torch.tensor(reward + lqr.GAMMA * ((x @ H * x).sum(1) + q))
    first, second = derivatives.factors(torch.tensor(d), torch.tensor(covariance))
    expected = 2 * torch.tensor(H[2:] @ np.concatenate([s, a]))
    torch.testing.assert_close(torch.einsum("n,ni,n->i", w, first, y), expected)
    torch.testing.assert_close(torch.einsum("n,nij,n->ij", w, second, y), 2 * torch.tensor(H[2:, 2:]))
    assert (w @ y).item() == pytest.approx(np.concatenate([s, a]) @ H @ np.concatenate([s, a]) + q)  # (12) itself


def test_variance_reduction_is_unbiased_and_cancels_what_it_should(float64):
    y, covariance = torch.randn(3, 10), derivatives.COVARIANCE.double()
    for i in range(10):
        others = y[:, [j for j in range(10) if j != i]].mean(1)
        torch.testing.assert_close(derivatives.leave_one_out(y)[:, i], y[:, i] - others)
    for i in range(5):
        others = y[:, [j for j in range(10) if j % 5 != i]].mean(1)
        torch.testing.assert_close(derivatives.pair_baseline(y)[:, [i, i + 5]], y[:, [i, i + 5]] - others[:, None])
    half = torch.randn(1, 20, 2)
    pairs = torch.cat([half, -half], 1)
    even, odd = pairs.square().sum(2), pairs.pow(3).sum(2)
    assert derivatives.derivative_bellman(pairs, even, covariance)[0].abs().max() < 1e-12
    assert derivatives.derivative_bellman(pairs, odd, covariance)[1].abs().max() < 1e-12
    assert derivatives.derivative_bellman(pairs, odd, covariance)[0].abs().max() > 0.1


def test_each_estimator_of_the_table_is_right_on_average_and_the_critics_vary_less():
    args, covariance = derivatives.Args(runs=300), derivatives.COVARIANCE
    gradient = torch.func.grad(derivatives.smoothed_reward)(derivatives.MEAN, covariance)
    hessian = torch.func.hessian(derivatives.smoothed_reward)(derivatives.MEAN, covariance)
    spread = {}
    for name, (g, h) in derivatives.estimates(args, covariance).items():
        spread[name] = [x.std(0).norm().item() for x in (g, h)]
        for found, exact in [(g, gradient), (h, hessian)]:
            error = 5 * found.std(0).max() / math.sqrt(args.runs)
            bias = 0.05 * exact.norm() if name in ("compatible critic", "closed form") else 0.0  # they are only consistent
            assert (found.mean(0) - exact).abs().max() < error + bias, name
    assert spread["closed form"][0] < 0.6 * spread["plain"][0] and spread["closed form"][1] < 0.6 * spread["plain"][1]
    small = {name: h.std(0).norm() for name, (_, h) in derivatives.estimates(args, 0.09 * covariance).items()}
    assert small["antithetic, baseline"] < 0.75 * small["plain"]


def test_the_table_of_estimators_has_their_spread_and_bias(capsys):
    """The spread of the plain equations by quadrature. An average over the runs still differs by spread / sqrt(runs)."""
    args, covariance = derivatives.Args(), 0.01 * derivatives.COVARIANCE.double()
    derivatives.main(args)
    table = {row.split("|")[1].strip(): row.split("|")[-3:-1] for row in capsys.readouterr().out.splitlines()[2:]}
    nodes, w = gauss_hermite(20, 2)
    d, mean = nodes @ torch.linalg.cholesky(covariance).T, derivatives.MEAN.double()
    second_moment = derivatives.smoothed_reward(mean + d, 0 * covariance) ** 2 + args.noise**2
    exact = torch.func.grad(derivatives.smoothed_reward), torch.func.hessian(derivatives.smoothed_reward)
    for cell, factor, function in zip(table["plain"], derivatives.factors(d, covariance), exact, strict=True):
        norm = function(mean, covariance).norm()
        spread = ((w @ (factor.flatten(1).square().sum(1) * second_moment) / norm**2 - 1) / args.actions).sqrt().item()
        std, bias = map(float, re.fullmatch(r" ([\d.]+) \(([\d.]+)\) ", cell).groups())
        assert std == pytest.approx(spread, rel=0.06)
        assert 0.2 < bias / (spread / math.sqrt(args.runs)) < 3


def test_compatible_critic_recovers_a_quadratic_and_averages_any_other(float64):
    """With d ~ N(0, Sigma), least squares on 1, d and d d^T gives the average gradient and Hessian (Stein's lemma)."""
    covariance = derivatives.COVARIANCE.double()
    d = torch.randn(400_000, 2) @ torch.linalg.cholesky(covariance).T
    g, h = torch.tensor([0.3, -1.0]), torch.tensor([[1.0, 0.4], [0.4, -2.0]])
    found = derivatives.compatible_critic(d[:50], 2 + d[:50] @ g + 0.5 * (d[:50] @ h * d[:50]).sum(1), covariance)
    torch.testing.assert_close(found, (g, h))
    y = derivatives.smoothed_reward(derivatives.MEAN + d, 0 * covariance)
    gradient, hessian = derivatives.compatible_critic(d, y, covariance)
    at = derivatives.MEAN.double(), covariance
    torch.testing.assert_close(gradient, torch.func.grad(derivatives.smoothed_reward)(*at), rtol=0, atol=0.01)
    torch.testing.assert_close(hessian, torch.func.hessian(derivatives.smoothed_reward)(*at), rtol=0, atol=0.03)


def test_compatible_critic_gives_the_exact_policy_gradient(float64):
    """Section 4.4 with mu = K s, a full Sigma and values that no compatible critic can represent.

    (22) as printed has the Hessian 2 dSigma/dphi w_2, so that w_2 is half of the w that condition 1 names.
    """
    states = torch.randn(7, 2)
    theta, phi = torch.tensor([[0.3, -0.2], [0.1, 0.4]]), torch.tensor([0.5, 0.2, 0.4])

    def covariance_of(phi):
        return torch.stack([phi[:2], phi[1:]])

    def smoothed_q(s, a, covariance):  # another landscape at each state
        return (1 + s[0] ** 2) * derivatives.smoothed_reward(a - torch.tanh(2 * s), covariance)

    def objective(theta, phi):
        return torch.stack([smoothed_q(s, theta @ s, covariance_of(phi)) for s in states]).mean()

    in_theta, in_phi = torch.func.grad(objective, (0, 1))(theta, phi)
    covariance = covariance_of(phi)
    at = [(s, theta @ s, covariance) for s in states]
    gradients = torch.stack([torch.func.grad(smoothed_q, 1)(*x) for x in at])
    hessians = torch.stack([torch.func.hessian(smoothed_q, 1)(*x) for x in at]).flatten(1)
    mean_features = torch.stack([torch.func.jacrev(lambda theta, s=s: theta @ s)(theta).flatten(1) for s in states])
    covariance_features = torch.func.jacrev(covariance_of)(phi).flatten(0, 1).expand(7, 4, 3)
    for features, exact, factor, gradient in [
        (mean_features, gradients, 1.0, in_theta.flatten()),
        (covariance_features, hessians, 0.5, in_phi),
    ]:
        w = derivatives.compatible_weights(features, exact)
        assert (features @ w - exact).norm() > 0.1 * exact.norm()  # the fit is not perfect, the policy gradient is
        found = factor * torch.einsum("sdp,sd->p", features, features @ w) / 7  # (13), (15)
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-10)


# theory/lqr.py

GAIN, COVARIANCE = np.array([[-0.3, -0.2], [0.2, -0.4]]), np.array([[0.5, 0.2], [0.2, 0.3]])


def test_return_and_visitation_against_the_sum_over_time():
    F, moment, total, visits = lqr.A + lqr.B @ GAIN, lqr.S, 0.0, np.zeros((2, 2))
    for t in range(600):
        cost = np.trace((lqr.C + GAIN.T @ lqr.D @ GAIN) @ moment) + np.trace(lqr.D @ COVARIANCE)
        total, visits = total - lqr.GAMMA**t * cost, visits + lqr.GAMMA**t * moment
        moment = F @ moment @ F.T + lqr.B @ COVARIANCE @ lqr.B.T + lqr.W
    assert lqr.expected_return(GAIN, COVARIANCE) == pytest.approx(total, rel=1e-10)
    np.testing.assert_allclose(lqr.visitation(GAIN, COVARIANCE), visits, rtol=1e-10)


def test_bellman_equations_of_the_regulator():
    """(3) and (11) by quadrature over the next state, (9) by quadrature over the action; all are quadratic, so it is exact."""
    nodes, w = (x.numpy() for x in gauss_hermite(3, 2))
    (H, q), (smoothed_H, smoothed_q) = lqr.action_value(GAIN, COVARIANCE), lqr.smoothed_action_value(GAIN, COVARIANCE)

    def value(s, a, H, q):
        x = np.concatenate(np.broadcast_arrays(s, a), -1)
        return (x @ H * x).sum(-1) + q

    for s, a in np.random.default_rng(0).standard_normal((5, 2, 2)):
        around = a + nodes @ np.linalg.cholesky(COVARIANCE).T
        assert value(s, a, smoothed_H, smoothed_q) == pytest.approx(w @ value(s, around, H, q))  # (9)
        next_s = lqr.A @ s + lqr.B @ a + nodes @ np.linalg.cholesky(lqr.W).T
        reward = -s @ lqr.C @ s - a @ lqr.D @ a
        bootstrap = w @ value(next_s, next_s @ GAIN.T, smoothed_H, smoothed_q)
        assert value(s, a, H, q) == pytest.approx(reward + lqr.GAMMA * bootstrap)  # (11)
        next_a = (next_s @ GAIN.T)[:, None] + nodes @ np.linalg.cholesky(COVARIANCE).T
        assert w @ value(next_s[:, None], next_a, H, q) @ w == pytest.approx(bootstrap)  # so that (3) holds, too


@pytest.mark.parametrize("covariance", [COVARIANCE, np.zeros((2, 2))], ids=["stochastic", "deterministic"])
def test_gradients_of_the_return_against_finite_differences(covariance):
    """(13) and (15); without covariance (13) is the deterministic policy gradient (6)."""
    in_gain, in_covariance = lqr.gradients(GAIN, covariance)
    for i, j in np.ndindex(2, 2):
        step = np.zeros((2, 2))
        step[i, j] = 1e-5
        central = lqr.expected_return(GAIN + step, covariance) - lqr.expected_return(GAIN - step, covariance)
        assert in_gain[i, j] == pytest.approx(central / 2e-5, rel=1e-6)
        step = (step + step.T) / 2
        central = lqr.expected_return(GAIN, covariance + step) - lqr.expected_return(GAIN, covariance - step)
        assert in_covariance[i, j] == pytest.approx(central / 2e-5, rel=1e-6)


def test_best_gain():
    best = lqr.best_gain()
    for covariance in (COVARIANCE, 0 * COVARIANCE):
        assert np.abs(lqr.gradients(best, covariance)[0]).max() < 1e-10
        for change in 0.1 * np.random.default_rng(0).standard_normal((10, 2, 2)):
            assert lqr.expected_return(best + change, covariance) < lqr.expected_return(best, covariance)


def test_compatible_critic_of_the_regulator_gives_the_gradient_of_the_return():
    """(22) fitted by least squares to values of on-policy actions, V(s) + (a - K s)^T W_1 s + (a - K s)^T W_2 (a - K s)."""
    rng = np.random.default_rng(0)
    visitation = lqr.visitation(GAIN, COVARIANCE)
    s = rng.standard_normal((200, 2)) @ np.linalg.cholesky(visitation).T
    d = rng.standard_normal((200, 2)) @ np.linalg.cholesky(COVARIANCE).T
    H, q = lqr.action_value(GAIN, COVARIANCE)
    x = np.hstack([s, s @ GAIN.T + d])
    rows, columns = np.triu_indices(2)
    state = np.hstack([s[:, rows] * s[:, columns], np.ones((200, 1))])
    features = np.hstack([state, (d[:, :, None] * s[:, None]).reshape(200, 4), d[:, rows] * d[:, columns]])
    w = np.linalg.lstsq(features, (x @ H * x).sum(1) + q, rcond=None)[0]
    W_1, (w_11, w_12, w_22) = w[4:8].reshape(2, 2), w[8:]
    in_gain, in_covariance = lqr.gradients(GAIN, COVARIANCE)
    np.testing.assert_allclose(W_1 @ visitation, in_gain, rtol=1e-8)
    np.testing.assert_allclose(np.array([[w_11, w_12 / 2], [w_12 / 2, w_22]]) / (1 - lqr.GAMMA), in_covariance, rtol=1e-8)
    span = np.linalg.lstsq(lqr.features(s, s @ GAIN.T + d), features, rcond=None)[1]
    assert np.linalg.matrix_rank(features) == 11 and np.abs(span).max() < 1e-15  # the critics of lqr.py are compatible


LIMITS = {"Smoothie, phantom actions": (0.5, 0.25)}  # what the gradient and the Hessian are multiplied by; all others: 1, 1


@pytest.mark.parametrize("name", [name for name in lqr.METHODS if "weights" not in name])
def test_what_each_critic_of_the_regulator_converges_to(name):
    *method, _ = lqr.METHODS[name]
    args = lqr.Args(seeds=4, updates=1_001, learning_starts=1_000, tau=1.0, action_range=15.0)
    K, _, w = path = lqr.train(args, *method)
    error, multiples = lqr.compare(args, path)
    gradient, hessian = LIMITS.get(name, (1, 1))
    assert np.mean(multiples[0]) == pytest.approx(gradient, abs=0.06)
    assert np.mean(multiples[1]) == pytest.approx(hessian, abs=0.06)
    covariance = lqr.FACTOR_INIT @ lqr.FACTOR_INIT.T
    if name == "DDPG":  # it evaluates the policy without noise
        _, q = lqr.action_value(lqr.GAIN_INIT, 0 * covariance)
        assert np.mean(lqr.unpack(w[-1])[1]) == pytest.approx(q, rel=0.2) and q > 0.5 * lqr.action_value(K[0, 0], covariance)[1]
    elif (gradient, hessian) == (1, 1) and "uniform" not in name:
        assert np.median(error[-1]) < 0.15
    else:
        assert (error[-1] > 0.15).all()


def test_weights_on_the_regulator_undo_the_narrower_smoothing_in_part():
    args = lqr.Args(seeds=4, updates=801, learning_starts=800, forgetting=0.02)
    found = {}
    for name in ("", ", weights 1/q(ã)", ", weights q(a)/q(ã)"):
        *method, _ = lqr.METHODS[f"Smoothie, phantom actions{name}"]
        found[name] = np.mean(lqr.compare(args, lqr.train(args, *method))[1], 1)
    assert (found[", weights 1/q(ã)"] > found[""]).all() and (found[", weights q(a)/q(ã)"] > [0.8, 0.6]).all()


def test_ddpg_is_smoothie_without_covariance_on_the_regulator(monkeypatch):
    """Section 5, with the same random numbers: the gain takes the same path."""
    args = lqr.Args(seeds=2, updates=200, learning_starts=100, batch_size=32, action_range=1.0)
    monkeypatch.setattr(lqr, "FACTOR_INIT", 1e-9 * np.eye(2))

    def ddpg_that_draws(args, b, qf):
        b.noise()  # as phantom does
        return lqr.ddpg(args, b, qf)

    for ours, theirs in [(lqr.closed_form, lqr.ddpg), (lqr.phantom, ddpg_that_draws)]:
        gains = [lqr.train(args, update, 1, True, False)[0] for update in (ours, theirs)]
        assert np.abs(gains[0][-1]).max() > 0.05
        np.testing.assert_allclose(*gains, rtol=0, atol=1e-6)


@pytest.mark.parametrize("uniform", [False, True], ids=["own actions", "uniform actions"])
def test_the_chains_visit_states_as_the_return_weighs_them(uniform):
    args, states, actions, steps = lqr.Args(seeds=4, updates=400), [], [], []

    def record(args, b, qf):  # weights of 0 leave the policy where it is
        states.append(np.einsum("nbi,nbj->ij", b.s, b.s) / b.s[..., 0].size)
        actions.append(np.einsum("nbi,nbj->ij", b.a - b.mean, b.a - b.mean) / b.s[..., 0].size)
        step = b.next_s - b.s @ lqr.A.T - b.a @ lqr.B.T
        steps.append(np.einsum("nbi,nbj->ij", step, step) / b.s[..., 0].size)
        cost = np.einsum("nbi,ij,nbj->nb", b.s, lqr.C, b.s) + np.einsum("nbi,ij,nbj->nb", b.a, lqr.D, b.a)
        np.testing.assert_allclose(b.r, -cost)
        return np.zeros((args.seeds, 11))

    lqr.train(args, record, 1, uniform, True)
    covariance = lqr.FACTOR_INIT @ lqr.FACTOR_INIT.T
    expected = (1 - lqr.GAMMA) * lqr.visitation(lqr.GAIN_INIT, covariance)
    np.testing.assert_allclose(np.mean(states[50:], 0), expected, rtol=0, atol=0.03 * np.abs(expected).max())
    np.testing.assert_allclose(np.mean(steps, 0), lqr.W, rtol=0, atol=1e-3)
    spread = args.action_range**2 / 3 * np.eye(2) if uniform else covariance
    np.testing.assert_allclose(np.mean(actions, 0), spread, rtol=0, atol=0.02 * spread.max())


def test_closed_form_follows_the_exact_flow_of_the_regulator():
    args = lqr.Args(seeds=3, updates=1_500, learning_starts=600, gain_lr=1e-3)  # slow enough for the critic to keep up
    flow_K, flow_L = lqr.gradient_flow(args)
    K, L, _ = lqr.train(args, lqr.closed_form, 1, False, True)
    assert np.abs(flow_K[-1]).max() > 0.4 and np.abs(flow_L[-1] - flow_L[0]).max() > 0.2
    assert np.abs(K - flow_K[:, None]).max() < 0.05
    assert np.abs(L - flow_L[:, None]).max() < 0.02


def test_the_table_of_the_regulator_has_the_distances_from_the_best_gain_and_from_the_flow(capsys, monkeypatch):
    """A policy that stands still halfway to the best gain, with critics of twice the exact Q~."""
    args = lqr.Args(output="l.png", seeds=2, updates=1_000, learning_starts=200, batch_size=16, gain_lr=0.0, factor_lr=1e-3)
    monkeypatch.setattr(lqr, "GAIN_INIT", lqr.best_gain() / 2)
    covariance = lqr.FACTOR_INIT @ lqr.FACTOR_INIT.T
    H, q = lqr.smoothed_action_value(lqr.GAIN_INIT, covariance)
    w = 2 * np.append((H * (2 - np.eye(4)))[lqr.ROWS, lqr.COLUMNS], q)
    monkeypatch.setattr(lqr, "METHODS", {"still": (lambda args, b, qf: np.tile(w, (2, 1)), 1, False, False, "black")})
    lqr.main(args)
    cells = [float(cell.strip(" %")) for cell in capsys.readouterr().out.splitlines()[2].split("|")[3:-1]]
    step = np.eye(2) + 2 * args.factor_lr * H[2:, 2:]  # of the flow's factor; H does not depend on the covariance
    steps = np.maximum(np.arange(args.updates) - args.learning_starts, 0)
    factors = [np.linalg.matrix_power(step, n) @ lqr.FACTOR_INIT for n in steps]
    distance = np.mean([np.linalg.norm(L @ L.T - covariance) for L in factors]) / np.linalg.norm(covariance)
    assert cells == [2.0, 2.0, 50.0, pytest.approx(100 * distance, abs=0.06)] and distance > 0.1


def test_the_exact_flow_climbs_the_return():
    K, L = lqr.gradient_flow(lqr.Args(updates=800, learning_starts=50))
    returns = [lqr.expected_return(k, factor @ factor.T) for k, factor in zip(K[::10], L[::10], strict=True)]
    assert (np.diff(returns[6:]) > 0).all() and returns[0] == returns[5]
    assert np.abs(K[-1] - lqr.best_gain()).max() < 0.25 * np.abs(lqr.best_gain()).max()


# The folder


def test_every_script_prints_its_table_and_readme_has_the_same_rows(capsys):
    tiny = {
        bandit: {"output": "b.png", "seeds": 2, "total_timesteps": 40, "learning_starts": 10, "batch_size": 16},
        lqr: {"output": "l.png", "seeds": 2, "updates": 60, "learning_starts": 30, "batch_size": 32},
        weights: {"runs": 2, "actions": 500, "updates": 20, "batch_size": 32},
        derivatives: {"runs": 10, "actions": 64},
    }
    for script in SCRIPTS:
        script.main(script.Args(**tiny[script]))
        header, _, *rows = capsys.readouterr().out.splitlines()
        names = [row.split("|")[1] for row in rows]
        assert all(row.count("|") == header.count("|") for row in rows)
        (table,) = re.findall(rf"^{re.escape(header)}\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)
        assert [row.split("|")[1] for row in table.splitlines()] == names
    assert Path("b.png").stat().st_size > 5_000 and Path("l.png").stat().st_size > 5_000


def names_in(path):
    """Return every function, class, method, field and constant of a file, methods and fields behind their class."""
    names = set()

    def visit(node, prefix):
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")
            for target in [child.target] if isinstance(child, ast.AnnAssign) else getattr(child, "targets", []):
                names.update(prefix + name.id for name in ast.walk(target) if isinstance(name, ast.Name))

    visit(ast.parse(path.read_text()), "")
    return names


def test_readme_names_what_exists():
    references = re.findall(r"`([\w/]+\.py)::([\w.]+)`", README)
    assert len(references) > 40
    missing = [f"{file}::{name}" for file, name in references if name not in names_in(ROOT / file)]
    assert not missing
    cited = {name for file, name in references if file == "tests/test_theory.py"}
    assert len(cited) > 15
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / "theory" / picture).stat().st_size < 150_000


def test_readme_has_every_equation_with_its_code_and_its_test():
    rows = re.findall(r"^\| (\([\d), (]+\)) \|(.*)\|(.*)\|(.*)\|$", README, re.MULTILINE)
    numbers = [int(number) for row in rows for number in re.findall(r"\((\d+)\)", row[0])]
    assert numbers == list(range(1, 23))
    for number, _, code, tests in rows:
        assert re.search(r"\.py::", code) and re.search(r"`tests/\w+\.py::test_", tests), number


def test_files_stay_short():
    assert all(len(Path(script.__file__).read_text().splitlines()) <= 300 for script in SCRIPTS)


BAD_FLAGS = [(script, {"seed": -1}) for script in SCRIPTS]
BAD_FLAGS += [
    (bandit, {name: value}) for name, value in [("seeds", 0), ("q_lr", math.nan), ("samples", 257), ("policy_lr", -1.0)]
]
BAD_FLAGS += [(bandit, {"learning_starts": 4_500}), (bandit, {"output": "nowhere/b.png"}), (bandit, {"output": "b.txt"})]
BAD_FLAGS += [(lqr, {name: value}) for name, value in [("tau", 0.0), ("forgetting", 1.5), ("updates", 0), ("output", "l.txt")]]
BAD_FLAGS += [(weights, {"lr": math.inf * 0}), (weights, {"runs": 0}), (weights, {"samples": 257})]
BAD_FLAGS += [(derivatives, {"actions": 255}), (derivatives, {"actions": 6}), (derivatives, {"noise": -0.1})]


@pytest.mark.parametrize("module, flags", BAD_FLAGS, ids=lambda x: "-".join(x) if isinstance(x, dict) else x.__name__)
def test_bad_flags_get_one_sentence(module, flags):
    with pytest.raises(SystemExit) as exit:
        module.main(module.Args(**flags))
    name = next(iter(flags)).replace("_", "-")
    assert re.fullmatch(rf"--{name} \S+: .+", exit.value.code)


def test_a_diverging_run_says_so():
    command = [sys.executable, ROOT / "theory" / "lqr.py", "--gain-lr", "100", "--updates", "200", "--learning-starts", "10"]
    result = subprocess.run([*command, "--output", "l.png"], capture_output=True, text=True)
    assert result.returncode == 1 and re.fullmatch(r"training has diverged \(.+\); .+\n", result.stderr)
