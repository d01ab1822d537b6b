"""What stands in for an operation: the same function, written in operations that have rules."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rdx.bounds.graph import Node, Value
from rdx.types import Array

# A softmax adds up so many exponentials at once.
_MANY = 8
# Takes the place of -inf in padding: no maximum, and 0 times it is 0.
LOWEST = -1e30
_SHAPING = ("broadcast_in_dim", "expand_dims", "reshape", "squeeze")


class Part(NamedTuple):
    """A value on the way to a softmax: with `m = max(x)` over some axes.

    Attributes:
        kind: "max" for `m`, "shifted" for `x - m`, "exp" for its exponential, "sum" for their sum, "log" for its log.
        node: `x`.
        axes: of the maximum.
        along: for each axis of the value the axis of `x` that it runs along, None where the value repeats.
    """

    kind: str
    node: Node
    axes: tuple[int, ...]
    along: tuple[int | None, ...]

    def fits(self) -> bool:
        """Tells whether the value lies beside `x` as its maximum or sum has to."""
        sizes = self.node.shape
        return len(self.along) == len(sizes) and all(
            size == 1 or place == (None if axis in self.axes else axis)
            for axis, (place, size) in enumerate(zip(self.along, sizes, strict=True))
        )

    def is_bare(self, shape: tuple[int, ...]) -> bool:
        """Tells whether a value of this shape has every maximum or sum once, in order."""
        sizes = self.node.shape
        kept = [axis for axis in range(len(sizes)) if axis not in self.axes and sizes[axis] > 1]
        return [axis for axis in self.along if axis in kept] == kept and math.prod(shape) == math.prod(
            sizes[axis] for axis in kept
        )


class Whole(NamedTuple):
    """A function of `x` that its parts add up to: softmax, log_softmax or logsumexp over some axes."""

    kind: str
    node: Node
    axes: tuple[int, ...]


def part(
    name: str, inputs: Sequence[Value], known: Sequence[Part | None], params: dict[str, Any], shape: tuple[int, ...]
) -> Part | None:
    """Names what an operation makes of parts of a softmax, None if nothing.

    Args:
        name: of the operation.
        inputs: its inputs.
        known: the parts that they are, None for those that are none.
        params: its parameters.
        shape: of its output.
    """
    first = inputs[0]
    if name == "reduce_max" and isinstance(first, Node):
        return Part("max", first, tuple(params["axes"]), _without(len(first.shape), params["axes"]))
    made = None
    match name, known:
        case "sub", [_, Part("max", node, axes) as largest] if first is node and largest.fits():
            made = Part("shifted", node, axes, tuple(range(len(node.shape))))
        case "exp", [Part("shifted") as given]:
            made = given._replace(kind="exp")
        case "reduce_sum", [Part("exp", node, axes)] if tuple(params["axes"]) == axes:
            made = Part("sum", node, axes, _without(len(node.shape), axes))
        case "log", [Part("sum") as given]:
            made = given._replace(kind="log")
        case "abs", [Part("sum") as given]:
            made = given
        case _ if name in _SHAPING and known[0] is not None and known[0].kind in {"max", "sum", "log"}:
            assert isinstance(first, Node)
            along = _moved(known[0].along, first.shape, shape, params.get("broadcast_dimensions"))
            made = None if along is None else known[0]._replace(along=along)
    return made


def _without(rank: int, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if axis not in axes)


def _moved(
    along: tuple[int | None, ...], before: tuple[int, ...], after: tuple[int, ...], dimensions: Sequence[int] | None
) -> tuple[int | None, ...] | None:
    """Follows axes through a change of shape; None if axes of more than one element are split or merged."""
    moved: list[int | None] = [None] * len(after)
    if dimensions is None:
        dimensions = [place for place, size in enumerate(after) if size > 1]
        pairs = [(size, axis) for size, axis in zip(before, along, strict=True) if size > 1]
        if [size for size, _ in pairs] != [after[place] for place in dimensions]:
            return None
        before, along = tuple(size for size, _ in pairs), tuple(axis for _, axis in pairs)
    for place, size, axis in zip(dimensions, before, along, strict=True):
        moved[place] = axis if size == after[place] else None
    return tuple(moved)


def whole(name: str, known: Sequence[Part | None], shape: tuple[int, ...]) -> Whole | None:
    """Recognises the last operation of a softmax, log-softmax or log-sum-exp; `shape` is that of its output."""
    if len(known) != 2:
        return None
    first, second = known
    if first is None or second is None or first.node is not second.node or first.axes != second.axes:
        return None
    kinds, made = (first.kind, second.kind), None
    if name == "div" and kinds == ("exp", "sum") and second.fits():
        made = "softmax"
    elif name == "sub" and kinds == ("shifted", "log") and second.fits():
        made = "log_softmax"
    elif name == "add" and sorted(kinds) == ["log", "max"] and first.is_bare(shape) and second.is_bare(shape):
        made = "logsumexp"
    return None if made is None else Whole(made, first.node, first.axes)


def softmax(x: Array, others: Array, *, axes: tuple[int, ...], is_log: bool) -> Array:
    """Computes `logistic(x_i - log sum_{j != i} exp x_j)` or its log: each value once, so that intervals are exact.

    Args:
        x: what softmax is taken of.
        others: the log of the sum of the other exponentials, in the form of `rows`.
        axes: of the softmax.
        is_log: whether its log is wanted.
    """
    distance = rows(x, axes=axes) - others
    return _restore(jax.nn.log_sigmoid(distance) if is_log else lax.logistic(distance), axes, x.shape)


def logsumexp(x: Array, top: Array, *, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Computes the log of a sum of exponentials, shifted by constants that do not matter, in the given shape."""
    top = top.max(axis=axes, keepdims=True)
    return (jnp.log(jnp.exp(x - top).sum(axis=axes, keepdims=True)) + top).reshape(shape)


