"""Batches that are filled up, keys by name, predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx.evaluate import shared


@pytest.mark.parametrize(("num", "sizes"), [(0, []), (1, [8]), (5, [8]), (8, [8]), (9, [8, 8]), (21, [8, 8, 8])])
def test_walk_visits_every_row_once_and_fills_up(num, sizes):
    rows = 100 + np.arange(num)
    batches = list(shared.walk(rows, 8))
    assert [len(filled) for _, filled in batches] == sizes
    np.testing.assert_array_equal(np.concatenate([rows[:0], *(taken for taken, _ in batches)]), rows)
    for taken, filled in batches:
        np.testing.assert_array_equal(filled[: len(taken)], taken)
        assert (filled[len(taken) :] == taken[0]).all()


def test_the_key_of_an_attack_is_its_names(key):
    first, again, other = (jax.random.key_data(shared.key_of(key, name)) for name in ("pgd", "pgd", "fgsm"))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_nan_is_a_class_of_its_own():
    predicted = shared.predict(lambda x: x, jnp.array([[0.0, 1.0], [jnp.nan, 1.0]]))
    np.testing.assert_array_equal(predicted, [1, -1])
