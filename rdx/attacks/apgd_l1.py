"""What Auto-PGD does otherwise in l1 (Croce & Hein 2021, arXiv:2103.01208): sparse steps, of a sparsity that adapts.

Steps along the sign of the largest gradient elements alone, as many as two thirds of the elements in which the best
point so far differs from the clean input. Step sizes shrink while that support keeps its size and start over, from the
best point, when it shrinks.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rdx import balls, norms
from rdx.balls import Ball
from rdx.types import Array

_SHRINKING = 1.5  # of step sizes at a check, and of the support to the number of elements that are moved
_LEAST_SHARE = 0.1


class Sparsity(NamedTuple):
    """What the search remembers from one check to the next."""

    num_moved: Array  # [B], int32: elements that a step moves
    support: Array  # [B], int32: elements in which the best point differed from the clean input at the last check


def checkpoints(num_steps: int) -> list[int]:
    """Lists the iterations, counted from 0, after which the sparsity adapts: every `0.04 n`-th, as an integer."""
    window = max(4 * num_steps // 100, 1)
    return list(range(window - 1, num_steps, window))


def begin(point: Array, x: Array, *, is_warm: bool) -> Sparsity:
    """Begins a search: a fifth of the elements are moved, or what suits the support of a point found before."""
    support = _support(point, x)
    if is_warm:
        return Sparsity(_num_moved(support), support)
    size, none = int(np.prod(x.shape[1:])), 0 * support
    return Sparsity(none + -(-size // 5), none + size)


def check(sparsity: Sparsity, share: Array, peak: Array, x: Array) -> tuple[Sparsity, Array, Array]:
    """Adapts sparsity and step size to the support of the best point.

    Args:
        sparsity: since the last check.
        share: step size in units of the radius, shape `[B]`.
        peak: the best points, shape `[B, ...]`.
        x: clean inputs, shape `[B, ...]`.

    Returns:
        The new sparsity and step size, and where the search resumes at the best point, shape `[B]`, bool.
    """
    support = _support(peak, x)
    is_sparser = 20 * support < 19 * sparsity.support
    shrunk = jnp.maximum(share / _SHRINKING, _LEAST_SHARE)
    return Sparsity(_num_moved(support), support), jnp.where(is_sparser, 1.0, shrunk), is_sparser


def ascend(ball: Ball, x: Array, point: Array, gradient: Array, share: Array, num_moved: Array) -> Array:
    """Moves `point` by `share` of the radius along the signs of the `num_moved` largest gradients and projects."""
    radius = ball.radius(x)
    gain = jnp.abs(radius * gradient)
    level = balls.exceeded_by(norms.flatten(gain), num_moved)
    signs = jnp.where(gain > norms.expand(level, x), jnp.sign(gradient), 0.0)
    size = share / jnp.maximum(norms.l1(signs), 1.0)
    return ball.project(point + norms.expand(size, x) * radius * signs, x)


def _support(point: Array, x: Array) -> Array:
    return norms.flatten(point != x).sum(axis=1, dtype=jnp.int32)


def _num_moved(support: Array) -> Array:
    return jnp.maximum((2 * support + 2) // 3, 1)  # ceil(support / 1.5)
