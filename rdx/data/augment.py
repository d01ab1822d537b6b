"""Random transformations of training images: `(key, x [B, H, W, C]) -> x`, every image with its own draw.

Keys are folded from `index [B]`, each image's place in the data set (0..B-1 by default), so that what happens to an
image does not depend on who shares its batch. All of them work inside `jit`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rdx import images
from rdx.types import Array, ArrayLike, Key


def random_shift(key: Key, x: Array, *, padding: int, index: Array | None = None) -> Array:
    """Shifts each image by up to `padding` pixels each way, filling with 0: a random crop of the padded image.

    Both shifts are uniform on `{-padding, ..., padding}`. Source: He et al. (2016, arXiv:1512.03385, Sec. 4.2).

    Args:
        key: a random key.
        x: images of any dtype, shape `[B, H, W, C]`.
        padding: largest shift in pixels, static; 0 changes nothing.
        index: places in the data set, shape `[B]`, int.

    Returns:
        The shifted images, shape and dtype of `x`.
    """
    shape = x.shape[1:]
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def crop(key: Key, image: Array) -> Array:
        row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(image, (row, column, 0), shape)

    return _per_image(crop, key, padded, index)


def random_rotation(key: Key, x: Array, *, degrees: ArrayLike, index: Array | None = None) -> Array:
    """Rotates each image about its centre by an angle uniform on `[-degrees, degrees]`, bilinearly, filling with 0.

    Args:
        key: a random key.
        x: float images in [0, 1], shape `[B, H, W, C]`.
        degrees: largest angle; 0 changes nothing.
        index: places in the data set, shape `[B]`, int.

    Returns:
        The rotated images, in [0, 1], shape and dtype of `x`.
    """
    limit = jnp.deg2rad(jnp.asarray(degrees, x.dtype))
    angle = jax.vmap(lambda key: jax.random.uniform(key, (), x.dtype, -limit, limit))(_keys(key, x, index))
    return images.warp(x, images.rotation(angle, height=x.shape[1], width=x.shape[2])).clip(0, 1)


def random_flip(key: Key, x: Array, *, probability: ArrayLike = 0.5, index: Array | None = None) -> Array:
    """Mirrors each image left to right with the given probability.

    Args:
        key: a random key.
        x: images of any dtype, shape `[B, H, W, C]`.
        probability: of mirroring; 0 changes nothing.
        index: places in the data set, shape `[B]`, int.

    Returns:
        The images, shape and dtype of `x`.
    """
    def flip(key: Key, image: Array) -> Array:
        return jnp.where(jax.random.bernoulli(key, probability), image[:, ::-1], image)

    return _per_image(flip, key, x, index)


def _per_image(transform: Callable[[Key, Array], Array], key: Key, x: Array, index: Array | None) -> Array:
    return jax.vmap(transform)(_keys(key, x, index), x)


def _keys(key: Key, x: Array, index: Array | None) -> Key:
    places = jnp.arange(x.shape[0]) if index is None else index
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, places)
