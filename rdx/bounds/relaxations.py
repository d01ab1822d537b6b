"""Relaxations: how each nonlinear operation bends an interval, and the two planes that enclose it.

A relaxation of `f` on a box is a pair of planes with `lower_slope x + lower_bias <= f(x) <= upper_slope x +
upper_bias` there (Zhang et al. 2018, CROWN, arXiv:1811.00866, Theorem 3.2), elementwise; an operation of several
perturbed inputs has a slope for each. Every division is guarded in both branches of its `where`, so gradients stay
finite on degenerate intervals.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from rdx.bounds import arithmetic, composites, graph, univariate
from rdx.bounds.interval import Interval
from rdx.types import Array

# Bisections for tangent points: the bracket is at most the width of the interval, 30 halvings leave float32 rounding.
_NUM_BISECTIONS = 30
# Divisors are at least this: gradients divide by the square, which must not vanish in float32.
_NARROW = 1e-15


class Lines(NamedTuple):
    """Two planes that enclose an elementwise function over a box.

    Attributes:
        lower_slopes: slope of the lower plane along each perturbed input.
        lower_bias: its value at 0.
        upper_slopes: slope of the upper plane along each perturbed input.
        upper_bias: its value at 0.
    """

    lower_slopes: tuple[Array, ...]
    lower_bias: Array
    upper_slopes: tuple[Array, ...]
    upper_bias: Array

    @property
    def are_parallel(self) -> bool:
        """Whether both planes have the same slopes by construction, such as those of `same_slope`."""
        return all(lower is upper for lower, upper in zip(self.lower_slopes, self.upper_slopes, strict=True))


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


def relax(op: graph.Op, inputs: Sequence[Interval], relu_lower: SlopeFn) -> Lines:
    """Encloses a nonlinear operation between two planes.

    Args:
        op: a nonlinear operation of a graph.
        inputs: bounds of its perturbed inputs.
        relu_lower: the choice of the lower slope of unstable piecewise-linear functions.

    Returns:
        The planes, elementwise.
    """
    if op.name == graph.PIECEWISE_LINEAR:
        (bounds,) = inputs
        return _piecewise_linear(op, bounds, relu_lower)
    return RULES[op.name](op, *inputs)


def propagate(op: graph.Op, inputs: Sequence[Interval]) -> Interval:
    """Bounds a nonlinear operation over intervals of its perturbed inputs."""
    if op.name in _IMAGES:
        return _IMAGES[op.name](op, *inputs)
    perturbed = iter(inputs)
    values = [next(perturbed) if isinstance(v, graph.Node) else Interval(v, v) for v in op.inputs]
    return arithmetic.evaluate(op, values)[0]


def share(bounds: Interval, relu_lower: SlopeFn) -> Array:
    """Computes the share of the slope above the kink that a rule gives the free line of an unstable neuron."""
    lower, upper = _unstable_ends(bounds)
    return relu_lower(lower, upper)


def free_slope(op: graph.Op, bounds: Interval, share: Array | float) -> Array:
    """Computes the slope `below + (above - below) share` of the line through the kink; a stable neuron has but one."""
    below, above = op.params["below"], op.params["above"]
    exact = jnp.where(bounds.lower >= 0, jnp.full_like(bounds.lower, above), jnp.full_like(bounds.lower, below))
    return jnp.where(is_unstable(bounds), below + (above - below) * share, exact)


def is_unstable(bounds: Interval) -> Array:
    """Tells where a function with one kink is not sure to be linear; that includes NaN, which must not get lost."""
    return ~((bounds.lower >= 0) | (bounds.upper <= 0))


def _unstable_ends(bounds: Interval) -> Interval:
    # On stable neurons the safe interval [-1, 1] stands in, so that neither value nor gradient is ever infinite.
    bends = is_unstable(bounds)
    return Interval(jnp.where(bends, bounds.lower, -1.0), jnp.where(bends, bounds.upper, 1.0))


def _piecewise_linear(op: graph.Op, bounds: Interval, relu_lower: SlopeFn) -> Lines:
    below, above = op.params["below"], op.params["above"]
    lower, upper = _unstable_ends(bounds)
    width = jnp.maximum(upper - lower, _NARROW)
    free = free_slope(op, bounds, share(bounds, relu_lower))
    bends = is_unstable(bounds)
    chord = jnp.where(bends, (above * upper - below * lower) / width, free)
    chord_bias = jnp.where(bends, (below - above) * lower * upper / width, 0.0)
    if relu_lower is same_slope:
        free = chord  # equal up to rounding, and known to be
    free_line, chord_line = (free, jnp.zeros_like(lower)), (chord, chord_bias)
    # Convex: any line through the kink is below, the chord above. Concave: the other way round.
    lower_line, upper_line = (free_line, chord_line) if above >= below else (chord_line, free_line)
    return _line(*lower_line, *upper_line)


def _line(lower_slope: Array, lower_bias: Array, upper_slope: Array, upper_bias: Array) -> Lines:
    return Lines((lower_slope,), lower_bias, (upper_slope,), upper_bias)


def _turned(lines: Lines) -> Lines:
    """Turns the lines of `f` about the origin: those of `-f(-x)`."""
    return Lines(lines.upper_slopes, -lines.upper_bias, lines.lower_slopes, -lines.lower_bias)


def _value_and_slope(op: graph.Op, x: Array) -> tuple[Array, Array]:
    return jax.jvp(lambda v: op.fn(v)[0], (x,), (jnp.ones_like(x),))


def convex(op: graph.Op, x: Interval) -> Lines:
    """Encloses a convex function between a tangent in the middle and the chord; for `register`."""
    middle = x.center
    if op.name == "exp":
        # Near the lower end the tangent stays positive, as what is divided by or put into a logarithm has to.
        middle = jnp.minimum(middle, x.lower + 0.99)
    value, slope = _value_and_slope(op, middle)
    (at_lower,), (at_upper,) = op.fn(x.lower), op.fn(x.upper)
    width = x.upper - x.lower
    is_narrow = width < 1e-6 * (1.0 + jnp.abs(middle))
    chord = jnp.where(is_narrow, slope, (at_upper - at_lower) / jnp.where(is_narrow, 1.0, width))
    chord_bias = jnp.maximum(at_lower - chord * x.lower, at_upper - chord * x.upper)
    return _line(slope, value - slope * middle, chord, chord_bias)


def concave(op: graph.Op, x: Interval) -> Lines:
    """Encloses a concave function between the chord and a tangent in the middle; for `register`."""
    negative = dataclasses.replace(op, fn=lambda v: (-op.fn(v)[0],))
    lower, lower_bias, upper, upper_bias = convex(negative, x)
    return Lines((-upper[0],), -upper_bias, (-lower[0],), -lower_bias)


def _power(op: graph.Op, x: Interval) -> Lines:
    """Encloses an even power, or the reciprocal, which is convex above 0 and turned about the origin below."""
    if op.params["y"] > 0:
        return convex(op, x)
    is_negative = x.upper < 0
    mirrored = Interval(jnp.where(is_negative, -x.upper, x.lower), jnp.where(is_negative, -x.lower, x.upper))
    above = convex(op, mirrored)
    return jax.tree.map(lambda turned, kept: jnp.where(is_negative, turned, kept), _turned(above), above)


def _product(op: graph.Op, x: Interval, y: Interval) -> Lines:
    """Encloses `x y` (McCormick 1976): `(x - lx)(y - ly) >= 0` and `(x - lx)(uy - y) >= 0`."""
    del op
    return Lines((y.lower, x.lower), -x.lower * y.lower, (y.upper, x.lower), -x.lower * y.upper)


def _pool(op: graph.Op, *inputs: Interval) -> Lines:
    """Encloses the largest of several values: below by that of the greatest center, above by one that is sure to win.

    Of the planes `x_i` below, that of the greatest center is the highest on average. Where no value is sure to win, the
    upper plane is constant.
    """
    del op
    lower, upper = (jnp.stack(ends) for ends in zip(*inputs, strict=True))
    places = jnp.arange(len(inputs)).reshape(-1, *(1,) * (lower.ndim - 1))
    is_first = places == jnp.argmax(lower + upper, axis=0)[None]
    others = jnp.where(is_first, -jnp.inf, upper).max(axis=0)
    is_sure = jnp.where(is_first, lower, -jnp.inf).max(axis=0) >= others
    slopes = tuple(is_first.astype(lower.dtype))
    zero = jnp.zeros_like(others)
    return Lines(
        slopes, zero, tuple(jnp.where(is_sure, slope, 0.0) for slope in slopes),
        jnp.where(is_sure, 0.0, upper.max(axis=0)),
    )


def _logsumexp(op: graph.Op, *inputs: Interval) -> Lines:
    """Encloses `log sum_j exp x_j`: below by its tangent in the middle, above by that of the log of a sum of chords.

    These are the bounds of Wei et al. (2023, arXiv:2303.01713) for the sum in a softmax.
    """
    lower, upper = (jnp.stack(ends) for ends in zip(*inputs, strict=True))
    width, largest = upper - lower, upper.max(axis=0)
    middle = lower + 0.5 * width  # a mask may be the lowest number there is
    (at_middle,) = op.fn(*middle)
    tangent = jnp.exp(middle - at_middle[None])
    at_lower, at_upper = jnp.exp(lower - largest[None]), jnp.exp(upper - largest[None])
    # Over less than this a chord has the slope of the tangent, up to rounding.
    is_narrow = width < 1e-3
    chord = (at_upper - at_lower) / jnp.where(is_narrow, 1.0, width)
    chord = jnp.where(is_narrow, jnp.exp(middle - largest[None]), chord)
    total = 0.5 * (at_lower + at_upper).sum(axis=0)
    slopes = chord / total[None]
    upper_bias = largest + jnp.log(total) - (slopes * middle).sum(axis=0)
    return Lines(tuple(tangent), at_middle - (tangent * middle).sum(axis=0), tuple(slopes), upper_bias)


def s_shaped(op: graph.Op, x: Interval) -> Lines:
    """Encloses an increasing function that is convex below 0 and concave above, with `f(-x) = 2 f(0) - f(x)`."""
    fn = lambda v: _value_and_slope(op, v)[0]
    slope = lambda v: _value_and_slope(op, v)[1]
    upper = _line_above(x.lower, x.upper, fn, slope)
    # f(x) = 2 f(0) - f(-x): the lower line is the upper one of the mirrored interval, turned about (0, f(0)).
    lower_slope, mirrored_bias = _line_above(-x.upper, -x.lower, fn, slope)
    return _line(lower_slope, 2.0 * fn(jnp.zeros_like(x.lower)) - mirrored_bias, *upper)


def _line_above(lower: Array, upper: Array, fn: Callable, slope: Callable) -> tuple[Array, Array]:
    """Finds a line above an S-shaped function (convex below 0, concave above) on `[lower, upper]`.

    It is the chord if the tangent at `upper` passes below `(lower, f(lower))`. Else it is the tangent at the midpoint,
    of all lines the lowest there, if that is above the curve at `lower`; and if not, the one through
    `(lower, f(lower))`, which touches the curve further right.
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
    point = jnp.maximum(_implicit(touch, gap), 0.5 * (lower + upper))
    is_chord = (upper <= 0) | ((lower < 0) & (gap(upper) <= 0)) | is_point
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


