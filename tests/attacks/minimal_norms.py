"""Models whose minimal adversarial perturbations are known exactly: what minimal-norm attacks are held against.

A piecewise linear net is linear on every activation pattern, so its smallest adversarial perturbation is the least of
one small convex program for each pattern and class. `setting = linear(...)` or `relu(...)`, then `check(...)`:

    check(partial(attacks.fmn, num_steps=200), linear(num_classes=3, has_box=True), "l2", at_most=1.02)

where the first argument is called as `attack(key, logits_fn, x, labels, ball=...)`, with a goal only where targets are
given; a deterministic attack is wrapped by `keyless`.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from scipy.optimize import linprog, nnls

from rdx import goals, losses, norms
from rdx.balls import Ball

# Of the negative side of rectifiers: where all of plain ones are off there is no gradient, and every attack is lost.
_SLOPE = 0.2


class Setting(NamedTuple):
    """A net `h(x A + a) B + b`, leaky rectifiers `h` (or `x B + b`), inputs that it labels, and the box around them."""

    model: Partial
    x: jax.Array
    labels: jax.Array
    low: float
    high: float

    def ball(self, norm, eps=jnp.inf):
        return Ball(norm, eps, self.low, self.high)

    @property
    def targets(self):
        """The next class: wanted where an attack is targeted."""
        return (self.labels + 1) % self.model.args[0][-1].shape[0]

    def optimum(self, norm, targets=None):
        """Computes the norm of each example's smallest adversarial perturbation in the box, in float64."""
        layers = [np.asarray(leaf, np.float64) for leaf in self.model.args[0]]
        x, labels = np.asarray(self.x, np.float64), np.asarray(self.labels)
        wanted = [None] * len(x) if targets is None else np.asarray(targets)
        return np.array([
            min(
                least_norm(rows, bounds, self.low - point, self.high - point, norm)
                for rows, bounds in _programs(layers, point, label, target)
            )
            for point, label, target in zip(x, labels, wanted, strict=True)
        ])


def linear(*, num_classes=3, has_box=False, dim=12, num=6, seed=0):
    """Builds a linear classifier; with a box, many inputs lie at its edges, where it holds the perturbation back."""
    keys = jax.random.split(jax.random.key(seed), 3)
    weights = jax.random.normal(keys[0], (dim, num_classes))
    bias = -0.5 * weights.sum(axis=0) + 0.1 * jax.random.normal(keys[1], (num_classes,))
    return _setting((weights, bias), jax.random.uniform(keys[2], (2 * num, dim)), has_box)


def relu(*, num_classes=3, has_box=True, dim=3, hidden=5, num=6, seed=0):
    """Builds a net with one hidden layer, in a dimension so low that every activation pattern can be tried."""
    keys = jax.random.split(jax.random.key(seed), 5)
    first, second = jax.random.normal(keys[0], (dim, hidden)), jax.random.normal(keys[1], (hidden, num_classes))
    shift = -0.5 * first.sum(axis=0) + 0.3 * jax.random.normal(keys[2], (hidden,))
    parameters = first, shift, second, 0.1 * jax.random.normal(keys[3], (num_classes,))
    return _setting(parameters, jax.random.uniform(keys[4], (2 * num, dim)), has_box)


def keyless(attack):
    """Gives a deterministic attack the signature of a random one."""
    return lambda key, *args, **options: attack(*args, **options)


def check(attack, setting, norm, *, at_most, targets=None, at_least=1 - 1e-4, key=None):
    """Runs an attack without a radius and asserts what every minimal-norm attack owes; returns the ratios `[B]`.

    Args:
        attack: `(key, logits_fn, x, labels, *, ball) -> AttackResult`, and with `goal` for targets.
        setting: from `linear` or `relu`.
        norm: the ball's norm.
        at_most: bound of the average ratio of the distance found to the true minimal norm.
        targets: wanted labels, shape `[B]`, for a targeted goal.
        at_least: bound of every single ratio; below 1 for float32 only, since nothing can beat the optimum.
        key: of a random attack.
    """
    key = jax.random.key(0) if key is None else key
    options = {} if targets is None else {"goal": goals.target(targets, losses.targeted_margin)}
    found = attack(key, setting.model, setting.x, setting.labels, ball=setting.ball(norm), **options)
    predicted = setting.model(found.x_adv).argmax(axis=1)
    assert found.success.all()
    assert (predicted != setting.labels if targets is None else predicted == targets).all()
    assert ((found.x_adv >= setting.low) & (found.x_adv <= setting.high)).all()
    np.testing.assert_allclose(found.distance, norms.norm(found.x_adv - setting.x, norm), rtol=1e-5)
    ratios = np.asarray(found.distance) / setting.optimum(norm, targets)
    assert ratios.min() >= at_least, ratios
    assert ratios.mean() <= at_most, ratios
    return ratios


