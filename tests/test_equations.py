"""The update against a textbook version of it; then the paper's equations, by number."""

import copy
import importlib.util
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpg_continuous
import smoothie_closed_form
import smoothie_continuous
import smoothie_no_kl
from tests.conftest import ROOT, agent_class, gauss_hermite, run, scalars

OBS_DIM, ACTION_DIM, BATCH = 17, 6, 16


class Plain:
    """The update as a textbook writes it, float64: autograd Hessians, torch.distributions and
    torch.optim; smoothed critics by quadrature; phantom actions by conditioning a Gaussian."""

    def __init__(self, script, agent):
        self.script = script
        self.args = agent.args
        self.actor = copy.deepcopy(agent.actor).double()
        self.qfs = copy.deepcopy(agent.qfs).double()
        self.target_actor = copy.deepcopy(agent.target_actor).double()
        self.target_qfs = copy.deepcopy(agent.target_qfs).double()
        self.theta = [p for name, p in self.actor.named_parameters() if name != "log_var"]
        self.actor_optimizer = torch.optim.Adam(self.theta, lr=self.args.policy_lr)
        self.q_optimizer = torch.optim.Adam(self.qfs.parameters(), lr=self.args.q_lr)
        self.value_scale = 1.0

    def mean(self, actor, observations):
        out = actor(observations)
        return out if self.script is ddpg_continuous else out[0]

    def value(self, qf, observations, actions, actor):
        """Q~(s, a), in closed form an average over what each unit sees; Q(s, a) in DDPG."""
        if self.script is not smoothie_closed_form:
            return qf(observations, actions)
        nodes, weights = gauss_hermite(24, 1)
        w_a = qf.fc2.weight[:, -ACTION_DIM:]
        std = (w_a**2 @ actor.log_var.detach().exp()).sqrt()
        z = qf.hidden(observations, actions) + std * nodes.unsqueeze(1)  # (nodes, batch, units)
        units = torch.einsum("n,nbu->bu", weights, torch.nn.functional.gelu(z))
        return qf.fc_q(units).squeeze(1)

    def policy(self, actor, observations):
        mean, log_var = actor(observations)
        return torch.distributions.MultivariateNormal(mean, torch.diag_embed(log_var.exp()))

    def phantom_actions(self, observations, actions, means, variances, noise):
        """Condition the joint Gaussian of a and a~ on a~; an infinite variance is its limit."""
        covariance = self.actor(observations)[1].exp()
        before = (variances - covariance).clamp(min=0.0)  # of a, before a~ was drawn around it
        known = variances.isfinite()
        gain = torch.where(known, before / variances, 1.0)
        variance = torch.where(known, before - before**2 / variances, covariance)
        variance = torch.where(before > 0, variance, 0.0)
        return means + gain * (actions - means) + noise * variance.sqrt()

    def update_critics(self, batch, noise):
        observations, actions, rewards, next_observations, terminated, *behaviour = batch
        metrics = {}
        with torch.no_grad():
            next_means = self.mean(self.target_actor, next_observations)
            next_values = torch.full((BATCH,), math.inf)
            for qf in self.target_qfs:
                value = self.value(qf, next_observations, next_means, self.target_actor)
                next_values = torch.minimum(next_values, value)
            targets = rewards + self.args.gamma * torch.where(terminated == 1, 0.0, next_values)
            if self.script is not ddpg_continuous:
                mean_size = targets.abs().mean()
                self.value_scale += self.args.tau * (mean_size - self.value_scale)
            if behaviour:
                actions = self.phantom_actions(observations, actions, *behaviour, noise)
        self.q_optimizer.zero_grad()
        for qf in reversed(self.qfs):
            values = qf(observations, actions)
            loss = (values - targets).square().mean()
            loss.backward()
        self.q_optimizer.step()
        metrics["losses/qf1_values"] = values.mean()  # the first critic's
        metrics["losses/qf1_loss"] = loss
        return metrics

    def update_policy(self, batch):
        observations = batch[0]
        metrics = {}
        mean = self.mean(self.actor, observations)

        def q(action, observation):
            at = (observation.unsqueeze(0), action.unsqueeze(0))
            total = sum(self.value(qf, *at, self.actor) for qf in self.qfs)
            return (total / len(self.qfs)).squeeze(0)

        gradient = torch.vmap(torch.func.grad(q))(mean.detach(), observations).detach()
        objective = (gradient * mean).sum(1).mean()
        if self.script is not ddpg_continuous:
            hessians = torch.vmap(torch.func.hessian(q))(mean.detach(), observations).detach()
            covariance = torch.diag_embed(self.actor(observations)[1].exp())
            objective = objective + 0.5 * (hessians * covariance).sum((1, 2)).mean()
            metrics["losses/hessian"] = hessians.diagonal(dim1=1, dim2=2).mean()
            metrics["losses/value_scale"] = self.value_scale
        if hasattr(self.args, "kl_coef"):
            new = self.policy(self.actor, observations)
            old = self.policy(self.target_actor, observations)
            kl = torch.distributions.kl_divergence(new, old).mean()
            objective = objective - self.args.kl_coef * self.value_scale * kl
            metrics["losses/kl"] = kl
        metrics["losses/actor_loss"] = -objective
        self.actor.zero_grad()
        (-objective).backward()
        self.actor_optimizer.step()
        with torch.no_grad():
            if hasattr(self.actor, "log_var"):
                rate = self.args.log_var_lr / self.value_scale
                self.actor.log_var -= rate * self.actor.log_var.grad
            for net, target in [(self.actor, self.target_actor), (self.qfs, self.target_qfs)]:
                for p, lagged in zip(net.parameters(), target.parameters(), strict=True):
                    lagged.copy_((1 - self.args.tau) * lagged + self.args.tau * p)
        return metrics


