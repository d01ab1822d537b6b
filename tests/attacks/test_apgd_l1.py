"""Auto-PGD for l1 and from larger radii: hand-computed steps, the adaptive sparsity, and what counts as found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, goals, losses
from rdx.attacks import apgd_l1
from rdx.balls import Ball

FREE = Ball("l1", 1.0, -jnp.inf, jnp.inf)


def test_checkpoints():
    assert apgd_l1.checkpoints(100)[:3] == [3, 7, 11]
    assert apgd_l1.checkpoints(100)[-1] == 99
    assert apgd_l1.checkpoints(24) == list(range(24))


def test_a_step_moves_the_largest_gradients():
    x, gradient = jnp.zeros((2, 5)), jnp.array([[0.5, -3.0, 2.0, 0.1, -1.0], [1.0, 1.0, 0.0, 0.0, 0.0]])
    moved = apgd_l1.ascend(FREE, x, x, gradient, jnp.array([0.6, 0.9]), jnp.array([3, 3]))
    # The second example has two elements with a gradient: they share the step.
    np.testing.assert_allclose(moved, [[0, -0.2, 0.2, 0, -0.2], [0.45, 0.45, 0, 0, 0]], atol=1e-7)


def test_radii_per_element_scale_the_step():
    ball = Ball("l1", jnp.array([[1.0, 0.1, 0.0]]), -jnp.inf, jnp.inf)
    x, gradient = jnp.zeros((1, 3)), jnp.array([[1.0, 2.0, 9.0]])
    moved = apgd_l1.ascend(ball, x, x, gradient, jnp.array([0.5]), jnp.array([2]))
    np.testing.assert_allclose(moved, [[0.25, 0.025, 0.0]], atol=1e-7)


def test_a_check_adapts_to_the_support():
    x = jnp.zeros((4, 40))
    # Supports of 19 and 20 elements after 20: 95 % is not below 95 %; 18 is. The last one meets the least step.
    peak = (jnp.arange(40)[None, :] < jnp.array([[19], [20], [18], [0]])).astype(jnp.float32)
    before = apgd_l1.Sparsity(jnp.full(4, 5), jnp.array([20, 20, 20, 0]))
    after, share, returns = apgd_l1.check(before, jnp.array([0.9, 0.3, 0.3, 0.12]), peak, x)
    np.testing.assert_array_equal(after.support, [19, 20, 18, 0])
    np.testing.assert_array_equal(after.num_moved, [13, 14, 12, 1])
    np.testing.assert_array_equal(returns, [False, False, True, False])
    np.testing.assert_allclose(share, [0.6, 0.2, 1.0, 0.1], rtol=1e-6)


def test_a_search_begins_with_a_fifth_or_the_support():
    x = jnp.zeros((2, 11))
    point = x.at[0, :4].set(1.0)
    fresh, warm = (apgd_l1.begin(point, x, is_warm=is_warm) for is_warm in (False, True))
    np.testing.assert_array_equal(fresh.num_moved, [3, 3])
    np.testing.assert_array_equal(fresh.support, [11, 11])
    np.testing.assert_array_equal(warm.num_moved, [3, 1])
    np.testing.assert_array_equal(warm.support, [4, 0])


def _pit(_, x):
    """Prefers class 1 where the first element is beyond 0.5, and rises along the second."""
    return jnp.stack([jnp.zeros(len(x)), jnp.where(x[:, 0] > 0.5, 10.0, 0.1 * x[:, 1] - 1.0)], axis=1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_what_larger_balls_hold_is_not_found(norm, key):
    # Every random start of the larger balls sees class 1, which the ball itself cannot reach.
    x, labels, ball = jnp.zeros((16, 2)), jnp.zeros(16, int), Ball(norm, 0.45, -1.0, 1.0)
    found = attacks.apgd(key, Partial(_pit, 0.0), x, labels, ball=ball, num_steps=10, larger_radii=True)
    outside = attacks.apgd(
        key, Partial(_pit, 0.0), x, labels, ball=Ball(norm, 1.35, -1.0, 1.0), num_steps=3, num_restarts=4
    )
    assert outside.success.any()
    assert not found.success.any()
    assert ball.contains(found.x_adv, x).all()
    assert (found.loss > losses.cross_entropy(_pit(0.0, x), labels) + 1e-3).all()


def _linear(w, x):
    return x @ w


@pytest.mark.parametrize("larger", [False, True])
def test_the_optimum_of_ball_and_box_on_a_linear_model(larger, key):
    w = jax.random.normal(jax.random.key(1), (50, 2))
    x, ball = jax.random.uniform(jax.random.key(2), (6, 50), minval=0.3, maxval=0.7), Ball("l1", 3.0)
    model = Partial(_linear, w)
    labels, goal = (x @ w).argmax(axis=1), goals.misclassify(losses.margin)
    found = attacks.apgd(key, model, x, labels, ball=ball, goal=goal, larger_radii=larger)
    # The largest weights take all the room that the box leaves, until the radius is spent.
    gain = np.where(labels == 0, 1.0, -1.0)[:, None] * np.asarray(w[:, 1] - w[:, 0])[None]
    order = np.argsort(-np.abs(gain), axis=1)
    room = np.take_along_axis(np.where(gain > 0, 1.0 - x, x), order, axis=1)
    before = np.cumsum(room, axis=1) - room
    best = (np.clip(3.0 - before, 0.0, room) * np.take_along_axis(np.abs(gain), order, axis=1)).sum(axis=1)
    reached = found.loss - losses.margin(x @ w, labels)
    assert (reached <= best * (1 + 1e-5)).all()
    assert (reached >= 0.99 * best).all()


def _bowls(center, x):
    """Has a shallow maximum of the loss at 0.1 and the global one at the center."""
    near = 0.2 - jnp.abs(x - 0.1).sum(axis=1)
    far = 1.0 - jnp.abs(x - center).sum(axis=1)
    return jnp.stack([jnp.zeros(len(x)), jnp.maximum(near, far)], axis=1)


def test_larger_radii_find_what_lies_behind_a_ridge(key):
    x, labels = jnp.zeros((8, 4)), jnp.zeros(8, int)
    center, goal = jnp.array([[0.9, 0.0, 0.0, 0.0]]), goals.misclassify(losses.margin)
    ball = Ball("l1", 1.0, -1.0, 1.0)
    plain, wide = (
        attacks.apgd(key, Partial(_bowls, center), x, labels, ball=ball, goal=goal, num_steps=40, larger_radii=larger)
        for larger in (False, True)
    )
    assert wide.loss.mean() > plain.loss.mean()
    assert (wide.loss > 0.9).mean() > 0.7


@pytest.mark.parametrize("larger", [False, True])
def test_queries_are_counted(larger, key):
    x, labels, seen = jnp.full((3, 4), 0.5), jnp.zeros(3, int), []
    found = attacks.apgd(
        key, Partial(_bowls, jnp.full((1, 4), 0.6)), x, labels, ball=FREE, num_steps=10, num_restarts=2,
        larger_radii=larger, loop=attacks.Loop(progress=lambda done, total, _: seen.append((done, total))),
    )
    np.testing.assert_array_equal(found.forwards, [3, 3, 3])
    np.testing.assert_array_equal(found.gradients, [24 if larger else 20] * 3)
    assert seen[-1] == (24, 24) if larger else (20, 20)


def test_unusable_options_are_refused(key):
    x, labels = jnp.zeros((1, 4)), jnp.zeros(1, int)
    with pytest.raises(ValueError, match="rho"):
        attacks.apgd(key, Partial(_pit, 0.0), x, labels, ball=FREE, rho=0.5)
    with pytest.raises(ValueError, match="larger_radii"):
        attacks.apgd(key, Partial(_pit, 0.0), x, labels, ball=FREE, num_steps=4, larger_radii=True)
