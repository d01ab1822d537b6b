"""Every kind of operation, in every method and norm: points stay inside, no radius is no interval, affine is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import EPS, METHODS, exact_minimum, inputs, search
from coverage_cases import CASES as CASES_OF_OPERATIONS
from coverage_layers import CASES as CASES_OF_LAYERS

from rdx.balls import Ball

CASES = CASES_OF_OPERATIONS | CASES_OF_LAYERS
SHARES = jnp.array([0.0, 0.3, 1.0])


def bound(fn, norm, x):
    """Computes the bounds of every method over growing balls."""

    def at(share):
        region = Ball(norm, share * EPS[norm]).region(x)
        return {name: method(fn, region) for name, method in METHODS.items()}

    return jax.vmap(at)(SHARES)


def check(found, clean):
    """Checks what holds of all bounds: no radius is no interval, and intervals grow."""
    scale = 1.0 + float(jnp.abs(clean).max())
    for method, (lower, upper) in found.items():
        assert lower.shape == upper.shape == (len(SHARES), *clean.shape)
        assert lower.dtype == upper.dtype == clean.dtype
        np.testing.assert_allclose(lower[0], clean, rtol=0.0, atol=2e-6 * scale, err_msg=method)
        np.testing.assert_allclose(upper[0], clean, rtol=0.0, atol=2e-6 * scale, err_msg=method)
    assert (jnp.diff(found["ibp"].lower, axis=0) <= 1e-6 * scale).all()
    assert (jnp.diff(found["ibp"].upper, axis=0) >= -1e-6 * scale).all()
    return 1e-5 * scale


# The norm only matters up to the first nonlinear operation, so a few of them see every norm.
NONLINEAR = [name for name, case in CASES.items() if not case.is_affine]
CURVED = ("jax.nn.relu", "maximum", "tanh", "conv_net")
# One of each rule, at all times; the others with the slow tests.
CORE = frozenset({
    "abs", "clamp", "exp", "jax.nn.gelu", "jax.nn.relu", "jax.nn.softmax", "log", "max_of_relus", "maximum", "product",
    "reciprocal", "sin", "sqrt", "square", "tanh", "where_slopes",
})
EVERY_NORM = "jax.nn.relu"


def _marks(name, norm):
    return () if name in CORE and (norm == "linf" or name == EVERY_NORM) else pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "norm"), [
        pytest.param(name, norm, marks=_marks(name, norm))
        for norm in EPS for name in (NONLINEAR if norm == "linf" else CURVED)
    ],
)
def test_nonlinear(name, norm, key):
    assert CASES.keys() >= CORE
    fn, x = CASES[name].build(), inputs(CASES[name].shape)

    @jax.jit
    def study(x, key):
        return bound(fn, norm, x), search(fn, Ball(norm, EPS[norm]), x, key), fn(x)

    found, (least, greatest), clean = study(x, key)
    tolerance = check(found, clean)
    for method, (lower, upper) in found.items():
        excess = jnp.maximum(lower[-1] - least, greatest - upper[-1]).max()
        assert excess <= tolerance, f"{method}: a point of the ball lies {excess} outside of the bounds"
        # Bounds that are merely huge would pass everything else.
        assert (upper[-1] - lower[-1]).mean() < 12.0 * (greatest - least).mean(), method


# The norm only matters at the very end, for which there are tests of their own: one box, one ball.
@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.is_affine])
def test_affine(name, norm):
    fn, x = CASES[name].build(), inputs(CASES[name].shape)
    found, clean = jax.jit(lambda x: (bound(fn, norm, x), fn(x)))(x)
    tolerance = check(found, clean)
    # Differences, as some of the cases have derivatives that lie.
    basis = np.eye(x[0].size, dtype=np.float32).reshape(-1, *x.shape[1:])
    offset = np.asarray(fn(np.zeros_like(basis)), np.float64).reshape(len(basis), -1)
    rows = (np.asarray(fn(basis), np.float64).reshape(len(basis), -1) - offset).T
    region = Ball(norm, EPS[norm]).region(x)
    ends = [[(exact_minimum(row, region, i), -exact_minimum(-row, region, i)) for row in rows] for i in range(len(x))]
    exact = np.array(ends) + offset[0][None, :, None]
    for method, (lower, upper) in found.items():
        lower, upper = (np.asarray(end[-1]).reshape(len(x), -1) for end in (lower, upper))
        assert (lower <= exact[..., 0] + tolerance).all(), method
        assert (upper >= exact[..., 1] - tolerance).all(), method
        if method != "ibp":
            np.testing.assert_allclose(lower, exact[..., 0], rtol=0.0, atol=tolerance, err_msg=method)
            np.testing.assert_allclose(upper, exact[..., 1], rtol=0.0, atol=tolerance, err_msg=method)