def draws(script, dtype):
    """Endless batches. Some transitions end an episode; some actions were uniform, some drawn
    with more and some with less variance than the policy has now."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)

    while True:
        obs, next_obs = normal(2, BATCH, OBS_DIM)
        actions, means, size = normal(3, BATCH, ACTION_DIM)
        batch = [obs, actions, 20 * normal(BATCH), next_obs, (normal(BATCH) > 1).to(dtype)]
        if hasattr(script.Args, "exact_phantom_actions"):
            variances = size.exp()
            variances[::4] = math.inf
            batch += [means, variances]
        yield batch


def weights_of(learner):
    nets = {net: getattr(learner, net) for net in ("actor", "target_actor", "qfs", "target_qfs")}
    weights = {}
    for net, module in nets.items():
        for name, value in module.state_dict().items():
            weights[f"{net}.{name}"] = value.to("cpu", torch.float64, copy=True)
    return weights


def furthest(weights, others):
    """Return the largest difference between a weight and its namesake."""
    return max((weights[name] - value).abs().max().item() for name, value in others.items())


def new_agent(script, critics=2):
    torch.manual_seed(0)
    flags = {} if script is ddpg_continuous else {"log_var_init": -1.0, "log_var_lr": 0.3}
    if hasattr(script.Args, "kl_coef"):
        flags["kl_coef"] = 0.02  # large enough to be seen
    args = script.Args(critics=critics, q_lr=1e-3, policy_lr=1e-3, tau=0.01, **flags)
    agent = agent_class(script)(OBS_DIM, ACTION_DIM, args)
    for qf, target in zip(agent.qfs, agent.target_qfs, strict=True):
        for net in (qf, target):  # large derivatives
            torch.nn.init.normal_(net.fc_q.weight, std=0.5)
    return agent


def compare(script, agent, updates=60):
    """Run both, the policy at every second update. Return the largest difference in weights after
    two updates, after all, in what is logged, and how far the weights moved."""
    plain = Plain(script, agent)
    start = weights_of(agent)
    dtype = next(agent.parameters()).dtype
    found = []
    in_metrics = 0.0
    for step, batch in enumerate(itertools.islice(draws(script, dtype), updates)):
        torch.manual_seed(step)
        noise = torch.randn_like(batch[1]).double()
        torch.manual_seed(step)
        in_double = [part.double() for part in batch]
        metrics = agent.update_critics(*batch)
        expected = plain.update_critics(in_double, noise)
        if step % 2 == 1:
            metrics |= agent.update_policy(*batch)
            expected |= plain.update_policy(in_double)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            in_metrics = max(in_metrics, abs(metrics[name].item() - torch.as_tensor(value).item()))
        if step in (1, updates - 1):
            found.append(furthest(weights_of(agent), weights_of(plain)))
    return *found, in_metrics, furthest(weights_of(agent), start)


@pytest.mark.parametrize("critics", [1, 2])
def test_update_is_the_textbook_update(float64, script, critics):
    after_two, after_all, in_metrics, way = compare(script, new_agent(script, critics))
    assert after_two < 1e-9 and after_all < 1e-7 and in_metrics < 1e-6, (after_two, after_all)
    assert way > 0.02


@pytest.mark.parametrize("original", [smoothie_continuous, smoothie_no_kl])
def test_readme_gives_the_covariance_a_state(original, float64, tmp_path):
    """Sigma_phi(s) by the lines in README: its update is the textbook one, and it trains."""
    (patch,) = re.findall(r"(?s)```diff\n(.*?)```", Path(ROOT, "README.md").read_text())
    source = Path(original.__file__).read_text()
    for hunk in re.findall(r"(?m)(?:^-.*\n)+(?:^\+.*\n)*", patch):
        old = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] == "-")
        new = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] == "+")
        assert old in source
        source = source.replace(old, new)
    path = tmp_path / "state_dependent.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("state_dependent", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    agent = new_agent(script)
    torch.nn.init.normal_(agent.actor.fc_log_var.weight, std=0.2)
    _, log_var = agent.actor(torch.randn(9, OBS_DIM))
    assert log_var.shape == (9, ACTION_DIM) and (log_var.std(0) > 0.1).all()
    after_two, after_all, in_metrics, way = compare(script, agent)
    assert after_two < 1e-9 and after_all < 1e-7 and in_metrics < 1e-6 and way > 0.02

    torch.set_default_dtype(torch.float32)
    std = [value for key, ((_, value), *_) in scalars(run(script)).items() if "std" in key]
    assert std == pytest.approx(3 * [0.2], abs=0.05)


def test_policy_update_does_not_depend_on_the_scale_of_rewards(float64, smoothie):
    """With values and value_scale ten times as large, theta and phi move as before. The values are
    so large that Adam's eps, which does depend on their scale, plays no part."""
    agent, scaled = new_agent(smoothie), new_agent(smoothie)
    for learner, scale in [(agent, 1e6), (scaled, 1e7)]:
        learner.value_scale *= scale
        for qf in learner.qfs:
            qf.fc_q.weight.detach().mul_(scale)
    before = weights_of(agent)
    for batch in itertools.islice(draws(smoothie, torch.float64), 20):
        agent.update_policy(*batch)
        scaled.update_policy(*batch)
    after, after_scaled = (
        {name: value for name, value in weights_of(agent).items() if "actor" in name}
        for agent in (agent, scaled)
    )
    before = {name: before[name] for name in after}
    assert furthest(after, after_scaled) < 1e-6 and furthest(after, before) > 0.01


