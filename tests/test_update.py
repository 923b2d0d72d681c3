"""The update, as it is and compiled, against the plain mathematics in float64; what starts it and what it reports."""

import copy
import itertools
import math

import pytest
import torch

import ddpg_continuous
import smoothie_closed_form
import smoothie_continuous
import smoothie_no_kl
from tests.conftest import agent_class

OBS_DIM, ACTION_DIM, BATCH = 17, 6, 16


class Plain:
    """The update as a textbook writes it, float64: autograd Hessians, torch.distributions, torch.optim."""

    def __init__(self, script, agent):
        self.script, self.args = script, agent.args
        self.actor, self.target_actor, self.qfs, self.target_qfs = (
            copy.deepcopy(net).double() for net in (agent.actor, agent.target_actor, agent.qfs, agent.target_qfs)
        )
        self.theta = [p for name, p in self.actor.named_parameters() if name != "log_var"]
        self.actor_optimizer = torch.optim.Adam(self.theta, lr=self.args.policy_lr)
        self.q_optimizer = torch.optim.Adam(self.qfs.parameters(), lr=self.args.q_lr)
        self.value_scale = 1.0

    def value(self, qf, observations, actions, actor):
        """Q~(s, a), which the closed form averages over the actor's covariance and the others learn; Q(s, a) in DDPG."""
        if self.script is not smoothie_closed_form:
            return qf(observations, actions)
        z, weights = qf.hidden(observations, actions), qf.fc2.weight[:, -ACTION_DIM:]
        std, normal = (weights**2 @ actor.log_var.detach().exp()).sqrt(), torch.distributions.Normal(0.0, 1.0)
        return qf.fc_q(z * normal.cdf(z / std) + std * normal.log_prob(z / std).exp()).squeeze(1)

    def policy(self, actor, observations):
        covariance = torch.diag(actor.log_var.exp())
        return torch.distributions.MultivariateNormal(actor(observations), covariance_matrix=covariance)

    def update(self, observations, batch, noise):
        observations, noise, batch = observations.double(), noise.double(), [x.double() for x in batch]
        smoothie, args, metrics = self.script is not ddpg_continuous, self.args, {}
        mean = self.actor(observations)

        def q(action, observation):
            return self.value(self.qfs[0], observation.unsqueeze(0), action.unsqueeze(0), self.actor).squeeze(0)

        gradient = torch.vmap(torch.func.grad(q))(mean.detach(), observations).detach()
        objective = (gradient * mean).sum(1).mean()
        if smoothie:
            hessians = torch.vmap(torch.func.hessian(q))(mean.detach(), observations)
            covariance = torch.diag(self.actor.log_var.exp())
            objective = objective + 0.5 * torch.einsum("bij,ji->b", hessians.detach(), covariance).mean()
            metrics["losses/hessian"] = hessians.diagonal(dim1=1, dim2=2).mean()
            if self.script is not smoothie_no_kl:
                kl = torch.distributions.kl_divergence(
                    self.policy(self.actor, observations), self.policy(self.target_actor, observations)
                ).mean()
                objective = objective - args.kl_coef * self.value_scale * kl
                metrics["losses/kl"] = kl
        metrics["losses/actor_loss"] = -objective
        for p in self.actor.parameters():
            p.grad = None
        (-objective).backward()
        self.actor_optimizer.step()
        with torch.no_grad():
            if smoothie:
                self.actor.log_var -= args.log_var_lr / self.value_scale * self.actor.log_var.grad

            observations, actions, rewards, next_observations, terminated = batch
            next_means, next_values = self.target_actor(next_observations), torch.full((BATCH,), math.inf)
            for qf in self.target_qfs:
                next_values = torch.minimum(next_values, self.value(qf, next_observations, next_means, self.target_actor))
            targets = args.reward_scale * rewards + args.gamma * torch.where(terminated == 1, 0.0, next_values)
            if smoothie:
                if self.script is not smoothie_closed_form:
                    actions = actions + noise * self.actor.log_var.exp().sqrt()
                self.value_scale = (1 - args.tau) * self.value_scale + args.tau * targets.abs().mean()
                metrics["losses/value_scale"] = self.value_scale
        self.q_optimizer.zero_grad()
        for qf in reversed(self.qfs):
            values = qf(observations, actions)
            loss = (values - targets).square().mean()
            loss.backward()
        metrics |= {"losses/qf1_values": values.mean(), "losses/qf1_loss": loss}  # the first critic's
        torch.nn.utils.clip_grad_norm_(self.qfs.parameters(), args.max_grad_norm)
        self.q_optimizer.step()
        with torch.no_grad():
            for net, target in [(self.actor, self.target_actor), (self.qfs, self.target_qfs)]:
                for p, lagged in zip(net.parameters(), target.parameters(), strict=True):
                    lagged.copy_((1 - args.tau) * lagged + args.tau * p)
        return {name: value.item() for name, value in metrics.items()}


