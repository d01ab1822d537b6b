"""What score-based attacks share: random directions, gradients estimated from losses alone, Adam's direction."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import norms
from rdx.attacks import base
from rdx.types import Array, ArrayLike, Key

# Of Adam's averages.
_DECAYS = (0.9, 0.999)


class Moments(NamedTuple):
    """Adam's averages of the gradient and of its square."""

    mean: Array
    square: Array


def check_even(num_samples: int) -> None:
    """Raises where samples do not come in pairs.

    Raises:
        ValueError: on an odd number, or none.
    """
    if num_samples < 2 or num_samples % 2:
        raise ValueError(f"num_samples={num_samples}: directions come in pairs u and -u, give an even number.")


def directions(
    keys: Key, problem: base.Problem, num: int, *, draw: Callable[..., Array] = jax.random.normal
) -> Array:
    """Draws directions for every example; elements of radius 0, which may not change, stay 0.

    Args:
        keys: one per example, shape `[B]`.
        problem: the attack's problem.
        num: directions for each, `n`.
        draw: `(key, shape, dtype) -> Array`.

    Returns:
        Shape `[B, n, ...]`.
    """
    x = problem.x
    drawn = base.draw(keys, draw, (num, *x.shape[1:]), x.dtype)
    return jnp.where((problem.ball.radius(x) > 0)[:, None], drawn, 0.0)


def unit(direction: Array, *, axis: int = 1) -> Array:
    """Divides vectors by their l2 norms; 0 stays 0.

    Args:
        direction: shape `[B, ...]` or, with `axis=2`, `[B, n, ...]`.
        axis: the first axis of a vector.

    Returns:
        The same shape.
    """
    flat = direction.reshape(-1, *direction.shape[axis:])
    size = norms.expand(norms.l2(flat).reshape(direction.shape[:axis]), direction)
    return direction / jnp.where(size > 0, size, 1.0)


def average(weights: Array, vectors: Array) -> Array:
    """Computes `1/n sum_i w_i u_i`; what is not finite becomes 0.

    Args:
        weights: shape `[B, n]`.
        vectors: shape `[B, n, ...]`.

    Returns:
        Shape `[B, ...]`.
    """
    total = (norms.expand(weights, vectors) * vectors).mean(axis=1)
    return jnp.where(jnp.isfinite(total), total, 0.0)


def antithetic_gradient(problem: base.Problem, point: Array, pairs: Array, sigma: ArrayLike) -> tuple[Array, Array]:
    """Estimates the loss gradient: `1/m sum_i (loss(x + sigma u_i) - loss(x - sigma u_i)) / (2 sigma) u_i`.

    That is the average of `loss(x + sigma u) u / sigma` over all `u_i` and `-u_i`, and unbiased for linear functions
    where `E[u u^T] = I`. Points may leave ball and box by their distance `sigma ||u_i||`, as in the released codes.

    Args:
        problem: the attack's problem.
        point: shape `[B, ...]`.
        pairs: the directions `u_i`, shape `[B, m, ...]`.
        sigma: distance of the evaluated points in units of the directions.

    Returns:
        The estimate `[B, ...]` and the mean loss `[B]`, for `2 m` forward passes.
    """
    steps = sigma * pairs
    _, loss = base.evaluate_many(problem, jnp.concatenate([point[:, None] + steps, point[:, None] - steps], axis=1))
    num = pairs.shape[1]
    return average((loss[:, :num] - loss[:, num:]) / (2.0 * sigma), pairs), loss.mean(axis=1)


def adam(moments: Moments, gradient: Array, count: Array) -> tuple[Moments, Array]:
    """Computes Adam's direction, the ratio of the corrected averages `m / (sqrt(v) + 1e-9)`.

    Source: Kingma & Ba (2015, arXiv:1412.6980, Algorithm 1), with its decays 0.9 and 0.999.

    Args:
        moments: averages so far, 0 at first.
        gradient: the new gradient.
        count: gradients averaged, this one included; a number, or one for each element.

    Returns:
        The new averages and the direction.
    """
    mean = _DECAYS[0] * moments.mean + (1.0 - _DECAYS[0]) * gradient
    square = _DECAYS[1] * moments.square + (1.0 - _DECAYS[1]) * jnp.square(gradient)
    count = count.astype(gradient.dtype)
    corrected_mean, corrected_square = mean / (1.0 - _DECAYS[0] ** count), square / (1.0 - _DECAYS[1] ** count)
    return Moments(mean, square), corrected_mean / (jnp.sqrt(corrected_square) + 1e-9)
