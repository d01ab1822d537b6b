"""Softmax with masks and with differences beyond float32, where exponentials are 0 or overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import METHODS, inputs

from rdx.balls import Ball

X = inputs((3,), num=2)
BALL = Ball("linf", 0.1)
MASKS = np.array([[True, False, True], [True, True, False]])


def attend(x, mask, fill_value, reduce=jax.nn.softmax):
    return reduce(jnp.where(mask, 4.0 * x, fill_value), axis=1)


@pytest.mark.parametrize("fill_value", [-1e4, -1e9, float(jnp.finfo(jnp.float32).min), -np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_each_example_has_its_own_mask(method, fill_value):
    bound = jax.jit(lambda region, mask: METHODS[method](lambda x, m: attend(x, m, fill_value), region, mask))
    found = bound(BALL.region(X), MASKS)
    for i, mask in enumerate(MASKS):
        kept = METHODS[method](lambda x: jax.nn.softmax(4.0 * x, axis=1), BALL.region(X[i : i + 1, mask]))
        np.testing.assert_allclose(found.lower[i, mask], kept.lower[0], rtol=0.0, atol=1e-6)
        np.testing.assert_allclose(found.upper[i, mask], kept.upper[0], rtol=0.0, atol=1e-6)
        np.testing.assert_allclose(found.upper[i, ~mask], 0.0, rtol=0.0, atol=1e-30)


@pytest.mark.parametrize("reduce", [jax.nn.logsumexp, jnp.max])
@pytest.mark.parametrize("method", METHODS)
def test_other_reductions_of_what_is_masked(method, reduce):
    found = METHODS[method](lambda x, m: attend(x, m, -np.inf, reduce), BALL.region(X), MASKS)
    for i, mask in enumerate(MASKS):
        kept = METHODS[method](lambda x: reduce(4.0 * x, axis=1), BALL.region(X[i : i + 1, mask]))
        np.testing.assert_allclose(found.lower[i], kept.lower[0], rtol=0.0, atol=1e-5)
        np.testing.assert_allclose(found.upper[i], kept.upper[0], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_masks_that_are_added(method):
    bias = np.float32([[0.0, -np.inf, 0.0]])
    found = METHODS[method](lambda x: jax.nn.softmax(4.0 * x + bias, axis=1), BALL.region(X[:1]))
    expected = METHODS[method](lambda x: attend(x, MASKS[:1], -np.inf), BALL.region(X[:1]))
    np.testing.assert_allclose(found.lower, expected.lower, rtol=0.0, atol=1e-6)
    np.testing.assert_allclose(found.upper, expected.upper, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_certifies_where_everything_is_masked(method):
    # There the function itself is 0 / 0.
    found = METHODS[method](lambda x, m: attend(x, m, -np.inf), BALL.region(X), np.zeros_like(MASKS))
    assert np.isnan(attend(X, np.zeros_like(MASKS), -np.inf)).all()
    assert not np.isfinite(found.lower).any()


@pytest.mark.parametrize("fill_value", [np.inf, np.nan])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_certifies_where_a_mask_is_wrong(method, fill_value):
    found = METHODS[method](lambda x: attend(x, MASKS[:1], fill_value), BALL.region(X[:1]))
    assert np.isnan(attend(X[:1], MASKS[:1], fill_value)).all()
    assert not (np.isfinite(found.lower) & np.isfinite(found.upper)).all()


@pytest.mark.parametrize("distance", [70.0, 79.5, 80.5, 84.0, 200.0, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_logits_far_apart(method, distance):
    # The first logit is `distance` below the second, give or take a tenth of it.
    region = Ball("linf", 0.1, low=-np.inf, high=np.inf).region(jnp.array([[1.0]]))
    logits = lambda x: jnp.concatenate([0.0 * x, distance * x], axis=1)
    found = METHODS[method](lambda x: jax.nn.softmax(logits(x), axis=1), region)
    least = np.exp(-1.1 * np.float64(distance))
    # Lines over an interval round to a part of its greatest value.
    assert 0.0 <= found.lower[0, 0] <= 1.0001 * least + 1e-5 * found.upper[0, 0]
    # The function itself is 0 where float32 ends.
    assert found.upper[0, 0] >= 0.9999 * np.float32(np.exp(-0.9 * np.float64(distance)))
    assert found.upper[0, 0] < 1e-25
    assert found.lower[0, 1] > 0.99999


@pytest.mark.parametrize("distance", [79.5, 80.5, 84.0, 200.0, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_a_logarithm_of_next_to_nothing(method, distance):
    region = Ball("linf", 0.1, low=-np.inf, high=np.inf).region(jnp.array([[1.0]]))
    logits = lambda x: jnp.concatenate([0.0 * x, distance * x], axis=1)
    # It has the right bound or none.
    found = METHODS[method](lambda x: jnp.log(jax.nn.softmax(logits(x), axis=1)), region)
    assert not found.lower[0, 0] > -1.1 * distance + 1e-3
