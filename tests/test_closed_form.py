"""The smoothed critic in closed form, against quadrature, automatic differentiation, sampling and the other scripts."""

import math

import numpy as np
import pytest
import torch

import ddpg_continuous
import smoothie_closed_form
import smoothie_continuous

OBS_DIM, ACTION_DIM, BATCH = 5, 3, 16


def critic(action_dim=ACTION_DIM):
    """A critic whose kinks in the action are near, so that its derivatives are far from zero."""
    qf = smoothie_closed_form.QNetwork(OBS_DIM, action_dim)
    torch.nn.init.normal_(qf.fc_q.weight)
    torch.nn.init.normal_(qf.fc2.weight[:, -action_dim:])
    return qf


@pytest.mark.parametrize(("dim", "order"), [(1, 4001), (3, 31)])
def test_the_value_is_the_gaussian_average(float64, dim, order):
    """Sums on a grid of +-6 standard deviations; the kinks of the ReLUs leave errors of the square of its spacing."""
    qf, obs, mean, log_var = critic(dim), torch.randn(1, OBS_DIM), torch.randn(dim), torch.randn(dim)
    axis = torch.linspace(-6.0, 6.0, order)
    nodes = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    weights = torch.exp(-0.5 * nodes.square().sum(1))
    q = qf(obs.expand(len(nodes), -1), mean + nodes * (0.5 * log_var).exp())
    average = (weights @ q) / weights.sum()
    value, *_ = qf.smoothed(obs, mean.unsqueeze(0), log_var)
    assert (qf(obs, mean.unsqueeze(0)) - average).abs() > 0.1, "smoothing must matter"
    torch.testing.assert_close(value.squeeze(), average, rtol=0, atol=1e-5 if dim == 1 else 2e-2)


def test_gradient_and_hessian_are_those_of_the_value(float64):
    qf, observations, actions = critic(), torch.randn(BATCH, OBS_DIM), torch.randn(BATCH, ACTION_DIM)
    log_var = torch.tensor([-4.0, -1.0, 0.0])

    def value(obs, action):
        return qf.smoothed(obs.unsqueeze(0), action.unsqueeze(0), log_var)[0].squeeze(0)

    values, gradient, hessian = qf.smoothed(observations, actions, log_var)
    assert values.shape == (BATCH,) and gradient.shape == hessian.shape == (BATCH, ACTION_DIM)
    assert hessian.abs().mean() > 1e-2
    expected_gradient = torch.func.vmap(torch.func.grad(value, 1))(observations, actions)
    expected_hessian = torch.func.vmap(torch.func.hessian(value, 1))(observations, actions).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)
    torch.testing.assert_close(hessian, expected_hessian, rtol=0, atol=1e-10)


def test_theorem_1_holds_by_construction(float64):
    """(14): the derivative in each variance, by autograd through phi, is half the Hessian."""
    qf, observations, actions = critic(), torch.randn(BATCH, OBS_DIM), torch.randn(BATCH, ACTION_DIM)
    log_var = torch.tensor([-2.0, -1.0, 0.0])
    in_phi = torch.func.jacrev(lambda phi: qf.smoothed(observations, actions, phi)[0])(log_var)
    _, _, hessian = qf.smoothed(observations, actions, log_var)
    torch.testing.assert_close(in_phi, 0.5 * hessian * log_var.exp(), rtol=0, atol=1e-12)


def test_the_critic_learns_at_the_replayed_actions_on_averaged_targets(float64, monkeypatch):
    """The regression is on the replayed action itself; the target averages Q' over the target policy (16)."""
    args = smoothie_closed_form.Args(log_var_init=-1.0, reward_scale=0.5, gamma=0.9, q_lr=0.0)
    agent = smoothie_closed_form.Smoothie(OBS_DIM, ACTION_DIM, args)
    for qf in (agent.qfs[0], agent.target_qfs[0]):
        torch.nn.init.normal_(qf.fc_q.weight)
    with torch.no_grad():  # make the target policy differ
        agent.target_actor.log_var -= 0.7
        agent.target_actor.fc_mean.bias += 0.3
    observations, next_observations = torch.randn(2, 2, OBS_DIM)
    actions, rewards, terminated = torch.randn(2, ACTION_DIM), torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])
    means, std = agent.target_actor(next_observations), (0.5 * agent.target_actor.log_var).exp()
    sampled = means.repeat(200_000, 1) + std * torch.randn(400_000, ACTION_DIM)
    with torch.no_grad():
        next_q = agent.target_qfs[0](next_observations.repeat(200_000, 1), sampled).view(-1, 2)
        targets = 0.5 * rewards + 0.9 * (1 - terminated) * next_q.mean(0)
        expected = (agent.qfs[0](observations, actions) - targets).square().mean()
    metrics = agent.update_critic(observations, actions, rewards, next_observations, terminated)
    assert next_q.std() > 0.1
    assert metrics["losses/qf1_loss"].item() == pytest.approx(expected.item(), rel=0.02)
    assert metrics["losses/qf1_values"].item() == pytest.approx(agent.qfs[0](observations, actions).mean().item(), rel=1e-12)


