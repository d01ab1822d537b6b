"""Loss fusion against attacked points, chords by hand, and intervals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rdx import attacks, bounds, losses, margins, models
from rdx.balls import Ball


def test_fused_bounds_hold_at_attacked_points_and_end_as_intervals():
    net = models.ConvNet((models.Conv(4, 3, 2), models.Conv(4, 3, 1)), (8,), 3)
    labels, ball = jnp.arange(6, dtype=jnp.int32) % 3, Ball("linf", 0.1)
    pattern_key, noise_key = jax.random.split(jax.random.key(0))
    patterns = 0.25 + 0.5 * jax.random.bernoulli(pattern_key, shape=(3, 6, 6, 1)).astype(jnp.float32)
    x = patterns[labels] + 0.2 * jax.random.uniform(noise_key, (6, 6, 6, 1))
    logits_fn, region = models.logits_fn(net, net.init(jax.random.key(1), x)), ball.region(x)
    fused = jax.jit(functools.partial(bounds.fused_cross_entropy, logits_fn, region, labels))
    linear, both, interval = (np.asarray(fused(crown_share=share).loss) for share in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(interval, bounds.worst_case(logits_fn, region, labels).loss, rtol=1e-5)
    attacked = attacks.pgd(jax.random.key(0), logits_fn, x, labels, ball=ball, num_steps=30).x_adv
    points = [attacked, *(ball.sample(jax.random.split(jax.random.key(i), 6), x) for i in range(20))]
    worst = np.max([losses.cross_entropy(logits_fn(point), labels) for point in points], axis=0)
    for bound in (linear, both, interval):
        assert (bound >= worst - 1e-6).all()
    # Where every margin is bounded at least as tightly by substitution, so is the loss; see the docstring.
    fn = margins.of(logits_fn)
    rows = bounds.crown_ibp(fn, region, labels, relu_lower=bounds.relaxations.same_slope, intersect=False).lower
    is_tighter = np.asarray((rows >= bounds.ibp(fn, region, labels).lower).all(axis=1))
    assert is_tighter.any()
    assert (linear <= interval + 1e-5)[is_tighter].all()
    assert (linear < 0.98 * interval).any()


def test_fused_bounds_of_a_linear_net_are_those_of_chords():
    kernel = jnp.array([[1.0, -2.0, -4.0], [0.0, 1.0, -1.0]])
    x, labels = jnp.array([[0.4, 0.6]]), jnp.array([1], jnp.int32)
    found = bounds.fused_cross_entropy(lambda x: x @ kernel, Ball("linf", 0.2).region(x), labels).loss
    differences = np.asarray(kernel)[:, [0, 2]] - np.asarray(kernel)[:, 1:2]
    middle, radius = np.asarray(x[0]) @ differences, 0.2 * np.abs(differences).sum(axis=0)
    lower, upper = middle - radius, middle + radius
    slope = (np.exp(upper) - np.exp(lower)) / (upper - lower)
    row = differences @ slope
    total = np.asarray(x[0]) @ row + 0.2 * np.abs(row).sum() + (np.exp(upper) - slope * upper).sum()
    np.testing.assert_allclose(found, [np.log1p(total)], rtol=1e-5)
    assert found[0] < np.log1p(np.exp(upper).sum())


def test_fused_bounds_survive_huge_logits():
    x, labels = jnp.array([[0.4, 0.6]]), jnp.array([0], jnp.int32)
    fused = lambda scale: bounds.fused_cross_entropy(
        lambda x: scale * jnp.stack([x[:, 0], x[:, 1]], axis=1), Ball("linf", 0.1).region(x), labels
    ).loss[0]
    value, slope = jax.value_and_grad(fused)(1000.0)
    np.testing.assert_allclose(value, 400.0, rtol=1e-5)  # z_1 - z_0 is at most 0.4 scale
    np.testing.assert_allclose(slope, 0.4, rtol=1e-3)
