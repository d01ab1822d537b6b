"""Bounds under jit, vmap, grad and sharding, and on pytrees."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import EPS, METHODS, exact_minimum, inputs, logits_fn, mlp, mlp_params, weights
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from rdx import bounds, margins
from rdx.balls import Ball

each_method = pytest.mark.parametrize("method", METHODS)
each_norm = pytest.mark.parametrize("norm", EPS)
LABELS = jnp.array([0, 2, 1, 1])


def batch(num=4):
    return inputs((4,), num), LABELS[jnp.arange(num) % 4]


def bound(method, norm, model, x, labels, eps):
    return METHODS[method](margins.of(model), Ball(norm, eps).region(x), labels)


def close(found, expected, tolerance=1e-6):
    for value, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, reference, rtol=0.0, atol=tolerance * (1.0 + float(jnp.abs(reference).max())))


def combined(lower, upper):
    """Weighs all bounds differently, so that no mistake cancels."""
    weight = jnp.asarray(np.linspace(1.0, 2.0, lower.size), lower.dtype).reshape(lower.shape)
    return (weight * lower - 0.3 * weight * upper).sum()


@each_norm
@each_method
def test_examples_are_independent(method, norm):
    x, labels = batch()
    run = jax.jit(partial(bound, method, norm))
    together = run(logits_fn(), x, labels, EPS[norm])
    for i in range(len(x)):
        alone = run(logits_fn(), x[i : i + 1], labels[i : i + 1], EPS[norm])
        close(alone, jax.tree.map(lambda end, i=i: end[i : i + 1], together))


@each_method
def test_jit_changes_nothing(method):
    arguments = (logits_fn(), *batch(), 0.2)
    close(jax.jit(partial(bound, method, "l2"))(*arguments), bound(method, "l2", *arguments))


@each_norm
@each_method
def test_vmap_over_radii_and_parameters(method, norm):
    x, labels = batch()
    one = partial(bound, method, norm)
    run = jax.jit(one)
    radii = EPS[norm] * jnp.array([0.0, 0.5, 1.0])
    swept = jax.jit(jax.vmap(one, in_axes=(None, None, None, 0)))(logits_fn(), x, labels, radii)
    models = [logits_fn(seed=seed) for seed in (0, 20, 40)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    ensemble = jax.jit(jax.vmap(one, in_axes=(0, None, None, None)))(stacked, x, labels, EPS[norm])
    for i in range(3):
        close(jax.tree.map(lambda end, i=i: end[i], swept), run(logits_fn(), x, labels, radii[i]))
        close(jax.tree.map(lambda end, i=i: end[i], ensemble), run(models[i], x, labels, EPS[norm]))


@each_method
@pytest.mark.parametrize(("norm", "with_labels"), [("linf", True), ("l2", True), ("l1", True), ("linf", False)])
def test_gradients_are_differences(method, norm, with_labels):
    with jax.enable_x64(True):
        as_double = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)
        x = 0.1 + 0.8 * as_double(batch()[0])
        point, unravel = ravel_pytree((as_double(logits_fn()), x, jnp.asarray(EPS[norm])))

        @jax.jit
        def total(point):
            model, x, eps = unravel(point)
            if with_labels:
                return combined(*bound(method, norm, model, x, LABELS, eps))
            return combined(*METHODS[method](model, Ball(norm, eps).region(x)))

        gradient = jax.jit(jax.grad(total))(point)
        for seed in range(3):
            direction = np.random.default_rng(seed).normal(size=point.shape) / np.sqrt(point.size)
            step = 1e-5
            difference = (total(point + step * direction) - total(point - step * direction)) / (2.0 * step)
            np.testing.assert_allclose(gradient @ direction, difference, rtol=1e-4)


@pytest.mark.parametrize("method", ["crown_ibp", "crown"])
def test_gradient_reaches_the_parameters_of_every_layer(method):
    # The last layer's coefficients are shared by all examples; nothing waits for a vmap there.
    x, _ = batch()
    grow = lambda model: combined(*METHODS[method](model, Ball("linf", 0.1).region(x)))
    for gradients in (jax.jit(jax.grad(grow)), jax.grad(jax.jit(grow))):
        for leaf in jax.tree.leaves(gradients(logits_fn())):
            assert jnp.isfinite(leaf).all()
            assert (leaf != 0).any()
    models = jax.tree.map(lambda a, b: jnp.stack([a, b]), logits_fn(), logits_fn(seed=20))
    together = jax.jit(jax.vmap(jax.grad(grow)))(models)
    alone = jax.jit(jax.grad(grow))(logits_fn(seed=20))
    close(jax.tree.leaves(jax.tree.map(lambda leaf: leaf[1], together)), jax.tree.leaves(alone), 1e-5)


@each_method
def test_one_trace_for_all_values(method):
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return logits_fn().func(params, x)

    run = jax.jit(lambda model, x, labels, eps: bound(method, "linf", model, x, labels, eps))
    x, labels = batch()
    for seed, eps in enumerate((0.0, 0.1, 0.2)):
        (params,) = logits_fn(seed=seed).args
        run(Partial(counted, params), x + 0.0, (labels + seed) % 3, jnp.float32(eps))
    # One example is traced, not the batch; IBP and CROWN of one call trace at most once each.
    assert set(traces) == {(1, 4)}
    assert len(traces) == 1
    run(Partial(counted, params), x[:2], labels[:2], jnp.float32(eps))
    assert len(traces) == 2


@each_method
def test_pytree_of_regions(method):
    x, _ = batch()
    whole = METHODS[method](logits_fn(), Ball("linf", 0.1).region(x))
    split = lambda parts: logits_fn()(jnp.concatenate([parts["a"], parts["b"][0][:, None]], axis=1))
    regions = {"a": Ball("linf", 0.1).region(x[:, :3]), "b": (Ball("linf", 0.1).region(x[:, 3]),)}
    close(METHODS[method](split, regions), whole)
    # One leaf unperturbed is that leaf as a constant.
    regions["b"] = (Ball("linf", 0.0).region(x[:, 3]),)
    per_element = Ball("linf", jnp.array([[0.1, 0.1, 0.1, 0.0]])).region(x)
    close(METHODS[method](split, regions), METHODS[method](logits_fn(), per_element))


@pytest.mark.parametrize("method", ["crown_ibp", "crown"])
def test_regions_of_different_norms_add_up(method):
    x, other = inputs((3,), num=2), inputs((2,), num=2, seed=1)
    first, second = weights(3, 2), weights(2, 2, seed=1)
    regions = (Ball("l2", 0.4).region(x), Ball("l1", 0.3).region(other))
    found = METHODS[method](lambda pair: pair[0] @ first - pair[1] @ second, regions)
    expected = [
        [exact_minimum(first[:, k], regions[0], i) + exact_minimum(-second[:, k], regions[1], i) for k in range(2)]
        for i in range(2)
    ]
    np.testing.assert_allclose(found.lower, expected, atol=1e-5)


@each_method
def test_perturbed_weights(method):
    # With the input as a constant the net is just as affine in its first layer's weights.
    x, first, second = inputs((4,)), weights(4, 5), weights(5, 2, seed=1)
    per_example = jnp.broadcast_to(first, (2, *first.shape))
    region = Ball("linf", 0.05, -jnp.inf, jnp.inf).region(per_example)
    net = lambda w, x: jax.nn.relu(jnp.einsum("bi,bio->bo", x, w)) @ second
    found = METHODS[method](net, region, x)
    draws = jax.random.uniform(jax.random.key(0), (500, *per_example.shape), minval=-0.05, maxval=0.05)
    values = jax.vmap(lambda d: net(per_example + d, x))(draws)
    assert (found.lower <= values.min(axis=0) + 1e-6).all()
    assert (found.upper >= values.max(axis=0) - 1e-6).all()
    assert (found.upper - found.lower < 3.0).all()


@each_method
def test_arguments_are_constants_of_each_example(method):
    x, labels = batch()
    shift = {"shift": weights(4, 4, seed=3), "more": (labels,)}

    def fn(x, extra, scale):
        return jax.nn.relu(x + extra["shift"]) @ weights(4, 3) * scale[:, None] + jax.nn.one_hot(extra["more"][0], 3)

    found = METHODS[method](fn, Ball("linf", 0.1).region(x), shift, jnp.arange(1.0, 5.0))
    for i in range(len(x)):
        alone = METHODS[method](
            lambda x, i=i: jax.nn.relu(x + shift["shift"][i : i + 1]) @ weights(4, 3) * (i + 1.0)
            + jax.nn.one_hot(labels[i : i + 1], 3),
            Ball("linf", 0.1).region(x[i : i + 1]),
        )
        close(jax.tree.map(lambda end, i=i: end[i : i + 1], found), alone)


# Each way in which a constant of an example meets its perturbed value, between two layers whose weights are shared.
OWN = {
    "add": lambda z, c: z + c,
    "sub": lambda z, c: c - z,
    "mul": lambda z, c: z * c,
    "div": lambda z, c: z / (1.0 + jnp.abs(c)),
    "dot": lambda z, c: jnp.einsum("bi,bij->bj", z, c[:, :, None] + c[:, None, :]),
    "where": lambda z, c: jnp.where(c > 0, z, 1.0),
    "where_value": lambda z, c: jnp.where(jnp.arange(5)[None] > 2, z, c),
    "gather": lambda z, c: jnp.take_along_axis(z, jnp.argsort(c, axis=1), axis=1),
    "concatenate": lambda z, c: jnp.concatenate([z[:, :2], c[:, 2:]], axis=1),
    "max": lambda z, c: jnp.maximum(z, c),
    "leaky": lambda z, c: jnp.where(z > 0, z, jnp.abs(c) * z),
}


@pytest.mark.parametrize("name", OWN)
@each_method
def test_gradients_through_constants_of_each_example(method, name):
    # Rows that differ from example to example are folded into one axis, rows that do not must not be.
    x, _ = batch()
    c = weights(4, 5, seed=3)
    params = weights(4, 5), weights(5, 3, seed=1)

    def loss(params, x, c):
        fn = lambda x, c: OWN[name](x @ params[0], c) @ params[1]
        lower, upper = METHODS[method](fn, Ball("linf", 0.1).region(x), c)
        return (jnp.array([[1.0, 2.0, -1.0]]) * lower - jnp.array([[0.5, -1.0, 0.3]]) * upper).sum()

    gradient = jax.jit(jax.grad(loss))
    alone = [gradient(params, x[i : i + 1], c[i : i + 1]) for i in range(len(x))]
    close(gradient(params, x, c), [sum(leaves) for leaves in zip(*alone, strict=True)], 1e-5)
    assert all((leaf != 0).any() for leaf in alone[0])


@pytest.mark.parametrize("intersect", [False, True])
@each_norm
def test_both_sides_share_what_parallel_lines_make_the_same(norm, intersect):
    # Written anew, the same slopes are not known to be the upper line's, and each side has a pass of its own.
    known, unknown = bounds.relaxations.same_slope, lambda lower, upper: upper / (upper - lower)
    model, (x, _) = Partial(mlp, mlp_params(4, 16, 16, 3)), batch()

    def study(model, x, slopes):
        found = bounds.crown(
            model, Ball(norm, 0.3).region(x), relu_lower=slopes, intersect=intersect, max_bytes=2e3
        )
        return combined(*found), found

    def run(slopes):
        return jax.jit(jax.grad(partial(study, slopes=slopes), argnums=(0, 1), has_aux=True))(model, x)

    (gradients, found), (same_gradients, same) = run(known), run(unknown)
    close(found, same)
    close(*(tuple(jax.tree.leaves(each)) for each in (gradients, same_gradients)), 1e-5)


def test_parallel_lines_halve_the_operations():
    model, region = Partial(mlp, mlp_params(100, 50, 50, 3)), Ball("linf", 0.3).region(inputs((100,)))
    parallel, others = (
        bounds.plan(bounds.crown, model, region, relu_lower=slopes, intersect=False)
        for slopes in (bounds.relaxations.same_slope, bounds.relaxations.adaptive)
    )
    assert parallel.flops < 0.6 * others.flops


@each_method
def test_output_that_ignores_the_input(method):
    x, labels = batch()
    region = Ball("linf", 0.1).region(x)
    for fn in (lambda x, labels: jnp.ones((len(x), 2)), lambda x, labels: jax.nn.one_hot(labels, 3)):
        found = jax.jit(partial(METHODS[method], fn))(region, labels)
        close(found, (fn(x, labels),) * 2, 0.0)
    partly = METHODS[method](lambda x: jnp.concatenate([jnp.ones_like(x[:, :1]), x[:, :1]], axis=1), region)
    close(partly, [jnp.stack([jnp.ones(4), end[:, 0]], axis=1) for end in (region.lower, region.upper)])
    itself = METHODS[method](lambda x: x, region)
    close(itself, (region.lower, region.upper), 1e-6)


@each_method
def test_eight_devices_are_one(method):
    x, labels = batch(8)
    run = jax.jit(partial(bound, method, "l2"))
    expected = run(logits_fn(), x, labels, jnp.float32(0.3))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    along = NamedSharding(mesh, PartitionSpec("batch"))
    replicated = NamedSharding(mesh, PartitionSpec())
    model, eps = jax.device_put((logits_fn(), jnp.float32(0.3)), replicated)
    # Virtual devices deadlock where two programs with collectives run at once: wait for each.
    found = jax.block_until_ready(run(model, *jax.device_put((x, labels), along), eps))
    assert len(found.lower.sharding.device_set) == 8
    close(found, expected)
