"""The estimators of theory/ against quadrature, autograd, finite differences and exact solutions.

Most tests of a numbered equation have it in their names: pytest -k _09.
"""

import ast
import functools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import smoothie_toy_bandit as toy
from tests.conftest import gauss_hermite
from theory import bandit, derivatives, lqr, weights

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "theory" / "README.md").read_text()
SCRIPTS = [bandit, lqr, weights, derivatives]


def symmetric(x):
    """Autograd sees each entry of a symmetric matrix by itself: its symmetric part is meant."""
    return (x + x.mT) / 2


# theory/bandit.py


def test_the_walk_prints_what_the_equations_say(capsys):
    ((code, shown),) = re.findall(r"(?s)```python\n(.*?)```\n\n```text\n(.*?)```", README)
    exec(code, {})
    number = r"-?\d+\.\d+"
    printed = capsys.readouterr().out
    assert re.sub(number, "", printed) == re.sub(number, "", shown)
    numbers = [float(word) for word in re.findall(number, printed)]
    numbers_shown = [float(word) for word in re.findall(number, shown)]
    assert numbers[:7] == pytest.approx(numbers_shown[:7], abs=0.002)
    assert numbers[7:] == pytest.approx(numbers_shown[7:], abs=0.03)
    assert numbers[1:6:2] == pytest.approx(numbers[0:6:2], abs=0.002)
    assert numbers[7:9] == pytest.approx([0.5, 1.0], abs=0.03)
    assert numbers[9] == pytest.approx(numbers[11], abs=0.01)


def test_09_smoothed_reward_of_the_bandit_by_quadrature(float64):
    nodes, w = gauss_hermite(200)
    for a, std in [(-1.0, 1.0), (0.3, 0.7), (1.2, 0.4)]:
        a = torch.tensor(a)
        value, gradient, hessian = bandit.smoothed_reward(a, std)
        expected = w @ bandit.reward(a + std * nodes[:, 0])
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        slope = torch.func.grad(lambda x, std=std: bandit.smoothed_reward(x, std)[0])
        torch.testing.assert_close(gradient, slope(a), rtol=0, atol=1e-12)
        torch.testing.assert_close(hessian, torch.func.grad(slope)(a), rtol=0, atol=1e-12)


def test_09_closed_form_of_the_bandits_critic(float64):
    critic = bandit.Critic(3, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(critic.w)
    a = torch.tensor([-0.7, 0.1, 0.8])
    std = torch.tensor([0.9, 0.3, 1.4])
    grid = torch.linspace(-9, 9, 4_001)
    w = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])

    def value(a):
        return critic(a.unsqueeze(1)).squeeze(1)

    def average(a):
        return critic(a.unsqueeze(1) + std.unsqueeze(1) * grid) @ w

    for function, given in [(value, ()), (average, (std,))]:
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


AVERAGES = {  # whose gradient and Hessian each estimate averages to, if its critic of Q is perfect
    bandit.score: ("Q~", "Q~"),
    bandit.dpg: ("Q", None),
    bandit.svg: ("Q~", None),
    bandit.svg_std: ("Q~", "Q~"),
    bandit.derivatives: ("Q", "Q"),
    bandit.closed_form: ("Q~", "Q~"),
}


@pytest.mark.parametrize("estimate", AVERAGES, ids=lambda estimate: estimate.__name__)
def test_04_and_06_what_each_estimate_averages_to(float64, estimate):
    assert set(AVERAGES) == {method.estimate for method in bandit.METHODS.values()}
    mean = torch.tensor(-0.8)
    std = torch.tensor(0.5)
    nodes, w = gauss_hermite(200)
    noise = nodes[:, 0]
    step = SimpleNamespace(mean=mean.expand(200), std=std.expand(200), noise=noise)
    step.reward = bandit.reward(mean + std * noise)
    exact = {"Q~": bandit.smoothed_reward(mean, std), "Q": bandit.smoothed_reward(mean, 0.0)}
    found = estimate(ExactCritic, step)
    for order, samples, name in zip((1, 2), found, AVERAGES[estimate], strict=True):
        assert abs(exact["Q~"][order] - exact["Q"][order]) > 0.1
        expected = exact[name][order].item() if name else 0.0
        assert (w @ samples).item() == pytest.approx(expected, abs=1e-4)


def test_04_score_is_the_derivative_of_the_log_density(float64):
    mean, log_var, a, reward = torch.tensor([0.3, 1.1, -0.4, 2.0])

    def log_density(mean, log_var):
        return torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(a)

    in_mean, in_log_var = torch.func.grad(log_density, (0, 1))(mean, log_var)
    std = (0.5 * log_var).exp()
    step = SimpleNamespace(std=std, noise=(a - mean) / std, reward=reward)
    gradient, hessian = bandit.score(None, step)
    args = bandit.Args(policy_lr=0.1, log_var_lr=0.2)
    new_mean, new_log_var = bandit.ascend(args, mean, log_var, gradient, hessian)
    torch.testing.assert_close(new_mean - mean, 0.1 * in_mean * reward)
    torch.testing.assert_close(new_log_var - log_var, 0.2 * in_log_var * reward)


def test_10_the_exact_flow_of_the_bandit_is_that_of_the_toy():
    """In variances there and in standard deviations here, with the same bumps."""
    steps = {"total_timesteps": 1_500, "learning_starts": 100, "policy_lr": 2e-2}
    flow = bandit.gradient_flow(bandit.Args(**steps, log_var_lr=3e-2))
    expected = toy.gradient_flow(toy.Args(**steps, log_var_lr=3e-2)).numpy()
    assert np.ptp(flow, axis=0).min() > 0.1
    np.testing.assert_allclose(flow, expected, rtol=0, atol=1e-4)


def test_section_3_learns_the_smoothed_value_at_the_mean(float64):
    """The loss, averaged over the action, is a parabola in the critic's value at the mean."""
    mean = torch.tensor(0.4)
    std = torch.tensor(0.6)
    nodes, w = gauss_hermite(200)
    a = mean + std * nodes.T
    batch = SimpleNamespace(a=a, mean=mean.expand_as(a), reward=bandit.reward(a))

    def loss(value):
        critic = [lambda x: value + (x - mean).abs()]
        return (bandit.fit_at_mean(critic, batch) @ w).item()

    low, middle, high = loss(0.0), loss(0.5), loss(1.0)
    best = 0.25 * (3 * low - 4 * middle + high) / (low - 2 * middle + high)
    assert best == pytest.approx(bandit.smoothed_reward(mean, std)[0].item(), abs=1e-6)


