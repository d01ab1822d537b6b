"""What no rule covers is an error that names the primitive and the user's line, and never a looser bound."""

import inspect
import re

import jax
import jax.numpy as jnp
import pytest
from bounds_helpers import METHODS
from jax import lax

from rdx import bounds
from rdx.balls import Ball

REGION = Ball("linf", 0.1).region(jnp.array([[0.2, 0.5, 0.7]]))

CASES = {
    "floor": lambda x: 1.0 + jnp.floor(x @ jnp.ones((3, 2))),
    "sign": lambda x: jnp.sign(x),
    "round": lambda x: jnp.round(x),
    "argmax": lambda x: x.argmax(axis=1),
    "sort": lambda x: jnp.sort(x, axis=1),
    "cumprod": lambda x: jnp.cumprod(x, axis=1),
    "convert_element_type": lambda x: x.astype(jnp.int32),
    "gt": lambda x: x > 0.3,
    "select_n": lambda x: lax.select_n(x[:, :1] > 0.0, x[:, :1], x[:, 1:2] + 1.0),
    "while": lambda x: lax.while_loop(lambda v: v.sum() < 9.0, lambda v: v * 2.0, x),
    "cond": lambda x: lax.cond(x.sum() > 0.0, lambda v: v, lambda v: -v, x),
    "reduce_prod": lambda x: jnp.prod(x, axis=1),
    "power": lambda x: x[:, :1] ** x[:, 1:2],
}
# Library functions that consist of several primitives: which one is named first is theirs.
COMPOSED = {"select_n": "select_n|gt", "cond": "cond|gt|convert_element_type", "power": "pow"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_error_names_primitive_and_line(name, method):
    fn = CASES[name]
    with pytest.raises(bounds.UnsupportedPrimitiveError) as caught:
        METHODS[method](fn, REGION)
    message = str(caught.value)
    assert re.search(rf"primitive '({COMPOSED.get(name, name)})'", message), message
    line = inspect.getsourcelines(fn)[1]
    assert f"test_unsupported.py:{line}:" in message, message
    assert "dot_general" in message.partition("supported primitives")[2]


def test_reasons():
    with pytest.raises(bounds.UnsupportedPrimitiveError, match="'pow' of several perturbed values"):
        bounds.ibp(CASES["power"], REGION)
    with pytest.raises(bounds.UnsupportedPrimitiveError, match="'sort' of a perturbed value"):
        bounds.ibp(CASES["sort"], REGION)


@pytest.mark.parametrize("name", ["floor", "while", "sort"])
def test_nested_calls_keep_the_line(name):
    inner = CASES[name]
    with pytest.raises(bounds.UnsupportedPrimitiveError, match=r"test_unsupported\.py"):
        bounds.crown(jax.jit(lambda x: jax.checkpoint(inner)(x)), REGION)
    # A jitted function of a library that is bounded itself has no line of ours.
    with pytest.raises(bounds.UnsupportedPrimitiveError, match=r"an unknown line|test_unsupported"):
        bounds.ibp(jnp.round, REGION)


def test_errors_are_the_same_under_jit_and_grad():
    for name in ("floor", "select_n", "gt"):
        with pytest.raises(bounds.UnsupportedPrimitiveError):
            jax.jit(lambda region, name=name: bounds.crown_ibp(CASES[name], region))(REGION)
    with pytest.raises(bounds.UnsupportedPrimitiveError):
        jax.grad(lambda x: bounds.ibp(CASES["floor"], Ball("linf", 0.1).region(x)).lower.sum())(REGION.center)


def test_dead_code_does_not_matter():
    found = bounds.crown(lambda x: (jnp.floor(x), x > 0.5, 2.0 * x)[2], REGION)
    assert jnp.allclose(found.lower, 2.0 * REGION.lower)


def test_unperturbed_values_may_be_anything():
    def fn(x, scale):
        weight = jnp.exp(jnp.sin(scale)) * lax.while_loop(lambda v: v < 9.0, lambda v: v * 2.0, jnp.float32(1.0))
        return jnp.where(scale[:, None] > 0.0, x * weight[:, None], jnp.sort(scale)[:, None] / weight[:, None])

    for method in METHODS.values():
        found = method(fn, REGION, jnp.array([1.0]))
        factor = jnp.exp(jnp.sin(1.0)) * 16.0
        assert jnp.allclose(found.lower, factor * REGION.lower, rtol=1e-5)
        assert jnp.allclose(found.upper, factor * REGION.upper, rtol=1e-5)


@pytest.mark.parametrize("fn", [lambda x: (x, x), lambda x: {"logits": x, "features": 2.0 * x}, lambda x: ()])
@pytest.mark.parametrize("method", METHODS)
def test_one_output_only(fn, method):
    with pytest.raises(ValueError, match="one output array"):
        METHODS[method](fn, REGION)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_refused(dtype):
    # Rounding to 8 or 11 bits is far outside what certificates allow for.
    with pytest.raises(bounds.UnsupportedPrimitiveError, match=r"float32.*layers"):
        bounds.ibp(lambda x: (x.astype(dtype) @ jnp.ones((3, 2), dtype)).astype(jnp.float32), REGION)
