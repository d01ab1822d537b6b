"""Coefficients of linear bounds: one row for each bounded element, either dense or on a window of an image.

An element of a convolution's output depends on its receptive field alone, so its coefficients on an earlier image are
zero outside of a window. A row then holds that window and the place where it lies, and substitution backwards costs
what the receptive fields cost (the patches of Xu et al. 2020, arXiv:2002.12920, here each with a place of its own, so
that any subset of the elements can be bounded).

What a window holds outside of its image means nothing; whoever reads it looks at zeros instead.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rdx.bounds import transposition
from rdx.bounds.graph import ELEMENTWISE, Graph, Node, Op
from rdx.types import Array

# At most so many elements at one place form a group, if any of them may be left out.
_LARGEST_GROUP = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """Where the windows of some rows lie in an image: those of group `g` begin at `strides * places[g] + offsets`.

    A group is elements at one place, as many for each; rows come group by group.

    Attributes:
        places: places of the groups of bounded elements in their own image, shape `[G, len(axes)]`, int32.
        axes: the image's spatial axes.
        counts: number of places along each axis.
        strides: how far the window moves along each axis when the place moves by one.
        offsets: where the window of place 0 begins; it may begin, and end, outside of the image.
        is_clean: whether the rows are zero wherever a window leaves the image.
    """

    places: Array
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    counts: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    strides: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    offsets: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    is_clean: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Coefficients on one node.

    Attributes:
        values: shape `[S, *node.shape]`, with the window's extents in the place of the spatial ones if there is one.
        window: None where rows are dense.
    """

    values: Array
    window: Window | None = None

    def beside(self, array: Array) -> Array:
        """Lays an array of the node's shape beside the rows: what lies in each row's window, zero outside of it."""
        window = self.window
        if window is None:
            return array[None]
        extents = [self.values.shape[1 + axis] for axis in window.axes]
        margins, starts = _margins(window, extents, array.shape)
        array = jnp.pad(array, margins)
        sizes = list(array.shape)
        for axis, extent in zip(window.axes, extents, strict=True):
            sizes[axis] = extent

        def cut(place: Array) -> Array:
            return lax.dynamic_slice(array, _corner(window, place, starts, array.ndim), sizes)

        return jnp.repeat(jax.vmap(cut)(window.places), self._group_size(), axis=0)

    def scaled(self, factors: Array) -> "Rows":
        """Multiplies by factors that lie beside the rows, which are zero outside of the image."""
        window = None if self.window is None else dataclasses.replace(self.window, is_clean=True)
        return Rows(self.values * factors, window)

    def clean(self, node: Node) -> "Rows":
        """Makes the rows zero where a window leaves the image."""
        if self.window is None or self.window.is_clean:
            return self
        return self.scaled(self.beside(jnp.ones(node.shape, node.dtype)))

    def dense(self, node: Node) -> Array:
        """Writes the rows out, shape `[S, *node.shape]`."""
        window = self.window
        if window is None:
            return self.values
        extents = [self.values.shape[1 + axis] for axis in window.axes]
        margins, starts = _margins(window, extents, node.shape)
        canvas = jnp.pad(jnp.zeros(node.shape, node.dtype), margins)

        def lay(values: Array, place: Array) -> Array:
            return lax.dynamic_update_slice(canvas, values, _corner(window, place, starts, canvas.ndim))

        whole = jax.vmap(lay)(self.values, jnp.repeat(window.places, self._group_size(), axis=0))
        return lax.pad(whole, jnp.zeros((), node.dtype), [(0, 0, 0), *((-low, -high, 0) for low, high in margins)])

    def plus(self, other: "Rows", node: Node) -> "Rows":
        """Adds rows of the same elements on the same node."""
        a, b = self.window, other.window
        if a is None or b is None or (a.strides, a.axes) != (b.strides, b.axes):
            return Rows(self.dense(node) + other.dense(node))
        begin = [min(ends) for ends in zip(a.offsets, b.offsets, strict=True)]
        end = [max(ends) for ends in zip(self._ends(), other._ends(), strict=True)]
        window = dataclasses.replace(a, offsets=tuple(begin), is_clean=a.is_clean and b.is_clean)
        return Rows(self._grown(begin, end) + other._grown(begin, end), window)

    def take(self, places: Array) -> "Rows":
        """Picks dense rows by their index."""
        assert self.window is None
        return Rows(jnp.take(self.values, places, axis=0))

    def _group_size(self) -> int:
        assert self.window is not None
        return self.values.shape[0] // self.window.places.shape[0]

    def _ends(self) -> list[int]:
        assert self.window is not None
        extents = (self.values.shape[1 + axis] for axis in self.window.axes)
        return [offset + extent for offset, extent in zip(self.window.offsets, extents, strict=True)]

    def _grown(self, begin: Sequence[int], end: Sequence[int]) -> Array:
        assert self.window is not None
        config = [(0, 0, 0)] * self.values.ndim
        for axis, first, last, low, high in zip(
            self.window.axes, self.window.offsets, self._ends(), begin, end, strict=True
        ):
            config[1 + axis] = (first - low, high - last, 0)
        return lax.pad(self.values, jnp.zeros((), self.values.dtype), config)