CRITICS = {  # the share S / (S + Sigma) that stretches what each critic learns
    "Smoothie, phantom actions": 1 / 2,
    "Smoothie, phantom actions, weights": 1,
    "Smoothie, phantom actions, wider behaviour": 9 / 13,  # S = 1.5^2 Sigma
    "Smoothie, exact phantom actions": 1,
    "Smoothie, first route": 1,
    "Smoothie, closed form": 1,
}


@pytest.mark.parametrize("name", CRITICS)
def test_18_what_each_critic_of_the_bandit_learns(name, monkeypatch):
    """The policy's first step after 1,000 updates of the critic, from actions of its own.

    The paper's phantom action a ~ N(a~, Sigma) of a~ ~ N(mu, S) has a~ given a of mean
    mu + share (a - mu) and variance share Sigma, share = S / (S + Sigma). The gradients are far
    apart where sigma is 1, the Hessians where it is 0.5.
    """
    args = bandit.Args(seeds=10, total_timesteps=1_001, learning_starts=1_000, batch_size=128)
    args.policy_lr = 1.0
    args.log_var_lr = 1.0
    share = CRITICS[name]
    closed_form = name == "Smoothie, closed form"
    mean = torch.tensor(bandit.MODES[0])

    path = bandit.train(args, bandit.METHODS[name])
    gradient = np.mean(path[-1, :, 0] - bandit.MODES[0])
    _, narrower, _ = bandit.smoothed_reward(mean, math.sqrt(share))
    assert gradient == pytest.approx(share * narrower.item(), abs=0.01 if closed_form else 0.02)

    std = 0.5
    monkeypatch.setattr(bandit, "STD_INIT", std)
    path = bandit.train(args, bandit.METHODS[name])
    hessian = np.mean(4 * np.log(path[-1, :, 1] / std) / std**2)  # phi changes by H sigma^2 / 2
    _, _, narrower = bandit.smoothed_reward(mean, math.sqrt(share) * std)
    tolerance = 0.04 if closed_form else 0.19
    assert hessian == pytest.approx(share**2 * narrower.item(), abs=tolerance)


def test_10_closed_form_reaches_the_better_bump_where_dpg_stays():
    args = bandit.Args(seeds=3, batch_size=64, total_timesteps=1_800, learning_starts=400)
    args.policy_lr = 3e-2
    args.log_var_lr = 4.5e-2
    worse, better = bandit.MODES
    path = bandit.train(args, bandit.METHODS["Smoothie, closed form"])
    assert np.abs(path[-1, :, 0] - better).max() < bandit.WIDTH
    args.total_timesteps = 800
    path = bandit.train(args, bandit.METHODS["DPG"])
    assert np.abs(path[-1, :, 0] - worse).max() < bandit.WIDTH
    assert (path[:, :, 1] == bandit.STD_INIT).all()


def test_the_row_of_a_method_of_the_bandit():
    """Three seeds that stand still: one at the better bump, one at the worse, one too wide."""
    still = torch.tensor([[0.9, 0.2], [-1.0, 0.3], [1.1, 20.0]])
    path = still.expand(30, -1, -1).numpy()
    flow = np.tile([0.9, 0.3], (30, 1))
    row = bandit.summarise(bandit.Args(learning_starts=10), path, flow)
    best = bandit.reward(torch.tensor(bandit.MODES[1])).item()
    values = [bandit.smoothed_reward(mean, std)[0].item() for mean, std in still]
    means = [bandit.reward(mean).item() for mean, _ in still]
    assert row[:2] == ("1/3", "0.90, 0.30")
    expected = [best - np.median(values), best - np.median(means), 1.9]
    assert row[2:] == pytest.approx(expected, abs=1e-5)


# Exact phantom actions, in all three scripts that have them


def draw_with_bandit(a_tilde, mean, behaviour, covariance):
    actions = []

    def record(a):
        actions.append(a)
        return torch.zeros_like(a)

    batch = SimpleNamespace(a=a_tilde.T, mean=mean, reward=torch.zeros(1))
    batch.std = behaviour[0, 0].sqrt()
    batch.policy_std = covariance[0, 0].sqrt()
    batch.fresh_noise = torch.randn(1, len(a_tilde), 1)
    bandit.fit_exact_phantom([record], batch)
    return actions[0].T


def draw_with_lqr(a_tilde, mean, behaviour, covariance):
    actions = []
    rng = np.random.default_rng(0)
    shape = (1, *a_tilde.shape)

    class Record:
        w = lagged = None

        def __call__(self, w, s, a):
            return 0.0

        def fit(self, s, a, y, weights):
            actions.append(a)

    b = SimpleNamespace(s=None, next_s=None, next_mean=None, r=0.0)
    b.a = a_tilde.numpy()[None]
    b.mean = mean.numpy()
    b.covariance = covariance.numpy()[None]
    b.behaviour_covariance = behaviour.numpy()[None]
    b.draw = lambda factor: rng.standard_normal(shape) @ factor.swapaxes(1, 2)
    lqr.exact_phantom(None, b, Record())
    return torch.tensor(actions[0][0])


def draw_with_weights(a_tilde, mean, behaviour, covariance):
    return weights.exact_phantom(a_tilde, torch.randn_like(a_tilde), behaviour)


