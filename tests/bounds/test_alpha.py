"""alpha-CROWN: sound with any slopes, never looser than CROWN, optimal where the optimum is known, stops when told."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from bounds_helpers import EPS, inputs, logits_fn, mlp, mlp_params, search, weights
from test_patches import SHAPE, net

from rdx import bounds, margins
from rdx.balls import Ball
from rdx.bounds import chunks, patches

X = inputs((4,), num=3)
LABELS = jnp.array([0, 1, 2])


def tightness(interval):
    return float((interval.upper - interval.lower).mean())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_points_stay_inside_and_crown_is_looser(norm, key):
    fn, ball = logits_fn(), Ball(norm, EPS[norm])

    @jax.jit
    def study(x, key):
        region = ball.region(x)
        found = {
            "crown": bounds.crown(fn, region),
            "output": bounds.alpha_crown(fn, region, hidden_steps=0),
            "all": bounds.alpha_crown(fn, region),
            "shared": bounds.alpha_crown(fn, region, is_shared=True),
        }
        return found, search(fn, ball, x, key)

    found, (least, greatest) = study(X, key)
    for name, (lower, upper) in found.items():
        assert (lower <= least + 1e-5).all(), name
        assert (upper >= greatest - 1e-5).all(), name
        if name != "shared":  # which are the best for the sum of bounds, not for each of them
            assert (lower >= found["crown"].lower - 1e-5).all(), name
            assert (upper <= found["crown"].upper + 1e-5).all(), name
    # Slopes of their own are worth more than shared ones, and those of hidden layers more than the output's alone.
    assert tightness(found["all"]) < tightness(found["output"]) < tightness(found["crown"])
    assert tightness(found["all"]) < tightness(found["shared"]) < tightness(found["crown"])


def best_bound(params, region, row, index):
    """Solves the linear program over all slopes of one hidden layer: the minimum over relu's triangles."""
    (kernel, bias), (out, out_bias) = [[np.asarray(v, np.float64) for v in pair] for pair in params]
    low, high = (np.asarray(getattr(region, end)[index], np.float64) for end in ("lower", "upper"))
    center, radius = kernel.T @ (low + high) / 2 + bias, np.abs(kernel).T @ (high - low) / 2
    l, u = center - radius, center + radius
    count = len(l)
    # Variables x, z: z >= 0, z >= W x + b, z <= u (W x + b - l) / (u - l) where the neuron is unstable.
    slope = np.where(l >= 0, 1.0, np.where(u <= 0, 0.0, u / (u - l)))
    offset = np.where((l < 0) & (u > 0), -slope * l, 0.0)
    above = np.hstack([-slope[:, None] * kernel.T, np.eye(count)]), slope * bias + offset
    below = np.hstack([kernel.T, -np.eye(count)]), -bias
    is_dead = u <= 0
    rows = np.vstack([above[0], below[0][~is_dead]])
    ends = np.concatenate([above[1], below[1][~is_dead]])
    limits = [*zip(low, high, strict=True), *[(0.0, None)] * count]
    cost = np.concatenate([np.zeros(len(low)), out @ row])
    solution = scipy.optimize.linprog(cost, rows, ends, bounds=limits)
    assert solution.success
    return solution.fun + out_bias @ row


def test_one_hidden_layer_reaches_the_linear_program():
    # With one hidden layer the bound is concave in the slopes, and its maximum is the value of the linear program.
    params, ball = mlp_params(4, 12, 3), Ball("linf", 0.3)
    fn = lambda x: mlp(params, x)
    region = ball.region(X)
    found = jax.jit(lambda x: bounds.alpha_crown(fn, ball.region(x), num_steps=200, learning_rate=0.2))(X)
    exact = np.array([[best_bound(params, region, row, i) for row in np.eye(3)] for i in range(len(X))])
    crown = bounds.crown(fn, region)
    gap = np.asarray(exact - crown.lower)
    assert gap.max() > 0.05
    assert (found.lower <= exact + 1e-5).all()
    # Adam's steps fall by 0.98 each: after 200 they are 1 % of the first, and so is what may be left of the gap.
    np.testing.assert_array_less(np.asarray(exact - found.lower), 0.01 * gap.max() + 1e-5)