def blocks(num: int) -> tuple[range, range, range]:
    """Splits `1 ... num`: a first block, where it has to be moved to for the next ones, and what is left over."""
    size = num if num <= _MANY else math.isqrt(num)
    end = num // size * size
    return range(1, size + 1), range(0, end, size), range(end + 1, num + 1)


def rotations(x: Array, *, shifts: Sequence[int]) -> list[Array]:
    """Lists what lies some places further along the last axis, which begins again at its end."""
    return [jnp.roll(x, -shift, axis=-1) if shift else x for shift in shifts]


def hide(x: Array, masked: Array, *, axes: tuple[int, ...], is_relative: bool) -> Array:
    """Replaces what a mask makes lower than any number by numbers that float32 can still add up.

    Args:
        x: what an exponential is taken of.
        masked: what the mask makes of 0.
        axes: along which exponentials are added up; where the mask leaves nothing, values stay as they are.
        is_relative: whether only differences matter; the lowest finite numbers are something to be left, then.
    """
    is_low, is_infinite = masked <= LOWEST, masked == -jnp.inf
    is_lost = (is_infinite if is_relative else is_low).all(axis=axes, keepdims=True)
    x = jnp.where(is_low & ~is_lost, jnp.where(is_infinite, 2.0 * LOWEST, LOWEST).astype(x.dtype), x)
    # Infinity less infinity: there a softmax is none.
    return jnp.where(masked == jnp.inf, jnp.nan, x)


def clamp(low: Array, x: Array, high: Array) -> Array:
    """Writes `clamp` as a minimum of a maximum."""
    return jnp.minimum(jnp.maximum(x, low), high)


def without_infinity(x: Array, masked: Array, *, axes: tuple[int, ...]) -> Array:
    """Replaces what is infinite in `masked` by the largest numbers, unless a maximum along `axes` is infinite."""
    is_infinite = jnp.isinf(masked)
    is_hidden = is_infinite & ~is_infinite.all(axis=axes, keepdims=True)
    return jnp.where(is_hidden, jnp.nan_to_num(masked), x)


def rows(x: Array, *, axes: tuple[int, ...]) -> Array:
    """Flattens some axes into a last one."""
    kept = _without(x.ndim, axes)
    return x.transpose(*kept, *axes).reshape(*(x.shape[axis] for axis in kept), -1)


def _restore(flat: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Undoes `rows` of an array of the given shape."""
    order = [*_without(len(shape), axes), *axes]
    return flat.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def split_axes(x: Array, *, axes: tuple[int, ...], sign: float) -> list[Array]:
    """Lists the values along some axes, as they are or with the other sign."""
    flat = rows(x if sign > 0 else -x, axes=axes)
    return [flat[..., i] for i in range(flat.shape[-1])]


def windows(
    x: Array, *, window_dimensions: Sequence[int], window_strides: Sequence[int], padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int], window_dilation: Sequence[int], sign: float,
) -> list[Array]:
    """Lists what lies at each place of a sliding window, for all windows at once, as it is or with the other sign."""
    x = x if sign > 0 else -x
    config = [(low, high, dilation - 1) for (low, high), dilation in zip(padding, base_dilation, strict=True)]
    x = lax.pad(x, jnp.asarray(LOWEST, x.dtype), config)
    reach = [(size - 1) * step for size, step in zip(window_dimensions, window_dilation, strict=True)]
    parts = []
    for place in np.ndindex(*window_dimensions):
        start = [i * step for i, step in zip(place, window_dilation, strict=True)]
        limit = [size - far + first for size, far, first in zip(x.shape, reach, start, strict=True)]
        parts.append(lax.slice(x, start, limit, window_strides))
    return parts


def dot_general(x: Array, y: Array, *, dimensions: Any) -> Array:
    """Multiplies two perturbed arrays element by element and sums: a relaxation for each product."""
    (x_sum, y_sum), (x_batch, y_batch) = dimensions
    x_free = [axis for axis in range(x.ndim) if axis not in (*x_sum, *x_batch)]
    y_free = [axis for axis in range(y.ndim) if axis not in (*y_sum, *y_batch)]
    x, y = x.transpose(*x_batch, *x_free, *x_sum), y.transpose(*y_batch, *y_free, *y_sum)
    num_batch, num_sum = len(x_batch), len(x_sum)
    x = jnp.expand_dims(x, tuple(range(num_batch + len(x_free), num_batch + len(x_free) + len(y_free))))
    y = jnp.expand_dims(y, tuple(range(num_batch, num_batch + len(x_free))))
    shape = jnp.broadcast_shapes(x.shape, y.shape)
    product = jnp.broadcast_to(x, shape) * jnp.broadcast_to(y, shape)
    return product.sum(axis=tuple(range(product.ndim - num_sum, product.ndim)))
