"""8-bit images: levels, the defender's ball, the nearest choice, and what the authors' truncation does instead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx import robustify
from rdx.balls import Ball

_RADII = {"linf": (0.0, 0.5 / 255, 0.1, 4 / 255, 0.3), "l2": (0.01, 1.0, 4.0), "l1": (0.1, 5.0)}


def _images(key, num_levels=255, shape=(16, 7, 7, 1)):
    return jax.random.randint(key, shape, 0, num_levels + 1).astype(jnp.float32) / num_levels


def _defended(key, x, ball):
    return robustify.defend(x, 20.0 * jax.random.normal(key, x.shape), ball)


@pytest.mark.parametrize(("norm", "eps"), [(norm, eps) for norm, radii in _RADII.items() for eps in radii])
def test_images_are_bytes_inside_ball_and_box(key, norm, eps):
    ball = Ball(norm, eps)
    x = _images(key)
    x_defended = _defended(jax.random.key(1), x, ball)
    result = robustify.quantise(x_defended, x, ball)
    levels = 255 * np.asarray(result, np.float64)
    # float32 holds k / 255 to 6e-8 of its value.
    np.testing.assert_allclose(levels, np.rint(levels), atol=2e-5)
    assert ball.contains(result, x).all()
    assert np.abs(result - x_defended).max() < 1.0001 / 255
    np.testing.assert_array_equal(robustify.quantise(result, x, ball), result)
    np.testing.assert_allclose(jax.jit(robustify.quantise)(x_defended, x, ball), result, atol=1e-7)


@pytest.mark.parametrize("num_bits", [2, 8])
def test_linf_takes_the_nearest_level_that_the_ball_allows(key, num_bits):
    num_levels = 2**num_bits - 1
    ball = Ball("linf", 0.25)
    x = _images(key, num_levels)
    x_defended = _defended(jax.random.key(1), x, ball)
    result = np.asarray(robustify.quantise(x_defended, x, ball, num_bits=num_bits), np.float64)
    levels = np.arange(num_levels + 1) / num_levels
    x, x_defended = (np.asarray(array, np.float64)[..., None] for array in (x, x_defended))
    is_allowed = np.abs(levels - x) <= 0.25 + 1e-6
    gaps = np.where(is_allowed, np.abs(levels - x_defended), np.inf)
    # Between two levels either may be taken, up to the rounding of float32.
    np.testing.assert_allclose(np.abs(result - x_defended[..., 0]), gaps.min(axis=-1), atol=1e-6)
    # Where the defender goes to the end of the ball, the nearest level lies outside.
    assert (np.abs(np.rint(x_defended * num_levels) / num_levels - x) > 0.25 + 1e-6).any()


def test_only_images_that_leave_an_l2_ball_are_rounded_towards_the_original():
    ball = Ball("l2", 1.2 / 255)
    x = jnp.full((2, 1, 2), 100 / 255)
    x_defended = x + jnp.array([[[0.8, 0.8]], [[0.8, 0.2]]]) / 255
    result = 255 * robustify.quantise(x_defended, x, ball) - 100
    np.testing.assert_allclose(result, [[[0, 0]], [[1, 0]]], atol=1e-4)


def test_truncation_as_released_leaves_the_ball(key):
    ball = Ball("linf", 0.1)
    x = _images(key)
    x_defended = _defended(jax.random.key(1), x, ball)
    truncated = jnp.floor(255 * x_defended) / 255
    assert not ball.contains(truncated, x).all()
    assert float((truncated - x_defended).mean()) < -0.3 / 255
    assert abs(float((robustify.quantise(x_defended, x, ball) - x_defended).mean())) < 0.1 / 255


def test_what_cannot_be_rounded_is_named(key):
    x = _images(key)
    with pytest.raises(ValueError, match="give 1 to 8"):
        robustify.quantise(x, x, Ball("linf", 0.1), num_bits=9)
    with pytest.raises(ValueError, match="do not have 8 bits"):
        robustify.quantise(x, 0.999 * x, Ball("linf", 0.1))
