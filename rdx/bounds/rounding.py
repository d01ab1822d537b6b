"""How far floating-point rounding can falsify bounds: a running error analysis (Higham 2002, Accuracy, Ch. 3).

A sum of `n` products, in any order and with any fused operations, is off by at most `gamma_n sum |terms|`, with
`gamma_n = n u / (1 - n u)` and the unit roundoff `u` of the dtype (Higham 2002, Eq. 3.5). Along the graph that gives,
for every value, a bound `e` of how far below the exact end a computed end may lie, and as far above on the other side:

    affine   y = W x + c    e_y = |W| (e_x + gamma_f m_x + gamma_b w_x) + gamma_f |c|
    kinked   y = f(x)       e_y = (s + j) (e_x + 4 gamma m_x)

`m_x` is the largest magnitude of `x` and `w_x` the width of its interval. `gamma_f` is for the sums of `W x`, `gamma_b`
for those of the coefficients `W^T a` and `gamma` for those of gaps. `s` is the largest slope of `f`. `j` is the jump
of the slope at the kink: a line over a computed interval may miss the function by `j e_x` beyond its ends; there is
none where intervals leave no doubt which piece it is. Both coefficients and errors of backward substitution spread
along `|W|` and `s`, so one walk covers interval propagation and substitution, whose hidden bounds may come from either.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from rdx.balls import Region
from rdx.bounds import arithmetic, propagation, relaxations
from rdx.bounds.graph import BILINEAR, ELEMENTWISE, PIECEWISE_LINEAR, POOL, Graph, Node, Op, UnsupportedPrimitiveError
from rdx.bounds.interval import Interval
from rdx.types import Array, PyTree

# Roundings of one element besides its sums: center and radius of an interval, slope, bias and gap of a line.
_FEW = 16
# Beyond this relative error the growth `(1 + u)^n` of coefficients is not below the factor 2 that stands for it.
_MOST = 0.25
# Intervals narrower than 1e-15 get a chord of another slope (`relaxations`).
_NARROW = 4e-15
_SUMS = frozenset({"cumsum", "reduce_sum", "reduce_window_sum", "scatter-add"})
_REPEATING = frozenset({"broadcast_in_dim", "gather", "tile"})


def allowance(fn: Callable[..., Array], region: PyTree, *args: PyTree) -> Array:
    """Computes how far rounding may put bounds of `fn` on the wrong side: `exact value >= lower - allowance`.

    That holds for what `ibp`, `crown_ibp` and `crown` compute with their default options in the dtype of the region,
    and as well for the rounding of `fn` itself. It assumes that products are summed in some order (no Winograd or
    Fourier convolutions), matmul precision "highest", no underflow, and that what does not depend on `x`, such as a
    scale of BatchNorm, is as computed.

    Args:
        fn: any JAX function of affine operations, relu and its like, and maxima.
        region: as for bounds.
        *args: further arguments, not perturbed.

    Returns:
        Shape `[B, ...]` of the output; infinite where sums are too long for the dtype.

    Raises:
        UnsupportedPrimitiveError: on another nonlinear operation, whose rounding is not analysed.
    """

    def bound(graph: Graph, regions: Sequence[Region]) -> Interval:
        error = _walk(graph, regions)
        return Interval(-error, error)

    return propagation.per_example(bound, fn, region, *args).radius  # 0 where the output does not depend on x


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Lets JAX compute in float64, functions with float32 constants included."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        yield


def doubled(tree: PyTree) -> PyTree:
    """Casts the floating-point leaves of a pytree to float64, which is exact; call it in `double_precision`."""

    def cast(leaf: PyTree) -> PyTree:
        return jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _walk(graph: Graph, regions: Sequence[Region]) -> Array:
    """Propagates intervals and errors; returns the error of the output."""
    assert isinstance(graph.output, Node)
    additions = sum(len(op.nodes) for op in graph.ops) + _FEW
    known, errors, total = {}, {}, 0.0
    for node, region in zip(graph.inputs, regions, strict=True):
        gamma = _gamma(math.prod(node.shape) + additions, node)
        known[node] = Interval(region.lower, region.upper)
        errors[node] = gamma * (_magnitude(known[node], 0.0) + region.radius)
        total += gamma
    for op in graph.ops:
        inputs, given = [known[node] for node in op.nodes], [errors[node] for node in op.nodes]
        gammas = _gammas(op, additions)
        if op.is_affine:
            spread = _affine_error(op, inputs, given, *gammas)
            values = [known[v] if isinstance(v, Node) else Interval(v, v) for v in op.inputs]
            known.update(zip(op.outputs, arithmetic.evaluate(op, values), strict=True))
        elif op.name in _KINKED:
            spread = [_KINKED[op.name](op, inputs, given, *gammas)]
            known[op.outputs[0]] = relaxations.propagate(op, inputs)
        else:
            raise UnsupportedPrimitiveError(
                f"The rounding of bounds through {op.name!r} at {op.source} is not analysed: the analysis is for "
                "affine operations, relu and its like, and maxima."
            )
        errors.update(zip(op.outputs, spread, strict=True))
        total += sum(gammas)
    if not total < _MOST:
        return jnp.full(graph.output.shape, jnp.inf, graph.output.dtype)
    last = _gamma(additions, graph.output) * _magnitude(known[graph.output], errors[graph.output])
    return 2.0 * (errors[graph.output] + last)


def _affine_error(
    op: Op, inputs: Sequence[Interval], errors: Sequence[Array], gamma_f: float, gamma_b: float
) -> list[Array]:
    spread = iter([
        error + gamma_f * _magnitude(x, error) + gamma_b * (x.upper - x.lower + 4.0 * error)
        for x, error in zip(inputs, errors, strict=True)
    ])

    def constant(value: Array) -> Array:
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            return value  # indices
        return jnp.abs(value) if op.name in BILINEAR or op.name == "div" else gamma_f * jnp.abs(value)

    values = [next(spread) if isinstance(value, Node) else constant(value) for value in op.inputs]
    return [values[0] + values[1]] if op.name == "sub" else [jnp.abs(out) for out in op.fn(*values)]


def _kinked_error(op: Op, inputs: Sequence[Interval], errors: Sequence[Array], gamma: float) -> Array:
    (x,), (error,) = inputs, errors
    below, above = abs(op.params["below"]), abs(op.params["above"])
    # Ends that a method computes may differ from these by twice the error, and a piece that is certain is a line.
    is_on, is_off = x.lower > 2.0 * error, x.upper < -2.0 * error
    slope = jnp.where(is_on, above, jnp.where(is_off, below, max(below, above))).astype(error.dtype)
    jump = jnp.where(is_on | is_off, 0.0, abs(op.params["above"] - op.params["below"])).astype(error.dtype)
    return (slope + jump) * (error + 4.0 * gamma * _magnitude(x, error)) + jump * _NARROW


def _pool_error(op: Op, inputs: Sequence[Interval], errors: Sequence[Array], gamma: float) -> Array:
    del op
    lower, upper, error, size = (
        jnp.stack(parts) for parts in zip(
            *((x.lower, x.upper, e, _magnitude(x, e)) for x, e in zip(inputs, errors, strict=True)), strict=True
        )
    )
    places = jnp.arange(len(inputs)).reshape(-1, *(1,) * (lower.ndim - 1))
    is_first = places == jnp.argmax(lower, axis=0)[None]
    rival = jnp.where(is_first, -jnp.inf, upper + 2.0 * error).max(axis=0)
    is_sure = is_first & (lower - 2.0 * error > rival[None])
    # Without a certain winner each may be above another by both errors, and the plane above is a constant.
    either = 3.0 * error.max(axis=0) + 4.0 * gamma * size.max(axis=0)
    winner = jnp.where(is_sure, error + 4.0 * gamma * size, 0.0).sum(axis=0)
    return jnp.where(is_sure.any(axis=0), winner, either)


_KINKED: dict[str, Callable[..., Array]] = {PIECEWISE_LINEAR: _kinked_error, POOL: _pool_error}


def _magnitude(x: Interval, error: Array | float) -> Array:
    return jnp.maximum(jnp.abs(x.lower), jnp.abs(x.upper)) + 2.0 * error


def _gamma(count: int, *nodes: Node) -> float:
    """Computes `n u / (1 - n u)` for the least precise of some nodes."""
    relative = count * max(float(jnp.finfo(node.dtype).eps) for node in nodes) / 2.0
    return relative / (1.0 - relative) if relative < 1.0 else math.inf


def _gammas(op: Op, additions: int) -> tuple[float, ...]:
    """Gives `gamma_f, gamma_b` of an affine operation, `gamma` of another."""
    nodes = (*op.nodes, *op.outputs)
    if not op.is_affine:
        return (_gamma(math.prod(op.outputs[0].shape) + additions, *nodes),)
    forward, backward = _lengths(op)
    # What only moves elements rounds nothing on the way forward.
    return _gamma(forward + _FEW, *nodes) if forward else 0.0, 2.0 * _gamma(backward + additions, *nodes)


def _lengths(op: Op) -> tuple[int, int]:
    """Counts the terms of the longest sum in an affine operation and in its transpose."""
    constants = [value for value in op.inputs if not isinstance(value, Node)]
    most = max(math.prod(jnp.shape(value)) for value in (*op.inputs, *op.outputs))
    if op.name == "dot_general":
        place = next(i for i, value in enumerate(op.inputs) if not isinstance(value, Node))
        contracted, batch = (axes[place] for axes in op.params["dimension_numbers"])
        shape = constants[0].shape
        length = math.prod(shape[axis] for axis in contracted)
        return length, math.prod(shape) // length // math.prod(shape[axis] for axis in batch)
    if op.name == "conv_general_dilated" and isinstance(op.inputs[0], Node):
        rhs, shape = op.params["dimension_numbers"].rhs_spec, constants[0].shape
        return math.prod(shape) // shape[rhs[0]], math.prod(shape) // shape[rhs[1]]
    if op.name in ELEMENTWISE and all(node.shape == op.outputs[0].shape for node in op.nodes):
        return 1, 1
    is_sum = op.name in BILINEAR | _SUMS | ELEMENTWISE
    return most if is_sum else 0, most if is_sum or op.name in _REPEATING else 1
