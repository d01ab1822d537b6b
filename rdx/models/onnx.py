"""Networks from ONNX files, as pure JAX functions.

    network = models.onnx.read("net.onnx")
    logits = network.logits_fn(x)  # x [B, *network.input_shape]

The operators are those of the fully connected, convolutional, residual and pooling benchmarks of the verification
competition VNN-COMP (Brix et al. 2023, arXiv:2312.16760); `rdx.models.onnx_ops` has the table.
"""

import contextlib
import dataclasses
import functools
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx.models.onnx_node import Constant, Node, UnsupportedOperatorError, Value
from rdx.models.onnx_ops import OPERATORS
from rdx.types import Array

# No axis of a network has this size, so that where it turns up it is the batch.
_UNLIKELY_BATCH = 7919
# The oldest operator set whose broadcasting and inference mode are those of today.
_OLDEST_OPSET = 7


class Network(NamedTuple):
    """A network that was read.

    Attributes:
        logits_fn: `x [B, *input_shape] -> outputs [B, K]`, the network's output flattened. The weights are leaves, and
            everything is computed in the dtype of `x`.
        input_shape: shape of one input, without the batch axis.
    """

    logits_fn: Partial
    input_shape: tuple[int, ...]


def read(path: str | Path) -> Network:
    """Reads a feed-forward network in inference mode.

    The batch axis is the input's first one where the file says that its size is 1 or free, and is kept at any size; an
    input without such an axis is one example, and so is one whose network moves or merges the first axis. Float64
    weights are rounded to float32, unless this is called with 64-bit numbers enabled.

    Args:
        path: the .onnx file, or .onnx.gz.

    Returns:
        The network.

    Raises:
        ImportError: without the package `onnx`.
        UnsupportedOperatorError: naming operator, node and operator set.
        ValueError: if the network has several inputs or outputs, or an input without a fixed shape.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("Networks in ONNX form need the package onnx: pip install 'rdx[vnncomp]'.") from error
    path = Path(path)
    # External data lies beside a file that is not compressed.
    is_packed = path.suffix == ".gz"
    model = onnx.load_model_from_string(gzip.decompress(path.read_bytes())) if is_packed else onnx.load(path)
    graph, weights = _convert(model)
    graph = dataclasses.replace(graph, keeps_batch=graph.has_batch and _keeps_batch(graph, weights))
    jax.eval_shape(functools.partial(_evaluate, graph), weights, _zeros(graph, 1))
    return Network(Partial(_evaluate, graph, weights), graph.input_shape)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Graph:
    """What is fixed of a network: a pytree without leaves, equal for equal architectures."""

    nodes: tuple[Node, ...]
    constants: tuple[tuple[str, Constant], ...]
    input: str
    output: str
    input_shape: tuple[int, ...]
    has_batch: bool  # the file's input has a batch axis
    keeps_batch: bool = False  # and every node keeps it in front, so that it may have any size


def _convert(model: Any) -> tuple[_Graph, dict[str, Array]]:
    """Takes a model apart into architecture and weights."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _OLDEST_OPSET:
        raise UnsupportedOperatorError(
            f"The network uses operator set {opset}: convert it to {_OLDEST_OPSET} or newer, such as with "
            "onnx.version_converter.convert_version(model, 13)."
        )
    arrays = _stored_arrays(model.graph)
    nodes = tuple(_node(node, opset) for node in model.graph.node if node.op_type != "Constant")
    _check_outputs(nodes, model.graph)
    inputs = [value for value in model.graph.input if value.name not in arrays]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ValueError(f"The network has {len(inputs)} inputs and {len(model.graph.output)} outputs: only one each.")
    shape, has_batch = _input_shape(inputs[0])
    # What fixes shapes and exponents has to be known when the network is traced: integers and single numbers.
    is_weight = {name: np.issubdtype(array.dtype, np.floating) and array.size > 1 for name, array in arrays.items()}
    weights = {name: jnp.asarray(array) for name, array in arrays.items() if is_weight[name]}
    constants = tuple((name, Constant.of(array)) for name, array in arrays.items() if not is_weight[name])
    return _Graph(nodes, constants, inputs[0].name, model.graph.output[0].name, shape, has_batch), weights


