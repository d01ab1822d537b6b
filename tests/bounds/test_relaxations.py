"""The two lines of every nonlinear function, on intervals of every kind."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import logsumexp

from rdx import bounds as bounds_of
from rdx.balls import Ball
from rdx.bounds import graph, relaxations, tracing
from rdx.bounds.interval import Interval

SLOPES = {
    name: getattr(relaxations, name) for name in ("adaptive", "same_slope", "zero_slope", "one_slope")
}
PIECEWISE = [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (0.2, 1.0), (2.0, 0.5), (-0.5, -2.0), (-2.0, -0.5)]
S_SHAPED = {"tanh": np.tanh, "logistic": lambda x: 0.5 * (1.0 + np.tanh(0.5 * x))}


def piecewise_op(below, above):
    node = graph.Node((1,), jnp.float32)
    fn = lambda x: (graph.piecewise_linear(x, below, above),)
    return graph.Op(graph.PIECEWISE_LINEAR, fn, (node,), (node,), {"below": below, "above": above}, "")


def bent(below, above, x):
    return np.where(x > 0, above * x, below * x)


def s_shaped_op(name):
    (op,) = tracing.trace({"tanh": jnp.tanh, "logistic": jax.nn.sigmoid}[name], jnp.zeros((1, 1))).ops
    assert op.name == name
    return op


# Name -> builder of the operation, and the function in float64.
CASES = {
    f"{below},{above}": (partial(piecewise_op, below, above), partial(bent, below, above))
    for below, above in PIECEWISE
} | {name: (partial(s_shaped_op, name), fn) for name, fn in S_SHAPED.items()}


def intervals():
    """Draws intervals of all sizes, on both sides of 0 and around it, some of them points."""
    random = np.random.default_rng(0)
    centers = random.normal(size=600) * np.repeat([0.1, 1.0, 5.0], 200)
    widths = 10.0 ** random.uniform(-7.0, 1.0, size=600)
    widths[::50] = 0.0
    lower, upper = list(centers - widths / 2), list(centers + widths / 2)
    special = [
        (-50.0, 50.0), (-50.0, 0.1), (-0.1, 50.0), (-50.0, -49.0), (30.0, 50.0), (0.0, 0.0), (-1.0, 0.0), (0.0, 1.0),
        (-1e-7, 1e-7), (-1e-7, 3.0), (-3.0, 1e-7), (0.0, 1e-7), (1.0, 1.0 + 1e-6), (-50.0, 1e-3), (-2.0, 2.0),
        (-1e-30, 1e-30), (-1e-30, 1.0), (20.0, 20.0),
    ]
    special_lower, special_upper = zip(*special, strict=True)
    return Interval(*(jnp.asarray(ends, jnp.float32) for ends in ([*lower, *special_lower], [*upper, *special_upper])))


def grid(interval, num=801):
    lower, upper = (np.asarray(end, np.float64)[:, None] for end in interval)
    return lower + (upper - lower) * np.linspace(0.0, 1.0, num)[None]


def flat(lines):
    """Lists slope and bias of the lower line, then of the upper one, of a function of one input."""
    return [*lines.lower_slopes, lines.lower_bias, *lines.upper_slopes, lines.upper_bias]


def evaluate(lines, points):
    """Evaluates both lines in float64 and how far float32 may be off there."""
    lower_slope, lower_bias, upper_slope, upper_bias = (
        np.broadcast_to(np.asarray(value, np.float64), points.shape[:1])[:, None] for value in flat(lines)
    )
    rounding = 4e-7 * (1.0 + np.abs(points) * np.maximum(np.abs(lower_slope), np.abs(upper_slope)))
    return lower_slope * points + lower_bias, upper_slope * points + upper_bias, rounding


@pytest.mark.parametrize("relu_lower", SLOPES)
@pytest.mark.parametrize("name", CASES)
def test_lines_enclose_and_touch(name, relu_lower):
    if name in S_SHAPED and relu_lower != "adaptive":
        pytest.skip("slopes are a choice of piecewise-linear functions only")
    build, fn = CASES[name]
    bounds = intervals()
    points = grid(bounds)
    lower, upper, rounding = evaluate(relaxations.relax(build(), [bounds], SLOPES[relu_lower]), points)
    values = fn(points)
    assert (lower <= values + rounding).all()
    assert (upper >= values - rounding).all()
    # Each line meets the function somewhere: at an end, at the kink or (between grid points) at a tangent point.
    widths = points[:, -1] - points[:, 0]
    is_narrow = widths < 11.0
    allowance = rounding.max(axis=1) + (widths / 800.0) * 2.0
    assert ((values - lower).min(axis=1) <= allowance)[is_narrow].all()
    assert ((upper - values).min(axis=1) <= allowance)[is_narrow].all()


@pytest.mark.parametrize("name", CASES)
def test_interval_is_the_range(name):
    build, fn = CASES[name]
    bounds = intervals()
    values = fn(grid(bounds))
    image = relaxations.propagate(build(), [bounds])
    crosses = np.asarray((bounds.lower < 0) & (bounds.upper > 0))
    if name not in S_SHAPED:  # the kink lies between two points of the grid
        values = np.concatenate([values, np.where(crosses, 0.0, values[:, 0])[:, None]], axis=1)
    least, greatest = values.min(axis=1), values.max(axis=1)
    np.testing.assert_allclose(image.lower, least, rtol=1e-6, atol=2e-7)
    np.testing.assert_allclose(image.upper, greatest, rtol=1e-6, atol=2e-7)


def lines_of(op, lower, upper, relu_lower=relaxations.adaptive):
    lines = relaxations.relax(op, [Interval(jnp.array([lower]), jnp.array([upper]))], relu_lower)
    return [float(np.asarray(value).ravel()[0]) for value in flat(lines)]


@pytest.mark.parametrize(("relu_lower", "wide_right", "wide_left"), [
    ("adaptive", 1.0, 0.0), ("same_slope", 0.75, 0.25), ("zero_slope", 0.0, 0.0), ("one_slope", 1.0, 1.0),
])
def test_relu_by_hand(relu_lower, wide_right, wide_left):
    lines = partial(lines_of, piecewise_op(0.0, 1.0), relu_lower=SLOPES[relu_lower])
    np.testing.assert_allclose(lines(-1.0, 3.0), [wide_right, 0.0, 0.75, 0.75])
    np.testing.assert_allclose(lines(-3.0, 1.0), [wide_left, 0.0, 0.25, 0.75])
    np.testing.assert_allclose(lines(0.5, 3.0), [1.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(lines(-3.0, -0.5), [0.0, 0.0, 0.0, 0.0])


def test_absolute_value_by_hand():
    np.testing.assert_allclose(lines_of(piecewise_op(-1.0, 1.0), -1.0, 3.0), [1.0, 0.0, 0.5, 1.5])
    np.testing.assert_allclose(lines_of(piecewise_op(-1.0, 1.0), -3.0, -1.0), [-1.0, 0.0, -1.0, 0.0])


@pytest.mark.parametrize("name", S_SHAPED)
def test_s_shaped_lines_are_the_best_ones(name):
    fn = S_SHAPED[name]
    derivative = lambda x: (fn(x + 1e-5) - fn(x - 1e-5)) / 2e-5

    def chord(a, b):
        slope = (fn(b) - fn(a)) / (b - a)
        return slope, fn(a) - slope * a

    def tangent(d):
        return derivative(d), fn(d) - derivative(d) * d

    op = s_shaped_op(name)
    close = partial(np.testing.assert_allclose, rtol=0.0, atol=1e-5)
    # Convex: chord above, tangent at the midpoint below. Concave: the other way round.
    close(lines_of(op, -2.0, -0.5), [*tangent(-1.25), *chord(-2.0, -0.5)])
    close(lines_of(op, 0.5, 2.0), [*chord(0.5, 2.0), *tangent(1.25)])
    # Nearly convex: the chord is still above, and the tangent at the midpoint still below the upper end.
    close(lines_of(op, -3.0, 0.1), [*tangent(-1.45), *chord(-3.0, 0.1)])
    close(lines_of(op, -0.1, 3.0), [*chord(-0.1, 3.0), *tangent(1.45)])
    # Both curvatures: the upper line leaves the lower end as a tangent at some d > 0, and the function is odd.
    slope, bias = lines_of(op, -1.0, 1.2)[2:]
    close(slope * -1.0 + bias, fn(-1.0))
    points = np.linspace(0.0, 1.2, 20001)
    touch = points[(slope * points + bias - fn(points)).argmin()]
    assert 0.1 < touch < 1.2
    close(derivative(touch), slope, atol=1e-3)
    mirrored_slope, mirrored_bias = lines_of(op, -1.2, 1.0)[:2]
    close([mirrored_slope, mirrored_bias], [slope, 2.0 * fn(0.0) - bias])


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite(name):
    op = CASES[name][0]()
    bounds = intervals()
    for relu_lower in SLOPES.values():
        # One cotangent for each line, so that infinities cannot cancel.
        for part in range(4):
            line = lambda b, relu_lower=relu_lower, part=part: flat(relaxations.relax(op, [b], relu_lower))[part]
            for gradient in jax.jit(jax.grad(lambda b, line=line: line(b).sum()))(bounds):
                assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_differences(name):
    # Every branch: both chords, both implicit tangents, both midpoints.
    ends = np.array([
        (-2.0, -0.5), (0.5, 2.0), (-3.0, 0.1), (-0.1, 3.0), (-1.0, 2.0), (-2.0, 1.0), (-4.0, 4.3), (-0.9, 0.8),
    ])

    with jax.enable_x64(True):
        op = CASES[name][0]()

        def lines(ends):
            bounds = Interval(ends[:, 0], ends[:, 1])
            return jnp.stack(flat(relaxations.relax(op, [bounds], relaxations.same_slope)))

        step = 1e-4
        lines = jax.jit(lines)
        directions = np.eye(2)[:, None] * np.ones_like(ends)[None]
        for direction in directions:
            _, exact = jax.jvp(lines, (jnp.asarray(ends),), (jnp.asarray(direction),))
            difference = (lines(ends + step * direction) - lines(ends - step * direction)) / (2.0 * step)
            np.testing.assert_allclose(exact, difference, rtol=0.0, atol=1e-4)


def several_intervals():
    """Draws intervals of four values: of all widths, tied at their lower ends, points, one apart from the others."""
    random = np.random.default_rng(0)
    lower = random.normal(size=(4, 400)).round(1)
    upper = lower + random.choice([0.0, 1e-5, 0.1, 1.0, 20.0], size=lower.shape)
    lower[:, ::4] = 0.0  # what relus give
    upper[:, ::4] = np.maximum(random.normal(size=upper[:, ::4].shape), 0.0)
    lower[0, ::7] += 3.0
    upper[0, ::7] += 3.0
    return [Interval(*(jnp.asarray(end, jnp.float32) for end in ends)) for ends in zip(lower, upper, strict=True)]


@pytest.mark.parametrize(("name", "fn"), [
    (graph.POOL, lambda x: x.max(axis=0)),
    (graph.LOGSUMEXP, lambda x: np.log(np.exp(x - x.max(axis=0)).sum(axis=0)) + x.max(axis=0)),
])
def test_planes_enclose(name, fn):
    bounds = several_intervals()
    node = graph.Node((400,), jnp.float32)
    apply = {graph.POOL: lambda *x: (jnp.stack(x).max(0),), graph.LOGSUMEXP: lambda *x: (logsumexp(jnp.stack(x), 0),)}
    op = graph.Op(name, apply[name], (node,) * 4, (node,), {}, "")
    lines = relaxations.relax(op, bounds, relaxations.adaptive)
    lower, upper = (np.stack(ends).astype(np.float64) for ends in zip(*bounds, strict=True))
    corners = np.indices((2,) * 4).reshape(4, -1, 1)
    shares = np.concatenate([corners, np.random.default_rng(1).uniform(size=(4, 100, 1))], axis=1)
    points = lower[:, None] + shares * (upper - lower)[:, None]
    below, above = (
        (np.stack(slopes).astype(np.float64)[:, None] * points).sum(axis=0) + np.asarray(bias, np.float64)
        for slopes, bias in ((lines.lower_slopes, lines.lower_bias), (lines.upper_slopes, lines.upper_bias))
    )
    values = fn(points)
    # Float32 rounds biases of the size of the values, which are below 30.
    assert (below <= values + 1e-5).all()
    assert (above >= values - 1e-5).all()
    image = relaxations.propagate(op, bounds)
    np.testing.assert_allclose(image.lower, fn(lower), atol=1e-5)
    np.testing.assert_allclose(image.upper, fn(upper), atol=1e-5)
    # Not merely sound: exact where one value is sure to win, and at most the constant upper end elsewhere.
    if name == graph.POOL:
        is_sure = lower[0] >= upper[1:].max(axis=0)
        assert is_sure.sum() > 20
        np.testing.assert_array_equal(np.where(is_sure, above - below, 0.0), 0.0)
        assert (above <= upper.max(axis=0) + 1e-5).all()
    else:
        middle = fn(0.5 * (lower + upper)[:, None])[0]
        at_middle = (np.stack(lines.lower_slopes) * 0.5 * (lower + upper)).sum(axis=0) + np.asarray(lines.lower_bias)
        np.testing.assert_allclose(at_middle, middle, atol=1e-5)


@pytest.mark.parametrize("method", [bounds_of.ibp, bounds_of.crown_ibp, bounds_of.crown])
def test_maximum_of_a_dead_relu_and_a_live_one(method):
    # Both are at least 0, and the dead one is at most 0: that does not make it the larger.
    fn = lambda x: jnp.stack([jax.nn.relu(x - 2.0), jax.nn.relu(x)]).max(axis=0)
    found = method(fn, Ball("linf", 1.0, -jnp.inf, jnp.inf).region(jnp.zeros((1, 1))))
    np.testing.assert_allclose(jnp.concatenate(found), [[0.0], [1.0]], atol=1e-6)
