"""Defended images as 8-bit files hold them: what is published is rounded, and the certificate must be of that.

Frosio & Kautz (2023, A5) write the images of A5/O to files and certify what they read back. Their code truncates,
`(w * 255).astype(uint8)`, which darkens an image by half a level on average and may leave the defender's ball by a
level. Here values are rounded to the nearest level, and towards the original where the nearest one lies outside.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rdx import norms
from rdx.balls import Ball
from rdx.types import Array

# Room for the rounding of products such as 255 * (4 / 255), in levels.
_TOLERANCE = 1e-4


def quantise(x_defended: Array, x: Array, ball: Ball, *, num_bits: int = 8) -> Array:
    """Rounds defended images to the levels `k / (2^num_bits - 1)`, inside ball and box.

    With `L = 2^num_bits - 1`, `k_0 = L x` and `w = L x_D`, every element becomes `k / L` with

        k = round(w)                    where that keeps to the ball,
        k = k_0 + trunc(w - k_0)        elsewhere: the nearest level on the way back to the original.

    For linf each element is judged by itself, for l2 and l1 each image. The second choice never leaves the ball: no
    element ends farther from the original than it was.

    Args:
        x_defended: defended images in ball and box, shape `[B, ...]`.
        x: the originals, which lie on levels themselves, as 8-bit images do. Shape `[B, ...]`.
        ball: the defender's ball, in the box [0, 1].
        num_bits: bits of a value, 1 to 8.

    Returns:
        Images on levels, shape `[B, ...]`; at 8 bits `255 * result` are the bytes of a file.

    Raises:
        ValueError: on other numbers of bits, or originals between levels; values are only looked at where they are
            concrete.
    """
    if not 1 <= num_bits <= 8:
        raise ValueError(f"num_bits is {num_bits}: give 1 to 8, 8 for image files.")
    num_levels = 2**num_bits - 1
    origin = jnp.round(num_levels * x)
    if not isinstance(x, Tracer) and np.abs(np.asarray(num_levels * x - origin)).max(initial=0.0) > _TOLERANCE:
        raise ValueError(f"The originals do not have {num_bits} bits: quantise them first, and defend what comes out.")
    moved = num_levels * x_defended - origin
    nearest = jnp.round(moved)
    in_levels = dataclasses.replace(ball, eps=num_levels * ball.radius(x), low=-jnp.inf, high=jnp.inf)
    if ball.norm == "linf":
        keeps = jnp.abs(nearest) <= in_levels.eps + _TOLERANCE
    else:
        keeps = norms.expand(in_levels.contains(origin + nearest, origin), x)
    back = jnp.trunc(moved + _TOLERANCE * jnp.sign(moved))
    return (origin + jnp.where(keeps, nearest, back)) / num_levels
