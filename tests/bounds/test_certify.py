"""Verdicts: sound against a strong search, with room for rounding, never from anything that is not a number."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import METHODS, inputs, logits_fn, mlp, search, weights
from jax.tree_util import Partial

from rdx import bounds, losses, margins
from rdx.balls import Ball

EPS = {"linf": 0.06, "l2": 0.1, "l1": 0.15}
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def trained():
    """Trains a small net to tell which quarter of the square a point lies in; half of the inputs matter."""
    x = inputs((4,), num=256, seed=3)
    labels = (x[:, 0] > 0.5).astype(jnp.int32) + 2 * (x[:, 1] > 0.5).astype(jnp.int32)

    def step(model, _):
        gradient = jax.grad(lambda model: losses.cross_entropy(model(x), labels).mean())(model)
        return jax.tree.map(lambda p, g: p - 0.5 * g, model, gradient), None

    model, _ = jax.jit(lambda model: jax.lax.scan(step, model, None, length=600))(logits_fn(4))
    return model, x[:64], labels[:64]


@pytest.mark.parametrize("norm", EPS)
def test_certificates_are_never_contradicted(trained, norm, key):
    model, x, labels = trained
    ball = Ball(norm, EPS[norm])
    least, _ = jax.jit(lambda model, x: search(lambda x: margins_of_all(model, x, labels), ball, x, key))(model, x)
    is_broken = (least <= 0.0).any(axis=1)
    verdicts = {}
    for name, method in METHODS.items():
        found = jax.jit(partial(bounds.certify, ball=ball, method=method))(model, x, labels)
        assert not (found.certified & is_broken).any()
        assert (found.margins_lower <= least + 0.2 * found.slack[:, None]).all()
        verdicts[name] = found.certified
    assert is_broken.any()
    assert (verdicts["ibp"] <= verdicts["crown_ibp"]).all()
    # The comparison means something: most examples are settled one way or the other.
    assert verdicts["crown"].mean() >= 0.8 * (~is_broken).mean()
    assert 10 < verdicts["crown"].sum() < 60


def margins_of_all(model, x, labels):
    return margins.of(model)(x, labels)


@each_method
def test_wrong_predictions_are_never_certified(trained, method):
    model, x, _ = trained
    wrong = (model(x).argmax(axis=1) + 1) % 4
    assert not bounds.certify(model, x, wrong, ball=Ball("linf", 0.0), method=METHODS[method]).certified.any()
    right = bounds.certify(model, x, model(x).argmax(axis=1), ball=Ball("linf", 0.0), method=METHODS[method])
    assert right.certified.mean() > 0.95


def linear(offset, scale=1.0):
    """Builds logits `(x_0 + offset, 0) * scale`, whose margins are known."""
    return lambda x: scale * jnp.stack([x[:, 0] + offset, jnp.zeros_like(x[:, 0])], axis=1)


@each_method
def test_margins_and_slack_by_hand(method):
    x = jnp.array([[0.5, 0.1], [0.25, 0.9], [0.125, 0.0]])
    found = bounds.certify(linear(0.0, 8.0), x, jnp.zeros(3, int), ball=Ball("linf", 0.25), method=METHODS[method])
    np.testing.assert_allclose(found.margins_lower[:, 0], [2.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(found.slack, 1e-5 * np.array([6.0, 4.0, 3.0]), rtol=1e-5)
    # A margin of exactly 0 is a tie, which does not certify.
    np.testing.assert_array_equal(found.certified, [True, False, False])


@each_method
def test_margins_within_rounding_do_not_certify(method):
    # The margin is positive, but smaller than what float32 resolves next to logits of 1000.
    far = Partial(lambda shift, x: jnp.stack([x[:, 0] + 1000.0 + shift, x[:, 0] + 1000.0], axis=1), jnp.float32(5e-3))
    x, labels = jnp.full((1, 2), 0.5), jnp.zeros(1, int)
    found = bounds.certify(far, x, labels, ball=Ball("linf", 0.1), method=METHODS[method])
    assert not found.certified[0]
    assert found.slack[0] > 5e-3
    wide = Partial(far.func, jnp.float32(0.5))
    assert bounds.certify(wide, x, labels, ball=Ball("linf", 0.01), method=bounds.crown).certified[0]


@each_method
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_nothing_infinite_certifies(trained, method, value):
    model, x, labels = trained
    ball, leaves = Ball("linf", 0.01), jax.tree.leaves(model)
    certify = jax.jit(lambda model: bounds.certify(model, x, labels, ball=ball, method=METHODS[method]).certified)
    assert certify(model).any()
    for i, leaf in enumerate(leaves):
        if leaf.ndim == 1:
            continue
        bad = [*leaves[:i], leaf.at[(0,) * leaf.ndim].set(value), *leaves[i + 1 :]]
        spoiled = jax.tree.unflatten(jax.tree.structure(model), bad)
        assert not certify(spoiled).any()
    assert not certify(jax.tree.map(lambda leaf: jnp.full_like(leaf, value), model)).any()
    overflowing = jax.tree.map(lambda leaf: leaf * 1e20, model)
    assert not certify(overflowing).any()


def test_one_bad_example_spoils_no_other(trained):
    model, x, labels = trained
    ball = Ball("linf", 0.02, -jnp.inf, jnp.inf)
    certify = jax.jit(lambda x: bounds.certify(model, x, labels, ball=ball).certified)
    expected = certify(x)
    np.testing.assert_array_equal(certify(x.at[3].set(jnp.nan)), expected.at[3].set(False))


def certified(model, x, ball, method):
    """Gives the verdict under jit, where no argument is checked."""
    certify = partial(bounds.certify, model, labels=jnp.zeros(len(x), int), method=METHODS[method])
    return jax.jit(lambda x, ball: certify(x, ball=ball).certified)(x, ball)


@each_method
@pytest.mark.parametrize("norm", EPS)
def test_an_empty_region_is_never_certified(method, norm):
    # Under jit nothing raises. The margin is positive everywhere, so that only the region can be at fault.
    model, x = linear(10.0), jnp.full((3, 2), 0.5)
    assert certified(model, x, Ball(norm, 0.1), method).all()
    assert certified(model, x, Ball(norm, 0.0), method).all()
    outside = x.at[1, 0].set(1.5).at[2, 1].set(-0.01)
    np.testing.assert_array_equal(certified(model, outside, Ball(norm, 0.1), method), [True, False, False])
    for eps in (-0.1, jnp.nan, -jnp.inf):
        per_example = jnp.array([0.1, eps, 0.1])
        np.testing.assert_array_equal(certified(model, x, Ball(norm, per_example), method), [True, False, True])
    assert not certified(model, x, Ball(norm, 0.1, 0.6, 0.4), method).any()
    assert not certified(model, x, Ball(norm, jnp.inf, -jnp.inf, jnp.inf), method).any()
    assert not certified(model, x, Ball(norm, 0.1, jnp.nan, 1.0), method).any()


def columns(first, x):
    return jnp.concatenate([first, jnp.zeros_like(x[:, :1])], axis=1)


@each_method
@pytest.mark.parametrize("model", [
    lambda x: columns(5.0 + 0.0 * jnp.log(x[:, :1] - 0.45), x),
    lambda x: columns(5.0 + jnp.maximum(jnp.log(x[:, :1] - 0.45), 0.0), x),
    lambda x: columns(5.0 + 0.0 * jnp.sqrt(x[:, :1] - 0.45), x),
    lambda x: columns(5.0 + 0.0 / (x[:, :1] - 0.5), x),
    lambda x: columns(5.0 + jnp.inf * (x[:, :1] - 0.5), x),
    lambda x: columns(jnp.full_like(x[:, :1], jnp.inf), x),
    # At most points no number is compared, at a few between 0.45 and 0.46 the margin is negative.
    lambda x: columns(jnp.where(jnp.log(x[:, :1] - 0.45) < -5.0, -1.0, 1.0), x),
    lambda x: columns(jnp.where(-jnp.log(x[:, :1] - 0.45) > 5.0, -1.0, 1.0), x),
])
def test_a_model_that_is_no_number_somewhere_is_not_certified(model, method):
    x, ball = jnp.full((1, 1), 0.5), Ball("linf", 0.4)
    assert not certified(model, x, ball, method).any()
    found = bounds.certify_in_float64(model, x, jnp.zeros(1, int), ball=ball, method=METHODS[method])
    assert not found.certified.any()


@each_method
def test_float64_confirms_and_is_float64(trained, method):
    model, x, labels = trained
    ball = Ball("linf", 0.06)
    quick = bounds.certify(model, x, labels, ball=ball, method=METHODS[method])
    found = bounds.certify_in_float64(model, x, labels, ball=ball, method=METHODS[method])
    assert found.margins_lower.dtype == np.float64
    np.testing.assert_allclose(found.margins_lower, quick.margins_lower, atol=1e-4)
    np.testing.assert_allclose(found.slack, quick.slack, rtol=1e-4)
    np.testing.assert_array_equal(found.certified, quick.certified)
    assert jnp.zeros(1).dtype == jnp.float32  # the context is left


def test_float64_bounds_the_region_as_given_and_as_rounded():
    # The margin is 1 up to an edge and falls steeply beyond. Float32 rounds 0.1 up, by 1.5e-9, and 0.7 down, and it
    # rounds the ends of the region, by up to 6e-8.
    def margin(edge):
        return lambda x: columns(1.0 - 2.0**32 * jax.nn.relu(x[:, :1] - 0.5 - edge), x)

    x, labels = jnp.full((1, 1), 0.5), jnp.zeros(1, int)
    for eps in (0.1, 0.2, 0.7, 0.3):
        ball = Ball("linf", eps, -1.0, 2.0)
        ends = eps, float(np.float32(eps)), float(np.float32(0.5) + np.float32(eps)) - 0.5
        for edge, is_robust in ((max(ends) - 1e-9, False), (max(ends) + 1e-12, True)):
            found = bounds.certify_in_float64(margin(edge), x, labels, ball=ball, method=bounds.ibp)
            assert found.certified[0] == is_robust, (eps, edge)


def test_float64_is_for_the_host(trained):
    model, x, labels = trained
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda x: bounds.certify_in_float64(model, x, labels, ball=Ball("linf", 0.1)).certified)(x)
    with pytest.raises(ValueError, match="outside the box"):
        bounds.certify_in_float64(model, x + 1.0, labels, ball=Ball("linf", 0.1))
    with pytest.raises(ValueError, match="4 classes"):
        bounds.certify_in_float64(model, x, labels + 4, ball=Ball("linf", 0.1))


@each_method
def test_everything_runs_at_the_highest_precision(method, monkeypatch):
    model = Partial(conv_net, (weights(3, 3, 1, 2), weights(3, 3, 2, 2), weights(8, 3)))
    x, labels = inputs((4, 4, 1)), jnp.zeros(2, int)
    certify = lambda model, x: bounds.certify(model, x, labels, ball=Ball("l2", 0.1), method=METHODS[method])
    text = str(jax.make_jaxpr(certify)(model, x))
    products = re.findall(r"(?:dot_general|conv_general_dilated)\[.*?\n\s*\]", text, flags=re.DOTALL)
    assert len(products) >= 4
    for product in products:
        assert "HIGHEST" in product, product
    # Sums of rows, which are products with a vector of ones, ask for it by themselves; nothing else does.
    monkeypatch.setattr("rdx.bounds.linear._sum", lambda rows: rows.reshape(rows.shape[0], -1).sum(axis=1))
    plain = jax.make_jaxpr(lambda model, x: METHODS[method](model, Ball("l2", 0.1).region(x)))(model, x)
    assert "HIGHEST" not in str(plain)


def conv_net(params, x):
    first, second, last = params
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.nn.relu(jax.lax.conv_general_dilated(x, first, (1, 1), "SAME", dimension_numbers=layout))
    x = jax.nn.relu(jax.lax.conv_general_dilated(x, second, (2, 2), "SAME", dimension_numbers=layout))
    return x.reshape(len(x), -1) @ last


def test_bad_arguments():
    model, x, labels = logits_fn(), inputs((4,)), jnp.array([0, 1])
    certify = partial(bounds.certify, model)
    with pytest.raises(ValueError, match="3 classes"):
        certify(x, jnp.array([0, 3]), ball=Ball("linf", 0.1))
    with pytest.raises(ValueError, match="3 classes"):
        certify(x, jnp.array([0, -1]), ball=Ball("linf", 0.1))
    with pytest.raises(ValueError, match="one integer per example"):
        certify(x, jnp.array([0, 1, 2]), ball=Ball("linf", 0.1))
    with pytest.raises(ValueError, match="must be integers"):
        certify(x, jnp.array([0.0, 1.0]), ball=Ball("linf", 0.1))
    with pytest.raises(ValueError, match="outside the box"):
        certify(2.0 * x + 1.0, labels, ball=Ball("linf", 0.1))
    with pytest.raises(ValueError, match="eps must be at least 0"):
        certify(x, labels, ball=Ball("linf", -0.1))
    with pytest.raises(ValueError, match="Unknown norm"):
        certify(x, labels, ball=Ball("l3", 0.1))


@each_method
def test_any_integer_labels(method):
    model, x = logits_fn(), inputs((4,))
    reference = bounds.certify(model, x, jnp.array([0, 1]), ball=Ball("linf", 0.1), method=METHODS[method])
    for dtype in (jnp.uint8, jnp.int8, jnp.int32):
        found = bounds.certify(model, x, jnp.array([0, 1], dtype), ball=Ball("linf", 0.1), method=METHODS[method])
        np.testing.assert_array_equal(found.margins_lower, reference.margins_lower)


def test_plain_functions_and_partials_agree():
    model, x, labels = logits_fn(), inputs((4,)), jnp.array([0, 1])
    certify = partial(bounds.certify, x=x, labels=labels, ball=Ball("linf", 0.1))
    np.testing.assert_allclose(certify(lambda x: mlp(model.args[0], x)).margins_lower, certify(model).margins_lower)
