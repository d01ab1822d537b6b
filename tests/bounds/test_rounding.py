"""The proof against exact rational arithmetic: what float32 and float64 get wrong is never certified."""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import METHODS, inputs, mlp, mlp_params, weights
from jax.tree_util import Partial

from rdx import bounds, margins
from rdx.balls import Ball
from rdx.bounds import rounding
from rdx.evaluate import evaluate

each_method = pytest.mark.parametrize("method", METHODS)
UNBOUNDED = {"low": -jnp.inf, "high": jnp.inf}


def exact(values):
    """Turns a vector into fractions, without any rounding."""
    return [Fraction(float(value)) for value in values]


def exact_layers(params):
    return [([exact(row) for row in kernel], exact(bias)) for kernel, bias in params]


def affine(params, x):
    kernel, bias = params
    return [sum((a * row[j] for a, row in zip(x, kernel, strict=True)), b) for j, b in enumerate(bias)]


def relu(values):
    return [max(value, Fraction(0)) for value in values]


def exact_margin(params, label, lower, upper):
    """Minimises the margin of a relu net of one input: it is linear between the kinks, which are found layer by layer.

    `params` are exact, and so is the result.
    """
    points = [lower, upper]
    for depth in range(1, len(params)):
        hidden = lambda x, depth=depth: functools.reduce(
            lambda h, layer: affine(layer, relu(h)), params[1:depth], affine(params[0], [x])
        )
        kinks = []
        for left, right in itertools.pairwise(points):
            for a, b in zip(hidden(left), hidden(right), strict=True):
                if a * b < 0:
                    kinks.append(left + (right - left) * a / (a - b))
        points = sorted({*points, *kinks})
    logits = [functools.reduce(lambda h, p: affine(p, relu(h)), params[1:], affine(params[0], [x])) for x in points]
    return min(row[label] - z for row in logits for j, z in enumerate(row) if j != label)


def ill_conditioned(random):
    """Draws a net of one input whose weights span eight orders of magnitude and nearly cancel."""
    sizes = (1, 4, 4, 2)
    params = []
    for n_in, n_out in itertools.pairwise(sizes):
        kernel = random.normal(size=(n_in, n_out)) * 10.0 ** random.uniform(-4, 4, size=(n_in, n_out))
        if n_in > 1:  # a row that nearly undoes another one
            kernel[1] = -kernel[0] * (1.0 + 1e-6 * random.normal(size=n_out))
        params.append((kernel, random.normal(size=n_out) * 10.0 ** random.uniform(-4, 4, size=n_out)))
    return [(np.float32(kernel), np.float32(bias)) for kernel, bias in params]


def ends(x, eps):
    """Gives the ends of the ball with the radius as given and as rounded to float32, whichever are farther."""
    radius = Fraction(max(eps, float(np.float32(eps))))
    return Fraction(float(x)) - radius, Fraction(float(x)) + radius


def nearly_tied(seed, x, eps):
    """Shifts the last bias of a net until its exact margin is as close to 0 as float32 parameters allow."""
    params = ill_conditioned(np.random.default_rng(seed))
    for _ in range(3):
        least = exact_margin(exact_layers(params), 0, *ends(x, eps))
        kernel, bias = params[-1]
        params[-1] = (kernel, np.float32([float(Fraction(float(bias[0])) - least), bias[1]]))
    least = exact_margin(exact_layers(params), 0, *ends(x, eps))
    return [(jnp.asarray(kernel), jnp.asarray(bias)) for kernel, bias in params], least


@pytest.fixture(scope="module")
def ties():
    """Nets beside their exact least margins, of either sign."""
    x, eps = np.float32(0.37), 1e-5
    return x, eps, [nearly_tied(seed, x, eps) for seed in range(200)]


