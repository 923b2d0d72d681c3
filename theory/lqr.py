"""Ground truth with dynamics: the routes to Q~ and DDPG on a linear-quadratic regulator (LQR).

    s' = A s + B a + N(0, W)          s_0 ~ N(0, S)
    r = -s^T C s - a^T D a            pi(.|s) = N(K s, Sigma)

Everything in the paper is known exactly here. With x = (s, a), F = A + B K, discount gamma and
P = C + K^T D K + gamma F^T P F (Lyapunov),

    Q(s, a) = x^T H x + q         H = -blkdiag(C, D) - gamma [A B]^T P [A B]       (3), (11)
    Q~(s, a) = Q(s, a) + tr(H_aa Sigma)                                            (9), (12)
    dJ/dK = 2 (H_aa K + H_as) X   X = sum_t gamma^t E[s_t s_t^T] (Lyapunov)        (13)
    dJ/dSigma = H_aa / (1 - gamma)                                                 (14), (15)

so the best covariance is 0; the best gain solves a Riccati equation. Sigma = L L^T is a full
matrix. The exact gradient flow is

    K <- K + gain_lr (1 - gamma) dJ/dK
    L <- L + factor_lr (1 - gamma) 2 dJ/dSigma L

Critics are least-squares fits of quadratic features that forget old batches, with targets from
lagged weights. States come from chains that follow the policy and restart with probability
1 - gamma, so they are distributed as in J. Where the behaviour is wider or uniform, the critic
learns from such an action at each state; the policy's action still moves the chain.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import tyro
from matplotlib.figure import Figure
from scipy.linalg import block_diag, solve_discrete_are, solve_discrete_lyapunov

A = np.array([[0.9, 0.3], [-0.2, 0.9]])
B = np.array([[0.4, 0.0], [0.1, 0.3]])
C = np.array([[1.0, 0.2], [0.2, 0.5]])
D = np.array([[0.5, 0.1], [0.1, 0.4]])
W = 0.05 * np.eye(2)
S = np.eye(2)
GAMMA = 0.9
GAIN_INIT = np.zeros((2, 2))
FACTOR_INIT = np.array([[1.0, 0.0], [-0.4, 0.8]])
EVERY = 25  # updates between two comparisons with the exact Q~
ROWS, COLUMNS = np.triu_indices(4)  # of the products in features


@dataclass
class Args:
    output: str = "lqr.png"  # the picture to write
    seeds: int = 10  # independent runs of each method
    seed: int = 1  # seed of everything random
    updates: int = 4_000  # updates of critic and policy
    learning_starts: int = 500  # first updates, in which the policy stands still
    batch_size: int = 256  # transitions of each update, one from each chain
    gain_lr: float = 5e-3  # learning rate of K, by gradient ascent
    factor_lr: float = 3e-4  # learning rate of L, by gradient ascent
    forgetting: float = 0.05  # rate at which the least-squares fit forgets old batches
    tau: float = 0.5  # rate of the Polyak averages of the critic's weights
    behaviour_scale: float = 1.5  # c: std of the wider behaviour, over the policy's
    action_range: float = 4.0  # uniform behaviour draws from [-range, range] in each dimension
    max_weight: float = 50.0  # cap on the weights of (18)
    samples: int = 8  # samples in each average of (17)


# What is known exactly.


def state_value(K, covariance):
    """Return P (2, 2) and c of V(s) = -s^T P s - c, the value of the policy N(K s, covariance)."""
    F = A + B @ K
    P = solve_discrete_lyapunov(GAMMA**0.5 * F.T, C + K.T @ D @ K)
    action_cost = np.trace((D + GAMMA * B.T @ P @ B) @ covariance)
    noise_cost = GAMMA * np.trace(P @ W)
    return P, (action_cost + noise_cost) / (1 - GAMMA)


def action_value(K, covariance):
    """Return H (4, 4) and q of Q(s, a) = x^T H x + q (3)."""
    P, c = state_value(K, covariance)
    AB = np.hstack([A, B])
    H = -block_diag(C, D) - GAMMA * AB.T @ P @ AB
    return H, -GAMMA * (np.trace(P @ W) + c)


def smoothed_action_value(K, covariance):
    """Return H (4, 4) and q of Q~(s, a) = x^T H x + q (9)."""
    H, q = action_value(K, covariance)
    return H, q + np.trace(H[2:, 2:] @ covariance)


def visitation(K, covariance):
    """Return X = sum_t gamma^t E[s_t s_t^T] (2, 2).

    This is the second moment of the states under rho^pi, whose mass is 1 / (1 - gamma).
    """
    noise = B @ covariance @ B.T + W
    return solve_discrete_lyapunov(GAMMA**0.5 * (A + B @ K), S + GAMMA / (1 - GAMMA) * noise)


def expected_return(K, covariance):
    """Return J, the O_ER of (2)."""
    P, c = state_value(K, covariance)
    return -np.trace(P @ S) - c


def gradients(K, covariance):
    """Return dJ/dK by (13) and dJ/dSigma by (14) and (15), (2, 2) each."""
    H, _ = smoothed_action_value(K, covariance)
    in_gain = 2 * (H[2:, 2:] @ K + H[2:, :2]) @ visitation(K, covariance)
    hessian = 2 * H[2:, 2:]
    return in_gain, 0.5 * hessian / (1 - GAMMA)


def best_gain():
    """Return the K that maximises J, whatever the covariance."""
    P = solve_discrete_are(GAMMA**0.5 * A, GAMMA**0.5 * B, C, D)
    return -np.linalg.solve(D + GAMMA * B.T @ P @ B, GAMMA * B.T @ P @ A)


def gradient_flow(args):
    """Return the exact paths of K and L, (updates, 2, 2) each."""
    K = GAIN_INIT
    L = FACTOR_INIT
    gains = []
    factors = []
    for update in range(args.updates):
        gains.append(K)
        factors.append(L)
        if update >= args.learning_starts:
            in_gain, in_covariance = gradients(K, L @ L.T)
            K = K + args.gain_lr * (1 - GAMMA) * in_gain
            L = L + args.factor_lr * (1 - GAMMA) * 2 * in_covariance @ L
    return np.array(gains), np.array(factors)


# Least-squares critics.


def features(s, a):
    """Return the products x_i x_j of x = (s, a) and a constant, (..., 11).

    They span the compatible critics (22).
    """
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
        self.args = args
        self.w = np.zeros((args.seeds, 11))
        self.lagged = np.zeros((args.seeds, 11))
        self.moments = np.tile(1e-6 * np.eye(11), (args.seeds, 1, 1))
        self.products = np.zeros((args.seeds, 11, 1))

    def __call__(self, w, s, a):
        """Return the values (seeds, batch) that the weights w give to s and a."""
        return (features(s, a) @ w[:, :, None])[:, :, 0]

    def fit(self, s, a, y, weights=1.0):
        """Add s and a (seeds, batch, 2), targets y and weights (seeds, batch); solve the fit."""
        x = features(s, a)
        weights = np.broadcast_to(weights, y.shape)
        shares = weights / weights.sum(1, keepdims=True)
        scaled = np.swapaxes(x * shares[:, :, None], 1, 2)
        self.moments += self.args.forgetting * (scaled @ x - self.moments)
        self.products += self.args.forgetting * (scaled @ y[:, :, None] - self.products)
        self.w = np.linalg.solve(self.moments, self.products)[:, :, 0]
        self.lagged += self.args.tau * (self.w - self.lagged)


# Updates of the critics; each returns the weights of Q~ for the policy's update. b holds s, the
# action a taken, r and next_s, the policy's mean and next_mean at s and next_s (seeds, batch, ...),
# the policy's covariance and that of the behaviour, (seeds, 2, 2) each, noise(), which draws from
# N(0, Sigma), and draw(factor), which draws from N(0, factor factor^T).


def fit_smoothed(b, qf, a, weights=1.0):
    """Fit Q~ at the actions a to what was observed after b.a: (18)."""
    y = b.r + GAMMA * qf(qf.lagged, b.next_s, b.next_mean)
    qf.fit(b.s, a, y, weights)
    return qf.w


def phantom(args, b, qf):
    """(18) at phantom actions a ~ N(a~, Sigma), without weights."""
    return fit_smoothed(b, qf, b.a + b.noise())


def log_density(b, a):
    """Return the logarithm of the policy's density at a (seeds, batch), up to a constant."""
    d = a - b.mean
    return -0.5 * (d @ np.linalg.inv(b.covariance) * d).sum(2)