@pytest.mark.parametrize("draw", [draw_with_bandit, draw_with_lqr, draw_with_weights])
def test_12_given_an_exact_phantom_action_the_action_is_gaussian_around_it(float64, draw):
    """Regression of a~ on a: intercept 0, slope I, residual covariance Sigma.

    a and a~ are jointly Gaussian, so that this is the whole law. The behaviour S = Sigma + V is no
    multiple of Sigma. Tolerances are five standard errors.
    """
    mean = weights.MEAN.double()
    covariance = weights.COVARIANCE.double()
    wider = torch.tensor([[0.3, -0.1], [-0.1, 0.2]])  # V
    if draw is draw_with_bandit:
        mean, covariance, wider = mean[:1], covariance[:1, :1], wider[:1, :1]
    n = 400_000
    dim = len(mean)
    behaviour = covariance + wider
    a_tilde = mean + torch.randn(n, dim) @ torch.linalg.cholesky(behaviour).T

    def regress(a):
        x = torch.cat([torch.ones(n, 1), a - mean], 1)
        solution = torch.linalg.lstsq(x, a_tilde - mean).solution
        residuals = a_tilde - mean - x @ solution
        return solution[0], solution[1:].T, residuals.T @ residuals / n

    a = draw(a_tilde, mean, behaviour, covariance)
    intercept, slope, residual = regress(a)
    var = covariance.diagonal()
    intercept_error = (var / n).sqrt()
    slope_error = (var[:, None] * torch.linalg.inv(wider).diagonal() / n).sqrt()
    residual_error = ((var[:, None] * var + covariance**2) / n).sqrt()
    assert (intercept.abs() < 5 * intercept_error).all()
    assert ((slope - torch.eye(dim)).abs() < 5 * slope_error).all()
    assert ((residual - covariance).abs() < 5 * residual_error).all()

    paper = a_tilde + torch.randn(n, dim) @ torch.linalg.cholesky(covariance).T
    attenuated = behaviour @ torch.linalg.inv(behaviour + covariance)
    assert ((regress(paper)[1] - attenuated).abs() < 0.01).all()
    assert (attenuated - torch.eye(dim)).abs().max() > 0.3


def test_12_limits_of_the_exact_phantom_action(float64):
    """A very wide behaviour gives the paper's phantom action, the policy itself its mean."""
    mean = weights.MEAN.double()
    covariance = weights.COVARIANCE.double()
    a_tilde = torch.randn(5, 2)
    wide = 1e9 * torch.tensor([[1.0, 0.3], [0.3, 2.0]])
    center = weights.exact_phantom(a_tilde, torch.zeros(5, 2), wide)
    torch.testing.assert_close(center, a_tilde, rtol=0, atol=1e-7)
    columns = weights.exact_phantom(a_tilde[:2], torch.eye(2), wide) - center[:2]
    torch.testing.assert_close(columns.T @ columns, covariance, rtol=0, atol=1e-7)
    at_mean = weights.exact_phantom(a_tilde, torch.randn(5, 2), covariance)
    torch.testing.assert_close(at_mean, mean.expand(5, 2), rtol=0, atol=1e-6)


def phantom_density(grid, a, behaviour):
    """Return the density of the exact phantom action at a, for each action of the grid."""
    center = weights.exact_phantom(grid, torch.zeros_like(grid), behaviour)
    spread = weights.exact_phantom(grid[:2], torch.eye(2), behaviour) - center[:2]
    phantom = torch.distributions.MultivariateNormal(center, spread.T @ spread)
    return phantom.log_prob(a).exp()


def test_12_exact_phantom_actions_converge_to_the_exact_value(float64):
    """The fit's limit at a is the mean reward over the buffer, given the phantom action a."""
    mean = weights.MEAN.double()
    covariance = weights.COVARIANCE.double()
    behaviour = covariance + torch.tensor([[0.3, -0.1], [-0.1, 0.2]])
    x = torch.linspace(-8, 8, 801)
    grid = mean + torch.cartesian_prod(x, x) @ torch.linalg.cholesky(behaviour).T
    buffer = torch.distributions.MultivariateNormal(mean, behaviour).log_prob(grid).exp()
    rewards = weights.smoothed_reward(grid, 0 * covariance)
    for shift in ([0.0, 0.0], [0.4, -0.3], [-0.9, 0.8]):
        a = mean + torch.tensor(shift)
        given = buffer * phantom_density(grid, a, behaviour)
        limit = given @ rewards / given.sum()
        exact = weights.smoothed_reward(a, covariance)
        torch.testing.assert_close(limit, exact, rtol=0, atol=1e-6)


def test_12_least_squares_on_exact_phantom_actions_averages_the_derivatives(float64):
    """Least squares on 1, d and d d^T, d = a - mu ~ N(0, V), averages them over V (Stein's lemma).

    Q~ averaged over V is Q averaged over S = Sigma + V.
    """
    mean = weights.MEAN.double()
    covariance = weights.COVARIANCE.double()
    behaviour = covariance + torch.tensor([[0.3, -0.1], [-0.1, 0.2]])
    a_tilde = mean + torch.randn(400_000, 2) @ torch.linalg.cholesky(behaviour).T
    y = weights.smoothed_reward(a_tilde, 0 * covariance)
    d = weights.exact_phantom(a_tilde, torch.randn_like(a_tilde), behaviour) - mean
    gradient, hessian = derivatives.compatible_critic(d, y, covariance)
    exact = torch.func.grad(weights.smoothed_reward)(mean, behaviour)
    torch.testing.assert_close(gradient, exact, rtol=0, atol=0.01)
    exact = torch.func.hessian(weights.smoothed_reward)(mean, behaviour)
    torch.testing.assert_close(hessian, exact, rtol=0, atol=0.03)


# theory/weights.py: full covariance, and importance weights


@pytest.mark.parametrize("module", [weights, derivatives], ids=lambda module: module.__name__)
def test_09_smoothed_reward_with_a_full_covariance_by_quadrature(float64, module):
    nodes, w = gauss_hermite(80, 2)
    mean = weights.MEAN.double()
    covariance = weights.COVARIANCE.double()
    actions = mean + nodes @ torch.linalg.cholesky(covariance).T
    expected = w @ module.smoothed_reward(actions, 0 * covariance)
    found = module.smoothed_reward(mean, covariance)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_14_theorem_1_with_a_full_covariance(float64):
    at = weights.MEAN.double(), weights.COVARIANCE.double()
    in_covariance = symmetric(torch.func.grad(weights.smoothed_reward, 1)(*at))
    hessian = torch.func.hessian(weights.smoothed_reward)(*at)
    assert hessian[0, 1].abs() > 0.05
    torch.testing.assert_close(in_covariance, hessian / 2, rtol=0, atol=1e-10)


