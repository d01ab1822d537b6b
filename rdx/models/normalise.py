"""Normalisation as the first layer of a network."""

import jax.numpy as jnp

from rdx.types import Array


def normalise(x: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Computes `(x - mean) / std` channel by channel.

    Args:
        x: shape `[B, ..., C]`.
        mean: one value, or one per channel.
        std: one value, or one per channel.

    Returns:
        Shape `[B, ..., C]`; `x` itself for mean 0 and standard deviation 1.
    """
    if not any(mean) and all(value == 1.0 for value in std):
        return x
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (x - jnp.asarray(mean, x.dtype).reshape(shape)) / jnp.asarray(std, x.dtype).reshape(shape)