def least_norm(rows, bounds, low, high, norm):
    """Computes `min ||d||` subject to `rows @ d >= bounds` and `low <= d <= high`; infinite where nothing fits.

    l2 is Lawson & Hanson's least distance program (1974, ch. 23), solved by non-negative least squares; l1 and linf are
    linear programs.

    Args:
        rows: shape `[m, D]`.
        bounds: shape `[m]`.
        low: shape `[D]`, may be infinite.
        high: shape `[D]`, may be infinite.
        norm: "l2", "l1" or "linf".
    """
    dim = rows.shape[1]
    identity, low, high = np.eye(dim), np.broadcast_to(low, dim), np.broadcast_to(high, dim)
    rows = np.concatenate([rows, identity[np.isfinite(low)], -identity[np.isfinite(high)]])
    bounds = np.concatenate([bounds, low[np.isfinite(low)], -high[np.isfinite(high)]])
    if norm == "l2":
        system = np.concatenate([rows.T, bounds[None]])
        goal = np.append(np.zeros(dim), 1.0)
        residual = system @ nnls(system, goal)[0] - goal
        return np.linalg.norm(residual[:-1] / residual[-1]) if abs(residual[-1]) > 1e-9 else np.inf
    size = dim if norm == "l1" else 1
    # Variables (d, t) with |d| <= t; the sum of t is minimised.
    spread = np.eye(dim) if norm == "l1" else np.ones((dim, 1))
    constraints = np.block([[-rows, np.zeros((len(rows), size))], [identity, -spread], [-identity, -spread]])
    cost = np.append(np.zeros(dim), np.ones(size))
    free = [(None, None)] * (dim + size)
    found = linprog(cost, constraints, np.concatenate([-bounds, np.zeros(2 * dim)]), bounds=free)
    return found.fun if found.status == 0 else np.inf


def _setting(parameters, draw, has_box):
    low, high = (0.0, 1.0) if has_box else (-jnp.inf, jnp.inf)
    model = Partial(_affine if len(parameters) == 2 else _one_hidden_layer, parameters)
    x = jnp.clip(1.4 * draw - 0.2, 0.0, 1.0)
    # The half that is farther from the decision boundary: ratios of distances near 0 tell nothing.
    logits = model(x)
    margins = losses.margin(logits, logits.argmax(axis=1))
    x = x[jnp.argsort(margins)[:len(x) // 2]]
    return Setting(model, x, model(x).argmax(axis=1), low, high)


def _affine(parameters, x):
    weights, bias = parameters
    return x @ weights + bias[None]


def _one_hidden_layer(parameters, x):
    return _affine(parameters[2:], jax.nn.leaky_relu(_affine(parameters[:2], x), _SLOPE))


def _programs(layers, point, label, target):
    """Yields `(rows, bounds)` of the constraints `rows @ d >= bounds`, a program for each pattern and wrong class."""
    patterns = itertools.product([0.0, 1.0], repeat=len(layers[1])) if len(layers) == 4 else [None]
    classes = range(len(layers[-1]))
    for pattern in map(np.array, patterns):
        weights, bias = layers[-2:]
        rows, bounds = [], []
        if len(layers) == 4:
            sign, slope = 2.0 * pattern - 1.0, np.where(pattern > 0, 1.0, _SLOPE)
            rows, bounds = list((layers[0] * sign).T), list(-(point @ layers[0] + layers[1]) * sign)
            weights, bias = (layers[0] * slope) @ weights, (layers[1] * slope) @ weights + bias
        logits = point @ weights + bias
        for wanted in classes if target is None else [target]:
            others = [label] if target is None else [other for other in classes if other != wanted]
            if wanted != label or target is not None:
                above = [(weights[:, wanted] - weights[:, other], logits[other] - logits[wanted]) for other in others]
                yield np.array(rows + [row for row, _ in above]), np.array(bounds + [bound for _, bound in above])