@pytest.mark.parametrize("relu", [False, True], ids=["GELU", "ReLU"])
def test_09_and_14_closed_form_with_a_full_covariance(float64, relu):
    critic = weights.Critic(1, torch.Generator().manual_seed(0), relu, units=16)
    torch.nn.init.normal_(critic.w)
    a = torch.tensor([0.3, -0.5])
    covariance = weights.COVARIANCE.double()

    def smoothed(a, covariance):
        return critic.smoothed(a.view(1, 1, 2), covariance)[0].squeeze()

    found = critic.smoothed(a.view(1, 1, 2), covariance)
    value, gradient, hessian = (x.squeeze().detach() for x in found)
    x = torch.linspace(-7, 7, 701)  # a fine grid, as a ReLU has a kink
    grid = torch.cartesian_prod(x, x)
    density = torch.exp(-0.5 * grid.square().sum(1)) / (2 * math.pi) * (x[1] - x[0]) ** 2
    around = a + grid @ torch.linalg.cholesky(covariance).T
    expected = density @ critic(around.unsqueeze(0)).squeeze(0).detach()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-4)
    slope = torch.func.grad(smoothed)(a, covariance)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=1e-10)
    curvature = torch.func.hessian(smoothed)(a, covariance)
    torch.testing.assert_close(hessian, curvature, rtol=0, atol=1e-10)
    in_covariance = symmetric(torch.func.grad(smoothed, 1)(a, covariance))
    assert hessian[0, 1].abs() > 1e-2
    torch.testing.assert_close(in_covariance, hessian / 2, rtol=0, atol=1e-10)


def test_18_and_19_what_weighted_phantom_actions_converge_to(float64):
    """The fit's limit at a is the mean of the rewards over the buffer, weighted as in the loss."""
    mean = weights.MEAN.double()
    covariance = weights.COVARIANCE.double()
    factor = torch.linalg.cholesky(covariance)
    args = weights.Args(max_weight=math.inf)
    x = torch.linspace(-8, 8, 801)
    grid = mean + torch.cartesian_prod(x, x) @ factor.T
    rewards = weights.smoothed_reward(grid, 0 * covariance)
    zero = [lambda a: torch.zeros(a.shape[:2])]
    for shift in ([0.0, 0.0], [0.4, -0.3]):
        a = mean + torch.tensor(shift)
        noise = (a - grid) @ torch.linalg.inv(factor).T  # every action has the phantom action a
        phantom = torch.distributions.MultivariateNormal(a, covariance).log_prob(grid).exp()
        drawn = weights.density(grid) * phantom
        limits = {}
        for loss in (weights.no_weights, weights.weights, weights.ratio_weights):
            ones = torch.ones(1, len(grid))
            errors = loss(args, zero, grid.unsqueeze(0), ones, noise.view(1, -1, 1, 2))
            found = drawn * errors.squeeze(0)
            limits[loss] = (found @ rewards / found.sum()).item()
        exact = weights.smoothed_reward(a, covariance).item()
        assert limits[weights.weights] == pytest.approx(exact, abs=1e-6)
        assert limits[weights.ratio_weights] == pytest.approx(exact, abs=1e-6)
        narrower, gradient, hessian = weights.limit_without_weights(a.view(1, 1, 2))
        assert limits[weights.no_weights] == pytest.approx(narrower.item(), abs=1e-6)
        assert abs(narrower.item() - exact) > 0.005
    at = (a + mean) / 2, covariance / 2
    slope = torch.func.grad(weights.smoothed_reward)(*at)
    curvature = torch.func.hessian(weights.smoothed_reward)(*at)
    torch.testing.assert_close(gradient.squeeze(), slope / 2)
    torch.testing.assert_close(hessian.squeeze(), curvature / 4)


def test_16_and_17_first_route_fits_averages_of_q(float64):
    """With stand-ins for the two critics."""
    args = weights.Args(samples=2_000)
    covariance = weights.COVARIANCE.double()
    a = torch.tensor([[0.3, -0.2]]).expand(1, 4_000, 2)
    noise = torch.randn(1, 4_000, 2_000, 2)

    def q(actions):
        return weights.smoothed_reward(actions, 0 * covariance)

    def zero(actions):
        return torch.zeros(actions.shape[:2])

    errors = weights.first_route(args, [zero, q], a, torch.full((1, 4_000), 2.0), noise)
    torch.testing.assert_close(errors[:, :4_000], (q(a) - 2) ** 2)
    targets = (errors[:, 4_000:] / args.samples).sqrt()
    assert targets.shape == (1, 2)
    assert targets.std() > 0
    exact = weights.smoothed_reward(a[0, 0], covariance).abs()
    torch.testing.assert_close(targets.mean(), exact, rtol=0, atol=0.02)


def test_18_effective_sample_size():
    """1/q is C e^x with x exponentially distributed: both moments under a cap are elementary."""
    assert weights.effective_samples(weights.Args(), weights.no_weights) == 1
    scale = 2 * math.pi * torch.linalg.det(weights.COVARIANCE).sqrt().item()
    for cap in (5.0, 50.0):
        end = math.log(cap / scale)
        first = scale * end + cap * math.exp(-end)
        second = scale**2 * (math.exp(end) - 1) + cap**2 * math.exp(-end)
        found = weights.effective_samples(weights.Args(max_weight=cap), weights.weights)
        assert found == pytest.approx(first**2 / second, rel=0.02)


def test_18_effective_sample_size_of_the_ratio():
    """By quadrature: with the action's noise n, the weight is exp(|n| z - |n|^2 / 2), z ~ N(0, 1).

    |n|^2 / 2 is exponentially distributed, as there are two dimensions.
    """
    half_square = torch.linspace(0, 30, 3_001).unsqueeze(1)
    z = torch.linspace(-8, 8, 1_601)
    density = torch.exp(-half_square - z**2 / 2)
    for cap in (2.0, 50.0):
        w = torch.exp((2 * half_square).sqrt() * z - half_square).clamp(max=cap)
        first, second = (((density * w**k).sum() / density.sum()).item() for k in (1, 2))
        args = weights.Args(max_weight=cap)
        found = weights.effective_samples(args, weights.ratio_weights)
        assert found == pytest.approx(first**2 / second, rel=0.06)


