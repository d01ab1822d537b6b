"""The cost of bounds: counted operations of known programs, and memory that a budget limits."""

import jax
import jax.numpy as jnp
import pytest
from bounds_helpers import logits_fn, weights
from jax import lax
from test_patches import SHAPE, net

from rdx import bounds
from rdx.balls import Ball
from rdx.bounds import cost

X = jax.ShapeDtypeStruct((5, 4), jnp.float32)
REGION = jax.eval_shape(Ball("linf", 0.1).region, X)


def count(fn, *shapes):
    return cost.flops(jax.make_jaxpr(fn)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


@pytest.mark.parametrize(
    ("fn", "shapes", "expected"), [
        (lambda x, w: x @ w, [(3, 4), (4, 5)], 2 * 3 * 4 * 5),
        (lambda x, w: jnp.einsum("bij,bjk->bik", x, w), [(2, 3, 4), (2, 4, 5)], 2 * 2 * 3 * 4 * 5),
        (lambda x: jnp.sin(x) + x, [(7,)], 14),
        (lambda x: x.sum(axis=0), [(6, 2)], 12),
        (lambda x: x.reshape(2, 6).T, [(12,)], 0),
        (lambda x: lax.scan(lambda c, _: (c * 2.0, None), x, length=5)[0], [(3,)], 15),
        (lambda x: lax.cond(x[0] > 0, lambda x: x * x * x, lambda x: x, x), [(8,)], 1 + 16),
        (
            lambda x, k: lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
            [(2, 7, 7, 3), (3, 3, 3, 4)], 2 * (2 * 3 * 3 * 4) * (3 * 3 * 3),
        ),
    ],
)
def test_counts(fn, shapes, expected):
    assert count(fn, *shapes) == pytest.approx(expected, abs=1)


def test_shapes_are_enough_and_cost_grows_with_the_method():
    flops = [bounds.plan(method, logits_fn(), REGION).flops for method in (bounds.ibp, bounds.crown_ibp, bounds.crown)]
    assert 0 < flops[0] < flops[1] < flops[2]
    wide = jax.eval_shape(Ball("linf", 0.1).region, jax.ShapeDtypeStruct((10, 4), jnp.float32))
    assert bounds.plan(bounds.ibp, logits_fn(), wide).flops == pytest.approx(2 * flops[0], rel=0.1)
    assert "GFLOP" in str(bounds.plan(bounds.ibp, logits_fn(), REGION))


def test_a_dense_layer_costs_two_products():
    kernel = weights(40, 30)
    region = jax.eval_shape(Ball("linf", 0.1).region, jax.ShapeDtypeStruct((5, 40), jnp.float32))
    products = 2 * 2 * 5 * 40 * 30  # center and radius
    flops = bounds.plan(bounds.ibp, lambda x: x @ kernel, region).flops
    assert products <= flops <= 1.5 * products


def test_memory_keeps_to_the_budget():
    region = jax.eval_shape(Ball("linf", 0.1).region, jax.ShapeDtypeStruct((4, *SHAPE), jnp.float32))
    fn = net("double")
    whole, small = (bounds.plan(bounds.crown, fn, region, max_bytes=size) for size in (jnp.inf, 1e6))
    assert small.peak_bytes < 0.5 * whole.peak_bytes
    # The same work in smaller pieces, for each of which images are padded anew.
    assert small.flops < 2.0 * whole.flops
