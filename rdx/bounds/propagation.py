"""The walk that every method shares: trace one example, carry intervals forward, fuse affine ends."""

import contextvars
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx.balls import Region
from rdx.bounds import arithmetic, composites, relaxations, tracing
from rdx.bounds.chunks import two_sided
from rdx.bounds.graph import Graph, Node, Op
from rdx.bounds.interval import Interval
from rdx.bounds.relaxations import Lines
from rdx.compilation import materialised
from rdx.types import Array, PyTree


class Known(NamedTuple):
    """What propagation has found out about nodes.

    Attributes:
        intervals: bounds of each node.
        centers: the middle of each interval; affine operations map those of their inputs.
    """

    intervals: dict[Node, Interval]
    centers: dict[Node, Array]


@dataclasses.dataclass
class Record:
    """What a method notes on its way about the one example that is traced.

    Attributes:
        entered: bounds with which nonlinear operations are entered.
        lines: their relaxations.
        known: what `propagate` returned.
        regions: of the graph's inputs.
    """

    entered: dict[Op, list[Interval]] = dataclasses.field(default_factory=dict)
    lines: dict[Op, Lines] = dataclasses.field(default_factory=dict)
    known: Known | None = None
    regions: Sequence[Region] = ()


class _Listener:
    """Whoever asked for records: what to make of one, with further batched arguments, and what came of it."""

    def __init__(self, harvest: Callable[..., PyTree], extra: Sequence[Array]) -> None:
        self.harvest, self.extra = harvest, tuple(extra)
        self.record, self.found = Record(), None


_LISTENER: contextvars.ContextVar[_Listener | None] = contextvars.ContextVar("listener", default=None)


def recorded(harvest: Callable[..., PyTree], run: Callable[[], Interval], *extra: Array) -> tuple[Interval, PyTree]:
    """Runs a method and, for each example, `harvest(graph, record, *extra)` after it.

    Args:
        harvest: makes arrays of what the method noted.
        run: runs the method.
        *extra: arrays with a leading batch axis, handed to `harvest` example by example.

    Returns:
        What the method returns, and what `harvest` returns with a leading batch axis.
    """
    listener = _Listener(harvest, extra)
    token = _LISTENER.set(listener)
    try:
        output = run()
    finally:
        _LISTENER.reset(token)
    return output, listener.found


def record() -> Record:
    """Gives the record that a method's notes go to; one that nobody reads if nobody asked."""
    listener = _LISTENER.get()
    return Record() if listener is None else listener.record


def per_example(method: Callable[..., Interval], fn: Callable[..., Array], region: PyTree, *args: PyTree) -> Interval:
    """Runs `method(graph, regions)` on every example: one example is traced, and the batch is a `vmap` over it."""
    regions, structure = jax.tree.flatten(region, is_leaf=_is_region)
    listener = _LISTENER.get()

    def one(regions: Sequence[Region], args: PyTree, extra: Sequence[Array]) -> tuple[Interval, PyTree]:
        regions = [region if region.is_shared else jax.tree.map(lambda leaf: leaf[None], region) for region in regions]
        args = jax.tree.map(lambda leaf: leaf[None], args)
        graph = tracing.trace(fn, structure.unflatten([region.center for region in regions]), *args)
        graph = composites.fuse(graph, relaxations.has_rule)
        relaxations.check(graph.ops)
        is_defined, graph = is_as_assumed(graph, regions), graph.without_assumptions()
        if listener is not None:
            listener.record = Record(regions=regions)
        constant = Interval(graph.output, graph.output) if not isinstance(graph.output, Node) else None
        bounds = constant or method(graph, regions)
        noted = None if listener is None else listener.harvest(graph, listener.record, *extra)
        return Interval(*(jnp.where(is_defined, end[0], jnp.nan) for end in bounds)), noted

    axes = [None if region.is_shared else 0 for region in regions]
    run = jax.vmap(one, in_axes=(axes, 0, 0), axis_size=batch_size(region, *args))
    bounds, noted = run(regions, args, () if listener is None else listener.extra)
    if listener is not None:
        listener.found = noted
    return bounds


def is_as_assumed(graph: Graph, regions: Sequence[Region]) -> Array | bool:
    """Tells whether intervals prove every node finite that tracing took to be finite."""
    if not graph.assumed:
        return True
    known = propagate(graph, regions, interval_entry(graph, regions)).intervals
    return jnp.stack([jnp.isfinite(end).all() for node in graph.assumed for end in known[node]]).all()


