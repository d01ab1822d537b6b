"""ONNX operators that slide windows over the spatial axes `[B, C, ...]`: convolutions and pools."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rdx.models.onnx_node import Node, Value
from rdx.types import Array


def per_channel(values: Value, x: Value) -> Value:
    """Shapes one value per channel so that it applies to `x [B, C, ...]`."""
    return values.reshape((1, -1) + (1,) * (x.ndim - 2))


def convolution(node: Node, x: Value, kernel: Value, *bias: Value | None) -> Value:
    """Computes Conv: the kernel is `[C_out, C / group, ...]`."""
    windows = _Windows.of(node, x.shape[2:], kernel.shape[2:])
    out = lax.conv_general_dilated(
        jnp.asarray(x), jnp.asarray(kernel), windows.strides, windows.padding, rhs_dilation=windows.dilations,
        feature_group_count=node.get("group", 1),
    )
    return _biased(out, *bias)


def transposed_convolution(node: Node, x: Value, kernel: Value, *bias: Value | None) -> Value:
    """Computes ConvTranspose: the flipped kernel slides over `x` with `stride - 1` zeros between its elements."""
    groups, spatial = node.get("group", 1), kernel.shape[2:]
    zeros = (0,) * len(spatial)
    windows = _Windows.of(node, x.shape[2:], spatial)
    extra, shape, auto = node.get("output_padding", zeros), node.get("output_shape"), node.get("auto_pad", "NOTSET")
    if shape is None and auto.startswith("SAME"):
        shape = [size * stride for size, stride in zip(x.shape[2:], windows.strides, strict=True)]
    padding = []
    for i, (low, high) in enumerate(windows.padding):
        reach = windows.dilations[i] * (spatial[i] - 1)
        if shape is not None:
            total = windows.strides[i] * (x.shape[2 + i] - 1) + extra[i] + reach + 1 - shape[i - len(spatial)]
            low, high = total // 2, total - total // 2
            low, high = (low, high) if auto == "SAME_UPPER" else (high, low)
        padding.append((reach - low, reach - high + extra[i]))
    grouped = kernel.reshape(groups, -1, *kernel.shape[1:]).swapaxes(1, 2)
    flipped = jnp.flip(grouped.reshape(-1, grouped.shape[2], *spatial), range(2, kernel.ndim))
    out = lax.conv_general_dilated(
        jnp.asarray(x), flipped, (1,) * len(spatial), padding, lhs_dilation=windows.strides,
        rhs_dilation=windows.dilations, feature_group_count=groups,
    )
    return _biased(out, *bias)


def max_pool(node: Node, x: Array) -> Array:
    """Computes MaxPool; padding never wins."""
    return _pooling(node, x)[1].reduce(x, -np.inf, lax.max)


def average_pool(node: Node, x: Array) -> Array:
    """Computes AveragePool; padding counts only with `count_include_pad`."""
    asked, windows = _pooling(node, x)
    sides = [(0, 0), (0, 0)]
    ones = np.pad(
        np.ones((1, 1, *x.shape[2:]), x.dtype), sides + list(asked.padding),
        constant_values=float(node.get("count_include_pad", 0)),
    )
    # What only completes the last window is never counted.
    more = [(0, after - before) for (_, before), (_, after) in zip(asked.padding, windows.padding, strict=True)]
    with jax.ensure_compile_time_eval():
        bare = dataclasses.replace(windows, padding=((0, 0),) * len(more))
        counts = np.asarray(bare.reduce(jnp.asarray(np.pad(ones, sides + more)), 0.0, lax.add))
    return windows.reduce(x, 0.0, lax.add) / counts


def _biased(x: Array, bias: Value | None = None) -> Value:
    return x if bias is None else x + per_channel(bias, x)


def _same(size: int, stride: int, reach: int, *, is_upper: bool) -> tuple[int, int]:
    """Splits the padding under which there are `ceil(size / stride)` windows; an odd one goes to the named end."""
    total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
    return (total // 2, total - total // 2) if is_upper else (total - total // 2, total // 2)


@dataclasses.dataclass(frozen=True)
class _Windows:
    """Sizes, strides, dilations and padding of sliding windows along the spatial axes."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, node: Node, sizes: Sequence[int], kernel: tuple[int, ...]) -> "_Windows":
        ones = (1,) * len(kernel)
        strides, dilations = node.get("strides", ones), node.get("dilations", ones)
        pads, auto = node.get("pads", (0, 0) * len(kernel)), node.get("auto_pad", "NOTSET")
        padding = tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
        if auto == "VALID":
            padding = ((0, 0),) * len(kernel)
        elif auto != "NOTSET":
            reaches = [step * (size - 1) + 1 for size, step in zip(kernel, dilations, strict=True)]
            padding = tuple(
                _same(*axis, is_upper=auto == "SAME_UPPER") for axis in zip(sizes, strides, reaches, strict=True)
            )
        return cls(kernel, strides, dilations, padding)

    def completed(self, sizes: Sequence[int]) -> "_Windows":
        """Pads on so far that the last window is whole, as `ceil_mode` has it; windows begin inside or before."""
        padding = []
        for size, kernel, stride, dilation, (low, high) in zip(
            sizes, self.kernel, self.strides, self.dilations, self.padding, strict=True
        ):
            reach = dilation * (kernel - 1) + 1
            last = math.ceil((size + low + high - reach) / stride) * stride
            last = last - stride if last >= size + low else last
            padding.append((low, max(high, last + reach - size - low)))
        return dataclasses.replace(self, padding=tuple(padding))

    def reduce(self, x: Array, start: float, fn: Callable[..., Array]) -> Array:
        full = lambda values: (1, 1, *values)
        return lax.reduce_window(
            x, np.asarray(start, x.dtype), fn, full(self.kernel), full(self.strides), ((0, 0), (0, 0), *self.padding),
            window_dilation=full(self.dilations),
        )


def _pooling(node: Node, x: Value) -> tuple[_Windows, _Windows]:
    """Gives the windows of a pool with the padding that the node asks for, and with that which completes them."""
    windows = _Windows.of(node, x.shape[2:], node.get("kernel_shape"))
    return windows, windows.completed(x.shape[2:]) if node.get("ceil_mode", 0) else windows