def test_errors_of_the_table_are_relative():
    """Exact values times 1.1 are wrong by 10% of the value, the gradient and the Hessian."""

    def f(a):
        return weights.smoothed_reward(a, weights.COVARIANCE)

    def exact(a):
        flat = a.reshape(-1, 2)
        gradient = torch.vmap(torch.func.grad(f))(flat)
        hessian = torch.vmap(torch.func.hessian(f))(flat)
        return f(a), gradient.view(*a.shape), hessian.view(*a.shape, 2)

    args = weights.Args(runs=1)
    assert weights.errors(args, exact) == pytest.approx([0, 0, 0], abs=1e-5)
    torch.manual_seed(0)
    policy = torch.distributions.MultivariateNormal(weights.MEAN, weights.COVARIANCE)
    values = f(policy.sample((20_000,)))
    value = 0.1 * values.square().mean().sqrt().item() / values.std().item()
    found = weights.errors(args, lambda a: [1.1 * x for x in exact(a)])
    assert found[0] == pytest.approx(value, rel=0.1)
    assert found[1:] == pytest.approx([0.1, 0.1], abs=1e-5)


def test_13_and_15_closed_form_learns_the_derivatives_with_a_full_covariance():
    args = weights.Args(runs=2, actions=3_000, updates=600, noise=0.0)
    predict = weights.train(args, weights.METHODS["closed form, GELU"])
    _, gradient, hessian = weights.errors(args, predict)
    assert gradient < 0.05
    assert hessian < 0.05


def test_12_exact_phantom_actions_learn_the_derivatives_with_a_full_covariance():
    args = weights.Args(runs=2, actions=3_000, updates=600, noise=0.0)
    predict = weights.train(args, weights.METHODS["exact phantom actions, wider buffer"])
    _, gradient, hessian = weights.errors(args, predict)
    assert gradient < 0.15
    assert hessian < 0.3


# theory/derivatives.py: derivative Bellman equations and compatible critics


def test_section_4_4_derivative_bellman_equations_by_quadrature(float64):
    nodes, w = gauss_hermite(80, 2)
    mean = derivatives.MEAN.double()
    covariance = derivatives.COVARIANCE.double()
    d = nodes @ torch.linalg.cholesky(covariance).T
    first, second = derivatives.factors(d, covariance)
    gradient = torch.func.grad(derivatives.smoothed_reward)(mean, covariance)
    hessian = torch.func.hessian(derivatives.smoothed_reward)(mean, covariance)
    for baseline in (0.0, 0.7):  # any baseline leaves both averages alone
        y = derivatives.smoothed_reward(mean + d, 0 * covariance) - baseline
        found = torch.einsum("n,ni,n->i", w, first, y)
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-7)
        found = torch.einsum("n,nij,n->ij", w, second, y)
        torch.testing.assert_close(found, hessian, rtol=0, atol=1e-6)
    found = derivatives.derivative_bellman(d, y, covariance)
    torch.testing.assert_close(found[0], (first * y[:, None]).mean(0))
    torch.testing.assert_close(found[1], (second * y[:, None, None]).mean(0))


def test_12_and_section_4_4_with_dynamics(float64):
    """On the regulator y = r + gamma Q~(s', mu(s')) is quadratic, so that quadrature is exact."""
    H, q = lqr.smoothed_action_value(GAIN, COVARIANCE)
    nodes, w = gauss_hermite(5, 4)  # over the action and the next state
    s = np.array([0.7, -1.2])
    a = np.array([0.4, 0.9])
    d = nodes[:, :2].numpy() @ np.linalg.cholesky(COVARIANCE).T
    noise = nodes[:, 2:].numpy() @ np.linalg.cholesky(lqr.W).T
    next_s = s @ lqr.A.T + (a + d) @ lqr.B.T + noise
    x = np.hstack([next_s, next_s @ GAIN.T])
    reward = -s @ lqr.C @ s - ((a + d) @ lqr.D * (a + d)).sum(1)
    y = torch.tensor(reward + lqr.GAMMA * ((x @ H * x).sum(1) + q))
    first, second = derivatives.factors(torch.tensor(d), torch.tensor(COVARIANCE))
    sa = np.concatenate([s, a])
    assert (w @ y).item() == pytest.approx(sa @ H @ sa + q)
    gradient = 2 * torch.tensor(H[2:] @ sa)
    torch.testing.assert_close(torch.einsum("n,ni,n->i", w, first, y), gradient)
    hessian = 2 * torch.tensor(H[2:, 2:])
    torch.testing.assert_close(torch.einsum("n,nij,n->ij", w, second, y), hessian)


def test_section_4_4_variance_reduction_is_unbiased_and_cancels_what_it_should(float64):
    y = torch.randn(3, 10)
    covariance = derivatives.COVARIANCE.double()
    for i in range(10):
        others = y[:, [j for j in range(10) if j != i]].mean(1)
        torch.testing.assert_close(derivatives.leave_one_out(y)[:, i], y[:, i] - others)
    for i in range(5):
        others = y[:, [j for j in range(10) if j % 5 != i]].mean(1)
        pair = [i, i + 5]
        torch.testing.assert_close(
            derivatives.pair_baseline(y)[:, pair], y[:, pair] - others[:, None]
        )
    half = torch.randn(1, 20, 2)
    pairs = torch.cat([half, -half], 1)
    even = derivatives.derivative_bellman(pairs, pairs.square().sum(2), covariance)
    odd = derivatives.derivative_bellman(pairs, pairs.pow(3).sum(2), covariance)
    assert even[0].abs().max() < 1e-12
    assert odd[1].abs().max() < 1e-12
    assert odd[0].abs().max() > 0.1


def test_section_4_4_each_estimator_is_right_on_average_and_the_critics_vary_less():
    args = derivatives.Args(runs=300)
    mean = derivatives.MEAN
    covariance = derivatives.COVARIANCE
    gradient = torch.func.grad(derivatives.smoothed_reward)(mean, covariance)
    hessian = torch.func.hessian(derivatives.smoothed_reward)(mean, covariance)
    spread = {}
    for name, (g, h) in derivatives.estimates(args, covariance).items():
        spread[name] = [x.std(0).norm().item() for x in (g, h)]
        for found, exact in [(g, gradient), (h, hessian)]:
            error = 5 * found.std(0).max() / math.sqrt(args.runs)
            consistent = name in ("compatible critic", "closed form")  # only in the limit unbiased
            bias = 0.05 * exact.norm() if consistent else 0.0
            assert (found.mean(0) - exact).abs().max() < error + bias, name
    assert spread["closed form"][0] < 0.6 * spread["plain"][0]
    assert spread["closed form"][1] < 0.6 * spread["plain"][1]

    # The spread of the plain equations by quadrature.
    nodes, w = gauss_hermite(20, 2)
    d = nodes @ torch.linalg.cholesky(covariance.double()).T
    y = derivatives.smoothed_reward(mean.double() + d, 0 * covariance.double())
    first, second = derivatives.factors(d, covariance.double())
    for found, factor, exact in zip(
        spread["plain"], (first, second), (gradient, hessian), strict=True
    ):
        moment = w @ (factor.flatten(1).square().sum(1) * (y**2 + args.noise**2))
        expected = ((moment - exact.norm() ** 2) / args.actions).sqrt().item()
        assert found == pytest.approx(expected, rel=0.1)


