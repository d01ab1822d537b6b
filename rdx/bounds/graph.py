"""Graphs of operations on perturbed values: what a traced function consists of.

An operation is affine in its perturbed inputs, known by the names below, or nonlinear; `rdx.bounds.arithmetic` has the
ranges of both and `rdx.bounds.relaxations` the lines that enclose the nonlinear ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rdx.types import Array

# Linear with coefficients >= 0 (apart from constant operands of `add`, `pad`, `concatenate`, `scatter`, `select_n`).
MONOTONE = frozenset({
    "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "cumsum",
    "dynamic_slice", "dynamic_update_slice", "expand_dims", "gather", "pad", "reduce_sum", "reduce_window_sum",
    "reshape", "rev", "scatter", "scatter-add", "select_n", "slice", "split", "squeeze", "stack", "tile", "transpose",
    "unstack",
})
# Linear in either operand, so affine while only one of them is perturbed.
BILINEAR = frozenset({"conv_general_dilated", "dot_general", "mul"})
AFFINE = MONOTONE | BILINEAR | {"div", "neg", "sub"}
# Every element of the output comes from the elements at its place.
ELEMENTWISE = frozenset({"add", "add_any", "convert_element_type", "copy", "copy_p", "div", "mul", "neg", "sub"})
# Not primitives: functions with one kink at 0, the largest of several values, the log of the sum of their exponentials.
PIECEWISE_LINEAR = "piecewise_linear"
POOL = "pool"
LOGSUMEXP = "logsumexp"
# Where constants decide what goes where; the remaining inputs may be perturbed.
_INDICES = {
    "select_n": slice(0, 1), "gather": slice(1, None), "dynamic_slice": slice(1, None), "scatter": slice(1, 2),
    "scatter-add": slice(1, 2), "dynamic_update_slice": slice(2, None),
}


class UnsupportedPrimitiveError(ValueError):
    """Bounds were asked of a function with an operation that no rule covers."""


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A perturbed value; nodes are compared by identity.

    Attributes:
        shape: shape for one example, with a batch axis of 1.
        dtype: dtype.
    """

    shape: tuple[int, ...]
    dtype: Any


Value = Node | Array


class Source(NamedTuple):
    """Where an operation comes from; as a string it is the user's line.

    Attributes:
        line: file, line and function.
        scope: names of the modules around it, such as "Net/Dense_0"; empty where nobody named any.
    """

    line: str
    scope: str = ""

    def __str__(self) -> str:
        """Gives the line."""
        return self.line


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One operation of the graph.

    Attributes:
        name: the primitive's name, by which rules are looked up.
        fn: evaluates the operation on all its inputs; returns a tuple with one array per output.
        inputs: perturbed nodes and constants, in the order that `fn` takes them.
        outputs: the nodes that the operation defines.
        params: the primitive's parameters, for rules that need them.
        source: where the user made the operation.
        are_own: for each input, whether it is a constant that differs from example to example.
    """

    name: str
    fn: Callable[..., tuple[Array, ...]]
    inputs: tuple[Value, ...]
    outputs: tuple[Node, ...]
    params: dict[str, Any]
    source: Source
    are_own: tuple[bool, ...] = ()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The perturbed inputs."""
        return tuple(value for value in self.inputs if isinstance(value, Node))

    @property
    def is_affine(self) -> bool:
        """Whether the outputs are affine in the perturbed inputs."""
        if not all(jnp.issubdtype(node.dtype, jnp.floating) for node in self.outputs):
            return False
        if self.name in BILINEAR:
            return len(self.nodes) == 1
        if self.name == "div":
            return not isinstance(self.inputs[1], Node)
        return self.name in AFFINE and not any(isinstance(value, Node) for value in self.inputs[self._indices])

    @property
    def has_own_coefficients(self) -> bool:
        """Whether an affine operation's coefficients differ from example to example; constants that shift are none."""
        return any(self.are_own if self.name in BILINEAR or self.name == "div" else self.are_own[self._indices])

    @property
    def _indices(self) -> slice:
        return _INDICES.get(self.name, slice(0))

    @property
    def is_mixing(self) -> bool:
        """Whether an output sums several perturbed elements, so that interval arithmetic may lose correlations."""
        return len(self.nodes) > 1 or self.name in {
            "conv_general_dilated", "cumsum", "dot_general", "reduce_sum", "reduce_window_sum", "scatter-add",
        }

    def apply(self, *perturbed: Array) -> tuple[Array, ...]:
        """Evaluates the operation with `perturbed` in the place of its nodes."""
        values = iter(perturbed)
        return self.fn(*(next(values) if isinstance(value, Node) else value for value in self.inputs))


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A traced function: `ops` in order of execution, only those that the output or an assumption depends on.

    Attributes:
        inputs: the perturbed inputs.
        ops: the operations.
        output: what the function returns.
        assumed: nodes that tracing took to be finite numbers; where they are not, the graph is another function.
    """

    inputs: tuple[Node, ...]
    ops: tuple[Op, ...]
    output: Value
    assumed: tuple[Node, ...] = ()

    def without_assumptions(self) -> "Graph":
        """Leaves out what only assumptions depend on."""
        return Graph(self.inputs, tuple(reachable(self.ops, self.output)), self.output)

    def producers(self) -> dict[Node, Op]:
        """Maps each node to the operation that defines it; inputs are absent."""
        return {node: op for op in self.ops for node in op.outputs}

    def values(self, *inputs: Array) -> dict[Node, Array]:
        """Computes the value of every node on values of the inputs."""
        values = dict(zip(self.inputs, inputs, strict=True))
        for op in self.ops:
            values.update(zip(op.outputs, op.apply(*(values[node] for node in op.nodes)), strict=True))
        return values

    def evaluate(self, *inputs: Array) -> Array:
        """Computes the function on values of its inputs."""
        return self.values(*inputs)[self.output] if isinstance(self.output, Node) else self.output


def reachable(ops: Sequence[Op], *outputs: Value) -> Iterator[Op]:
    """Keeps the operations that outputs depend on, in order."""
    needed = {output for output in outputs if isinstance(output, Node)}
    kept = []
    for op in reversed(ops):
        if needed.intersection(op.outputs):
            needed.update(op.nodes)
            kept.append(op)
    return reversed(kept)


def piecewise_linear(x: Array, below: float, above: float) -> Array:
    """Evaluates `above x` where `x > 0` and `below x` elsewhere; its derivative at 0 is `below`, as for relu."""
    return jnp.where(x > 0, above * x, below * x)


def largest(*values: Array) -> Array:
    """Evaluates the largest of several values."""
    return functools.reduce(jnp.maximum, values)


def log_sum_exp(*values: Array) -> Array:
    """Evaluates the log of a sum of exponentials."""
    return jax.nn.logsumexp(jnp.stack(values), axis=0)
