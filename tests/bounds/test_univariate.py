"""Elementwise functions: the lines of every rule enclose the function, and few lines could be better."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rdx import bounds
from rdx.balls import Ball
from rdx.bounds import arithmetic, composites, graph, relaxations, tracing
from rdx.bounds.interval import Interval

NUM = 60
# Name -> function and the range in which intervals are drawn.
CASES = {
    "exp": (jnp.exp, -3.0, 3.0), "log": (jnp.log, 0.1, 8.0), "log1p": (jnp.log1p, -0.8, 5.0),
    "sqrt": (jnp.sqrt, 0.01, 5.0), "rsqrt": (lax.rsqrt, 0.2, 5.0), "square": (jnp.square, -3.0, 3.0),
    "fourth_power": (lambda x: x**4, -2.0, 2.0), "cosh": (jnp.cosh, -2.0, 2.0),
    "reciprocal": (lambda x: 1.0 / x, 0.3, 4.0),
    "reciprocal_below_zero": (lambda x: 1.0 / x, -4.0, -0.3), "cube": (lambda x: x**3, -2.0, 2.0),
    "inverse_cube": (lambda x: x**-3, 0.4, 2.0), "power": (lambda x: x**2.5, 0.2, 3.0), "sin": (jnp.sin, -7.0, 7.0),
    "cos": (jnp.cos, -7.0, 7.0), "tan": (jnp.tan, -1.3, 1.3), "sinh": (jnp.sinh, -2.0, 2.0),
    "product_with_sine": (lambda x: x * jnp.sin(x), -6.0, 6.0), "bump": (lambda x: jnp.exp(-x * x), -3.0, 3.0),
    "gelu": (jax.nn.gelu, -5.0, 4.0), "gelu_exact": (lambda x: jax.nn.gelu(x, approximate=False), -5.0, 4.0),
    "silu": (jax.nn.silu, -6.0, 5.0), "mish": (jax.nn.mish, -6.0, 4.0), "softplus": (jax.nn.softplus, -5.0, 5.0),
    "elu": (jax.nn.elu, -4.0, 3.0), "hard_tanh": (jax.nn.hard_tanh, -2.0, 2.0),
    "hard_silu": (jax.nn.hard_silu, -5.0, 5.0), "soft_sign": (jax.nn.soft_sign, -4.0, 4.0),
    "quotient": (lambda x: x / (1.0 + x * x), -4.0, 4.0),
}
# How far the bounds may be from the best ones, as a share of the function's spread, where that is above 1/500: kinks
# that interval arithmetic has to take for jumps, derivatives whose code overestimates, a tangent that is kept positive.
ROUGH = {
    "softplus": 0.02, "elu": 0.05, "hard_tanh": 0.1, "mish": 0.02, "hard_silu": 0.05, "soft_sign": 0.05, "exp": 0.2,
    "gelu": 0.02, "quotient": 0.02, "product_with_sine": 0.01,
}


def operation(fn):
    """Traces a function as a single operation: a rule's, or all of it as a composite."""
    traced = tracing.trace(fn, jnp.ones((NUM,)))
    ops = composites.fuse(traced, relaxations.has_rule).ops
    return ops[0] if len(ops) == 1 else composites.composite(traced.inputs[0], traced.ops)


