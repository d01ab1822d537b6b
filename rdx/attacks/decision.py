"""What decision-based attacks share: where they begin, the box, the nearest of several points."""

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
        The problem, and the queries that remain once `find_start` and the clean input have had theirs.

    Raises:
        ValueError: if the start is shaped otherwise than `x`, or no query remains.
    """
    spent = 1 + (_NUM_DRAWS + _NUM_BLENDS if start is None else 1)
    if num_queries <= spent:
        raise ValueError(f"num_queries={num_queries}: {spent} are spent before the first step, give more.")
    if start is None:
        return problem, num_queries - spent
    start = jnp.asarray(start, problem.x.dtype)
    if start.shape != problem.x.shape:
        raise ValueError(f"start is {start.shape}: give one input for each of x, {problem.x.shape}.")
    return problem._replace(data=start), num_queries - spent


def find_start(keys: Key, problem: base.Problem, found: base.Found) -> base.Found:
    """Looks for a success to begin at: the given start, or else noise, blended with `x` as far as it stays one.

    Of several uniform draws from the box the nearest that succeeds, `v`, is kept, and of the blends `x + t (v - x)`
    with `t` on a grid the nearest that succeeds. Where the box has no ends the draws are normal, each twice as wide as
    the last.

    Source: Brendel et al. (2018, arXiv:1712.04248, Sec. 2.3) start at noise, their code blends it. Differences: each
    example has its own noise, where RealSafe (Dong et al. 2020) has one for all examples of a class; all draws and
    all blends are evaluated at once and all count, where the code stops at the first success.

    Args:
        keys: one per example, shape `[B]`.
        problem: from `begin`.
        found: what was found so far.

    Returns:
        What was found: as good as `found`, and the start where that is nearer. 1 forward pass with a given start, else
        50.
    """
    if not isinstance(problem.data, tuple):
        start = base.evaluate(problem, into_box(problem, problem.data))
        return minimal.spend(problem, found, start, forwards=1)
    x = problem.x[:, None]
    far, _ = nearest(problem, _noise(problem, keys))
    found = minimal.spend(problem, found, far, forwards=_NUM_DRAWS)
    share = jnp.arange(1, _NUM_BLENDS + 1, dtype=x.dtype) / _NUM_BLENDS
    blends = x + share.reshape(1, -1, *[1] * (x.ndim - 2)) * (far.x[:, None] - x)
    near, _ = nearest(problem, into_box(problem, blends))
    return minimal.spend(problem, found, near, forwards=_NUM_BLENDS)


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


def into_box(problem: base.Problem, points: Array) -> Array:
    """Clips points, shape `[B, ...]` or `[B, n, ...]`, to the box; elements of radius 0 become those of `x`."""
    low, high = minimal.limits(problem)
    return jnp.clip(points, low, high) if points.ndim == low.ndim else jnp.clip(points, low[:, None], high[:, None])


def _noise(problem: base.Problem, keys: Key) -> Array:
    """Draws what to begin at, shape `[B, n, ...]`."""
    x = problem.x[:, None]
    low, high = (end[:, None] for end in minimal.limits(problem))
    shape = (_NUM_DRAWS, *problem.x.shape[1:])
    uniform = base.draw(base.fold(keys, 0), jax.random.uniform, shape, x.dtype)
    normal = base.draw(base.fold(keys, 1), jax.random.normal, shape, x.dtype)
    has_ends = jnp.isfinite(low) & jnp.isfinite(high)
    first, last = (jnp.where(has_ends, end, x) for end in (low, high))
    widths = jnp.exp2(jnp.arange(_NUM_DRAWS, dtype=x.dtype)).reshape(1, -1, *[1] * (x.ndim - 2))
    return into_box(problem, jnp.where(has_ends, first + uniform * (last - first), x + widths * normal))
