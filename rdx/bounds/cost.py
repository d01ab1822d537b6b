"""What bounds will cost, before anything runs: memory from the compiled program, operations from the traced one."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex

from rdx.bounds.interval import Interval
from rdx.compilation import as_partial, cpu_options
from rdx.types import Array, PyTree

# Moves numbers without computing any.
_FREE = frozenset({
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice", "dynamic_update_slice",
    "expand_dims", "gather", "iota", "pad", "reshape", "rev", "slice", "split", "squeeze", "stop_gradient", "transpose",
})


class Plan(NamedTuple):
    """The cost of computing some bounds.

    Attributes:
        peak_bytes: arguments, results and temporary arrays of the compiled program.
        flops: additions and multiplications, comparisons and the like, if every chunk of every layer is needed.
    """

    peak_bytes: int
    flops: float

    def __str__(self) -> str:
        """Writes both in readable units."""
        return f"{self.peak_bytes / 2**20:.0f} MiB, {self.flops / 1e9:.3g} GFLOP"


def plan(
    method: Callable[..., Interval], fn: Callable[..., Array], region: PyTree, *args: PyTree, **options: Any
) -> Plan:
    """Finds the memory and the operations that `method(fn, region, *args, **options)` takes under `jit`.

    The program is traced and compiled, not run: shapes are enough in the place of arrays, so that

        region = jax.eval_shape(ball.region, jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32))
        print(bounds.plan(bounds.crown, logits_fn, region, max_bytes=2**30))

    costs a compilation even for a network that would not fit.

    Args:
        method: any method of this room.
        fn: see the method, as for the others.
        region: the perturbed inputs, or their shapes.
        *args: further arguments, or their shapes.
        **options: of the method.

    Returns:
        The plan, for the default device.

    Raises:
        NotImplementedError: on backends that do not tell the memory of their programs.
    """

    def bound(fn: Callable[..., Array], region: PyTree, args: PyTree) -> Interval:
        return method(fn, region, *args, **options)

    traced = jax.jit(bound, compiler_options=cpu_options()).trace(as_partial(fn), region, args)
    memory = traced.lower().compile().memory_analysis()
    if memory is None:
        raise NotImplementedError(f"Backend {jax.default_backend()!r} does not tell the memory of its programs.")
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return Plan(sum(sizes), flops(traced.jaxpr.jaxpr))


def flops(jaxpr: jex.Jaxpr) -> float:
    """Counts the operations of a program: loops as often as they run, the dearer branch of a condition."""
    return sum(_equation_flops(eqn) for eqn in jaxpr.eqns)


def _equation_flops(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    outputs = sum(math.prod(var.aval.shape) for var in eqn.outvars)
    inner = [flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    if inner:
        return sum(inner) * params.get("length", 1)
    if name == "dot_general":
        (axes, _), _ = params["dimension_numbers"]
        return 2.0 * outputs * math.prod(eqn.invars[0].aval.shape[axis] for axis in axes)
    if name == "conv_general_dilated":
        kernel, (out, *_) = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        return 2.0 * outputs * math.prod(kernel) / kernel[out]
    return 0.0 if name in _FREE else float(max(outputs, *(math.prod(_shape(atom)) for atom in eqn.invars), 0))


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _jaxprs(value: Any) -> Iterator[jex.Jaxpr]:
    """Finds the programs inside of an operation's parameter."""
    if isinstance(value, jex.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, jex.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
