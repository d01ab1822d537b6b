"""What complete verification cuts a region into: subdomains, and how nonlinear operations are enclosed on them.

A neuron is an element of the input of a function with one kink at 0. A subdomain fixes the signs of some neurons
(Wang et al. 2021, beta-CROWN, arXiv:2103.06624, Sec. 3.1), or it is a part of a box.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx.balls import Region
from rdx.bounds import composites, propagation, relaxations, tracing
from rdx.bounds.certify import ROUNDING
from rdx.bounds.crown import default_max_bytes, walk
from rdx.bounds.graph import PIECEWISE_LINEAR, Graph, Node, Op
from rdx.bounds.interval import Interval
from rdx.bounds.relaxations import Lines
from rdx.types import Array, PyTree

Split: TypeAlias = Literal["relu", "input"]


class Problem(NamedTuple):
    """What is verified: `fn(x, *args)` over a region of one example, a pytree that compiled code takes as argument."""

    fn: Partial
    region: PyTree
    args: tuple[PyTree, ...]


class Root(NamedTuple):
    """What holds on the whole region.

    Attributes:
        entered: bounds of the inputs of each nonlinear operation.
        scale: the largest magnitude that the output, or what it is an affine function of, can have; see `certify`.
    """

    entered: list[list[Interval]]
    scale: Array


class Subdomains(NamedTuple):
    """Parts of the region, each with outputs to bound; `N` counts the neurons that can be split.

    Attributes:
        boxes: for each input the box it ranges over; ends of shape `[D, 1, ...]`.
        signs: -1 where a neuron is at most 0, +1 where it is at least 0, 0 where it is free. Shape `[D, N]`, int8.
        outputs: which outputs to bound, shape `[D, M]`, int.
    """

    boxes: list[Interval]
    signs: Array
    outputs: Array


class Relaxed(NamedTuple):
    """How the nonlinear operations are enclosed on each subdomain.

    Attributes:
        entries: for each nonlinear operation its lines, or bounds of its input if its slopes are to be optimised.
        alpha: slopes to begin with, shape `[D, N]`.
        is_unstable: whether a neuron may have both signs, shape `[D, N]`, bool.
        is_active: whether a neuron is never negative, shape `[D, N]`, bool.
        is_empty: whether no input fulfils the signs, beyond rounding. Shape `[D]`, bool.
    """

    entries: list[Interval | Lines]
    alpha: Array
    is_unstable: Array
    is_active: Array
    is_empty: Array


def traced(problem: Problem) -> Graph:
    """Traces the function of a problem.

    Raises:
        UnsupportedPrimitiveError: if it uses an operation without a rule.
        ValueError: if its output does not depend on the input.
    """
    graph = _traced_with_assumptions(problem).without_assumptions()
    if not isinstance(graph.output, Node):
        raise ValueError("The output does not depend on the input: evaluate it, there is nothing to verify.")
    return graph


def _traced_with_assumptions(problem: Problem) -> Graph:
    centers = jax.tree.map(lambda region: region.center, problem.region, is_leaf=is_region)
    graph = composites.fuse(tracing.trace(problem.fn, centers, *problem.args), relaxations.has_rule)
    relaxations.check(graph.ops)
    return graph


def regions_of(problem: Problem) -> list[Region]:
    """Lists the regions of a problem's inputs."""
    return jax.tree.leaves(problem.region, is_leaf=is_region)


def splittable(graph: Graph) -> list[Op]:
    """Lists the operations whose neurons can be split, in the order of all arrays with an axis `N`."""
    return [op for op in graph.ops if op.name == PIECEWISE_LINEAR]


def survey(problem: Problem) -> tuple[bool, int]:
    """Tells whether all nonlinear operations can be split, and counts the neurons."""
    graph = traced(problem)
    is_linear = all(op.is_affine or op.name == PIECEWISE_LINEAR for op in graph.ops)
    return is_linear, sum(math.prod(op.nodes[0].shape) for op in splittable(graph))


def root(problem: Problem) -> Root:
    """Bounds what enters every nonlinear operation by CROWN, intersected with intervals."""
    graph, regions = traced(problem), regions_of(problem)
    relaxed, known = walk(graph, regions)
    suffix, _ = propagation.affine_suffix(graph, output(graph))
    nodes = {output(graph)}.union(*(op.outputs for op in suffix))
    ends = [jnp.abs(end).max() for node in nodes for end in known.intervals[node]]
    is_defined = propagation.is_as_assumed(_traced_with_assumptions(problem), regions)
    return Root(list(relaxed.entered.values()), jnp.where(is_defined, jnp.stack(ends).max(), jnp.nan))


