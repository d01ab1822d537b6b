"""Augmentation: identities, per-image draws, range, closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx import data

SHIFT, FLIP = partial(data.random_shift, padding=2), data.random_flip
ROTATE = partial(data.random_rotation, degrees=30.0)
ALL = pytest.mark.parametrize("augment", [SHIFT, ROTATE, FLIP], ids=["shift", "rotation", "flip"])


@pytest.fixture
def x(key):
    return jax.random.uniform(key, (6, 7, 8, 3))


@pytest.mark.parametrize(
    "augment",
    [partial(data.random_shift, padding=0), partial(data.random_rotation, degrees=0.0),
     partial(data.random_flip, probability=0.0)],
)
def test_zero_parameters_change_nothing(key, x, augment):
    assert np.array_equal(augment(key, x), x)


@ALL
def test_shape_dtype_range_and_jit(key, x, augment):
    result = augment(key, x)
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    assert result.min() >= 0
    assert result.max() <= 1
    np.testing.assert_allclose(jax.jit(augment)(key, x), result, atol=1e-6)


@ALL
def test_every_image_has_its_own_draw(key, x, augment):
    same = jnp.broadcast_to(x[:1], (24, *x.shape[1:]))
    results = np.asarray(augment(key, same))
    assert len({result.tobytes() for result in results}) > 1
    assert not np.array_equal(results, augment(jax.random.key(1), same))
    assert np.array_equal(results, augment(key, same))


@ALL
def test_draws_follow_the_index_and_not_the_batch(key, x, augment):
    index = jnp.array([40, 3, 7, 0, 5, 9])
    order = np.array([4, 1, 0])
    whole, part = augment(key, x, index=index), augment(key, x[order], index=index[order])
    np.testing.assert_allclose(part, whole[order], atol=1e-6)
    assert np.array_equal(augment(key, x), augment(key, x, index=jnp.arange(6)))


def test_shifts_are_the_crops_of_the_padded_image_and_all_occur(key, x):
    image = np.asarray(x[0])
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    crops = {padded[r:r + 7, c:c + 8].tobytes() for r in range(3) for c in range(3)}
    results = np.asarray(data.random_shift(key, jnp.broadcast_to(image, (200, *image.shape)), padding=1))
    assert {result.tobytes() for result in results} == crops


@pytest.mark.parametrize("augment", [SHIFT, FLIP], ids=["shift", "flip"])
def test_bytes_stay_bytes(key, augment):
    x = jax.random.randint(key, (3, 5, 5, 1), 0, 256).astype(jnp.uint8)
    assert augment(key, x).dtype == jnp.uint8


def test_flips_mirror_left_to_right_about_half_of_the_images(key, x):
    many = jnp.tile(x[:1], (400, 1, 1, 1))
    is_flipped = np.array([np.array_equal(image, x[0, :, ::-1]) for image in np.asarray(data.random_flip(key, many))])
    assert 150 < is_flipped.sum() < 250
    assert np.array_equal(data.random_flip(key, x, probability=1.0), x[:, :, ::-1])


def test_rotation_by_a_quarter_turn(key, monkeypatch, x):
    square = x[:, :7, :7]
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype, low, high: high)
    turned = data.random_rotation(key, square, degrees=90.0)
    assert any(np.allclose(turned, jnp.rot90(square, k, axes=(1, 2)), atol=1e-5) for k in (1, 3))


def test_rotation_keeps_a_disc_and_fills_corners_with_zero(key):
    rows, columns = np.mgrid[:31, :31] - 15
    bump = np.exp(-(rows ** 2 + columns ** 2) / 60).astype(np.float32)[None, :, :, None]
    result = data.random_rotation(key, jnp.asarray(np.repeat(bump, 8, axis=0)), degrees=45.0)
    np.testing.assert_allclose(result, np.repeat(bump, 8, axis=0), atol=0.02)
    corner = data.random_rotation(key, jnp.ones((64, 9, 9, 1)), degrees=45.0)[:, 0, 0, 0]
    assert corner.min() == 0


def test_rotation_angle_is_traced(key, x):
    count = 0

    def rotate(degrees):
        nonlocal count
        count += 1
        return data.random_rotation(key, x, degrees=degrees)

    compiled = jax.jit(rotate)
    compiled(10.0)
    compiled(20.0)
    assert count == 1
