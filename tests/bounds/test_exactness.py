"""Small nets whose bounds are known: by hand, by brute force, or because nothing is lost."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import EPS, METHODS, mlp, mlp_params, weights

from rdx import bounds
from rdx.balls import Ball
from rdx.bounds import relaxations

SQUARE = Ball("linf", 1.0, -jnp.inf, jnp.inf)
ORIGIN = jnp.zeros((1, 2))


def sum_and_difference(x):
    return jax.nn.relu(x @ jnp.array([[1.0, 1.0], [1.0, -1.0]]))


# Over the square both hidden values range over [-2, 2]: the upper line of relu is h / 2 + 1.
@pytest.mark.parametrize(("relu_lower", "lower", "upper"), [
    (relaxations.zero_slope, [0.0, -2.0], [3.0, 2.0]),
    (relaxations.adaptive, [0.0, -2.0], [3.0, 2.0]),
    (relaxations.same_slope, [-1.0, -2.0], [3.0, 2.0]),
    (relaxations.one_slope, [-2.0, -3.0], [3.0, 3.0]),
])
@pytest.mark.parametrize("method", [bounds.crown_ibp, bounds.crown])
def test_crown_by_hand(method, relu_lower, lower, upper):
    # r1 + r2 <= (h1 + h2) / 2 + 2 = x1 + 2; with lower slope 1, r1 - r2 >= h1 - h2 / 2 - 1 = x1 / 2 + 3 x2 / 2 - 1.
    fn = lambda x: sum_and_difference(x) @ jnp.array([[1.0, 1.0], [1.0, -1.0]])
    found = method(fn, SQUARE.region(ORIGIN), relu_lower=relu_lower, intersect=False)
    np.testing.assert_allclose(found.lower, [lower], atol=1e-6)
    np.testing.assert_allclose(found.upper, [upper], atol=1e-6)


def test_ibp_by_hand():
    fn = lambda x: sum_and_difference(x) @ jnp.array([[1.0, 1.0], [1.0, -1.0]])
    np.testing.assert_allclose(bounds.ibp(fn, SQUARE.region(ORIGIN)).lower, [[0.0, -2.0]])
    np.testing.assert_allclose(bounds.ibp(fn, SQUARE.region(ORIGIN)).upper, [[4.0, 2.0]])
    intersected = bounds.crown_ibp(fn, SQUARE.region(ORIGIN), relu_lower=relaxations.one_slope)
    np.testing.assert_allclose(intersected.lower, [[0.0, -2.0]], atol=1e-6)
    np.testing.assert_allclose(intersected.upper, [[3.0, 2.0]], atol=1e-6)


def test_ibp_fuses_the_affine_end():
    # Interval arithmetic layer by layer would say [-6, 6] for h1 + h2 - 2 x1 = 0 on relus that are all active.
    fn = lambda x: (sum_and_difference(x + jnp.array([[5.0, 0.0]])) @ jnp.eye(2)) @ jnp.array([[1.0], [1.0]])
    found = bounds.ibp(fn, SQUARE.region(ORIGIN))
    np.testing.assert_allclose([found.lower, found.upper], [[[6.0]], [[14.0]]], atol=1e-5)
    two_layers = lambda x: (x @ jnp.array([[1.0, 1.0], [1.0, -1.0]])) @ jnp.array([[1.0], [1.0]])
    found = bounds.ibp(two_layers, SQUARE.region(ORIGIN))
    np.testing.assert_allclose([found.lower, found.upper], [[[-2.0]], [[2.0]]], atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_curved_balls_enter_by_their_dual_norm(norm):
    # The smallest box around the ball would give 7 for both.
    row = jnp.array([[3.0], [-4.0]])
    found = bounds.ibp(lambda x: jax.nn.relu(x @ row + 10.0), Ball(norm, 1.0, -jnp.inf, jnp.inf).region(ORIGIN))
    radius = {"l2": 5.0, "l1": 4.0}[norm]
    np.testing.assert_allclose([found.lower, found.upper], [[[10.0 - radius]], [[10.0 + radius]]], rtol=1e-6)


def brute_force(fn, ball, x, num=121):
    steps = jnp.linspace(-1.0, 1.0, num)
    offsets = jnp.stack(jnp.meshgrid(steps, steps), axis=-1).reshape(-1, 1, 2)
    points = jax.vmap(lambda d: ball.project(x + d * ball.radius(x), x))(offsets)
    values = jax.vmap(fn)(points)
    return values.min(axis=0), values.max(axis=0)


@pytest.mark.parametrize("norm", EPS)
def test_random_nets_by_brute_force(norm):
    x = jnp.array([[0.2, 0.7], [0.95, 0.5], [0.4, 0.1]])
    ball = Ball(norm, 0.3)

    @jax.jit
    @jax.vmap
    def study(params):
        fn = partial(mlp, params)
        region = ball.region(x)
        variants = {name: method(fn, region) for name, method in METHODS.items()} | {
            f"{method.__name__}.{slope.__name__}": method(fn, region, relu_lower=slope, intersect=False)
            for method in (bounds.crown, bounds.crown_ibp)
            for slope in (relaxations.adaptive, relaxations.same_slope, relaxations.zero_slope, relaxations.one_slope)
        }
        return variants, brute_force(fn, ball, x)

    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(mlp_params(2, 6, 5, 3, seed=10 * i) for i in range(8)))
    variants, (least, greatest) = study(params)
    for name, found in variants.items():
        assert (found.lower <= least + 1e-5).all(), name
        assert (found.upper >= greatest - 1e-5).all(), name
        if "." not in name:
            assert (found.lower >= variants["ibp"].lower - 1e-5).all(), name
            assert (found.upper <= variants["ibp"].upper + 1e-5).all(), name
    widths = {name: float((found.upper - found.lower).mean()) for name, found in variants.items()}
    # In the mean the order is that of the literature; for single outputs it is not guaranteed.
    assert widths["crown"] < widths["crown_ibp"] < widths["ibp"]
    assert widths["crown"] < 3.0 * float((greatest - least).mean())


@pytest.mark.parametrize("norm", EPS)
def test_crown_is_exact_where_no_neuron_changes_sign(norm):
    # On so small a ball the net is affine; the minimum lies at the corners, which the grid contains for linf.
    x, params = jnp.array([[0.2, 0.7], [0.95, 0.5]]), mlp_params(2, 6, 5, 3)
    ball, fn = Ball(norm, 1e-3), partial(mlp, params)
    jacobian = jax.vmap(jax.jacrev(lambda one: fn(one[None])[0]))(x)
    dual = {"linf": lambda a: jnp.abs(a).sum(-1), "l2": lambda a: jnp.sqrt(jnp.square(a).sum(-1)),
            "l1": lambda a: jnp.abs(a).max(-1)}[norm](jacobian)
    hidden = bounds.ibp(lambda x: x @ params[0][0] + params[0][1][None], ball.region(x))
    assert (hidden.lower * hidden.upper > 0).all()
    for method in (bounds.crown_ibp, bounds.crown):
        found = method(fn, ball.region(x))
        np.testing.assert_allclose(found.lower, fn(x) - 1e-3 * dual, atol=1e-6)
        np.testing.assert_allclose(found.upper, fn(x) + 1e-3 * dual, atol=1e-6)


@pytest.mark.parametrize("method", [bounds.crown_ibp, bounds.crown])
def test_fixed_slopes_make_bounds_that_grow_with_the_ball(method):
    # With adaptive slopes a larger ball may have the tighter relaxation, and the bounds need not be nested.
    x, fn = jnp.array([[0.2, 0.7], [0.95, 0.5]]), partial(mlp, mlp_params(2, 6, 5, 3))
    at = lambda eps: method(fn, Ball("linf", eps).region(x), relu_lower=relaxations.zero_slope, intersect=False)
    lower, upper = jax.jit(jax.vmap(at))(jnp.linspace(0.0, 0.5, 12))
    assert (jnp.diff(lower, axis=0) <= 1e-5).all()
    assert (jnp.diff(upper, axis=0) >= -1e-5).all()


def test_any_slopes_are_sound():
    x, fn, ball = jnp.array([[0.2, 0.7], [0.95, 0.5]]), partial(mlp, mlp_params(2, 6, 5, 3)), Ball("linf", 0.3)
    least, greatest = brute_force(fn, ball, x)

    @jax.jit
    @jax.vmap
    def bound(seed):
        # Slopes that differ from neuron to neuron and have nothing to do with the bounds.
        slopes = lambda lower, upper: jax.random.uniform(jax.random.key(seed), lower.shape)
        return bounds.crown(fn, ball.region(x), relu_lower=slopes, intersect=False)

    lower, upper = bound(jnp.arange(50))
    assert (lower.max(axis=0) <= least + 1e-5).all()
    assert (upper.min(axis=0) >= greatest - 1e-5).all()
    assert (jnp.std(lower, axis=0) > 1e-3).mean() > 0.8


def test_correlations_are_kept():
    # x - relu(x) for x > 0 is 0; interval arithmetic cannot know.
    fn = lambda x: x - jax.nn.relu(x)
    region = Ball("linf", 0.2).region(jnp.array([[0.5]]))
    np.testing.assert_allclose(bounds.crown_ibp(fn, region).upper, [[0.0]], atol=1e-6)
    np.testing.assert_allclose(bounds.crown_ibp(fn, region).lower, [[0.0]], atol=1e-6)
    np.testing.assert_allclose(bounds.ibp(fn, region).upper, [[0.4]], atol=1e-6)


def test_deep_nets_keep_crown_below_ibp():
    params = mlp_params(4, *[8] * 6, 2)
    region = Ball("linf", 0.02).region(0.5 + 0.1 * weights(3, 4))
    fn = partial(mlp, params)
    wide, tight = (jax.jit(partial(method, fn))(region) for method in (bounds.ibp, bounds.crown))
    assert ((tight.upper - tight.lower) < 0.5 * (wide.upper - wide.lower)).all()
