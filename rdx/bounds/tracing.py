"""Turns a JAX function into a graph of operations on perturbed values; the only file that reads jaxprs.

Tracing inlines nested calls and unrolls loops of fixed length, executes at once everything that does not depend on the
perturbed input (which folds BatchNorm statistics, biases and casts into constants), and writes what is left in few
operations: `max(x, c) = c + relu(x - c)`, `min(x, c) = c - relu(c - x)`, `|x|` and `where(x > 0, a x, b x)` in one
normal form, division as a product with the reciprocal, softmax as logistic of differences.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend import core as jex
from jax.extend import source_info_util

from rdx.bounds import graph, rewrites
from rdx.bounds.graph import PIECEWISE_LINEAR, Graph, Node, Op, Source, Value, piecewise_linear, reachable
from rdx.types import Array, PyTree

_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_BROADCASTING = ("add", "div", "max", "min", "mul", "pow", "sub")
_ABOVE, _BELOW = ("ge", "gt"), ("le", "lt")
_MASKS = ("add", "select_n", "sub")  # what masks a value with a constant


def trace(fn: Callable[..., Array], x: PyTree, *args: PyTree) -> Graph:
    """Traces `fn(x, *args)` into a graph in which only the leaves of `x` are perturbed.

    Args:
        fn: any JAX function that returns one array.
        x: the perturbed input, a pytree of arrays; where a constant may be chosen freely, its values choose it.
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
    tracer = _Tracer(dict(zip(nodes, jax.tree.leaves(x), strict=True)), constants)
    (output,) = tracer.run(closed.jaxpr, closed.consts, (*nodes, *constants), Source("an unknown line"))
    assumed = tuple(tracer.assumed)
    return Graph(nodes, tuple(reachable(tracer.ops, output, *assumed)), output, assumed)


