"""Linear bounds: backward substitution through a graph, and the extreme values of a linear function over a region."""

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from rdx.balls import Region
from rdx.bounds import patches, transposition
from rdx.bounds.graph import Graph, Node, Op
from rdx.bounds.interval import Interval
from rdx.bounds.patches import Rows
from rdx.bounds.relaxations import Lines
from rdx.types import Array

# The dual of the l2 ball in a box has one multiplier; every value of it bounds from below, so few steps are enough.
_NUM_BISECTIONS = 20


# (op, rows on its output) -> slopes beside the rows, or None.
SlopeChoice: TypeAlias = Callable[[Op, Rows], Array | None]


def as_given(op: Op, rows: Rows) -> None:
    """Chooses no slopes: lines stay as they are."""
    del op, rows


def lower_bound(
    graph: Graph, objective: Mapping[Node, Array], lines: Mapping[Op, Lines],
    sets: Mapping[Node, Region | Interval], references: Mapping[Node, Array],
) -> Array:
    """Bounds `sum_n <rows_n, n>` from below by substituting backwards until only nodes with known sets are left.

    Everything is measured from a reference point that affine operations map exactly: with `x = x_ref + d`, a line `s x
    + b` below `f` gives `f(x) - f_ref >= s d + (s x_ref + b - f_ref)`. Biases of affine layers drop out, the sets are
    centered, and what is summed up are small gaps rather than large terms that cancel.

    Args:
        graph: the traced function.
        objective: coefficients on nodes, shape `[S, *node.shape]` each.
        lines: relaxations of the nonlinear operations to substitute through.
        sets: where substitution ends and what the value there ranges over.
        references: from `reference_points`, for the same lines and sets.

    Returns:
        Lower bounds, shape `[S]`.
    """
    given = {node: Rows(rows) for node, rows in objective.items()}
    start = functools.reduce(jnp.add, [_sum(rows * references[node][None]) for node, rows in objective.items()])
    coefficients, gap = substitute(graph, given, lines, sets, references)
    return minimum(coefficients, sets, start + gap)


def substitute(
    graph: Graph, objective: Mapping[Node, Rows], lines: Mapping[Op, Lines], ends: Container[Node],
    references: Mapping[Node, Array], *, choose: SlopeChoice = as_given, are_own: bool = False, folds: bool = True,
    is_paired: bool = False, observe: Callable[[int], object] = id,
) -> tuple[dict[Node, Rows], Array | float]:
    """Bounds a linear function of nodes from below by a linear function of other nodes.

    At an affine operation the coefficients go through its vector-Jacobian product. At a nonlinear one, positive
    coefficients take its lower line and negative ones the upper (Zhang et al. 2018, CROWN, arXiv:1811.00866, Eq. 8).

    Args:
        graph: the traced function.
        objective: coefficients on the nodes to begin with.
        lines: relaxations of the nonlinear operations to substitute through.
        ends: the nodes at which substitution ends.
        references: a value for every node, from `reference_points`.
        choose: `(op, rows) -> slopes` of the free line of a piecewise-linear operation, one beside each coefficient;
            None for the slope that its lines have.
        are_own: whether the rows to begin with differ from example to example.
        folds: whether rows that do are folded into one axis under `vmap`; see `transposition.transpose`.
        is_paired: whether the gaps of the negative rows are asked for as well. All lines have to be parallel, as the
            coefficients of negative rows are the negative ones then.
        observe: is told how many numbers all coefficients together hold, after each operation.

    Returns:
        Coefficients on the ends, and the sum of gaps at the reference values, shape `[S]`; `[2, S]` if paired.
    """
    pending = dict(objective)
    own: set[Node] = set(objective) if are_own else set()  # whose coefficients depend on the example
    bound: Array | float = 0.0
    for op in reversed(graph.ops):
        if any(node in ends for node in op.outputs) or not any(node in pending for node in op.outputs):
            continue
        upstream = [pending.pop(node, None) for node in op.outputs]
        is_own = any(node in own for node in op.outputs)
        if is_own or not op.is_affine or op.has_own_coefficients:
            own.update(op.nodes)
        if op.is_affine:
            coefficients = _through_affine(op, upstream, are_own=is_own and folds)
        else:
            assert upstream[0] is not None
            values = [references[node] for node in (*op.nodes, op.outputs[0])]
            free = choose(op, upstream[0])
            if free is None:
                coefficients, gap = _through_lines(lines[op], upstream[0], values, is_paired=is_paired)
            else:
                coefficients, gap = _through_free_line(op, lines[op], upstream[0], free, values)
            bound = bound + gap
        for node, rows in zip(op.nodes, coefficients, strict=True):
            pending[node] = pending[node].plus(rows, node) if node in pending else rows
        observe(sum(rows.values.size for rows in pending.values()))
    return pending, bound


