"""Phantom actions, their weights and what the buffer holds: one step, two action dimensions.

The policy N(mu, Sigma) is fixed, with a full Sigma. The reward is a sum of Gaussian bumps plus
noise, so its convolution with the policy, Q~ (9), is known exactly. Every critic gets the same
number of actions and updates. Errors are root mean squares, relative to the exact value:

    Q~          at actions a ~ N(mu, Sigma), relative to the deviation of the exact Q~ there
    gradient    of dQ~/da at mu, which (13) needs
    Hessian     of d2Q~/da2 at mu, which (15) needs
    samples     effective sample size (sum w)^2 / sum w^2 of the weights, as a share of the buffer

Without weights the fit has another limit. If a~ ~ N(mu, Sigma) and a ~ N(a~, Sigma), then a~ given
a is N((a + mu)/2, Sigma/2). The critic learns that narrower smoothing, stretched to twice its width
around mu. Exact phantom actions have the right limit without weights: see README.

Without a cap the weights 1/q have neither a finite mean nor a finite variance under q. (19) leaves
a freedom that the paper does not use: a factor that depends on the phantom action a alone does not
move the optimum. The weights q(a)/q(a~) have the same optimum, and a finite mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

MEAN = torch.tensor([0.2, -0.1])
COVARIANCE = torch.tensor([[0.36, 0.15], [0.15, 0.25]])
CENTERS = torch.tensor([[-0.7, 0.0], [0.8, 0.6], [0.4, -0.9]])
HEIGHTS = torch.tensor([0.7, 1.0, -0.6])
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
    behaviour_scale: float = 1.5  # c: std of the wider behaviour, over the policy's


def smoothed_reward(a, covariance):
    """Return the reward averaged over N(a, covariance) for a (..., 2).

    A zero covariance gives the reward itself.
    """
    wider = BUMP.to(a) + covariance
    d = a.unsqueeze(-2) - CENTERS.to(a)
    heights = HEIGHTS.to(a) * (torch.linalg.det(BUMP.to(a)) / torch.linalg.det(wider)).sqrt()
    return (heights * torch.exp(-0.5 * (d @ torch.linalg.inv(wider) * d).sum(-1))).sum(-1)


def derivatives(f, a):
    """Return the gradient (2,) and Hessian (2, 2) of f at a."""
    return torch.func.grad(f)(a), torch.func.hessian(f)(a)


def density(a):
    """Return the policy's density at a (..., 2)."""
    policy = torch.distributions.MultivariateNormal(MEAN.to(a), COVARIANCE.to(a))
    return policy.log_prob(a).exp()


class Critic(torch.nn.Module):
    """One network q(a) = w.h(W a + b) + c for each run: (runs, batch, 2) to (runs, batch).

    h is GELU, or ReLU if relu.
    """

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
        """Return q averaged over N(a, covariance) (runs, batch), its gradient and its Hessian.

        A unit sees the policy as one Gaussian of variance s^2 = W Sigma W^T. With
        r^2 = delta^2 + s^2 and x = z / r

            E[h]   = r x cdf(x) + s^2 / r pdf(x)
            E[h']  = cdf(x) + delta^2 / r^2 x pdf(x)
            E[h''] = pdf(x) / r (1 + delta^2 / r^2 (1 - x^2))

        which for ReLU (delta = 0, r = s) is z cdf(z/s) + s pdf(z/s), cdf(z/s) and pdf(z/s)/s.
        """
        var = torch.einsum("rui,ij,ruj->ru", self.w_a, covariance, self.w_a).unsqueeze(1)
        r = (self.delta**2 + var).sqrt()
        x = torch.baddbmm(self.b, a, self.w_a.mT) / r
        share = self.delta**2 / r**2
        cdf = torch.special.ndtr(x)
        pdf = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        value = ((r * x * cdf + var / r * pdf) @ self.w + self.c).squeeze(2)
        first = (cdf + share * x * pdf) * self.w.mT
        second = pdf / r * (1 + share * (1 - x * x)) * self.w.mT
        gradient = first @ self.w_a
        hessian = torch.einsum("rbu,rui,ruj->rbij", second, self.w_a, self.w_a)
        return value, gradient, hessian


