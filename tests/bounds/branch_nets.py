"""Random nets with the verdict of their mixed-integer program, for complete verification."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from bounds_helpers import mlp, mlp_params, weights
from jax.tree_util import Partial
from mixed_integer import Encoding

from rdx import bounds
from rdx.balls import Ball

CERTIFIED, FALSIFIED, UNKNOWN = bounds.Verdict.CERTIFIED, bounds.Verdict.FALSIFIED, bounds.Verdict.UNKNOWN


def dense(x, layer):
    return x @ layer[0] + layer[1][None]


def residual(params, x):
    first, second, last = params
    x = jax.nn.relu(dense(x, first))
    return dense(x + jax.nn.relu(dense(x, second)), last)


def leaky(params, x):
    for layer in params[:-1]:
        x = jax.nn.leaky_relu(dense(x, layer), 0.2)
    return dense(x, params[-1])


def absolute(params, x):
    first, second, last = params
    return dense(jax.nn.relu(dense(jnp.abs(dense(x, first)), second)), last)


def convolve(kernel, x):
    image = jax.lax.conv_general_dilated(
        x.reshape(-1, 3, 3, 1), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return image.reshape(len(image), -1)


def convolutional(params, x):
    kernel, first, last = params
    return dense(jax.nn.relu(dense(jax.nn.relu(convolve(kernel, x)), first)), last)


def encode(kind, params, x):
    """Writes the same nets for the mixed-integer program."""
    if kind == "residual":
        x = x.dense(*params[0]).relu()
        return (x + x.dense(*params[1]).relu()).dense(*params[2])
    if kind == "convolutional":
        kernel, first, last = params
        matrix = np.asarray(convolve(kernel, jnp.eye(9)))
        return x.dense(matrix, np.zeros(matrix.shape[1])).relu().dense(*first).relu().dense(*last)
    below = {"mlp": [0.0, 0.0], "deep": [0.0] * 3, "leaky": [0.2, 0.2], "absolute": [-1.0, 0.0]}[kind]
    for layer, slope in zip(params[:-1], below, strict=True):
        z = x.dense(*layer)
        x = z.relu() + (z * -1.0).relu() * -slope
    return x.dense(*params[-1])


# Name: function, parameters from a seed, radius.
KINDS = {
    "mlp": (mlp, partial(mlp_params, 3, 8, 8, 2), 0.4),
    "deep": (mlp, partial(mlp_params, 4, 6, 6, 6, 2), 0.25),
    "residual": (residual, partial(mlp_params, 3, 7, 7, 2), 0.4),
    "leaky": (leaky, partial(mlp_params, 3, 6, 6, 2), 0.4),
    "absolute": (absolute, partial(mlp_params, 3, 6, 6, 2), 0.3),
    "convolutional": (
        convolutional, lambda seed: [weights(2, 2, 1, 2, seed=seed), *mlp_params(8, 6, 2, seed=seed)], 0.25
    ),
}


def draw(kind, seed):
    """Draws a net, and shifts its outputs so that the least of each over the region is known and not near 0.

    The gap is 1 % of the width of an output over random points, at least 0.001 (an output may be constant). Rounding is
    far below (the allowance of `verify` is 1e-5 of the largest output), so that no verdict depends on it.
    """
    fn, make, eps = KINDS[kind]
    params, random = make(seed=1000 * seed), np.random.default_rng(seed)
    size = 9 if kind == "convolutional" else len(params[0][0])
    region = Ball("linf", eps).region(jnp.asarray(random.uniform(0.3, 0.7, (1, size)), jnp.float32))
    encoding = Encoding(region.lower[0], region.upper[0])
    outputs = encode(kind, params, encoding.x)
    least = np.array([encoding.minimum(outputs, i) for i in range(2)])
    points = region.lower + random.uniform(size=(500, size)).astype(np.float32) * (region.upper - region.lower)
    gap = np.maximum(0.01 * np.ptp(np.asarray(fn(params, points)), axis=0), 1e-3)
    # One output or the other is the one that decides; half of the nets are robust.
    target = np.array([gap[0], 3.0 * gap[1]])[:: 1 if seed % 4 < 2 else -1] * (1.0 if seed % 2 else -1.0)
    target = np.where(np.arange(2) == seed % 4 // 2, target, np.abs(target))
    kernel, bias = params[-1]
    params[-1] = (kernel, bias + jnp.asarray(target - least, jnp.float32))
    return Partial(fn, params), region, CERTIFIED if (target > 0).all() else FALSIFIED


def check(result, fn, region, expected):
    assert result.verdict is expected, result
    if expected is FALSIFIED:
        x = result.counterexample
        assert x.shape == region.center.shape
        assert ((x >= np.asarray(region.lower)) & (x <= np.asarray(region.upper))).all()
        with jax.enable_x64(True):
            double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), fn)
            outputs = np.asarray(double(jnp.asarray(x, jnp.float64)))
        np.testing.assert_allclose(outputs, result.outputs, rtol=1e-12)
        assert outputs.min() <= 0.0
