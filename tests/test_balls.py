"""Balls: projection against a solver, sampling, steepest directions, and errors that name the cure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from rdx import balls, norms
from rdx.balls import Ball

NORMS = ("linf", "l2", "l1")
SHAPE = (4, 1, 5)
RADII = {
    "scalar": 0.4,
    "per example": jnp.array([0.1, 0.3, 0.6, 0.0]),
    "per element": jnp.linspace(0.1, 0.8, 20).reshape(SHAPE),
}


def _points(key, spread=0.5):
    center_key, move_key = jax.random.split(key)
    center = jax.random.uniform(center_key, SHAPE)
    return center + spread * jax.random.normal(move_key, SHAPE), center


def _nearest(norm, point, center, radius, low, high):
    """Solves the projection with SLSQP in `delta = a - b`, `a, b >= 0`, where every norm is smooth."""
    d = point.size
    movable = radius > 0
    unit = np.where(movable, radius, 1.0)
    room = np.concatenate([np.minimum(high - center, 9.0), np.minimum(center - low, 9.0)])
    bounds = [(0.0, r if m else 0.0) for r, m in zip(room, np.tile(movable, 2), strict=True)]

    def slack(ab):
        a, b = ab[:d] / unit, ab[d:] / unit
        if norm == "l1":
            return 1.0 - (a + b).sum()
        return 1.0 - ((a - b) ** 2).sum() if norm == "l2" else 1.0 - np.concatenate([a - b, b - a])

    def objective(ab):
        return ((center + ab[:d] - ab[d:] - point) ** 2).sum()

    found = optimize.minimize(
        objective, np.full(2 * d, 1e-3), bounds=bounds, constraints={"type": "ineq", "fun": slack}, method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )
    return center + found.x[:d] - found.x[d:]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", RADII)
@pytest.mark.parametrize("box", [(0.0, 1.0), (-np.inf, np.inf)])
def test_projection_is_the_nearest_point(norm, kind, box, key):
    ball = Ball(norm, RADII[kind], *box)
    point, center = _points(key)
    projected = np.asarray(ball.project(point, center))
    radius = np.asarray(ball.radius(center), np.float64)
    for p, c, r, found in zip(point, center, radius, projected, strict=True):
        p, c = (np.asarray(v, np.float64).ravel() for v in (p, c))
        expected = _nearest(norm, p, c, r.ravel(), *box)
        np.testing.assert_allclose(found.ravel(), expected, atol=2e-3)
        # The solver stops early now and then; ours must never be farther away.
        assert ((found.ravel() - p) ** 2).sum() <= ((expected - p) ** 2).sum() + 1e-5
    assert np.asarray(ball.contains(jnp.asarray(projected), center)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", RADII)
def test_projection_is_idempotent_and_keeps_inner_points(norm, kind, key):
    ball = Ball(norm, RADII[kind])
    point, center = _points(key)
    once = ball.project(point, center)
    np.testing.assert_allclose(ball.project(once, center), once, atol=1e-6)
    inner = center + 0.5 * (once - center)
    np.testing.assert_allclose(ball.project(inner, center), inner, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_radius_allows_no_movement(norm, key):
    point, center = _points(key)
    np.testing.assert_array_equal(Ball(norm, 0.0).project(point, center), center)
    np.testing.assert_array_equal(Ball(norm, 0.0).sample(jax.random.split(key, 4), center), center)
    assert not Ball(norm, 0.0).contains(point, center).any()


@pytest.mark.parametrize("norm", NORMS)
def test_far_points_reach_the_surface(norm, key):
    point, center = _points(key, spread=1e4)
    projected = Ball(norm, 0.25, -jnp.inf, jnp.inf).project(point, center)
    np.testing.assert_allclose(norms.norm(projected - center, norm), 0.25, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_per_example_and_differentiable(norm, key):
    ball = Ball(norm, 0.3)
    point, center = _points(key)
    together = ball.project(point, center)
    alone = jnp.concatenate([ball.project(point[i:i + 1], center[i:i + 1]) for i in range(len(point))])
    np.testing.assert_allclose(together, alone, atol=1e-7)
    gradients = jax.grad(lambda p, c: ball.project(p, c).sum(), argnums=(0, 1))(point, center)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_samples_are_uniform_in_the_ball(norm):
    n, d = 4000, 3
    center = jnp.zeros((n, d))
    sample = Ball(norm, 2.0, -jnp.inf, jnp.inf).sample(jax.random.split(jax.random.key(1), n), center)
    # In a uniform ball the volume share inside an example's own radius, (r / eps)^d, is uniform over [0, 1].
    share = np.asarray(norms.norm(sample, norm) / 2.0) ** d
    assert share.max() <= 1.0 + 1e-5
    assert abs(share.mean() - 0.5) < 4 / np.sqrt(12 * n)
    assert abs((share < 0.25).mean() - 0.25) < 0.03
    assert np.abs(np.asarray(sample).mean(axis=0)).max() < 0.1


def test_linf_samples_are_uniform_over_ball_and_box():
    center = jnp.full((4000, 2), 0.1)
    sample = np.asarray(Ball("linf", 0.3).sample(jax.random.split(jax.random.key(1), 4000), center))
    assert sample.min() >= 0.0
    assert sample.max() <= 0.4 + 1e-6
    np.testing.assert_allclose(sample.mean(axis=0), 0.2, atol=0.01)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", RADII)
def test_samples_lie_inside(norm, kind, key):
    ball, center = Ball(norm, RADII[kind]), _points(key)[1]
    sample = ball.sample(jax.random.split(key, 4), center)
    assert np.asarray(ball.contains(sample, center)).all()
    assert (np.abs(sample - center).reshape(4, -1).max(axis=1) > 0)[:3].all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_ascent_direction_has_unit_norm_and_rises(norm, scale, key):
    gradient = scale * jax.random.normal(key, (3, 2, 4))
    direction = Ball(norm, 1.0).ascent_direction(gradient)
    np.testing.assert_allclose(norms.norm(direction, norm), 1.0, rtol=1e-5)
    # With fewer than 150 elements the l1 step moves one, so every direction here is the steepest of all.
    rise = ((gradient / scale) * direction).reshape(3, -1).sum(axis=1)
    np.testing.assert_allclose(rise, norms.norm(gradient / scale, norms.dual(norm)), rtol=1e-5)


def test_l1_direction_moves_the_largest_hundredth(key):
    gradient = jax.random.normal(key, (2, 400))
    direction = np.asarray(Ball("l1", 1.0).ascent_direction(gradient))
    for g, moved in zip(np.asarray(gradient), direction, strict=True):
        assert set(np.flatnonzero(moved)) == set(np.argsort(-np.abs(g))[:4])
        np.testing.assert_allclose(moved[moved != 0], np.sign(g[moved != 0]) / 4)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradient_gives_a_zero_step(norm):
    np.testing.assert_array_equal(Ball(norm, 1.0).ascent_direction(jnp.zeros((2, 3))), 0.0)


@pytest.mark.parametrize("norm", NORMS)
def test_contains_sees_ball_box_and_nan(norm):
    ball, center = Ball(norm, 0.2), jnp.array([[0.5, 0.5], [0.1, 0.5], [0.5, 0.5], [0.5, 0.5]])
    point = center + jnp.array([[0.19, 0.0], [-0.15, 0.0], [0.21, 0.0], [jnp.nan, 0.0]])
    np.testing.assert_array_equal(ball.contains(point, center), [True, False, False, False])


def test_region_bounds_every_element():
    x = jnp.array([[0.05, 0.5]])
    region = Ball("l2", 0.1).region(x)
    np.testing.assert_allclose(region.lower, [[0.0, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(region.upper, [[0.15, 0.6]], rtol=1e-6)
    assert region.norm == "l2"


def test_eps_is_a_leaf_and_the_norm_is_not():
    assert jax.tree.structure(Ball("l2", 0.1)) == jax.tree.structure(Ball("l2", 0.2))
    assert jax.tree.structure(Ball("l2", 0.1)) != jax.tree.structure(Ball("l1", 0.1))


@pytest.mark.parametrize(("ball", "scale", "message"), [
    (Ball("linf", -0.1), 1.0, "at least 0"),
    (Ball("linf", jnp.nan), 1.0, "at least 0"),
    (Ball("l7", 0.1), 1.0, "'l7'.*use one of"),
    (Ball("linf", 0.1), 255.0, r"scale images to \[0, 1\]"),
    (Ball("linf", 0.1), jnp.nan, "outside the box"),
    (Ball("linf", 0.1, 1.0, 1.0), 1.0, "low must be below high"),
])
def test_unusable_balls_name_the_cure(ball, scale, message):
    with pytest.raises(ValueError, match=message):
        ball.check(scale * jnp.ones((2, 3)))


def test_usable_balls_pass():
    Ball("linf", 8 / 255).check(np.zeros((2, 3), np.float32))
    Ball("l2", 0.0, -jnp.inf, jnp.inf).check(255.0 * jnp.ones((2, 3)))


@pytest.mark.parametrize(("labels", "message"), [
    (jnp.array([0, 3]), r"0\.\.2"),
    (jnp.array([-1, 0]), r"0\.\.2"),
    (jnp.array([0]), "one integer per example"),
    (jnp.array([0.0, 1.0]), "Labels must be integers"),
    (jnp.eye(2), "one integer per example"),
])
def test_unusable_labels_name_the_cure(labels, message):
    with pytest.raises(ValueError, match=message):
        balls.check_labels(labels, jnp.zeros((2, 3)), 3)
