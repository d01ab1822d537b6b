"""What a method finds out on its way: bounds of hidden layers by name, linear coefficients, where bounds blow up."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdx.balls import Ball, Region
from rdx.bounds import linear, propagation
from rdx.bounds.composites import COMPOSITE
from rdx.bounds.graph import PIECEWISE_LINEAR, Graph, Node, Op
from rdx.bounds.interval import Interval
from rdx.bounds.patches import Rows
from rdx.bounds.propagation import Record
from rdx.types import Array, Key, PyTree


class Planes(NamedTuple):
    """Linear functions that enclose a function over a region: `<lower, x> + lower_bias <= f(x) <= <upper, x> + ...`.

    Attributes:
        lower: coefficients for each leaf of `x`, shape `[B, *output, *leaf]` without the leaf's batch axis.
        lower_bias: shape `[B, *output]`.
        upper: as `lower`.
        upper_bias: as `lower_bias`.
    """

    lower: list[Array]
    lower_bias: Array
    upper: list[Array]
    upper_bias: Array


class Details(NamedTuple):
    """What `details` returns.

    Attributes:
        output: the bounds that the method returns.
        layers: bounds with which each nonlinear operation is entered, by a name such as "Dense_0 -> relu".
        planes: what encloses the output; None for methods that have no lines. Those of `alpha_crown` take CROWN's own
            slopes over its hidden bounds.
    """

    output: Interval
    layers: dict[str, Interval]
    planes: Planes | None


class Layer(NamedTuple):
    """How loose bounds are before one nonlinear operation, on average over elements and examples.

    Attributes:
        name: of the layer, as in `Details`.
        width: of the bounds.
        sampled: distance between the least and the greatest value at points of the region.
        excess: `width / sampled`, at least 1 for sound bounds.
        growth: this excess divided by that of the layer before.
    """

    name: str
    width: float
    sampled: float
    excess: float
    growth: float


def details(
    method: Callable[..., Interval], fn: Callable[..., Array], region: PyTree, *args: PyTree, **options: Any
) -> Details:
    """Runs `method(fn, region, *args, **options)` and returns what it found out on its way as well.

    Args:
        method: any method of this room.
        fn: see the method, as for the others.
        region: the perturbed inputs.
        *args: further arguments.
        **options: of the method.

    Returns:
        The details; layers in order of execution, except under `jit`, which sorts the names.
    """
    names: list[str] = []  # beside the arrays: as keys of a pytree they would be sorted

    def harvest(graph: Graph, record: Record) -> tuple[list[Interval], Planes | None]:
        places = _places(graph, record.entered)
        names.extend(places)
        layers = (record.entered[op][i] for op, i in places.values())
        return [Interval(lower[0], upper[0]) for lower, upper in layers], _planes(graph, record)

    output, (layers, planes) = propagation.recorded(harvest, lambda: method(fn, region, *args, **options))
    return Details(output, dict(zip(names, layers, strict=True)), planes)


def explain(
    key: Key, method: Callable[..., Interval], fn: Callable[..., Array], region: PyTree, *args: PyTree,
    num_samples: int = 100, **options: Any,
) -> list[Layer]:
    """Tells layer by layer how much wider bounds are than what values at random points span.

    The layer with the largest `growth` is where bounds blow up. Points fall short of the true range, the more so the
    more inputs there are, so an excess well above 1 is no fault by itself; its growth is what to look at.

    Args:
        key: for the points.
        method: any method of this room.
        fn: see the method, as for the others.
        region: the perturbed inputs.
        *args: further arguments.
        num_samples: number of points for each example; half of them are corners.
        **options: of the method.

    Returns:
        One entry for each input of a nonlinear operation, in order of execution.
    """
    leaves = jax.tree.leaves(region, is_leaf=lambda leaf: isinstance(leaf, Region))
    keys = jax.random.split(key, len(leaves))
    batch = propagation.batch_size(region, *args)
    points = [_points(*pair, num_samples, batch) for pair in zip(keys, leaves, strict=True)]
    names: list[str] = []

    def harvest(graph: Graph, record: Record, *points: Array) -> list[tuple[Array, Array]]:
        places = _places(graph, record.entered)
        names.extend(places)

        def values(*point: Array) -> list[Array]:
            known = graph.values(*(p if leaf.is_shared else p[None] for p, leaf in zip(point, leaves, strict=True)))
            return [known[op.nodes[i]] for op, i in places.values()]

        seen = [value.max(axis=0) - value.min(axis=0) for value in jax.vmap(values)(*points)]
        bounds = [record.entered[op][i] for op, i in places.values()]
        return [(upper - lower, width) for (lower, upper), width in zip(bounds, seen, strict=True)]

    _, found = propagation.recorded(harvest, lambda: method(fn, region, *args, **options), *points)
    layers: list[Layer] = []
    for name, widths in zip(names, found, strict=True):
        width, sampled = (float(value.mean()) for value in widths)
        excess = width / max(sampled, float(np.finfo(np.float32).tiny))
        layers.append(Layer(name, width, sampled, excess, excess / layers[-1].excess if layers else excess))
    return layers


def _places(graph: Graph, entered: Mapping[Op, Any]) -> dict[str, tuple[Op, int]]:
    """Names the inputs of nonlinear operations: by the module that computes them, else by the user's line."""
    producers, names = graph.producers(), {}
    for op in graph.ops:
        for i, node in enumerate(op.nodes if op in entered else ()):
            place = producers[node].source if node in producers else None
            where = "input" if place is None else place.scope or str(place)
            name = f"{where} -> {_kind(op)}" + (f"[{i}]" if len(op.nodes) > 1 else "")
            count = sum(other.split(" #")[0] == name for other in names)
            names[name if count == 0 else f"{name} #{count + 1}"] = (op, i)
    return names


