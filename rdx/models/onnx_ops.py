"""What the operators of ONNX compute, as JAX functions of a node and its inputs.

A value is a JAX array, or a NumPy array where it is known when the network is traced: integers (shapes, axes, indices)
and single numbers are. An operator that needs such a value, as Reshape needs its shape, says so where it gets none.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rdx.models.onnx_node import Node, Operator, UnsupportedOperatorError, Value
from rdx.models.onnx_windows import average_pool, convolution, max_pool, per_channel, transposed_convolution
from rdx.types import Array


def _known(node: Node, value: Value | None, default: Any = None) -> Any:
    """Gives the entries of a value that tracing has to know."""
    if value is None:
        return default
    if not isinstance(value, np.ndarray):
        raise UnsupportedOperatorError(
            f"The {node} takes a shape, axis, index or number that is computed from the network's input: export the "
            "network with constant shapes."
        )
    return value.tolist()


def _option(node: Node, name: str, values: Sequence[Value | None]) -> Any:
    """Gives what older operator sets have as an attribute and newer ones as an input."""
    return node.get(name) if node.get(name) is not None else _known(node, values[0] if values else None)


def _aligned(*values: Value) -> list[Value]:
    """Gives arrays equal rank by axes of size 1 in front; scalars stay as they are."""
    rank = max(value.ndim for value in values)
    return [v if v.ndim in (0, rank) else v.reshape((1,) * (rank - v.ndim) + v.shape) for v in values]


def _elementwise(fn: Callable[..., Array]) -> Operator:
    return lambda _, *values: fn(*_aligned(*values))


def _divide(first: Value, second: Value) -> Array:
    if jnp.issubdtype(first.dtype, jnp.floating):
        return jnp.divide(first, second)
    return lax.div(*jnp.broadcast_arrays(first, second))  # of integers, towards 0


def _power(node: Node, base: Value, exponent: Value) -> Array:
    del node
    base, exponent = _aligned(base, exponent)
    if isinstance(exponent, np.ndarray) and exponent.size == 1:
        number = float(exponent.item())
        if number == 0.5:
            power = jnp.sqrt(base)
        else:
            power = jnp.power(base, int(number) if number.is_integer() else exponent.astype(base.dtype))
        return jnp.broadcast_to(power, jnp.broadcast_shapes(base.shape, exponent.shape))
    return jnp.power(base, exponent.astype(base.dtype))


def _clip(node: Node, x: Value, *ends: Value | None) -> Value:
    low, high = (*ends, None, None)[:2]
    low, high = (
        end if node.get(name) is None else np.asarray(node.get(name), x.dtype)
        for name, end in (("min", low), ("max", high))
    )
    x = x if low is None else jnp.maximum(x, low.reshape(()))
    return x if high is None else jnp.minimum(x, high.reshape(()))


def _cast(node: Node, x: Value) -> Value:
    """Converts constants; the floats of a network all have the dtype of its input, so those of others stay."""
    kind = {9: np.bool_, **dict.fromkeys((2, 3, 4, 5, 6, 7, 12, 13), np.int32)}.get(node.get("to"), np.float32)
    if isinstance(x, np.ndarray):
        return x.astype(kind)
    if kind is not np.float32 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UnsupportedOperatorError(f"The {node} turns computed values into integers or truth values, or back.")
    return x


def _gemm(node: Node, a: Value, b: Value, c: Value | None = None) -> Value:
    a = a.T if node.get("transA", 0) else a
    b = b.T if node.get("transB", 0) else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    product = jnp.matmul(a, b)
    product = product if alpha == 1.0 else alpha * product
    if c is None:
        return product
    return jnp.add(*_aligned(product, c if beta == 1.0 else beta * c))


def _batch_norm(node: Node, x: Value, scale: Value, bias: Value, mean: Value, var: Value) -> Value:
    if node.get("training_mode", 0):
        raise UnsupportedOperatorError(f"The {node} is in training mode: export the network in inference mode.")
    factor = scale / jnp.sqrt(var + np.asarray(node.get("epsilon", 1e-5), var.dtype))
    return (x - per_channel(mean, x)) * per_channel(factor, x) + per_channel(bias, x)


def _dropout(node: Node, x: Value, ratio: Value | None = None, training: Value | None = None) -> Value:
    del ratio
    if _known(node, training):
        raise UnsupportedOperatorError(f"The {node} is in training mode: export the network in inference mode.")
    return x


def _reduce(fn: Callable[..., Array]) -> Operator:
    def operator(node: Node, x: Value, *axes: Value | None) -> Value:
        along = _option(node, "axes", axes)
        if not along and node.get("noop_with_empty_axes", 0):
            return x
        return fn(x, axis=tuple(along) if along else None, keepdims=bool(node.get("keepdims", 1)))

    return operator


def _softmax(node: Node, x: Value) -> Array:
    axis = node.get("axis", -1 if node.opset >= 13 else 1) % x.ndim
    if axis == 0 and x.shape[0] > 1:
        raise UnsupportedOperatorError(f"The {node} runs over the batch axis.")
    if node.opset >= 13:
        return jax.nn.softmax(x, axis=axis)
    rows = x.reshape(math.prod(x.shape[:axis]), -1)
    return jax.nn.softmax(rows, axis=1).reshape(x.shape)


def _flatten(node: Node, x: Value) -> Value:
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _reshape(node: Node, x: Value, shape: Value) -> Value:
    """Reshapes; a shape that keeps a batch of one, as exported networks have it, keeps a batch of any size."""
    target = _known(node, shape)
    if not node.get("allowzero", 0):
        target = [x.shape[i] if size == 0 else size for i, size in enumerate(target)]
    if x.ndim == 0 or not target or target[0] == x.shape[0]:
        return x.reshape(target)
    size = math.prod(x.shape[1:])
    rest = -math.prod(target)
    one = [size // rest if entry == -1 and rest > 0 else entry for entry in target]
    return x.reshape(x.shape[0], *one[1:]) if one[0] == 1 and math.prod(one) == size else x.reshape(target)


def _slice(node: Node, x: Value, *options: Value | None) -> Value:
    starts, ends, axes, steps = (
        _option(node, name, options[i : i + 1]) for i, name in enumerate(("starts", "ends", "axes", "steps"))
    )
    places = [slice(None)] * x.ndim
    axes = range(len(starts)) if axes is None else axes
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        if axis % x.ndim == 0 and step < 0 and x.shape[0] > 1 and not isinstance(x, np.ndarray):
            raise UnsupportedOperatorError(f"The {node} reverses the batch axis.")
        # Python counts an end below 0 from the back; ONNX' least integer is the place before the first.
        places[axis] = slice(start, None if end < -x.shape[axis] else end, step)
    return x[tuple(places)]


def _gather(node: Node, x: Value, indices: Value) -> Array:
    axis = node.get("axis", 0)
    rows = np.asarray(_known(node, indices), np.int32)
    size = x.shape[axis]
    if rows.size and not (-size <= rows.min() and rows.max() < size):
        raise ValueError(f"The {node} takes index {rows.max()} of an axis of size {size}.")
    return jnp.take(x, np.where(rows < 0, rows + size, rows), axis=axis, mode="clip")


def _split(node: Node, x: Value, *sizes: Value | None) -> list[Array]:
    axis, parts = node.get("axis", 0), _option(node, "split", sizes)
    if parts is None:
        number, total = node.get("num_outputs", len(node.outputs)), x.shape[axis]
        each = math.ceil(total / number)
        parts = [min(each, total - i * each) for i in range(number)]
    return jnp.split(x, np.cumsum(parts)[:-1].tolist(), axis=axis)


def _pad(node: Node, x: Value, *options: Value | None) -> Array:
    pads, fill, axes = (*options, None, None, None)[:3]
    amounts, mode = _option(node, "pads", [pads]), node.get("mode", "constant")
    axes = _known(node, axes, range(x.ndim))
    config = [(0, 0)] * x.ndim
    for i, axis in enumerate(axes):
        config[axis] = (amounts[i], amounts[len(axes) + i])
    if mode != "constant":
        return jnp.pad(x, config, mode=mode)
    value = np.asarray(node.get("value", _known(node, fill, 0.0)), x.dtype).reshape(())
    return lax.pad(jnp.asarray(x), value, [(low, high, 0) for low, high in config])


def _constant_of_shape(node: Node, shape: Value) -> np.ndarray:
    value = node.get("value")
    value = np.zeros(1, np.float32) if value is None else value.array()
    return np.full(_known(node, shape), value[0])


def _shape(node: Node, x: Value) -> np.ndarray:
    return np.asarray(x.shape[node.get("start", 0) : node.get("end")], np.int32)


def _expand(node: Node, x: Value, shape: Value) -> Array:
    target = jnp.broadcast_shapes(x.shape, tuple(_known(node, shape)))
    return jnp.broadcast_to(x.reshape((1,) * (len(target) - x.ndim) + x.shape), target)


def _squeeze(node: Node, x: Value, *axes: Value | None) -> Array:
    along = _option(node, "axes", axes)
    return jnp.squeeze(x, None if along is None else tuple(along))


OPERATORS: dict[str, Operator] = {
    "Abs": _elementwise(jnp.abs), "Add": _elementwise(jnp.add), "Cos": _elementwise(jnp.cos),
    "Div": _elementwise(_divide), "Equal": _elementwise(jnp.equal), "Exp": _elementwise(jnp.exp),
    "Max": lambda _, *values: jax.tree.reduce(jnp.maximum, _aligned(*values)),
    "Min": lambda _, *values: jax.tree.reduce(jnp.minimum, _aligned(*values)),
    "Mul": _elementwise(jnp.multiply), "Neg": _elementwise(jnp.negative), "Relu": _elementwise(jax.nn.relu),
    "Sigmoid": _elementwise(jax.nn.sigmoid), "Sin": _elementwise(jnp.sin), "Sqrt": _elementwise(jnp.sqrt),
    "Sub": _elementwise(jnp.subtract), "Tanh": _elementwise(jnp.tanh), "Where": _elementwise(jnp.where),
    "LeakyRelu": lambda node, x: jax.nn.leaky_relu(x, node.get("alpha", 0.01)),
    "Pow": _power, "Clip": _clip, "Cast": _cast, "Softmax": _softmax,
    "Gemm": _gemm, "MatMul": lambda _, a, b: jnp.matmul(a, b),
    "Conv": convolution, "ConvTranspose": transposed_convolution, "BatchNormalization": _batch_norm,
    "MaxPool": max_pool, "AveragePool": average_pool,
    "GlobalAveragePool": lambda _, x: jnp.mean(x, axis=tuple(range(2, x.ndim)), keepdims=True),
    "ReduceMean": _reduce(jnp.mean), "ReduceSum": _reduce(jnp.sum),
    "Identity": lambda _, x: x, "Dropout": _dropout,
    "Flatten": _flatten, "Reshape": _reshape, "Squeeze": _squeeze,
    "Unsqueeze": lambda node, x, *axes: jnp.expand_dims(x, tuple(_option(node, "axes", axes))),
    "Transpose": lambda node, x: jnp.transpose(x, node.get("perm")),
    "Concat": lambda node, *values: jnp.concatenate(values, axis=node.get("axis")),
    "Slice": _slice, "Gather": _gather, "Split": _split, "Pad": _pad, "Expand": _expand,
    "Shape": _shape, "ConstantOfShape": _constant_of_shape,
}