def test_22_compatible_critic_recovers_a_quadratic_and_averages_any_other(float64):
    """With d ~ N(0, Sigma), least squares on 1, d and d d^T gives the averages (Stein's lemma)."""
    covariance = derivatives.COVARIANCE.double()
    d = torch.randn(400_000, 2) @ torch.linalg.cholesky(covariance).T
    g = torch.tensor([0.3, -1.0])
    h = torch.tensor([[1.0, 0.4], [0.4, -2.0]])
    few = d[:50]
    quadratic = 2 + few @ g + 0.5 * (few @ h * few).sum(1)
    torch.testing.assert_close(derivatives.compatible_critic(few, quadratic, covariance), (g, h))
    y = derivatives.smoothed_reward(derivatives.MEAN + d, 0 * covariance)
    gradient, hessian = derivatives.compatible_critic(d, y, covariance)
    at = derivatives.MEAN.double(), covariance
    exact = torch.func.grad(derivatives.smoothed_reward)(*at)
    torch.testing.assert_close(gradient, exact, rtol=0, atol=0.01)
    exact = torch.func.hessian(derivatives.smoothed_reward)(*at)
    torch.testing.assert_close(hessian, exact, rtol=0, atol=0.03)


def test_21_and_22_compatible_critic_gives_the_exact_policy_gradient(float64):
    """Section 4.4 with mu = K s, a full Sigma and values that no compatible critic can represent.

    (22) as printed has the Hessian 2 dSigma/dphi w_2, so that w_2 is half of the w that condition 1
    names.
    """
    states = torch.randn(7, 2)
    theta = torch.tensor([[0.3, -0.2], [0.1, 0.4]])
    phi = torch.tensor([0.5, 0.2, 0.4])

    def covariance_of(phi):
        return torch.stack([phi[:2], phi[1:]])

    def smoothed_q(s, a, covariance):  # another landscape at each state
        return (1 + s[0] ** 2) * derivatives.smoothed_reward(a - torch.tanh(2 * s), covariance)

    def objective(theta, phi):
        return torch.stack([smoothed_q(s, theta @ s, covariance_of(phi)) for s in states]).mean()

    in_theta, in_phi = torch.func.grad(objective, (0, 1))(theta, phi)
    at = [(s, theta @ s, covariance_of(phi)) for s in states]
    gradients = torch.stack([torch.func.grad(smoothed_q, 1)(*x) for x in at])
    hessians = torch.stack([torch.func.hessian(smoothed_q, 1)(*x) for x in at]).flatten(1)
    mean_features = torch.stack(
        [torch.func.jacrev(lambda theta, s=s: theta @ s)(theta).flatten(1) for s in states]
    )
    covariance_features = torch.func.jacrev(covariance_of)(phi).flatten(0, 1).expand(7, 4, 3)
    for features, exact, factor, gradient in [
        (mean_features, gradients, 1.0, in_theta.flatten()),
        (covariance_features, hessians, 0.5, in_phi),
    ]:
        w = derivatives.compatible_weights(features, exact)
        assert (features @ w - exact).norm() > 0.1 * exact.norm()  # the fit is not perfect
        found = factor * torch.einsum("sdp,sd->p", features, features @ w) / 7  # (13), (15)
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-10)


def test_cells_of_the_table_are_relative():
    exact = torch.tensor([3.0, 4.0])
    found = torch.stack([1.4 * exact, 0.8 * exact])
    assert derivatives.deviation_and_bias(found, exact) == pytest.approx((0.3, 0.1))


# theory/lqr.py

GAIN = np.array([[-0.3, -0.2], [0.2, -0.4]])
COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.3]])


def test_02_return_and_visitation_against_the_sum_over_time():
    F = lqr.A + lqr.B @ GAIN
    moment = lqr.S
    total = 0.0
    visits = np.zeros((2, 2))
    for t in range(600):
        state_cost = np.trace((lqr.C + GAIN.T @ lqr.D @ GAIN) @ moment)
        total -= lqr.GAMMA**t * (state_cost + np.trace(lqr.D @ COVARIANCE))
        visits += lqr.GAMMA**t * moment
        moment = F @ moment @ F.T + lqr.B @ COVARIANCE @ lqr.B.T + lqr.W
    assert lqr.expected_return(GAIN, COVARIANCE) == pytest.approx(total, rel=1e-10)
    np.testing.assert_allclose(lqr.visitation(GAIN, COVARIANCE), visits, rtol=1e-10)


def test_03_09_and_11_bellman_equations_of_the_regulator():
    """By quadrature over action and next state; all are quadratic, so it is exact."""
    nodes, w = (x.numpy() for x in gauss_hermite(3, 2))
    H, q = lqr.action_value(GAIN, COVARIANCE)
    smoothed_H, smoothed_q = lqr.smoothed_action_value(GAIN, COVARIANCE)
    action_noise = nodes @ np.linalg.cholesky(COVARIANCE).T
    state_noise = nodes @ np.linalg.cholesky(lqr.W).T

    def value(s, a, H, q):
        x = np.concatenate(np.broadcast_arrays(s, a), -1)
        return (x @ H * x).sum(-1) + q

    for s, a in np.random.default_rng(0).standard_normal((5, 2, 2)):
        smoothed = w @ value(s, a + action_noise, H, q)
        assert value(s, a, smoothed_H, smoothed_q) == pytest.approx(smoothed)  # (9)
        next_s = lqr.A @ s + lqr.B @ a + state_noise
        reward = -s @ lqr.C @ s - a @ lqr.D @ a
        bootstrap = w @ value(next_s, next_s @ GAIN.T, smoothed_H, smoothed_q)
        assert value(s, a, H, q) == pytest.approx(reward + lqr.GAMMA * bootstrap)  # (11)
        next_a = (next_s @ GAIN.T)[:, None] + action_noise
        average = w @ value(next_s[:, None], next_a, H, q) @ w
        assert average == pytest.approx(bootstrap)  # so that (3) holds, too


