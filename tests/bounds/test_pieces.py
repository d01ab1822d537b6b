"""Radii of large matrices, which are computed piece by piece on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds_helpers import weights

from rdx import balls, bounds
from rdx.bounds import arithmetic

# Float32 sums of some tens of terms in another order.
TOLERANCE = 2e-6


def by_rows(matrix, x):
    return x @ matrix


def by_columns(matrix, x):
    return jnp.einsum("ko,bo->bk", matrix, x)


def over_two_axes(matrix, x):
    return jnp.tensordot(x.reshape(len(x), 4, -1), matrix.reshape(4, -1, matrix.shape[1]), axes=2)


@pytest.mark.parametrize("inputs", [96, 7])
@pytest.mark.parametrize("layer", [by_rows, by_columns, over_two_axes])
def test_pieces_add_up(monkeypatch, layer, inputs):
    if layer is over_two_axes and inputs % 4:
        inputs = 4 * inputs
    matrix = weights(inputs, inputs)
    x = 0.5 + 0.1 * weights(3, inputs, seed=1)

    def width(matrix, x):
        lower, upper = bounds.ibp(lambda x: jnp.tanh(layer(matrix, x)), balls.Ball("linf", 0.02).region(x))
        return (jnp.sin(upper) - lower).sum(), (lower, upper)

    def found():
        return jax.value_and_grad(width, argnums=(0, 1), has_aux=True)(matrix, x)

    monkeypatch.setattr(arithmetic, "_LARGE", float("inf"))
    whole = found()
    monkeypatch.setattr(arithmetic, "_LARGE", 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE), found(), whole)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a matter of the CPU backend")
def test_magnitudes_of_a_large_matrix_take_no_memory_of_its_size():
    matrix, x = jnp.ones((2048, 2048)), jnp.ones((2, 2048))

    def bound(matrix, x):
        return bounds.ibp(lambda x: x @ matrix, balls.Ball("linf", 0.1).region(x))

    taken = jax.jit(bound).lower(matrix, x).compile().memory_analysis().temp_size_in_bytes
    assert taken < matrix.nbytes / 4
