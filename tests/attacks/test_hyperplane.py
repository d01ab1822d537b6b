"""Projections onto a hyperplane in a box against convex programs, corners and hand computations."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from minimal_norms import least_norm

from rdx import norms
from rdx.attacks.hyperplane import nearest_hyperplane, project_onto_hyperplane

NORMS = ("l2", "linf", "l1")
each_norm = pytest.mark.parametrize("norm", NORMS)
project = jax.jit(project_onto_hyperplane, static_argnames="norm")


def _problems(num, dim, seed, shift=0.5):
    """Draws hyperplanes some of which miss the box; some weights are 0, some equal, some points touch the box."""
    rng = np.random.default_rng(seed)
    x = np.clip(1.4 * rng.uniform(size=(num, dim)) - 0.2, 0.0, 1.0)
    w = rng.normal(size=(num, dim)) * rng.choice([0.0, 1e-3, 1.0], p=[0.2, 0.1, 0.7], size=(num, dim))
    w[::5] = np.sign(w[::5])
    b = (w * rng.uniform(size=(num, dim))).sum(axis=1) + shift * rng.normal(size=num)
    return (value.astype(np.float32) for value in (x, w, b))


@each_norm
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-np.inf, np.inf), (0.0, np.inf)])
@pytest.mark.parametrize("dim", [1, 3, 8])
def test_equals_the_convex_program(norm, low, high, dim):
    x, w, b = _problems(60, dim, dim)
    found = np.asarray(project(x, w, b, low, high, norm=norm))
    assert ((found >= low) & (found <= high)).all()
    num_missed = 0
    for i in range(len(x)):
        gap = float(b[i] - w[i].astype(np.float64) @ x[i])
        wanted = least_norm(np.sign(gap) * w[i:i + 1], np.abs([gap]), low - x[i], high - x[i], norm)
        left = abs(float(b[i] - w[i].astype(np.float64) @ found[i]))
        if np.isfinite(wanted):
            assert left < 1e-5
            np.testing.assert_allclose(norms.norm(found[i:i + 1] - x[i:i + 1], norm), [wanted], rtol=1e-4, atol=1e-6)
        else:
            num_missed += 1
            corner = np.where(w[i] * gap > 0, high, np.where(w[i] * gap < 0, low, x[i]))
            np.testing.assert_allclose(found[i], corner, atol=1e-6)
    assert num_missed < 50
    assert num_missed > 0 or dim == 8 or np.isinf(high)


@each_norm
def test_boxes_per_element_and_many_dimensions(norm):
    x, w, b = _problems(20, 300, 1, shift=20.0)
    rng = np.random.default_rng(2)
    reach = rng.uniform(0.0, 0.4, size=(2, *x.shape)).astype(np.float32) * rng.integers(0, 2, size=x.shape)
    low, high = x - reach[0].astype(np.float32), x + reach[1].astype(np.float32)
    found = project(x.reshape(20, 3, 100), w.reshape(20, 3, 100), b, low.reshape(20, 3, 100),
                    high.reshape(20, 3, 100), norm=norm).reshape(20, 300)
    assert ((found >= low) & (found <= high)).all()
    ratios = []
    for i in range(len(x)):
        gap = float(b[i] - w[i].astype(np.float64) @ x[i])
        wanted = least_norm(np.sign(gap) * w[i:i + 1], np.abs([gap]), low[i] - x[i], high[i] - x[i], norm)
        ratios.append(float(norms.norm(found[i:i + 1] - x[i:i + 1], norm)[0]) / wanted if np.isfinite(wanted) else 1.0)
    # <w, x> sums 300 terms in float32, and some gaps are small.
    np.testing.assert_allclose(ratios, 1.0, rtol=1e-3)


def test_by_hand():
    x, w = jnp.array([[0.5, 0.9, 0.5]]), jnp.array([[1.0, 2.0, 0.0]])
    # The gap from 2.3 to 2.6 is 0.3; the second element has room for 0.1 only, where it pays.
    for norm, wanted in {"linf": [0.6, 1.0, 0.5], "l2": [0.6, 1.0, 0.5], "l1": [0.6, 1.0, 0.5]}.items():
        np.testing.assert_allclose(project(x, w, jnp.array([2.6]), 0.0, 1.0, norm=norm), [wanted], atol=1e-6)
    for norm, wanted in {"linf": [0.6, 1.0, 0.5], "l2": [0.56, 1.02, 0.5], "l1": [0.5, 1.05, 0.5]}.items():
        found = project(x, w, jnp.array([2.6]), -jnp.inf, jnp.inf, norm=norm)
        np.testing.assert_allclose(found, [wanted], atol=1e-6)


@each_norm
def test_a_point_on_the_hyperplane_stays(norm):
    x, w = jnp.array([[0.25, 0.5]]), jnp.array([[1.0, -1.0]])
    np.testing.assert_array_equal(project(x, w, jnp.array([-0.25]), 0.0, 1.0, norm=norm), x)
    np.testing.assert_array_equal(project(x, 0 * w, jnp.array([1.0]), 0.0, 1.0, norm=norm), x)


@each_norm
def test_tiny_and_huge_normals(norm):
    x, w, b = _problems(30, 8, 3)
    plain = project(x, w, b, 0.0, 1.0, norm=norm)
    for scale in (1e-25, 1e25):
        # float32 holds the scaled offset with another rounding.
        np.testing.assert_allclose(project(x, scale * w, scale * b, 0.0, 1.0, norm=norm), plain, atol=1e-5)


@each_norm
def test_the_nearest_hyperplane(norm):
    x, w, b = _problems(40, 5, 4)
    x, w, b = x[::4], w.reshape(10, 4, 5), b.reshape(10, 4)
    place, found = nearest_hyperplane(x, w, b, jnp.zeros_like(x), jnp.ones_like(x), norm)
    for i in range(10):
        gaps = b[i] - w[i] @ x[i]
        distances = [least_norm(np.sign(gap) * w[i, j:j + 1], [abs(gap)], -x[i], 1 - x[i], norm)
                     for j, gap in enumerate(gaps)]
        assert np.isfinite(distances).any()
        np.testing.assert_allclose(distances[place[i]], min(distances), rtol=1e-4)
        np.testing.assert_allclose(norms.norm(found[i:i + 1] - x[i:i + 1], norm), [min(distances)], rtol=1e-4)


GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "attacks_fab.npz"


@each_norm
def test_agrees_with_the_released_code(norm):
    """Compares with the projections of AutoAttack's FAB (scripts/make_golden_attacks.py): where they go, how far."""
    stored = np.load(GOLDEN)
    x, w, b = (stored[name].astype(np.float32) for name in ("points", "w", "b"))
    found, theirs = np.asarray(project(x, w, b, 0.0, 1.0, norm=norm), np.float64), stored["points"] + stored[norm]
    size = np.maximum(np.abs(stored["w"]).sum(axis=1), 1e-3)
    gap, left, their_left = (
        np.abs(stored["b"] - (stored["w"] * v).sum(axis=1)) / size for v in (stored["points"], found, theirs)
    )
    distance, theirs = (np.asarray(norms.norm(jnp.asarray(v - stored["points"]), norm)) for v in (found, theirs))
    is_reached = (left < 1e-6) & (gap > 1e-6)
    np.testing.assert_allclose(left, their_left, atol=1e-6)
    np.testing.assert_allclose(distance[is_reached], theirs[is_reached], rtol=1e-5, atol=1e-6)
    assert 0.5 < is_reached.mean() < 0.9
