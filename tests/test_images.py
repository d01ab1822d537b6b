"""Image operations: identities to the last bit, closed forms, other implementations, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from rdx import images

HEIGHT, WIDTH, BATCH = 9, 12, 5


@pytest.fixture
def x(key):
    return jax.random.uniform(key, (BATCH, HEIGHT, WIDTH, 3))


def _zeros(*shape):
    return jnp.zeros((BATCH, *shape))


# Compiled as a whole: one by one the operations take far longer.
warp = jax.jit(images.warp)


@jax.jit
def _perspective(displacement):
    return images.perspective(displacement, height=HEIGHT, width=WIDTH)


@jax.jit
def _rotation(angle):
    return images.rotation(angle, height=HEIGHT, width=WIDTH)


NOTHING = {
    "translation": lambda x: images.warp(x, images.translation(_zeros(2))),
    "rotation": lambda x: images.warp(x, _rotation(_zeros())),
    "perspective": lambda x: images.warp(x, _perspective(_zeros(4, 2))),
    "all of them": lambda x: images.warp(x, images.compose(
        images.translation(_zeros(2)), _rotation(_zeros()), _perspective(_zeros(4, 2))
    )),
    "blur": lambda x: images.gaussian_blur(x, _zeros(), num_taps=5),
    "brightness": lambda x: images.adjust_brightness(x, 1 + _zeros()),
    "contrast": lambda x: images.adjust_contrast(x, 1 + _zeros()),
    "saturation": lambda x: images.adjust_saturation(x, 1 + _zeros()),
    "hue": lambda x: images.adjust_hue(x, _zeros()),
}


@pytest.mark.parametrize("name", NOTHING)
def test_neutral_parameters_change_no_bit(name, x):
    np.testing.assert_array_equal(jax.jit(NOTHING[name])(x), x)


def test_sampling_is_scipys(key, x):
    places = jax.random.uniform(key, (BATCH, 2, 4, 7), minval=-2.0, maxval=13.0)
    expected = [
        [ndimage.map_coordinates(image[..., channel], where, order=1, mode="grid-constant") for channel in range(3)]
        for image, where in zip(np.asarray(x), np.asarray(places), strict=True)
    ]
    np.testing.assert_allclose(jax.jit(images.sample)(x, places), np.moveaxis(np.array(expected), 1, -1), atol=1e-5)


def test_translation_by_whole_pixels_moves_rows_down_and_columns_right(x):
    shift = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [-3.0, 1.0], [0.0, -12.0]])
    moved = np.asarray(warp(x, images.translation(shift)))
    padded = np.pad(x, ((0, 0), (HEIGHT, HEIGHT), (WIDTH, WIDTH), (0, 0)))
    for image, source, (down, right) in zip(moved, padded, np.asarray(shift, int), strict=True):
        rows, columns = HEIGHT - down, WIDTH - right
        np.testing.assert_array_equal(image, source[rows : rows + HEIGHT, columns : columns + WIDTH])


def test_rotation_by_quarters_is_counterclockwise(x):
    square = x[:, :, :HEIGHT]
    for quarters in (1, 2, 3):
        angle = jnp.full((BATCH,), quarters * jnp.pi / 2)
        turned = warp(square, images.rotation(angle, height=HEIGHT, width=HEIGHT))
        np.testing.assert_allclose(turned, jnp.rot90(square, quarters, axes=(1, 2)), atol=1e-5)


def test_perspective_solves_the_equations_of_its_corners(key):
    corners = np.array([(0, 0), (0, WIDTH - 1), (HEIGHT - 1, 0), (HEIGHT - 1, WIDTH - 1)], float)
    displacement = jax.random.uniform(key, (BATCH, 4, 2), minval=-1.5, maxval=1.5)
    matrices = np.asarray(_perspective(displacement), float)
    points = np.random.default_rng(0).uniform(0, 8, (6, 2))
    for matrix, quadrangle in zip(matrices, corners[None] + np.asarray(displacement), strict=True):
        # Eight equations for the eight ratios, corner by corner: p = (row, column) seen at q.
        rows = []
        for (row, column), (r, c) in zip(corners, quadrangle, strict=True):
            rows += [[r, c, 1, 0, 0, 0, -r * row, -c * row], [0, 0, 0, r, c, 1, -r * column, -c * column]]
        expected = np.append(np.linalg.solve(np.array(rows), corners.ravel()), 1.0).reshape(3, 3)
        for point in (*points, *quadrangle):
            a, b = (np.append(point, 1.0) @ m.T for m in (matrix, expected))
            np.testing.assert_allclose(a[:2] / a[2], b[:2] / b[2], atol=1e-4)  # float32 against float64


def test_the_last_matrix_acts_first(key):
    angle, shift = jnp.full((BATCH,), 0.3), jax.random.normal(key, (BATCH, 2))
    product = images.compose(images.translation(shift), _rotation(angle))
    place = jnp.array([2.0, 5.0, 1.0])
    turned = jnp.einsum("bij,j->bi", _rotation(angle), place)
    np.testing.assert_allclose(jnp.einsum("bij,j->bi", product, place)[:, :2], turned[:, :2] - shift, atol=1e-5)


def test_each_image_is_blurred_by_its_own_sigma(x):
    sigma = np.array([0.0, 0.01, 0.4, 1.0, 3.0])
    blurred = jax.jit(functools.partial(images.gaussian_blur, num_taps=9))(x, jnp.asarray(sigma, jnp.float32))
    for image, source, width in zip(blurred, np.asarray(x), sigma, strict=True):
        options = {"mode": "mirror", "radius": 4, "axes": (0, 1)}
        expected = source if width == 0 else ndimage.gaussian_filter(source, width, **options)
        np.testing.assert_allclose(image, expected, atol=1e-6)


def test_brightness_contrast_and_saturation_are_their_formulas(x):
    factor = jnp.linspace(0.0, 2.0, BATCH)
    scale = np.asarray(factor)[:, None, None, None]
    gray = np.asarray(x) @ np.array([0.299, 0.587, 0.114], np.float32)
    mean = gray.mean(axis=(1, 2))[:, None, None, None]
    for adjust, other in (
        (images.adjust_brightness, 0.0), (images.adjust_contrast, mean), (images.adjust_saturation, gray[..., None]),
    ):
        np.testing.assert_allclose(adjust(x, factor), np.clip(other + scale * (x - other), 0, 1), atol=1e-6)


def test_a_third_of_a_turn_of_hue_moves_the_channels_on(x):
    for turns, step in ((1 / 3, 1), (-1 / 3, -1), (1.0, 0)):
        turned = images.adjust_hue(x, jnp.full((BATCH,), turns))
        np.testing.assert_allclose(turned, np.roll(x, step, axis=-1), atol=1e-6)


def test_saturation_and_hue_leave_gray_alone(x):
    factor = jnp.linspace(0.0, 2.0, BATCH)
    for gray in (x[..., :1], jnp.repeat(x[..., :1], 3, axis=-1)):
        for adjust in (images.adjust_saturation, images.adjust_hue):
            np.testing.assert_allclose(adjust(gray, factor), gray, atol=1e-6)


def test_gradients_are_finite_where_parameters_are_neutral(x):
    def loss(x, shift, displacement, sigma):
        matrix = images.compose(images.translation(shift), _perspective(displacement))
        return jnp.square(images.gaussian_blur(images.warp(x, matrix), sigma, num_taps=5)).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, _zeros(2), _zeros(4, 2), _zeros())
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)
    assert all(jnp.abs(gradient).max() > 0 for gradient in gradients[:3])


def test_what_cannot_be_done_is_named(x):
    with pytest.raises(ValueError, match="no perspective"):
        images.perspective(_zeros(4, 2), height=1, width=5)
    for num_taps in (4, 19):
        with pytest.raises(ValueError, match="odd number"):
            images.gaussian_blur(x, _zeros(), num_taps=num_taps)
