"""What the weights of (18) do if the replay buffer holds only the policy's own actions: one step, two action dimensions.

The policy N(mu, Sigma) is fixed, with a full Sigma. The reward is a sum of Gaussian bumps plus noise, so its convolution with
the policy, Q~ (9), is known exactly. Every critic gets the same number of actions and updates; only its loss differs, by a line
or two. Errors are root mean squares, relative to the exact value:

    Q~          at actions a ~ N(mu, Sigma), relative to the standard deviation of the exact Q~ there
    gradient    of dQ~/da at mu, which (13) needs          Hessian    of d2Q~/da2 at mu, which (15) needs
    samples     effective sample size (sum w)^2 / sum w^2 of the weights, as a share of the buffer

Without weights the fit has another limit. If a~ ~ N(mu, Sigma) and a ~ N(a~, Sigma), then a~ given a is N((a + mu)/2, Sigma/2).
The critic learns that narrower smoothing, stretched to twice its width around mu.

Without a cap the weights 1/q have neither a finite mean nor a finite variance under q. (19) leaves a freedom that the paper
does not use: a factor that depends on the phantom action a alone does not move the optimum. The weights q(a)/q(a~) have the
same optimum, and a finite mean.
"""

import math
import sys
from dataclasses import asdict, dataclass

import torch
import tyro

MEAN, COVARIANCE = torch.tensor([0.2, -0.1]), torch.tensor([[0.36, 0.15], [0.15, 0.25]])
CENTERS, HEIGHTS = torch.tensor([[-0.7, 0.0], [0.8, 0.6], [0.4, -0.9]]), torch.tensor([0.7, 1.0, -0.6])
BUMP = torch.tensor([[0.25, -0.05], [-0.05, 0.16]])  # every bump's covariance


@dataclass
class Args:
    runs: int = 10  # independent buffers and critics of each method
    seed: int = 1  # seed of everything random
    actions: int = 10_000  # actions in each buffer
    updates: int = 3_000  # updates of each critic
    batch_size: int = 256  # actions in each batch
    lr: float = 5e-3  # learning rate, by Adam, falling to 0 over the updates
    noise: float = 0.3  # standard deviation of the noise on the rewards
    max_weight: float = 50.0  # cap on the weights
    samples: int = 8  # samples in each average of (17)


def smoothed_reward(a, covariance):
    """Return the reward averaged over N(a, covariance) for a (..., 2): a zero covariance gives the reward itself."""
    wider = BUMP.to(a) + covariance
    d = a.unsqueeze(-2) - CENTERS.to(a)
    heights = HEIGHTS.to(a) * (torch.linalg.det(BUMP.to(a)) / torch.linalg.det(wider)).sqrt()
    return (heights * torch.exp(-0.5 * (d @ torch.linalg.inv(wider) * d).sum(-1))).sum(-1)


def derivatives(f, a):
    """Return the gradient (2,) and Hessian (2, 2) of f at a."""
    return torch.func.grad(f)(a), torch.func.hessian(f)(a)


def density(a):
    """Return the policy's density at a (..., 2)."""
    return torch.distributions.MultivariateNormal(MEAN.to(a), COVARIANCE.to(a)).log_prob(a).exp()


