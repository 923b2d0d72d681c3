"""Smoothie against DDPG on a bandit with two bumps of reward (Nachum et al., ICML 2018).

The task of Sections 3 and 6.1, Figures 1 and 2. There is one state, and one action ends the
episode. The policy N(mu, Sigma), Sigma = sigma^2 = exp(phi), starts on top of the worse bump. The
gradient of the reward leads back there. That of the smoothed reward leads to the better bump:

    Q~(a) = E[Q(a~)],  a~ ~ N(a, Sigma)                                                     (9)
    mu  ascends  dQ~/da at mu                                                              (13)
    phi ascends  1/2 d2Q~/da2 at mu, times Sigma                                     (14), (15)

Here Q is the reward itself, so Q~ and the path of mu and phi are known exactly (smoothed_reward,
gradient_flow). The picture compares this path with three methods that learn from replayed a~:

    smoothie     fits Q~ at phantom actions a, such that a~ given a is N(a, Sigma)         (12)
    closed form  fits Q at a~, then smooths the critic exactly, as smoothie_closed_form.py does
    ddpg         fits Q at a~, and leaves sigma as it is

The phantom actions are exact, as the buffer keeps the m and the S that each a~ was drawn with:

    a~ ~ N(m, S) is the same as a ~ N(m, S - Sigma), then a~ ~ N(a, Sigma): cov(a, a~) = S - Sigma
    so, with k = Sigma / S and thus cov(a, a~) / S = 1 - k, the posterior of a given a~ is normal,
    mean m + (1 - k) (a~ - m)  and  variance (S - Sigma) - (1 - k) (S - Sigma) = (1 - k) Sigma

If S = Sigma, a is always m, which shows no slope: so Smoothie acts with a larger sigma than the
policy's. If S is infinite, a ~ N(a~, Sigma), the phantom action of the paper. If S is finite, that
one needs the weights 1 / q(a~) of (18). The script prints how it does without them, with them, and
without them when the buffer starts with uniform actions.
"""
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "tyro==1.0.17", "matplotlib==3.11.2"]
# ///

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import nn

MODES = (-1.0, 1.0)
HEIGHTS = (0.55, 1.0)
WIDTH = 0.3
STD_INIT = 1.0
MAX_STD = 10.0  # upper bound on sigma: a policy that ends here has diverged and counts as failed
ROW = "| {:<35} | {:>13} | {:>10} | {:>9} |"  # of the printed table


@dataclass
class Args:
    output: str = "smoothie_toy_bandit.png"  # the picture to write: Figure 2 of the paper
    seeds: int = 20  # independent runs of each method, side by side
    seed: int = 1  # seed of everything random
    total_timesteps: int = 3_000  # actions taken, with one update each
    learning_starts: int = 700  # first steps, in which only the critic learns
    batch_size: int = 128  # actions in each batch
    policy_lr: float = 1.5e-2  # learning rate of mu, by gradient ascent
    log_var_lr: float = 2.25e-2  # learning rate of phi, by gradient ascent
    q_lr: float = 3e-3  # learning rate of the critic, by Adam
    exploration: float = 1.5  # std of Smoothie's actions, as a multiple of the policy's; others: 1
    max_weight: float = 50.0  # cap on the weights 1 / q(a~) of (18)


def reward(a):
    """Figure 1: two bumps of one width, elementwise."""
    bumps = zip(MODES, HEIGHTS, strict=True)
    return sum(height * torch.exp(-((a - mode) ** 2) / (2 * WIDTH**2)) for mode, height in bumps)


def smoothed_reward(a, var):
    """Return Q~ of (9) at `a`, its gradient and its second derivative, elementwise."""
    v = WIDTH**2 + var
    value = 0.0
    gradient = 0.0
    hessian = 0.0
    for mode, height in zip(MODES, HEIGHTS, strict=True):
        d = a - mode
        bump = height * WIDTH / v**0.5 * torch.exp(-(d**2) / (2 * v))
        value = value + bump
        gradient = gradient - d / v * bump
        hessian = hessian + (d**2 / v - 1) / v * bump
    return value, gradient, hessian


