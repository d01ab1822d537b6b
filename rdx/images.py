"""Differentiable operations on images `x [B, H, W, C]` in [0, 1], each image with parameters of its own.

Places are (row, column) with pixel centres at whole numbers. Geometric transformations are 3 x 3 matrices on the
homogeneous (row, column, 1) that say where in the input each pixel of the output lies; they are composed by products,
so that an image is interpolated once however many of them it undergoes. Every operation changes nothing, to the last
bit, where its parameter says so: angle, shift, displacement or sigma 0, factor 1.

dm-pix has relatives of most of them. They are not used here because they take one parameter for a whole batch, fill
the edges of a blurred image with black, and change an image in its last digits where they should leave it alone.
"""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from rdx import norms
from rdx.types import Array

# Luma of ITU-R BT.601, as in torchvision and pillow.
_LUMA = (0.299, 0.587, 0.114)


def sample(x: Array, places: Array) -> Array:
    """Interpolates images bilinearly at the given places, with 0 outside.

    Args:
        x: shape `[B, H, W, C]`.
        places: rows and columns in each image, shape `[B, 2, H', W']`.

    Returns:
        The values there, shape `[B, H', W', C]`; linear in `x` and differentiable in `places`.
    """
    def plane(values: Array, places: Array) -> Array:
        return map_coordinates(values, list(places), order=1, mode="constant", cval=0.0)

    planes = jax.vmap(plane, in_axes=(2, None), out_axes=2)
    return jax.vmap(planes)(x, places)


def warp(x: Array, matrix: Array) -> Array:
    """Transforms images: the pixel at `p` shows what lies at `matrix (p, 1)`, with 0 outside.

    Args:
        x: shape `[B, H, W, C]`.
        matrix: products of `translation`, `rotation` and `perspective`, shape `[B, 3, 3]`.

    Returns:
        The transformed images, shape `[B, H, W, C]`.
    """
    rows, columns = jnp.mgrid[: x.shape[1], : x.shape[2]].astype(x.dtype)
    grid = jnp.stack([rows, columns, jnp.ones_like(rows)])
    # Written out: a product at the low precision of accelerators would move pixels.
    places = (matrix[:, :, :, None, None] * grid[None, None]).sum(axis=2)
    return sample(x, places[:, :2] / places[:, 2:])


def compose(*matrices: Array) -> Array:
    """Multiplies matrices `[B, 3, 3]`: the last one is applied to a pixel of the output first."""
    product, *others = matrices
    for matrix in others:
        product = jnp.matmul(product, matrix, precision=jax.lax.Precision.HIGHEST)
    return product


def translation(shift: Array) -> Array:
    """Builds the matrices that move images by `shift` (rows, columns), shape `[B, 2] -> [B, 3, 3]`."""
    return jnp.broadcast_to(jnp.eye(3, dtype=shift.dtype), (len(shift), 3, 3)).at[:, :2, 2].set(-shift)


def rotation(angle: Array, *, height: int, width: int) -> Array:
    """Builds the matrices that rotate images about their centres.

    Args:
        angle: in radians, counterclockwise on the screen, shape `[B]`.
        height: of the images.
        width: of the images.

    Returns:
        Shape `[B, 3, 3]`.
    """
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    row, column = (height - 1) / 2, (width - 1) / 2
    zero, one = jnp.zeros_like(angle), jnp.ones_like(angle)
    return jnp.stack([
        jnp.stack([cos, sin, (1 - cos) * row - sin * column], axis=1),
        jnp.stack([-sin, cos, (1 - cos) * column + sin * row], axis=1),
        jnp.stack([zero, zero, one], axis=1),
    ], axis=1)


def perspective(displacement: Array, *, height: int, width: int) -> Array:
    """Builds the matrices that show an image as seen at an angle: its corners appear displaced.

    The map of a rectangle onto a quadrangle is that of Heckbert (1989, "Fundamentals of Texture Mapping and Image
    Warping", Sec. 2.2.3), written as a deviation from the identity; what is returned is its inverse.

    Args:
        displacement: where the corners appear less where they were, (rows, columns), in the order top left, top right,
            bottom left, bottom right. Shape `[B, 4, 2]`.
        height: of the images, at least 2.
        width: of the images, at least 2.

    Returns:
        Shape `[B, 3, 3]`.

    Raises:
        ValueError: for images of a single row or column.
    """
    if min(height, width) < 2:
        raise ValueError(f"Images of {height} x {width} pixels have no perspective: give at least 2 rows and columns.")
    top_left, top_right, bottom_left, bottom_right = jnp.moveaxis(displacement, 1, 0)
    down, right = (jnp.array(side, displacement.dtype) for side in ((height - 1, 0), (0, width - 1)))
    # Columns of a 2 x 2 system for the slopes of the denominator, along the rows and along the columns.
    bottom, side = right[None] + bottom_right - bottom_left, down[None] + bottom_right - top_right
    twist = bottom_left + top_right - top_left - bottom_right
    determinant = _cross(bottom, side)
    slopes = jnp.stack([_cross(twist, side), _cross(bottom, twist)], axis=1) / determinant[:, None]
    along_rows = bottom_left - top_left + slopes[:, :1] * (down[None] + bottom_left)
    along_columns = top_right - top_left + slopes[:, 1:] * (right[None] + top_right)
    unit = jnp.eye(3, dtype=displacement.dtype)
    first = unit[:1] + jnp.concatenate([along_rows, slopes[:, :1]], axis=1) / (height - 1)
    second = unit[1:2] + jnp.concatenate([along_columns, slopes[:, 1:]], axis=1) / (width - 1)
    third = unit[2:] + jnp.pad(top_left, ((0, 0), (0, 1)))
    # The adjugate of the matrix with these columns: an inverse up to a factor, which homogeneous places do not see.
    return jnp.stack([jnp.cross(second, third), jnp.cross(third, first), jnp.cross(first, second)], axis=1)