@pytest.mark.parametrize("covariance", [COVARIANCE, 0 * COVARIANCE], ids=["13 and 15", "06"])
def test_06_13_and_15_gradients_of_the_return_against_finite_differences(covariance):
    """Without covariance (13) is the deterministic policy gradient (6)."""
    in_gain, in_covariance = lqr.gradients(GAIN, covariance)

    def central(gain, covariance_step):
        up = lqr.expected_return(GAIN + gain, covariance + covariance_step)
        down = lqr.expected_return(GAIN - gain, covariance - covariance_step)
        return (up - down) / 2e-5

    for i, j in np.ndindex(2, 2):
        step = np.zeros((2, 2))
        step[i, j] = 1e-5
        assert in_gain[i, j] == pytest.approx(central(step, 0.0), rel=1e-6)
        assert in_covariance[i, j] == pytest.approx(central(0.0, (step + step.T) / 2), rel=1e-6)


@pytest.mark.parametrize("covariance", [COVARIANCE, 0 * COVARIANCE], ids=["full", "zero"])
def test_best_gain(covariance):
    best = lqr.best_gain()
    assert np.abs(lqr.gradients(best, covariance)[0]).max() < 1e-10
    for change in 0.1 * np.random.default_rng(0).standard_normal((10, 2, 2)):
        worse = lqr.expected_return(best + change, covariance)
        assert worse < lqr.expected_return(best, covariance)


def test_22_compatible_critic_of_the_regulator_gives_the_gradient_of_the_return():
    """Least squares on values of on-policy actions a = K s + d: V(s) + d^T W_1 s + d^T W_2 d."""
    rng = np.random.default_rng(0)
    visitation = lqr.visitation(GAIN, COVARIANCE)
    s = rng.standard_normal((200, 2)) @ np.linalg.cholesky(visitation).T
    d = rng.standard_normal((200, 2)) @ np.linalg.cholesky(COVARIANCE).T
    H, q = lqr.action_value(GAIN, COVARIANCE)
    x = np.hstack([s, s @ GAIN.T + d])
    rows, columns = np.triu_indices(2)
    state = np.hstack([s[:, rows] * s[:, columns], np.ones((200, 1))])
    linear = (d[:, :, None] * s[:, None]).reshape(200, 4)
    features = np.hstack([state, linear, d[:, rows] * d[:, columns]])
    w = np.linalg.lstsq(features, (x @ H * x).sum(1) + q, rcond=None)[0]
    W_1 = w[4:8].reshape(2, 2)
    w_11, w_12, w_22 = w[8:]
    W_2 = np.array([[w_11, w_12 / 2], [w_12 / 2, w_22]])
    in_gain, in_covariance = lqr.gradients(GAIN, COVARIANCE)
    np.testing.assert_allclose(W_1 @ visitation, in_gain, rtol=1e-8)
    np.testing.assert_allclose(W_2 / (1 - lqr.GAMMA), in_covariance, rtol=1e-8)
    span = np.linalg.lstsq(lqr.features(s, s @ GAIN.T + d), features, rcond=None)[1]
    assert np.linalg.matrix_rank(features) == 11
    assert np.abs(span).max() < 1e-15  # the critics of lqr.py are compatible


SHARES = {  # of the exact gradient; the square of it of the Hessian. All others: 1
    "Smoothie, phantom actions": 1 / 2,
    "Smoothie, phantom actions, wider behaviour": 9 / 13,  # c^2 / (c^2 + 1) with c = 1.5
}


@pytest.mark.parametrize("name", [name for name in lqr.METHODS if "weights" not in name])
def test_08_12_and_16_what_each_critic_of_the_regulator_converges_to(name):
    args = lqr.Args(seeds=4, updates=1_001, learning_starts=1_000, tau=1.0, action_range=15.0)
    path = lqr.train(args, lqr.METHODS[name])
    error, multiples = lqr.compare(args, path)
    share = SHARES.get(name, 1)
    assert np.mean(multiples[0]) == pytest.approx(share, abs=0.06)
    assert np.mean(multiples[1]) == pytest.approx(share**2, abs=0.06)
    covariance = lqr.FACTOR_INIT @ lqr.FACTOR_INIT.T
    if name == "DDPG":  # (7): it evaluates the policy without noise
        _, q = lqr.action_value(lqr.GAIN_INIT, 0 * covariance)
        _, noisy_q = lqr.action_value(lqr.GAIN_INIT, covariance)
        assert np.mean(lqr.unpack(path[2][-1])[1]) == pytest.approx(q, rel=0.2)
        assert q > 0.5 * noisy_q
    elif share == 1 and "uniform" not in name:
        assert np.median(error[-1]) < 0.15
    else:
        assert (error[-1] > 0.15).all()


def test_18_weights_on_the_regulator_undo_the_narrower_smoothing_in_part():
    args = lqr.Args(seeds=4, updates=801, learning_starts=800, forgetting=0.02)

    def multiples(name):
        method = lqr.METHODS[f"Smoothie, phantom actions{name}"]
        return np.mean(lqr.compare(args, lqr.train(args, method))[1], 1)

    assert (multiples(", weights 1/q(ã)") > multiples("")).all()
    assert (multiples(", weights q(a)/q(ã)") > [0.8, 0.6]).all()


def test_errors_and_multiples_of_the_regulator():
    """Critics of twice the exact Q~ have twice its derivatives."""
    args = lqr.Args(seeds=2, learning_starts=25)
    K = np.tile(GAIN, (26, 2, 1, 1))
    L = np.tile(np.linalg.cholesky(COVARIANCE), (26, 2, 1, 1))
    H, q = lqr.smoothed_action_value(GAIN, COVARIANCE)
    w = np.append((H * (2 - np.eye(4)))[lqr.ROWS, lqr.COLUMNS], q)
    error, multiples = lqr.compare(args, (K, L, np.tile(w, (26, 2, 1))))
    assert np.abs(error).max() < 1e-12
    assert multiples == pytest.approx(np.ones((2, 2)))
    error, multiples = lqr.compare(args, (K, L, np.tile(2 * w, (26, 2, 1))))
    assert error.min() > 1  # the mean of Q~ counts, too
    assert multiples == pytest.approx(np.full((2, 2), 2.0))