class Critic(torch.nn.Module):
    """One network q(a) = w.h(W a + b) + c for each run: (runs, batch, 2) to (runs, batch). h is GELU, or ReLU if relu."""

    def __init__(self, runs, generator, relu=False, units=64):
        super().__init__()
        self.delta = 0.0 if relu else 1.0  # both are z cdf(z / delta)
        self.w_a = torch.nn.Parameter(torch.randn(runs, units, 2, generator=generator) * 1.5)
        self.b = torch.nn.Parameter(torch.randn(runs, 1, units, generator=generator) * 1.5)
        self.w = torch.nn.Parameter(torch.zeros(runs, units, 1))
        self.c = torch.nn.Parameter(torch.zeros(runs, 1, 1))

    def forward(self, a):
        z = torch.baddbmm(self.b, a, self.w_a.mT)
        h = torch.nn.functional.gelu(z) if self.delta else torch.relu(z)
        return torch.baddbmm(self.c, h, self.w).squeeze(2)

    def smoothed(self, a, covariance):
        """Return the average of q over N(a, covariance) (runs, batch), its gradient (..., 2) and its Hessian (..., 2, 2).

        A unit sees the policy as one Gaussian of variance s^2 = W Sigma W^T. With t^2 = delta^2 + s^2 and u = z / t

            E[h] = t u cdf(u) + s^2/t pdf(u)    E[h'] = cdf(u) + delta^2/t^2 u pdf(u)
            E[h''] = pdf(u)/t (1 + delta^2/t^2 (1 - u^2))

        which for ReLU (delta = 0, t = s) is z cdf(z/s) + s pdf(z/s), cdf(z/s) and pdf(z/s)/s.
        """
        var = torch.einsum("rui,ij,ruj->ru", self.w_a, covariance, self.w_a).unsqueeze(1)
        t = (self.delta**2 + var).sqrt()
        u, share = torch.baddbmm(self.b, a, self.w_a.mT) / t, self.delta**2 / t**2
        cdf, pdf = torch.special.ndtr(u), torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
        value = ((t * u * cdf + var / t * pdf) @ self.w + self.c).squeeze(2)
        first, second = (cdf + share * u * pdf) * self.w.mT, pdf / t * (1 + share * (1 - u * u)) * self.w.mT
        return value, first @ self.w_a, torch.einsum("rbu,rui,ruj->rbij", second, self.w_a, self.w_a)


# The critics' squared errors (runs, batch). a holds actions of the buffer, y what they earned, noise ~ N(0, Sigma).


def no_weights(args, nets, a, y, noise):
    """(18) at phantom actions, the buffer taken as uniform."""
    return (nets[0](a + noise[:, :, 0]) - y) ** 2


def weights(args, nets, a, y, noise):
    """(18) with its weights."""
    w = (1 / density(a)).clamp(max=args.max_weight)
    return w / w.mean(1, keepdim=True) * no_weights(args, nets, a, y, noise)


def ratio_weights(args, nets, a, y, noise):
    """(18) with its weights times the density of the phantom action."""
    w = (density(a + noise[:, :, 0]) / density(a)).clamp(max=args.max_weight)
    return w / w.mean(1, keepdim=True) * no_weights(args, nets, a, y, noise)


def first_route(args, nets, a, y, noise):
    """Q by (16), and Q~ fitted to averages of Q over several actions (17)."""
    smoothed, q = nets
    count = a.shape[1] // args.samples  # fewer points, so that (17) evaluates Q as often as (16)
    around = a[:, :count].unsqueeze(2) + noise[:, :count]
    targets = q(around.flatten(1, 2)).detach().view(around.shape[:3]).mean(2)
    return torch.cat([(q(a) - y) ** 2, (smoothed(a[:, :count]) - targets) ** 2 * args.samples], 1)


def fit_q(args, nets, a, y, noise):
    """Q alone, for the closed form."""
    return (nets[0](a) - y) ** 2


METHODS = {  # the loss; whether the buffer is uniform; whether the critic is of Q and smoothed in closed form; ReLU; networks
    "phantom actions, uniform buffer": (no_weights, True, False, False, 1),
    "phantom actions, no weights": (no_weights, False, False, False, 1),
    "phantom actions, weights 1/q(ã)": (weights, False, False, False, 1),
    "phantom actions, weights q(a)/q(ã)": (ratio_weights, False, False, False, 1),
    "first route": (first_route, False, False, False, 2),
    "closed form, GELU": (fit_q, False, True, False, 1),
    "closed form, ReLU": (fit_q, False, True, True, 1),
}


