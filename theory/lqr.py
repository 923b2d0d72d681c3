"""Ground truth with dynamics: the routes to Q~ and DDPG on a linear-quadratic regulator (LQR).

    s' = A s + B a + N(0, W)    r = -s^T C s - a^T D a    pi(.|s) = N(K s, Sigma)    s_0 ~ N(0, S)    discount gamma

Everything in the paper is known exactly here. With x = (s, a), F = A + B K and P = C + K^T D K + gamma F^T P F (Lyapunov),

    Q(s, a) = x^T H x + q       H = -blkdiag(C, D) - gamma [A B]^T P [A B]                                        (3), (11)
    Q~(s, a) = Q(s, a) + tr(H_aa Sigma)                                                                           (9), (12)
    dJ/dK = 2 (H_aa K + H_as) X       X = sum_t gamma^t E[s_t s_t^T] (Lyapunov)                                       (13)
    dJ/dSigma = H_aa / (1 - gamma)    so the best covariance is 0; the best gain solves a Riccati equation      (14), (15)

Sigma = L L^T is a full matrix. The flow is K <- K + gain_lr (1 - gamma) dJ/dK, L <- L + factor_lr (1 - gamma) 2 dJ/dSigma L.
Critics are least-squares fits of quadratic features that forget old batches, with targets from lagged weights. States come from
chains that follow the policy and restart with probability 1 - gamma, so they are distributed as in J. With uniform behaviour
the critic learns from a uniform action at each state; the policy's action still moves the chain.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy.linalg import block_diag, solve_discrete_are, solve_discrete_lyapunov

A, B = np.array([[0.9, 0.3], [-0.2, 0.9]]), np.array([[0.4, 0.0], [0.1, 0.3]])
C, D = np.array([[1.0, 0.2], [0.2, 0.5]]), np.array([[0.5, 0.1], [0.1, 0.4]])
W, S, GAMMA = 0.05 * np.eye(2), np.eye(2), 0.9
GAIN_INIT, FACTOR_INIT = np.zeros((2, 2)), np.array([[1.0, 0.0], [-0.4, 0.8]])
EVERY = 25  # updates between two comparisons with the exact Q~
ROWS, COLUMNS = np.triu_indices(4)  # of the products in features


@dataclass
class Args:
    output: str = "theory/lqr.png"  # the picture to write
    seeds: int = 10  # independent runs of each method
    seed: int = 1  # seed of everything random
    updates: int = 4_000  # updates of critic and policy
    learning_starts: int = 500  # first updates, in which the policy stands still
    batch_size: int = 256  # transitions of each update, one from each chain
    gain_lr: float = 5e-3  # learning rate of K, by gradient ascent
    factor_lr: float = 3e-4  # learning rate of L, by gradient ascent
    forgetting: float = 0.05  # rate at which the least-squares fit forgets old batches
    tau: float = 0.5  # rate of the Polyak averages of the critic's weights
    action_range: float = 4.0  # uniform behaviour draws from [-range, range] in each dimension
    max_weight: float = 50.0  # cap on the weights of (18)
    samples: int = 8  # samples in each average of (17)


def state_value(K, covariance):
    """Return P (2, 2) and c of V(s) = -s^T P s - c, the value of the policy N(K s, covariance)."""
    P = solve_discrete_lyapunov(GAMMA**0.5 * (A + B @ K).T, C + K.T @ D @ K)
    return P, (np.trace((D + GAMMA * B.T @ P @ B) @ covariance) + GAMMA * np.trace(P @ W)) / (1 - GAMMA)


def action_value(K, covariance):
    """Return H (4, 4) and q of Q(s, a) = x^T H x + q (3)."""
    (P, c), AB = state_value(K, covariance), np.hstack([A, B])
    return -block_diag(C, D) - GAMMA * AB.T @ P @ AB, -GAMMA * (np.trace(P @ W) + c)


def smoothed_action_value(K, covariance):
    """Return H (4, 4) and q of Q~(s, a) = x^T H x + q (9)."""
    H, q = action_value(K, covariance)
    return H, q + np.trace(H[2:, 2:] @ covariance)


def visitation(K, covariance):
    """Return X = sum_t gamma^t E[s_t s_t^T] (2, 2): the states' second moment under rho^pi, whose mass is 1 / (1 - gamma)."""
    return solve_discrete_lyapunov(GAMMA**0.5 * (A + B @ K), S + GAMMA / (1 - GAMMA) * (B @ covariance @ B.T + W))


