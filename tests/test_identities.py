"""The paper's identities, against quadrature, automatic differentiation and closed forms."""

import math

import numpy as np
import pytest
import torch

import ddpg_continuous
import smoothie_continuous
import smoothie_no_kl
from tests.conftest import agent_class

OBS_DIM, ACTION_DIM, BATCH = 5, 3, 16


def critic(script, action_dim=ACTION_DIM):
    """A critic whose last layer is wide enough that its derivatives are far from zero."""
    qf = script.QNetwork(OBS_DIM, action_dim)
    torch.nn.init.normal_(qf.fc_q.weight)
    torch.nn.init.normal_(qf.fc2.weight, std=0.2)
    return qf


def gauss_hermite(order, dim):
    """Nodes (order^dim, dim) and weights of an expectation under N(0, I)."""
    x, w = np.polynomial.hermite_e.hermegauss(order)
    nodes = torch.cartesian_prod(*[torch.tensor(x)] * dim).reshape(-1, dim)
    weights = torch.cartesian_prod(*[torch.tensor(w / w.sum())] * dim).reshape(-1, dim).prod(1)
    return nodes, weights


def first_gradients(agent):
    """What Adam received for each parameter of the actor in the first update: m is 0.1 times that."""
    names = [name for name, p in agent.actor.named_parameters() if name != "log_var"]
    return {name: 10 * m for name, m in zip(names, agent.actor_optimizer.m, strict=True)}


@pytest.mark.parametrize("dim", [1, 3])
def test_theorem_1_by_quadrature(float64, dim):
    qf, obs, a = critic(smoothie_continuous, dim), torch.randn(1, OBS_DIM), torch.randn(dim)
    nodes, weights = gauss_hermite(15, dim)
    factor = 0.3 * torch.randn(dim, dim) + 0.5 * torch.eye(dim)
    covariance = factor @ factor.T

    def smoothed_q(a, covariance):  # (9)
        actions = a + nodes @ torch.linalg.cholesky(covariance).T
        return (weights * qf(obs.expand(len(nodes), -1), actions)).sum()

    in_covariance = torch.func.grad(smoothed_q, 1)(a, covariance)
    hessian = torch.func.hessian(smoothed_q)(a, covariance)
    assert hessian.abs().max() > 1e-2
    # autograd through the Cholesky factor sees one entry of each symmetric pair: symmetrise
    torch.testing.assert_close((in_covariance + in_covariance.T) / 2, hessian / 2, rtol=0, atol=1e-4)


def test_theorem_1_with_the_scripts_own_hessian(float64):
    """The diagonal that the script computes, averaged over the policy, is twice the derivative in each variance."""
    qf, obs, mean = critic(smoothie_continuous), torch.randn(1, OBS_DIM), torch.randn(ACTION_DIM)
    nodes, weights = gauss_hermite(15, ACTION_DIM)
    observations = obs.expand(len(nodes), -1)

    def smoothed_q(variance):
        return (weights * qf(observations, mean + nodes * variance.sqrt())).sum()

    variance = torch.tensor([0.1, 0.3, 0.5])
    hessian = weights @ qf.action_derivatives(observations, mean + nodes * variance.sqrt())[1]
    assert hessian.abs().max() > 1e-2
    torch.testing.assert_close(torch.func.grad(smoothed_q)(variance), hessian / 2, rtol=0, atol=1e-4)


def test_action_derivatives_against_autograd(float64):
    qf, observations, actions = critic(smoothie_continuous), torch.randn(BATCH, OBS_DIM), torch.randn(BATCH, ACTION_DIM)

    def q(obs, action):
        return qf(obs.unsqueeze(0), action.unsqueeze(0)).squeeze(0)

    gradient, hessian = qf.action_derivatives(observations, actions)
    assert gradient.shape == hessian.shape == (BATCH, ACTION_DIM)
    assert hessian.abs().mean() > 1e-2
    expected_gradient = torch.func.vmap(torch.func.grad(q, 1))(observations, actions)
    expected_hessian = torch.func.vmap(torch.func.hessian(q, 1))(observations, actions).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)
    torch.testing.assert_close(hessian, expected_hessian, rtol=0, atol=1e-10)