class _Tracer:
    """Interprets a jaxpr, executing constants and recording operations on nodes."""

    def __init__(self, samples: dict[Node, Array], own: Sequence[Array]) -> None:
        self.ops: list[Op] = []
        self.samples = samples
        # What derives from an example's own constants, by identity; the arrays stay alive, so identities are unique.
        self.own = {id(value): value for value in [*samples.values(), *own]}
        self.comparisons: dict[Node, tuple[str, Value, Value]] = {}
        self.parts: dict[Node, rewrites.Part] = {}
        self.assumed: dict[Node, None] = {}  # in order

    def run(self, jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Value], caller: Source) -> list[Value]:
        env: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> Value:
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            # Inside a jitted library function an equation knows no line of the user's: that of the call stands in.
            scope = "/".join(part for part in (caller.scope, str(eqn.source_info.name_stack)) if part)
            source = Source(source_info_util.summarize(eqn.source_info) or caller.line, scope)
            outputs = self.equation(eqn, [read(atom) for atom in eqn.invars], source)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Value], source: Source) -> Sequence[Value]:
        name = eqn.primitive.name
        if name in _CALLS:
            body = next(eqn.params[key] for key in _BODIES if key in eqn.params)
            jaxpr, consts = (body.jaxpr, body.consts) if isinstance(body, jex.ClosedJaxpr) else (body, ())
            return self.run(jaxpr, consts, inputs, source)

        def fn(*values: Array) -> tuple[Array, ...]:
            out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
            return tuple(out) if eqn.primitive.multiple_results else (out,)

        if not any(isinstance(value, Node) for value in inputs):
            return self.execute(fn, inputs)
        if name == "scan":
            return self.unroll(eqn, inputs, source)
        if name in _BROADCASTING:
            inputs = [self.broadcast(value, eqn.outvars[0].aval.shape, source) for value in inputs]
        rewritten = self.rewrite(eqn, inputs, source)
        if rewritten is None:
            outputs = tuple(Node(var.aval.shape, var.aval.dtype) for var in eqn.outvars)
            are_own = tuple(id(value) in self.own for value in inputs)
            self.ops.append(Op(name, fn, tuple(inputs), outputs, eqn.params, source, are_own))
        else:
            outputs = (rewritten,)
        if name in _ABOVE + _BELOW and isinstance(outputs[0], Node):
            self.comparisons[outputs[0]] = (name, inputs[0], inputs[1])
        shape = eqn.outvars[0].aval.shape
        part = rewrites.part(name, inputs, self.known_parts(inputs), eqn.params, shape)
        if part is not None and isinstance(outputs[0], Node):
            self.parts[outputs[0]] = part
        return outputs

    def execute(self, fn: Callable[..., tuple[Array, ...]], inputs: Sequence[Any]) -> tuple[Array, ...]:
        """Executes an operation on constants."""
        # What is concrete stays concrete under an outer jit, so that zeros are recognised there as well.
        is_staged = any(isinstance(value, Tracer) for value in inputs)
        with contextlib.nullcontext() if is_staged else jax.ensure_compile_time_eval():
            constants = fn(*inputs)
        if any(id(value) in self.own for value in inputs):
            self.own.update((id(value), value) for value in constants)
        return constants

    def sample(self, node: Node) -> Array:
        """Computes a node's value at the center of the region."""
        if node not in self.samples:
            op = next(op for op in self.ops if node in op.outputs)
            values = op.apply(*(self.sample(value) for value in op.nodes))
            self.samples.update(zip(op.outputs, values, strict=True))
            self.own.update((id(value), value) for value in values)
        return self.samples[node]

    def inline(self, fn: Callable[..., Any], inputs: Sequence[Value], source: Source) -> list[Value]:
        """Continues with a function in the place of an operation."""
        shapes = [jax.ShapeDtypeStruct(jnp.shape(value), value.dtype) if isinstance(value, Node) else value
                  for value in inputs]
        closed = jax.make_jaxpr(fn)(*shapes)
        return self.run(closed.jaxpr, closed.consts, inputs, source)

    def broadcast(self, value: Value, shape: tuple[int, ...], source: Source) -> Value:
        """Repeats axes of size 1, as elementwise primitives do by themselves."""
        if jnp.shape(value) in ((), shape):
            return value
        return self.apply(lambda array: jnp.broadcast_to(array, shape), [value], source)

    def unroll(self, eqn: Any, inputs: list[Value], source: Source) -> list[Value]:
        """Runs a `scan` step by step."""
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        num_consts, num_carry = scan_sizes(eqn.params)
        consts, carry, xs = (
            inputs[:num_consts], inputs[num_consts : num_consts + num_carry], inputs[num_consts + num_carry :]
        )
        stacked: list[list[Value]] = []
        for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
            rows = [self.apply(lambda x, i=i: x[i], [x], source) for x in xs]
            outputs = self.run(body.jaxpr, body.consts, [*consts, *carry, *rows], source)
            carry = outputs[:num_carry]
            stacked.append(outputs[num_carry:])
        stacked = stacked[::-1] if eqn.params["reverse"] else stacked
        ys = [self.apply(lambda *rows: jnp.stack(rows), list(rows), source) for rows in zip(*stacked, strict=True)]
        return [*carry, *ys]

    def apply(self, fn: Callable[..., Array], inputs: Sequence[Value], source: Source) -> Value:
        """Applies a function with one output to perturbed values or constants."""
        if not any(isinstance(value, Node) for value in inputs):
            return self.execute(lambda *values: (fn(*values),), inputs)[0]
        return self.inline(fn, inputs, source)[0]

    def rewrite(self, eqn: Any, inputs: list[Value], source: Source) -> Value | None:
        """Writes an operation in others; None if `eqn` is none of those that are rewritten."""
        call = _Call(eqn.primitive.name, inputs, eqn.params, eqn.outvars[0].aval.shape, source)
        whole = rewrites.whole(call.name, self.known_parts(inputs), call.shape)
        if whole is not None:
            return self.softmax(whole, call)
        rule = _REWRITES.get(call.name)
        return None if rule is None else rule(self, call)

    def known_parts(self, inputs: Sequence[Value]) -> list[rewrites.Part | None]:
        return [self.parts.get(value) if isinstance(value, Node) else None for value in inputs]

    def softmax(self, whole: rewrites.Whole, call: "_Call") -> Value:
        """Writes the functions of a softmax; what constants hide is left out of them."""
        x, axes, source = whole.node, whole.axes, call.source
        is_log, is_relative = whole.kind == "log_softmax", whole.kind == "softmax"
        masked = None if is_log else self.infinities(x)
        if masked is not None:
            x = self.apply(functools.partial(rewrites.hide, axes=axes, is_relative=is_relative), [x, masked], source)
        if whole.kind == "logsumexp":
            assert isinstance(x, Node)
            function = functools.partial(rewrites.logsumexp, axes=axes, shape=call.shape)
            return self.apply(function, [x, self.sample(x)], source)
        rows = self.apply(functools.partial(rewrites.rows, axes=axes), [x], source)
        if rows.shape[-1] == 1:
            return jnp.full(call.shape, 0.0 if is_log else 1.0, rows.dtype)
        function = functools.partial(rewrites.softmax, axes=axes, is_log=is_log)
        return self.apply(function, [x, self.log_sum_exp_of_others(rows, source)], source)

    def log_sum_exp_of_others(self, rows: Value, source: Source) -> Value:
        """Adds up what lies 1, 2, ... places further; many values in blocks, as every addend is bounded by itself."""

        def rotated(value: Value, shifts: range) -> list[Value]:
            return self.inline(functools.partial(rewrites.rotations, shifts=shifts), [value], source)

        near, blocks, rest = rewrites.blocks(rows.shape[-1] - 1)
        block = self.combine(graph.LOGSUMEXP, graph.log_sum_exp, rotated(rows, near), source)
        values = rotated(block, blocks) + rotated(rows, rest)
        return self.combine(graph.LOGSUMEXP, graph.log_sum_exp, values, source)

    def combine(self, name: str, fn: Callable[..., Array], values: list[Value], source: Source) -> Value:
        return self.emit(name, fn, tuple(values), source) if len(values) > 1 else values[0]

    def infinities(self, x: Node) -> Array | None:
        """Finds where constants set a value to infinity, or nearly so: what they make of 0, None if they do not."""
        op = next((op for op in self.ops if x in op.outputs), None)
        if op is None or op.name not in _MASKS or not op.is_affine:
            return None
        constants = [value for value in op.inputs if not isinstance(value, Node)]
        if not any((np.abs(value) >= -rewrites.LOWEST).any() for value in constants if not isinstance(value, Tracer)):
            return None

        def at_zero(*constants: Array) -> tuple[Array, ...]:
            given = iter(constants)
            return op.fn(*(jnp.zeros(v.shape, v.dtype) if isinstance(v, Node) else next(given) for v in op.inputs))

        return self.execute(at_zero, constants)[0]

    def larger(self, call: "_Call") -> Value:
        """Writes `max(x, c) = c + relu(x - c)` and `min(x, c) = c + (x - c where that is negative)`."""
        first, second = call.inputs if isinstance(call.inputs[0], Node) else reversed(call.inputs)
        assert isinstance(first, Node)
        slopes, edge = ((0.0, 1.0), -np.inf) if call.name == "max" else ((1.0, 0.0), np.inf)
        if _is_all(second, edge):
            return first
        if _is_all(second, 0.0):
            return self.piecewise(first, *slopes, call.source)
        shifted = self.emit("sub", lax.sub, (first, _like(second, first)), call.source)
        bent = self.piecewise(shifted, *slopes, call.source)
        return self.emit("add", lax.add, (bent, _like(second, first)), call.source)

    def reduce_max(self, call: "_Call") -> Value:
        (x,) = call.inputs
        assert isinstance(x, Node)
        masked, axes = self.infinities(x), tuple(call.params["axes"])
        if masked is not None:
            x = self.apply(functools.partial(rewrites.without_infinity, axes=axes), [x, masked], call.source)
        return self.largest(functools.partial(rewrites.split_axes, axes=axes), x, call)

    def reduce_window_max(self, call: "_Call") -> Value:
        return self.largest(functools.partial(rewrites.windows, **call.params), call.inputs[0], call)

    def largest(self, split: Callable[..., list[Array]], x: Value, call: "_Call") -> Value:
        """Takes the largest of what `split` lists, or the smallest as minus the largest of the negatives."""
        sign = 1.0 if call.name.endswith("max") else -1.0
        values = self.inline(functools.partial(split, sign=sign), [x], call.source)
        largest = self.combine(graph.POOL, graph.largest, values, call.source)
        return self.apply(lambda value: sign * value, [largest], call.source)

    def power(self, call: "_Call") -> Value | None:
        """Leaves odd powers, even powers above 2 and the reciprocal as they are."""
        exponent = call.params["y"]
        if exponent in (1, 2):
            return call.inputs[0] if exponent == 1 else self.apply(jnp.square, call.inputs, call.source)
        if exponent >= -1:
            return None
        return self.apply(lambda x: lax.integer_pow(lax.integer_pow(x, -exponent), -1), call.inputs, call.source)

    def power_of_constant(self, call: "_Call") -> Value | None:
        """Writes `x ** 2.0` and `x ** 0.5` as what they are, defined where `pow` has no derivative."""
        base, exponent = call.inputs
        if isinstance(exponent, Node | Tracer) or not np.size(exponent):
            return None
        y = float(np.ravel(exponent)[0])
        if not (_is_all(exponent, y) and (y == 0.5 or y.is_integer())):
            return None
        return self.apply(jnp.sqrt if y == 0.5 else lambda x: lax.integer_pow(x, int(y)), [base], call.source)

    def assume_finite(self, call: "_Call", *, is_true: bool) -> np.ndarray:
        """Answers what only NaN and infinity would answer otherwise; bounds are void where that does not hold."""
        self.assumed.update(dict.fromkeys(value for value in call.inputs if isinstance(value, Node)))
        return np.full(call.shape, is_true)

    def product(self, call: "_Call") -> Value | None:
        first, second = call.inputs
        return self.apply(jnp.square, [first], call.source) if first is second else None

    def quotient(self, call: "_Call") -> Value | None:
        if not isinstance(call.inputs[1], Node):
            return None
        return self.apply(lambda x, y: x * lax.integer_pow(y, -1), call.inputs, call.source)

    def contraction(self, call: "_Call") -> Value | None:
        if not all(isinstance(value, Node) for value in call.inputs):
            return None
        product = functools.partial(rewrites.dot_general, dimensions=call.params["dimension_numbers"])
        return self.apply(product, call.inputs, call.source)

    def choice(self, call: "_Call") -> Value | None:
        """Picks the case that a constant condition picks everywhere; see `where_positive` for the others."""
        which, *cases = call.inputs
        if isinstance(which, Node):
            return self.where_positive(call.inputs, call.source) if len(cases) == 2 else None
        if isinstance(which, Tracer) or len(cases) != 2:
            return None
        holds = np.asarray(which)
        return cases[1] if holds.all() else cases[0] if not holds.any() else None

    def where_positive(self, inputs: list[Value], source: Source) -> Value | None:
        """Recognises `where(x > 0, a x, b x)` as `b x + (a - b) relu(x)`."""
        predicate, if_false, if_true = inputs
        assert isinstance(predicate, Node)
        name, x, knot = self.comparisons.get(predicate, ("", predicate, predicate))
        if not (isinstance(x, Node) and _is_all(knot, 0.0)):
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
            return 0.0 if _is_all(branch, 0.0) else None
        op = next(op for op in self.ops if branch in op.outputs)
        if op.name == "mul" and op.nodes == (x,):
            return next(value for value in op.inputs if not isinstance(value, Node))
        return None

    def piecewise(self, x: Value, below: float, above: float, source: Source) -> Node:
        return self.emit(PIECEWISE_LINEAR, piecewise_linear, (x,), source, below=below, above=above)

    def emit(
        self, name: str, fn: Callable[..., Array], inputs: tuple[Value, ...], source: Source, **params: float
    ) -> Node:
        node = next(value for value in inputs if isinstance(value, Node))
        output = Node(node.shape, node.dtype)
        self.ops.append(Op(name, lambda *values: (fn(*values, **params),), inputs, (output,), params, source))
        return output


