"""The extreme values of linear functions over balls in boxes, against linear programs and numerical solvers."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from bounds_helpers import EPS, METHODS, exact_minimum, weights

from rdx import bounds
from rdx.balls import Ball

BOXES = {"none": (-np.inf, np.inf), "unit": (0.0, 1.0), "half": (0.0, np.inf)}
DIM = 7


def problem(seed=0, num=4, dim=DIM):
    random = np.random.default_rng(seed)
    # Example 0 is in a corner of the box; row 0 is zero, row 1 has a single entry, row 2 has equal ones.
    x = np.clip(random.uniform(-0.3, 1.3, size=(num, dim)), 0.0, 1.0)
    x[0] = random.integers(0, 2, size=dim)
    rows = random.normal(size=(6, dim))
    rows[0], rows[1, 1:], rows[2] = 0.0, 0.0, np.sign(rows[2])
    return jnp.asarray(x, jnp.float32), jnp.asarray(rows, jnp.float32)


def radii(kind, norm, x):
    random = np.random.default_rng(5)
    each = random.uniform(0.0, 2.0, size=x.shape) * (random.uniform(size=x.shape) > 0.3)
    return EPS[norm] * jnp.asarray({
        "scalar": 1.0, "huge": 100.0, "tiny": 1e-4, "zero": 0.0, "per_example": np.linspace(0.0, 3.0, len(x)),
        "per_element": each, "frozen": np.zeros(x.shape),
    }[kind], jnp.float32)


KINDS = ("scalar", "huge", "tiny", "zero", "per_example", "per_element", "frozen")


def minima(rows, ball, x):
    return bounds.crown(lambda x: x @ rows.T, ball.region(x)).lower


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("norm", EPS)
def test_minimum_is_exact(norm, box, kind):
    x, rows = problem()
    ball = Ball(norm, radii(kind, norm, x), *BOXES[box])
    region = ball.region(x)
    found = jax.jit(minima)(rows, ball, x)
    exact = np.array([[exact_minimum(row, region, i) for row in rows] for i in range(len(x))])
    scale = 1.0 + np.abs(exact).max()
    assert (found <= exact + 1e-5 * scale).all()
    assert (found >= exact - 1e-4 * scale).all()


@pytest.mark.parametrize("norm", EPS)
def test_many_elements(norm):
    x, rows = problem(num=2, dim=200)
    ball = Ball(norm, 4.0 * EPS[norm])
    exact = np.array([[exact_minimum(row, ball.region(x), i) for row in rows] for i in range(len(x))])
    np.testing.assert_allclose(jax.jit(minima)(rows, ball, x), exact, rtol=0.0, atol=2e-5 * np.abs(exact).max())


def test_reference_agrees_with_a_general_solver():
    x, rows = problem(num=3)
    ball = Ball("l2", radii("per_element", "l2", x) + 0.1)
    region = ball.region(x)
    for i in range(len(x)):
        center, radius = (np.asarray(a[i], np.float64) for a in (region.center, region.radius))
        room = list(zip(*(np.asarray(a[i], np.float64) for a in (region.lower, region.upper)), strict=True))
        inside = {"type": "ineq", "fun": lambda v, c=center, r=radius: 1.0 - np.square((v - c) / r).sum()}
        for row in np.asarray(rows, np.float64)[3:]:
            solved = scipy.optimize.minimize(
                row.dot, center, jac=lambda _, row=row: row, method="SLSQP", bounds=room, constraints=[inside],
                options={"ftol": 1e-12, "maxiter": 500},
            )
            np.testing.assert_allclose(exact_minimum(row, region, i), solved.fun, atol=1e-6)


@pytest.mark.parametrize("norm", EPS)
def test_without_box_it_is_the_dual_norm(norm):
    x, rows = problem()
    dual = np.linalg.norm(rows, {"linf": 1, "l2": 2, "l1": np.inf}[norm], axis=1)
    expected = np.asarray(x @ rows.T) - EPS[norm] * dual[None]
    np.testing.assert_allclose(minima(rows, Ball(norm, EPS[norm], -jnp.inf, jnp.inf), x), expected, atol=5e-6)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("norm", EPS)
def test_gradients_are_those_of_the_exact_minimum(norm, box):
    x, rows = problem()
    # Away from the border: there the derivative with respect to the center has two sides.
    x = 0.05 + 0.9 * x
    eps = EPS[norm]

    def total(x, eps, rows):
        return minima(rows, Ball(norm, eps, *BOXES[box]), x).sum(axis=1)

    by_x, by_eps, by_rows = jax.jit(jax.jacrev(total, argnums=(0, 1, 2)))(x, jnp.float32(eps), rows[3:])

    def exact(x, eps, rows):
        lower, upper = (np.clip(x + sign * eps, *BOXES[box]) for sign in (-1, 1))
        region = types.SimpleNamespace(center=x, radius=np.full_like(x, eps), lower=lower, upper=upper, norm=norm)
        return np.array([sum(exact_minimum(row, region, i) for row in rows) for i in range(len(x))])

    x64, rows64, step = np.asarray(x, np.float64), np.asarray(rows[3:], np.float64), 1e-6
    difference = (exact(x64, eps + step, rows64) - exact(x64, eps - step, rows64)) / (2 * step)
    np.testing.assert_allclose(by_eps, difference, atol=2e-3)
    for i in range(DIM):
        move = step * np.eye(DIM)[i][None]
        difference = (exact(x64 + move, eps, rows64) - exact(x64 - move, eps, rows64)) / (2 * step)
        np.testing.assert_allclose(jnp.diagonal(by_x[:, :, i]), difference, atol=2e-3)
        difference = (exact(x64, eps, rows64 + move) - exact(x64, eps, rows64 - move)) / (2 * step)
        np.testing.assert_allclose(by_rows[:, :, i].sum(axis=1), difference, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", EPS)
def test_gradients_are_finite(norm, kind):
    x, rows = problem()

    def total(x, eps, rows):
        return minima(rows, Ball(norm, eps), x).sum()

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(x, radii(kind, norm, x), rows):
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("method", METHODS)
def test_a_ball_enters_affine_layers_beside_the_one_to_bound(method, norm):
    # While the relu is entered, the other branch is ahead: its layers have references but no centers yet.
    x, _ = problem(num=2, dim=4)
    fn = lambda x: jax.nn.relu(x @ weights(4, 3) + 5.0) + (x @ weights(4, 2, seed=1)) @ weights(2, 3, seed=2)
    region = Ball(norm, EPS[norm]).region(x)
    found = METHODS[method](fn, region)
    # The relu is always on, so the function is affine; IBP bounds its branches one by one.
    row = np.asarray(weights(4, 3) + weights(4, 2, seed=1) @ weights(2, 3, seed=2), np.float64)[:, 0]
    for i in range(len(x)):
        least = exact_minimum(row, region, i) + 5.0
        assert found.lower[i, 0] <= least + 1e-5
        assert method == "ibp" or found.lower[i, 0] >= least - 1e-5