def test_update_in_float32_stays_close(script):
    after_two, after_all, _, way = compare(script, new_agent(script))
    assert after_two < 3e-4 and after_all < 2e-3 and way > 0.02, (after_two, after_all)


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_compiled_update_is_the_update(script, device):
    """With the same random numbers, a float among the values to log, and a schedule."""
    agent = new_agent(script).to(device)
    compiled = new_agent(script).to(device)
    start = weights_of(agent)

    def update_critics(*batch):
        return compiled.update_critics(*batch) | {"losses/float": 0.5}

    updates = agent.update_critics, agent.update_policy
    compiled_updates = script.compile_updates(device, update_critics, compiled.update_policy)
    assert compiled_updates[0] != update_critics, "it can be compiled here"
    for step, batch in enumerate(itertools.islice(draws(script, torch.float32), 60)):
        batch = [part.to(device) for part in batch]
        if step == 30:
            for either in (agent, compiled):
                either.q_optimizer.lr.mul_(0.1)
                either.actor_optimizer.lr.mul_(0.1)
        for update, compiled_update in zip(updates, compiled_updates, strict=True):
            torch.manual_seed(step)
            expected = update(*batch)
            torch.manual_seed(step)
            metrics = compiled_update(*batch)
            if step == 0:
                for name, value in expected.items():
                    assert metrics[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-4)
                if update == agent.update_critics:
                    assert metrics.keys() - expected.keys() == {"losses/float"}
                    assert metrics["losses/float"] == 0.5
    assert furthest(weights_of(compiled), weights_of(agent)) < 2e-3
    assert furthest(weights_of(compiled), start) > 0.02


def test_adam_is_torchs(float64):
    params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    theirs = copy.deepcopy(params)
    adam = smoothie_continuous.Adam(params, 1e-2)
    reference = torch.optim.Adam(theirs, 1e-2)
    for step in range(300):
        grads = [10.0 ** (step % 5 - 4) * torch.randn_like(p) for p in params]
        adam.step(grads)
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad
        reference.step()
    for ours, expected in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


# The equations.


def critic(script, action_dim=ACTION_DIM):
    """A critic whose derivatives in the action are far from zero."""
    qf = script.QNetwork(OBS_DIM, action_dim)
    torch.nn.init.normal_(qf.fc_q.weight)
    torch.nn.init.normal_(qf.fc2.weight, std=0.2)
    return qf


def first_gradients(agent):
    """What Adam received for each parameter of the actor in the first update: m is 0.1 of it."""
    names = [name for name, _ in agent.actor.named_parameters() if name != "log_var"]
    return {n: 10 * m for n, m in zip(names, agent.actor_optimizer.m, strict=True)}


def exact_derivatives(q, observations, actions):
    """Return the gradient and the diagonal of the Hessian of q in the action, by autograd."""
    gradient = torch.vmap(torch.func.grad(q, 1))(observations, actions)
    hessian = torch.vmap(torch.func.hessian(q, 1))(observations, actions)
    return gradient, hessian.diagonal(dim1=1, dim2=2)


@pytest.mark.parametrize("module", [smoothie_continuous, smoothie_no_kl, smoothie_closed_form])
def test_05_without_covariance_smoothie_is_ddpg(float64, module):
    """As Sigma goes to zero, the updates of the mean and of the critics are those of DDPG."""
    without_kl = {"kl_coef": 0.0} if module is smoothie_continuous else {}
    flags = {"log_var_init": -80.0, "log_var_min": -100.0, **without_kl}
    agent = module.Smoothie(OBS_DIM, ACTION_DIM, module.Args(**flags))
    ddpg = ddpg_continuous.DDPG(OBS_DIM, ACTION_DIM, ddpg_continuous.Args())
    for name in ("actor", "qfs", "target_actor", "target_qfs"):
        weights = getattr(agent, name).state_dict()
        getattr(ddpg, name).load_state_dict(weights, strict=name.endswith("qfs"))
    start = weights_of(ddpg)
    for batch in itertools.islice(draws(module, torch.float64), 20):
        if len(batch) > 5:
            batch[6].fill_(math.inf)  # the phantom action is a~ itself
        agent.update_critics(*batch)
        ddpg.update_critics(*batch[:5])
        agent.update_policy(*batch)
        ddpg.update_policy(*batch[:5])
    assert furthest(weights_of(agent), weights_of(ddpg)) < 1e-9
    assert furthest(weights_of(ddpg), start) > 1e-3