def gaussian_blur(x: Array, sigma: Array, *, num_taps: int) -> Array:
    """Convolves images with a Gaussian of its own for each, mirrored at the edges.

    Args:
        x: shape `[B, H, W, C]`.
        sigma: standard deviations in pixels, at least 0, shape `[B]`.
        num_taps: side of the square kernel, odd.

    Returns:
        Shape `[B, H, W, C]`.

    Raises:
        ValueError: for an even kernel, or one that reaches beyond the mirrored image.
    """
    reach = num_taps // 2
    if num_taps % 2 == 0 or reach >= min(x.shape[1:3]):
        raise ValueError(f"num_taps={num_taps} does not suit images of {x.shape[1:3]}: give an odd number below twice "
                         "the smaller side.")
    square = jnp.square(jnp.arange(-reach, reach + 1, dtype=x.dtype))[None]
    is_zero = (sigma == 0)[:, None]
    exponent = jnp.where(is_zero, 0.0, -0.5 * square / jnp.square(jnp.where(is_zero, 1.0, sigma[:, None])))
    weight = jnp.where(is_zero & (square > 0), 0.0, jnp.exp(exponent))
    weight = weight / weight.sum(axis=1, keepdims=True)
    # A sum of shifted images: a convolution with one kernel per image is far slower on CPUs.
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (reach, reach)
        padded = jnp.pad(x, pad, mode="reflect")
        shifted = (jax.lax.slice_in_dim(padded, tap, tap + x.shape[axis], axis=axis) for tap in range(num_taps))
        x = functools.reduce(jnp.add, (norms.expand(weight[:, tap], x) * image for tap, image in enumerate(shifted)))
    return x


def adjust_brightness(x: Array, factor: Array) -> Array:
    """Computes `clip(factor x)`. Shapes `[B, H, W, C]`, `[B]`."""
    return _blend(x, jnp.zeros_like(x), factor)


def adjust_contrast(x: Array, factor: Array) -> Array:
    """Computes `clip(m + factor (x - m))` with the mean `m` of the gray image. Shapes `[B, H, W, C]`, `[B]`."""
    mean = _gray(x).mean(axis=(1, 2, 3), keepdims=True)
    return _blend(x, jnp.broadcast_to(mean, x.shape), factor)


def adjust_saturation(x: Array, factor: Array) -> Array:
    """Computes `clip(g + factor (x - g))` with the gray image `g`. Shapes `[B, H, W, C]`, `[B]`."""
    return _blend(x, jnp.broadcast_to(_gray(x), x.shape), factor)


def adjust_hue(x: Array, turns: Array) -> Array:
    """Rotates colours about the axis of grays, then clips.

    It is linear in `x`, where the hue of HSV (torchvision, dm-pix) has kinks; on gray images all of them do nothing.
    Source: Haeberli (1993, "Matrix Operations for Image Processing").

    Args:
        x: shape `[B, H, W, 3]`, or with one channel, which stays as it is.
        turns: angles in full turns, shape `[B]`.

    Returns:
        The shape of `x`.
    """
    if x.shape[-1] == 1:
        return x
    angle = norms.expand(2 * jnp.pi * turns, x)
    grayless = x - x.mean(axis=-1, keepdims=True)
    across = (jnp.roll(x, 1, axis=-1) - jnp.roll(x, -1, axis=-1)) / jnp.sqrt(jnp.asarray(3.0, x.dtype))
    return jnp.clip(x + (jnp.cos(angle) - 1) * grayless + jnp.sin(angle) * across, 0.0, 1.0)


def _blend(x: Array, other: Array, factor: Array) -> Array:
    return jnp.clip(x + (norms.expand(factor, x) - 1) * (x - other), 0.0, 1.0)


def _gray(x: Array) -> Array:
    if x.shape[-1] == 1:
        return x
    return (x * jnp.asarray(_LUMA, x.dtype)[None, None, None]).sum(axis=-1, keepdims=True)


def _cross(a: Array, b: Array) -> Array:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