def _kind(op: Op) -> str:
    if op.name == COMPOSITE:
        return op.params["graph"].ops[-1].name
    if op.name != PIECEWISE_LINEAR:
        return op.name
    slopes = op.params["below"], op.params["above"]
    return {(0.0, 1.0): "relu", (-1.0, 1.0): "abs"}.get(slopes, "kink")


def _planes(graph: Graph, record: Record) -> Planes | None:
    """Substitutes backwards to the inputs and stops there: linear functions rather than their extreme values."""
    output, known = graph.output, record.known
    is_enclosed = all(op.is_affine or op in record.lines for op in graph.ops)
    if known is None or not isinstance(output, Node) or not is_enclosed:
        return None
    sets = dict(zip(graph.inputs, record.regions, strict=True))
    references = linear.reference_points(graph, sets, known.centers)
    size = math.prod(output.shape)
    unit = jnp.eye(size, dtype=output.dtype).reshape(-1, *output.shape)

    shapes = {node: node.shape if over.is_shared else node.shape[1:] for node, over in sets.items()}

    def plane(sign: float) -> tuple[list[Array], Array]:
        rows, gap = linear.substitute(graph, {output: Rows(sign * unit)}, record.lines, sets, references)
        found, bias = [], sign * references[output].reshape(-1) + gap
        for node in graph.inputs:
            a = rows[node].dense(node) if node in rows else jnp.zeros((size, *node.shape), node.dtype)
            bias = bias - a.reshape(size, -1) @ references[node].reshape(-1)
            found.append(sign * a.reshape(*output.shape[1:], *shapes[node]))
        return found, sign * bias.reshape(output.shape[1:])

    return Planes(*plane(1.0), *plane(-1.0))


def _points(key: Key, region: Region, num_samples: int, batch: int) -> Array:
    """Draws points of a region, every other one a corner brought into it, shape `[B, N, ...]`."""
    if region.is_shared:
        alone = dataclasses.replace(jax.tree.map(lambda leaf: leaf[None], region), is_shared=False)
        points = _points(key, alone, num_samples, 1)
        return jnp.broadcast_to(points, (batch, *points.shape[1:]))
    draw_key, corner_key = jax.random.split(key)
    is_fixed = region.radius == 0  # there the box needs no sides, and a ball's must not be empty
    low, high = jnp.where(is_fixed, -jnp.inf, region.lower), jnp.where(is_fixed, jnp.inf, region.upper)
    ball = Ball(region.norm, region.radius, low=low, high=high)

    def draw(key: Key) -> Array:
        return ball.sample(jax.random.split(key, len(region.center)), region.center)

    def corner(key: Key) -> Array:
        choice = jnp.where(jax.random.bernoulli(key, shape=region.center.shape), region.upper, region.lower)
        return ball.project(choice, region.center)

    inside = jax.vmap(draw)(jax.random.split(draw_key, num_samples // 2))
    corners = jax.vmap(corner)(jax.random.split(corner_key, num_samples // 2))
    points = jnp.concatenate([region.center[None], inside, corners])
    return jnp.moveaxis(jnp.where(is_fixed[None], region.center[None], points), 0, 1)
