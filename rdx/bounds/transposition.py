"""Backward substitution through convolutions and matrix products, in a form that compilers make fast both ways.

The rule for a layer `W x` is its transpose, `T(A, W) = d<A, W x> / dx`. Left to automatic differentiation under `vmap`,
a batch of rows keeps axes of its own, and the gradient with respect to `W` pays for them with transposed copies. Here a
batch of rows is just more rows, folded into one axis.

A transposed convolution is slow on CPUs twice over: XLA runs a convolution over dilated rows at a fraction of its
speed, and the derivative of that with respect to the kernel slower still. So a stride `s` is resolved into `s^2`
phases, which one ordinary convolution computes as channels (the sub-pixel convolution of Shi et al. 2016,
arXiv:1609.05158), and both derivatives are written as what they are for a bilinear map: `dT/dA` is the convolution
itself, `dT/dW` its weight gradient.

That convolution multiplies zeros around the rows, and some inside of its kernel. On a window of few places these are
most of it, and towards an image of few channels its product is too narrow to be fast. There one product gives what
every place adds through every tap, and these parts are added up where they overlap, axis by axis.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from rdx.bounds.graph import Node, Op
from rdx.compilation import materialised
from rdx.types import Array

# Measured on CPUs: to fewer channels a convolution is slower than adding up taps; adding up a number that lies in a
# cache takes as long as so many products; and so many bytes do.
_NARROW = 16
_ADDING = 32
_CACHE_BYTES = 2**24


def transpose(op: Op, rows: Array, *, are_own: bool) -> Array | None:
    """Maps coefficients on an operation's output to coefficients on its perturbed input.

    Args:
        op: any affine operation.
        rows: shape `[S, *output.shape]`.
        are_own: the rows differ from example to example, and a `vmap` over examples is to fold them. JAX cannot
            differentiate what waits for a `vmap` that never comes, so shared rows must not ask for it.

    Returns:
        Shape `[S, *input.shape]`; None if the operation is neither a convolution of a perturbed image nor a product of
        a perturbed array with a matrix.
    """
    if op.name == "conv_general_dilated" and isinstance(op.inputs[0], Node) and op.params["batch_group_count"] == 1:
        return _convolution(op, rows, are_own=are_own)
    if op.name == "dot_general" and isinstance(op.inputs[0], Node) and len(op.inputs[1].shape) == 2:
        (contracted, kernel_axes), (batch_axes, _) = op.params["dimension_numbers"]
        if len(contracted) == 1 and not batch_axes:
            return _product(op, rows, contracted[0], kernel_axes[0], are_own=are_own)
    return None


def _product(op: Op, rows: Array, contracted: int, kernel_axis: int, *, are_own: bool) -> Array:
    kernel = op.inputs[1]
    assert not isinstance(kernel, Node)
    # Outputs are (free axes of the input..., free axis of the matrix).
    matrix = kernel if kernel_axis == 1 else kernel.T
    multiply = _fold_rows(jnp.matmul) if are_own else jnp.matmul
    product = multiply(rows.reshape(-1, rows.shape[-1]), matrix)
    return jnp.moveaxis(product.reshape(*rows.shape[:-1], -1), -1, 1 + contracted)


def _fold_rows(fn: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Makes `fn(rows [R, ...], weights)` treat a batch of rows as more rows, unless the weights are batched as well."""

    @custom_vmap
    def folded(rows: Array, weights: Array) -> Array:
        return fn(rows, weights)

    @folded.def_vmap
    def _fold(axis_size: int, in_batched: list[bool], rows: Array, weights: Array) -> tuple[Array, bool]:
        if in_batched[1]:
            return jax.vmap(fn, in_axes=(0 if in_batched[0] else None, 0))(rows, weights), True
        out = fn(rows.reshape(-1, *rows.shape[2:]), weights)
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return folded


