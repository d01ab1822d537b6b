"""Linear bounds: backward substitution through a graph, and the extreme values of a linear function over a region."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from rdx.balls import Region
from rdx.bounds import convolution
from rdx.bounds.graph import BILINEAR, Graph, Node, Op
from rdx.bounds.interval import Interval
from rdx.bounds.relaxations import Lines
from rdx.types import Array

# The dual of the l2 ball in a box has one multiplier; every value of it bounds from below, so few steps are enough.
_NUM_BISECTIONS = 20


def lower_bound(
    graph: Graph, target: Node, rows: Array, lines: Mapping[Op, Lines], sets: Mapping[Node, Region | Interval]
) -> Array:
    """Bounds `rows @ target` from below by substituting backwards until only nodes with known sets are left.

    At an affine operation the coefficients go through its vector-Jacobian product. At a nonlinear one, positive
    coefficients take its lower line and negative ones the upper (Zhang et al. 2018, CROWN, arXiv:1811.00866, Eq. 8).

    Args:
        graph: the traced function.
        target: the node to bound.
        rows: coefficients on it, shape `[S, *target.shape]`.
        lines: relaxations of the nonlinear operations to substitute through.
        sets: where substitution ends and what the value there ranges over.

    Returns:
        Lower bounds, shape `[S]`.
    """
    pending = {target: rows}
    bound = jnp.zeros(rows.shape[0], rows.dtype)
    for op in reversed(graph.ops):
        if any(node in sets for node in op.outputs) or not any(node in pending for node in op.outputs):
            continue
        upstream = [pending.pop(node, None) for node in op.outputs]
        coefficients, bias = _through_affine(op, upstream) if op.is_affine else _through_lines(lines[op], upstream[0])
        bound = bound if bias is None else bound + bias
        for node, value in zip(op.nodes, coefficients, strict=True):
            pending[node] = pending[node] + value if node in pending else value
    for node, value in pending.items():
        bound = bound + minimum(value, sets[node])
    return bound


def two_sided(
    graph: Graph, node: Node, lines: Mapping[Op, Lines], sets: Mapping[Node, Region | Interval]
) -> Interval:
    """Bounds every element of a node from both sides: one row per element and side; see `lower_bound`."""
    rows = jnp.eye(math.prod(node.shape), dtype=node.dtype).reshape(-1, *node.shape)
    # Two passes rather than one stacked: under jit, a side that nobody uses costs nothing.
    lower = lower_bound(graph, node, rows, lines, sets)
    upper = -lower_bound(graph, node, -rows, lines, sets)
    return Interval(lower.reshape(node.shape), upper.reshape(node.shape))


def minimum(rows: Array, over: Region | Interval) -> Array:
    """Computes `min <a, x>` over a set, for every row `a` of `rows [S, ...]`; shape `[S]`.

    An interval, or the linf ball in a box: `<a, center> - <|a|, radius>`. The other balls in a box: see below.
    """
    a = rows.reshape(rows.shape[0], -1)
    if isinstance(over, Interval) or over.norm == "linf":
        box = Interval(over.lower.reshape(-1), over.upper.reshape(-1))
        return a @ box.center - jnp.abs(a) @ box.radius
    center, radius = over.center.reshape(-1), over.radius.reshape(-1)
    safe = jnp.where(radius > 0, radius, 1.0)
    # delta = radius t with ||t|| <= 1: the unit ball, inside the box [low, high] that contains 0.
    low = jnp.where(radius > 0, (over.lower.reshape(-1) - center) / safe, 0.0)
    high = jnp.where(radius > 0, (over.upper.reshape(-1) - center) / safe, 0.0)
    gain = a * radius[None]
    over_ball = _min_over_l2 if over.norm == "l2" else _min_over_l1
    return a @ center + over_ball(gain, low[None], high[None])


def _min_over_l2(gain: Array, low: Array, high: Array) -> Array:
    """Computes `min <gain, t>` over `||t||_2 <= 1, low <= t <= high` by its dual.

    `max_{m >= 0} sum_i min_{t in [low, high]} (gain_i t + m t^2 / 2) - m / 2`, with `t = clip(-gain / m, low, high)`:
    every `m` is a lower bound. Without the box the best is `m = ||gain||_2`, with it a smaller one, found by bisection
    on `||t||_2 = 1`. By the envelope theorem the multiplier needs no gradient.
    """
    square = jnp.square(gain).sum(axis=1)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    is_zero = square == 0

    def point(m: Array) -> Array:
        return jnp.clip(-gain / jnp.where(is_zero, 1.0, m)[:, None], low, high)

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = bracket
        middle = 0.5 * (left + right)
        is_outside = jnp.square(point(middle)).sum(axis=1) > 1.0
        return jnp.where(is_outside, middle, left), jnp.where(is_outside, right, middle)

    start = lax.stop_gradient((jnp.zeros_like(norm), norm))
    _, m = lax.stop_gradient(lax.fori_loop(0, _NUM_BISECTIONS, halve, start))
    t = lax.stop_gradient(point(m))
    dual = (gain * t + 0.5 * m[:, None] * jnp.square(t)).sum(axis=1) - 0.5 * m
    return jnp.maximum(-norm, dual)


def _min_over_l1(gain: Array, low: Array, high: Array) -> Array:
    """Computes `min <gain, t>` over `||t||_1 <= 1, low <= t <= high` exactly.

    A fractional knapsack: the budget 1 is spent on the coordinates of largest `|gain|`, up to each one's room.
    """
    room = jnp.where(gain > 0, -low, high)
    order = jnp.argsort(-jnp.abs(lax.stop_gradient(gain)), axis=1)
    worth, room = jnp.take_along_axis(jnp.abs(gain), order, axis=1), jnp.take_along_axis(room, order, axis=1)
    before = jnp.cumsum(room, axis=1) - room
    return -(worth * jnp.clip(1.0 - before, 0.0, room)).sum(axis=1)


def _through_affine(op: Op, upstream: list[Array | None]) -> tuple[tuple[Array, ...], Array | None]:
    if convolution.is_supported(op):
        assert upstream[0] is not None
        return (convolution.transposed(op, upstream[0]),), None
    zeros = [jnp.zeros(node.shape, node.dtype) for node in op.nodes]
    offsets, transpose = jax.vjp(op.apply, *zeros)
    size = next(rows.shape[0] for rows in upstream if rows is not None)
    rows = tuple(
        jnp.zeros((size, *node.shape), node.dtype) if given is None else given
        for given, node in zip(upstream, op.outputs, strict=True)
    )
    coefficients = jax.vmap(transpose)(rows)
    if len(op.nodes) == len(op.inputs) or op.name in BILINEAR | {"div"}:
        return coefficients, None  # linear: nothing is added
    return coefficients, functools.reduce(jnp.add, map(_inner, rows, offsets))


def _through_lines(lines: Lines, rows: Array | None) -> tuple[tuple[Array], Array]:
    assert rows is not None
    is_positive = rows > 0
    coefficients = rows * jnp.where(is_positive, lines.lower_slope[None], lines.upper_slope[None])
    lower_bias, upper_bias = (0.0 if bias is None else bias[None] for bias in (lines.lower_bias, lines.upper_bias))
    return (coefficients,), (rows * jnp.where(is_positive, lower_bias, upper_bias)).reshape(len(rows), -1).sum(axis=1)


def _inner(rows: Array, value: Array) -> Array:
    return (rows * value[None]).reshape(rows.shape[0], -1).sum(axis=1)
