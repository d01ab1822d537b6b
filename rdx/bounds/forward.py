"""Linear bounds propagated forward (Weng et al. 2018, arXiv:1804.09699; Xu et al. 2020, arXiv:2002.12920).

Every node lies between two linear functions of the input, kept as their middle and half their distance: an affine
operation `W z + b` maps the middle by itself and the distance by `|W|`, and where no nonlinear operation has been met
there is no distance to carry.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rdx.balls import Region
from rdx.bounds import linear, propagation, relaxations
from rdx.bounds.graph import MONOTONE, Graph, Node, Op
from rdx.bounds.interval import Interval
from rdx.bounds.patches import Rows
from rdx.bounds.relaxations import Lines, SlopeFn
from rdx.types import Array, PyTree


class Enclosure(NamedTuple):
    """Two linear functions of the `N` input elements that enclose a node.

    With `d` the deviation of the input from the point that its region is measured from, `value + <slopes, d>` is in the
    middle of the two, and either is `spread[0] + <spread[1:], d>` away from it.

    Attributes:
        value: the node's shape.
        slopes: shape `[N, *node.shape]`; the same for all examples up to the first nonlinear operation.
        spread: shape `[1 + N, *node.shape]`, entries of any sign; None where both functions are one.
    """

    value: Array
    slopes: Array
    spread: Array | None


def forward(
    fn: Callable[..., Array], region: PyTree, *args: PyTree, relu_lower: SlopeFn = relaxations.adaptive,
    intersect: bool = True,
) -> Interval:
    """Bounds `fn` by linear functions of the input, propagated forward.

    An affine layer gives `W+ lower + W- upper` and `W+ upper + W- lower`; a nonlinear one is replaced by planes over
    its bounds, that is the extreme values of its inputs' linear functions over the region, and these are put into the
    planes by the signs of their slopes. Affine operations after the last nonlinear ones are fused, as in `ibp`.

    Each neuron costs as many multiplications and as much memory as the input has elements, whatever follows it: this is
    the method for few inputs and many outputs. With one nonlinear layer it is `crown`; with more it is looser, as
    either function of a neuron is fixed before it is known which one later layers need.

    Source: Weng et al. (2018, Fast-Lin, arXiv:1804.09699), whose linear functions it carries from the input on as Xu
    et al. (2020, arXiv:2002.12920, Sec. 3.1, forward mode) do.

    Args:
        fn: any JAX function `(x, *args) -> [B, ...]` whose examples are independent.
        region: the perturbed inputs, from `Ball.region`; a pytree of regions where `x` is a pytree.
        *args: further arguments, not perturbed; every leaf has a leading batch axis.
        relu_lower: choice of the lower slope of unstable relus, such as `relaxations.adaptive` or `same_slope`.
        intersect: intersect the bounds of every nonlinear operation's inputs, and of the output, with intervals.

    Returns:
        Bounds of the output, each end of shape `[B, ...]`.

    Raises:
        UnsupportedPrimitiveError: if `fn` uses an operation without a rule.
    """

    def bound(graph: Graph, regions: Sequence[Region]) -> Interval:
        planes, notes = _identities(graph.inputs, regions), propagation.record()

        def enter(op: Op, known: propagation.Known) -> list[Interval]:
            _carry(graph, planes)
            bounds = [_concretize(planes[node], regions) for node in op.nodes]
            if intersect:
                intervals = (propagation.by_intervals(graph, node, known, regions) for node in op.nodes)
                bounds = [found.intersect(interval) for found, interval in zip(bounds, intervals, strict=True)]
            lines = notes.lines[op] = relaxations.relax(op, bounds, relu_lower)
            planes[op.outputs[0]] = _through_lines(lines, [planes[node] for node in op.nodes])
            return bounds

        known = propagation.propagate(graph, regions, enter)
        _carry(graph, planes)
        bounds = _concretize(_fused(graph, planes), regions)
        return bounds.intersect(propagation.fused(graph, known, regions)) if intersect else bounds

    return propagation.per_example(bound, fn, region, *args)


def _identities(nodes: Sequence[Node], regions: Sequence[Region]) -> dict[Node, Enclosure]:
    """Gives each input as a function of all inputs' elements."""
    sizes = [math.prod(node.shape) for node in nodes]
    planes = {}
    for i, (node, region) in enumerate(zip(nodes, regions, strict=True)):
        unit = jnp.eye(sum(sizes), sizes[i], -sum(sizes[:i]), dtype=node.dtype)
        reference = 0.5 * (region.lower + region.upper) if region.norm == "linf" else region.center
        planes[node] = Enclosure(reference, unit.reshape(-1, *node.shape), None)
    return planes


def _carry(graph: Graph, planes: dict[Node, Enclosure]) -> None:
    """Carries planes on through affine operations, as far as nonlinear ones."""
    for op in graph.ops:
        if op.is_affine and op.outputs[0] not in planes and all(node in planes for node in op.nodes):
            planes.update(zip(op.outputs, _through_affine(op, [planes[node] for node in op.nodes]), strict=True))