def draws(dtype):
    """Endless batches: the policy's observations and the critic's transitions, some of which end an episode."""
    generator = torch.Generator().manual_seed(1)
    while True:
        draw = torch.randn(BATCH, 3 * OBS_DIM + ACTION_DIM + 2, generator=generator, dtype=torch.float32).to(dtype)
        *parts, other = draw.split([OBS_DIM, ACTION_DIM, 1, OBS_DIM, 1, OBS_DIM], 1)
        yield other, [parts[0], parts[1], 20 * parts[2].squeeze(1), parts[3], (parts[4].squeeze(1) > 1).to(dtype)]


def furthest(agent, weights):
    """The largest difference between a weight of a network and its value in `weights`."""
    ours = weights_of(agent)
    return max((ours[name] - value).abs().max().item() for name, value in weights.items())


def weights_of(learner):
    nets = {net: getattr(learner, net) for net in ("actor", "target_actor", "qfs", "target_qfs")}
    weights = {f"{net}.{name}": value for net, module in nets.items() for name, value in module.state_dict().items()}
    return {name: value.to("cpu", torch.float64, copy=True) for name, value in weights.items()}


def compare(script, agent, updates=100):
    """Run both. Return the largest difference in weights after one update, after all, in metrics, and how far weights moved."""
    plain, start, found, in_metrics = Plain(script, agent), weights_of(agent), [], 0.0
    for step, (observations, batch) in enumerate(itertools.islice(draws(next(agent.parameters()).dtype), updates)):
        torch.manual_seed(step)
        noise = torch.randn_like(batch[1])
        torch.manual_seed(step)
        metrics, expected = agent.update(observations, batch), plain.update(observations, batch, noise)
        assert metrics.keys() == expected.keys()
        in_metrics = max(in_metrics, *(abs(metrics[name].item() - value) for name, value in expected.items()))
        if step in (0, updates - 1):
            found.append(furthest(agent, weights_of(plain)))
    return *found, in_metrics, furthest(agent, start)


def new_agent(script, critics=1):
    torch.manual_seed(0)
    flags = {"critics": critics, "max_grad_norm": 40.0} | ({} if script is ddpg_continuous else {"log_var_init": -1.0})
    if hasattr(script.Args, "kl_coef"):
        flags["kl_coef"] = 0.02  # large enough to be seen
    agent = agent_class(script)(OBS_DIM, ACTION_DIM, script.Args(batch_size=BATCH, **flags))
    for qf, target in zip(agent.qfs, agent.target_qfs, strict=True):
        for net in (qf, target):  # large derivatives, and gradients about half of which get clipped
            torch.nn.init.normal_(net.fc_q.weight, std=0.5)
    return agent


@pytest.mark.parametrize("critics", [1, 2])
def test_update_is_the_plain_mathematics(float64, script, critics):
    after_one, after_all, in_metrics, way = compare(script, new_agent(script, critics))
    assert after_one < 1e-10 and after_all < 1e-8 and in_metrics < 1e-6 and way > 0.05, (after_one, after_all, in_metrics, way)


def test_float32_update_stays_close_to_the_plain_mathematics(script):
    after_one, after_all, _, way = compare(script, new_agent(script))
    # One weight's first gradient is 4e-9: Adam turns its rounding error, which varies between processors, into a visible step.
    assert after_one < 3e-4 and after_all < 1e-3 and way > 0.5, (after_one, after_all, way)


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_compiled_update_is_the_update(script, device):
    """With the same random numbers, too."""
    agent, compiled = new_agent(script).to(device), new_agent(script).to(device)
    update, start = script.compile_update(compiled.update, device), weights_of(agent)
    assert update != compiled.update, "it can be compiled here"
    for step, (observations, batch) in enumerate(itertools.islice(draws(torch.float32), 100)):
        observations, batch = observations.to(device), [part.to(device) for part in batch]
        torch.manual_seed(step)
        expected = agent.update(observations, batch)
        torch.manual_seed(step)
        metrics = update(observations, batch)
        if step == 0:
            assert furthest(compiled, weights_of(agent)) < 3e-4  # near-zero gradients: Adam divides rounding errors by them
            assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
                {name: value.item() for name, value in expected.items()}, rel=1e-3, abs=1e-4
            )
    assert furthest(compiled, weights_of(agent)) < 1e-3 and furthest(compiled, start) > 0.5


def test_adam_is_torchs(float64):
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    theirs = copy.deepcopy(params)
    adam, reference = smoothie_continuous.Adam(params, 1e-2), torch.optim.Adam(theirs, 1e-2)
    for step in range(300):
        grads = [10.0 ** (step % 5 - 4) * torch.randn_like(p) for p in params]
        adam.step(grads)
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad
        reference.step()
    for ours, expected in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("factor", [1e6, 1.0], ids=["large", "small"])