def reference_points(
    graph: Graph, sets: Mapping[Node, Region | Interval], centers: Mapping[Node, Array]
) -> dict[Node, Array]:
    """Computes a reference value for every node that follows from the sets.

    Boxes give their centers, other balls the point that they are around. At a nonlinear operation any number will do.
    Affine operations map what they are given: mostly the centers that propagation has mapped already, so that neither
    the products nor their derivatives are computed twice.

    Args:
        graph: the traced function.
        sets: where substitution ends and what the value there ranges over; a box is the interval of its node.
        centers: centers of the intervals of all nodes before the one to bound, from propagation.

    Returns:
        A value of the node's shape for each.
    """
    references = {
        node: centers[node] if isinstance(over, Interval) or over.norm == "linf" else over.center
        for node, over in sets.items()
    }
    for op in graph.ops:
        if op.outputs[0] in references or not all(node in references for node in op.nodes):
            continue
        if op.is_affine and not all(references[node] is centers.get(node) for node in op.nodes):
            references.update(zip(op.outputs, op.apply(*(references[node] for node in op.nodes)), strict=True))
        elif op.outputs[0] in centers:
            references.update({node: centers[node] for node in op.outputs})
    return references


def minimum(coefficients: Mapping[Node, Rows], sets: Mapping[Node, Region | Interval], start: Array) -> Array:
    """Computes the least value of linear functions over the sets of their nodes, given those at the reference point."""
    return sum((deviation(rows, sets[node]) for node, rows in coefficients.items()), start)


def deviation(rows: Rows, over: Region | Interval) -> Array:
    """Computes `min <a, x - reference>` over a set, for every row `a`; shape `[S]`, at most 0.

    An interval, or the linf ball in a box, measured from its middle: `-<|a|, radius>`. The other balls in a box,
    measured from the point that they are around: see below.
    """
    if isinstance(over, Interval) or over.norm == "linf":
        return -_sum(jnp.abs(rows.values) * rows.beside(0.5 * (over.upper - over.lower)))
    safe = jnp.where(over.radius > 0, over.radius, 1.0)
    # delta = radius t with ||t|| <= 1: the unit ball, inside the box [low, high] that contains 0.
    low, high = (jnp.where(over.radius > 0, (end - over.center) / safe, 0.0) for end in (over.lower, over.upper))
    gain = rows.values * rows.beside(over.radius)
    flat = (value.reshape(value.shape[0], -1) for value in (gain, rows.beside(low), rows.beside(high)))
    return (_min_over_l2 if over.norm == "l2" else _min_over_l1)(*flat)


