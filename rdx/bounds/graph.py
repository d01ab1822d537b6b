"""Turns a JAX function into a short list of operations on perturbed values; the only file that reads jaxprs.

Tracing inlines nested calls, executes at once everything that does not depend on the perturbed input (which folds
BatchNorm statistics, biases and casts into constants), and writes piecewise-linear functions in one normal form:
`max(x, c) = c + relu(x - c)`, `min(x, c) = c - relu(c - x)`, `|x|`, and `where(x > 0, a x, b x)`. What is left are
affine operations, known by the names below, and nonlinear ones, for which `rdx.bounds.relaxations` has rules.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend import core as jex
from jax.extend import source_info_util

from rdx.types import Array, PyTree

# Linear with coefficients >= 0 (apart from constant operands of `add`, `pad`, `concatenate` and `select_n`).
MONOTONE = frozenset({
    "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "cumsum",
    "dynamic_slice", "expand_dims", "gather", "pad", "reduce_sum", "reduce_window_sum", "reshape", "rev", "select_n",
    "slice", "split", "squeeze", "stack", "tile", "transpose", "unstack",
})
# Linear in either operand, so affine while only one of them is perturbed.
BILINEAR = frozenset({"conv_general_dilated", "dot_general", "mul"})
AFFINE = MONOTONE | BILINEAR | {"div", "neg", "sub"}
PIECEWISE_LINEAR = "piecewise_linear"

_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_ABOVE = ("ge", "gt")
_BELOW = ("le", "lt")


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


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One operation of the graph.

    Attributes:
        name: the primitive's name, by which rules are looked up.
        fn: evaluates the operation on all its inputs; returns a tuple with one array per output.
        inputs: perturbed nodes and constants, in the order that `fn` takes them.
        outputs: the nodes that the operation defines.
        params: the primitive's parameters, for rules that need them.
        source: the user's line that made the operation.
        are_own: for each input, whether it is a constant that differs from example to example.
    """

    name: str
    fn: Callable[..., tuple[Array, ...]]
    inputs: tuple[Value, ...]
    outputs: tuple[Node, ...]
    params: dict[str, Any]
    source: str
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
        if self.name == "select_n":
            return not isinstance(self.inputs[0], Node)
        if self.name in {"gather", "dynamic_slice"}:
            return not any(isinstance(index, Node) for index in self.inputs[1:])
        return self.name in AFFINE

    @property
    def has_own_coefficients(self) -> bool:
        """Whether an affine operation's coefficients differ from example to example; constants that shift are none."""
        if self.name in BILINEAR or self.name == "div":
            return any(self.are_own)
        if self.name == "select_n":
            return any(self.are_own[:1])
        return self.name in {"gather", "dynamic_slice"} and any(self.are_own[1:])

    @property
    def is_mixing(self) -> bool:
        """Whether an output sums several perturbed elements, so that interval arithmetic may lose correlations."""
        return len(self.nodes) > 1 or self.name in {
            "conv_general_dilated", "cumsum", "dot_general", "reduce_sum", "reduce_window_sum",
        }

    def apply(self, *perturbed: Array) -> tuple[Array, ...]:
        """Evaluates the operation with `perturbed` in the place of its nodes."""
        values = iter(perturbed)
        return self.fn(*(next(values) if isinstance(value, Node) else value for value in self.inputs))


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A traced function: `ops` in order of execution, only those that the output depends on."""

    inputs: tuple[Node, ...]
    ops: tuple[Op, ...]
    output: Value

    def producers(self) -> dict[Node, Op]:
        """Maps each node to the operation that defines it; inputs are absent."""
        return {node: op for op in self.ops for node in op.outputs}


def trace(fn: Callable[..., Array], x: PyTree, *args: PyTree) -> Graph:
    """Traces `fn(x, *args)` into a graph in which only the leaves of `x` are perturbed.

    Args:
        fn: any JAX function that returns one array.
        x: the perturbed input, a pytree of arrays; only shapes and dtypes matter.
        *args: each example's own constants, which may be tracers of an outer transformation.

    Returns:
        The graph; its nodes have the shapes of this very call.

    Raises:
        ValueError: if `fn` does not return exactly one array.
    """
    closed = jax.make_jaxpr(fn)(x, *args)
    if len(closed.out_avals) != 1:
        raise ValueError(f"Bounds are of functions with one output array, this one returns {len(closed.out_avals)}.")
    nodes = tuple(Node(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x))
    constants = jax.tree.leaves(args)
    tracer = _Tracer(constants)
    (output,) = tracer.run(closed.jaxpr, closed.consts, (*nodes, *constants), "an unknown line")
    return Graph(nodes, tuple(_reachable(tracer.ops, output)), output)


class _Tracer:
    """Interprets a jaxpr, executing constants and recording operations on nodes."""

    def __init__(self, own: Sequence[Array]) -> None:
        self.ops: list[Op] = []
        # What derives from an example's own constants, by identity; the arrays stay alive, so identities are unique.
        self.own = {id(value): value for value in own}
        self.comparisons: dict[Node, tuple[str, Value, Value]] = {}

    def run(self, jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Value], caller: str) -> list[Value]:
        env: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> Value:
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            # Inside a jitted library function an equation knows no line of the user's: that of the call stands in.
            source = source_info_util.summarize(eqn.source_info) or caller
            outputs = self.equation(eqn, [read(atom) for atom in eqn.invars], source)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Value], source: str) -> Sequence[Value]:
        name = eqn.primitive.name
        if name in _CALLS:
            body = next(eqn.params[key] for key in _BODIES if key in eqn.params)
            jaxpr, consts = (body.jaxpr, body.consts) if isinstance(body, jex.ClosedJaxpr) else (body, ())
            return self.run(jaxpr, consts, inputs, source)

        def fn(*values: Array) -> tuple[Array, ...]:
            out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
            return tuple(out) if eqn.primitive.multiple_results else (out,)

        if not any(isinstance(value, Node) for value in inputs):
            # What is concrete stays concrete under an outer jit, so that zeros are recognised there as well.
            is_staged = any(isinstance(value, Tracer) for value in inputs)
            with contextlib.nullcontext() if is_staged else jax.ensure_compile_time_eval():
                constants = fn(*inputs)  # pyright: ignore[reportArgumentType]
            if any(id(value) in self.own for value in inputs):
                self.own.update((id(value), value) for value in constants)
            return constants
        rewritten = self.rewrite(eqn, inputs, source)
        if rewritten is not None:
            return (rewritten,)
        outputs = tuple(Node(var.aval.shape, var.aval.dtype) for var in eqn.outvars)
        if name in _ABOVE + _BELOW:
            self.comparisons[outputs[0]] = (name, inputs[0], inputs[1])
        are_own = tuple(id(value) in self.own for value in inputs)
        self.ops.append(Op(name, fn, tuple(inputs), outputs, eqn.params, source, are_own))
        return outputs

    def rewrite(self, eqn: Any, inputs: list[Value], source: str) -> Value | None:
        """Writes piecewise-linear functions in their normal form; None if `eqn` is something else."""
        name = eqn.primitive.name
        if name == "stop_gradient":
            # The identity in value. As an operation its vjp would be zero, and zero coefficients are unsound.
            return inputs[0]
        if name == "abs":
            return self.piecewise(inputs[0], -1.0, 1.0, source)
        if name in {"max", "min"}:
            first, second = inputs if isinstance(inputs[0], Node) else reversed(inputs)
            assert isinstance(first, Node)
            # max(x, c) = c + relu(x - c); min(x, c) = c + (x - c where that is negative).
            slopes = (0.0, 1.0) if name == "max" else (1.0, 0.0)
            if _is_zero(second):
                return self.piecewise(first, *slopes, source)
            shifted = self.emit("sub", lax.sub, (first, _like(second, first)), source)
            bent = self.piecewise(shifted, *slopes, source)
            return self.emit("add", lax.add, (bent, _like(second, first)), source)
        if name == "select_n" and len(inputs) == 3 and isinstance(inputs[0], Node):
            return self.where_positive(inputs, source)
        return None

    def where_positive(self, inputs: list[Value], source: str) -> Value | None:
        """Recognises `where(x > 0, a x, b x)` as `b x + (a - b) relu(x)`."""
        predicate, if_false, if_true = inputs
        assert isinstance(predicate, Node)
        name, x, knot = self.comparisons.get(predicate, ("", predicate, predicate))
        if not (isinstance(x, Node) and _is_zero(knot)):
            return None
        above, below = (if_true, if_false) if name in _ABOVE else (if_false, if_true)
        slopes = [self.slope(branch, x) for branch in (above, below)]
        if any(slope is None for slope in slopes):
            return None
        above, below = (jnp.asarray(slope, x.dtype) for slope in slopes)
        bent = self.piecewise(x, 0.0, 1.0, source)
        line, bend = (
            self.emit("mul", lax.mul, (node, jnp.broadcast_to(slope, x.shape)), source)
            for node, slope in ((x, below), (bent, above - below))
        )
        return self.emit("add", lax.add, (line, bend), source)

    def slope(self, branch: Value, x: Node) -> Any:
        """Returns `a` where the branch is `a x`, None where it is anything else."""
        if branch is x:
            return 1.0
        if not isinstance(branch, Node):
            return 0.0 if _is_zero(branch) else None
        op = next(op for op in self.ops if branch in op.outputs)
        if op.name == "mul" and op.nodes == (x,):
            return next(value for value in op.inputs if not isinstance(value, Node))
        return None

    def piecewise(self, x: Value, below: float, above: float, source: str) -> Node:
        return self.emit(PIECEWISE_LINEAR, piecewise_linear, (x,), source, below=below, above=above)

    def emit(
        self, name: str, fn: Callable[..., Array], inputs: tuple[Value, ...], source: str, **params: float
    ) -> Node:
        node = next(value for value in inputs if isinstance(value, Node))
        output = Node(node.shape, node.dtype)
        self.ops.append(Op(name, lambda *values: (fn(*values, **params),), inputs, (output,), params, source))
        return output


def piecewise_linear(x: Array, below: float, above: float) -> Array:
    """Evaluates `above x` where `x > 0` and `below x` elsewhere; its derivative at 0 is `below`, as for relu."""
    return jnp.where(x > 0, above * x, below * x)


def _is_zero(value: Value) -> bool:
    is_concrete = not isinstance(value, Node | Tracer)
    return is_concrete and not np.any(np.asarray(value))


def _like(value: Value, node: Node) -> Value:
    return value if isinstance(value, Node) else jnp.broadcast_to(jnp.asarray(value, node.dtype), node.shape)


def _reachable(ops: Sequence[Op], output: Value) -> Iterator[Op]:
    needed = {output} if isinstance(output, Node) else set()
    kept = []
    for op in reversed(ops):
        if needed.intersection(op.outputs):
            needed.update(op.nodes)
            kept.append(op)
    return reversed(kept)