# Phantom actions (runs, batch, 2) for the actions a of the buffer; noise ~ N(0, I).


def square_root(matrix):
    """Return R (2, 2) with R R^T = matrix, which may be singular."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt()


def phantom(a, noise):
    """The paper's: a phantom action from N(a, Sigma)."""
    return a + noise @ torch.linalg.cholesky(COVARIANCE.to(a)).T


def exact_phantom(a, noise, behaviour):
    """The posterior phantom action of a ~ N(mu, behaviour).

    It is from N(mu + (I - K)(a - mu), (I - K) Sigma) with K = Sigma behaviour^-1.
    """
    covariance = COVARIANCE.to(a)
    rest = torch.eye(2).to(a) - covariance @ torch.linalg.inv(behaviour)
    center = MEAN.to(a) + (a - MEAN.to(a)) @ rest.T
    return center + noise @ square_root(rest @ covariance).T


# The critics' squared errors (runs, batch). y is what the actions a of the buffer earned, and noise
# (runs, batch, samples, 2) is N(0, I).


def no_weights(args, nets, a, y, noise):
    """(18) at phantom actions, the buffer taken as uniform."""
    return (nets[0](phantom(a, noise[:, :, 0])) - y) ** 2


def exact(args, nets, a, y, noise):
    """(18) at exact phantom actions."""
    behaviour = args.behaviour_scale**2 * COVARIANCE.to(a)
    return (nets[0](exact_phantom(a, noise[:, :, 0], behaviour)) - y) ** 2


def weights(args, nets, a, y, noise):
    """(18) with its weights."""
    w = (1 / density(a)).clamp(max=args.max_weight)
    return w / w.mean(1, keepdim=True) * no_weights(args, nets, a, y, noise)


def ratio_weights(args, nets, a, y, noise):
    """(18) with its weights times the density of the phantom action."""
    w = (density(phantom(a, noise[:, :, 0])) / density(a)).clamp(max=args.max_weight)
    return w / w.mean(1, keepdim=True) * no_weights(args, nets, a, y, noise)


def first_route(args, nets, a, y, noise):
    """Q by (16), and Q~ fitted to averages of Q over several actions (17)."""
    smoothed, q = nets
    count = a.shape[1] // args.samples  # fewer points, so that (17) evaluates Q as often as (16)
    around = phantom(a[:, :count].unsqueeze(2), noise[:, :count])
    targets = q(around.flatten(1, 2)).detach().view(around.shape[:3]).mean(2)
    smoothed_errors = (smoothed(a[:, :count]) - targets) ** 2 * args.samples
    return torch.cat([(q(a) - y) ** 2, smoothed_errors], 1)


def fit_q(args, nets, a, y, noise):
    """Q alone, for the closed form."""
    return (nets[0](a) - y) ** 2


@dataclass
class Method:
    loss: Callable
    networks: int = 1
    uniform: bool = False  # whether the buffer is uniform
    wider: bool = False  # whether the buffer is from a Gaussian with c times the policy's std
    closed_form: bool = False  # whether the critic is of Q, and smoothed in closed form
    relu: bool = False


METHODS = {
    "phantom actions, uniform buffer": Method(no_weights, uniform=True),
    "phantom actions, no weights": Method(no_weights),
    "phantom actions, weights 1/q(ã)": Method(weights),
    "phantom actions, weights q(a)/q(ã)": Method(ratio_weights),
    "phantom actions, wider buffer": Method(no_weights, wider=True),
    "exact phantom actions, wider buffer": Method(exact, wider=True),
    "first route": Method(first_route, networks=2),
    "closed form, GELU": Method(fit_q, closed_form=True),
    "closed form, ReLU": Method(fit_q, closed_form=True, relu=True),
    "closed form, GELU, wider buffer": Method(fit_q, closed_form=True, wider=True),
}