def test_06_deterministic_policy_gradient(float64):
    """(6) is the chain rule through Q(s, mu(s))."""
    agent = ddpg_continuous.DDPG(OBS_DIM, ACTION_DIM, ddpg_continuous.Args(critics=1))
    agent.qfs[0] = critic(ddpg_continuous)
    observations = torch.randn(BATCH, OBS_DIM)
    names, parameters = zip(*agent.actor.named_parameters(), strict=True)
    value = agent.qfs[0](observations, agent.actor(observations)).mean()
    expected = torch.autograd.grad(-value, parameters)
    agent.update_policy(observations)
    found = first_gradients(agent)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    assert found["fc_mean.bias"].abs().min() > 1e-4


def test_08_targets_bootstrap_at_time_limits_and_not_at_terminations(script):
    """With values of 0 now and of 10 and 12 next, the loss is the mean square of the targets."""
    agent = agent_class(script)(OBS_DIM, ACTION_DIM, script.Args(gamma=0.9))
    values = [(agent.qfs[0], 0.0), (agent.target_qfs[0], 12.0), (agent.target_qfs[1], 10.0)]
    with torch.no_grad():
        for qf, value in values:
            qf.fc_q.weight.zero_()
            qf.fc_q.bias.fill_(value)
    batch = next(draws(script, torch.float32))
    batch[2] = torch.arange(float(BATCH))
    batch[4] = (batch[2] % 3 == 0).float()
    targets = [i + (0 if i % 3 == 0 else 9) for i in range(BATCH)]
    expected = sum(target**2 for target in targets) / BATCH
    assert agent.update_critics(*batch)["losses/qf1_loss"].item() == pytest.approx(expected)


def test_09_closed_form_is_the_gaussian_average(float64):
    qf = critic(smoothie_closed_form, action_dim=3)
    obs = torch.randn(1, OBS_DIM)
    mean = torch.randn(3)
    log_var = torch.tensor([-1.5, -1.0, 0.0])
    nodes, weights = gauss_hermite(30, 3)
    actions = mean + nodes * (0.5 * log_var).exp()
    average = weights @ qf(obs.expand(len(nodes), -1), actions)
    value, *_ = qf.smoothed(obs, mean.unsqueeze(0), log_var)
    assert (qf(obs, mean.unsqueeze(0)) - average).abs() > 0.05, "smoothing must matter"
    torch.testing.assert_close(value.squeeze(), average, rtol=0, atol=1e-8)


@pytest.mark.parametrize("module", [smoothie_continuous, smoothie_no_kl, ddpg_continuous])
def test_10_derivatives_in_the_action(float64, module):
    qf = critic(module)
    observations = torch.randn(BATCH, OBS_DIM)
    actions = torch.randn(BATCH, ACTION_DIM)

    def q(obs, action):
        return qf(obs.unsqueeze(0), action.unsqueeze(0)).squeeze(0)

    exact = exact_derivatives(q, observations, actions)
    assert min(derivative.abs().mean() for derivative in exact) > 1e-2
    if module is ddpg_continuous:
        found = qf.action_gradient(observations, actions)
        torch.testing.assert_close(found, exact[0], rtol=0, atol=1e-10)
    else:
        found = qf.action_derivatives(observations, actions)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


def test_10_derivatives_of_the_closed_form(float64):
    qf = critic(smoothie_closed_form)
    observations = torch.randn(BATCH, OBS_DIM)
    actions = torch.randn(BATCH, ACTION_DIM)
    log_var = torch.linspace(-4.0, 0.0, ACTION_DIM)

    def q(obs, action):
        return qf.smoothed(obs.unsqueeze(0), action.unsqueeze(0), log_var)[0].squeeze(0)

    _, *found = qf.smoothed(observations, actions, log_var)
    exact = exact_derivatives(q, observations, actions)
    assert min(derivative.abs().mean() for derivative in exact) > 1e-2
    torch.testing.assert_close(tuple(found), exact, rtol=0, atol=1e-10)


def phantom_actions(agent, monkeypatch, actions, means, variances):
    """Return where update_critics evaluates the critics for these replayed actions."""
    seen = []
    forward = smoothie_continuous.QNetwork.forward

    def record(qf, observations, actions):
        seen.append(actions)
        return forward(qf, observations, actions)

    monkeypatch.setattr(smoothie_continuous.QNetwork, "forward", record)
    zeros = torch.zeros(len(actions))
    states = torch.zeros(len(actions), OBS_DIM)
    agent.update_critics(states, actions, zeros, states, zeros, means, variances)
    return seen[-1]