class ReLUCritic(smoothie_closed_form.QNetwork):
    """DDPG's critic, whatever the script's own is: the gradient of the ReLU network."""

    def action_gradient(self, observations, actions):
        z, w_a = self.hidden(observations, actions), self.fc2.weight[:, -actions.shape[1] :]
        return (self.fc_q.weight * (z > 0)) @ w_a


def test_without_covariance_it_is_ddpg_with_a_relu_critic(float64, monkeypatch):
    """As Sigma goes to zero, the updates of the mean and of the critic are those of DDPG, step by step."""
    monkeypatch.setattr(ddpg_continuous, "QNetwork", ReLUCritic)
    args = smoothie_closed_form.Args(log_var_init=-80.0, policy_lr=1e-3, tau=0.05, kl_coef=0.0)
    agent = smoothie_closed_form.Smoothie(OBS_DIM, ACTION_DIM, args)
    ddpg = ddpg_continuous.DDPG(OBS_DIM, ACTION_DIM, ddpg_continuous.Args(policy_lr=1e-3, tau=0.05))
    networks = ("actor", "target_actor", "qfs", "target_qfs")
    for name in networks:
        getattr(ddpg, name).load_state_dict(getattr(agent, name).state_dict(), strict=False)
    start = agent.actor.fc2.weight.detach().clone()
    for _ in range(20):
        observations, next_observations = torch.randn(2, BATCH, OBS_DIM)
        batch = observations, torch.randn(BATCH, ACTION_DIM), torch.randn(BATCH), next_observations, torch.zeros(BATCH)
        agent.update(observations, batch)
        ddpg.update(observations, batch)
        for name in networks:
            theirs = getattr(ddpg, name).state_dict()
            for key, value in getattr(agent, name).state_dict().items():
                if key != "log_var":
                    torch.testing.assert_close(value, theirs[key], rtol=1e-9, atol=1e-12)
    assert (agent.actor.fc2.weight - start).abs().max() > 1e-3


def learned_from_the_policys_own_actions(script, frequency, variance, a):
    """Fit the critic to the reward sin(frequency a) of actions from N(0, variance); return it at a (n, 1)."""
    torch.manual_seed(0)
    rng, updates = np.random.default_rng(0), 1200
    args = script.Args(log_var_init=math.log(variance), reward_scale=1.0, max_grad_norm=math.inf)
    agent = script.Smoothie(2, 1, args)
    torch.nn.init.normal_(agent.qfs[0].fc2.weight[:, -1:])  # features that span the range from the start
    torch.nn.init.normal_(agent.qfs[0].fc2.bias, std=1.5)
    buffer = script.ReplayBuffer(20_000, 2, 1, rng)
    for action in rng.normal(0.0, math.sqrt(variance), 20_000):
        buffer.add(np.zeros(2), [action], math.sin(frequency * action), np.zeros(2), True)
    for update in range(updates):
        agent.q_optimizer.lr = 1e-3 * (1 - update / updates)
        agent.update_critic(*buffer.sample(128))
    with torch.no_grad():
        if script is smoothie_closed_form:
            return agent.qfs[0].smoothed(torch.zeros(len(a), 2), a, agent.actor.log_var)[0]
        return agent.qfs[0](torch.zeros(len(a), 2), a)


def test_on_policy_actions_give_the_exact_convolution_only_in_closed_form():
    """Given a phantom action a, the policy's own a~ ~ N(0, Sigma) is N(a / 2, Sigma / 2): half the slope of (9)."""
    frequency, variance = 1.0, 0.5
    a = torch.linspace(-0.7, 0.7, 41).unsqueeze(1)
    exact = math.exp(-(frequency**2) * variance / 2) * torch.sin(frequency * a).squeeze(1)
    narrow = math.exp(-(frequency**2) * variance / 4) * torch.sin(frequency * a / 2).squeeze(1)
    closed_form = learned_from_the_policys_own_actions(smoothie_closed_form, frequency, variance, a)
    phantom = learned_from_the_policys_own_actions(smoothie_continuous, frequency, variance, a)
    assert (closed_form - exact).square().mean().sqrt() < 0.02
    assert (phantom - narrow).square().mean().sqrt() < 0.04
    assert (phantom - exact).square().mean().sqrt() > 0.08