def test_action_gradient_of_ddpg_against_autograd(float64):
    qf, observations = critic(ddpg_continuous), torch.randn(BATCH, OBS_DIM)
    actions = torch.randn(BATCH, ACTION_DIM, requires_grad=True)
    (expected,) = torch.autograd.grad(qf(observations, actions).sum(), actions)
    gradient = qf.action_gradient(observations, actions)
    assert gradient.shape == (BATCH, ACTION_DIM) and gradient.abs().mean() > 1e-2
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def test_policy_gradients_are_equations_13_and_15(float64):
    """Each state's Jacobians, written out and averaged."""
    agent = smoothie_no_kl.Smoothie(OBS_DIM, ACTION_DIM, smoothie_no_kl.Args(log_var_lr=0.2))
    agent.qfs[0], observations, actor = critic(smoothie_no_kl), torch.randn(BATCH, OBS_DIM), agent.actor
    agent.value_scale.fill_(3.0)
    with torch.no_grad():
        actor.log_var += torch.tensor([-1.0, 0.2, 1.0])
    phi = actor.log_var.detach().clone()
    gradient, hessian = (d.detach() for d in agent.qfs[0].action_derivatives(observations, actor(observations)))
    theta = {name: p.detach().clone() for name, p in actor.named_parameters() if name != "log_var"}

    def mean_of(theta, obs):
        return torch.func.functional_call(actor, {**theta, "log_var": phi}, (obs.unsqueeze(0),)).squeeze(0)

    expected = {name: torch.zeros_like(p) for name, p in theta.items()}
    expected_phi = torch.zeros(ACTION_DIM)
    for k in range(BATCH):
        jacobian = torch.func.jacrev(mean_of)(theta, observations[k])
        for name in theta:
            expected[name] += torch.einsum("i,i...->...", gradient[k], jacobian[name]) / BATCH  # (13)
        sigma_jacobian = torch.func.jacrev(lambda phi: torch.diag(phi.exp()))(phi)
        expected_phi += 0.5 * torch.einsum("ij,ijk->k", torch.diag(hessian[k]), sigma_jacobian) / BATCH  # (15)

    agent.update_policy(observations)
    for name, descent in first_gradients(agent).items():
        torch.testing.assert_close(-descent, expected[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(actor.log_var.detach() - phi, 0.2 / 3.0 * expected_phi, rtol=1e-9, atol=1e-12)
    assert expected_phi.abs().min() > 1e-4 and (actor.log_var < 0).all()


def test_ddpg_policy_gradient_is_that_of_q(float64):
    """(6) is the chain rule through Q(s, mu(s))."""
    agent = ddpg_continuous.DDPG(OBS_DIM, ACTION_DIM, ddpg_continuous.Args())
    agent.qfs[0], observations = critic(ddpg_continuous), torch.randn(BATCH, OBS_DIM)
    names, parameters = zip(*agent.actor.named_parameters(), strict=True)
    expected = torch.autograd.grad(-agent.qfs[0](observations, agent.actor(observations)).mean(), parameters)
    agent.update_policy(observations)
    found = first_gradients(agent)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    assert found["fc_mean.bias"].abs().min() > 1e-4


def test_kl_against_torch_distributions(float64):
    mean, old_mean = torch.randn(2, BATCH, ACTION_DIM)
    log_var, old_log_var = torch.randn(2, ACTION_DIM)

    def gaussian(mean, log_var):
        return torch.distributions.Independent(torch.distributions.Normal(mean, (0.5 * log_var).exp()), 1)

    expected = torch.distributions.kl_divergence(gaussian(mean, log_var), gaussian(old_mean, old_log_var)).mean()
    torch.testing.assert_close(smoothie_continuous.kl_divergence(mean, log_var, old_mean, old_log_var), expected)
    assert smoothie_continuous.kl_divergence(mean, log_var, mean, log_var).abs() < 1e-12


def test_update_policy_follows_algorithm_1(float64):
    """phi moves by its learning rate times (15) less lambda dKL/dphi; theta's Adam receives (13) less lambda dKL/dtheta."""
    args = smoothie_continuous.Args(log_var_init=-1.0, kl_coef=0.7, log_var_lr=0.2)
    agent = smoothie_continuous.Smoothie(OBS_DIM, ACTION_DIM, args)
    torch.nn.init.normal_(agent.qfs[0].fc_q.weight)
    agent.value_scale.fill_(3.0)
    with torch.no_grad():  # make the target policy differ
        agent.target_actor.log_var += 0.3 * torch.randn(ACTION_DIM)
        agent.target_actor.fc_mean.bias += 0.2
    observations = torch.randn(BATCH, OBS_DIM)
    phi, old_phi = agent.actor.log_var.detach().clone(), agent.target_actor.log_var
    mean, old_mean = agent.actor(observations), agent.target_actor(observations)
    gradient, hessian = (d.detach() for d in agent.qfs[0].action_derivatives(observations, mean))
    lam = args.kl_coef * 3.0

    dkl_dphi = 0.5 * ((phi - old_phi).exp() - 1)
    expected_phi = phi + args.log_var_lr / 3.0 * (0.5 * hessian.mean(0) * phi.exp() - lam * dkl_dphi)
    objective = (gradient * mean).sum(1).mean() - lam * 0.5 * ((mean - old_mean) ** 2 / old_phi.exp()).sum(1).mean()
    expected_bias_grad = -torch.autograd.grad(objective, agent.actor.fc_mean.bias)[0]

    agent.update_policy(observations)
    torch.testing.assert_close(agent.actor.log_var.detach(), expected_phi, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(first_gradients(agent)["fc_mean.bias"], expected_bias_grad, rtol=1e-9, atol=1e-12)
    assert (expected_phi - phi).abs().min() > 1e-4


def test_sigma_stops_at_half_the_range_and_comes_back(float64, monkeypatch, smoothie):
    """Where the values are convex phi grows up to 0 and no further; once they are concave it falls as if never held."""
    agent = smoothie.Smoothie(OBS_DIM, ACTION_DIM, smoothie.Args(log_var_lr=0.1))
    observations, phi = torch.randn(BATCH, OBS_DIM), agent.actor.log_var
    in_closed_form = hasattr(agent.qfs[0], "smoothed")

    def learn(curvature):
        hessian = torch.full((BATCH, ACTION_DIM), curvature)
        derivatives = (torch.zeros_like(hessian), hessian)
        found = (torch.zeros(BATCH), *derivatives) if in_closed_form else derivatives
        monkeypatch.setattr(agent.qfs[0], "smoothed" if in_closed_form else "action_derivatives", lambda *_: found)
        agent.update_policy(observations)

    for _ in range(100):
        learn(5.0)
    assert (phi == 0).all()
    learn(-5.0)
    torch.testing.assert_close(phi.detach(), torch.full_like(phi, -0.25), rtol=0, atol=1e-3)


def test_critic_converges_to_the_convolution():
    """One step, actions uniform over a wide range: fitting on phantom actions gives (9), known for sin(2a), not sin(2a)."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    variance, frequency, updates = 0.25, 2.0, 800
    args = smoothie_continuous.Args(log_var_init=math.log(variance), reward_scale=1.0, max_grad_norm=math.inf)
    agent = smoothie_continuous.Smoothie(2, 1, args)
    # features that span the range from the start: the update is on trial, not how fast the usual initialisation grows them
    torch.nn.init.normal_(agent.qfs[0].fc2.weight[:, -1:])
    torch.nn.init.normal_(agent.qfs[0].fc2.bias, std=2.0)
    buffer = smoothie_continuous.ReplayBuffer(20_000, 2, 1, rng)
    for action in rng.uniform(-3.0, 3.0, 20_000):
        buffer.add(np.zeros(2), [action], math.sin(frequency * action), np.zeros(2), True)
    for update in range(updates):
        agent.q_optimizer.lr = 1e-3 * (1 - update / updates)
        agent.update_critic(*buffer.sample(128))

    a = torch.linspace(-1.2, 1.2, 81).unsqueeze(1)
    reward = torch.sin(frequency * a).squeeze(1)
    learned = agent.qfs[0](torch.zeros(81, 2), a).detach()
    smoothed = math.exp(-(frequency**2) * variance / 2) * reward
    assert (learned - smoothed).square().mean().sqrt() < 0.06
    assert (learned - reward).square().mean().sqrt() > 0.2  # what DDPG's critic would learn


@pytest.mark.parametrize("module", [smoothie_continuous, smoothie_no_kl], ids=lambda module: module.__name__)
def test_smoothie_without_covariance_is_ddpg(float64, module, monkeypatch):
    """Section 5: as Sigma goes to zero the updates of the mean and of the critic are those of DDPG, given one critic."""

    class Critic(module.QNetwork):
        def action_gradient(self, observations, actions):
            return self.action_derivatives(observations, actions)[0]

    monkeypatch.setattr(ddpg_continuous, "QNetwork", Critic)
    without_kl = {"kl_coef": 0.0} if module is smoothie_continuous else {}
    args = module.Args(log_var_init=-80.0, policy_lr=1e-3, tau=0.05, **without_kl)
    agent = module.Smoothie(OBS_DIM, ACTION_DIM, args)
    ddpg = ddpg_continuous.DDPG(OBS_DIM, ACTION_DIM, ddpg_continuous.Args(policy_lr=1e-3, tau=0.05))
    for name in ("actor", "qfs", "target_actor", "target_qfs"):
        getattr(ddpg, name).load_state_dict(getattr(agent, name).state_dict(), strict=name.endswith("qfs"))
    start = agent.actor.fc2.weight.detach().clone()
    for _ in range(20):
        observations, next_observations = torch.randn(2, BATCH, OBS_DIM)
        batch = observations, torch.randn(BATCH, ACTION_DIM), torch.randn(BATCH), next_observations, torch.zeros(BATCH)
        for learner in (agent, ddpg):
            learner.update(observations, batch)
        theirs = ddpg.state_dict()
        for name, value in agent.state_dict().items():
            if name.split(".")[0] in ("actor", "target_actor", "qfs", "target_qfs") and "log_var" not in name:
                torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-12)
    assert (agent.actor.fc2.weight - start).abs().max() > 1e-3


def test_targets_bootstrap_at_time_limits_and_not_at_terminations(script):
    """With values of 0 now and of 10 next, the loss is the mean square of the targets."""
    agent = agent_class(script)(OBS_DIM, ACTION_DIM, script.Args(gamma=0.9, reward_scale=0.5))
    with torch.no_grad():
        for qf, value in [(agent.qfs[0], 0.0), (agent.target_qfs[0], 10.0)]:
            qf.fc_q.weight.zero_()
            qf.fc_q.bias.fill_(value)
    rewards, terminated = torch.tensor([1.0, 1.0, -4.0]), torch.tensor([0.0, 1.0, 0.0])
    observations = torch.randn(3, OBS_DIM)
    metrics = agent.update_critic(observations, torch.randn(3, ACTION_DIM), rewards, observations, terminated)
    assert metrics["losses/qf1_loss"].item() == pytest.approx((9.5**2 + 0.5**2 + 7.0**2) / 3)


def test_targets_follow_at_rate_tau(float64, script):
    """After the networks have learned, and all of them: those of the actor, phi and those of the critic."""
    agent = agent_class(script)(OBS_DIM, ACTION_DIM, script.Args(tau=0.25))
    nets = [(agent.actor, agent.target_actor), (agent.qfs[0], agent.target_qfs[0])]
    before = [[p.clone() for p in target.parameters()] for _, target in nets]
    observations, actions = torch.randn(BATCH, OBS_DIM), torch.randn(BATCH, ACTION_DIM)
    agent.update(observations, (observations, actions, torch.ones(BATCH), observations, torch.zeros(BATCH)))
    for (net, target), old_values in zip(nets, before, strict=True):
        for p, lagged, old in zip(net.parameters(), target.parameters(), old_values, strict=True):
            assert (p != old).any()
            torch.testing.assert_close(lagged, old + 0.25 * (p - old))
