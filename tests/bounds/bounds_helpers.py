"""What the tests of bounds share: methods, weights, and the strongest points that a search finds in a ball."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import lax
from jax.tree_util import Partial

from rdx import bounds

METHODS = {"ibp": bounds.ibp, "crown_ibp": bounds.crown_ibp, "crown": bounds.crown}
EPS = {"linf": 0.15, "l2": 0.4, "l1": 0.6}


def weights(*shape, seed=0):
    """Draws normal weights with variance 2 / fan-in, where the last axis is the output."""
    values = np.random.default_rng(seed).normal(size=shape) * np.sqrt(2.0 / max(1, np.prod(shape[:-1])))
    return jnp.asarray(values, jnp.float32)


def fill(shapes, seed=0):
    """Fills a pytree of shapes with random values, variances with positive ones: faster than any initialiser."""
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        values = random.normal(size=leaf.shape) * np.sqrt(2.0 / max(2.0, np.prod(leaf.shape[:-1])))
        return jnp.asarray(0.5 + np.abs(values) if "var" in jax.tree_util.keystr(path) else values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def inputs(shape, num=2, seed=0):
    """Draws inputs in [0, 1], some of them on the border of the box."""
    values = np.random.default_rng(seed).uniform(-0.2, 1.2, size=(num, *shape))
    return jnp.asarray(np.clip(values, 0.0, 1.0), jnp.float32)


def mlp(params, x):
    """Computes a relu net; `params` is a list of (kernel, bias)."""
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias[None])
    kernel, bias = params[-1]
    return x @ kernel + bias[None]


def mlp_params(*sizes, seed=0):
    """Draws `[(kernel, bias), ...]` of a net with layers of these sizes."""
    pairs = enumerate(itertools.pairwise(sizes))
    return [(weights(*pair, seed=seed + i), 0.3 * weights(1, pair[1], seed=99 + i)[0]) for i, pair in pairs]


def logits_fn(classes=3, seed=0):
    """Builds a relu net of four inputs as a `Partial`, so that its parameters are leaves."""
    return Partial(mlp, mlp_params(4, 6, 5, classes, seed=seed))


def search(fn, ball, x, key, *, num=24, num_steps=10):
    """Finds extreme outputs of `fn` over the ball: random points, points of the border and gradient ascent.

    Returns the least and the greatest output seen, each `[B, ...]`.
    """
    keys = jax.random.split(key, 4)
    random = jax.vmap(lambda k: ball.sample(jax.random.split(k, len(x)), x))(jax.random.split(keys[0], num))
    corners = jax.random.rademacher(keys[1], (num, *x.shape), x.dtype)
    # Along few axes or all of them, projected: corners of the box, vertices and faces of the others.
    mask = jax.random.bernoulli(keys[2], jnp.linspace(0.05, 1.0, num).reshape(-1, *(1,) * x.ndim), corners.shape)
    directions = jnp.where(mask, corners, 0.0)
    border = jax.vmap(lambda d: ball.project(x + 2.0 * ball.radius(x) * d, x))(directions)
    points = jnp.concatenate([x[None], random, border])
    outputs = jax.vmap(fn)(points)
    size = outputs[0, 0].size
    wish = jnp.concatenate([jnp.eye(size), -jnp.eye(size)])[:, None]

    def gain(points):
        return (jax.vmap(fn)(points).reshape(2 * size, len(x), size) * wish).sum()

    def step(points, scale):
        ascent = jax.vmap(ball.ascent_direction)(jax.grad(gain)(points))
        moved = jax.vmap(lambda p, a: ball.project(p + scale * ball.radius(x) * a, x))(points, ascent)
        return moved, jax.vmap(fn)(moved)

    start = jax.vmap(lambda k: ball.sample(jax.random.split(k, len(x)), x))(jax.random.split(keys[3], 2 * size))
    _, visited = lax.scan(step, start, jnp.asarray(2.0 * 0.8 ** np.arange(num_steps), x.dtype))
    seen = jnp.concatenate([outputs, visited.reshape(-1, *outputs.shape[1:])])
    return seen.min(axis=0), seen.max(axis=0)


def exact_minimum(row, region, index):
    """Solves `min <row, x>` over the region of one example in float64.

    linf in closed form; l1 as a linear program, one variable up and one down for each element; l2 by the scale `s` of
    `t = clip(-s row, low, high)`, which is feasible, and optimal where the scale is the largest possible.
    """
    row = np.asarray(row, np.float64).ravel()
    center, radius, lower, upper = (
        np.asarray(getattr(region, name)[index], np.float64).ravel() for name in ("center", "radius", "lower", "upper")
    )
    if region.norm == "linf":
        return float(row @ np.where(row > 0, lower, upper))
    moves = radius > 0
    gain, unit = (row * radius)[moves], radius[moves]
    low, high = (lower - center)[moves] / unit, (upper - center)[moves] / unit
    if not gain.size:
        return float(row @ center)
    if region.norm == "l1":
        room = [(0.0, end) for end in high] + [(0.0, -end) for end in low]
        solution = scipy.optimize.linprog(np.r_[gain, -gain], np.ones((1, 2 * gain.size)), [1.0], bounds=room)
        return float(row @ center + solution.fun)

    def excess(scale):
        return np.square(np.clip(-scale * gain, low, high)).sum() - 1.0

    far = 1e9 / max(np.abs(gain).max(), 1e-30)
    scale = far if excess(far) <= 0 else scipy.optimize.brentq(excess, 0.0, far, xtol=1e-21 * far, rtol=1e-14)
    return float(row @ center + gain @ np.clip(-scale * gain, low, high))