def _min_over_l2(gain: Array, low: Array, high: Array) -> Array:
    """Computes `min <gain, t>` over `||t||_2 <= 1, low <= t <= high` by its dual.

    `max_{m >= 0} sum_i min_{t in [low, high]} (gain_i t + m t^2 / 2) - m / 2`, with `t = clip(-gain / m, low, high)`:
    every `m` is a lower bound. Without the box the best is `m = ||gain||_2`, with it a smaller one, found by bisection
    on `||t||_2 = 1`. By the envelope theorem the multiplier needs no gradient, nor does `t` inside the box; its ends
    do, as they are measured from the center.
    """
    square = jnp.square(gain).sum(axis=1)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    is_zero = square == 0

    def point(m: Array) -> Array:
        return jnp.clip(-lax.stop_gradient(gain) / jnp.where(is_zero, 1.0, m)[:, None], low, high)

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = bracket
        middle = 0.5 * (left + right)
        is_outside = jnp.square(point(middle)).sum(axis=1) > 1.0
        return jnp.where(is_outside, middle, left), jnp.where(is_outside, right, middle)

    start = lax.stop_gradient((jnp.zeros_like(norm), norm))
    _, m = lax.stop_gradient(lax.fori_loop(0, _NUM_BISECTIONS, halve, start))
    t = point(m)
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


def _through_affine(op: Op, upstream: list[Rows | None], *, are_own: bool) -> Sequence[Rows]:
    if len(upstream) == 1 and upstream[0] is not None:
        local = patches.transpose(op, upstream[0], are_own=are_own)
        if local is not None:
            return local
        fast = transposition.transpose(op, upstream[0].dense(op.outputs[0]), are_own=are_own)
        if fast is not None:
            return (Rows(fast),)
    size = next(rows.values.shape[0] for rows in upstream if rows is not None)
    rows = tuple(
        jnp.zeros((size, *node.shape), node.dtype) if given is None else given.dense(node)
        for given, node in zip(upstream, op.outputs, strict=True)
    )
    zeros = [jnp.zeros(node.shape, node.dtype) for node in op.nodes]
    return [Rows(values) for values in jax.vmap(jax.vjp(op.apply, *zeros)[1])(rows)]


def _through_lines(
    lines: Lines, rows: Rows, values: Sequence[Array], *, is_paired: bool = False
) -> tuple[list[Rows], Array]:
    """Replaces an operation by its lines; `values` are those at the reference point, of the inputs and the output."""
    is_positive = rows.values > 0

    def picked(lower: Array, upper: Array) -> Array:
        if lower is upper:
            return rows.beside(lower)
        return jnp.where(is_positive, rows.beside(lower), rows.beside(upper))

    slopes = [picked(*pair) for pair in zip(lines.lower_slopes, lines.upper_slopes, strict=True)]
    gaps = (_gap(lines.lower_slopes, lines.lower_bias, values), _gap(lines.upper_slopes, lines.upper_bias, values))
    gap = _sum(rows.values * picked(*gaps))
    if is_paired:
        gap = jnp.stack([gap, -_sum(rows.values * picked(*reversed(gaps)))])
    return [rows.scaled(slope) for slope in slopes], gap


def _through_free_line(
    op: Op, lines: Lines, rows: Rows, free: Array, values: Sequence[Array]
) -> tuple[list[Rows], Array]:
    """Replaces a function with one kink by its chord on one side, on the other by a line through the kink."""
    if op.params["above"] >= op.params["below"]:
        is_free, slope, bias = rows.values > 0, lines.upper_slopes, lines.upper_bias
    else:
        is_free, slope, bias = rows.values < 0, lines.lower_slopes, lines.lower_bias
    x, y = (rows.beside(value) for value in values)
    gap = jnp.where(is_free, free * x - y, rows.beside(_gap(slope, bias, values)))
    return [rows.scaled(jnp.where(is_free, free, rows.beside(slope[0])))], _sum(rows.values * gap)


def _gap(slopes: Sequence[Array], bias: Array, values: Sequence[Array]) -> Array:
    *inputs, output = values
    return sum((slope * value for slope, value in zip(slopes, inputs, strict=True)), bias) - output


def _sum(rows: Array) -> Array:
    flat = rows.reshape(rows.shape[0], -1)
    # On CPUs in half the time of a sum, of which XLA makes two passes; and as precise everywhere.
    return jnp.matmul(flat, jnp.ones(flat.shape[1], flat.dtype), precision=lax.Precision.HIGHEST)