def batch_size(region: PyTree, *args: PyTree) -> int:
    """Counts the examples that a region and further arguments are given for.

    Raises:
        ValueError: if nothing has a batch axis, as all regions are shared.
    """
    regions = jax.tree.leaves(region, is_leaf=_is_region)
    batched = jax.tree.leaves(([leaf.center for leaf in regions if not leaf.is_shared], args))
    if not batched:
        raise ValueError("All regions are shared and nothing has a batch axis: pass the examples as an argument.")
    return batched[0].shape[0]


def _is_region(leaf: PyTree) -> bool:
    return isinstance(leaf, Region)


def propagate(graph: Graph, regions: Sequence[Region], enter: Callable[[Op, Known], list[Interval]]) -> Known:
    """Propagates intervals to every node.

    Args:
        graph: the traced function.
        regions: one for each input.
        enter: `(op, known) -> [Interval, ...]` gives the bounds with which a nonlinear operation is entered; they may
            be tighter than those known of its inputs.

    Returns:
        Intervals of all nodes and their centers.
    """
    intervals = {node: Interval(r.lower, r.upper) for node, r in zip(graph.inputs, regions, strict=True)}
    notes = record()
    notes.known = known = Known(intervals, {node: interval.center for node, interval in intervals.items()})
    for op in graph.ops:
        if op.is_affine:
            centers = op.apply(*(known.centers[node] for node in op.nodes))
            inputs = [known.intervals[v] if isinstance(v, Node) else Interval(v, v) for v in op.inputs]
            outputs = arithmetic.evaluate(op, inputs, centers=centers)
        else:
            for node in op.nodes:
                met = materialised((known.intervals[node], known.centers[node]))
                known.intervals[node], known.centers[node] = met
            notes.entered[op] = enter(op, known)
            outputs = (relaxations.propagate(op, notes.entered[op]),)
            centers = (outputs[0].center,)
        known.intervals.update(zip(op.outputs, outputs, strict=True))
        known.centers.update(zip(op.outputs, centers, strict=True))
    return known


def interval_entry(graph: Graph, regions: Sequence[Region]) -> Callable[[Op, Known], list[Interval]]:
    """Builds the `enter` of plain IBP."""
    return lambda op, known: [by_intervals(graph, node, known, regions) for node in op.nodes]


def by_intervals(graph: Graph, node: Node, known: Known, regions: Sequence[Region]) -> Interval:
    """Bounds a node by its interval, or by the dual norm of what leads to it where an l2 or l1 ball enters directly."""
    _, ends = affine_suffix(graph, node)
    if not any(region.norm != "linf" and root in ends for root, region in zip(graph.inputs, regions, strict=True)):
        return known.intervals[node]
    return two_sided(graph, node, {}, _ends(graph, known, regions), known.centers)


def fused(graph: Graph, known: Known, regions: Sequence[Region]) -> Interval:
    """Bounds the output with the affine operations after the last nonlinear ones fused.

    Interval arithmetic is exact through one operation that mixes elements; only with more is there something to gain.
    """
    assert isinstance(graph.output, Node)
    suffix, ends = affine_suffix(graph, graph.output)
    is_curved = any(r.norm != "linf" and node in ends for node, r in zip(graph.inputs, regions, strict=True))
    if is_curved or sum(op.is_mixing for op in suffix) > 1:
        return two_sided(graph, graph.output, {}, _ends(graph, known, regions), known.centers)
    return known.intervals[graph.output]


def affine_suffix(graph: Graph, node: Node) -> tuple[list[Op], set[Node]]:
    """Finds the affine operations between `node` and the last nonlinear ones, and the nodes where they begin."""
    ends, suffix = {node}, []
    for op in reversed(graph.ops):
        if op.is_affine and ends.intersection(op.outputs):
            suffix.append(op)
            ends = (ends - set(op.outputs)) | set(op.nodes)
    return suffix, ends


def _ends(graph: Graph, known: Known, regions: Sequence[Region]) -> dict[Node, Region | Interval]:
    ends: dict[Node, Region | Interval] = dict(zip(graph.inputs, regions, strict=True))
    bent = (op.outputs[0] for op in graph.ops if not op.is_affine)
    ends.update({node: known.intervals[node] for node in bent if node in known.intervals})
    return ends
