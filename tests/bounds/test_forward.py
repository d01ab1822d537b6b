"""Linear bounds propagated forward, boxes given by their ends, and regions that all examples share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import EPS, inputs, logits_fn, mlp, mlp_params, search, weights

from rdx import balls, bounds
from rdx.balls import Ball

X = inputs((4,), num=3)


def width(interval):
    return float((interval.upper - interval.lower).mean())


def branches(x):
    """Splits, multiplies, subtracts, pools and bends."""
    a, b = jnp.split(x @ weights(4, 6), 2, axis=1)
    h = jnp.tanh(a) * jax.nn.relu(b) - 0.5 * a
    return jnp.maximum(h, b) @ weights(3, 2, seed=1) - jnp.exp(h).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("fn", [logits_fn(), branches], ids=["net", "branches"])
def test_points_stay_inside(fn, norm, key):
    ball = Ball(norm, EPS[norm])

    @jax.jit
    def study(x, key):
        found = [bounds.forward(fn, ball.region(x), intersect=intersect) for intersect in (False, True)]
        return found, bounds.ibp(fn, ball.region(x)), search(fn, ball, x, key)

    (plain, cut), interval, (least, greatest) = study(X, key)
    for lower, upper in (plain, cut):
        assert (lower <= least + 1e-5).all()
        assert (upper >= greatest - 1e-5).all()
    assert width(cut) <= min(width(plain), width(interval)) + 1e-5


def test_one_hidden_layer_is_crown():
    fn, region = (lambda x: mlp(mlp_params(4, 7, 3), x)), Ball("linf", 0.2).region(X)
    forward, crown = (method(fn, region, intersect=False) for method in (bounds.forward, bounds.crown))
    for ours, theirs in zip(forward, crown, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_it_is_between_intervals_and_crown():
    fn, region = logits_fn(), Ball("linf", 0.15).region(X)
    widths = [width(method(fn, region)) for method in (bounds.crown, bounds.forward, bounds.ibp)]
    assert widths[0] < widths[1] < widths[2]


def test_affine_functions_are_exact():
    kernel = weights(4, 5)
    region = Ball("linf", 0.2).region(X)
    lower, upper = bounds.forward(lambda x: (2.0 * x - x[:, ::-1]) @ kernel - 1.0, region)
    matrix = (2.0 * jnp.eye(4) - jnp.eye(4)[::-1]) @ kernel
    center, radius = 0.5 * (region.lower + region.upper), 0.5 * (region.upper - region.lower)
    np.testing.assert_allclose(lower, center @ matrix - 1.0 - radius @ jnp.abs(matrix), atol=1e-5)
    np.testing.assert_allclose(upper, center @ matrix - 1.0 + radius @ jnp.abs(matrix), atol=1e-5)


def test_gradients_are_differences():
    ball = Ball("linf", 0.1)
    value = lambda x: bounds.forward(logits_fn(), ball.region(x)).lower.sum()
    x = jnp.clip(X, 0.2, 0.8)
    gradient = jax.grad(value)(x)
    step = 1e-3 * jnp.sign(gradient)
    np.testing.assert_allclose((value(x + step) - value(x - step)) / 2, (gradient * step).sum(), rtol=0.02)


def test_box_of_ends():
    lower, upper = X - 0.1, X + jnp.array([[0.0, 0.1, 0.2, 0.3]])
    region = balls.box(lower, upper)
    found = bounds.ibp(lambda x: x, region)
    np.testing.assert_allclose(found.lower, lower, atol=1e-6)
    np.testing.assert_allclose(found.upper, upper, atol=1e-6)
    assert (jnp.abs(region.center - lower) <= region.radius + 1e-6).all()
    np.testing.assert_array_equal(balls.box(lower, upper, center=X).center, X)
    for bad in ({"lower": upper + 1.0}, {"upper": upper * jnp.nan}, {"upper": upper[:1]}, {"center": upper + 1.0}):
        with pytest.raises(ValueError, match=r"box"):
            balls.box(**({"lower": lower, "upper": upper} | bad))


def test_a_mask_perturbs_a_part_only():
    mask = jnp.array([[True, False, True, False]])
    region = Ball("linf", jnp.where(mask, 0.1, 0.0)).region(X)
    assert ((region.upper - region.lower > 0) == mask).all()
    found = bounds.crown(lambda x: x[:, 1] - x[:, 3], region)
    np.testing.assert_allclose(found.upper, found.lower, atol=1e-6)


@pytest.mark.parametrize("method", [bounds.ibp, bounds.forward, bounds.crown_ibp, bounds.crown, bounds.alpha_crown])
def test_perturbed_weights_are_shared(method):
    params, eps = mlp_params(4, 5, 2), 0.02
    fn = lambda pair: mlp(pair[1], pair[0])
    options = {"num_steps": 2, "hidden_steps": 1} if method is bounds.alpha_crown else {}

    @jax.jit
    def bound(x, eps):
        ball = Ball("linf", eps, -jnp.inf, jnp.inf)
        around = jax.tree.map(lambda leaf: balls.shared(ball.region(leaf)), params)
        return method(fn, (Ball("linf", 0.05).region(x), around), **options)

    lower, upper = bound(X, eps)
    assert lower.shape == (3, 2)
    random = np.random.default_rng(0)

    def moved(array, reach):
        return array + jnp.asarray(random.choice([-reach, reach], array.shape), array.dtype)

    for _ in range(50):
        out = mlp(jax.tree.map(lambda leaf: moved(leaf, eps), params), jnp.clip(moved(X, 0.05), 0.0, 1.0))
        assert ((lower <= out + 1e-5) & (out <= upper + 1e-5)).all()
    fixed = bound(X, 0.0)
    assert width(fixed) < width(bounds.Interval(lower, upper)) < 10.0
    region = Ball("linf", 0.05).region(X)
    for ours, theirs in zip(fixed, method(lambda x: mlp(params, x), region, **options), strict=True):
        # With weights that are perturbed, by nothing, products are relaxed: nothing is lost at zero width.
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_nothing_but_shared_regions_has_no_batch():
    region = balls.shared(Ball("linf", 0.1).region(X[0]))
    with pytest.raises(ValueError, match="batch axis"):
        bounds.ibp(lambda x: x[None], region)