def train(args, method):
    """Return the trained critics' Q~, gradient and Hessian as a function of actions."""
    generator = torch.Generator().manual_seed(args.seed)
    nets = [Critic(args.runs, generator, method.relu) for _ in range(method.networks)]
    parameters = [p for net in nets for p in net.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True)
    shape = (args.runs, args.actions, 2)
    if method.uniform:
        buffer = MEAN + 6 * torch.rand(shape, generator=generator) - 3
    else:
        factor = torch.linalg.cholesky(COVARIANCE)
        if method.wider:
            factor = args.behaviour_scale * factor
        buffer = MEAN + torch.randn(shape, generator=generator) @ factor.T
    reward_noise = args.noise * torch.randn(buffer.shape[:2], generator=generator)
    rewards = smoothed_reward(buffer, 0 * COVARIANCE) + reward_noise
    rows = torch.arange(args.runs).unsqueeze(1)
    samples = args.samples if method.networks > 1 else 1
    for update in range(args.updates):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - update / args.updates)
        index = torch.randint(args.actions, (args.runs, args.batch_size), generator=generator)
        noise = torch.randn(args.runs, args.batch_size, samples, 2, generator=generator)
        errors = method.loss(args, nets, buffer[rows, index], rewards[rows, index], noise)
        optimizer.zero_grad()
        (errors.sum() / args.batch_size).backward()
        optimizer.step()
    smoothing = COVARIANCE if method.closed_form else 0 * COVARIANCE
    return lambda a: nets[0].smoothed(a, smoothing)


def errors(args, predict):
    """Return the relative errors of Q~, of its gradient and of its Hessian.

    predict maps actions (runs, batch, 2) to the three.
    """

    def exact(a):
        return smoothed_reward(a, COVARIANCE)

    def root_mean_square(x):
        return x.square().mean().sqrt().item()

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1_000, 2, generator=generator)
    a = MEAN + noise @ torch.linalg.cholesky(COVARIANCE).T
    value, _, _ = predict(a.expand(args.runs, -1, -1))
    found = [root_mean_square(value - exact(a)) / exact(a).std().item()]
    _, *at_mean = predict(MEAN.expand(args.runs, 1, 2))
    for x, y in zip(at_mean, derivatives(exact, MEAN), strict=True):
        norms = (x.squeeze(1) - y).flatten(1).norm(dim=1)
        found.append(root_mean_square(norms) / y.norm().item())
    return found


def limit_without_weights(a):
    """Return the limit of phantom actions without weights, its gradient and its Hessian.

    a is (runs, batch, 2).
    """

    def narrower(a):
        return smoothed_reward((a + MEAN) / 2, COVARIANCE / 2)

    flat = a.reshape(-1, 2)
    gradient = torch.vmap(torch.func.grad(narrower))(flat)
    hessian = torch.vmap(torch.func.hessian(narrower))(flat)
    return narrower(a), gradient.view(*a.shape), hessian.view(*a.shape, 2)


def effective_samples(args, loss):
    """Return the effective sample size of the weights, as a share of the buffer."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 200_000, 2, generator=generator)
    a = phantom(MEAN, noise[0])
    w = torch.ones(1)
    if loss is weights:
        w = 1 / density(a)
    if loss is ratio_weights:
        w = density(phantom(a, noise[1])) / density(a)
    w = w.clamp(max=args.max_weight)
    return (w.mean() ** 2 / w.square().mean()).item()


def main(args):
    torch.set_num_threads(1)
    print("| method | error of Q̃ | of its gradient | of its Hessian | samples |")
    print("|---|---|---|---|---|")
    for name, method in METHODS.items():
        found = errors(args, train(args, method))
        cells = [f"{x:.0%}" for x in (*found, effective_samples(args, method.loss))]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        if method == Method(no_weights):
            limit = [f"{x:.0%}" for x in errors(args, limit_without_weights)]
            print("| its limit, N((a + μ)/2, Σ/2) | " + " | ".join(limit) + " | |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