def _convolution(op: Op, rows: Array, *, are_own: bool) -> Array:
    node, kernel = op.inputs
    assert isinstance(node, Node)
    assert not isinstance(kernel, Node)
    lhs, rhs, out = op.params["dimension_numbers"]
    # Canonical layout: rows and batch first, then space, channels last; kernels as space, input, output.
    rows = rows.transpose(0, *(1 + axis for axis in (out[0], *out[2:], out[1])))
    kernel = kernel.transpose(*rhs[2:], rhs[1], rhs[0])
    node_shape = tuple(node.shape[axis] for axis in (lhs[0], *lhs[2:], lhs[1]))
    transposed = _transposed_convolution(op, node_shape)
    transposed = _fold_rows(transposed) if are_own else transposed
    coefficients = transposed(rows.reshape(-1, *rows.shape[2:]), kernel).reshape(-1, *node_shape)
    order = (lhs[0], *lhs[2:], lhs[1])
    return coefficients.transpose(0, *(1 + order.index(axis) for axis in range(len(order))))


def _transposed_convolution(op: Op, node_shape: tuple[int, ...]) -> Callable[[Array, Array], Array]:
    layout = _layout(len(node_shape) - 2)
    params = {name: value for name, value in op.params.items() if name != "dimension_numbers"}

    def convolve(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, dimension_numbers=layout, **params)

    def by_differentiation(rows: Array, kernel: Array) -> Array:
        zeros = jnp.zeros((rows.shape[0], *node_shape[1:]), rows.dtype)
        (coefficients,) = jax.vjp(lambda x: convolve(x, kernel), zeros)[1](rows)
        return coefficients

    def substitute(rows: Array, kernel: Array) -> Array:
        if not is_plain:
            return by_differentiation(rows, kernel)
        method = _by_taps if _is_mostly_zeros(rows, kernel, params["window_strides"]) else _by_phases
        return method(rows, kernel, params["window_strides"], params["padding"], node_shape[1:-1])

    dilations = (*params["lhs_dilation"], *params["rhs_dilation"])
    is_plain = params["feature_group_count"] == 1 and all(dilation == 1 for dilation in dilations)

    @jax.custom_vjp
    def transposed(rows: Array, kernel: Array) -> Array:
        return substitute(rows, kernel)

    def forward(rows: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return substitute(rows, kernel), (rows, kernel)

    def backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        rows, kernel = saved
        rows, cotangent = materialised((rows, cotangent))
        output, weight_vjp = jax.vjp(lambda w: convolve(cotangent, w), kernel)
        return output, weight_vjp(rows)[0]

    transposed.defvjp(forward, backward)

    return transposed


def _layout(rank: int) -> tuple[str, str, str]:
    space = "xyzuvw"[:rank]
    return f"N{space}C", f"{space}IO", f"N{space}C"


def _is_mostly_zeros(rows: Array, kernel: Array, strides: tuple[int, ...]) -> bool:
    """Tells whether adding up taps takes less time than a convolution, which multiplies zeros as well."""
    taps = [-(-extent // stride) for extent, stride in zip(kernel.shape, strides, strict=False)]
    extents, (channels_in, channels_out) = rows.shape[1:-1], kernel.shape[-2:]
    multiplied = [(e + m - 1) * m * s for e, m, s in zip(extents, taps, strides, strict=True)]
    needed = math.prod(extents) * math.prod(kernel.shape[:-2])
    if math.prod(extents) == 1:  # nothing overlaps
        return True
    num_parts = rows.shape[0] * needed * channels_in
    is_narrow = channels_in * math.prod(strides) < _NARROW
    is_wasteful = math.prod(multiplied) > needed * (1 + _ADDING / channels_out)
    is_cached = num_parts * rows.dtype.itemsize <= _CACHE_BYTES
    # What is not cached may still not need much more memory than the rows do.
    return (is_cached and (is_narrow or is_wasteful)) or (is_narrow and num_parts <= math.prod(rows.shape))


def _by_taps(
    rows: Array, kernel: Array, strides: tuple[int, ...], padding: tuple[tuple[int, int], ...], space: tuple[int, ...]
) -> Array:
    """Transposes a convolution: through tap `t`, output `o` adds to the input at `s o + t - low`."""
    extents, taps = rows.shape[1:-1], kernel.shape[:-1]
    matrix = jnp.moveaxis(kernel, -1, 0).reshape(kernel.shape[-1], -1)
    parts = (rows.reshape(-1, rows.shape[-1]) @ matrix).reshape(len(rows), *extents, *taps)
    lows, zero = [low for low, _ in padding], jnp.zeros((), rows.dtype)
    if math.prod(extents) == 1:
        crop = [(-low, low + size - tap, 0) for low, size, tap in zip(lows, space, taps, strict=False)]
        return lax.pad(parts.reshape(len(rows), *taps), zero, [(0, 0, 0), *crop, (0, 0, 0)])
    for axis, (low, stride, size) in enumerate(zip(lows, strides, space, strict=True), start=1):
        parts = _added_up(parts, axis, 1 + len(space), stride, low, size)
    return parts


def _added_up(parts: Array, axis: int, taps_axis: int, stride: int, low: int, size: int) -> Array:
    """Adds up along one axis what its places make of every tap, which takes the taps' axis away."""
    zero, reach = jnp.zeros((), parts.dtype), (parts.shape[axis] - 1) * stride + 1

    def placed(tap: int) -> Array:
        config = [(0, 0, 0)] * (parts.ndim - 1)
        config[axis] = (tap - low, size - (tap - low) - reach, stride - 1)
        return lax.pad(lax.index_in_dim(parts, tap, taps_axis, keepdims=False), zero, config)

    return materialised(sum(map(placed, range(parts.shape[taps_axis])), zero))


def _by_phases(
    rows: Array, kernel: Array, strides: tuple[int, ...], padding: tuple[tuple[int, int], ...], space: tuple[int, ...]
) -> Array:
    """Transposes a strided convolution: input position `p + low = s (o + q) + r` for tap `s q + r` of output `o`."""
    rank = len(strides)
    taps = [-(-extent // stride) for extent, stride in zip(kernel.shape, strides, strict=False)]
    grown = [(0, m * stride - extent) for m, stride, extent in zip(taps, strides, kernel.shape, strict=False)]
    kernel = jnp.pad(kernel, [*grown, (0, 0), (0, 0)])
    channels_in, channels_out = kernel.shape[rank:]
    split = [size for pair in zip(taps, strides, strict=True) for size in pair]
    kernel = kernel.reshape(*split, channels_in, channels_out)
    # (q1, r1, q2, r2, ..., I, O) -> (q1, q2, ..., O, r1, r2, ..., I), and q runs backwards as in any transposition.
    kernel = kernel.transpose(*range(0, 2 * rank, 2), 2 * rank + 1, *range(1, 2 * rank, 2), 2 * rank)
    kernel = jnp.flip(kernel.reshape(*taps, channels_out, -1), axis=tuple(range(rank)))
    # Without stride, padding does what cropping does below.
    lows = [low if stride > 1 else 0 for (low, _), stride in zip(padding, strides, strict=True)]
    padded = [
        (m - 1, m - 1) if stride > 1 else (m - 1 - low, size - extent + low)
        for m, stride, (low, _), size, extent in zip(taps, strides, padding, space, rows.shape[1:], strict=False)
    ]
    phases = lax.conv_general_dilated(rows, kernel, (1,) * rank, padded, dimension_numbers=_layout(rank))
    count, extents = phases.shape[0], phases.shape[1:-1]
    phases = phases.reshape(count, *extents, *strides, channels_in)
    interleaved = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
    image = phases.transpose(0, *interleaved, 1 + 2 * rank).reshape(
        count, *(extent * stride for extent, stride in zip(extents, strides, strict=True)), channels_in
    )
    # Position 0 of the image is -low in the input: crop what lies in the padding, fill up what no window reached.
    crop = [
        (-low, extent + low - size, 0) for low, extent, size in zip(lows, space, image.shape[1:], strict=False)
    ]
    return lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *crop, (0, 0, 0)])