def gradient_flow(args):
    """Return mu and sigma after each step along the exact derivatives, (steps, 2)."""
    mean = torch.tensor(MODES[0])
    log_var = torch.tensor(2 * math.log(STD_INIT))
    path = torch.empty(args.total_timesteps, 2)
    for step in range(args.total_timesteps):
        if step >= args.learning_starts:
            var = log_var.exp()
            _, gradient, hessian = smoothed_reward(mean, var)
            mean = mean + args.policy_lr * gradient  # (13)
            log_var = log_var + args.log_var_lr * 0.5 * hessian * var  # (15)
        path[step, 0] = mean
        path[step, 1] = (0.5 * log_var).exp()
    return path


class QNetwork(nn.Module):
    """A critic of one layer of GELU units for each seed: (seeds, batch) to (seeds, batch)."""

    def __init__(self, seeds, units=32):
        super().__init__()
        self.w_a = nn.Parameter(2 * torch.randn(seeds, 1, units))  # steep enough for the bumps
        self.b = nn.Parameter(2 * torch.randn(seeds, 1, units))
        self.w = nn.Parameter(torch.zeros(seeds, 1, units))
        self.c = nn.Parameter(torch.zeros(seeds, 1))

    def forward(self, actions):
        z = actions.unsqueeze(2) * self.w_a + self.b
        return (nn.functional.gelu(z) * self.w).sum(2) + self.c

    def action_derivatives(self, actions, var):
        """Return the first two derivatives in a of E[Q(a~)], a~ ~ N(a, var), each (seeds, batch).

        Each unit sees a Gaussian of variance s2. At var = 0 these are the derivatives of forward.
        """
        z = actions.unsqueeze(2) * self.w_a + self.b
        s2 = var.unsqueeze(2) * self.w_a.square()
        r = (1 + s2).sqrt()
        x = z / r
        cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        pdf = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
        first = cdf + x * pdf / (1 + s2)
        second = pdf / r * (1 + (1 - x.square()) / (1 + s2))
        return (self.w * first * self.w_a).sum(2), (self.w * second * self.w_a.square()).sum(2)


def phantom_actions(actions, means, variances, var):
    """Draw a given each a~ ~ N(m, S), such that a~ given a is N(a, var)."""
    k = (var / variances).clamp(max=1.0)  # the policy may have widened since
    noise = ((1 - k) * var).sqrt() * torch.randn_like(actions)
    return means + (1 - k) * (actions - means) + noise


def importance_weights(actions, means, variances, max_weight):
    """Return the weights 1 / q(a~) of (18), where q is the density that each a~ was drawn from."""
    squares = (actions - means).square() / variances
    q = torch.exp(-0.5 * squares) / (2 * math.pi * variances).sqrt()
    return (1 / q).clamp(max=max_weight)


def train(args, method, uniform=0):
    """Return mu and sigma after each step, (steps, seeds, 2).

    The buffer starts with `uniform` actions, uniform in [-3, 3].
    """
    torch.manual_seed(args.seed)
    qf = QNetwork(args.seeds)
    optimizer = torch.optim.Adam(qf.parameters(), lr=args.q_lr, fused=True)
    mean = torch.full((args.seeds, 1), MODES[0])
    log_var = torch.full((args.seeds, 1), 2 * math.log(STD_INIT))
    path = torch.empty(args.total_timesteps, args.seeds, 2)
    exploration = args.exploration if method == "smoothie" else 1.0

    # The buffer holds each a~ with its m and S; a uniform action counts as S = infinity.
    buffer = torch.empty(3, args.seeds, uniform + args.total_timesteps)
    buffer[0, :, :uniform].uniform_(-3.0, 3.0)
    buffer[1, :, :uniform] = 0.0
    buffer[2, :, :uniform] = math.inf
    every_seed = torch.arange(args.seeds).unsqueeze(1)

    for step in range(args.total_timesteps):
        var = log_var.exp()

        # Act, and store the action.
        behaviour_var = exploration**2 * var
        action = mean + behaviour_var.sqrt() * torch.randn(args.seeds, 1)
        count = uniform + step + 1
        buffer[:, :, count - 1] = torch.cat([action, mean, behaviour_var], 1).T

        # Learn: the critic, whose target is the reward, as no state follows.
        index = torch.randint(count, (args.seeds, args.batch_size))
        actions, means, variances = buffer[:, every_seed, index]
        targets = reward(actions)
        weights = torch.ones_like(actions)
        if method == "smoothie":
            actions = phantom_actions(actions, means, variances, var)
        elif method.startswith("paper"):
            if method == "paper, weights 1/q":
                weights = importance_weights(actions, means, variances, args.max_weight)
            actions = actions + var.sqrt() * torch.randn_like(actions)
        errors = (qf(actions) - targets).square()
        loss = (weights * errors).sum(1) / weights.sum(1)  # (18), its weights normalised
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()

        # Learn: the policy.
        if step >= args.learning_starts:
            with torch.no_grad():
                smoothing = var if method == "closed form" else torch.zeros_like(var)
                gradient, hessian = qf.action_derivatives(mean, smoothing)
            mean = mean + args.policy_lr * gradient  # (13)
            if method != "ddpg":
                log_var = log_var + args.log_var_lr * 0.5 * hessian * var  # (15)
                log_var = log_var.clamp(max=2 * math.log(MAX_STD))
        path[step] = torch.cat([mean, (0.5 * log_var).exp()], 1)
    return path


