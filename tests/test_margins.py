"""Margins against loops, their fusion into bounds, and what they keep of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import bounds, losses, margins
from rdx.balls import Ball

LABELS = jnp.array([0, 2, 4, 1])


def logits():
    return jax.random.normal(jax.random.key(0), (4, 5))


def model(scale, x):
    return scale * x


def test_margins_are_differences_in_order_of_the_class():
    z = np.asarray(logits())
    found = margins.of(lambda x: x)(logits(), LABELS)
    expected = [[z[i, y] - z[i, j] for j in range(5) if j != y] for i, y in enumerate(LABELS.tolist())]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.shape == (4, 4)


def test_smallest_margin_is_the_margin_loss_and_its_sign_the_prediction():
    found = margins.of(lambda x: x)(logits(), LABELS)
    np.testing.assert_allclose(-found.min(axis=1), losses.margin(logits(), LABELS), rtol=1e-6)
    np.testing.assert_array_equal((found > 0).all(axis=1), ~losses.is_wrong(logits(), LABELS))


def test_targeted_margins():
    targets = jnp.array([3, 2, 0, 2])
    z = np.asarray(logits())
    expected = [[z[i, y] - z[i, t]] for i, (y, t) in enumerate(zip(LABELS.tolist(), targets.tolist(), strict=True))]
    np.testing.assert_allclose(margins.targeted(lambda x: x)(logits(), LABELS, targets), expected, rtol=1e-6)


def test_specification():
    found = margins.specification(jnp.array([1, 0, 2]), 3)
    expected = [[[-1, 1, 0], [0, 1, -1]], [[1, -1, 0], [1, 0, -1]], [[-1, 0, 1], [0, -1, 1]]]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(margins.specification(jnp.array([1, 0]), 2), [[[-1, 1]], [[1, -1]]])


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int32, np.int64])
def test_any_integer_labels_and_many_classes(dtype):
    z = jax.random.normal(jax.random.key(1), (3, 300))
    labels = np.array([5, 0, 127])
    expected = margins.of(lambda x: x)(z, jnp.asarray(labels))
    np.testing.assert_array_equal(margins.of(lambda x: x)(z, labels.astype(dtype)), expected)


def test_partials_keep_their_parameters_as_leaves():
    fn = margins.of(Partial(model, jnp.float32(2.0)))
    assert [leaf.shape for leaf in jax.tree.leaves(fn)] == [()]
    run = jax.jit(lambda fn, x, labels: fn(x, labels))
    np.testing.assert_allclose(run(fn, logits(), LABELS), 2.0 * margins.of(lambda x: x)(logits(), LABELS), rtol=1e-6)
    gradient = jax.grad(lambda fn: fn(logits(), LABELS).sum())(fn)
    np.testing.assert_allclose(jax.tree.leaves(gradient)[0], margins.of(lambda x: x)(logits(), LABELS).sum(), rtol=1e-5)


def test_half_precision_logits_stay_so():
    assert margins.of(lambda x: x.astype(jnp.bfloat16))(logits(), LABELS).dtype == jnp.bfloat16


@pytest.mark.parametrize("method", [bounds.ibp, bounds.crown_ibp, bounds.crown])
def test_bounds_fuse_margins_into_the_last_layer(method):
    # Both logits move together with x: their difference does not, which bounds of logits would not know.
    fn = lambda x: x @ jnp.array([[1.0, 1.0, 1.0], [0.0, 0.5, 0.0]]) + jnp.array([[3.0, 0.0, 1.0]])
    x = jnp.array([[0.5, 0.5]])
    found = method(margins.of(fn), Ball("linf", 0.5).region(x), jnp.array([0]))
    np.testing.assert_allclose(found.lower, [[2.5, 2.0]], atol=1e-6)
    np.testing.assert_allclose(found.upper, [[3.0, 2.0]], atol=1e-6)