def _margins(
    window: Window, extents: Sequence[int], shape: tuple[int, ...]
) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Finds how far an image has to be padded so that every window lies inside, and where place 0 begins then."""
    margins, starts = [(0, 0)] * len(shape), []
    for axis, extent, stride, offset, count in zip(
        window.axes, extents, window.strides, window.offsets, window.counts, strict=True
    ):
        low, high = max(0, -offset), max(0, offset + stride * (count - 1) + extent - shape[axis])
        margins[axis] = (low, high)
        starts.append(low + offset)
    return margins, tuple(starts)


def _corner(window: Window, place: Array, starts: tuple[int, ...], rank: int) -> list[Array]:
    corner: list[Array] = [jnp.zeros((), place.dtype)] * rank
    for i, axis in enumerate(window.axes):
        corner[axis] = window.strides[i] * place[i] + starts[i]
    return corner


def image_axes(graph: Graph, node: Node) -> tuple[int, ...] | None:
    """Finds the spatial axes of a node that a convolution or a sliding window computes, None where there are none."""
    producers = graph.producers()
    while node in producers:
        op = producers[node]
        if not op.is_affine:
            return None
        if _is_sliding(op):
            return _spatial_axes(op)[1]
        if op.name not in ELEMENTWISE:
            return None
        node = op.nodes[0]
    return None


def by_place(node: Node, axes: tuple[int, ...] | None) -> np.ndarray:
    """Numbers elements in C order, and lists them place by place: shape `[places, elements at each]`.

    Without spatial axes every element has a place of its own.
    """
    if axes is None:
        return np.arange(math.prod(node.shape))[:, None]
    numbers = np.moveaxis(np.arange(math.prod(node.shape)).reshape(node.shape), axes, range(len(axes)))
    return numbers.reshape(math.prod(node.shape[axis] for axis in axes), -1)


def group_size(num_elements: int) -> int:
    """Finds into groups of how many to divide the elements at a place."""
    return max(size for size in range(1, _LARGEST_GROUP + 1) if num_elements % size == 0)


def units(node: Node, axes: tuple[int, ...], indices: Array, group: int) -> Rows:
    """Makes a row for each of some elements of an image: 1 there, on a window of one place.

    Args:
        node: the image.
        axes: its spatial axes.
        indices: the elements, numbered in C order.
        group: as many after each other are at the same place.

    Returns:
        The rows.
    """
    spots = jnp.unravel_index(indices, node.shape)
    values = jnp.ones((len(indices), *(1,) * len(node.shape)), node.dtype)
    for axis, (spot, size) in enumerate(zip(spots, node.shape, strict=True)):
        if axis not in axes:
            shape = [size if other == axis else 1 for other in range(len(node.shape))]
            values = values * jax.nn.one_hot(spot, size, dtype=node.dtype).reshape(-1, *shape)
    counts = tuple(node.shape[axis] for axis in axes)
    places = jnp.stack([spots[axis][::group] for axis in axes], axis=1).astype(jnp.int32)
    return Rows(values, Window(places, axes, counts, (1,) * len(axes), (0,) * len(axes), is_clean=True))


def transpose(op: Op, rows: Rows, *, are_own: bool) -> list[Rows] | None:
    """Maps rows on an affine operation's output to rows on its perturbed inputs, window by window.

    Args:
        op: any affine operation with one output.
        rows: coefficients on its output.
        are_own: see `transposition.transpose`.

    Returns:
        One for each perturbed input; None where rows are dense, or have to become it.
    """
    if rows.window is None:
        return None
    if op.name in ELEMENTWISE:
        return [_through_elementwise(op, rows, place) for place, v in enumerate(op.inputs) if isinstance(v, Node)]
    if _is_sliding(op) and _spatial_axes(op)[1] == rows.window.axes:
        return [_written_out(_through_sliding(op, rows.clean(op.outputs[0]), are_own=are_own), op.nodes[0])]
    return None


def _is_sliding(op: Op) -> bool:
    """Tells whether an operation slides one window over one perturbed image."""
    params = op.params
    if op.name == "conv_general_dilated":
        is_image = isinstance(op.inputs[0], Node) and params["batch_group_count"] == 1
        return is_image and all(step == 1 for step in params["lhs_dilation"])
    if op.name == "reduce_window_sum":
        return op.outputs[0].shape[0] == 1 and all(step == 1 for step in params["base_dilation"])
    return False


def _spatial_axes(op: Op) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Gives the axes of input and output along which the window slides."""
    if op.name == "conv_general_dilated":
        lhs, _, out = op.params["dimension_numbers"]
        return tuple(lhs[2:]), tuple(out[2:])
    sizes, strides = op.params["window_dimensions"], op.params["window_strides"]
    axes = tuple(axis for axis, (size, stride) in enumerate(zip(sizes, strides, strict=True)) if size > 1 or stride > 1)
    return axes, axes