def escaped(path):
    """Return which seeds end within one width of the better bump's top, sigma below its bound."""
    mean, std = path[-1].unbind(1)
    return ((mean - MODES[1]).abs() < WIDTH) & (std < MAX_STD)


def print_row(method, path):
    """Print how many seeds escape from the worse bump, and where the median seed ends."""
    seeds = f"{escaped(path).sum()}/{path.shape[1]}"
    mean, std = path[-1].median(0).values
    print(ROW.format(method, seeds, f"{mean:.2f}", f"{std:.2f}"), flush=True)


def plot(paths, flow, output):
    """Draw Figure 2: the policies over training, the median seed bold, and what they climb."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplot_mosaic([["mean", "reward"], ["std", "reward"]])
    styles = {  # the colours of Okabe and Ito
        "smoothie": ("#0072B2", "Smoothie"),
        "closed form": ("#009E73", "Smoothie, closed form"),
        "ddpg": ("#D55E00", "DDPG"),
    }
    for i, key in enumerate(["mean", "std"]):
        for name, (color, label) in styles.items():
            values = paths[name][:, :, i]
            axes[key].plot(values, color=color, alpha=0.25, linewidth=0.6)
            axes[key].plot(values.median(1).values, color=color, linewidth=2.4, label=label)
        axes[key].plot(flow[:, i], "k--", linewidth=1.4, label="exact gradient flow")
        axes[key].set_xlim(0, len(flow))
    axes["mean"].set(ylabel=r"policy mean $\mu$", xticklabels=[], ylim=(-1.3, 1.3))
    axes["std"].set(ylabel=r"policy std $\sigma$", xlabel="step", ylim=(0, None))
    handles, labels = axes["std"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)

    a = torch.linspace(-3.0, 3.0, 500)
    smoothed, _, _ = smoothed_reward(a, STD_INIT**2)
    axes["reward"].plot(a, reward(a), color="black", linewidth=2)
    axes["reward"].plot(a, smoothed, color="#CC79A7", linewidth=2.4)
    axes["reward"].axvline(MODES[0], color="0.5", linewidth=1, linestyle=":")
    axes["reward"].text(MODES[0] + 0.08, 0.62, "start", color="0.3")
    axes["reward"].text(1.35, 0.8, "reward")
    axes["reward"].text(1.8, 0.25, f"smoothed,\n$\\sigma = {STD_INIT:g}$", color="#A0527F")
    axes["reward"].set(xlabel="action", ylabel="reward", xlim=(-3.0, 3.0), ylim=(0, None))
    figure.savefig(output, dpi=150)


def main(args):
    if args.learning_starts >= args.total_timesteps:
        sys.exit("--learning-starts must be less than --total-timesteps")
    if args.exploration < 1:
        sys.exit("--exploration must be at least 1: phantom actions need S >= Sigma")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the tensors are small

    print(ROW.format("method", "seeds escaped", "final mean", "final std"))
    print(ROW.format("---", "---:", "---:", "---:"))
    paths = {}
    for method in ("smoothie", "closed form", "ddpg", "paper", "paper, weights 1/q"):
        paths[method] = train(args, method)
        print_row(method, paths[method])
    for uniform in (1_000, 5_000, 20_000):
        print_row(f"paper, {uniform:,} uniform actions first", train(args, "paper", uniform))
    plot(paths, gradient_flow(args), args.output)
    print(f"the picture is in {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