RULES: dict[str, Callable[..., Lines]] = {
    **dict.fromkeys(("cosh", "exp", "exp2", "expm1", "rsqrt", "square"), convex),
    **dict.fromkeys(("acosh", "log", "log1p", "sqrt"), concave),
    **dict.fromkeys(("asinh", "atan", "erf", "logistic", "tanh"), s_shaped),
    "integer_pow": _power, "mul": _product, graph.POOL: _pool, graph.LOGSUMEXP: _logsumexp,
    composites.COMPOSITE: lambda op, x: _line(*univariate.lines(op, x)),
}
# Ranges of what is no primitive.
_IMAGES: dict[str, Callable[..., Interval]] = {composites.COMPOSITE: univariate.image}


def register(
    name: str, interval: Callable[..., Interval]
) -> Callable[[Callable[..., Lines]], Callable[..., Lines]]:
    """Adds a primitive to what bounds cover.

        @bounds.register("lgamma", interval=lambda op, x: bounds.Interval(*op.fn(x.lower), *op.fn(x.upper)))
        def lgamma(op, x):  # of x >= 2, where it is convex and increasing
            return bounds.relaxations.convex(op, x)

    Both rules take the operation and an interval for each perturbed input; `op.fn(*arrays)` evaluates it and returns a
    tuple, `op.params` are the primitive's. A rule that is wrong makes every bound wrong: sample it.

    Args:
        name: the primitive's name, as the error about its absence says it.
        interval: `(op, *inputs) -> Interval`, the range over a box.

    Returns:
        A decorator for `(op, *inputs) -> Lines`, the planes that enclose it over a box.
    """

    def add(lines: Callable[..., Lines]) -> Callable[..., Lines]:
        arithmetic.RULES[name], RULES[name] = interval, lines
        return lines

    return add


def has_rule(op: graph.Op) -> bool:
    """Tells whether a nonlinear operation has lines of its own."""
    if op.name == "integer_pow":
        return op.params["y"] == -1 or (op.params["y"] > 0 and op.params["y"] % 2 == 0)
    return op.name == graph.PIECEWISE_LINEAR or op.name in RULES


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
        if op.is_affine or has_rule(op):
            continue
        reason = "of several perturbed values" if len(op.nodes) > 1 else "of a perturbed value"
        rewritten = {
            "abs", "clamp", "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "scan",
            "stop_gradient",
        }
        made_up = {graph.LOGSUMEXP, graph.PIECEWISE_LINEAR, graph.POOL}
        supported = sorted({*graph.AFFINE, *arithmetic.RULES, *rewritten} - made_up)
        raise graph.UnsupportedPrimitiveError(
            f"Bounds have no rule for primitive {op.name!r} {reason}, at {op.source}. Add one with bounds.register, or "
            f"rewrite the function with supported primitives: {', '.join(supported)}."
        )


def _is_narrow(node: graph.Node) -> bool:
    return jnp.issubdtype(node.dtype, jnp.floating) and jnp.finfo(node.dtype).bits < 32
