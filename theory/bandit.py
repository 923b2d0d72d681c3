"""Every estimator of Sections 3 to 5 on the task of Section 6.1: one action, two bumps of reward.

The policy is N(mu, sigma^2) with phi = log sigma^2. It starts on the worse bump. Q is the reward
itself and Q~ its average over the policy (9), both known exactly. All methods take the same steps;
they differ in their estimates of g and H and in what they fit a critic to:

    mu  <- mu  + policy_lr * g                     g estimates dQ~/da    at a = mu           (13)
    phi <- phi + log_var_lr * 1/2 H sigma^2        H estimates d2Q~/da2  at a = mu     (14), (15)

Section 3 prints the score of the policy with a wrong sign and a wrong power. The derivatives of
log N(a | mu, sigma^2) are

    d log pi / d mu = (a - mu) / sigma^2    d log pi / d sigma = (a - mu)^2 / sigma^3 - 1 / sigma

so d log pi / d phi = ((a - mu)^2 / sigma^2 - 1) / 2. All critics are the same network. Its units
are GELU, which have a Hessian and whose average over the policy has a closed form
(Critic.derivatives). The task has one step, so the targets of (8), (16) and (18) are the reward.
All seeds train side by side: the first dimension of the networks and batches is the seed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

MODES = (-1.0, 1.0)
HEIGHTS = (0.55, 1.0)
WIDTH = 0.3
STD_INIT = 1.0
MAX_STD = 10.0  # a policy wider than this has diverged: it stops learning and counts as failed


@dataclass
class Args:
    output: str = "bandit.png"  # the picture to write
    seeds: int = 20  # independent runs of each method
    seed: int = 1  # seed of everything random
    total_timesteps: int = 4_500  # actions taken, with one update each
    learning_starts: int = 1_000  # first steps, in which the policy stands still
    prefill: int = 1_000  # actions of the initial policy in the buffer before the first step
    batch_size: int = 256  # actions in each batch
    policy_lr: float = 1e-2  # learning rate of mu, by gradient ascent
    log_var_lr: float = 1.5e-2  # learning rate of phi, by gradient ascent
    q_lr: float = 3e-3  # learning rate of the critic, by Adam
    max_weight: float = 50.0  # cap on the weights 1/q of (18)
    samples: int = 8  # samples in each average of (17)
    behaviour_scale: float = 1.5  # c: std of the wider behaviour, over the policy's


def reward(a):
    """The two bumps, elementwise."""
    return sum(
        height * torch.exp(-((a - mode) ** 2) / (2 * WIDTH**2))
        for mode, height in zip(MODES, HEIGHTS, strict=True)
    )


def smoothed_reward(a, std):
    """Return Q~ (9), dQ~/da and d2Q~/da2 at a, elementwise.

    A bump smoothed by a Gaussian is a wider and lower bump.
    """
    var = WIDTH**2 + std**2
    value = gradient = hessian = 0.0
    for mode, height in zip(MODES, HEIGHTS, strict=True):
        d = a - mode
        bump = height * WIDTH / var**0.5 * torch.exp(-(d**2) / (2 * var))
        value = value + bump
        gradient = gradient - d / var * bump
        hessian = hessian + (d**2 / var - 1) / var * bump
    return value, gradient, hessian


class Critic(torch.nn.Module):
    """One network q(a) = w.gelu(W a + b) + c for each seed: (seeds, batch) to (seeds, batch)."""

    def __init__(self, seeds, generator, units=24):
        super().__init__()
        self.w_a = torch.nn.Parameter(2 * torch.randn(seeds, 1, units, generator=generator))
        self.b = torch.nn.Parameter(2 * torch.randn(seeds, 1, units, generator=generator))
        self.w = torch.nn.Parameter(torch.zeros(seeds, 1, units))
        self.c = torch.nn.Parameter(torch.zeros(seeds, 1))

    def forward(self, a):
        z = torch.addcmul(self.b, a.unsqueeze(2), self.w_a)
        hidden = torch.nn.functional.gelu(z)
        return torch.baddbmm(self.c.unsqueeze(2), hidden, self.w.mT).squeeze(2)

    @torch.no_grad()
    def derivatives(self, a, std=0.0):
        """Return the first two derivatives at a, (seeds,) each, of q averaged over N(a, std^2).

        With s = |W| std, r^2 = 1 + s^2 and x = (W a + b) / r, E[gelu] = r x cdf(x) + s^2/r pdf(x).
        std = 0 gives the derivatives of q itself.
        """
        std = torch.as_tensor(std).view(-1, 1, 1)
        r = (1 + (self.w_a * std) ** 2).sqrt()
        x = (a.view(-1, 1, 1) * self.w_a + self.b) / r
        pdf = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        first = torch.special.ndtr(x) + x * pdf / r**2
        second = pdf / r * (1 + (1 - x * x) / r**2)
        gradient = (self.w * first * self.w_a).sum((1, 2))
        hessian = (self.w * second * self.w_a**2).sum((1, 2))
        return gradient, hessian


# Estimates of g and H. step holds the policy's mean and std, and of the action just taken its
# reward and noise = (a - mean) / std, (seeds,) each.


def score(qf, step):
    """Section 3, the naive policy gradient: d log pi times the reward."""
    gradient = step.noise / step.std * step.reward
    hessian = (step.noise**2 - 1) / step.std**2 * step.reward
    return gradient, hessian


def dpg(qf, step):
    """Deterministic policy gradient (6): dQ/da at the mean; sigma stays."""
    gradient, _ = qf.derivatives(step.mean)
    return gradient, torch.zeros_like(gradient)


def svg(qf, step):
    """SVG(0): dQ/da at a sampled action; sigma stays."""
    gradient, _ = qf.derivatives(step.mean + step.std * step.noise)
    return gradient, torch.zeros_like(gradient)


def svg_std(qf, step):
    """SVG(0) that learns sigma by the same reparameterisation (Section 5).

    E[Q''] = E[Q' noise] / sigma.
    """
    gradient, _ = svg(qf, step)
    return gradient, gradient * step.noise / step.std


def derivatives(qf, step):
    """The critic's derivatives at the mean.

    Of Q~: Smoothie. Of Q: expected policy gradients, with Q's Taylor expansion.
    """
    return qf.derivatives(step.mean)


def closed_form(qf, step):
    """The derivatives of Q~ from a critic of Q, by the closed form."""
    return qf.derivatives(step.mean, step.std)


# The critics' squared errors (seeds, batch). batch holds actions a and their rewards, the mean,
# std and noise = (a - mean) / std that each was drawn with, the policy_std of now (seeds, 1), and
# fresh_noise (seeds, batch, samples).


def fit_q(nets, batch):
    """Q at the actions taken (8)."""
    return (nets[0](batch.a) - batch.reward) ** 2


def fit_phantom(nets, batch):
    """Q~ at phantom actions, the buffer taken as uniform: (18) without weights."""
    phantom = batch.a + batch.policy_std * batch.fresh_noise[:, :, 0]
    return (nets[0](phantom) - batch.reward) ** 2


def fit_weighted(nets, batch):
    """Q~ at phantom actions, weighted by 1/q (18).

    q is the density that the action was drawn from (end of Section 4.2).
    """
    density = torch.exp(-0.5 * batch.noise**2) / (batch.std * math.sqrt(2 * math.pi))
    weights = (1 / density).clamp(max=batch.max_weight)
    return weights / weights.mean(1, keepdim=True) * fit_phantom(nets, batch)


def fit_exact_phantom(nets, batch):
    """Q~ at exact phantom actions: a given a~ ~ N(mean, std^2), see README."""
    k = (batch.policy_std / batch.std).square().clamp(max=1)
    center = batch.mean + (1 - k) * (batch.a - batch.mean)
    spread = (1 - k).sqrt() * batch.policy_std
    phantom = center + spread * batch.fresh_noise[:, :, 0]
    return (nets[0](phantom) - batch.reward) ** 2


def fit_at_mean(nets, batch):
    """Q~ as Section 3 prints it: at the mean that the action was drawn around."""
    return (nets[0](batch.mean) - batch.reward) ** 2


def fit_first_route(nets, batch):
    """The first route: Q by (16), and Q~ fitted to averages of Q over several actions (17)."""
    smoothed, q = nets
    samples = batch.fresh_noise.shape[2]
    count = batch.a.shape[1] // samples  # fewer points, so that (17) evaluates Q as often as (16)
    a = batch.a[:, :count]
    around = a.unsqueeze(2) + batch.policy_std.unsqueeze(2) * batch.fresh_noise[:, :count]
    targets = q(around.flatten(1)).detach().view(around.shape).mean(2)
    q_errors = fit_q((q,), batch)
    smoothed_errors = (smoothed(a) - targets) ** 2 * (batch.a.shape[1] / count)
    return torch.cat([q_errors, smoothed_errors], 1)


@dataclass
class Method:
    estimate: Callable  # of g and H
    fit: Callable | None = None  # the critic's loss
    networks: int = 1
    wider: bool = False  # whether the behaviour has c times the policy's std


METHODS = {
    "policy gradient": Method(score, networks=0),
    "DPG": Method(dpg, fit_q),
    "SVG(0)": Method(svg, fit_q),
    "SVG(0), learning σ": Method(svg_std, fit_q),
    "expected policy gradients, quadratic": Method(derivatives, fit_q),
    "Smoothie, phantom actions": Method(derivatives, fit_phantom),
    "Smoothie, phantom actions, weights": Method(derivatives, fit_weighted),
    "Smoothie, phantom actions, wider behaviour": Method(derivatives, fit_phantom, wider=True),
    "Smoothie, exact phantom actions": Method(derivatives, fit_exact_phantom, wider=True),
    "Smoothie, at the mean": Method(derivatives, fit_at_mean),
    "Smoothie, first route": Method(derivatives, fit_first_route, networks=2),
    "Smoothie, closed form": Method(closed_form, fit_q),
}


def ascend(args, mean, log_var, gradient, hessian):
    """Return mu and phi after one step of (13) and (15)."""
    alive = log_var < 2 * math.log(MAX_STD)
    new_mean = mean + args.policy_lr * gradient * alive
    new_log_var = log_var + args.log_var_lr * 0.5 * hessian * log_var.exp() * alive
    return new_mean, new_log_var


def gradient_flow(args):
    """Return the path (steps, 2) of mu and sigma if g and H are exact."""
    mean = torch.tensor(MODES[0])
    log_var = torch.tensor(2 * math.log(STD_INIT))
    path = []
    for step in range(args.total_timesteps):
        if step >= args.learning_starts:
            _, gradient, hessian = smoothed_reward(mean, (0.5 * log_var).exp())
            mean, log_var = ascend(args, mean, log_var, gradient, hessian)
        path.append((mean.item(), (0.5 * log_var).exp().item()))
    return np.array(path)


def train(args, method):
    """Return the path (steps, seeds, 2) of mu and sigma."""
    generator = torch.Generator().manual_seed(args.seed)
    nets = [Critic(args.seeds, generator) for _ in range(method.networks)]
    qf = nets[0] if nets else None
    if nets:
        parameters = [p for net in nets for p in net.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=args.q_lr, fused=True)
    mean = torch.full((args.seeds,), MODES[0])
    log_var = torch.full((args.seeds,), 2 * math.log(STD_INIT))
    scale = args.behaviour_scale if method.wider else 1.0
    buffer = torch.empty(3, args.seeds, args.prefill + args.total_timesteps)  # mean, std, noise
    path = torch.empty(args.total_timesteps, args.seeds, 2)

    def act(start, stop):
        noise = torch.randn(args.seeds, stop - start, generator=generator)
        buffer[0, :, start:stop] = mean.unsqueeze(1)
        buffer[1, :, start:stop] = scale * (0.5 * log_var).exp().unsqueeze(1)
        buffer[2, :, start:stop] = noise

    act(0, args.prefill)
    for step in range(args.total_timesteps):
        # Act.
        count = args.prefill + step + 1
        act(count - 1, count)

        # Update the policy.
        std = (0.5 * log_var).exp()
        if step >= args.learning_starts:
            noise = buffer[2, :, count - 1]
            taken = SimpleNamespace(mean=mean, std=std, noise=noise)
            taken.reward = reward(mean + std * noise)
            gradient, hessian = method.estimate(qf, taken)
            mean, log_var = ascend(args, mean, log_var, gradient, hessian)

        # Update the critic.
        if method.fit:
            index = torch.randint(count, (1, args.seeds, args.batch_size), generator=generator)
            rows = buffer.gather(2, index.expand(3, -1, -1))
            batch = SimpleNamespace(mean=rows[0], std=rows[1], noise=rows[2])
            batch.a = batch.mean + batch.std * batch.noise
            batch.reward = reward(batch.a)
            samples = args.samples if method.networks > 1 else 1
            batch.fresh_noise = torch.randn(*batch.a.shape, samples, generator=generator)
            batch.policy_std = (0.5 * log_var).exp().unsqueeze(1)
            batch.max_weight = args.max_weight
            loss = method.fit(nets, batch).sum() / args.batch_size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        path[step, :, 0] = mean
        path[step, :, 1] = (0.5 * log_var).exp()
    return path.numpy()


def summarise(args, path, flow):
    """Return the row of one method.

    Seeds that end within one width of the better mode, final mu and sigma, regret, regret of the
    mean action, distance from the flow: medians over the seeds.
    """
    mean = torch.from_numpy(path[-1, :, 0])
    std = torch.from_numpy(path[-1, :, 1])
    success = ((mean - MODES[1]).abs() < WIDTH) & (std < MAX_STD)
    best = reward(torch.tensor(MODES[1]))
    regret = np.median(best - smoothed_reward(mean, std)[0])
    mean_regret = np.median(best - reward(mean))
    distance = np.linalg.norm(path - flow[:, None], axis=2)[args.learning_starts :].mean(0)
    return (
        f"{int(success.sum())}/{len(mean)}",
        f"{mean.median():.2f}, {std.median():.2f}",
        regret,
        mean_regret,
        np.median(distance),
    )


def plot(paths, flow, rows, output):
    """Draw every seed's path in the plane of mu and sigma, one panel a method."""
    figure = Figure(figsize=(12, 7.4), layout="constrained")
    axes = figure.subplots(3, 4, sharex=True, sharey=True).flat
    for axis, (name, path) in zip(axes, paths.items(), strict=True):
        axis.plot(*path[::15].transpose(2, 0, 1), color="#0072B2", alpha=0.45, linewidth=0.6)
        axis.plot(path[-1, :, 0], path[-1, :, 1], "o", color="#D55E00", markersize=3)
        axis.plot(*flow[::15].T, "k--", linewidth=1.2)
        title = name.replace(", ", ":\n", 1)
        axis.set_title(f"{title}\n{rows[name][0]}", fontsize=9)
        axis.set(xlim=(-2, 2), ylim=(0, 1.8))
    figure.supxlabel("policy mean μ: the worse bump is at -1, the better one at 1", fontsize=10)
    figure.supylabel("policy std σ", fontsize=10)
    figure.savefig(output, dpi=75)


def main(args):
    torch.set_num_threads(1)
    flow = gradient_flow(args)
    paths = {}
    rows = {}
    print(
        "| method | seeds at the better bump | final μ, σ | regret | regret of the mean action "
        "| distance from the flow |"
    )
    print("|---|---|---|---|---|---|")
    for name, method in [*METHODS.items(), ("exact gradient flow", None)]:
        path = train(args, method) if method else flow[:, None].astype(np.float32)
        rows[name] = summarise(args, path, flow)
        success, final, *numbers = rows[name]
        cells = " | ".join(f"{x:.3f}" for x in numbers)
        print(f"| {name} | {success} | {final} | {cells} |", flush=True)
        if method:
            paths[name] = path
    plot(paths, flow, rows, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
