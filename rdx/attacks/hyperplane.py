"""Nearest points of a hyperplane inside a box, in l2, linf and l1: the step of DeepFool and FAB."""

import jax
import jax.numpy as jnp

from rdx import norms
from rdx.types import Array, ArrayLike, Norm

# Weights so much smaller than the largest move nothing in float32.
_NEGLIGIBLE = 1e-12
# Halvings of a threshold in [0, 1], down to what is negligible.
_NUM_BISECTIONS = 40
# Share of the gap that rounding may leave open.
_CLOSED = 1e-3


def project_onto_hyperplane(
    points: Array, w: Array, b: Array, low: ArrayLike, high: ArrayLike, norm: Norm
) -> Array:
    """Finds the nearest point of a hyperplane in a box: `argmin_v ||v - x||_p` over `<w, v> = b`, `low <= v <= high`.

    Every element moves towards the hyperplane by a size `s_i` between 0 and its room `r_i` up to the box, so that
    `sum_i |w_i| s_i` closes the gap `|b - <w, x>|`. The optimum is `s_i = min(t, r_i)` for linf, `min(t |w_i|, r_i)`
    for l2, and for l1 the whole room on the elements of greatest `|w_i|`. Where the box does not reach the hyperplane,
    every element goes to its end of the box: the corner that comes closest.

    Source: Croce & Hein (2020, arXiv:1907.02044, Eq. 4). The released code sorts; here nothing is sorted,
    which on CPUs costs ten times more than all the rest: the multiplier `t` rises until no further element meets its
    room, exactly and in a few rounds, and the l1 threshold on `|w_i|` is bisected.

    Args:
        points: points `x` of the box, shape `[B, ...]`.
        w: normals, shape `[B, ...]`.
        b: offsets, shape `[B]`.
        low: lower end of the box, a scalar or broadcastable to `points`; may be infinite.
        high: upper end of the box, likewise.
        norm: "l2", "linf" or "l1".

    Returns:
        The nearest points, shape `[B, ...]`; elements of weight 0 stay as they are.

    Raises:
        ValueError: on an unknown norm.
    """
    norms.check(norm)
    largest = norms.linf(w)
    unit = jnp.where(largest > 0, largest, 1.0)
    direction = norms.flatten(w / norms.expand(unit, w))
    gap = (b - (norms.flatten(w) * norms.flatten(points)).sum(axis=1)) / unit
    direction, gap = direction * jnp.sign(gap)[:, None], jnp.abs(gap)

    below, above = (norms.flatten(jnp.broadcast_to(room, points.shape)) for room in (points - low, high - points))
    weight = jnp.abs(direction)
    is_heavy = weight > _NEGLIGIBLE
    # No element need move farther than if it were alone: so rooms are finite without a box, too.
    alone = gap[:, None] / jnp.where(is_heavy, weight, 1.0)
    room = jnp.where(is_heavy, jnp.clip(jnp.where(direction > 0, above, below), 0.0, alone), 0.0)
    if norm == "l1":
        size = _fill_heaviest(weight, room, gap)
    else:
        speed = jnp.where(is_heavy, weight, 1.0) if norm == "l2" else jnp.ones_like(weight)
        size = _fill_together(weight, speed, room, gap)
    return jnp.clip(points + (jnp.sign(direction) * size).reshape(points.shape), low, high)


def nearest_hyperplane(
    points: Array, w: Array, b: Array, low: Array, high: Array, norm: Norm
) -> tuple[Array, Array]:
    """Finds which of several hyperplanes is the nearest in the box, and its nearest point.

    Args:
        points: points of the box, shape `[B, ...]`.
        w: normals, shape `[B, n, ...]`.
        b: offsets, shape `[B, n]`.
        low: lower end of the box, shape `[B, ...]`.
        high: upper end of the box, shape `[B, ...]`.
        norm: "l2", "linf" or "l1".

    Returns:
        Places in `0..n-1`, shape `[B]`; 0 where the box reaches no hyperplane. Nearest points, shape `[B, ...]`.
    """

    def look(w: Array, b: Array) -> tuple[Array, Array]:
        found = project_onto_hyperplane(points, w, b, low, high, norm)
        gap, left = (jnp.abs(b - (norms.flatten(w) * norms.flatten(v)).sum(axis=1)) for v in (points, found))
        is_reached = (left <= _CLOSED * gap) & (norms.linf(w) > 0)
        return found, jnp.where(is_reached, norms.norm(found - points, norm), jnp.inf)

    found, distance = jax.vmap(look, in_axes=1, out_axes=1)(w, b)
    place = distance.argmin(axis=1)
    return place, jnp.take_along_axis(found, norms.expand(place, found), axis=1)[:, 0]


def _fill_together(weight: Array, speed: Array, room: Array, gap: Array) -> Array:
    """Solves `sum_i weight_i min(t speed_i, room_i) = gap` for `t` and gives the sizes `min(t speed_i, room_i)`.

    The sum is concave in `t`, so Newton's method rises from 0 to the root: each round recomputes `t` for those elements
    that have room left at the last one, and ends when no other element gets full.
    """

    def rise(t: Array, weight: Array, speed: Array, room: Array, gap: Array) -> Array:
        is_full = room <= t[:, None] * speed
        rest = gap - jnp.where(is_full, weight * room, 0.0).sum(axis=1)
        rate = jnp.where(is_full, 0.0, weight * speed).sum(axis=1)
        return jnp.where(rate > 0, rest / jnp.where(rate > 0, rate, 1.0), jnp.inf)

    # Who is full is found without derivatives, which a while loop does not have backwards; t then has them.
    parts = (weight, speed, room, gap)
    fixed, none = jax.lax.stop_gradient(parts), jnp.zeros_like(gap)
    _, t = jax.lax.while_loop(
        lambda pair: (pair[1] > pair[0]).any(), lambda pair: (pair[1], jnp.maximum(pair[1], rise(pair[1], *fixed))),
        (none, rise(none, *fixed)),
    )
    risen = rise(t, *parts)
    t = jnp.where(risen >= t, risen, t)[:, None]  # below t by rounding only
    return jnp.where(room <= t * speed, room, jnp.where(jnp.isinf(t), 0.0, t) * speed)


def _fill_heaviest(weight: Array, room: Array, gap: Array) -> Array:
    """Gives elements of greatest weight all their room until `sum_i weight_i size_i = gap`; the last ones share it."""
    gain = weight * room

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = bracket
        middle = 0.5 * (below + above)
        is_enough = jnp.where(weight > middle[:, None], gain, 0.0).sum(axis=1) >= gap
        return jnp.where(is_enough, middle, below), jnp.where(is_enough, above, middle)

    none = jnp.zeros_like(gap)
    below, above = jax.lax.fori_loop(0, _NUM_BISECTIONS, halve, (none, none + 1.0))
    is_full, is_last = weight > above[:, None], (weight > below[:, None]) & (weight <= above[:, None])
    full, last = (jnp.where(part, gain, 0.0).sum(axis=1) for part in (is_full, is_last))
    share = jnp.clip((gap - full) / jnp.where(last > 0, last, 1.0), 0.0, 1.0)
    return jnp.where(is_full, room, jnp.where(is_last, share[:, None] * room, 0.0))