def _is_all(value: Value, number: float) -> bool:
    is_concrete = not isinstance(value, Node | Tracer)
    return is_concrete and bool(np.all(np.asarray(value) == number))


def _like(value: Value, node: Node) -> Value:
    return value if isinstance(value, Node) else jnp.broadcast_to(jnp.asarray(value, node.dtype), node.shape)


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """Counts the constants and the carried values of a `scan`."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # from jax 0.11 on
    return len(consts), len(carry)


class _Call(NamedTuple):
    """An operation to rewrite."""

    name: str
    inputs: list[Value]
    params: dict[str, Any]
    shape: tuple[int, ...]
    source: Source


_REWRITES: dict[str, Callable[[_Tracer, _Call], Any]] = {
    "abs": lambda tracer, call: tracer.piecewise(call.inputs[0], -1.0, 1.0, call.source),
    "clamp": lambda tracer, call: tracer.apply(rewrites.clamp, call.inputs, call.source),
    "div": _Tracer.quotient,
    "dot_general": _Tracer.contraction,
    "integer_pow": _Tracer.power,
    "is_finite": lambda tracer, call: tracer.assume_finite(call, is_true=True),
    "max": _Tracer.larger,
    "min": _Tracer.larger,
    "mul": _Tracer.product,
    # The derivative of tanh, from jax 0.11 on.
    "one_minus_square": lambda tracer, call: tracer.apply(lambda x: 1.0 - jnp.square(x), call.inputs, call.source),
    # No number differs from itself.
    "ne": lambda tracer, call: tracer.assume_finite(call, is_true=False) if call.inputs[0] is call.inputs[1] else None,
    "pow": _Tracer.power_of_constant,
    "reduce_max": _Tracer.reduce_max,
    "reduce_min": _Tracer.reduce_max,
    "reduce_window_max": _Tracer.reduce_window_max,
    "reduce_window_min": _Tracer.reduce_window_max,
    "select_n": _Tracer.choice,
    # The identity in value. As an operation its vjp would be zero, and zero coefficients are unsound.
    "stop_gradient": lambda _, call: call.inputs[0],
}
