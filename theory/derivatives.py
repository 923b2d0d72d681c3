"""The derivative Bellman equations of Section 4.4, and critics fitted to the same samples.

A Gaussian's derivatives are the Gaussian times a polynomial, so (12) can be differentiated without
the derivatives of y:

    dQ~/da   = E[S d y]                    d = a~ - a, a~ ~ N(a, Sigma), S = Sigma^-1
    d2Q~/da2 = E[(S d d^T S - S) y]        y = r + gamma Q~(s', mu(s'))

Both factors have mean 0, so a baseline can be subtracted from y. The first is odd in d and the
second even: with actions in pairs a + d, a - d, the even part of y drops out of the first and the
odd part out of the second. At a = mu(s) these are the score of the policy times the return, the
naive policy gradient of Section 3. Their variance grows like 1/sigma^2 and 1/sigma^4.

The table gives each row the same number of noisy samples of a task of one step, while Sigma shrinks
from column to column:

    plain, baseline         the equations; the baseline is the mean of the other samples
    antithetic              the equations, with actions in pairs
    antithetic, baseline    both
    compatible critic       least squares of y on 1, d and d d^T: (22) fitted to values
    closed form             ridge regression of y on GELU features, averaged exactly over the policy
    reparameterisation      E[dr/da] and E[dr/da (S d)^T], if the reward's derivative were known
"""

import math
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
    runs: int = 400  # independent sets of samples
    seed: int = 1  # seed of everything random
    actions: int = 256  # actions in each set, an even number
    noise: float = 0.1  # standard deviation of the noise on y
    features: int = 100  # GELU features of the closed form's critic
    ridge: float = 1e-3  # weight of its penalty


def smoothed_reward(a, covariance):
    """Return the reward averaged over N(a, covariance) for a (..., 2).

    A zero covariance gives the reward itself.
    """
    wider = BUMP.to(a) + covariance
    d = a.unsqueeze(-2) - CENTERS.to(a)
    heights = HEIGHTS.to(a) * (torch.linalg.det(BUMP.to(a)) / torch.linalg.det(wider)).sqrt()
    return (heights * torch.exp(-0.5 * (d @ torch.linalg.inv(wider) * d).sum(-1))).sum(-1)


# The equations and their variance reduction.


def factors(d, covariance):
    """Return S d (..., D) and S d d^T S - S (..., D, D) for d (..., D)."""
    precision = torch.linalg.inv(covariance)
    first = d @ precision
    return first, first.unsqueeze(-1) * first.unsqueeze(-2) - precision


def derivative_bellman(d, y, covariance):
    """Return the averages of the two equations over samples d (..., n, D), y (..., n)."""
    first, second = factors(d, covariance)
    return (first * y[..., None]).mean(-2), (second * y[..., None, None]).mean(-3)


def leave_one_out(y):
    """Return y (..., n) less the mean of the other samples, which keeps the average unbiased."""
    n = y.shape[-1]
    return (y - y.mean(-1, keepdim=True)) * n / (n - 1)


def pair_baseline(y):
    """Return y (..., n), whose second half mirrors the first, less the mean of the other pairs."""
    half = y.shape[-1] // 2
    pairs = (y[..., :half] + y[..., half:]) / 2
    baseline = pairs - leave_one_out(pairs)
    return y - torch.cat([baseline, baseline], -1)


# Critics and the reward's own derivatives.


def compatible_critic(d, y, covariance):
    """Fit c + g.d + d^T H d / 2 to y (..., n) by least squares.

    Return g (..., D) and H (..., D, D).
    """
    dim = d.shape[-1]
    rows, columns = torch.triu_indices(dim, dim)
    quadratic = d[..., rows] * d[..., columns] * torch.where(rows == columns, 0.5, 1.0).to(d)
    x = torch.cat([torch.ones_like(d[..., :1]), d, quadratic], -1)
    w = torch.linalg.lstsq(x, y.unsqueeze(-1)).solution.squeeze(-1)
    hessian = torch.zeros(*d.shape[:-2], dim, dim, dtype=d.dtype)
    hessian[..., rows, columns] = w[..., 1 + dim :]
    hessian[..., columns, rows] = w[..., 1 + dim :]
    return w[..., 1 : 1 + dim], hessian