def _through_elementwise(op: Op, rows: Rows, place: int) -> Rows:
    if op.name in {"mul", "div"}:
        constant = next(value for value in op.inputs if not isinstance(value, Node))
        factor = constant if op.name == "mul" else 1.0 / constant
        return rows.scaled(rows.beside(jnp.broadcast_to(factor, op.outputs[0].shape)))
    is_negative = op.name == "neg" or (op.name == "sub" and place == 1)
    return dataclasses.replace(rows, values=-rows.values) if is_negative else rows


def _through_sliding(op: Op, rows: Rows, *, are_own: bool) -> Rows:
    """Goes back through a window operation: the receptive field of `e` places is `(e - 1) stride + reach` wide."""
    window, node = rows.window, op.nodes[0]
    assert window is not None
    axes, _ = _spatial_axes(op)
    reach, steps, lows = _geometry(op, axes)
    shape = list(node.shape)
    for axis, out_axis, size, step in zip(axes, window.axes, reach, steps, strict=True):
        shape[axis] = (rows.values.shape[1 + out_axis] - 1) * step + size
    unpadded = _unpadded(op, Node(tuple(shape), node.dtype))
    values = transposition.transpose(unpadded, rows.values, are_own=are_own)
    if values is None:
        (values,) = jax.vmap(jax.vjp(unpadded.apply, jnp.zeros(shape, node.dtype))[1])((rows.values,))
    offsets = (offset * step - low for offset, step, low in zip(window.offsets, steps, lows, strict=True))
    strides = (stride * step for stride, step in zip(window.strides, steps, strict=True))
    is_clean = not any(low or high for low, high in op.params["padding"])
    return Rows(values, Window(window.places, axes, window.counts, tuple(strides), tuple(offsets), is_clean))


def _geometry(op: Op, axes: tuple[int, ...]) -> tuple[list[int], list[int], list[int]]:
    """Gives reach, stride and lower padding of the sliding window along each axis."""
    params = op.params
    if op.name == "conv_general_dilated":
        _, rhs, _ = params["dimension_numbers"]
        sizes, dilations = [op.inputs[1].shape[axis] for axis in rhs[2:]], params["rhs_dilation"]
        steps, lows = list(params["window_strides"]), [low for low, _ in params["padding"]]
    else:
        pick = lambda name: [params[name][axis] for axis in axes]
        sizes, dilations, steps = pick("window_dimensions"), pick("window_dilation"), pick("window_strides")
        lows = [low for low, _ in pick("padding")]
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(sizes, dilations, strict=True)]
    return reach, steps, lows


def _unpadded(op: Op, node: Node) -> Op:
    """Gives the same operation on an input of another size, without padding."""
    params = {**op.params, "padding": tuple((0, 0) for _ in op.params["padding"])}
    if op.name == "conv_general_dilated":
        return dataclasses.replace(op, inputs=(node, *op.inputs[1:]), params=params)

    def fn(x: Array) -> tuple[Array]:
        return (lax.reduce_window(x, np.zeros((), x.dtype), lax.add, **params),)

    return dataclasses.replace(op, fn=fn, inputs=(node,), params=params)


def _written_out(rows: Rows, node: Node) -> Rows:
    """Writes rows out once their windows are no smaller than the image."""
    assert rows.window is not None
    extents = math.prod(rows.values.shape[1 + axis] for axis in rows.window.axes)
    return Rows(rows.dense(node)) if extents >= math.prod(node.shape[axis] for axis in rows.window.axes) else rows