def test_05_ddpg_is_smoothie_without_covariance_on_the_regulator(monkeypatch):
    """Section 5, with the same random numbers: the gain takes the same path."""
    args = lqr.Args(seeds=2, updates=200, learning_starts=100, batch_size=32, action_range=1.0)
    monkeypatch.setattr(lqr, "FACTOR_INIT", 1e-9 * np.eye(2))

    def ddpg_that_draws(args, b, qf):
        b.noise()  # as phantom does
        return lqr.ddpg(args, b, qf)

    def gains(update):
        method = lqr.Method(update, "black", uniform=True, learn_covariance=False)
        return lqr.train(args, method)[0]

    for ours, theirs in [(lqr.closed_form, lqr.ddpg), (lqr.phantom, ddpg_that_draws)]:
        path = gains(ours)
        assert np.abs(path[-1]).max() > 0.05
        np.testing.assert_allclose(path, gains(theirs), rtol=0, atol=1e-6)


BEHAVIOURS = {
    "own": lqr.Method(None, "black"),
    "wider": lqr.Method(None, "black", wider=True),
    "uniform": lqr.Method(None, "black", uniform=True),
}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_13_the_chains_visit_states_as_the_return_weighs_them(name):
    args = lqr.Args(seeds=4, updates=400)
    states = []
    actions = []
    steps = []

    def moment(x):
        return np.einsum("nbi,nbj->ij", x, x) / x[..., 0].size

    def record(args, b, qf):  # weights of 0 leave the policy where it is
        states.append(moment(b.s))
        actions.append(moment(b.a - b.mean))
        steps.append(moment(b.next_s - b.s @ lqr.A.T - b.a @ lqr.B.T))
        state_cost = np.einsum("nbi,ij,nbj->nb", b.s, lqr.C, b.s)
        action_cost = np.einsum("nbi,ij,nbj->nb", b.a, lqr.D, b.a)
        np.testing.assert_allclose(b.r, -state_cost - action_cost)
        if name != "uniform":
            np.testing.assert_allclose(b.behaviour_covariance, [spread] * 4)
        return np.zeros((args.seeds, 11))

    covariance = lqr.FACTOR_INIT @ lqr.FACTOR_INIT.T
    spread = {
        "own": covariance,
        "wider": 1.5**2 * covariance,
        "uniform": args.action_range**2 / 3 * np.eye(2),
    }[name]
    method = BEHAVIOURS[name]
    lqr.train(args, lqr.Method(record, "black", wider=method.wider, uniform=method.uniform))
    expected = (1 - lqr.GAMMA) * lqr.visitation(lqr.GAIN_INIT, covariance)
    tolerance = 0.03 * np.abs(expected).max()
    np.testing.assert_allclose(np.mean(states[50:], 0), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.mean(steps, 0), lqr.W, rtol=0, atol=1e-3)
    np.testing.assert_allclose(np.mean(actions, 0), spread, rtol=0, atol=0.02 * spread.max())


@pytest.mark.parametrize("name", ["Smoothie, closed form", "Smoothie, exact phantom actions"])
def test_10_unbiased_critics_follow_the_exact_flow_of_the_regulator(name):
    args = lqr.Args(seeds=3, updates=1_500, learning_starts=600)
    args.gain_lr = 1e-3  # slow enough for the critic to keep up
    flow_K, flow_L = lqr.gradient_flow(args)
    K, L, _ = lqr.train(args, lqr.METHODS[name])
    assert np.abs(flow_K[-1]).max() > 0.4
    assert np.abs(flow_L[-1] - flow_L[0]).max() > 0.2
    assert np.abs(K - flow_K[:, None]).max() < 0.05
    assert np.abs(L - flow_L[:, None]).max() < 0.02


def test_10_the_exact_flow_climbs_the_return():
    K, L = lqr.gradient_flow(lqr.Args(updates=800, learning_starts=50))
    returns = [
        lqr.expected_return(gain, factor @ factor.T)
        for gain, factor in zip(K[::10], L[::10], strict=True)
    ]
    assert (np.diff(returns[6:]) > 0).all()
    assert returns[0] == returns[5]
    assert np.abs(K[-1] - lqr.best_gain()).max() < 0.25 * np.abs(lqr.best_gain()).max()


# The folder

TINY = {
    bandit: {"seeds": 2, "total_timesteps": 40, "learning_starts": 10, "batch_size": 16},
    lqr: {"seeds": 2, "updates": 60, "learning_starts": 30, "batch_size": 32},
    weights: {"runs": 2, "actions": 500, "updates": 20, "batch_size": 32},
    derivatives: {"runs": 10, "actions": 64},
}


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_readme_has_the_rows_that_its_script_prints(module, capsys):
    module.main(module.Args(**TINY[module]))
    header, _, *rows = capsys.readouterr().out.splitlines()
    names = [row.split("|")[1] for row in rows]
    assert all(row.count("|") == header.count("|") for row in rows)
    table = rf"^{re.escape(header)}\n\|[-|]+\n((?:\|.*\n)+)"
    (printed,) = re.findall(table, README, re.MULTILINE)
    assert [row.split("|")[1] for row in printed.splitlines()] == names


@functools.cache
def names_in(path):
    """Return the functions and classes of a file; methods as Class.name."""
    names = set()

    def visit(node, prefix):
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + child.name)
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(path.read_text()), "")
    return names


def test_readme_names_what_exists():
    references = re.findall(r"`([\w/]+\.py)::([\w.]+)`", README)
    assert len(references) > 40
    missing = [f"{file}::{name}" for file, name in references if name not in names_in(ROOT / file)]
    assert not missing
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / "theory" / picture).stat().st_size < 150_000


def test_readme_has_every_equation_with_its_code_and_its_test():
    rows = re.findall(r"^\| (\([\d), (]+\)) \|(.*)\|(.*)\|(.*)\|$", README, re.MULTILINE)
    numbers = [int(number) for row in rows for number in re.findall(r"\((\d+)\)", row[0])]
    assert numbers == list(range(1, 23))
    for number, _, code, tests in rows:
        assert re.search(r"\.py::", code), number
        assert re.search(r"`tests/\w+\.py::test_", tests), number
