"""Bounds of every element of a node, as many at a time as the memory allows and only where they are needed."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from rdx.balls import Region
from rdx.bounds import linear, patches
from rdx.bounds.graph import Graph, Node, Op
from rdx.bounds.interval import Interval
from rdx.bounds.linear import SlopeChoice
from rdx.bounds.patches import Rows
from rdx.bounds.relaxations import Lines
from rdx.types import Array

# Arrays of the coefficients' size that one step of substitution holds: coefficients, two slopes, two gaps, a product.
_NUM_COPIES = 6


# (slope choice -> lower bounds [n]) -> lower bounds [n] of the best choice.
Optimise: TypeAlias = Callable[[Callable[[SlopeChoice], Array]], Array]


class Chunks(NamedTuple):
    """How many elements of a node are bounded at a time, and which.

    Attributes:
        max_bytes: about how much memory the coefficients of one example may take.
        known: bounds to intersect with, and to keep where nothing tighter is needed.
        is_needed: the elements to bound, in the node's shape; None for all.
    """

    max_bytes: float = math.inf
    known: Interval | None = None
    is_needed: Array | None = None


WHOLE = Chunks()


def two_sided(
    graph: Graph, node: Node, lines: Mapping[Op, Lines], sets: Mapping[Node, Region | Interval],
    centers: Mapping[Node, Array], *, chunks: Chunks = WHOLE, optimise: Optimise | None = None,
) -> Interval:
    """Bounds the elements of a node from both sides: one row per element and side; see `linear.lower_bound`.

    Rows are taken chunk by chunk where they are too many for the memory. Those that are needed come first, and chunks
    that no example of a batch needs are left out; what an example is told never depends on the others.
    """
    references = linear.reference_points(graph, sets, centers)
    reference, axes = references[node].reshape(-1), patches.image_axes(graph, node)
    begin = _beginning(graph, node, axes, references)
    # Rows that depend on nothing but shared values are not batched, and must not wait for it either; nor must those
    # whose slopes are optimised, inside of what a `vmap` will batch.
    folds = optimise is None and not any(isinstance(over, Region) and over.is_shared for over in sets.values())
    # Both sides have the same coefficients then.
    is_paired = optimise is None and all(each.are_parallel for each in lines.values())

    def substitute(objective: Mapping[Node, Rows], choose: SlopeChoice, **options: Any) -> tuple[dict, Any]:
        return linear.substitute(graph, objective, lines, sets, references, choose=choose, **options)

    def bound(indices: Array, *, group: int, are_own: bool = False) -> Interval:
        objective, middle = begin(indices, group), reference[indices]
        if is_paired:
            rows, gaps = substitute(objective, linear.as_given, are_own=are_own, folds=folds, is_paired=True)
            gap, opposite = jnp.broadcast_to(gaps, (2, *middle.shape))
            upper = -linear.minimum(_times(-1.0, rows), sets, opposite - middle)
            return Interval(linear.minimum(rows, sets, middle + gap), upper)

        def total(sign: float | Array) -> Array:
            def value(choose: SlopeChoice) -> Array:
                coefficients, gap = substitute(_times(sign, objective), choose, are_own=are_own, folds=folds)
                return linear.minimum(coefficients, sets, sign * middle + gap)

            return optimise(value) if optimise else value(linear.as_given)

        if chunks is WHOLE:
            # Two passes rather than one stacked: under jit, a side that nobody uses costs nothing.
            return Interval(total(1.0), -total(-1.0))
        lower, upper = lax.map(total, jnp.array([1.0, -1.0], reference.dtype))  # compiles in half the time
        return Interval(lower, -upper)

    def num_bytes(group: int) -> float:
        """Finds how much memory a group of rows takes at most, on its way."""
        sizes: list[int] = []

        def run(indices: Array) -> None:
            substitute(begin(indices, group), linear.as_given, observe=sizes.append)

        jax.eval_shape(run, jax.ShapeDtypeStruct((group,), jnp.int32))
        return _NUM_COPIES * reference.dtype.itemsize * max(sizes, default=1)

    found = _by_chunks(bound, patches.by_place(node, axes), num_bytes, chunks)
    return Interval(*(end.reshape(node.shape) for end in found))


def _times(sign: float | Array, rows: Mapping[Node, Rows]) -> dict[Node, Rows]:
    return {node: dataclasses.replace(found, values=sign * found.values) for node, found in rows.items()}


def _beginning(
    graph: Graph, node: Node, axes: tuple[int, ...] | None, references: Mapping[Node, Array]
) -> Callable[[Array, int], dict[Node, Rows]]:
    """Makes the function that builds a row for each of some elements of a node, given by their indices in groups.

    Dense rows go back to the last nonlinear operations at once, for all elements: that is the same for all examples.
    """
    if axes is not None:
        return lambda indices, group: {node: patches.units(node, axes, indices, group)}
    size = math.prod(node.shape)
    unit = Rows(jnp.eye(size, dtype=node.dtype).reshape(-1, *node.shape))
    bent = {output for op in graph.ops if not op.is_affine for output in op.outputs}
    coefficients, _ = linear.substitute(graph, {node: unit}, {}, bent, references)

    def begin(indices: Array, _: int) -> dict[Node, Rows]:
        if len(indices) == size:
            return coefficients
        return {end: rows.take(indices) for end, rows in coefficients.items()}

    return begin


def _by_chunks(
    bound: Callable[..., Interval], elements: np.ndarray, num_bytes: Callable[[int], float], chunks: Chunks
) -> Interval:
    """Runs `bound(indices) -> Interval` over all elements, in as many steps as the memory asks for."""
    known = None if chunks.known is None else Interval(*(end.reshape(-1) for end in chunks.known))
    is_needed = None if chunks.is_needed is None else lax.stop_gradient(chunks.is_needed.reshape(-1))
    group = patches.group_size(elements.shape[1])
    num_groups = elements.size // group
    num_chunks = -(-num_groups // _chunk_size(group, num_bytes, chunks.max_bytes))
    if num_chunks == 1:
        found = _in_order(bound(elements.reshape(-1), group=elements.shape[1]), elements)
        tight = found if known is None else found.intersect(known)
        return tight if known is None or is_needed is None else _kept(tight, known, is_needed)
    groups = elements.reshape(-1, group) if is_needed is None else _needed_first(elements, is_needed, group)
    # The last chunk is filled up with groups that nobody needs a second time.
    filled = jnp.pad(groups, ((0, -num_groups % num_chunks), (0, 0))).reshape(num_chunks, -1)
    is_copy = jnp.arange(filled.size).reshape(filled.shape) >= elements.size
    are_own = is_needed is not None

    def step(_: None, chunk: tuple[Array, Array]) -> tuple[None, Interval]:
        indices, is_copy = chunk
        if known is None:
            return None, bound(indices, group=group, are_own=are_own)
        wanted = ~is_copy if is_needed is None else ~is_copy & is_needed[indices]
        here = Interval(*(end[indices] for end in known))

        def tightened() -> Interval:
            return _kept(bound(indices, group=group, are_own=are_own).intersect(here), here, wanted)

        return None, lax.cond(any_example(wanted.any()), tightened, lambda: here)

    _, found = lax.scan(step, None, (filled, is_copy))
    return _in_order(Interval(*(end.reshape(-1)[: elements.size] for end in found)), groups)


def _needed_first(elements: np.ndarray, is_needed: Array, group: int) -> Array:
    """Divides the elements at each place into groups, such that few hold any that are needed; those come first."""
    order = jnp.argsort(~is_needed[elements], axis=1, stable=True)
    groups = jnp.take_along_axis(jnp.asarray(elements), order, axis=1).reshape(-1, group)
    return groups[jnp.argsort(~is_needed[groups].any(axis=1), stable=True)]


def _in_order(found: Interval, elements: np.ndarray | Array) -> Interval:
    """Brings what was found out about elements into the order of their numbers."""
    numbers = elements.reshape(-1)
    if isinstance(numbers, np.ndarray) and (numbers == np.arange(numbers.size)).all():
        return found
    place = jnp.argsort(jnp.asarray(numbers))
    return Interval(*(end[place] for end in found))


def _kept(found: Interval, known: Interval, is_needed: Array) -> Interval:
    return Interval(*(jnp.where(is_needed, new, old) for new, old in zip(found, known, strict=True)))


def _chunk_size(group: int, num_bytes: Callable[[int], float], max_bytes: float) -> int:
    """Counts the groups that fit into the memory, at least one."""
    return sys.maxsize if max_bytes == math.inf else max(1, int(max_bytes / num_bytes(group)))


@custom_vmap
def any_example(flag: Array) -> Array:
    """Gives a flag of one example; under `vmap`, that of the whole batch, so that a `cond` on it stays one."""
    return flag


@any_example.def_vmap
def _any_example(axis_size: int, in_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    del axis_size
    return any_example(flag.any(axis=0) if in_batched[0] else flag), False
