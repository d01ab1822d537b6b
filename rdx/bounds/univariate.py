"""Bounds of any elementwise function of one value, from its code alone (Piyavskii 1972; Moore 1966, mean value form).

The interval `[l, u]` is cut into cells. In each of them the derivative has a range, by interval arithmetic on the code
of the derivative, so the function stays above two lines through its values at the cell's ends. The error is of second
order in the cells' width: with `n` cells a line is lower than the best one by about `1 / n^2` of its gap, more where
the code of the derivative names a value several times.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rdx.bounds import arithmetic, tracing
from rdx.bounds.graph import Graph, Node, Op
from rdx.bounds.interval import Interval
from rdx.types import Array

_NUM_CELLS = 64
_NUM_BISECTIONS = 30


class _Cells(NamedTuple):
    """What is known of a function on each cell; every array has a leading axis of cells."""

    left: Array
    right: Array
    at_left: Array
    at_right: Array
    slope: Interval
    value: Interval

    def mirrored(self) -> "_Cells":
        """Gives the cells of the function's negative."""
        flip = lambda v: Interval(-v.upper, -v.lower)
        return _Cells(self.left, self.right, -self.at_left, -self.at_right, flip(self.slope), flip(self.value))


def image(op: Op, x: Interval) -> Interval:
    """Bounds a composite over an interval."""
    cells = _cells(op, x)
    return Interval(_least(cells, 0.0).min(axis=0), -_least(cells.mirrored(), 0.0).min(axis=0))


def lines(op: Op, x: Interval) -> tuple[Array, Array, Array, Array]:
    """Encloses a composite between the lines that are best in the middle: slope and bias of the lower and the upper."""
    cells = _cells(op, x)
    lower_slope, lower_bias = _line_below(cells, x)
    upper_slope, upper_bias = _line_below(cells.mirrored(), x)
    return lower_slope, lower_bias, -upper_slope, -upper_bias


def _cells(op: Op, x: Interval) -> _Cells:
    graph = op.params["graph"]
    share = jnp.linspace(0.0, 1.0, _NUM_CELLS + 1, dtype=x.lower.dtype).reshape(-1, *(1,) * x.lower.ndim)
    # Interpolated from both ends, so that the outermost points are these ends.
    points = (1.0 - share) * x.lower[None] + share * x.upper[None]
    values = jax.vmap(graph.evaluate)(points)
    return _Cells(points[:-1], points[1:], values[:-1], values[1:], *jax.vmap(_ranges(op))(points[:-1], points[1:]))


def _ranges(op: Op) -> Callable[[Array, Array], tuple[Interval, Interval]]:
    """Makes the function that bounds slope and value over one cell."""
    graph, (node,) = op.params["graph"], op.nodes

    def derivative(x: Array) -> Array:
        return jax.jvp(graph.evaluate, (x,), (jnp.ones_like(x),))[1]

    slopes = tracing.trace(derivative, jnp.zeros(node.shape, node.dtype))

    def ranges(left: Array, right: Array) -> tuple[Interval, Interval]:
        known = arithmetic.walk(graph, Interval(left, right))
        of_slope = arithmetic.walk(slopes, Interval(left, right))
        slope = _output(slopes, of_slope, left)
        # Where a condition holds in a part of the cell only, the function may jump: its slope is anything.
        is_sure = jnp.ones(left.shape, bool)
        for assumed in slopes.assumed:
            is_sure &= jnp.isfinite(of_slope[assumed].lower) & jnp.isfinite(of_slope[assumed].upper)
        for inner, value in known.items():
            if inner.dtype == jnp.bool_:
                is_sure &= value.lower == value.upper
        slope = Interval(jnp.where(is_sure, slope.lower, -jnp.inf), jnp.where(is_sure, slope.upper, jnp.inf))
        return slope, known[graph.output]

    return ranges


def _output(graph: Graph, known: Mapping[Node, Interval], x: Array) -> Interval:
    if isinstance(graph.output, Node):
        return known[graph.output]
    return Interval(*(jnp.broadcast_to(graph.output, x.shape),) * 2)


def _least(cells: _Cells, k: Array | float) -> Array:
    """Bounds `f(x) - k x` from below on each cell."""
    width = cells.right - cells.left
    at_left, at_right = cells.at_left - k * cells.left, cells.at_right - k * cells.right
    falls, rises = cells.slope.lower - k, cells.slope.upper - k
    is_known = jnp.isfinite(falls) & jnp.isfinite(rises)
    turns = is_known & (falls < 0) & (rises > 0)
    down, up = jnp.where(turns, falls, -1.0), jnp.where(turns, rises, 1.0)
    # Where the line through the left end, of the least slope, meets that through the right end, of the greatest.
    valley = (at_left * up - at_right * down + down * up * width) / (up - down)
    by_slope = jnp.where(turns, valley, jnp.minimum(at_left, at_right))
    by_value = cells.value.lower - jnp.maximum(k * cells.left, k * cells.right)
    return jnp.where(is_known, jnp.maximum(by_slope, by_value), by_value)


def _line_below(cells: _Cells, x: Interval) -> tuple[Array, Array]:
    """Finds the line below the function that is highest in the middle of the interval.

    With slope `k` its value there is `k m + min_x (f(x) - k x)`, concave in `k` with derivative `m - argmin`.
    """
    middle = 0.5 * (x.lower + x.upper)
    frozen = lax.stop_gradient(cells)
    low = jnp.where(jnp.isfinite(frozen.slope.lower), frozen.slope.lower, jnp.inf).min(axis=0)
    high = jnp.where(jnp.isfinite(frozen.slope.upper), frozen.slope.upper, -jnp.inf).max(axis=0)

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = bracket
        k = 0.5 * (left + right)
        place = jnp.argmin(_least(frozen, k[None]), axis=0)[None]
        is_steep = jnp.take_along_axis(frozen.left + frozen.right, place, axis=0)[0] > 2.0 * middle
        return jnp.where(is_steep, left, k), jnp.where(is_steep, k, right)

    start = lax.stop_gradient((jnp.minimum(low, high), jnp.maximum(low, high)))
    left, right = lax.fori_loop(0, _NUM_BISECTIONS, halve, start)
    k = lax.stop_gradient(jnp.where(jnp.isfinite(left + right), 0.5 * (left + right), 0.0))
    return k, _least(cells, k[None]).min(axis=0)
