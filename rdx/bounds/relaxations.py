"""Rules for nonlinear operations: how each bends an interval, and the two lines that enclose it.

A relaxation of `f` on `[l, u]` is a pair of lines with `lower_slope x + lower_bias <= f(x) <= upper_slope x +
upper_bias` there (Zhang et al. 2018, CROWN, arXiv:1811.00866, Theorem 3.2). Every division is guarded in both branches
of its `where`, so gradients stay finite on degenerate intervals.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from rdx.bounds import graph
from rdx.bounds.interval import Interval
from rdx.types import Array

# Bisections for tangent points: the bracket is at most the width of the interval, 30 halvings leave float32 rounding.
_NUM_BISECTIONS = 30
# Divisors are at least this: gradients divide by the square, which must not vanish in float32.
_NARROW = 1e-15


class Lines(NamedTuple):
    """Two lines that enclose a function over an interval, elementwise.

    Attributes:
        lower_slope: slope of the lower line.
        lower_bias: its value at 0.
        upper_slope: slope of the upper line.
        upper_bias: its value at 0.
    """

    lower_slope: Array
    lower_bias: Array
    upper_slope: Array
    upper_bias: Array


# (lower, upper) of an unstable neuron -> slope in [0, 1] of the lower line of relu.
SlopeFn: TypeAlias = Callable[[Array, Array], Array]


def adaptive(lower: Array, upper: Array) -> Array:
    """Chooses slope 1 where `u > -l`, else 0: the smaller area (Zhang et al. 2018, arXiv:1811.00866, Sec. 3.3)."""
    return (upper > -lower).astype(upper.dtype)


def same_slope(lower: Array, upper: Array) -> Array:
    """Takes the slope of the upper line, `u / (u - l)` (Fast-Lin; Weng et al. 2018, arXiv:1804.09699)."""
    return upper / jnp.maximum(upper - lower, _NARROW)


def zero_slope(lower: Array, upper: Array) -> Array:
    """Takes slope 0: the lower line is `y = 0`."""
    del lower
    return jnp.zeros_like(upper)


def one_slope(lower: Array, upper: Array) -> Array:
    """Takes slope 1: the lower line is `y = x`."""
    del lower
    return jnp.ones_like(upper)


def relax(op: graph.Op, bounds: Interval, relu_lower: SlopeFn) -> Lines:
    """Encloses a nonlinear operation between two lines.

    Args:
        op: a nonlinear operation of a graph with one perturbed input.
        bounds: bounds of that input.
        relu_lower: the choice of the lower slope of unstable piecewise-linear functions.

    Returns:
        The lines, elementwise.
    """
    if op.name == graph.PIECEWISE_LINEAR:
        return _relax_piecewise_linear(bounds, relu_lower, op.params["below"], op.params["above"])
    return _relax_s_shaped(bounds, *_S_SHAPED[op.name])


def propagate(op: graph.Op, bounds: Interval) -> Interval:
    """Bounds a nonlinear operation over an interval: exactly, as all of them are monotone on either side of 0."""
    (lower,), (upper,) = op.apply(bounds.lower), op.apply(bounds.upper)
    if op.name == graph.PIECEWISE_LINEAR and not (op.params["below"] >= 0 and op.params["above"] >= 0):
        ends = jnp.minimum(lower, upper), jnp.maximum(lower, upper)
        crosses = (bounds.lower < 0) & (bounds.upper > 0)
        return Interval(*(jnp.where(crosses, pick(end, 0.0), end)
                          for pick, end in zip((jnp.minimum, jnp.maximum), ends, strict=True)))
    return Interval(lower, upper)


def _relax_piecewise_linear(bounds: Interval, relu_lower: SlopeFn, below: float, above: float) -> Lines:
    lower, upper = bounds
    is_on, is_off = lower >= 0, upper <= 0
    is_unstable = ~(is_on | is_off)
    # On stable neurons the safe interval [-1, 1] stands in, so that neither value nor gradient is ever infinite.
    safe_lower, safe_upper = jnp.where(is_unstable, lower, -1.0), jnp.where(is_unstable, upper, 1.0)
    width = jnp.maximum(safe_upper - safe_lower, _NARROW)
    chord = (above * safe_upper - below * safe_lower) / width
    chord_bias = (below - above) * safe_lower * safe_upper / width
    line = below + (above - below) * relu_lower(safe_lower, safe_upper)
    exact = jnp.where(is_on, jnp.full_like(lower, above), jnp.full_like(lower, below))
    chord_line = (jnp.where(is_unstable, chord, exact), jnp.where(is_unstable, chord_bias, 0.0))
    free_line = (jnp.where(is_unstable, line, exact), jnp.zeros_like(lower))
    # Convex: any line through the kink is below, the chord above. Concave: the other way round.
    return Lines(*free_line, *chord_line) if above >= below else Lines(*chord_line, *free_line)


def _logistic_slope(x: Array) -> Array:
    return lax.logistic(x) * lax.logistic(-x)


def _tanh_slope(x: Array) -> Array:
    return 1.0 - jnp.square(jnp.tanh(x))


# Increasing, convex below 0 and concave above, with f(-x) = 2 f(0) - f(x): value, derivative, f(0).
_S_SHAPED: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array], float]] = {
    "logistic": (lax.logistic, _logistic_slope, 0.5),
    "tanh": (jnp.tanh, _tanh_slope, 0.0),
}


def _relax_s_shaped(bounds: Interval, fn: Callable, slope: Callable, at_zero: float) -> Lines:
    lower, upper = bounds
    upper_slope, upper_bias = _line_above(lower, upper, fn, slope)
    # f(x) = 2 f(0) - f(-x): the lower line is the upper one of the mirrored interval, turned about (0, f(0)).
    lower_slope, mirrored_bias = _line_above(-upper, -lower, fn, slope)
    return Lines(lower_slope, 2.0 * at_zero - mirrored_bias, upper_slope, upper_bias)


def _line_above(lower: Array, upper: Array, fn: Callable, slope: Callable) -> tuple[Array, Array]:
    """Finds a line above an S-shaped function (convex below 0, concave above) on `[lower, upper]`.

    It is the chord if the tangent at `upper` passes below `(lower, f(lower))`; else a tangent at some `d >= 0`: the
    one through `(lower, f(lower))` if `lower < 0`, and the one at the midpoint if the whole interval is concave.
    """
    is_point = upper - lower < 1e-6
    width = jnp.where(is_point, 1.0, upper - lower)
    chord = jnp.where(is_point, slope(upper), (fn(upper) - fn(lower)) / width)

    def gap(d: Array) -> Array:  # height of the tangent at d over the curve at the lower end; falls as d shrinks
        return fn(d) + slope(d) * (lower - d) - fn(lower)

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = bracket
        middle = 0.5 * (left + right)
        is_above = gap(middle) >= 0
        return jnp.where(is_above, left, middle), jnp.where(is_above, middle, right)

    start = (jnp.zeros_like(upper), jnp.maximum(upper, 0.0))
    _, touch = lax.stop_gradient(lax.fori_loop(0, _NUM_BISECTIONS, halve, lax.stop_gradient(start)))
    is_concave = lower >= 0
    point = jnp.where(is_concave, 0.5 * (lower + upper), _implicit(touch, gap))
    is_chord = (upper <= 0) | (~is_concave & (gap(upper) <= 0)) | is_point
    k = jnp.where(is_chord, chord, slope(point))
    # The upper end is the reference of the chord: both ends lie on it, and rounding errs where f is largest.
    anchor = jnp.where(is_chord, upper, point)
    return k, fn(anchor) - k * anchor


def _implicit(root: Array, residual: Callable[[Array], Array]) -> Array:
    """Gives a root found by bisection the gradient of the implicit function theorem, `-dr / (dr/dx)`."""
    value, derivative = jax.jvp(residual, (root,), (jnp.ones_like(root),))
    derivative = lax.stop_gradient(jnp.where(jnp.abs(derivative) > 1e-6, derivative, 1.0))
    correction = value / derivative
    return root - (correction - lax.stop_gradient(correction))


def check(ops: tuple[graph.Op, ...]) -> None:
    """Raises on the first operation that no rule covers.

    Raises:
        UnsupportedPrimitiveError: naming the primitive, the user's line and what is supported; also where a perturbed
            value is narrower than float32.
    """
    for op in ops:
        if any(_is_narrow(node) for node in (*op.nodes, *op.outputs)):
            raise graph.UnsupportedPrimitiveError(
                f"{op.name!r} at {op.source} computes a perturbed value in half precision, whose rounding no bound "
                "covers: evaluate the model in float32, such as with dtype=jnp.float32 in its layers."
            )
        if op.is_affine or op.name == graph.PIECEWISE_LINEAR or op.name in _S_SHAPED:
            continue
        reason = "of two perturbed values" if op.name in graph.BILINEAR else "of a perturbed value"
        reason = "by a perturbed value" if op.name == "div" else reason
        supported = sorted({*graph.AFFINE, *_S_SHAPED, "abs", "max", "min", "stop_gradient"})
        raise graph.UnsupportedPrimitiveError(
            f"Bounds have no rule for primitive {op.name!r} {reason}, at {op.source}. Rewrite the function with "
            f"supported primitives: {', '.join(supported)}."
        )


def _is_narrow(node: graph.Node) -> bool:
    return jnp.issubdtype(node.dtype, jnp.floating) and jnp.finfo(node.dtype).bits < 32