def weighted(args, b, qf):
    """(18) with the weights 1/q of an on-policy buffer.

    Without a cap neither their mean nor their variance is finite.
    """
    weights = np.exp(-log_density(b, b.a))
    return fit_smoothed(b, qf, b.a + b.noise(), np.minimum(weights, args.max_weight))


def ratio_weighted(args, b, qf):
    """(18) with the weights q(a)/q(a~), which have the same optimum as 1/q(a~): see weights.py."""
    a = b.a + b.noise()
    weights = np.exp(log_density(b, a) - log_density(b, b.a))
    return fit_smoothed(b, qf, a, np.minimum(weights, args.max_weight))


def square_root(matrix):
    """Return R (..., 2, 2) with R R^T = matrix, which may be singular."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0))[..., None, :]


def exact_phantom(args, b, qf):
    """(18) at exact phantom actions, a given a~: see README.

    a ~ N(m + R (a~ - m), R Sigma), R = I - Sigma B^-1, where the behaviour is a~ ~ N(m, B).
    """
    rest = np.eye(2) - b.covariance @ np.linalg.inv(b.behaviour_covariance)
    center = b.mean + (b.a - b.mean) @ rest.swapaxes(1, 2)
    return fit_smoothed(b, qf, center + b.draw(square_root(rest @ b.covariance)))


def first_route(args, b, smoothed_qf, qf):
    """Q by (16) with a' ~ N(mu(s'), Sigma), then Q~ by (17) on averages of Q over samples."""
    qf.fit(b.s, b.a, b.r + GAMMA * qf(qf.lagged, b.next_s, b.next_mean + b.noise()))
    samples = [qf(qf.w, b.s, b.a + b.noise()) for _ in range(args.samples)]
    smoothed_qf.fit(b.s, b.a, np.mean(samples, 0))
    return smoothed_qf.w


def closed_form(args, b, qf):
    """Q by (11). Its average over the policy is Q~ = Q + tr(H_aa Sigma)."""

    def smooth(w):
        H, _ = unpack(w)
        shift = np.trace(H[:, 2:, 2:] @ b.covariance, axis1=1, axis2=2)
        return w + shift[:, None] * np.eye(11)[-1]

    qf.fit(b.s, b.a, b.r + GAMMA * qf(smooth(qf.lagged), b.next_s, b.next_mean))
    return smooth(qf.w)


def ddpg(args, b, qf):
    """Q of the deterministic policy by (8): (18) with Sigma = 0."""
    return fit_smoothed(b, qf, b.a)


@dataclass
class Method:
    update: Callable  # of the critics
    color: str
    critics: int = 1
    wider: bool = False  # whether the behaviour has c times the policy's std
    uniform: bool = False  # whether the behaviour is uniform
    learn_covariance: bool = True


METHODS = {
    "Smoothie, phantom actions, uniform behaviour": Method(phantom, "#56B4E9", uniform=True),
    "Smoothie, phantom actions": Method(phantom, "#E69F00"),
    "Smoothie, phantom actions, wider behaviour": Method(phantom, "#999999", wider=True),
    "Smoothie, exact phantom actions": Method(exact_phantom, "#7030A0", wider=True),
    "Smoothie, phantom actions, weights 1/q(ã)": Method(weighted, "#CC79A7"),
    "Smoothie, phantom actions, weights q(a)/q(ã)": Method(ratio_weighted, "#8C564B"),
    "Smoothie, first route": Method(first_route, "#009E73", critics=2),
    "Smoothie, closed form": Method(closed_form, "#0072B2"),
    "DDPG": Method(ddpg, "#D55E00", learn_covariance=False),
}


def train(args, method):
    """Return the paths of K, L and the weights of Q~, (updates, seeds, ...) each."""
    rng = np.random.default_rng(args.seed)
    shape = (args.seeds, args.batch_size, 2)
    scale = args.behaviour_scale if method.wider else 1.0
    critics = [Critic(args) for _ in range(method.critics)]
    K = np.tile(GAIN_INIT, (args.seeds, 1, 1))
    L = np.tile(FACTOR_INIT, (args.seeds, 1, 1))
    gains = []
    factors = []
    weights = []

    def draw(factor):
        return rng.standard_normal(shape) @ np.swapaxes(factor, -1, -2)

    s = draw(np.linalg.cholesky(S))
    for update in range(args.updates):
        # Act: the critic sees a, the chain follows the policy.
        mean = s @ K.swapaxes(1, 2)
        noise = draw(L)
        chosen = mean + noise
        a = mean + scale * noise
        if method.uniform:
            a = rng.uniform(-args.action_range, args.action_range, shape)
        r = -(s @ C * s).sum(2) - (a @ D * a).sum(2)
        next_s = s @ A.T + a @ B.T + draw(np.linalg.cholesky(W))
        follow = s @ A.T + chosen @ B.T + draw(np.linalg.cholesky(W))

        # Update the critics.
        b = SimpleNamespace(s=s, a=a, r=r, next_s=next_s, mean=mean, draw=draw)
        b.next_mean = next_s @ K.swapaxes(1, 2)
        b.covariance = L @ L.swapaxes(1, 2)
        b.behaviour_covariance = scale**2 * b.covariance
        b.noise = lambda L=L: draw(L)
        w = method.update(args, b, *critics)
        gains.append(K)
        factors.append(L)
        weights.append(w)

        # Update the policy by (13) and (15).
        if update >= args.learning_starts:
            H = unpack(w)[0][:, 2:]
            moment = s.swapaxes(1, 2) @ s / args.batch_size
            K = K + args.gain_lr * 2 * (H[:, :, 2:] @ K + H[:, :, :2]) @ moment
            if method.learn_covariance:
                L = L + args.factor_lr * 2 * H[:, :, 2:] @ L

        restart = rng.random(shape[:2])[:, :, None] > GAMMA
        s = np.where(restart, draw(np.linalg.cholesky(S)), follow)
    return np.array(gains), np.array(factors), np.array(weights)


def compare(args, path):
    """Return the error of Q~_w (updates / 25, seeds) and the multiples (2, seeds).

    The error is the root mean square at s ~ N(0, S), a ~ pi(.|s), divided by the deviation of Q~
    there. The multiples are the learned gradient and Hessian over the exact ones, before the
    policy moves.
    """
    rng = np.random.default_rng(0)
    s = rng.standard_normal((256, 2)) @ np.linalg.cholesky(S).T
    noise = rng.standard_normal((256, 2))
    error = np.empty((len(path[0][::EVERY]), args.seeds))
    multiples = np.empty((2, args.seeds))
    for i, seed in np.ndindex(error.shape):
        K, L, w = (x[i * EVERY, seed] for x in path)
        H, q = smoothed_action_value(K, L @ L.T)
        learned_H, learned_q = unpack(w)
        x = np.hstack([s, s @ K.T + noise @ L.T])
        exact = (x @ H * x).sum(1) + q
        learned = (x @ learned_H * x).sum(1) + learned_q
        error[i, seed] = np.sqrt(np.mean((learned - exact) ** 2)) / exact.std()
        if i == args.learning_starts // EVERY:
            at_mean = np.vstack([np.eye(2), K])  # (H at_mean)_a s is half the gradient at a = K s
            action = np.eye(4)[:, 2:]  # (H action)_a is half the Hessian
            for row, x in enumerate([at_mean, action]):
                exact = (H @ x)[2:]
                learned = (learned_H @ x)[2:]
                multiples[row, seed] = np.sum(learned * exact) / np.sum(exact**2)
    return error, multiples


def plot(curves, args):
    """Draw the error of Q~, the distance of the gain from the best and the covariance."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, (*ys, style) in curves.items():
        for axis, y, every in zip(axes, ys, (EVERY, 1, 1), strict=True):
            axis.plot(np.arange(len(y)) * every, y, label=name, linewidth=1.4, **style)
            axis.set(xlabel="update", xlim=(0, args.updates))
    axes[0].set(ylabel="error of Q̃, relative to its deviation", yscale="log", ylim=(0.03, 8))
    axes[1].set(ylabel="|K - K*| / |K*|", yscale="log", ylim=(0.003, 1.5))
    axes[2].set(ylabel="σ: root mean variance of the policy", ylim=(0, None))
    handles, labels = axes[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(args.output, dpi=80)


def norm(x):
    """Return the Frobenius norm of matrices (..., 2, 2)."""
    return np.linalg.norm(x, axis=(-2, -1))


def main(args):
    best = best_gain()
    flow_K, flow_L = gradient_flow(args)
    flow = flow_L @ flow_L.swapaxes(1, 2)
    style = {"color": "black", "linestyle": "--", "zorder": 3}
    curves = {
        "exact gradient flow": ([], norm(flow_K - best) / norm(best), norm(flow_L) / 2**0.5, style)
    }
    print(
        "| method | error of Q̃ | gradient / exact | Hessian / exact "
        "| final gain error | error of Σ |"
    )
    print("|---|---|---|---|---|---|")
    for name, method in METHODS.items():
        path = train(args, method)
        K, L, _ = path
        error, multiples = compare(args, path)
        gain = norm(K - best) / norm(best)
        off = norm(L @ L.swapaxes(2, 3) - flow[:, None]) / norm(flow[0])
        gradient, hessian = np.median(multiples, 1)
        print(
            f"| {name} | {np.median(error[args.learning_starts // EVERY :]):.0%} "
            f"| {gradient:.2f} | {hessian:.2f} | {np.median(gain[-1]):.1%} "
            f"| {np.median(off.mean(0)):.1%} |",
            flush=True,
        )
        ys = (error, gain, norm(L) / 2**0.5)
        curves[name] = *(np.median(y, 1) for y in ys), {"color": method.color}
    plot(curves, args)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    with np.errstate(over="raise", invalid="raise"):  # training that diverges ends in an error
        main(args)