def expected_return(K, covariance):
    """Return J, the O_ER of (2)."""
    P, c = state_value(K, covariance)
    return -np.trace(P @ S) - c


def gradients(K, covariance):
    """Return dJ/dK by (13) and dJ/dSigma by (14) and (15), (2, 2) each."""
    H, _ = smoothed_action_value(K, covariance)
    return 2 * (H[2:, 2:] @ K + H[2:, :2]) @ visitation(K, covariance), 0.5 * (2 * H[2:, 2:]) / (1 - GAMMA)


def best_gain():
    """Return the K that maximises J, whatever the covariance."""
    P = solve_discrete_are(GAMMA**0.5 * A, GAMMA**0.5 * B, C, D)
    return -np.linalg.solve(D + GAMMA * B.T @ P @ B, GAMMA * B.T @ P @ A)


def features(s, a):
    """Return the products x_i x_j of x = (s, a) and a constant, (..., 11). They span the compatible critics (22)."""
    x = np.concatenate([s, a], -1)
    return np.concatenate([x[..., ROWS] * x[..., COLUMNS], np.ones_like(x[..., :1])], -1)


def unpack(w):
    """Return H (..., 4, 4) and q (...) with features(s, a) . w = x^T H x + q."""
    H = np.zeros((*w.shape[:-1], 4, 4))
    H[..., ROWS, COLUMNS] = w[..., :-1]
    return (H + np.swapaxes(H, -1, -2)) / 2, w[..., -1]


class Critic:
    """One least-squares fit for each seed: w (seeds, 11), and its Polyak average, lagged."""

    def __init__(self, args):
        self.args, self.w, self.lagged = args, np.zeros((args.seeds, 11)), np.zeros((args.seeds, 11))
        self.moments, self.products = np.tile(1e-6 * np.eye(11), (args.seeds, 1, 1)), np.zeros((args.seeds, 11, 1))

    def __call__(self, w, s, a):
        """Return the values (seeds, batch) that the weights w give to s and a (seeds, batch, 2)."""
        return (features(s, a) @ w[:, :, None])[:, :, 0]

    def fit(self, s, a, y, weights=1.0):
        """Add the batch s, a (seeds, batch, 2) with its targets y and weights (seeds, batch) to the fit, and solve it."""
        x, weights = features(s, a), np.broadcast_to(weights, y.shape)
        scaled = np.swapaxes(x * (weights / weights.sum(1, keepdims=True))[:, :, None], 1, 2)
        self.moments += self.args.forgetting * (scaled @ x - self.moments)
        self.products += self.args.forgetting * (scaled @ y[:, :, None] - self.products)
        self.w = np.linalg.solve(self.moments, self.products)[:, :, 0]
        self.lagged += self.args.tau * (self.w - self.lagged)


# Updates of the critics; each returns the weights of Q~ for the policy's update. b holds s, a, r, next_s and the policy's means
# at s and next_s (seeds, batch, ...), its covariance (seeds, 2, 2), and noise() ~ N(0, Sigma).


def phantom(args, b, qf, weights=1.0, offset=None):
    """Q~ by (18) at phantom actions a = a~ + offset ~ N(a~, Sigma), without weights unless they are given."""
    qf.fit(b.s, b.a + (b.noise() if offset is None else offset), b.r + GAMMA * qf(qf.lagged, b.next_s, b.next_mean), weights)
    return qf.w


def log_density(b, a):
    """Return the logarithm of the policy's density at a (seeds, batch), up to a constant."""
    d = a - b.mean
    return -0.5 * (d @ np.linalg.inv(b.covariance) * d).sum(2)


def weighted(args, b, qf):
    """(18) with the weights 1/q of an on-policy buffer. Without a cap neither their mean nor their variance is finite."""
    return phantom(args, b, qf, np.minimum(np.exp(-log_density(b, b.a)), args.max_weight))


def ratio_weighted(args, b, qf):
    """(18) with the weights q(a)/q(a~), which have the same optimum as 1/q(a~): see weights.py."""
    offset = b.noise()
    weights = np.exp(log_density(b, b.a + offset) - log_density(b, b.a))
    return phantom(args, b, qf, np.minimum(weights, args.max_weight), offset)