def test_12_given_a_phantom_action_the_replayed_one_is_gaussian_around_it(float64, monkeypatch):
    """a~ = a + N(0, Sigma) means slope 1, residual variance Sigma and no skew."""
    n = 40_000
    std, policy_std = 0.9, 0.5
    flags = {"log_var_init": 2 * math.log(policy_std)}
    agent = smoothie_continuous.Smoothie(OBS_DIM, 1, smoothie_continuous.Args(**flags))
    means = torch.full((n, 1), 0.3)
    replayed = means + std * torch.randn(n, 1)
    variances = torch.full((n, 1), std**2)
    phantom = phantom_actions(agent, monkeypatch, replayed, means, variances)

    a = phantom - phantom.mean()
    slope = (a * replayed).mean() / a.square().mean()
    residual = replayed - replayed.mean() - slope * a
    error_of_slope = policy_std / math.sqrt(n * (std**2 - policy_std**2))
    assert abs(slope - 1) < 4 * error_of_slope
    assert abs(residual.var() / policy_std**2 - 1) < 4 * math.sqrt(2 / n)
    assert abs((residual**3).mean() / policy_std**3) < 4 * math.sqrt(15 / n)
    assert abs(phantom.mean() - 0.3) < 4 * std / math.sqrt(n)


def test_12_limits_of_the_phantom_action(float64, monkeypatch):
    """A uniform action is spread by Sigma, as in the paper; with S = Sigma or less a is m."""
    n = 10_000
    flags = {"log_var_init": math.log(0.25)}
    agent = smoothie_continuous.Smoothie(OBS_DIM, 1, smoothie_continuous.Args(**flags))
    means = torch.full((n, 1), 0.3)
    replayed = means + torch.randn(n, 1)
    variances = torch.full((n, 1), math.inf)
    variances[: n // 2] = 0.25
    variances[: n // 4] = 0.1
    phantom = phantom_actions(agent, monkeypatch, replayed, means, variances)
    torch.testing.assert_close(phantom[: n // 2], means[: n // 2], rtol=0, atol=1e-12)
    spread = (phantom - replayed)[n // 2 :]
    assert abs(spread.mean()) < 4 * 0.5 / math.sqrt(n / 2)
    assert abs(spread.var() / 0.25 - 1) < 4 * math.sqrt(4 / n)

    agent.args.exact_phantom_actions = False
    spread = phantom_actions(agent, monkeypatch, replayed, means, variances) - replayed
    assert abs(spread.var() / 0.25 - 1) < 4 * math.sqrt(2 / n)


def learned_from_the_policys_own_actions(script, a, variance, exploration, **flags):
    """Fit a critic to the reward sin(a) of actions from N(0, exploration^2 variance).

    Return the learned Q~ at a, (n,).
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    updates = 800
    args = script.Args(log_var_init=math.log(variance), critics=1, **flags)
    agent = script.Smoothie(2, 1, args)
    torch.nn.init.normal_(agent.qfs[0].fc2.weight[:, -1:])  # features that span the range
    torch.nn.init.normal_(agent.qfs[0].fc2.bias, std=1.5)
    buffer = script.ReplayBuffer(20_000, 2, 1, rng, "cpu")
    behaviour = exploration**2 * variance
    for action in rng.normal(0.0, math.sqrt(behaviour), 20_000):
        row = [np.zeros(2), action, math.sin(action), np.zeros(2), True]
        if script is not smoothie_closed_form:
            row += [0.0, behaviour]
        buffer.add(*row)
    for update in range(updates):
        agent.q_optimizer.lr.fill_(1e-3 * (1 - update / updates))
        agent.update_critics(*buffer.sample(128))
    with torch.no_grad():
        states = torch.zeros(len(a), 2)
        if script is smoothie_closed_form:
            return agent.qfs[0].smoothed(states, a, agent.actor.log_var)[0]
        return agent.qfs[0](states, a)


def test_12_the_policys_own_actions_give_the_exact_convolution():
    """E[sin(a + N(0, v))] = exp(-v / 2) sin(a), from exact phantom actions and in closed form.

    Given the paper's phantom action a, the policy's own a~ ~ N(0, v) is N(a / 2, v / 2).
    """
    variance = 0.5
    a = torch.linspace(-0.7, 0.7, 41).unsqueeze(1)
    exact = math.exp(-variance / 2) * torch.sin(a).squeeze(1)
    narrow = math.exp(-variance / 4) * torch.sin(a / 2).squeeze(1)

    def error(script, expected, exploration, **flags):
        found = learned_from_the_policys_own_actions(script, a, variance, exploration, **flags)
        return (found - expected).square().mean().sqrt()

    paper = {"exact_phantom_actions": False}
    assert error(smoothie_continuous, exact, 1.5) < 0.04
    assert error(smoothie_closed_form, exact, 1.0) < 0.02
    assert error(smoothie_continuous, narrow, 1.0, **paper) < 0.04
    assert error(smoothie_continuous, exact, 1.0, **paper) > 0.08


def test_13_and_15_policy_gradients(float64):
    """Each state's Jacobians, written out and averaged."""
    agent = smoothie_no_kl.Smoothie(OBS_DIM, 3, smoothie_no_kl.Args(log_var_lr=0.2, critics=1))
    agent.qfs[0] = critic(smoothie_no_kl, action_dim=3)
    agent.value_scale.fill_(3.0)
    actor = agent.actor
    with torch.no_grad():
        actor.log_var += torch.tensor([-1.0, 0.2, 1.0])
    phi = actor.log_var.detach().clone()
    observations = torch.randn(BATCH, OBS_DIM)
    with torch.no_grad():
        means, _ = actor(observations)
        gradient, hessian = agent.qfs[0].action_derivatives(observations, means)
    theta = {n: p.detach().clone() for n, p in actor.named_parameters() if n != "log_var"}

    def mean_of(theta, obs):
        weights = {**theta, "log_var": phi}
        return torch.func.functional_call(actor, weights, (obs.unsqueeze(0),))[0].squeeze(0)

    expected = {name: torch.zeros_like(p) for name, p in theta.items()}
    expected_phi = torch.zeros(3)
    for k in range(BATCH):
        jacobian = torch.func.jacrev(mean_of)(theta, observations[k])
        for name in theta:
            expected[name] += torch.einsum("i,i...->...", gradient[k], jacobian[name]) / BATCH
        in_phi = torch.func.jacrev(lambda phi: torch.diag(phi.exp()))(phi)
        expected_phi += 0.5 * torch.einsum("ij,ijk->k", torch.diag(hessian[k]), in_phi) / BATCH

    agent.update_policy(observations)
    for name, descent in first_gradients(agent).items():
        torch.testing.assert_close(-descent, expected[name], rtol=1e-9, atol=1e-12)
    step = actor.log_var.detach() - phi
    torch.testing.assert_close(step, 0.2 / 3.0 * expected_phi, rtol=1e-9, atol=1e-12)
    assert expected_phi.abs().min() > 1e-4


def test_14_theorem_1_by_quadrature(float64):
    """The derivative of (9) in a full covariance is half the Hessian."""
    qf = critic(smoothie_continuous, action_dim=3)
    obs = torch.randn(1, OBS_DIM)
    a = torch.randn(3)
    nodes, weights = gauss_hermite(15, 3)
    factor = 0.3 * torch.randn(3, 3) + 0.5 * torch.eye(3)

    def smoothed_q(a, covariance):
        actions = a + nodes @ torch.linalg.cholesky(covariance).T
        return (weights * qf(obs.expand(len(nodes), -1), actions)).sum()

    in_covariance = torch.func.grad(smoothed_q, 1)(a, factor @ factor.T)
    hessian = torch.func.hessian(smoothed_q)(a, factor @ factor.T)
    assert hessian.abs().max() > 1e-2
    # autograd through the Cholesky factor sees one entry of each symmetric pair: symmetrise
    symmetric = (in_covariance + in_covariance.T) / 2
    torch.testing.assert_close(symmetric, hessian / 2, rtol=0, atol=1e-4)


def test_14_theorem_1_with_the_scripts_own_hessian(float64):
    """The diagonal that the script computes, averaged, is twice the derivative in each variance."""
    qf = critic(smoothie_continuous, action_dim=3)
    mean = torch.randn(3)
    nodes, weights = gauss_hermite(15, 3)
    observations = torch.randn(1, OBS_DIM).expand(len(nodes), -1)

    def smoothed_q(variance):
        return (weights * qf(observations, mean + nodes * variance.sqrt())).sum()

    variance = torch.tensor([0.1, 0.3, 0.5])
    _, hessians = qf.action_derivatives(observations, mean + nodes * variance.sqrt())
    hessian = weights @ hessians
    assert hessian.abs().max() > 1e-2
    in_variance = torch.func.grad(smoothed_q)(variance)
    torch.testing.assert_close(in_variance, hessian / 2, rtol=0, atol=1e-4)


def test_14_theorem_1_of_the_closed_form(float64):
    """The derivative in each variance, by autograd through phi, is half the Hessian."""
    qf = critic(smoothie_closed_form)
    observations = torch.randn(BATCH, OBS_DIM)
    actions = torch.randn(BATCH, ACTION_DIM)
    log_var = torch.linspace(-2.0, 0.0, ACTION_DIM)
    in_phi = torch.func.jacrev(lambda phi: qf.smoothed(observations, actions, phi)[0])(log_var)
    _, _, hessian = qf.smoothed(observations, actions, log_var)
    torch.testing.assert_close(in_phi, 0.5 * hessian * log_var.exp(), rtol=0, atol=1e-12)


def test_15_sigma_stays_within_its_bounds_and_comes_back(float64, monkeypatch, smoothie):
    """Where Q~ is convex phi grows to 0 and no further, and then falls as if never held."""
    args = smoothie.Args(log_var_lr=0.1, log_var_min=-1.0, critics=1)
    agent = smoothie.Smoothie(OBS_DIM, ACTION_DIM, args)
    observations = torch.randn(BATCH, OBS_DIM)
    phi = agent.actor.log_var
    closed_form = smoothie is smoothie_closed_form

    def learn(curvature):
        hessian = torch.full((BATCH, ACTION_DIM), curvature)
        found = (torch.zeros_like(hessian), hessian)
        if closed_form:
            found = (torch.zeros(BATCH), *found)
        name = "smoothed" if closed_form else "action_derivatives"
        monkeypatch.setattr(agent.qfs[0], name, lambda *_: found)
        agent.update_policy(observations)

    for _ in range(100):
        learn(5.0)
    assert (phi == 0).all()
    learn(-5.0)
    torch.testing.assert_close(phi.detach(), torch.full_like(phi, -0.25), rtol=0, atol=1e-3)
    for _ in range(100):
        learn(-5.0)
    assert (phi == -1.0).all()


def test_16_the_critic_learns_at_the_replayed_actions_on_averaged_targets(float64):
    """The regression is on the replayed action; the target averages Q' over the target policy."""
    n = 50_000
    args = smoothie_closed_form.Args(log_var_init=-1.0, gamma=0.9, q_lr=0.0, critics=1)
    agent = smoothie_closed_form.Smoothie(OBS_DIM, 3, args)
    for qf in (agent.qfs[0], agent.target_qfs[0]):
        torch.nn.init.normal_(qf.fc_q.weight)
        torch.nn.init.normal_(qf.fc2.weight, std=0.2)
    with torch.no_grad():  # make the target policy differ
        agent.target_actor.log_var -= 0.7
        agent.target_actor.fc_mean.bias += 0.3
    observations, next_obs = torch.randn(2, 2, OBS_DIM)
    actions = torch.randn(2, 3)
    rewards = torch.tensor([1.0, -2.0])
    terminated = torch.tensor([0.0, 1.0])
    with torch.no_grad():
        means, log_var = agent.target_actor(next_obs)
        noise = (0.5 * log_var).exp() * torch.randn(n, 1, 3)
        sampled = torch.cat([means + noise, means - noise]).flatten(0, 1)
        next_q = agent.target_qfs[0](next_obs.repeat(2 * n, 1), sampled).view(-1, 2)
        targets = rewards + 0.9 * (1 - terminated) * next_q.mean(0)
        expected = (agent.qfs[0](observations, actions) - targets).square().mean()
    metrics = agent.update_critics(observations, actions, rewards, next_obs, terminated)
    assert next_q.std() > 0.1
    assert metrics["losses/qf1_loss"].item() == pytest.approx(expected.item(), rel=0.01)


def test_18_in_a_uniform_buffer_the_papers_phantom_actions_give_the_convolution():
    """Fitting on phantom actions gives (9), known for sin(2a), and not sin(2a) itself."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    variance, updates = 0.25, 800
    args = smoothie_continuous.Args(log_var_init=math.log(variance), critics=1)
    agent = smoothie_continuous.Smoothie(2, 1, args)
    torch.nn.init.normal_(agent.qfs[0].fc2.weight[:, -1:])  # features that span the range
    torch.nn.init.normal_(agent.qfs[0].fc2.bias, std=2.0)
    buffer = smoothie_continuous.ReplayBuffer(20_000, 2, 1, rng, "cpu")
    for action in rng.uniform(-3.0, 3.0, 20_000):
        buffer.add(np.zeros(2), action, math.sin(2 * action), np.zeros(2), True, action, math.inf)
    for update in range(updates):
        agent.q_optimizer.lr.fill_(1e-3 * (1 - update / updates))
        agent.update_critics(*buffer.sample(128))

    a = torch.linspace(-1.2, 1.2, 81).unsqueeze(1)
    reward = torch.sin(2 * a).squeeze(1)
    learned = agent.qfs[0](torch.zeros(81, 2), a).detach()
    smoothed = math.exp(-2 * variance) * reward
    assert (learned - smoothed).square().mean().sqrt() < 0.06
    assert (learned - reward).square().mean().sqrt() > 0.2  # what DDPG's critic would learn


def test_20_kl_against_torch_distributions(float64):
    """With one covariance for all states, and with one for each."""
    mean, old_mean = torch.randn(2, BATCH, ACTION_DIM)
    for shape in [(ACTION_DIM,), (BATCH, ACTION_DIM)]:
        log_var, old_log_var = torch.randn(2, *shape)
        new = torch.distributions.Normal(mean, (0.5 * log_var).exp())
        old = torch.distributions.Normal(old_mean, (0.5 * old_log_var).exp())
        expected = torch.distributions.kl_divergence(new, old).sum(1).mean()
        found = smoothie_continuous.kl_divergence(mean, log_var, old_mean, old_log_var)
        torch.testing.assert_close(found, expected)
        assert smoothie_continuous.kl_divergence(mean, log_var, mean, log_var).abs() < 1e-12


# What the rest of the algorithm says it is.


def test_targets_follow_at_rate_tau(float64, script):
    """After the networks have learned, and all of them."""
    agent = agent_class(script)(OBS_DIM, ACTION_DIM, script.Args(tau=0.25))
    nets = [(agent.actor, agent.target_actor), (agent.qfs, agent.target_qfs)]
    before = [[p.clone() for p in target.parameters()] for _, target in nets]
    batch = next(draws(script, torch.float64))
    agent.update_critics(*batch)
    agent.update_policy(*batch)
    for (net, target), old_values in zip(nets, before, strict=True):
        for p, lagged, old in zip(net.parameters(), target.parameters(), old_values, strict=True):
            assert (p != old).any()
            torch.testing.assert_close(lagged, old + 0.25 * (p - old))


def test_without_rewards_the_value_scale_stays_above_zero(smoothie):
    """The learning rate of phi is divided by it."""
    agent = smoothie.Smoothie(OBS_DIM, ACTION_DIM, smoothie.Args(gamma=0.0, tau=1.0))
    batch = next(draws(smoothie, torch.float32))
    batch[2].zero_()
    for _ in range(3):
        agent.update_critics(*batch)
        agent.update_policy(*batch)
    assert 0 < agent.value_scale.item() < 1e-3
    assert all(p.isfinite().all() for p in agent.parameters())


def test_networks_are_what_they_say(float64, script):
    """Shapes, activations and initial targets, written out."""
    agent = agent_class(script)(OBS_DIM, ACTION_DIM, script.Args())
    for net, target in [(agent.actor, agent.target_actor), (agent.qfs, agent.target_qfs)]:
        for p, lagged in zip(net.parameters(), target.parameters(), strict=True):
            assert torch.equal(p, lagged) and p.requires_grad and not lagged.requires_grad
    assert not torch.equal(agent.qfs[0].fc1.weight, agent.qfs[1].fc1.weight)

    for net in (agent.actor, agent.qfs[0]):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)  # so that a wrong activation shows
    s, a = torch.randn(BATCH, OBS_DIM), torch.randn(BATCH, ACTION_DIM)
    weights = {n.removesuffix(".weight"): p for n, p in agent.actor.named_parameters()}
    h = (s @ weights["fc1"].T + weights["fc1.bias"]).clamp(min=0)
    h = (h @ weights["fc2"].T + weights["fc2.bias"]).clamp(min=0)
    expected = (h @ weights["fc_mean"].T + weights["fc_mean.bias"]).tanh()
    found = agent.actor(s)
    if script is not ddpg_continuous:
        found, log_var = found
        assert torch.equal(log_var, agent.actor.log_var)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    weights = {n.removesuffix(".weight"): p for n, p in agent.qfs[0].named_parameters()}
    h = (s @ weights["fc1"].T + weights["fc1.bias"]).clamp(min=0)
    z = torch.cat([h, a], 1) @ weights["fc2"].T + weights["fc2.bias"]
    units = z * torch.distributions.Normal(0, 1).cdf(z)
    expected = (units @ weights["fc_q"].T + weights["fc_q.bias"])[:, 0]
    torch.testing.assert_close(agent.qfs[0](s, a), expected, rtol=0, atol=1e-12)


def test_a_changed_critic_needs_changed_derivatives(script, monkeypatch):
    """One more layer would make the derivatives wrong, silently. The check draws no random number
    that the run sees."""

    class Deeper(script.QNetwork):
        def __init__(self, obs_dim, action_dim):
            super().__init__(obs_dim, action_dim)
            self.fc3 = torch.nn.Linear(256, 256)

        def forward(self, observations, actions):
            x = torch.relu(self.fc3(torch.relu(self.hidden(observations, actions))))
            return self.fc_q(x).squeeze(1)

    state = torch.get_rng_state()
    script.check_derivatives(script.QNetwork(OBS_DIM, ACTION_DIM), OBS_DIM, ACTION_DIM)
    torch.set_rng_state(state)
    qf = script.QNetwork(OBS_DIM, ACTION_DIM)
    after = torch.get_rng_state()
    script.check_derivatives(qf, OBS_DIM, ACTION_DIM)
    assert torch.equal(torch.get_rng_state(), after)
    deeper = Deeper(OBS_DIM, ACTION_DIM)
    with pytest.raises(AssertionError, match="Change both together") as failure:
        script.check_derivatives(deeper, OBS_DIM, ACTION_DIM)

    # The message names lines that work for any critic. There are none for the closed form.
    lines = re.findall(r"(?m)^ {8}(.*)", str(failure.value))
    assert bool(lines) == (script is not smoothie_closed_form)
    if lines:
        body = "".join(f"\n    {line}" for line in lines)
        names = {"torch": torch}
        exec(f"def serve(self, observations, actions):{body}", names)
        method = "action_gradient" if script is ddpg_continuous else "action_derivatives"
        monkeypatch.setattr(Deeper, method, names["serve"])
        script.check_derivatives(deeper.double(), OBS_DIM, ACTION_DIM)
        s, a = torch.randn(5, OBS_DIM).double(), torch.randn(5, ACTION_DIM).double()
        exact = exact_derivatives(lambda s, a: deeper(s[None], a[None])[0], s, a)
        found = names["serve"](deeper, s, a)
        found = (found,) if script is ddpg_continuous else found
        torch.testing.assert_close(found, exact[: len(found)])


def test_a_wrong_gaussian_average_is_noticed(monkeypatch):
    """Values and derivatives that agree with each other, but belong to another covariance."""
    right = smoothie_closed_form.QNetwork.smoothed

    def wrong(qf, observations, actions, log_var):
        return right(qf, observations, actions, 2 * log_var)

    qf = smoothie_closed_form.QNetwork(OBS_DIM, ACTION_DIM)
    smoothie_closed_form.check_derivatives(qf, OBS_DIM, ACTION_DIM)
    monkeypatch.setattr(smoothie_closed_form.QNetwork, "smoothed", wrong)
    with pytest.raises(AssertionError, match="Change both together"):
        smoothie_closed_form.check_derivatives(qf, OBS_DIM, ACTION_DIM)
