"""The worst-case loss and the objective that certified training and A5 share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import inputs, logits_fn

from rdx import bounds, losses, margins
from rdx.balls import Ball
from rdx.bounds import relaxations
from rdx.train.schedules import linear_ramp

LABELS = jnp.array([0, 2, 1])
BALL = Ball("linf", 0.1)


def batch():
    return inputs((4,), num=3), LABELS


def lower_bounds(model, ball, x, labels):
    """Returns the margins' lower bounds of IBP and of CROWN-IBP with parallel lines."""
    fn, region = margins.of(model), ball.region(x)
    crown = bounds.crown_ibp(fn, region, labels, relu_lower=relaxations.same_slope, intersect=False)
    return np.asarray(bounds.ibp(fn, region, labels).lower), np.asarray(crown.lower)


def formula(lower):
    return np.log1p(np.exp(-lower.astype(np.float64)).sum(axis=1))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
def test_worst_case_is_the_formula(norm, share):
    (x, labels), ball = batch(), Ball(norm, 0.1)
    interval, crown = lower_bounds(logits_fn(), ball, x, labels)
    assert np.abs(interval - crown).max() > 0.1
    weight = share or 0.0
    share = None if share is None else jnp.float32(share)
    found = bounds.worst_case(logits_fn(), ball.region(x), labels, crown_share=share)
    np.testing.assert_allclose(found.loss, formula(weight * crown + (1.0 - weight) * interval), rtol=1e-5)
    np.testing.assert_array_equal(found.is_certified, (interval > 0).all(axis=1))


def test_worst_case_bounds_the_loss_of_every_point(key):
    x, labels = batch()
    worst = bounds.worst_case(logits_fn(), BALL.region(x), labels, crown_share=jnp.float32(0.5))
    for draw in jax.random.split(key, 200):
        point = BALL.sample(jax.random.split(draw, len(x)), x)
        loss = losses.cross_entropy(logits_fn()(point), labels)
        assert (loss <= worst.loss + 1e-5).all()


def test_without_radius_it_is_the_cross_entropy():
    x, labels = batch()
    clean = losses.cross_entropy(logits_fn()(x), labels)
    for share in (None, jnp.float32(0.0), jnp.float32(0.7)):
        found = bounds.worst_case(logits_fn(), Ball("linf", 0.0).region(x), labels, crown_share=share)
        np.testing.assert_allclose(found.loss, clean, rtol=1e-5)
        np.testing.assert_array_equal(found.is_certified, ~losses.is_wrong(logits_fn()(x), labels))


def threat(**options):
    # The ramp is 0 up to step 10 and 0.2 from step 20 on; the ball's own radius must not matter.
    return bounds.Threat(Ball("linf", 99.0), linear_ramp(0.2, 10, 10), **options)


def objective(step, model=None, **options):
    x, labels = batch()
    model = logits_fn() if model is None else model
    return bounds.phased_objective(threat(**options), model(x), model, x, labels, jnp.int32(step))