def draw(low, high, num=NUM):
    random = np.random.default_rng(0)
    ends = np.sort(random.uniform(low, high, size=(num, 2)), axis=1)
    narrow = ends[: num // 3].mean(axis=1)
    width = 10.0 ** random.uniform(-6.0, -1.0, size=len(narrow))
    ends[: num // 3] = np.clip(np.stack([narrow - width, narrow + width], axis=1), low, high)
    ends[0, 1] = ends[0, 0]
    return Interval(*jnp.asarray(ends.T, jnp.float32))


def envelope(points, values, at):
    """Computes the greatest convex function below the points, at one place."""
    hull = []
    for x, y in zip(points, values, strict=True):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return np.interp(at, *np.transpose(hull))


@pytest.mark.parametrize("name", CASES)
def test_lines_enclose_and_are_nearly_the_best(name):
    fn, low, high = CASES[name]
    x = draw(low, high)
    op = operation(fn)
    lower_slope, lower_bias, upper_slope, upper_bias = (
        np.asarray(value, np.float64)[:, None]
        for lines in [jax.jit(lambda x: relaxations.relax(op, [x], relaxations.adaptive))(x)]
        for value in (*lines.lower_slopes, lines.lower_bias, *lines.upper_slopes, lines.upper_bias)
    )
    image = jax.jit(lambda x: relaxations.propagate(op, [x]))(x)
    ends = np.asarray(x, np.float64)
    points = ends[0][:, None] + (ends[1] - ends[0])[:, None] * np.linspace(0.0, 1.0, 401)
    with jax.enable_x64(True):
        values = np.asarray(fn(jnp.asarray(points)))
    scale = np.abs(values).max(axis=1, keepdims=True) + np.abs(lower_slope * points).max(axis=1, keepdims=True)
    rounding = 2e-6 * (1.0 + scale)
    lower, upper = lower_slope * points + lower_bias, upper_slope * points + upper_bias
    assert (lower <= values + rounding).all()
    assert (upper >= values - rounding).all()
    assert (np.asarray(image.lower)[:, None] <= values + rounding).all()
    assert (np.asarray(image.upper)[:, None] >= values - rounding).all()
    spread = values.max(axis=1) - values.min(axis=1)
    allowance = rounding[:, 0] + ROUGH.get(name, 2e-3) * spread
    assert (values.min(axis=1) - image.lower <= allowance).all()
    assert (image.upper - values.max(axis=1) <= allowance).all()
    for i, middle in enumerate(ends.mean(axis=0)):
        best = envelope(points[i], values[i], middle), -envelope(points[i], -values[i], middle)
        assert best[0] - lower[i, 200] <= allowance[i] + 2e-5 * spread[i]
        assert upper[i, 200] - best[1] <= allowance[i] + 2e-5 * spread[i]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite(name):
    fn, low, high = CASES[name]
    op, x = operation(fn), draw(low, high)

    def ends(x):
        lines = relaxations.relax(op, [x], relaxations.adaptive)
        return (*lines.lower_slopes, lines.lower_bias, *lines.upper_slopes, lines.upper_bias,
                *relaxations.propagate(op, [x]))

    @jax.jit
    def gradients(x):
        # One cotangent for each result, so that infinities cannot cancel.
        found, pull = jax.vjp(ends, x)
        zeros = [jnp.zeros_like(value) for value in found]
        return [pull((*zeros[:i], jnp.ones_like(found[i]), *zeros[i + 1 :])) for i in range(len(found))]

    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients(x)))


@pytest.mark.parametrize(("name", "fn"), [("mul", np.multiply), (graph.POOL, np.maximum)])
def test_planes_of_two_inputs_enclose(name, fn):
    random = np.random.default_rng(0)
    ends = np.sort(random.normal(size=(2, 500, 2)) * random.choice([0.1, 1.0, 3.0], size=(1, 500, 1)), axis=2)
    ends = np.asarray(ends, np.float32)
    nodes = tuple(graph.Node((500,), jnp.float32) for _ in range(2))
    op = graph.Op(name, lambda a, b: (lax.mul(a, b) if name == "mul" else lax.max(a, b),), nodes, nodes[:1], {}, "")
    inputs = [Interval(*jnp.asarray(ends[i].T)) for i in range(2)]
    lines, image = relaxations.relax(op, inputs, relaxations.adaptive), relaxations.propagate(op, inputs)
    shares = np.stack(np.meshgrid(*[np.linspace(0.0, 1.0, 9)] * 2), axis=-1).reshape(-1, 2)
    x, y = (ends[i, :, :1] + (ends[i, :, 1:] - ends[i, :, :1]) * shares[:, i][None] for i in range(2))
    values = fn(x, y)

    def plane(slopes, bias):
        return np.asarray(slopes[0])[:, None] * x + np.asarray(slopes[1])[:, None] * y + np.asarray(bias)[:, None]

    gap = values - plane(lines.lower_slopes, lines.lower_bias), plane(lines.upper_slopes, lines.upper_bias) - values
    for side in gap:
        assert (side >= -1e-5).all()
        assert (side.min(axis=1) <= 1e-5).mean() > 0.9
    np.testing.assert_allclose(image.lower, values.min(axis=1), atol=1e-5)
    np.testing.assert_allclose(image.upper, values.max(axis=1), atol=1e-5)


