"""What a model's code says about its gradients, before any of it is run: the jaxpr is read, loops and calls inside."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend import source_info_util

from rdx.types import Array, LogitsFn

# Where derivatives are zero, or nobody knows them.
_FLAT = ("stop_gradient", "round", "floor", "ceil", "sign", "nextafter")
_HOST = ("pure_callback", "io_callback", "debug_callback")
_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
# What a maximum goes through before softmax subtracts it: to stop the gradient there is exact.
_SHIFTS = ("max", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "select_n", "convert_element_type")
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
        dynamic: gradients that the model takes of itself, as defences that optimise at test time do.
        host: calls of functions outside JAX.
    """

    has_path: bool
    blocked: tuple[str, ...]
    custom: tuple[str, ...]
    random: tuple[str, ...]
    dynamic: tuple[str, ...]
    host: tuple[str, ...]


def inspect(logits_fn: LogitsFn, x: Array) -> Inspection:
    """Reads the jaxpr of a model; nothing is computed.

    Rounding and its like count where a derivative reaches them and the result goes on to the output. A gradient that
    the model takes is told by the names that JAX gives the transposed operations. The shift of a softmax by its
    maximum is no finding, nor are functions with `custom_jvp`, such as relu.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: inputs; only their shape and dtype count.

    Returns:
        The findings.
    """
    closed = jax.make_jaxpr(logits_fn)(jax.ShapeDtypeStruct(x.shape, x.dtype))
    reader = _Reader()
    outputs = reader.read(closed.jaxpr, [_SMOOTH] * len(closed.jaxpr.invars))
    found = {kind: tuple(sorted(names)) for kind, names in reader.found.items()}
    return Inspection(_SMOOTH in outputs, **found)


class _Reader:
    def __init__(self) -> None:
        self.found: dict[str, set[str]] = {
            kind: set() for kind in ("blocked", "custom", "random", "dynamic", "host")
        }
        self.line = ""

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
        if "transpose" in str(eqn.source_info.name_stack):
            self.note("dynamic", name)
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
        if eqn.primitive.name == "scan":
            body, skipped, num_consts = eqn.params["jaxpr"].jaxpr, 0, eqn.params["num_consts"]
            num_carry = eqn.params["num_carry"]
        else:
            body, skipped, num_consts = eqn.params["body_jaxpr"].jaxpr, eqn.params["cond_nconsts"], 0
            num_consts = eqn.params["body_nconsts"]
            num_carry = len(levels) - skipped - num_consts
        consts, rest = levels[skipped : skipped + num_consts], levels[skipped + num_consts :]
        carry, others, outputs = rest[:num_carry], rest[num_carry:], rest
        for _ in range(_TURNS):
            outputs = self.read(body, [*consts, *carry, *others])
            carry = outputs[:num_carry]
        return outputs

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
