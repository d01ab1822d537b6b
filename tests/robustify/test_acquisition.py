"""The camera: an exact identity, gradients against differences, one draw per picture, ranges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx import images
from rdx.robustify import acquisition
from rdx.robustify.acquisition import IDENTITY, Camera

# Compiled as a whole: one by one the operations take far longer.
acquire = jax.jit(acquisition.acquire)
SMALL = Camera(shift=1.0, num_taps=5)


def _objects(key, num=6, channels=1):
    return jax.random.uniform(key, (num, 10, 12, channels))


@pytest.mark.parametrize("channels", [1, 3])
def test_ranges_of_zero_are_the_identity_to_the_last_bit(channels, key):
    w, camera = _objects(key, channels=channels), dataclasses.replace(IDENTITY, num_channels=channels)
    np.testing.assert_array_equal(acquire(key, w, camera), w)


def test_the_defaults_are_the_released_ranges_with_their_inversion_and_three_channels(key):
    camera = Camera()
    assert (camera.shift, camera.degrees, camera.distortion, camera.distortion_probability) == (5, 5, 0.25, 0.99)
    assert (camera.noise, camera.sigma, camera.jitter, camera.num_taps) == ((0.001, 0.1), (0.01, 1.0), (0.1,) * 4, 9)
    w = _objects(key)
    still = dataclasses.replace(IDENTITY, is_inverted=True, num_channels=3)
    np.testing.assert_array_equal(acquire(key, w, still), jnp.repeat(1.0 - w, 3, axis=-1))
    # What comes in from outside is blank paper.
    away = dataclasses.replace(still, shift=1e4)
    np.testing.assert_array_equal(acquire(key, w, away), jnp.ones((6, 10, 12, 3)))


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_agree_with_finite_differences(channels, key):
    with jax.enable_x64(True):
        w = jax.random.uniform(key, (3, 10, 12, channels), jnp.float64)
        weight, direction = (jax.random.normal(jax.random.fold_in(key, i), w.shape, w.dtype) for i in (1, 2))

        @jax.jit
        def value(w):
            return (weight * acquire(key, w, SMALL)).sum()

        step = 1e-6
        expected = (value(w + step * direction) - value(w - step * direction)) / (2 * step)
        slope = (jax.jit(jax.grad(value))(w) * direction).sum()
        # The picture is piecewise linear in w: but for rounding, differences are exact.
        np.testing.assert_allclose(slope, expected, rtol=1e-6)
        assert abs(slope) > 0.1


def test_every_object_pixel_is_seen_by_the_gradient(key):
    w = jnp.full((1, 10, 12, 1), 0.5)
    camera = dataclasses.replace(SMALL, shift=0.0, degrees=0.0)
    gradient = jax.jit(jax.grad(lambda w: acquisition.acquire(key, w, camera).sum()))(w)
    assert (jnp.abs(gradient) > 0).all()


def test_every_picture_has_its_own_draw(key):
    same = jnp.repeat(_objects(key, 1), 16, axis=0)
    pictures = np.asarray(acquire(key, same, SMALL))
    assert len({picture.tobytes() for picture in pictures}) == 16
    np.testing.assert_array_equal(acquire(key, same, SMALL), pictures)
    assert not np.array_equal(acquire(jax.random.key(1), same, SMALL), pictures)
    # Every single range differs from picture to picture.
    for name in ("shift", "degrees", "distortion", "noise", "sigma", "jitter"):
        camera = dataclasses.replace(IDENTITY, distortion_probability=1.0, num_taps=5, **{name: getattr(SMALL, name)})
        num = len({picture.tobytes() for picture in np.asarray(acquire(key, same, camera))})
        # A blur of less than a fourteenth of a pixel is none in float32.
        assert num == 16 or (name == "sigma" and num > 8), name


def test_draws_follow_the_index_and_not_the_batch(key):
    w, index = _objects(key), jnp.array([40, 3, 7, 0, 5, 9])
    order = np.array([4, 1, 0])
    whole, part = acquire(key, w, SMALL, index=index), acquire(key, w[order], SMALL, index=index[order])
    np.testing.assert_allclose(part, whole[order], atol=1e-6)
    np.testing.assert_array_equal(acquire(key, w, SMALL), acquire(key, w, SMALL, index=jnp.arange(6)))
    twice = acquire(key, w[:2].at[1].set(w[0]), SMALL, index=jnp.array([8, 8]))
    np.testing.assert_array_equal(twice[0], twice[1])


def _shots(key, camera, *, shape=(20, 40, 1)):
    draw = jax.jit(jax.vmap(lambda key: acquisition.draw(key, camera, shape, jnp.float32)))
    return draw(jax.random.split(key, 3000))


def test_ranges_are_respected_and_filled(key):
    shots = _shots(key, Camera())
    inwards = jnp.abs(shots.displacement)
    for values, low, high in (
        (shots.shift, -5, 5), (jnp.rad2deg(shots.angle), -5, 5), (inwards[..., 0], 0, 2.5), (inwards[..., 1], 0, 5),
        (shots.sigma, 0.01, 1), (shots.brightness, 0.9, 1.1), (shots.contrast, 0.9, 1.1), (shots.saturation, 0.9, 1.1),
        (shots.hue, -0.1, 0.1),
    ):
        assert values.min() >= low - 1e-5
        assert values.max() <= high + 1e-5
        # The least of 3000 uniform draws is above a hundredth of the range with probability 1e-13.
        assert values.min() < low + 0.01 * (high - low)
        assert values.max() > high - 0.01 * (high - low)


def test_corners_move_inwards_and_the_noise_has_its_deviations(key):
    shots = _shots(key, Camera())
    inwards = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert (inwards[None] * shots.displacement >= 0).all()
    flat = 3000 - int((jnp.abs(shots.displacement) > 0).any(axis=(1, 2)).sum())
    assert 8 < flat < 60  # one in a hundred has no perspective: 30, deviation 5.4
    deviations = shots.noise.std(axis=(1, 2, 3))
    # 800 values each: a deviation is known to 2.5 %; the mean of U(0.001, 0.1) to 0.0005.
    assert 0.0005 < deviations.min() < 0.005
    assert 0.095 < deviations.max() < 0.115
    np.testing.assert_allclose(deviations.mean(), 0.0505, atol=0.002)
    np.testing.assert_allclose(shots.noise.mean(), 0.0, atol=1e-3)


def test_the_parts_are_those_of_images_in_their_order(key):
    w = _objects(key, 1)
    shot = jax.tree.map(lambda leaf: leaf[:1], _shots(key, SMALL, shape=w.shape[1:]))

    @jax.jit
    def by_hand(w, shot):
        matrix = images.compose(
            images.translation(shot.shift), images.rotation(shot.angle, height=10, width=12),
            images.perspective(shot.displacement, height=10, width=12),
        )
        x = images.gaussian_blur(1.0 - images.warp(w, matrix) + shot.noise, shot.sigma, num_taps=5)
        return images.adjust_contrast(images.adjust_brightness(x, shot.brightness), shot.contrast)

    x = by_hand(w, shot)
    np.testing.assert_allclose(jax.jit(acquisition.take)(w, shot, SMALL), jnp.repeat(x, 3, axis=-1), atol=1e-6)


def test_ranges_are_traced(key):
    count, w = 0, _objects(key)

    @jax.jit
    def picture(camera):
        nonlocal count
        count += 1
        return acquisition.acquire(key, w, camera)

    for degrees in (5.0, 10.0):
        picture(dataclasses.replace(SMALL, degrees=degrees))
    assert count == 1


def _trace(key, w, camera, **options):
    """Looks at the camera's numbers, and computes nothing."""
    return jax.eval_shape(lambda w: acquisition.acquire(key, w, camera, **options), w)


@pytest.mark.parametrize(("changes", "message"), [
    ({"degrees": -1.0}, "negative"), ({"noise": (0.2, 0.1)}, "in order"), ({"sigma": (0.2, 0.1)}, "in order"),
    ({"distortion": 1.0}, "below 1"), ({"distortion_probability": 1.5}, "at most 1"), ({"num_channels": 2}, "1 or 3"),
    ({"num_taps": 4}, "odd"),
])
def test_mistakes_are_named(changes, message, key):
    with pytest.raises(ValueError, match=message):
        _trace(key, _objects(key), dataclasses.replace(SMALL, **changes))


def test_objects_that_do_not_fit_are_named(key):
    for w in (jnp.zeros((2, 8, 8)), jnp.zeros((2, 8, 8, 2))):
        with pytest.raises(ValueError, match=r"\[B, H, W, C\]"):
            _trace(key, w, SMALL)
    with pytest.raises(ValueError, match="one integer per example"):
        _trace(key, _objects(key), SMALL, index=jnp.arange(5))