@pytest.mark.parametrize("fn", [jnp.log, jnp.sqrt, lax.rsqrt, lambda x: 1.0 / x, lambda x: x**-2, jnp.arcsin, jnp.tan])
def test_outside_of_its_domain_nothing_is_certified(fn):
    region = Ball("linf", 2.0, -jnp.inf, jnp.inf).region(jnp.array([[0.5]]))
    for method in (bounds.ibp, bounds.crown_ibp, bounds.crown):
        found = method(lambda x: 5.0 + 0.1 * fn(x), region)
        assert not (jnp.isfinite(found.lower) | jnp.isfinite(found.upper)).any()


@pytest.mark.parametrize("is_sane", [
    lambda x: ~jnp.isnan(jnp.log(x)), lambda x: jnp.isfinite(jnp.log(x)), lambda x: jnp.isfinite(1.0 / x),
    lambda x: jnp.isfinite(jnp.where(x > 0.0, x, 0.0) * jnp.where(jnp.arange(1) == 0, jnp.log(x), 1.0)),
])
def test_what_tracing_takes_to_be_finite_has_to_be(is_sane):
    def fn(x):
        return jnp.where(is_sane(x), 1.0, -1.0) + 0.001 * jnp.maximum(x, 0.1)

    x = jnp.array([[0.6], [2.0]])
    region = Ball("linf", 0.9, -jnp.inf, jnp.inf).region(x)
    for method in (bounds.ibp, bounds.forward, bounds.crown_ibp, bounds.crown, bounds.alpha_crown):
        found = method(fn, region)
        assert not (jnp.isfinite(found.lower[0]) | jnp.isfinite(found.upper[0])).any()
        np.testing.assert_allclose(jnp.stack(found)[:, 1, 0], [1.0011, 1.0029], atol=1e-6)
    first = Ball("linf", 0.9, -jnp.inf, jnp.inf).region(x[:1])
    assert bounds.verify(fn, first, split="input", max_domains=64).verdict != "certified"


@pytest.mark.parametrize("step", [
    lambda x: jnp.where(x > 0.0, 1.0 - x, -x),
    lambda x: (1.0 - x) * (x > 0.0).astype(x.dtype) + x * (x <= 0.0).astype(x.dtype) * -1.0,
])
def test_a_function_that_jumps(step):
    # It falls on either side of the jump, so that its values at the ends of a cell say nothing of its top.
    region = Ball("linf", 1.0, -jnp.inf, jnp.inf).region(jnp.array([[0.51]]))
    for method in (bounds.ibp, bounds.crown_ibp, bounds.crown):
        found = method(step, region)
        assert float(found.lower[0, 0]) <= -0.509
        assert 1.0 <= float(found.upper[0, 0]) <= 1.1
        assert float(found.lower[0, 0]) >= -0.6


def test_a_function_of_several_values_of_one_example():
    # Constants of an example inside a composite: x sin(c x).
    c = jnp.array([1.0, 3.0])
    region = Ball("linf", 0.3, -jnp.inf, jnp.inf).region(jnp.array([[0.2], [0.9]]))
    fn = lambda x, c: x * jnp.sin(c[:, None] * x)
    points = jnp.linspace(-0.3, 0.3, 1001)[:, None, None] + region.center[None]
    values = jax.vmap(fn, in_axes=(0, None))(points, c)
    for method in (bounds.ibp, bounds.crown_ibp, bounds.crown):
        found = method(fn, region, c)
        assert (found.lower <= values.min(axis=0) + 1e-6).all()
        assert (found.upper >= values.max(axis=0) - 1e-6).all()
        assert (found.upper - found.lower <= 1.01 * (values.max(axis=0) - values.min(axis=0)) + 1e-6).all()


def test_register(monkeypatch):
    for module in (arithmetic, relaxations):
        monkeypatch.setattr(module, "RULES", dict(module.RULES))
    fn = lambda x: lax.lgamma(x).sum(axis=1, keepdims=True)
    region = Ball("linf", 0.5, -jnp.inf, jnp.inf).region(jnp.array([[3.0, 4.0]]))
    with pytest.raises(bounds.UnsupportedPrimitiveError, match="lgamma"):
        bounds.crown(fn, region)

    @bounds.register("lgamma", interval=lambda op, x: bounds.Interval(*op.fn(x.lower), *op.fn(x.upper)))
    def lgamma(op, x):
        return relaxations.convex(op, x)

    found = bounds.crown(fn, region)
    np.testing.assert_allclose(found.upper, fn(region.upper), rtol=1e-5)
    assert (found.lower <= fn(region.lower) + 1e-5).all()
    np.testing.assert_allclose(found.lower, fn(region.lower), atol=0.1)