def relax(problem: Problem, whole: Root, domains: Subdomains, *, split: Split) -> Relaxed:
    """Encloses the nonlinear operations on each subdomain.

    For `split="relu"` the bounds of the whole region are cut off by the signs, and intervals carry that forward to
    later layers. For `split="input"` CROWN bounds every layer anew over each box.
    """
    graph = traced(problem)
    max_bytes = default_max_bytes() / len(domains.signs)
    one = functools.partial(_relax_one, graph, regions_of(problem), whole, split=split, max_bytes=max_bytes)
    return jax.vmap(one, in_axes=(box_axis(split), 0))(domains.boxes, domains.signs)


def is_region(leaf: PyTree) -> bool:
    """Tells where a pytree of regions ends."""
    return isinstance(leaf, Region)


def over(regions: Sequence[Region], boxes: Sequence[Interval]) -> list[Region]:
    """Replaces boxes by parts of them; other balls stay as they are."""
    return [
        Region(box.center, box.radius, box.lower, box.upper, "linf") if region.norm == "linf" else region
        for region, box in zip(regions, boxes, strict=True)
    ]


def by_layer(graph: Graph, values: Array) -> list[Array]:
    """Cuts `[N]` into arrays of the shapes of the neurons' nodes."""
    shapes = [op.nodes[0].shape for op in splittable(graph)]
    ends = [sum(math.prod(shape) for shape in shapes[: i + 1]) for i in range(len(shapes))]
    parts = jnp.split(values, ends[:-1]) if ends else []
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def box_axis(split: Split) -> int | None:
    """Gives the `vmap` axis of boxes: unless inputs are split all subdomains have the same, and share what follows."""
    return 0 if split == "input" else None


def output(graph: Graph) -> Node:
    """Gives the output of a graph as `traced` makes it."""
    assert isinstance(graph.output, Node)
    return graph.output


def _relax_one(
    graph: Graph, regions: Sequence[Region], whole: Root, boxes: list[Interval], signs: Array, *, split: Split,
    max_bytes: float,
) -> Relaxed:
    neurons = splittable(graph)
    cuts = dict(zip(neurons, by_layer(graph, signs), strict=True))
    outside = dict(zip((op for op in graph.ops if not op.is_affine), whole.entered, strict=True))
    entered: dict[Op, list[Interval]] = {}
    are_empty = [jnp.zeros((), bool)]

    def enter(op: Op, known: propagation.Known) -> list[Interval]:
        bounds = [known.intervals[node].intersect(past) for node, past in zip(op.nodes, outside[op], strict=True)]
        if op in cuts:
            bounds = [_cut(bounds[0], cuts[op])]
        limits = [ROUNDING * jnp.abs(jnp.stack(past)).max() for past in outside[op]]
        are_empty.extend((b.lower > b.upper + limit).any() for b, limit in zip(bounds, limits, strict=True))
        # Ends that cross by rounding change places, so that no interval is inverted.
        entered[op] = [Interval(jnp.minimum(*b), jnp.maximum(*b)) for b in bounds]
        return entered[op]

    if split == "input":
        entered = walk(graph, over(regions, boxes), max_bytes=max_bytes)[0].entered
    else:
        propagation.propagate(graph, regions, enter)
    entries = [
        entered[op][0] if op in cuts else relaxations.relax(op, entered[op], relaxations.adaptive) for op in entered
    ]
    tight = Interval(*(_flat([entered[op][0][end] for op in neurons]) for end in (0, 1)))
    is_unstable = (tight.lower < 0) & (tight.upper > 0)
    alpha = relaxations.adaptive(*tight)
    return Relaxed(entries, alpha, is_unstable, tight.lower >= 0, jnp.stack(are_empty).any())


def _cut(bounds: Interval, signs: Array) -> Interval:
    return Interval(
        jnp.where(signs > 0, jnp.maximum(bounds.lower, 0.0), bounds.lower),
        jnp.where(signs < 0, jnp.minimum(bounds.upper, 0.0), bounds.upper),
    )


def _flat(layers: Sequence[Array]) -> Array:
    return jnp.concatenate([jnp.zeros(0), *(layer.reshape(-1) for layer in layers)])
