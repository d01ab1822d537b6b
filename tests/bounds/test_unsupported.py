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
    "sin": lambda x: jnp.sin(x),
    "exp": lambda x: 1.0 + jnp.exp(x @ jnp.ones((3, 2))),
    "log": lambda x: jnp.log(x + 1.0),
    "sqrt": lambda x: jnp.sqrt(x),
    "rsqrt": lambda x: lax.rsqrt(x),
    "square": lambda x: jnp.square(x),
    "integer_pow": lambda x: x**3,
    "mul": lambda x: x * jax.nn.relu(x - 0.5),
    "dot_general": lambda x: jnp.einsum("bi,bj->bij", x, x),
    "div": lambda x: 1.0 / (x + 2.0),
    "floor": lambda x: jnp.floor(x),
    "sign": lambda x: jnp.sign(x),
    "round": lambda x: jnp.round(x),
    "argmax": lambda x: x.argmax(axis=1),
    "reduce_max": lambda x: x.max(axis=1),
    "reduce_window_max": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 1), "VALID"),
    "sort": lambda x: jnp.sort(x, axis=1),
    "convert_element_type": lambda x: x.astype(jnp.int32),
    "gt": lambda x: x > 0.3,
    "lt": lambda x: jnp.where(x < 0.3, x, 0.0),
    "ge": lambda x: jnp.where(x >= 0.0, x * x, x),
    "select_n": lambda x: lax.select_n(x[:, :1] > 0.0, x[:, :1], x[:, 1:2] + 1.0),
    "while": lambda x: lax.while_loop(lambda v: v.sum() < 9.0, lambda v: v * 2.0, x),
    "scan": lambda x: lax.scan(lambda carry, _: (carry * 2.0, None), x, None, length=3)[0],
    "cond": lambda x: lax.cond(x.sum() > 0.0, lambda v: v, lambda v: -v, x),
    "scatter": lambda x: x.at[:, 0].set(0.0),
    "logsumexp": lambda x: jax.nn.logsumexp(x, axis=1),
    "softplus": lambda x: jax.nn.softplus(x),
    "variance": lambda x: jnp.var(x, axis=1),
}
# Library functions that consist of several primitives: which one is named first is theirs.
COMPOSED = {"logsumexp": "reduce_max|exp", "softplus": "exp|log1p|ne|gt|custom.*", "variance": "square|integer_pow",
            "select_n": "select_n|gt", "cond": "cond|gt|convert_element_type", "ge": "mul|ge|select_n",
            "argmax": "argmax", "sign": "sign"}


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
    with pytest.raises(bounds.UnsupportedPrimitiveError, match="'mul' of two perturbed values"):
        bounds.ibp(CASES["mul"], REGION)
    with pytest.raises(bounds.UnsupportedPrimitiveError, match="'div' by a perturbed value"):
        bounds.ibp(CASES["div"], REGION)
    with pytest.raises(bounds.UnsupportedPrimitiveError, match="'sin' of a perturbed value"):
        bounds.ibp(CASES["sin"], REGION)


@pytest.mark.parametrize("name", ["sin", "scan", "logsumexp"])
def test_nested_calls_keep_the_line(name):
    inner = CASES[name]
    with pytest.raises(bounds.UnsupportedPrimitiveError, match=r"test_unsupported\.py"):
        bounds.crown(jax.jit(lambda x: jax.checkpoint(inner)(x)), REGION)
    # A jitted function of a library that is bounded itself has no line of ours.
    with pytest.raises(bounds.UnsupportedPrimitiveError, match=r"an unknown line|test_unsupported"):
        bounds.ibp(jax.nn.softplus, REGION)


def test_errors_are_the_same_under_jit_and_grad():
    for name in ("sin", "mul", "lt"):
        with pytest.raises(bounds.UnsupportedPrimitiveError):
            jax.jit(lambda region, name=name: bounds.crown_ibp(CASES[name], region))(REGION)
    with pytest.raises(bounds.UnsupportedPrimitiveError):
        jax.grad(lambda x: bounds.ibp(CASES["sin"], Ball("linf", 0.1).region(x)).lower.sum())(REGION.center)


def test_dead_code_does_not_matter():
    found = bounds.crown(lambda x: (jnp.sin(x), x > 0.5, 2.0 * x)[2], REGION)
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
