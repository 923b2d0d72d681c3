"""The fast update, as it is and compiled, against the plain mathematics in float64."""

import copy
import math

import pytest
import torch

import ddpg_continuous
import smoothie_continuous
from tests.conftest import agent_class

OBS_DIM, ACTION_DIM, BATCH = 17, 6, 16


class Plain:
    """The update as a textbook writes it, float64: autograd Hessians, torch.distributions, torch.optim."""

    def __init__(self, script, agent):
        self.script, self.args = script, agent.args
        self.actor, self.target_actor, self.qf, self.target_qf = (
            copy.deepcopy(net).double() for net in (agent.actor, agent.target_actor, agent.qf, agent.target_qf)
        )
        self.theta = [p for name, p in self.actor.named_parameters() if name != "log_var"]
        self.actor_optimizer = torch.optim.Adam(self.theta, lr=self.args.policy_lr)
        self.q_optimizer = torch.optim.Adam(self.qf.parameters(), lr=self.args.q_lr)
        self.value_scale = 1.0

    def policy(self, actor, observations):
        covariance = torch.diag(actor.log_var.exp())
        return torch.distributions.MultivariateNormal(actor(observations), covariance_matrix=covariance)

    def update(self, observations, batch, noise):
        observations, noise, batch = observations.double(), noise.double(), [x.double() for x in batch]
        smoothie, args = self.script is not ddpg_continuous, self.args
        mean = self.actor(observations)

        def q(action, observation):
            return self.qf(observation.unsqueeze(0), action.unsqueeze(0)).squeeze(0)

        gradient = torch.vmap(torch.func.grad(q))(mean.detach(), observations).detach()
        objective = (gradient * mean).sum(1).mean()
        if smoothie:
            hessians = torch.vmap(torch.func.hessian(q))(mean.detach(), observations)
            covariance = torch.diag(self.actor.log_var.exp())
            objective = objective + 0.5 * torch.einsum("bij,ji->b", hessians.detach(), covariance).mean()
            if self.script is smoothie_continuous:
                kl = torch.distributions.kl_divergence(
                    self.policy(self.actor, observations), self.policy(self.target_actor, observations)
                ).mean()
                objective = objective - args.kl_coef * self.value_scale * kl
        for p in self.actor.parameters():
            p.grad = None
        (-objective).backward()
        self.actor_optimizer.step()
        with torch.no_grad():
            if smoothie:
                self.actor.log_var -= args.log_var_lr / self.value_scale * self.actor.log_var.grad

            observations, actions, rewards, next_observations, terminated = batch
            next_values = self.target_qf(next_observations, self.target_actor(next_observations))
            targets = args.reward_scale * rewards + args.gamma * torch.where(terminated == 1, 0.0, next_values)
            if smoothie:
                actions = actions + noise * self.actor.log_var.exp().sqrt()
                self.value_scale = (1 - args.tau) * self.value_scale + args.tau * targets.abs().mean()
        self.q_optimizer.zero_grad()
        (self.qf(observations, actions) - targets).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.qf.parameters(), args.max_grad_norm)
        self.q_optimizer.step()
        with torch.no_grad():
            for net, target in [(self.actor, self.target_actor), (self.qf, self.target_qf)]:
                for p, lagged in zip(net.parameters(), target.parameters(), strict=True):
                    lagged.copy_((1 - args.tau) * lagged + args.tau * p)


def differences(script, agent, update, updates=100):
    """Run both; return the largest difference in a weight after one update and after all, and how far the weights came."""
    torch.nn.init.normal_(agent.qf.fc_q.weight, std=0.5)  # large derivatives, and a gradient that gets clipped
    plain, start = Plain(script, agent), copy.deepcopy(agent.state_dict())
    nets = ("actor", "target_actor", "qf", "target_qf")

    def largest(other):
        ours = agent.state_dict()
        return max((ours[name].double() - value).abs().max().item() for name, value in other.items() if name in ours)

    def plain_state():
        return {f"{net}.{name}": value for net in nets for name, value in getattr(plain, net).state_dict().items()}

    generator = torch.Generator().manual_seed(1)
    dtype = next(agent.parameters()).dtype
    found = []
    for step in range(updates):
        draw = torch.randn(BATCH, 3 * OBS_DIM + ACTION_DIM + 2, generator=generator, dtype=torch.float32).to(dtype)
        *parts, other = draw.split([OBS_DIM, ACTION_DIM, 1, OBS_DIM, 1, OBS_DIM], 1)
        batch = [parts[0], parts[1], 20 * parts[2].squeeze(1), parts[3], (parts[4].squeeze(1) > 1).to(dtype)]
        torch.manual_seed(step)
        noise = torch.randn_like(batch[1])
        torch.manual_seed(step)
        update(other, batch)
        plain.update(other, batch, noise)
        if step in (0, updates - 1):
            found.append(largest(plain_state()))
    return found, largest({name: value for name, value in start.items() if name.split(".")[0] in nets})


def new_agent(script):
    torch.manual_seed(0)
    flags = {} if script is ddpg_continuous else {"log_var_init": -1.0}
    if script is smoothie_continuous:
        flags["kl_coef"] = 0.02  # large enough to be seen
    return agent_class(script)(OBS_DIM, ACTION_DIM, script.Args(batch_size=BATCH, **flags))


def test_update_is_the_plain_mathematics(float64, script):
    agent = new_agent(script)
    (after_one, after_all), moved = differences(script, agent, agent.update)
    assert after_one < 1e-11 and after_all < 1e-9 and moved > 0.05, (after_one, after_all, moved)


@pytest.mark.parametrize("compile", [False, True], ids=["as it is", "compiled"])
def test_float32_update_stays_close_to_the_plain_mathematics(script, compile):
    agent = new_agent(script)
    update = script.compiled(agent.update) if compile else agent.update
    (after_one, after_all), moved = differences(script, agent, update)
    assert after_one < 1e-4 and after_all < 1e-3 and moved > 0.5, (after_one, after_all, moved)


def test_adam_is_torchs(float64, script):
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    theirs = copy.deepcopy(params)
    adam, reference = script.Adam(params, 1e-2), torch.optim.Adam(theirs, 1e-2)
    for step in range(300):
        grads = [10.0 ** (step % 5 - 4) * torch.randn_like(p) for p in params]
        adam.step(grads)
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad
        reference.step()
    for ours, expected in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_a_large_gradient_is_clipped(float64, script):
    """Adam hides the size of a gradient in its step, not in its moments: m = 0.1 g, of norm 0.1 max_grad_norm."""
    agent = new_agent(script)
    batch = [torch.randn(BATCH, OBS_DIM), torch.randn(BATCH, ACTION_DIM), torch.full((BATCH,), 1e6)]
    agent.update_critic(*batch, torch.randn(BATCH, OBS_DIM), torch.zeros(BATCH))
    norm = math.sqrt(sum(m.square().sum() for m in agent.q_optimizer.m))
    assert norm == pytest.approx(0.1 * agent.args.max_grad_norm, rel=1e-9)