def _through_affine(op: Op, inputs: Sequence[Enclosure]) -> list[Enclosure]:
    values = op.apply(*(planes.value for planes in inputs))
    slopes = _linear_part(op, [planes.slopes for planes in inputs])
    spreads: Sequence[Array | None] = [None] * len(values)
    if any(planes.spread is not None for planes in inputs):
        # W+ lower + W- upper = W middle - |W| (upper - lower) / 2, whatever the sign of upper - lower.
        spreads = _linear_part(_magnitude(op), [
            jnp.zeros((1 + len(planes.slopes), *node.shape), node.dtype) if planes.spread is None else planes.spread
            for planes, node in zip(inputs, op.nodes, strict=True)
        ])
    return [Enclosure(*parts) for parts in zip(values, slopes, spreads, strict=True)]


def _linear_part(op: Op, rows: Sequence[Array]) -> tuple[Array, ...]:
    """Maps rows `[R, *node.shape]` by an affine operation without its additive constants."""
    zeros = tuple(jnp.zeros(node.shape, node.dtype) for node in op.nodes)
    return jax.vmap(lambda *row: jax.jvp(op.apply, zeros, row)[1])(*rows)


def _magnitude(op: Op) -> Op:
    """Makes the operation whose coefficients are the absolute values of an affine operation's."""
    if op.name in MONOTONE:
        return op
    if op.name in ("neg", "sub"):
        return dataclasses.replace(op, fn=(lambda x: (x,)) if op.name == "neg" else (lambda x, y: (lax.add(x, y),)))
    return dataclasses.replace(op, inputs=tuple(v if isinstance(v, Node) else jnp.abs(v) for v in op.inputs))


def _through_lines(lines: Lines, inputs: Sequence[Enclosure]) -> Enclosure:
    """Puts linear functions into the planes of a nonlinear operation.

    The lower plane `s z + b` takes `s middle - |s| spread`, the upper one `t z + c` takes `t middle + |t| spread`.
    """
    middle, spread = 0.0, 0.0
    for low, high, planes in zip(lines.lower_slopes, lines.upper_slopes, inputs, strict=True):
        rows = jnp.concatenate([planes.value[None], planes.slopes])
        middle += 0.5 * (high + low)[None] * rows
        spread += 0.5 * (high - low)[None] * rows
        if planes.spread is not None:
            middle += 0.5 * (jnp.abs(high) - jnp.abs(low))[None] * planes.spread
            spread += 0.5 * (jnp.abs(high) + jnp.abs(low))[None] * planes.spread
    assert isinstance(middle, jax.Array)
    assert isinstance(spread, jax.Array)
    value = middle[0] + 0.5 * (lines.upper_bias + lines.lower_bias)
    return Enclosure(value, middle[1:], spread.at[0].add(0.5 * (lines.upper_bias - lines.lower_bias)))


def _fused(graph: Graph, planes: dict[Node, Enclosure]) -> Enclosure:
    """Finds the planes of the output, with `|W|` of all affine operations after the last nonlinear ones as one."""
    assert isinstance(graph.output, Node)
    found = planes[graph.output]
    suffix, ends = propagation.affine_suffix(graph, graph.output)
    if found.spread is None or sum(op.is_mixing for op in suffix) <= 1:
        return found
    unit = jnp.eye(found.value.size, dtype=found.value.dtype).reshape(-1, *found.value.shape)
    coefficients, _ = linear.substitute(graph, {graph.output: Rows(unit)}, {}, ends, {})
    spread = sum(
        jnp.tensordot(end.spread.reshape(len(end.spread), -1), jnp.abs(rows.dense(node)).reshape(len(unit), -1), (1, 1))
        for node, rows in coefficients.items() if (end := planes[node]).spread is not None
    )
    return found._replace(spread=jnp.asarray(spread).reshape(found.spread.shape))


def _concretize(planes: Enclosure, regions: Sequence[Region]) -> Interval:
    """Finds the extreme values of both linear functions over the region."""
    gap, lean = (0.0, 0.0) if planes.spread is None else (planes.spread[0], planes.spread[1:])
    lower = _deviation(planes.slopes - lean, regions)
    upper = _deviation(-planes.slopes - lean, regions)
    return Interval(planes.value - gap + lower, planes.value + gap - upper)


def _deviation(slopes: Array, regions: Sequence[Region]) -> Array:
    """Computes the minimum of `<slopes, d>` over the region, for slopes `[N, ...]`; shape `[...]`."""
    rows, total, start = slopes.reshape(len(slopes), -1).T, 0.0, 0
    for region in regions:
        part = rows[:, start : start + region.center.size]
        total += linear.deviation(Rows(part.reshape(-1, *region.center.shape)), region)
        start += region.center.size
    return jnp.reshape(total, slopes.shape[1:])
