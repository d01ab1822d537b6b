"""Where decision-based attacks begin: an input on the wrong side of the boundary, given or found among noise."""

import jax
import jax.numpy as jnp

from rdx import norms
from rdx.attacks import base, minimal
from rdx.types import Array, ArrayLike, Key

# Noise drawn at once, and steps of the line search from the clean input to the noise.
_NUM_DRAWS = 25
_NUM_BLENDS = 25


def begin(problem: base.Problem, start: ArrayLike | None, num_queries: int) -> tuple[base.Problem, int]:
    """Checks a given start and hands it to the attack as `problem.data`, `()` if there is none.

    Args:
        problem: the attack's problem.
        start: inputs to begin at, shape `[B, ...]`, or None.
        num_queries: the attack's budget of forward passes on each example.

    Returns:
        The problem, and the queries that remain once `find` and the clean input have had theirs.

    Raises:
        ValueError: if the start is shaped otherwise than `x`, or no query remains.
    """
    spent = 1 + (_NUM_DRAWS + _NUM_BLENDS if start is None else 1)
    if num_queries <= spent:
        raise ValueError(f"num_queries={num_queries}: {spent} are spent before the first step, give more.")
    if start is None:
        return problem._replace(data=()), num_queries - spent
    start = jnp.asarray(start, problem.x.dtype)
    if start.shape != problem.x.shape:
        raise ValueError(f"start is {start.shape}: give one input for each of x, {problem.x.shape}.")
    return problem._replace(data=start), num_queries - spent


def find(problem: base.Problem, keys: Key, found: base.Found) -> base.Found:
    """Looks for a success to begin at: the given start, or else noise, blended with `x` as far as it stays one.

    Of several uniform draws from the box the nearest that succeeds, `v`, is kept, and of the blends `x + t (v - x)`
    with `t` on a grid the nearest that succeeds. Where the box has no ends the draws are normal, each twice as wide as
    the last.

    Source: Brendel et al. (2018, arXiv:1712.04248, Sec. 2.3) start at noise, their code blends it. Differences: each
    example has its own noise, where RealSafe (Dong et al. 2020) has one for all examples of a class; all draws and
    all blends are evaluated at once and all count, where the code stops at the first success.

    Args:
        problem: from `begin`.
        keys: one per example, shape `[B]`.
        found: what was found so far.

    Returns:
        What was found: as good as `found`, and the start where that is nearer. 1 forward pass with a given start, else
        50.
    """
    limits = minimal.limits(problem)
    if not isinstance(problem.data, tuple):
        return minimal.spend(problem, found, base.evaluate(problem, jnp.clip(problem.data, *limits)), forwards=1)
    x = problem.x[:, None]
    far, _ = nearest(problem, jax.vmap(_noise)(keys, problem.x, *limits))
    found = minimal.spend(problem, found, far, forwards=_NUM_DRAWS)
    share = jnp.arange(1, _NUM_BLENDS + 1, dtype=x.dtype) / _NUM_BLENDS
    blends = x + share.reshape(1, -1, *[1] * (x.ndim - 2)) * (far.x[:, None] - x)
    return minimal.spend(problem, found, nearest(problem, blends)[0], forwards=_NUM_BLENDS)


def nearest(problem: base.Problem, points: Array) -> tuple[base.Candidate, Array]:
    """Evaluates `n` points of each example, `n` forward passes, and picks the nearest success.

    Args:
        problem: the attack's problem.
        points: shape `[B, n, ...]`.

    Returns:
        The nearest success, the first point where there is none; and success of all, shape `[B, n]`.
    """
    success, loss = base.evaluate_many(problem, points)
    distance = jax.vmap(problem.ball.distance, in_axes=(1, None), out_axes=1)(points, problem.x)
    place = jnp.where(success, distance, jnp.inf).argmin(axis=1)
    picked = (
        jnp.take_along_axis(leaf, norms.expand(place[:, None], leaf), axis=1)[:, 0] for leaf in (points, success, loss)
    )
    return base.Candidate(*picked), success


def _noise(key: Key, x: Array, low: Array, high: Array) -> Array:
    """Draws the noise around one example, shape `[n, ...]`."""
    widths = jnp.exp2(jnp.arange(_NUM_DRAWS, dtype=x.dtype))
    return jax.vmap(_draw, in_axes=(0, 0, None, None, None))(jax.random.split(key, _NUM_DRAWS), widths, x, low, high)


def _draw(key: Key, width: Array, x: Array, low: Array, high: Array) -> Array:
    uniform_key, normal_key = jax.random.split(key)
    has_ends = jnp.isfinite(low) & jnp.isfinite(high)
    ends = jnp.where(has_ends, low, 0.0), jnp.where(has_ends, high, 1.0)
    inside = jax.random.uniform(uniform_key, x.shape, x.dtype, *ends)
    around = x + width * jax.random.normal(normal_key, x.shape, x.dtype)
    return jnp.clip(jnp.where(has_ends, inside, around), low, high)