def _stored_arrays(graph: Any) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    arrays = {tensor.name: _array(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            ((name, value),) = _node(node, _OLDEST_OPSET).attributes
            is_list = name in ("value_floats", "value_ints")
            kind = np.float32 if name.startswith("value_float") else np.int32
            made = value.array() if name == "value" else np.asarray(list(value) if is_list else value, kind)
            arrays[node.output[0]] = made
    return arrays


def _array(array: np.ndarray) -> np.ndarray:
    """Narrows integers to 32 bits, the width of JAX: the ends of ONNX' open slices become those of int32."""
    if np.issubdtype(array.dtype, np.integer):
        narrow, own = np.iinfo(np.int32), np.iinfo(array.dtype)
        return array.clip(max(narrow.min, own.min), min(narrow.max, own.max)).astype(np.int32)
    return array if array.dtype in (np.float64, np.bool_) else array.astype(np.float32)


def _node(node: Any, opset: int) -> Node:
    import onnx

    attributes = []
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = Constant.of(_array(onnx.numpy_helper.to_array(value)))
        elif isinstance(value, bytes):
            value = value.decode()
        elif not isinstance(value, int | float):
            value = tuple(value) if isinstance(value, list | tuple) or hasattr(value, "__len__") else str(value)
        attributes.append((attribute.name, value))
    made = Node(node.op_type, node.name, tuple(node.input), tuple(node.output), tuple(attributes), opset)
    if node.domain not in ("", "ai.onnx") or (node.op_type not in OPERATORS and node.op_type != "Constant"):
        raise UnsupportedOperatorError(
            f"The {made}{f' from domain {node.domain!r}' if node.domain else ''} is not read. Operators that are: "
            f"{', '.join(sorted([*OPERATORS, 'Constant']))}."
        )
    return made


def _check_outputs(nodes: tuple[Node, ...], graph: Any) -> None:
    used = {name for node in nodes for name in node.inputs} | {value.name for value in graph.output}
    for node in nodes:
        if node.operator != "Split" and used.intersection(node.outputs[1:]):
            raise UnsupportedOperatorError(f"The {node} is read for its first output only.")


def _input_shape(value: Any) -> tuple[tuple[int, ...], bool]:
    """Reads the shape of one example, and whether the input has a batch axis before it."""
    sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    has_batch = len(sizes) > 1 and sizes[0] in (0, 1)  # a free axis has no value, which reads as 0
    shape = tuple(sizes[has_batch:])
    if not shape or not all(shape):
        raise ValueError(f"Input {value.name!r} has no fixed shape, {sizes} with 0 for free axes: export it with one.")
    return shape, has_batch


def _evaluate(graph: _Graph, weights: dict[str, Array], x: Array) -> Array:
    if x.shape[1:] != graph.input_shape:
        raise ValueError(f"Inputs of shape {x.shape} do not fit the network: give {('B', *graph.input_shape)}.")
    if graph.keeps_batch:
        return _values(graph, weights, x)[graph.output].reshape(x.shape[0], -1)

    def one(example: Array) -> Array:
        return _values(graph, weights, example[None] if graph.has_batch else example)[graph.output].reshape(-1)

    return jax.vmap(one)(x)


def _values(graph: _Graph, weights: dict[str, Array], x: Array) -> dict[str, Any]:
    """Computes every value of the network, floats in the dtype of `x`."""
    values: dict[str, Any] = {name: _like(constant.array(), x) for name, constant in graph.constants}
    values.update({name: weight.astype(x.dtype) for name, weight in weights.items()})
    values[graph.input] = x
    for node in graph.nodes:
        outputs = _apply(node, [values[name] if name else None for name in node.inputs], x)
        values.update(zip(node.outputs, outputs, strict=False))
    return values


def _apply(node: Node, inputs: list[Value | None], x: Array) -> Sequence[Value]:
    is_constant = all(value is None or isinstance(value, np.ndarray) for value in inputs)
    try:
        # Constants stay concrete while the network is traced: shapes are computed from them.
        with jax.ensure_compile_time_eval() if is_constant else contextlib.nullcontext():
            made = OPERATORS[node.operator](node, *inputs)
    except Exception as error:
        error.add_note(f"This is about the {node}.")
        raise
    outputs = [made] if isinstance(made, np.ndarray | Array) else made
    return [_like(np.asarray(output), x) for output in outputs] if is_constant else outputs


def _like(array: np.ndarray, x: Array) -> np.ndarray:
    return array.astype(x.dtype) if np.issubdtype(array.dtype, np.floating) else array


def _zeros(graph: _Graph, batch: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, *graph.input_shape), jnp.float32)


def _keeps_batch(graph: _Graph, weights: dict[str, Array]) -> bool:
    """Tells whether every value that depends on the input has the batch, whatever its size, as its first axis."""
    shapes = functools.partial(jax.eval_shape, functools.partial(_values, graph), weights)
    try:
        one, many = shapes(_zeros(graph, 1)), shapes(_zeros(graph, _UNLIKELY_BATCH))
    except (TypeError, ValueError):
        return False  # a shape fits a batch of one only; one that never fits is reported by the caller
    depends = {graph.input}
    for node in graph.nodes:
        if depends.intersection(node.inputs) and node.operator != "Shape":
            depends.update(name for name in node.outputs if name in one)
    return all(
        one[name].shape[:1] == (1,) and many[name].shape == (_UNLIKELY_BATCH, *one[name].shape[1:])
        for name in depends
    )