@each_method
def test_ill_conditioned_nets_are_certified_only_where_they_are_robust(ties, method):
    x, eps, nets = ties
    ball, x, label = Ball("linf", eps, **UNBOUNDED), jnp.full((1, 1), x), jnp.zeros(1, int)
    fooled = 0
    find = jax.jit(lambda model: METHODS[method](margins.of(model), ball.region(x), label).lower[0, 0])
    for params, least in nets:
        model = Partial(mlp, params)
        found = bounds.certify_in_float64(model, x, label, ball=ball, method=METHODS[method])
        assert least > 0 or not found.certified[0]
        # The proof itself, without the slack of float32: bounds minus allowance are below what is exact.
        with rounding.double_precision():
            exact_model = rounding.doubled(model)
            region = double_region(x, eps)
            allowance = float(compiled_allowance(exact_model, region, label)[0, 0])
        assert Fraction(float(found.margins_lower[0, 0])) - Fraction(allowance) <= least
        fooled += least <= 0 < float(find(model))
    assert sum(least <= 0 for _, least in nets) > 10
    if method == "crown":
        assert fooled > 3, fooled


def double_region(x, eps):
    return Ball("linf", jnp.asarray(eps, jnp.float64), **UNBOUNDED).region(jnp.asarray(x, jnp.float64))


compiled_allowance = jax.jit(lambda model, region, label: rounding.allowance(margins.of(model), region, label))


def cancelling(offset, x):
    """Computes the margin `relu(x + offset) - relu(2 x + offset) + c relu(x) = (c - 1) x`, with `c` just below 1."""
    first, second, third = jax.nn.relu(x + offset), jax.nn.relu(2.0 * x + offset), jax.nn.relu(x)
    margin = first - second + (1.0 - 2.0**-14) * third
    return jnp.concatenate([margin, jnp.zeros_like(margin)], axis=1)


def cancelling_before_the_kink(offset, x):
    """Computes the margin `relu((x + offset) - offset) - c x = (1 - c) x`, with `c` just above 1."""
    margin = jax.nn.relu((x + offset) - offset) - (1.0 + 2.0**-14) * x
    return jnp.concatenate([margin, jnp.zeros_like(margin)], axis=1)


@each_method
@pytest.mark.parametrize("net", [cancelling, cancelling_before_the_kink])
@pytest.mark.parametrize(("offset", "is_fooled"), [(2.0**14, False), (2.0**42, True)])
def test_what_rounding_makes_positive_is_not_certified(net, method, offset, is_fooled):
    # Every margin is negative; rounding next to the offset makes about half of them positive by far more than the
    # slack, which knows the logits only. Next to the larger offset that happens in float64 as well.
    x = jnp.linspace(0.1, 0.9, 64)[:, None]
    labels, model, ball = jnp.zeros(64, int), Partial(net, jnp.float32(offset)), Ball("linf", 0.0)
    quick = bounds.certify(model, x, labels, ball=ball, method=METHODS[method])
    found = bounds.certify_in_float64(model, x, labels, ball=ball, method=METHODS[method])
    if offset == 2.0**14:  # the quick verdict rests on what was measured elsewhere
        assert quick.certified.any()
    positive = found.margins_lower[:, 0] > 1e-5
    assert positive.any() == is_fooled
    assert not found.certified.any()


def test_evaluations_count_only_what_float64_confirms():
    x, model = jnp.linspace(0.1, 0.9, 64)[:, None], Partial(cancelling, jnp.float32(2.0**14))
    stages = []
    result = evaluate(
        jax.random.key(0), model, x, np.zeros(64, int), ball=Ball("linf", 0.0), attacks={}, batch_size=24,
        on_progress=lambda *stage: stages.append(stage),
    )
    assert not result.certified.any()
    assert [stage for stage in stages if stage[0] == "confirm"]
    kept = evaluate(
        jax.random.key(0), Partial(cancelling, jnp.float32(0.0)), x, np.ones(64, int), ball=Ball("linf", 0.0),
        attacks={}, batch_size=24,
    )
    assert kept.certified.all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("sizes", [(3, 5, 2), (3, 5, 4, 2)])
