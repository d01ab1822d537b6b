"""What a model's code says about its gradients, before any of it is run: the jaxpr is read, loops and calls inside."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend import source_info_util

from rdx.bounds import tracing
from rdx.types import Array, LogitsFn

# Where derivatives are zero, or nobody knows them.
_FLAT = ("stop_gradient", "round", "floor", "ceil", "sign", "nextafter")
_HOST = ("pure_callback", "io_callback", "debug_callback")
_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
# What a maximum goes through before softmax subtracts it: to stop the gradient there is exact.
_SHIFTS = ("max", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "select_n", "convert_element_type")
# What differentiation leaves in the names of equations: `jvp(...)`, `vmap(transpose(jvp(...)))`, no scope of a user's.
_DIFFERENTIATED = re.compile(r"(^|[(/])(transpose|jvp)\(")
# What networks are made of.
_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
# A loop is read this often: a gradient that survives so many turns survives more.
_TURNS = 3

# How a value depends on the input: not at all, without a derivative, with one.
_NOT, _BLOCKED, _SMOOTH = 0, 1, 2


class Inspection(NamedTuple):
    """What was found on the way from the input to the output.

    Attributes:
        has_path: whether any derivative of the output with respect to the input can differ from 0.
        blocked: operations at which derivatives end, with their lines.
        custom: derivatives that the code defines itself by `custom_vjp`, with their lines.
        random: draws of random numbers, with their lines.
        dynamic: derivatives that the model takes of itself, as defences that optimise at test time do.
        search: loops that may look for an input without derivatives, with their lines.
        host: calls of functions outside JAX.
    """

    has_path: bool
    blocked: tuple[str, ...]
    custom: tuple[str, ...]
    random: tuple[str, ...]
    dynamic: tuple[str, ...]
    search: tuple[str, ...]
    host: tuple[str, ...]


def inspect(logits_fn: LogitsFn, x: Array) -> Inspection:
    """Reads the jaxpr of a model; nothing is computed.

    Rounding and its like count where a derivative reaches them and the result goes on to the output. Derivatives that
    the model takes, forwards or backwards, are told by the names that JAX gives differentiated operations. The shift of
    a softmax by its maximum is no finding, nor are functions with `custom_jvp`, such as relu.

    A loop may be a search where it carries values shaped as inputs from turn to turn, runs matrix products or
    convolutions on what it carries, and reads nothing of the input piece by piece, as recurrent cells and attention in
    chunks do. That is a suspicion only: layers of the input's width in a loop look the same. Not seen is a search that
    is written out turn by turn, or that evaluates all of its candidates at once.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: inputs; only their shape and dtype count.

    Returns:
        The findings.
    """
    closed = jax.make_jaxpr(logits_fn)(jax.ShapeDtypeStruct(x.shape, x.dtype))
    reader = _Reader(x.shape)
    outputs = reader.read(closed.jaxpr, [_SMOOTH] * len(closed.jaxpr.invars))
    found = {kind: tuple(sorted(names)) for kind, names in reader.found.items()}
    return Inspection(_SMOOTH in outputs, **found)


class _Reader:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.found: dict[str, set[str]] = {
            kind: set() for kind in ("blocked", "custom", "random", "dynamic", "search", "host")
        }
        self.line, self.example, self.num_products = "", shape[1:], 0

    def read(self, jaxpr: jex.Jaxpr, levels: Sequence[int]) -> list[int]:
        """Follows how the outputs depend on inputs that depend on the model's input by `levels`."""
        env, shifts = dict(zip(jaxpr.invars, levels, strict=True)), set()

        def level(atom: Any) -> int:
            return _NOT if isinstance(atom, jex.Literal) else env.get(atom, _NOT)

        for eqn in _used(jaxpr):
            operands = [atom for atom in eqn.invars if not isinstance(atom, jex.Literal)]
            is_shift = eqn.primitive.name in _SHIFTS and not shifts.isdisjoint(operands)
            if eqn.primitive.name == "reduce_max" or is_shift:
                shifts.update(eqn.outvars)
            is_harmless = eqn.primitive.name == "stop_gradient" and not shifts.isdisjoint(operands)
            # Inside a function of the library an equation knows no line of the user's: that of the call stands in.
            outer, self.line = self.line, _line(eqn) or self.line
            outputs = self.equation(eqn, [level(atom) for atom in eqn.invars], is_harmless=is_harmless)
            self.line = outer
            for variable, value in zip(eqn.outvars, outputs, strict=True):
                is_smooth = jnp.issubdtype(getattr(variable.aval, "dtype", jnp.int32), jnp.inexact)
                env[variable] = value if is_smooth else min(value, _BLOCKED)
        return [level(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: jex.JaxprEqn, levels: list[int], *, is_harmless: bool) -> list[int]:
        name, highest, num = eqn.primitive.name, max(levels, default=_NOT), len(eqn.outvars)
        if _DIFFERENTIATED.search(str(eqn.source_info.name_stack)):
            self.note("dynamic", name)
        self.num_products += name in _PRODUCTS and highest > _NOT
        if name in _RANDOM:
            self.note("random", name)
        if name in _FLAT or name in _HOST:
            if highest == _SMOOTH and not is_harmless:
                self.note("host" if name in _HOST else "blocked", name)
            return [min(highest, _BLOCKED)] * num
        if name in _CUSTOM:
            if name != "custom_jvp_call" and highest == _SMOOTH:
                self.note("custom", name)
            return [highest] * num
        return [max(levels[1:])] if name == "select_n" else self.nested(eqn, levels)

    def nested(self, eqn: jex.JaxprEqn, levels: list[int]) -> list[int]:
        name, highest, num = eqn.primitive.name, max(levels, default=_NOT), len(eqn.outvars)
        if name in ("scan", "while"):
            return self.loop(eqn, levels)
        bodies = list(jex.jaxprs_in_params(eqn.params))
        operands = levels[1:] if name == "cond" else levels
        if not all(len(body.invars) == len(operands) and len(body.outvars) == num for body in bodies):
            operands = []  # a structure that is not known: all of it may depend on all
        read = [self.read(body, operands or [highest] * len(body.invars)) for body in bodies]
        return [max(values) for values in zip(*read, strict=True)] if operands and bodies else [highest] * num

    def loop(self, eqn: jex.JaxprEqn, levels: list[int]) -> list[int]:
        params, is_scan = eqn.params, eqn.primitive.name == "scan"
        body, skipped = (params["jaxpr"], 0) if is_scan else (params["body_jaxpr"], params["cond_nconsts"])
        num_consts = tracing.scan_sizes(params)[0] if is_scan else params["body_nconsts"]
        num_carry = tracing.scan_sizes(params)[1] if is_scan else len(levels) - skipped - num_consts
        consts, rest = levels[skipped : skipped + num_consts], levels[skipped + num_consts :]
        carry, others, outputs, num_products = rest[:num_carry], rest[num_carry:], rest, self.num_products
        for _ in range(_TURNS):
            outputs = self.read(body.jaxpr, [*consts, *carry, *others])
            carry = outputs[:num_carry]
        if not is_scan:
            # No derivative passes through a condition, so nothing in it can block one.
            ahead = [min(level, _BLOCKED) for level in (*levels[:skipped], *carry)]
            self.read(params["cond_jaxpr"].jaxpr, ahead)
        shapes = [shape.shape for shape, level in zip(body.out_avals, carry, strict=False) if level > _NOT]
        if self.num_products > num_products and not any(others) and any(map(self.holds_inputs, shapes)):
            self.note("search", eqn.primitive.name)
        return outputs

    def holds_inputs(self, shape: tuple[int, ...]) -> bool:
        """Tells whether arrays of a shape can hold examples, as they are or flat."""
        num_axes = len(self.example)
        return shape[max(len(shape) - num_axes, 0):] == self.example or shape[-1:] == (math.prod(self.example),)

    def note(self, kind: str, name: str) -> None:
        self.found[kind].add(f"{name} ({self.line})" if self.line else name)


def _line(eqn: jex.JaxprEqn) -> str:
    """Names the file and the line of the user's code that an equation comes from; empty inside of libraries."""
    return Path(source_info_util.summarize(eqn.source_info).partition(" ")[0]).name


def _used(jaxpr: jex.Jaxpr) -> Iterator[jex.JaxprEqn]:
    """Yields the equations that the outputs depend on, in order."""
    needed, used = {atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            used.append(eqn)
            needed.update(atom for atom in eqn.invars if not isinstance(atom, jex.Literal))
    return reversed(used)