def first_route(args, b, smoothed_qf, qf):
    """Q by (16) with a' ~ N(mu(s'), Sigma), then Q~ by (17) on averages of Q over several samples."""
    qf.fit(b.s, b.a, b.r + GAMMA * qf(qf.lagged, b.next_s, b.next_mean + b.noise()))
    smoothed_qf.fit(b.s, b.a, np.mean([qf(qf.w, b.s, b.a + b.noise()) for _ in range(args.samples)], 0))
    return smoothed_qf.w


def closed_form(args, b, qf):
    """Q by (11); its average over the policy is Q~ = Q + tr(H_aa Sigma), both in the target and for the policy's update."""

    def smooth(w):
        shift = np.trace(unpack(w)[0][:, 2:, 2:] @ b.covariance, axis1=1, axis2=2)
        return w + shift[:, None] * np.eye(11)[-1]

    qf.fit(b.s, b.a, b.r + GAMMA * qf(smooth(qf.lagged), b.next_s, b.next_mean))
    return smooth(qf.w)


def ddpg(args, b, qf):
    """Q of the deterministic policy by (8): (18) with Sigma = 0."""
    return phantom(args, b, qf, offset=0.0)


METHODS = {  # the update of the critics, their number, uniform behaviour, learned covariance, colour
    "Smoothie, phantom actions, uniform behaviour": (phantom, 1, True, True, "#56B4E9"),
    "Smoothie, phantom actions": (phantom, 1, False, True, "#E69F00"),
    "Smoothie, phantom actions, weights 1/q(ã)": (weighted, 1, False, True, "#CC79A7"),
    "Smoothie, phantom actions, weights q(a)/q(ã)": (ratio_weighted, 1, False, True, "#8C564B"),
    "Smoothie, first route": (first_route, 2, False, True, "#009E73"),
    "Smoothie, closed form": (closed_form, 1, False, True, "#0072B2"),
    "DDPG": (ddpg, 1, False, False, "#D55E00"),
}


def gradient_flow(args):
    """Return the exact paths of K and L, (updates, 2, 2) each."""
    K, L, path = GAIN_INIT, FACTOR_INIT, []
    for update in range(args.updates):
        path.append((K, L))
        if update >= args.learning_starts:
            in_gain, in_covariance = gradients(K, L @ L.T)
            K, L = K + args.gain_lr * (1 - GAMMA) * in_gain, L + args.factor_lr * (1 - GAMMA) * 2 * in_covariance @ L
    return map(np.array, zip(*path, strict=True))


def train(args, update_critics, count, uniform, learn_covariance):
    """Return the paths of K, L and the weights of Q~, (updates, seeds, ...) each."""
    rng, shape = np.random.default_rng(args.seed), (args.seeds, args.batch_size, 2)
    critics = [Critic(args) for _ in range(count)]
    K, L = np.tile(GAIN_INIT, (args.seeds, 1, 1)), np.tile(FACTOR_INIT, (args.seeds, 1, 1))

    def draw(factor):
        return rng.standard_normal(shape) @ np.swapaxes(factor, -1, -2)

    s, path = draw(np.linalg.cholesky(S)), []
    for update in range(args.updates):
        mean = s @ K.swapaxes(1, 2)
        chosen = mean + draw(L)
        a = rng.uniform(-args.action_range, args.action_range, shape) if uniform else chosen
        r = -(s @ C * s).sum(2) - (a @ D * a).sum(2)
        next_s, follow = (s @ A.T + x @ B.T + draw(np.linalg.cholesky(W)) for x in (a, chosen))
        b = SimpleNamespace(s=s, a=a, r=r, next_s=next_s, mean=mean, next_mean=next_s @ K.swapaxes(1, 2))
        b.covariance, b.noise = L @ L.swapaxes(1, 2), lambda L=L: draw(L)
        w = update_critics(args, b, *critics)
        path.append((K, L, w))
        if update >= args.learning_starts:
            H = unpack(w)[0][:, 2:]
            in_gain = 2 * (H[:, :, 2:] @ K + H[:, :, :2]) @ (s.swapaxes(1, 2) @ s) / args.batch_size  # (13)
            K, L = K + args.gain_lr * in_gain, L + args.factor_lr * 2 * H[:, :, 2:] @ L * learn_covariance  # (15)
        s = np.where(rng.random(shape[:2])[:, :, None] > GAMMA, draw(np.linalg.cholesky(S)), follow)
    return tuple(map(np.array, zip(*path, strict=True)))