def test_other_kinks_and_curves(key):
    def fn(x):
        h = jax.nn.leaky_relu(x @ weights(4, 6), 0.2)
        h = jnp.abs(h @ weights(6, 6, seed=1)) - jax.nn.relu(h)
        return jnp.tanh(h) @ weights(6, 2, seed=2) - jax.nn.leaky_relu(-h, 1.5) @ weights(6, 2, seed=3)

    ball = Ball("linf", 0.15)
    lower, upper = jax.jit(lambda x: bounds.alpha_crown(fn, ball.region(x), num_steps=5, hidden_steps=3))(X)
    least, greatest = search(fn, ball, X, key)
    assert (lower <= least + 1e-5).all()
    assert (upper >= greatest - 1e-5).all()
    crown = bounds.crown(fn, ball.region(X))
    assert tightness(bounds.Interval(lower, upper)) < tightness(crown)


def test_without_steps_it_is_crown():
    fn, region = logits_fn(), Ball("linf", 0.15).region(X)
    found = bounds.alpha_crown(fn, region, num_steps=0, hidden_steps=0)
    for ours, theirs in zip(found, bounds.crown(fn, region), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("is_shared", [False, True])
def test_windows_and_chunks_change_nothing(is_shared, monkeypatch):
    fn, ball, x = net("strides"), Ball("linf", 0.05), inputs(SHAPE)

    def study(max_bytes):
        options = {"num_steps": 2, "hidden_steps": 2, "is_shared": is_shared, "max_bytes": max_bytes}
        return jax.jit(lambda x: bounds.alpha_crown(fn, ball.region(x), **options))(x)

    whole, counts, size = study(np.inf), [], chunks._chunk_size
    monkeypatch.setattr(chunks, "_chunk_size", lambda *args: counts.append(size(*args)) or counts[-1])
    # Shared slopes are shared by the rows of a chunk.
    expected = [] if is_shared else [study(1e6)]
    assert is_shared or min(counts) < 50
    monkeypatch.setattr(patches, "image_axes", lambda graph, node: None)
    for found in (*expected, study(np.inf)):
        for ours, theirs in zip(found, whole, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))


def test_ascent_stops_where_it_is_told_example_by_example():
    fn, ball = margins.of(logits_fn()), Ball("linf", 0.3)

    @partial(jax.jit, static_argnames=("num_steps", "stop_above"))
    def lower(x, labels, **options):
        return bounds.alpha_crown(fn, ball.region(x), labels, hidden_steps=0, **options).lower

    first = lower(X, LABELS, num_steps=1)
    level = float(jnp.sort(first.min(axis=1))[1]) - 1e-4  # above one example's bounds, below the others'
    stopped, full = lower(X, LABELS, stop_above=level), lower(X, LABELS)
    is_done = first.min(axis=1) > level
    np.testing.assert_allclose(stopped[is_done], first[is_done], atol=1e-6)
    assert (full[is_done] > first[is_done] + 1e-4).any()
    assert (stopped[~is_done] > first[~is_done] + 1e-5).any()
    for i in range(len(X)):
        alone = lower(X[i : i + 1], LABELS[i : i + 1], stop_above=level)
        np.testing.assert_allclose(alone[0], stopped[i], atol=1e-5)


def test_gradients_are_those_of_the_bound_at_its_slopes():
    fn, ball = logits_fn(), Ball("linf", 0.1)
    value = lambda x: bounds.alpha_crown(fn, ball.region(x), num_steps=40, hidden_steps=10).lower.sum()
    x = jnp.clip(X, 0.2, 0.8)
    gradient = jax.jit(jax.grad(value))(x)
    step = 1e-3 * jnp.sign(gradient)
    rise = (value(x + step) - value(x - step)) / 2
    # The slopes move a little with x; at an optimum that is of second order.
    np.testing.assert_allclose(rise, (gradient * step).sum(), rtol=0.05)