def test_a_large_gradient_is_clipped_and_a_small_one_is_left_alone(float64, script, factor):
    """Adam hides the size of a gradient in its step, not in its moments: m is 0.1 times the first gradient."""
    agent, free = (agent_class(script)(OBS_DIM, ACTION_DIM, script.Args(max_grad_norm=bound)) for bound in (4.0, math.inf))
    free.load_state_dict(agent.state_dict())
    batch = [torch.randn(BATCH, OBS_DIM), torch.randn(BATCH, ACTION_DIM), factor * torch.ones(BATCH)]
    batch += [torch.randn(BATCH, OBS_DIM), torch.zeros(BATCH)]
    for learner in (agent, free):
        torch.manual_seed(0)
        learner.update_critic(*batch)
    clipped, unclipped = (torch.cat([10 * m.flatten() for m in learner.q_optimizer.m]) for learner in (agent, free))
    assert (unclipped.norm() > 4.0) == (factor > 1) and unclipped.norm() > 1e-3
    expected = 4.0 * unclipped / unclipped.norm() if factor > 1 else unclipped
    torch.testing.assert_close(clipped, expected, rtol=1e-9, atol=1e-12)


def test_without_rewards_the_value_scale_stays_above_zero(smoothie):
    """The learning rate of phi is divided by it."""
    agent = smoothie.Smoothie(OBS_DIM, ACTION_DIM, smoothie.Args(gamma=0.0, tau=1.0))
    observations, batch = next(draws(torch.float32))
    batch[2].zero_()
    for _ in range(3):
        metrics = agent.update(observations, batch)
    assert 0 < metrics["losses/value_scale"].item() < 1e-3
    assert all(p.isfinite().all() for p in agent.parameters())


def test_the_kl_penalty_hardly_pulls_on_phi(float64, monkeypatch):
    """At most 0.2% of the pull of (15) where the curvature is steady, with the largest --kl-coef of benchmark_settings.txt."""
    args = smoothie_continuous.Args(kl_coef=1e-4)
    agent, hessian = smoothie_continuous.Smoothie(OBS_DIM, ACTION_DIM, args), torch.full((BATCH, ACTION_DIM), -0.1)
    monkeypatch.setattr(agent.qfs[0], "action_derivatives", lambda observations, actions: (torch.zeros_like(actions), hessian))
    phi, old_phi, value_scale = agent.actor.log_var, agent.target_actor.log_var, agent.value_scale.fill_(30.0)
    for _ in range(1_000):
        agent.update_policy(torch.randn(BATCH, OBS_DIM))
        with torch.no_grad():
            old_phi.lerp_(phi, args.tau)
    penalty = args.kl_coef * value_scale * 0.5 * (1 - (phi - old_phi).exp())
    ratios = penalty / (0.5 * hessian[0] * phi.exp()).abs()
    assert (0.001 < ratios).all() and (ratios < 0.002).all(), ratios


def test_networks_are_what_they_say(float64, script):
    """Shapes, activations and initial values, written out."""
    agent = agent_class(script)(OBS_DIM, ACTION_DIM, script.Args())
    for layer in (agent.actor.fc_mean, agent.qfs[0].fc_q):  # uniform within 3e-3, so that first values and means are small
        assert layer.weight.abs().max() <= 3e-3
        assert layer.weight.std().item() == pytest.approx(3e-3 / math.sqrt(3), rel=0.15)
    for net, target in [(agent.actor, agent.target_actor), (agent.qfs, agent.target_qfs)]:
        for p, lagged in zip(net.parameters(), target.parameters(), strict=True):
            assert torch.equal(p, lagged) and p.requires_grad and not lagged.requires_grad
    if script is not ddpg_continuous:
        assert agent.actor.log_var.tolist() == ACTION_DIM * [script.Args.log_var_init]

    for net in (agent.actor, agent.qfs[0]):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)  # so that a wrong activation shows
    s, a = torch.randn(BATCH, OBS_DIM), torch.randn(BATCH, ACTION_DIM)
    weights = {name.removesuffix(".weight"): p for name, p in agent.actor.named_parameters()}
    h = (s @ weights["fc1"].T + weights["fc1.bias"]).clamp(min=0)
    h = (h @ weights["fc2"].T + weights["fc2.bias"]).clamp(min=0)
    expected = (h @ weights["fc_mean"].T + weights["fc_mean.bias"]).tanh()
    assert h.shape == (BATCH, 300)
    torch.testing.assert_close(agent.actor(s), expected, rtol=0, atol=1e-12)

    weights = {name.removesuffix(".weight"): p for name, p in agent.qfs[0].named_parameters()}
    h = (s @ weights["fc1"].T + weights["fc1.bias"]).clamp(min=0)
    z = torch.cat([h, a], 1) @ weights["fc2"].T + weights["fc2.bias"]
    assert h.shape == (BATCH, 400) and z.shape == (BATCH, 300)
    relu, gelu = z.clamp(min=0), z * torch.distributions.Normal(0, 1).cdf(z)
    expected = [(h @ weights["fc_q"].T + weights["fc_q.bias"])[:, 0] for h in (relu, gelu)]
    torch.testing.assert_close(agent.qfs[0](s, a), expected[script is not smoothie_closed_form], rtol=0, atol=1e-12)
