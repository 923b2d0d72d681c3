"""Smoothie against DDPG on a one-step task with two modes (Nachum et al., ICML 2018, Sections 3 and 6.1, Figures 1 and 2).

The reward is a mixture of two Gaussian bumps, and the policy N(mu, sigma^2) starts on top of the worse one. Nearby, the
gradient of the reward points back to that top; the gradient of the smoothed reward points to the better bump. The smoothed
value (9) has a closed form, with v = width^2 + sigma^2:

    Q~(a) = sum_k height_k * width / sqrt(v) * exp(-(a - mode_k)^2 / (2 v))

so the gradient flow of (10) and Theorem 1 is known exactly. Four methods are trained; the figure shows all but the second:

    smoothie                  phantom actions, each error weighted by 1 / q(a~) as in (18)
    smoothie without weights  the same with weights of 1
    closed form               a ReLU critic of the reward itself, smoothed exactly as in smoothie_closed_form.py
    ddpg                      a critic of the reward itself; sigma stays as it is

The replay buffer holds the policy's own actions a~ ~ N(mu, Sigma). Given a phantom action a ~ N(a~, Sigma), a~ is therefore
distributed as N((a + mu) / 2, Sigma / 2), a narrower smoothing than (9), and without weights Smoothie does not escape. With
them it does. Here q is the average of all policies that filled the buffer, kept on a grid; the weights are capped and divided
by their sum in the batch. The closed form needs no weights, as it learns the reward at the actions taken.

All seeds train side by side: the first dimension of a tensor is the seed unless noted otherwise.
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODES, HEIGHTS, WIDTH = (-1.0, 1.0), (0.55, 1.0), 0.3
STD_INIT = 1.0
MAX_STD = 10.0  # a covariance this wide has blown up; its seed stops learning and counts as failed


@dataclass
class Args:
    output: str = "smoothie_toy_bandit.png"  # the picture to write: Figure 2 of the paper
    seeds: int = 20  # independent runs of each method
    seed: int = 1  # seed of everything random
    total_timesteps: int = 4_500  # actions taken, one update each
    learning_starts: int = 1_000  # first steps, in which the critic learns and the policy does not change
    prefill: int = 1_000  # actions of the initial policy in the replay buffer before the first step
    batch_size: int = 256  # size of a batch
    policy_lr: float = 1e-2  # learning rate of mu, by plain gradient ascent as Algorithm 1 prints it
    log_var_lr: float = 1.5e-2  # learning rate of phi = log sigma^2, by plain gradient ascent
    q_lr: float = 3e-3  # learning rate of the critic, by Adam
    max_weight: float = 50.0  # cap on the weights 1 / q(a~) of (18)


def reward(a):
    """Two bumps of one width; the same for NumPy arrays and tensors, elementwise."""
    exp = torch.exp if isinstance(a, torch.Tensor) else np.exp
    return sum(height * exp(-((a - mode) ** 2) / (2 * WIDTH**2)) for mode, height in zip(MODES, HEIGHTS, strict=True))


def smoothed_reward(a, std):
    """Return Q~ of (9) at `a` with its gradient and its second derivative, in closed form; NumPy, elementwise."""
    v = WIDTH**2 + std**2
    bumps = [(a - m, h * WIDTH / np.sqrt(v) * np.exp(-((a - m) ** 2) / (2 * v))) for m, h in zip(MODES, HEIGHTS, strict=True)]
    return sum(q for _, q in bumps), sum(-d / v * q for d, q in bumps), sum((d**2 / v - 1) / v * q for d, q in bumps)


def gradient_flow(args):
    """Return the path (steps, 2) of mu and sigma if (13) and (15) are followed with the exact derivatives."""
    mean, log_var, path = MODES[0], 2 * math.log(STD_INIT), []
    for step in range(args.total_timesteps):
        if step >= args.learning_starts:
            _, gradient, hessian = smoothed_reward(mean, math.exp(0.5 * log_var))
            mean += args.policy_lr * gradient
            log_var += args.log_var_lr * 0.5 * hessian * math.exp(log_var)
        path.append((mean, math.exp(0.5 * log_var)))
    return np.array(path)


class QNetwork(torch.nn.Module):
    """One critic of 24 tanh units for each seed: (seeds, batch) to (seeds, batch)."""

    def __init__(self, seeds, generator, units=24):
        super().__init__()
        self.w_a = torch.nn.Parameter(torch.randn(seeds, 1, units, generator=generator))
        self.b = torch.nn.Parameter(torch.randn(seeds, 1, units, generator=generator))
        self.w = torch.nn.Parameter(torch.zeros(seeds, 1, units))
        self.c = torch.nn.Parameter(torch.zeros(seeds, 1))

    def forward(self, actions):
        h = torch.tanh(actions.unsqueeze(2) * self.w_a + self.b)
        return (h * self.w).sum(2) + self.c

    def action_derivatives(self, actions, log_var):
        """Return dQ/da and d2Q/da2 at one action for each seed, (seeds,), in closed form; log_var is not needed."""
        h = torch.tanh(actions.view(-1, 1, 1) * self.w_a + self.b)
        slope = (1 - h * h) * self.w
        return (slope * self.w_a).sum((1, 2)), (-2 * h * slope * self.w_a**2).sum((1, 2))


class ReLUNetwork(QNetwork):
    """One critic of ReLU units for each seed, whose Gaussian average has a closed form."""

    def forward(self, actions):
        h = torch.relu(actions.unsqueeze(2) * self.w_a + self.b)
        return (h * self.w).sum(2) + self.c

    def action_derivatives(self, actions, log_var):
        """Return dQ~/da and d2Q~/da2 of the smoothed value at one action for each seed, (seeds,)."""
        s = self.w_a.abs() * (0.5 * log_var).exp().view(-1, 1, 1)
        x = (actions.view(-1, 1, 1) * self.w_a + self.b) / s
        cdf, pdf = 0.5 * (1 + torch.erf(x / math.sqrt(2))), torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return (self.w * cdf * self.w_a).sum((1, 2)), (self.w * pdf / s * self.w_a**2).sum((1, 2))


def importance_weights(density, cells, count, max_weight):
    """Return 1 / q(a~) of (18), at most max_weight, for actions in these cells of the grid, (seeds, batch).

    density (seeds, grid) is the sum of the `count` densities that the buffer's actions were drawn from; q is their average.
    """
    return (count / density.gather(1, cells)).clamp(max=max_weight)


def train(args, method):
    """Return the path (steps, seeds, 2) of mu and sigma."""
    generator = torch.Generator().manual_seed(args.seed)
    qf = ReLUNetwork(args.seeds, generator, units=64) if method == "closed form" else QNetwork(args.seeds, generator)
    optimizer = torch.optim.Adam(qf.parameters(), lr=args.q_lr, fused=True)
    mean = torch.full((args.seeds,), MODES[0])
    log_var = torch.full((args.seeds,), 2 * math.log(STD_INIT))
    actions = torch.empty(args.seeds, args.prefill + args.total_timesteps)
    grid = torch.linspace(-6.0, 6.0, 601)
    cells = torch.empty(actions.shape, dtype=torch.long)  # where on the grid each action lies
    density = torch.zeros(args.seeds, len(grid))  # on the grid, the sum of the densities that the actions were drawn from
    path = torch.empty(args.total_timesteps, args.seeds, 2)

    def act(columns):
        noise = torch.randn(args.seeds, columns.stop - columns.start, generator=generator)
        std = (0.5 * log_var).exp().unsqueeze(1)
        a = mean.unsqueeze(1) + std * noise
        actions[:, columns], cells[:, columns] = a, torch.bucketize(a, grid).clamp(max=len(grid) - 1)
        pdf = torch.exp(-0.5 * ((grid - mean.unsqueeze(1)) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        density.add_(pdf, alpha=noise.shape[1])

    act(slice(0, args.prefill))
    for step in range(args.total_timesteps):
        count = args.prefill + step + 1
        act(slice(count - 1, count))

        if step >= args.learning_starts:
            with torch.no_grad():
                gradient, hessian = qf.action_derivatives(mean, log_var)
                alive = log_var < 2 * math.log(MAX_STD)
                mean = mean + args.policy_lr * gradient * alive  # (13)
                if method != "ddpg":
                    log_var = log_var + args.log_var_lr * 0.5 * hessian * log_var.exp() * alive  # (15), Sigma = exp(phi)

        index = torch.randint(count, (args.seeds, args.batch_size), generator=generator)
        a = actions.gather(1, index)
        targets = reward(a)  # one step: the value of a~ is its reward
        weights = torch.ones_like(a)
        if method == "smoothie":
            weights = importance_weights(density, cells.gather(1, index), count, args.max_weight)
        if method.startswith("smoothie"):
            a = a + (0.5 * log_var).exp().unsqueeze(1) * torch.randn(a.shape, generator=generator)  # phantom actions
        errors = (qf(a) - targets) ** 2
        loss = ((weights * errors).sum(1) / weights.sum(1)).sum()  # (18)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path[step, :, 0], path[step, :, 1] = mean, (0.5 * log_var).exp()
    return path.numpy()


def plot(paths, flow, output):
    """Draw Figure 2: the policy of every seed over training, the median bold, and the landscape it climbs."""
    figure, axes = plt.subplot_mosaic([["mean", "reward"], ["std", "reward"]], figsize=(10, 4.2), layout="constrained")
    curves = {"closed form": ("#009E73", "Smoothie in closed form"), "smoothie": ("#0072B2", "Smoothie")}
    curves |= {"ddpg": ("#D55E00", "DDPG")}
    for name, (color, label) in curves.items():  # colours that colour-blind readers can tell apart
        for i, key in enumerate(["mean", "std"]):
            values = paths[name][:, :, i]
            axes[key].plot(values, color=color, alpha=0.2, linewidth=0.6)
            axes[key].plot(np.nanmedian(values, 1), color=color, linewidth=2.2, label=label)
    for i, key in enumerate(["mean", "std"]):
        axes[key].plot(flow[:, i], "k--", linewidth=1.4, label="exact gradient flow")
        axes[key].set_xlim(0, len(flow))
    axes["mean"].set(ylabel=r"policy mean $\mu$", xticklabels=[], ylim=(-1.5, 1.5))
    axes["std"].set(ylabel=r"policy std $\sigma$", xlabel="step", ylim=(0, 1.6))
    axes["std"].legend(loc="lower left", frameon=False, fontsize=8)

    a = np.linspace(-2.5, 2.5, 500)
    axes["reward"].plot(a, reward(a), color="0.3", linewidth=2, label="reward")
    axes["reward"].plot(a, smoothed_reward(a, STD_INIT)[0], color="#CC79A7", linewidth=2, label=r"smoothed by $\sigma = 1$")
    axes["reward"].axvline(MODES[0], color="0.6", linewidth=1, linestyle=":")
    axes["reward"].annotate("start", (MODES[0], 0.02), xytext=(4, 0), textcoords="offset points", color="0.4")
    axes["reward"].set(xlabel="action", ylabel="reward", ylim=(0, None))
    axes["reward"].legend(loc="upper left", frameon=False)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def summary(name, path):
    """Return one line: how many seeds end within one width of the better mode, and where the median seed ends."""
    mean, std = path[-1, :, 0], path[-1, :, 1]
    reached = (np.abs(mean - MODES[1]) < WIDTH) & (std < MAX_STD)
    line = f"{name}: {reached.sum()}/{len(mean)} seeds reached the better mode, final mean {np.median(mean):.2f}"
    diverged = ~(std < MAX_STD)
    return line + f", final std {np.median(std):.2f}" + (f", {diverged.sum()} diverged" if diverged.any() else "")


def check(args):
    """Exit with an error message if a flag is out of range or NaN, or --output is not a picture in a folder that exists."""
    limits = {"seed": (0, 2**31), "learning_starts": (0, args.total_timesteps - 1)}
    for name, value in asdict(args).items():
        low, high = limits.get(name, (1 if type(value) is int else 0, 1e9))
        if type(value) in (int, float) and not low <= value <= high:
            sys.exit(f"--{name.replace('_', '-')} {value}: must lie between {low:g} and {high:g}")
    if Path(args.output).suffix not in (".png", ".pdf", ".svg") or not Path(args.output).parent.is_dir():
        sys.exit(f"--output {args.output}: must be a .png, .pdf or .svg file in a folder that exists")


def main(args):
    check(args)
    torch.set_num_threads(1)  # the tensors are small
    paths = {}
    for name in ("smoothie", "smoothie without weights", "closed form", "ddpg"):
        paths[name] = train(args, name)
        print(summary(name, paths[name]), flush=True)
    plot(paths, gradient_flow(args), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