def test_intervals_lie_within_the_allowance_of_exact_ones(dtype, sizes):
    x, eps = inputs((3,), num=4), 0.125
    params = [(kernel * 100.0, bias) for kernel, bias in mlp_params(*sizes)]
    with rounding.double_precision():
        cast = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)
        model, region = Partial(mlp, cast(params)), Ball("linf", cast(eps), **UNBOUNDED).region(cast(x))
        found, allowance = bounds.ibp(model, region), np.asarray(rounding.allowance(model, region))
    for i in range(len(x)):
        lower, upper = exact(region.lower[i]), exact(region.upper[i])
        for depth, (kernel, bias) in enumerate(exact_layers(params)):
            if depth:
                lower, upper = relu(lower), relu(upper)
            turned = lambda low, high, kernel=kernel, bias=bias: [
                b + sum((row[j] * (p if row[j] > 0 else q) for row, p, q in zip(kernel, low, high, strict=True)))
                for j, b in enumerate(bias)
            ]
            lower, upper = turned(lower, upper), turned(upper, lower)
        for computed, true in ((found.lower, lower), (found.upper, upper)):
            for j, value in enumerate(true):
                assert abs(Fraction(float(computed[i, j])) - value) <= Fraction(float(allowance[i, j]))
        # Meaningful: a few hundred roundings of the largest numbers that occur, not more.
        largest = max(abs(float(v)) for v in (*lower, *upper))
        assert allowance[i].max() < 1e4 * float(jnp.finfo(dtype).eps) * largest


def conv_net(params, x):
    """Computes a net with every kind of layer that the analysis covers."""
    first, second, last = params
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.nn.leaky_relu(jax.lax.conv_general_dilated(x, first, (1, 1), "SAME", dimension_numbers=layout))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    x = x + jnp.abs(jax.lax.conv_general_dilated(x, second, (1, 1), "SAME", dimension_numbers=layout))
    x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4.0
    return jnp.clip(x, 0.1, 2.0).reshape(len(x), -1) @ last


@pytest.mark.parametrize(("method", "norm"), [("ibp", "linf"), ("crown_ibp", "l2"), ("crown", "linf")])
def test_convolutions_and_pools(method, norm):
    model = Partial(conv_net, (weights(3, 3, 1, 2), weights(3, 3, 2, 2), weights(2, 3)))
    x, labels, ball = inputs((3, 3, 1), num=3), jnp.array([0, 1, 2]), Ball(norm, 1e-3)
    fn, region = margins.of(model), ball.region(x)

    @jax.jit
    def find(fn, region):
        return METHODS[method](fn, region, labels).lower, rounding.allowance(fn, region, labels)

    lower, allowance = jax.device_get(find(fn, region))
    with rounding.double_precision():
        reference, tiny = jax.device_get(find(*rounding.doubled((fn, region))))
    error = np.abs(lower.astype(np.float64) - reference)
    assert (error <= allowance).all()
    assert (error > 0).any()
    # The padding of pools, -1e30, is not among the numbers that are rounded.
    assert (tiny > 0).all()
    assert (tiny < 1e-10).all()
    np.testing.assert_allclose(tiny * 2.0**29, allowance, rtol=1e-2)


def test_an_output_that_knows_no_input_is_not_rounded():
    region = Ball("linf", 0.1).region(inputs((4,)))
    found = rounding.allowance(lambda x: jnp.full((x.shape[0], 3), -7.0), region)
    np.testing.assert_array_equal(found, np.zeros((2, 3)))


def test_sums_too_long_for_the_dtype_have_no_allowance():
    # Half a million terms of float32 on the way back: 2 n u = 1/16, so four such layers are beyond what is covered.
    wide = lambda x: jnp.broadcast_to(x, (1, 2**20)).sum(axis=1, keepdims=True) if x.shape[1] == 1 else x
    fn = lambda x: sum((wide(x[:, i : i + 1]) for i in range(4)), jnp.zeros((1, 1)))
    region = Ball("linf", 0.1).region(inputs((4,), num=1))
    assert jnp.isinf(rounding.allowance(fn, region)).all()


def test_what_is_not_analysed_says_so_and_is_still_certified_in_float64():
    params = mlp_params(4, 6, 2)
    model = Partial(lambda params, x: jnp.tanh(x @ params[0][0]) @ params[1][0], params)
    x = inputs((4,))
    labels, ball = model(x).argmax(axis=1), Ball("linf", 1e-4)
    with pytest.raises(bounds.UnsupportedPrimitiveError, match="rounding of bounds through 'tanh'"):
        rounding.allowance(margins.of(model), ball.region(x), labels)
    assert bounds.certify_in_float64(model, x, labels, ball=ball).certified.all()