def compare(args, path):
    """Return the error of Q~_w (updates / 25, seeds), the root mean square at s ~ N(0, S), a ~ pi(.|s) divided by the deviation
    of Q~ there, and the learned gradient and Hessian as multiples of the exact ones before the policy moves (2, seeds)."""
    rng = np.random.default_rng(0)
    s, noise = rng.standard_normal((256, 2)) @ np.linalg.cholesky(S).T, rng.standard_normal((256, 2))
    error, multiples = np.empty((len(path[0][::EVERY]), args.seeds)), np.empty((2, args.seeds))
    for i, seed in np.ndindex(error.shape):
        K, L, w = (x[i * EVERY, seed] for x in path)
        (H, q), (learned_H, learned_q) = smoothed_action_value(K, L @ L.T), unpack(w)
        x = np.hstack([s, s @ K.T + noise @ L.T])
        exact = (x @ H * x).sum(1) + q
        error[i, seed] = np.sqrt(np.mean(((x @ learned_H * x).sum(1) + learned_q - exact) ** 2)) / exact.std()
        if i == args.learning_starts // EVERY:
            ends = np.vstack([np.eye(2), K]), np.eye(4)[:, 2:]
            multiples[:, seed] = [np.sum((learned_H @ x)[2:] * (H @ x)[2:]) / np.sum((H @ x)[2:] ** 2) for x in ends]
    return error, multiples


def plot(curves, args):
    """Draw the error of Q~, the distance of the gain from the best and the covariance over training; medians over seeds."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, (*ys, style) in curves.items():
        for axis, y, every in zip(axes, ys, (EVERY, 1, 1), strict=True):
            axis.plot(np.arange(len(y)) * every, y, label=name, linewidth=1.4, **style)
            axis.set(xlabel="update", xlim=(0, args.updates))
    axes[0].set(ylabel="error of Q̃, relative to its deviation", yscale="log", ylim=(0.03, 8))
    axes[1].set(ylabel="|K - K*| / |K*|", yscale="log", ylim=(0.003, 1.5))
    axes[2].set(ylabel="σ: root mean variance of the policy", ylim=(0, None))
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(args.output, dpi=90)


def check(args):
    """Exit with an error message if a flag is out of range or NaN, or if the picture cannot be written."""
    limits = {"seed": (0, 2**31), "learning_starts": (0, args.updates - 1), "forgetting": (1e-9, 1), "tau": (1e-9, 1)}
    for name, value in asdict(args).items():
        low, high = limits.get(name, (1 if type(value) is int else 0, 1e9))
        if type(value) in (int, float) and not low <= value <= high:
            sys.exit(f"--{name.replace('_', '-')} {value}: must lie between {low:g} and {high:g}")
    if not (args.output.endswith(".png") and Path(args.output).parent.is_dir()):
        sys.exit(f"--output {args.output}: must be a .png file in a folder that exists")


def main(args):
    check(args)
    best, (flow_K, flow_L) = best_gain(), gradient_flow(args)
    norm, flow = (lambda x: np.linalg.norm(x, axis=(-2, -1))), flow_L @ flow_L.swapaxes(1, 2)
    style = {"color": "black", "linestyle": "--", "zorder": 3}
    curves = {"exact gradient flow": ([], norm(flow_K - best) / norm(best), norm(flow_L) / 2**0.5, style)}
    print("| method | error of Q̃ | gradient, times the exact | Hessian, times the exact | final gain error | Σ from the flow |")
    print("|---|---|---|---|---|---|")
    for name, (*method, color) in METHODS.items():
        K, L, _ = path = train(args, *method)
        error, multiples = compare(args, path)
        gain = norm(K - best) / norm(best)
        off = norm(L @ L.swapaxes(2, 3) - flow[:, None]) / norm(flow[0])
        cells = (np.median(error[args.learning_starts // EVERY :]), *np.median(multiples, 1), np.median(gain[-1]))
        print("| {} | {:.0%} | {:.2f} | {:.2f} | {:.1%} | {:.1%} |".format(name, *cells, np.median(off.mean(0))), flush=True)
        curves[name] = *(np.median(y, 1) for y in (error, gain, norm(L) / 2**0.5)), {"color": color}
    plot(curves, args)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    try:
        with np.errstate(over="raise", invalid="raise"):
            main(args)
    except OSError as error:
        sys.exit(f"cannot write: {error}")
    except (ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
        sys.exit(f"training has diverged ({error}); a lower --gain-lr or --factor-lr may help")
