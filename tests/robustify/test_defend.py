"""The defensive perturbation: in ball and box for every z, Eq. (5), and gradients that stay finite."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx import robustify
from rdx.balls import Ball
from rdx.robustify.objective import check_budget

NORMS = ("linf", "l2", "l1")
RADII = {"scalar": 0.3, "per example": jnp.linspace(0.0, 0.6, 6), "none": 0.0}


def _inputs(key):
    # A third of the elements lies on the faces of the box.
    return jnp.clip(2.0 * jax.random.uniform(key, (6, 4, 4, 1)) - 0.5, 0.0, 1.0)


def _directions(key):
    spread = jax.random.normal(jax.random.fold_in(key, 1), (6, 4, 4, 1))
    return {"normal": spread, "one way": jnp.ones_like(spread), "single": jnp.zeros_like(spread).at[:, 1, 2].set(-1.0)}


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("norm", NORMS)
def test_every_z_stays_in_ball_and_box(norm, radius, key):
    x, ball = _inputs(key), Ball(norm, RADII[radius])
    for direction in _directions(key).values():
        for size in (1e-6, 1.0, 30.0, 1e6, 1e12, -1e6):
            defended = robustify.defend(x, size * direction, ball)
            assert jnp.isfinite(defended).all()
            assert ball.contains(defended, x, tolerance=2e-6).all()
            assert ((defended >= 0.0) & (defended <= 1.0)).all()


def test_equation_5_where_nothing_is_clipped(key):
    x = 0.4 + 0.2 * jax.random.uniform(key, (5, 7))
    z = 3.0 * jax.random.normal(jax.random.fold_in(key, 1), (5, 7))
    eps = 0.3
    expected = np.asarray(x, np.float64) + 2.0 * eps * (1.0 / (1.0 + np.exp(-np.asarray(z, np.float64))) - 0.5)
    np.testing.assert_allclose(robustify.defend(x, z, Ball("linf", eps)), expected, rtol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_map_of_the_other_norms(norm, key):
    x = jnp.full((5, 7), 0.5)
    z = 3.0 * jax.random.normal(key, (5, 7))
    size = np.linalg.norm(np.asarray(z, np.float64), ord={"l2": 2, "l1": 1}[norm], axis=1)
    expected = 0.5 + 0.2 * np.asarray(z) / (1.0 + size)[:, None]
    np.testing.assert_allclose(robustify.defend(x, z, Ball(norm, 0.2)), expected, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_is_the_identity_with_a_useful_gradient(norm, key):
    x, ball = _inputs(key), Ball(norm, 0.3)
    np.testing.assert_array_equal(robustify.defend(x, jnp.zeros_like(x), ball), x)
    # Elements on a face of the box must be able to leave it.
    slope = jax.grad(lambda z: robustify.defend(x, z, ball).sum())(jnp.zeros_like(x))
    assert (slope > 0.05).all()


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_finite_everywhere(norm, key):
    x, ball = _inputs(key), Ball(norm, 0.3)
    weight = jax.random.normal(jax.random.fold_in(key, 2), x.shape)
    slope = jax.jit(jax.grad(lambda z: (weight * robustify.defend(x, z, ball)).sum()))
    for direction in _directions(key).values():
        for size in (0.0, 1e-30, 1e-6, 1.0, 1e6, -1e6):
            assert jnp.isfinite(slope(size * direction)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_boundary_is_reached_in_the_limit(norm, key):
    x = jnp.full((4, 6), 0.5)
    direction = jax.random.normal(key, x.shape)
    reached = [Ball(norm, 0.3).distance(robustify.defend(x, size * direction, Ball(norm, 0.3)), x)
               for size in (0.1, 1.0, 3.0, 1e6)]
    assert all((a < b).all() for a, b in itertools.pairwise(reached))
    np.testing.assert_allclose(reached[-1], 0.3, rtol=1e-5)


def test_different_boxes_are_refused():
    def check(defense, low, high):
        check_budget(defense, Ball("linf", 0.0, low=low, high=high))

    check(Ball("linf", 0.1), 0.0, 1.0)
    check(Ball("linf", 0.1, low=np.zeros(3)), np.zeros(3), 1.0)
    for low, high in ((-1.0, 1.0), (0.0, 2.0), (np.zeros(3), 1.0)):
        with pytest.raises(ValueError, match="different boxes"):
            check(Ball("l2", 0.1), low, high)
