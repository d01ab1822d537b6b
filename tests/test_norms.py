"""Norms: values, duality, and gradients that stay finite where the norms have kinks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx import norms

_NUMPY = {
    "l0": lambda v: np.count_nonzero(v),
    "l1": lambda v: np.abs(v).sum(),
    "l2": lambda v: np.sqrt((v**2).sum()),
    "linf": lambda v: np.abs(v).max(),
}


@pytest.mark.parametrize("name", sorted(_NUMPY))
def test_value_per_example(name, key):
    x = jax.random.normal(key, (5, 2, 3, 1)).at[:, 0, 0].set(0.0)
    expected = [_NUMPY[name](row) for row in np.asarray(x)]
    value = norms.norm(x, name)
    assert value.shape == (5,)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["l1", "l2", "linf"])
def test_gradient_is_finite_at_zero(name):
    gradient = jax.grad(lambda x: norms.norm(x, name).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()


def test_l2_gradient_is_zero_at_zero_and_unit_elsewhere():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    gradient = jax.grad(lambda v: norms.l2(v).sum())(x)
    np.testing.assert_allclose(gradient, [[0.0, 0.0], [0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("name", ["l1", "l2", "linf"])
def test_dual_norm_bounds_the_inner_product_tightly(name, key):
    a_key, v_key = jax.random.split(key)
    a, v = jax.random.normal(a_key, (1, 4)), jax.random.normal(v_key, (4000, 4))
    products = (a * v).sum(axis=1) / norms.norm(v, name)
    bound = norms.norm(a, norms.dual(name))[0]
    assert products.max() <= bound * (1 + 1e-6)
    assert products.max() >= 0.9 * bound
    assert norms.dual(norms.dual(name)) == name


def test_unknown_norms_are_named():
    with pytest.raises(ValueError, match=r"'l3'.*linf"):
        norms.norm(jnp.zeros((1, 2)), "l3")
    with pytest.raises(ValueError, match="'l0'"):
        norms.check("l0")
