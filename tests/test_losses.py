"""Losses: hand values, invariances, fallbacks for few classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx import losses

LOGITS = jnp.array([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 1.5]])
LABELS = jnp.array([0, 2])


def test_cross_entropy():
    z = np.asarray(LOGITS, np.float64)
    expected = [np.log(np.exp(z[0]).sum()) - 2.0, np.log(np.exp(z[1]).sum()) - 1.0]
    np.testing.assert_allclose(losses.cross_entropy(LOGITS, LABELS), expected, rtol=1e-6)


def test_margin_is_positive_exactly_where_wrong():
    np.testing.assert_allclose(losses.margin(LOGITS, LABELS), [-1.0, 2.0])
    np.testing.assert_array_equal(losses.is_wrong(LOGITS, LABELS), [False, True])
    np.testing.assert_allclose(losses.targeted_margin(LOGITS, jnp.array([1, 1])), [-1.0, 1.5])


def test_targeted_log_odds_are_those_of_the_softmax():
    targets = jnp.array([1, 2])
    p = np.asarray(jax.nn.softmax(LOGITS, axis=1), np.float64)[np.arange(2), targets]
    np.testing.assert_allclose(losses.targeted_log_odds(LOGITS, targets), np.log(p) - np.log(1.0 - p), rtol=1e-5)
    # Finite where the probability of the rest underflows.
    np.testing.assert_allclose(losses.targeted_log_odds(1e3 * LOGITS, jnp.array([0, 1])), [1000.0, 1500.0])


def test_dlr_values():
    np.testing.assert_allclose(losses.dlr(LOGITS, LABELS), [-1.0 / 2.0, 2.0 / (3.0 - 1.0)], rtol=1e-6)
    targeted = losses.targeted_dlr(LOGITS, LABELS, jnp.array([3, 1]))
    np.testing.assert_allclose(targeted, [-3.0 / (2.0 + 0.5), 2.0 / (3.0 - 0.5)], rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.dlr, lambda z, y: losses.targeted_dlr(z, y, jnp.array([1, 1]))])
def test_dlr_ignores_shift_and_scale(loss):
    value = loss(LOGITS, LABELS)
    np.testing.assert_allclose(loss(7.0 * LOGITS, LABELS), value, rtol=1e-5)
    np.testing.assert_allclose(loss(LOGITS - 11.0, LABELS), value, rtol=1e-5)


def test_dlr_falls_back_with_few_classes():
    two, three = LOGITS[:, :2], LOGITS[:, :3]
    labels, targets = jnp.array([0, 1]), jnp.array([1, 0])
    np.testing.assert_allclose(losses.dlr(two, labels), losses.margin(two, labels))
    np.testing.assert_allclose(losses.targeted_dlr(three, labels, targets), [-1.0, -3.0])


def test_nan_logits_are_wrong():
    assert losses.is_wrong(jnp.array([[0.0, jnp.nan]]), jnp.array([1]))[0]


def test_kl_is_zero_only_at_the_reference(key):
    p = np.exp(np.asarray(LOGITS, np.float64))
    p /= p.sum(axis=1, keepdims=True)
    other = jax.random.normal(key, LOGITS.shape)
    q = np.exp(np.asarray(other, np.float64))
    q /= q.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(losses.kl(other, LOGITS), (p * np.log(p / q)).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(losses.kl(LOGITS + 3.0, LOGITS), [0.0, 0.0], atol=1e-6)


def test_worst_case_cross_entropy_formula_and_exactness():
    margins = jnp.array([[1.0, -2.0, 0.5], [30.0, 40.0, 50.0]])
    expected = np.log1p(np.exp(-np.asarray(margins, np.float64)).sum(axis=1))
    np.testing.assert_allclose(losses.worst_case_cross_entropy(margins), expected, rtol=1e-5, atol=1e-7)
    exact = LOGITS[:1, :1] - LOGITS[:1, 1:]
    np.testing.assert_allclose(
        losses.worst_case_cross_entropy(exact), losses.cross_entropy(LOGITS[:1], LABELS[:1]), rtol=1e-6
    )


def test_cross_entropy_survives_huge_logits():
    assert np.isfinite(losses.cross_entropy(1e4 * LOGITS, LABELS)).all()
    assert np.isfinite(losses.worst_case_cross_entropy(jnp.array([[-1e4, 1e4]]))).all()


def test_narrow_label_types_do_not_wrap_around():
    logits = jax.random.normal(jax.random.key(3), (4, 300))
    labels = jnp.array([0, 1, 44, 255])
    for loss in (losses.margin, losses.dlr, losses.cross_entropy):
        np.testing.assert_array_equal(loss(logits, labels.astype(jnp.uint8)), loss(logits, labels))