@pytest.mark.parametrize("kappa_end", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("step", [0, 10, 13, 17, 20, 1000])
def test_objective_is_the_formula(step, kappa_end):
    x, labels = batch()
    eps = 0.2 * np.clip((step - 10) / 10, 0.0, 1.0)
    share = (0.2 - eps) / 0.2
    kappa = share + kappa_end * (1.0 - share)
    interval, crown = lower_bounds(logits_fn(), Ball("linf", eps), x, labels)
    worst = formula(share * crown + (1.0 - share) * interval)
    clean = np.asarray(losses.cross_entropy(logits_fn()(x), labels))
    loss, metrics = jax.jit(partial(objective, kappa_end=kappa_end))(step)
    np.testing.assert_allclose(loss, kappa * clean + (1.0 - kappa) * worst, rtol=1e-4)
    np.testing.assert_allclose(metrics["clean_loss"], clean, rtol=1e-5)
    np.testing.assert_allclose(metrics["certified_loss"], worst, rtol=1e-4)
    np.testing.assert_allclose([metrics["eps"], metrics["kappa"]], [eps, kappa], atol=1e-6)
    np.testing.assert_array_equal(metrics["error"], losses.is_wrong(logits_fn()(x), labels))
    np.testing.assert_array_equal(metrics["certified_error"], (interval <= 0).any(axis=1))


def test_crown_can_be_left_out_at_the_end():
    np.testing.assert_allclose(objective(20, has_crown=False)[0], objective(20)[0], rtol=1e-6)
    assert np.abs(objective(15, has_crown=False)[0] - objective(15)[0]).max() > 1e-3


@pytest.mark.parametrize("method", [bounds.crown_ibp, partial(bounds.lipschitz, constant=3.0)])
def test_other_bounds_stand_where_the_formula_says_intervals(method):
    x, labels = batch()
    lower = np.asarray(method(margins.of(logits_fn()), Ball("linf", 0.2).region(x), labels).lower)
    loss, metrics = objective(20, has_crown=False, method=method)
    np.testing.assert_allclose(loss, formula(lower), rtol=1e-5)
    np.testing.assert_array_equal(metrics["certified_error"], (lower <= 0).any(axis=1))
    assert np.abs(loss - objective(20, has_crown=False)[0]).max() > 1e-3
    # While the radius rises, CROWN-IBP has its share beside them.
    moment = threat().at(jnp.int32(15))
    share = float(moment.share)
    _, crown = lower_bounds(logits_fn(), moment.ball, x, labels)
    lower = np.asarray(method(margins.of(logits_fn()), moment.ball.region(x), labels).lower)
    mixed = objective(15, method=method)[1]["certified_loss"]
    np.testing.assert_allclose(mixed, formula(share * crown + (1.0 - share) * lower), rtol=1e-4)


def test_radius_of_zero_is_clean_training():
    x, labels = batch()
    loss, metrics = objective(0)
    np.testing.assert_allclose(loss, losses.cross_entropy(logits_fn()(x), labels), rtol=1e-5)
    assert metrics["kappa"] == 1.0
    still = bounds.Threat(BALL, linear_ramp(0.0, 0, 1))
    loss, _ = bounds.phased_objective(still, logits_fn()(x), logits_fn(), x, labels, jnp.int32(5))
    np.testing.assert_allclose(loss, losses.cross_entropy(logits_fn()(x), labels), rtol=1e-5)


@pytest.mark.parametrize("step", [0, 11, 15, 25])
def test_gradients_are_finite_and_those_of_the_formula(step):
    gradient = jax.jit(jax.grad(lambda model: objective(step, model=model)[0].sum()))(logits_fn())

    def by_hand(model):
        x, labels = batch()
        eps = 0.2 * np.clip((step - 10) / 10, 0.0, 1.0)
        share = (0.2 - eps) / 0.2
        fn, region = margins.of(model), Ball("linf", eps).region(x)
        crown = bounds.crown_ibp(fn, region, labels, relu_lower=relaxations.same_slope, intersect=False).lower
        lower = share * crown + (1.0 - share) * bounds.ibp(fn, region, labels).lower
        worst = jnp.log1p(jnp.exp(-lower).sum(axis=1))
        return (share * losses.cross_entropy(model(x), labels) + (1.0 - share) * worst).sum()

    reference = jax.jit(jax.grad(by_hand))(logits_fn())
    for found, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
        assert jnp.isfinite(found).all()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_the_first_steps_of_a_ramp_have_finite_gradients():
    # Black pixels and zero biases: intervals around 0 that are narrower than the square root of float32's range.
    params = jax.tree.map(lambda leaf: jnp.where(leaf.ndim == 1, 0.0, 1.0) * leaf, logits_fn().args[0])
    x = jnp.zeros((3, 4))

    @jax.jit
    def gradient(eps):
        total = lambda params: bounds.worst_case(
            lambda x: logits_fn().func(params, x), Ball("linf", eps).region(x), LABELS, crown_share=jnp.float32(0.5)
        ).loss.sum()
        return jax.grad(total)(params)

    for eps in (0.0, 1e-37, 1e-30, 1e-22, 1e-19, 1e-16, 1e-10, 1e-5):
        for leaf in jax.tree.leaves(gradient(jnp.float32(eps))):
            assert jnp.isfinite(leaf).all(), eps


def test_threat_is_a_pytree():
    sweep = jax.vmap(lambda kappa_end: objective(15, kappa_end=kappa_end)[0])(jnp.array([0.0, 0.5, 1.0]))
    for i, kappa_end in enumerate((0.0, 0.5, 1.0)):
        np.testing.assert_allclose(sweep[i], objective(15, kappa_end=kappa_end)[0], rtol=1e-5)
    leaves = jax.tree.leaves(threat(kappa_end=0.5))
    assert 0.5 in leaves
    assert 0.2 in leaves
    assert jax.tree.structure(threat(has_crown=True)) != jax.tree.structure(threat(has_crown=False))
