"""Every estimator of Sections 3 to 5 on the task of Section 6.1: one action, two bumps of reward, start on the worse one.

The policy is N(mu, sigma^2) with phi = log sigma^2. Q is the reward itself and Q~ its average over the policy (9), both known
exactly. All methods take the same steps; they differ in their estimates of g and H and in what they fit a critic to:

    mu  <- mu  + policy_lr * g                     g estimates dQ~/da    at a = mu                                    (13)
    phi <- phi + log_var_lr * 1/2 H sigma^2        H estimates d2Q~/da2  at a = mu                              (14), (15)

Section 3 prints the score of the policy with a wrong sign and a wrong power. The derivatives of log N(a | mu, sigma^2) are

    d log pi / d mu = (a - mu) / sigma^2        d log pi / d sigma = (a - mu)^2 / sigma^3 - 1 / sigma

so d log pi / d phi = ((a - mu)^2 / sigma^2 - 1) / 2. All critics are the same network. Its units are GELU, which have a Hessian
and whose average over the policy has a closed form (Critic.derivatives). The task has one step, so the targets of (8), (16) and
(18) are the reward. All seeds train side by side: the networks' and batches' first dimension is the seed.
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

MODES, HEIGHTS, WIDTH = (-1.0, 1.0), (0.55, 1.0), 0.3
STD_INIT, MAX_STD = 1.0, 10.0  # a policy wider than MAX_STD has diverged: it stops learning and counts as failed


@dataclass
class Args:
    output: str = "theory/bandit.png"  # the picture to write
    seeds: int = 20  # independent runs of each method
    seed: int = 1  # seed of everything random
    total_timesteps: int = 4_500  # actions taken, with one update each
    learning_starts: int = 1_000  # first steps, in which the critic learns and the policy stands still
    prefill: int = 1_000  # actions of the initial policy in the replay buffer before the first step
    batch_size: int = 256  # actions in each batch
    policy_lr: float = 1e-2  # learning rate of mu, by gradient ascent
    log_var_lr: float = 1.5e-2  # learning rate of phi, by gradient ascent
    q_lr: float = 3e-3  # learning rate of the critic, by Adam
    max_weight: float = 50.0  # cap on the weights 1/q of (18)
    samples: int = 8  # samples in each average of (17)


def reward(a):
    """The two bumps, elementwise."""
    return sum(h * torch.exp(-((a - m) ** 2) / (2 * WIDTH**2)) for m, h in zip(MODES, HEIGHTS, strict=True))


def smoothed_reward(a, std):
    """Return Q~ (9), dQ~/da and d2Q~/da2 at a, elementwise: a bump smoothed by a Gaussian is a wider and lower bump."""
    v = WIDTH**2 + std**2
    bumps = [(a - m, h * WIDTH / v**0.5 * torch.exp(-((a - m) ** 2) / (2 * v))) for m, h in zip(MODES, HEIGHTS, strict=True)]
    return sum(q for _, q in bumps), sum(-d / v * q for d, q in bumps), sum((d**2 / v - 1) / v * q for d, q in bumps)


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
        return torch.baddbmm(self.c.unsqueeze(2), torch.nn.functional.gelu(z), self.w.mT).squeeze(2)

    @torch.no_grad()
    def derivatives(self, a, std=0.0):
        """Return the first two derivatives at a, (seeds,) each, of the average of q over N(a, std^2).

        With s = |W| std, t^2 = 1 + s^2 and u = (W a + b) / t, E[gelu] = t u cdf(u) + s^2/t pdf(u); std = 0 gives q itself.
        """
        t = (1 + (self.w_a * torch.as_tensor(std).view(-1, 1, 1)) ** 2).sqrt()
        u = (a.view(-1, 1, 1) * self.w_a + self.b) / t
        pdf = torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
        first = torch.special.ndtr(u) + u * pdf / t**2
        second = pdf / t * (1 + (1 - u * u) / t**2)
        return (self.w * first * self.w_a).sum((1, 2)), (self.w * second * self.w_a**2).sum((1, 2))


# Estimates of g and H. step holds mean, std, and noise = (a - mean) / std and reward of the action just taken, (seeds,) each.


def score(qf, step):
    """Section 3, the naive policy gradient: d log pi times the reward."""
    return step.noise / step.std * step.reward, (step.noise**2 - 1) / step.std**2 * step.reward


def dpg(qf, step):
    """Deterministic policy gradient (6): dQ/da at the mean; sigma stays."""
    gradient, _ = qf.derivatives(step.mean)
    return gradient, torch.zeros_like(gradient)


def svg(qf, step):
    """SVG(0): dQ/da at a sampled action; sigma stays."""
    gradient, _ = qf.derivatives(step.mean + step.std * step.noise)
    return gradient, torch.zeros_like(gradient)


def svg_std(qf, step):
    """SVG(0) that learns sigma by the same reparameterisation, which Section 5 mentions: E[Q''] = E[Q' noise] / sigma."""
    gradient, _ = svg(qf, step)
    return gradient, gradient * step.noise / step.std


def derivatives(qf, step):
    """The critic's derivatives at the mean. Of Q~: Smoothie. Of Q: expected policy gradients, with Q's Taylor expansion."""
    return qf.derivatives(step.mean)


def closed_form(qf, step):
    """The derivatives of Q~ from a critic of Q, by the closed form."""
    return qf.derivatives(step.mean, step.std)


# The critics' squared errors (seeds, batch). batch holds a with its reward, the mean it was drawn around and its density q,
# the current std (seeds, 1), and noise (seeds, batch, samples).


def fit_q(nets, batch):
    """Q at the actions taken (8)."""
    return (nets[0](batch.a) - batch.reward) ** 2


def fit_phantom(nets, batch):
    """Q~ at phantom actions, the buffer taken as uniform: (18) without weights."""
    return (nets[0](batch.a + batch.std * batch.noise[:, :, 0]) - batch.reward) ** 2


def fit_weighted(nets, batch):
    """Q~ at phantom actions, weighted by 1/q (18). q is the density that the action was drawn from (end of Section 4.2)."""
    weights = (1 / batch.density).clamp(max=batch.max_weight)
    return weights / weights.mean(1, keepdim=True) * fit_phantom(nets, batch)


def fit_at_mean(nets, batch):
    """Q~ as Section 3 prints it: at the mean that the action was drawn around."""
    return (nets[0](batch.means) - batch.reward) ** 2


def fit_first_route(nets, batch):
    """The first route: Q by (16), and Q~ fitted to averages of Q over several actions (17)."""
    smoothed, q = nets
    count = batch.a.shape[1] // batch.noise.shape[2]  # fewer points, so that (17) evaluates Q as often as (16)
    a = batch.a[:, :count]
    around = a.unsqueeze(2) + batch.std.unsqueeze(2) * batch.noise[:, :count]
    targets = q(around.flatten(1)).detach().view(around.shape).mean(2)
    return torch.cat([fit_q((q,), batch), (smoothed(a) - targets) ** 2 * (batch.a.shape[1] / count)], 1)


METHODS = {  # the estimate of g and H, the critic's loss, the number of networks
    "policy gradient": (score, None, 0),
    "DPG": (dpg, fit_q, 1),
    "SVG(0)": (svg, fit_q, 1),
    "SVG(0), learning σ": (svg_std, fit_q, 1),
    "expected policy gradients, quadratic": (derivatives, fit_q, 1),
    "Smoothie, phantom actions": (derivatives, fit_phantom, 1),
    "Smoothie, phantom actions, weights": (derivatives, fit_weighted, 1),
    "Smoothie, at the mean": (derivatives, fit_at_mean, 1),
    "Smoothie, first route": (derivatives, fit_first_route, 2),
    "Smoothie, closed form": (closed_form, fit_q, 1),
}


def ascend(args, mean, log_var, gradient, hessian):
    """Return mu and phi after one step of (13) and (15)."""
    alive = log_var < 2 * math.log(MAX_STD)
    return mean + args.policy_lr * gradient * alive, log_var + args.log_var_lr * 0.5 * hessian * log_var.exp() * alive


def gradient_flow(args):
    """Return the path (steps, 2) of mu and sigma if g and H are exact."""
    mean, log_var, path = torch.tensor(MODES[0]), torch.tensor(2 * math.log(STD_INIT)), []
    for step in range(args.total_timesteps):
        if step >= args.learning_starts:
            mean, log_var = ascend(args, mean, log_var, *smoothed_reward(mean, (0.5 * log_var).exp())[1:])
        path.append((mean.item(), (0.5 * log_var).exp().item()))
    return np.array(path)


def train(args, estimate, fit, networks):
    """Return the path (steps, seeds, 2) of mu and sigma."""
    generator = torch.Generator().manual_seed(args.seed)
    nets = [Critic(args.seeds, generator) for _ in range(networks)]
    optimizer = torch.optim.Adam([p for net in nets for p in net.parameters()], lr=args.q_lr, fused=True) if nets else None
    mean, log_var = torch.full((args.seeds,), MODES[0]), torch.full((args.seeds,), 2 * math.log(STD_INIT))
    buffer = torch.empty(3, args.seeds, args.prefill + args.total_timesteps)  # the action, the mean it came from, its density
    path = torch.empty(args.total_timesteps, args.seeds, 2)

    def act(start, stop):
        noise, std = torch.randn(args.seeds, stop - start, generator=generator), (0.5 * log_var).exp().unsqueeze(1)
        center = mean.unsqueeze(1)
        pdf = torch.exp(-0.5 * noise**2) / (std * math.sqrt(2 * math.pi))
        buffer[:, :, start:stop] = torch.stack([center + std * noise, center.expand_as(noise), pdf])
        return noise[:, -1]

    act(0, args.prefill)
    for step in range(args.total_timesteps):
        count, std = args.prefill + step + 1, (0.5 * log_var).exp()
        noise = act(count - 1, count)
        if step >= args.learning_starts:
            now = SimpleNamespace(mean=mean, std=std, noise=noise, reward=reward(buffer[0, :, count - 1]))
            mean, log_var = ascend(args, mean, log_var, *estimate(nets[0] if nets else None, now))
        if fit:
            index = torch.randint(count, (1, args.seeds, args.batch_size), generator=generator)
            a, means, density = buffer.gather(2, index.expand(3, -1, -1))
            noise = torch.randn(*a.shape, args.samples if networks > 1 else 1, generator=generator)
            batch = SimpleNamespace(a=a, means=means, density=density, reward=reward(a), noise=noise)
            batch.std, batch.max_weight = (0.5 * log_var).exp().unsqueeze(1), args.max_weight
            optimizer.zero_grad()
            (fit(nets, batch).sum() / args.batch_size).backward()
            optimizer.step()
        path[step, :, 0], path[step, :, 1] = mean, (0.5 * log_var).exp()
    return path.numpy()


def summarise(args, path, flow):
    """Return the row of one method: seeds within one width of the better mode, median regrets, distance from the flow."""
    mean, std = torch.from_numpy(path[-1, :, 0]), torch.from_numpy(path[-1, :, 1])
    best = reward(torch.tensor(MODES[1]))
    regret = np.median(best - smoothed_reward(mean, std)[0]), np.median(best - reward(mean))
    distance = np.median(np.linalg.norm(path - flow[:, None], axis=2)[args.learning_starts :].mean(0))
    success = ((mean - MODES[1]).abs() < WIDTH) & (std < MAX_STD)
    return f"{int(success.sum())}/{len(mean)}", f"{mean.median():.2f}, {std.median():.2f}", *regret, distance


def plot(paths, flow, rows, output):
    """Draw every seed's path in the plane of mu and sigma, one panel for each method, beside the exact flow."""
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    for axis, (name, path) in zip(figure.subplots(2, 5, sharex=True, sharey=True).flat, paths.items(), strict=True):
        axis.plot(*path[::15].transpose(2, 0, 1), color="#0072B2", alpha=0.45, linewidth=0.6)
        axis.plot(path[-1, :, 0], path[-1, :, 1], "o", color="#D55E00", markersize=3)
        axis.plot(*flow[::15].T, "k--", linewidth=1.2)
        title = name.replace(", ", ":\n", 1)
        axis.set_title(f"{title}\n{rows[name][0]}", fontsize=9)
        axis.set(xlim=(-2, 2), ylim=(0, 1.8))
    figure.supxlabel("policy mean μ: the worse bump is at -1, the better one at 1", fontsize=10)
    figure.supylabel("policy std σ", fontsize=10)
    figure.savefig(output, dpi=90)


def check(args):
    """Exit with an error message if a flag is out of range or NaN, or if the picture cannot be written."""
    limits = {"seed": (0, 2**31), "learning_starts": (0, args.total_timesteps - 1), "samples": (1, args.batch_size)}
    for name, value in asdict(args).items():
        low, high = limits.get(name, (1 if type(value) is int else 0, 1e9))
        if type(value) in (int, float) and not low <= value <= high:
            sys.exit(f"--{name.replace('_', '-')} {value}: must lie between {low:g} and {high:g}")
    if not (args.output.endswith(".png") and Path(args.output).parent.is_dir()):
        sys.exit(f"--output {args.output}: must be a .png file in a folder that exists")


def main(args):
    check(args)
    torch.set_num_threads(1)
    flow, paths, rows = gradient_flow(args), {}, {}
    print("| method | seeds at the better bump | final μ, σ | regret | regret of the mean action | distance from the flow |")
    print("|---|---|---|---|---|---|")
    for name, method in [*METHODS.items(), ("exact gradient flow", None)]:
        paths[name] = train(args, *method) if method else flow[:, None].astype(np.float32)
        rows[name] = success, final, *numbers = summarise(args, paths[name], flow)
        print(f"| {name} | {success} | {final} | " + " | ".join(f"{x:.3f}" for x in numbers) + " |", flush=True)
    del paths["exact gradient flow"]
    try:
        plot(paths, flow, rows, args.output)
    except OSError as error:
        sys.exit(f"--output {args.output}: cannot write the picture ({error})")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
