"""Interval arithmetic (Moore 1966, Interval Analysis): the range of every operation over intervals of its inputs.

Truth values are intervals as well, with `False < True`: the lower end says whether a comparison holds everywhere, the
upper end whether it may hold somewhere. Outside its domain a function has no range: both ends are NaN, which no
certificate survives.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from rdx.bounds.graph import LOGSUMEXP, MONOTONE, PIECEWISE_LINEAR, POOL, Graph, Node, Op, UnsupportedPrimitiveError
from rdx.bounds.interval import Interval
from rdx.types import Array

# Matrices of so many bytes are taken in pieces, this many, on CPUs.
_LARGE, _NUM_PIECES = 2**24, 16


def walk(graph: Graph, *inputs: Interval) -> dict[Node, Interval]:
    """Propagates intervals through a graph; returns those of all its nodes."""
    known = dict(zip(graph.inputs, inputs, strict=True))
    for op in graph.ops:
        values = [known[value] if isinstance(value, Node) else Interval(value, value) for value in op.inputs]
        known.update(zip(op.outputs, evaluate(op, values), strict=True))
    return known


def evaluate(op: Op, inputs: Sequence[Interval], *, centers: Sequence[Array] | None = None) -> tuple[Interval, ...]:
    """Bounds an operation over intervals of all its inputs, constants as intervals without width.

    Args:
        op: an affine operation, or one that `RULES` covers.
        inputs: intervals of its inputs, in order.
        centers: what an affine operation makes of the middles of its perturbed inputs, if that is known already.

    Returns:
        Intervals of its outputs: exact ones, as long as its inputs are different nodes.

    Raises:
        UnsupportedPrimitiveError: if there is no rule, such as for an operation in the derivative of a composite.
    """
    if not op.is_affine:
        if op.name not in RULES:
            raise UnsupportedPrimitiveError(
                f"Bounds have no rule for primitive {op.name!r}, which {op.source} leads to. bounds.register adds one."
            )
        return (RULES[op.name](op, *inputs),)
    if op.name in MONOTONE:
        lowers, uppers = op.fn(*(v.lower for v in inputs)), op.fn(*(v.upper for v in inputs))
        return tuple(map(Interval, lowers, uppers))
    if op.name == "neg":
        return (Interval(-inputs[0].upper, -inputs[0].lower),)
    if op.name == "sub":
        first, second = inputs
        return (Interval(first.lower - second.upper, first.upper - second.lower),)
    # Bilinear with one constant: W c and |W| r. Division is multiplication by a reciprocal.
    ((place, moving),) = ((i, v) for i, v in enumerate(inputs) if isinstance(op.inputs[i], Node))
    (center,) = centers or op.apply(moving.center)
    radius = _radius(op, *(moving.radius if i == place else v.lower for i, v in enumerate(inputs)))
    return (Interval(center - radius, center + radius),)


def _radius(op: Op, *values: Array) -> Array:
    """Computes `|W| r`, given `r` in the place of the node and `W` in that of the constant."""
    matrix = next(value for value, given in zip(values, op.inputs, strict=True) if not isinstance(given, Node))
    if op.name == "dot_general" and matrix.nbytes >= _LARGE and jax.default_backend() == "cpu":
        return _radius_by_pieces(op, *values)
    return _whole_radius(op, *values)


def _whole_radius(op: Op, *values: Array) -> Array:
    parts = zip(values, op.inputs, strict=True)
    return op.fn(*(value if isinstance(given, Node) else jnp.abs(value) for value, given in parts))[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _radius_by_pieces(op: Op, *values: Array) -> Array:
    """Sums over pieces of what is contracted: `|W|` as a whole takes longer to write to new memory than to use."""
    axes = [contracted[0] for contracted in op.params["dimension_numbers"][0]]
    count = math.gcd(values[0].shape[axes[0]], _NUM_PIECES)
    split = [
        jnp.moveaxis(value.reshape(*value.shape[:axis], count, -1, *value.shape[axis + 1 :]), axis, 0)
        for value, axis in zip(values, axes, strict=True)
    ]
    return lax.map(lambda pieces: _whole_radius(op, *pieces), split).sum(axis=0)


@_radius_by_pieces.defjvp
def _radius_jvp(op: Op, values: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
    # The derivative needs `|W|` in a product of its own, and a loop would only keep the pieces for it.
    _, tangent = jax.jvp(functools.partial(_whole_radius, op), values, tangents)
    return _radius_by_pieces(op, *values), tangent


def _hull(*values: Array) -> Interval:
    lower, upper = values[0], values[0]
    for value in values[1:]:
        lower, upper = jnp.minimum(lower, value), jnp.maximum(upper, value)
    return Interval(lower, upper)


def _within(bounds: Interval, image: Interval, low: float, high: float) -> Interval:
    is_inside = (bounds.lower > low) & (bounds.upper < high)
    return Interval(*(jnp.where(is_inside, end, jnp.nan) for end in image))


def _monotone(low: float = -math.inf, high: float = math.inf) -> Callable[..., Interval]:
    """Makes the rule of a function that is monotone between two points and has no range over an interval beyond."""

    def rule(op: Op, x: Interval) -> Interval:
        image = _hull(*op.fn(x.lower), *op.fn(x.upper))
        return image if low == -math.inf and high == math.inf else _within(x, image, low, high)

    return rule


def _with_vertex(op: Op, x: Interval) -> Interval:
    """Bounds an even function that grows on either side of 0."""
    image, (least,) = _hull(*op.fn(x.lower), *op.fn(x.upper)), op.fn(jnp.zeros_like(x.lower))
    return Interval(jnp.where((x.lower < 0) & (x.upper > 0), least, image.lower), image.upper)


def _integer_power(op: Op, x: Interval) -> Interval:
    exponent = op.params["y"]
    if exponent >= 0:
        return _with_vertex(op, x) if exponent % 2 == 0 and exponent else _monotone()(op, x)
    has_pole = (x.lower <= 0) & (x.upper >= 0)
    return Interval(*(jnp.where(has_pole, jnp.nan, end) for end in _monotone()(op, x)))


def _power(op: Op, x: Interval, y: Interval) -> Interval:
    # x^y of a positive x is monotone in either argument.
    image = _hull(*(op.fn(a, b)[0] for a in x for b in y))
    return _within(x, image, 0.0, math.inf)


def _product(op: Op, x: Interval, y: Interval) -> Interval:
    del op
    return _hull(*(a * b for a in x for b in y))


def _quotient(op: Op, x: Interval, y: Interval) -> Interval:
    del op
    has_pole = (y.lower <= 0) & (y.upper >= 0)
    return Interval(*(jnp.where(has_pole, jnp.nan, end) for end in _hull(*(a / b for a in x for b in y))))


def _cosine(op: Op, x: Interval) -> Interval:
    del op
    return _periodic(x, jnp.cos, 0.0)


def _sine(op: Op, x: Interval) -> Interval:
    del op
    return _periodic(x, jnp.sin, 0.5 * math.pi)


def _periodic(x: Interval, fn: Callable[[Array], Array], peak: float) -> Interval:
    """Bounds a wave of period 2 pi with its peaks at `peak + 2 pi n`, the points between them."""
    image = _hull(fn(x.lower), fn(x.upper))

    def contains(point: float) -> Array:
        return jnp.floor((x.upper - point) / (2.0 * math.pi)) >= jnp.ceil((x.lower - point) / (2.0 * math.pi))

    low, high = contains(peak + math.pi), contains(peak)
    return Interval(jnp.where(low, -1.0, image.lower), jnp.where(high, 1.0, image.upper))


def _piecewise_linear(op: Op, x: Interval) -> Interval:
    (lower,), (upper,) = op.fn(x.lower), op.fn(x.upper)
    if op.params["below"] >= 0 and op.params["above"] >= 0:
        return Interval(lower, upper)
    crosses = (x.lower < 0) & (x.upper > 0)
    return Interval(*(
        jnp.where(crosses, pick(end, 0.0), end)
        for pick, end in zip((jnp.minimum, jnp.maximum), _hull(lower, upper), strict=True)
    ))


def _both_ends(op: Op, *inputs: Interval) -> Interval:
    """Bounds an operation that grows with every input."""
    return Interval(*op.fn(*(v.lower for v in inputs)), *op.fn(*(v.upper for v in inputs)))


def _not(op: Op, x: Interval) -> Interval:
    del op
    return Interval(~x.upper, ~x.lower)


def _less(op: Op, x: Interval, y: Interval) -> Interval:
    # x < y and x <= y fall in x and grow in y.
    return _known(Interval(*op.fn(x.upper, y.lower), *op.fn(x.lower, y.upper)), x, y)


def _greater(op: Op, x: Interval, y: Interval) -> Interval:
    return _known(Interval(*op.fn(x.lower, y.upper), *op.fn(x.upper, y.lower)), x, y)


def _equal(op: Op, x: Interval, y: Interval) -> Interval:
    are_points = (x.lower == x.upper) & (y.lower == y.upper)
    overlap = (x.lower <= y.upper) & (y.lower <= x.upper)
    same = _known(Interval(are_points & (x.lower == y.lower), overlap), x, y)
    return same if op.name == "eq" else _not(op, same)


def _known(holds: Interval, *compared: Interval) -> Interval:
    """Leaves open what is compared with a value that has no range: it may be a number at some points."""
    is_nan = functools.reduce(jnp.logical_or, (jnp.isnan(end) for value in compared for end in value))
    return Interval(holds.lower & ~is_nan, holds.upper | is_nan)


def _select(op: Op, which: Interval, *cases: Interval) -> Interval:
    """Bounds a choice between two cases: the one that is certain, or both."""
    del op
    if_false, if_true = cases
    hull = Interval(jnp.minimum(if_false.lower, if_true.lower), jnp.maximum(if_false.upper, if_true.upper))
    return Interval(*(
        jnp.where(which.lower, yes, jnp.where(which.upper, either, no))
        for yes, no, either in zip(if_true, if_false, hull, strict=True)
    ))


# Over an edge of its domain a function has no range; the square root alone has a value there.
_EDGES = {
    "acos": (-1.0, 1.0), "asin": (-1.0, 1.0), "atanh": (-1.0, 1.0), "erf_inv": (-1.0, 1.0), "log": (0.0,),
    "acosh": (1.0,), "log1p": (-1.0,), "rsqrt": (0.0,), "sqrt": (-1e-30,), "tan": (-0.5 * math.pi, 0.5 * math.pi),
}
_EVERYWHERE = ("asinh", "atan", "cbrt", "erf", "erfc", "exp", "exp2", "expm1", "logistic", "sinh", "tanh")
RULES: dict[str, Callable[..., Interval]] = {
    **{name: _monotone(*edges) for name, edges in _EDGES.items()}, **dict.fromkeys(_EVERYWHERE, _monotone()),
    **dict.fromkeys(("and", "max", "min", "or", POOL, LOGSUMEXP), _both_ends),
    **dict.fromkeys(("cosh", "square"), _with_vertex),
    **dict.fromkeys(("ge", "gt"), _greater), **dict.fromkeys(("le", "lt"), _less),
    **dict.fromkeys(("eq", "ne"), _equal), "not": _not, "select_n": _select, "cos": _cosine, "sin": _sine,
    "mul": _product, "div": _quotient, "pow": _power, "integer_pow": _integer_power,
    PIECEWISE_LINEAR: _piecewise_linear,
}