def compatible_weights(features, derivatives):
    """Return the w that minimises sum |features w - derivatives|^2: both conditions of Section 4.4.

    For mu_theta features is dmu/dtheta (states, D, parameters) and derivatives dQ~/da; for
    Sigma_phi features is dSigma/dphi (states, D * D, parameters) and derivatives d2Q~/da2.
    """
    target = derivatives.flatten().unsqueeze(1)
    return torch.linalg.lstsq(features.flatten(0, 1), target).solution.squeeze(1)


def closed_form(args, d, y, covariance):
    """Fit w.gelu(W d + b) + c to y; return the derivatives of its average over N(0, Sigma) at 0.

    The features are drawn at the scale of d. The average is that of weights.py.
    """
    generator = torch.Generator().manual_seed(args.seed)
    factor = torch.linalg.cholesky(covariance)
    w_d = torch.randn(args.features, d.shape[-1], generator=generator) @ torch.linalg.inv(factor)
    b = 1.5 * torch.randn(args.features, generator=generator)
    hidden = torch.nn.functional.gelu(d @ w_d.T + b)
    x = torch.cat([hidden, torch.ones_like(d[..., :1])], -1)
    gram = x.mT @ x / x.shape[1] + args.ridge * torch.eye(x.shape[-1])
    w = torch.linalg.solve(gram, x.mT @ y.unsqueeze(-1) / x.shape[1])[:, :-1, 0]

    var = torch.einsum("ui,ij,uj->u", w_d, covariance, w_d)
    r = (1 + var).sqrt()
    z = b / r
    pdf = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    first = torch.special.ndtr(z) + z * pdf / r**2
    second = pdf / r * (1 + (1 - z**2) / r**2)
    return (w * first) @ w_d, torch.einsum("ru,ui,uj->rij", w * second, w_d, w_d)


def reparameterisation(d, covariance):
    """Average dr/da and dr/da (S d)^T over the samples."""
    slope_at = torch.func.grad(lambda a: smoothed_reward(a, 0 * covariance))
    slope = torch.vmap(slope_at)((MEAN + d).flatten(0, 1)).view_as(d)
    first, _ = factors(d, covariance)
    outer = (slope.unsqueeze(-1) * first.unsqueeze(-2)).mean(1)
    return slope.mean(1), (outer + outer.mT) / 2


def estimates(args, covariance):
    """Return the name of each row with its gradients (runs, 2) and Hessians (runs, 2, 2)."""
    generator = torch.Generator().manual_seed(args.seed)
    factor = torch.linalg.cholesky(covariance)
    d = torch.randn(args.runs, args.actions, 2, generator=generator) @ factor.T
    half = d[:, : args.actions // 2]
    pairs = torch.cat([half, -half], 1)
    noise = args.noise * torch.randn(args.runs, args.actions, generator=generator)
    y = smoothed_reward(MEAN + d, 0 * covariance) + noise
    y_pairs = smoothed_reward(MEAN + pairs, 0 * covariance) + noise
    return {
        "plain": derivative_bellman(d, y, covariance),
        "baseline": derivative_bellman(d, leave_one_out(y), covariance),
        "antithetic": derivative_bellman(pairs, y_pairs, covariance),
        "antithetic, baseline": derivative_bellman(pairs, pair_baseline(y_pairs), covariance),
        "compatible critic": compatible_critic(d, y, covariance),
        "closed form": closed_form(args, d, y, covariance),
        "reparameterisation": reparameterisation(d, covariance),
    }


def deviation_and_bias(found, exact):
    """Return the standard deviation and the size of the bias of estimates (runs, ...) of exact.

    Both are relative to the size of exact.
    """
    bias = (found.mean(0) - exact).norm() / exact.norm()
    variance = (found - found.mean(0)).flatten(1).square().sum(1).mean()
    return (variance.sqrt() / exact.norm()).item(), bias.item()


def main(args):
    torch.set_num_threads(1)
    scales = (1.0, 0.3, 0.1)
    rows = {}
    for scale in scales:
        covariance = scale**2 * COVARIANCE
        gradient = torch.func.grad(smoothed_reward)(MEAN, covariance)
        hessian = torch.func.hessian(smoothed_reward)(MEAN, covariance)
        for name, found in estimates(args, covariance).items():
            for x, exact in zip(found, (gradient, hessian), strict=True):
                deviation, bias = deviation_and_bias(x, exact)
                rows.setdefault(name, []).append(f"{deviation:.2f} ({bias:.2f})")
    heads = [f"{name}, {scale:g} σ" for scale in scales for name in ("gradient", "Hessian")]
    print("| estimator | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