def train(args, loss, uniform, closed_form, relu, networks):
    """Return the trained critics' Q~, gradient and Hessian as a function of actions (runs, batch, 2)."""
    generator = torch.Generator().manual_seed(args.seed)
    nets = [Critic(args.runs, generator, relu) for _ in range(networks)]
    optimizer = torch.optim.Adam([p for net in nets for p in net.parameters()], lr=args.lr, fused=True)
    factor = torch.linalg.cholesky(COVARIANCE)
    if uniform:
        buffer = MEAN + 6 * torch.rand(args.runs, args.actions, 2, generator=generator) - 3
    else:
        buffer = MEAN + torch.randn(args.runs, args.actions, 2, generator=generator) @ factor.T
    rewards = smoothed_reward(buffer, 0 * COVARIANCE) + args.noise * torch.randn(buffer.shape[:2], generator=generator)
    rows = torch.arange(args.runs).unsqueeze(1)
    for update in range(args.updates):
        index = torch.randint(args.actions, (args.runs, args.batch_size), generator=generator)
        count = args.samples if networks > 1 else 1
        noise = torch.randn(args.runs, args.batch_size, count, 2, generator=generator) @ factor.T
        optimizer.param_groups[0]["lr"] = args.lr * (1 - update / args.updates)
        optimizer.zero_grad()
        (loss(args, nets, buffer[rows, index], rewards[rows, index], noise).sum() / args.batch_size).backward()
        optimizer.step()
    return lambda a: nets[0].smoothed(a, COVARIANCE if closed_form else 0 * COVARIANCE)


def errors(args, predict):
    """Return the relative errors of Q~, of its gradient and of its Hessian. predict maps actions (runs, batch, 2) to them."""

    def exact(a):
        return smoothed_reward(a, COVARIANCE)

    generator = torch.Generator().manual_seed(0)
    a = MEAN + torch.randn(1_000, 2, generator=generator) @ torch.linalg.cholesky(COVARIANCE).T
    gradient, hessian = derivatives(exact, MEAN)
    value = predict(a.expand(args.runs, -1, -1))[0]
    _, g, h = predict(MEAN.expand(args.runs, 1, 2))
    found = ((value - exact(a)).square().mean().sqrt() / exact(a).std()).item()
    return found, *(
        ((x.squeeze(1) - y).square().flatten(1).sum(1).mean().sqrt() / y.norm()).item()
        for x, y in [(g, gradient), (h, hessian)]
    )


def limit_without_weights(a):
    """Return what phantom actions without weights converge to, its gradient and Hessian, for a (runs, batch, 2)."""

    def narrower(a):
        return smoothed_reward((a + MEAN) / 2, COVARIANCE / 2)

    flat = a.reshape(-1, 2)
    gradient, hessian = torch.vmap(torch.func.grad(narrower))(flat), torch.vmap(torch.func.hessian(narrower))(flat)
    return narrower(a), gradient.view(*a.shape), hessian.view(*a.shape, 2)


def effective_samples(args, loss):
    """Return the effective sample size of the weights, as a share of the buffer."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 200_000, 2, generator=generator) @ torch.linalg.cholesky(COVARIANCE).T
    a = MEAN + noise[0]
    w = {weights: 1 / density(a), ratio_weights: density(a + noise[1]) / density(a)}.get(loss, torch.ones(1))
    w = w.clamp(max=args.max_weight)
    return (w.mean() ** 2 / w.square().mean()).item()


def check(args):
    """Exit with an error message if a flag is out of range or NaN."""
    for name, value in asdict(args).items():
        low, high = (0, 2**31) if name == "seed" else (1 if type(value) is int else 0, math.inf)
        if not low <= value <= high:
            sys.exit(f"--{name.replace('_', '-')} {value}: must lie between {low:g} and {high:g}")
    if args.samples > args.batch_size:
        sys.exit(f"--samples {args.samples}: at most --batch-size {args.batch_size}")


def main(args):
    check(args)
    torch.set_num_threads(1)
    print("| method | error of Q̃ | of its gradient | of its Hessian | samples |")
    print("|---|---|---|---|---|")
    for name, (loss, *settings) in METHODS.items():
        found = errors(args, train(args, loss, *settings))
        print(f"| {name} | " + " | ".join(f"{x:.0%}" for x in (*found, effective_samples(args, loss))) + " |", flush=True)
        if name == "phantom actions, no weights":
            limit = errors(args, limit_without_weights)
            print("| its limit, N((a + μ)/2, Σ/2) | " + " | ".join(f"{x:.0%}" for x in limit) + " | |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
