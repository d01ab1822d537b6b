"""Goals: pytrees of a loss and a success predicate."""

import jax
import jax.numpy as jnp
import numpy as np

from rdx import goals, losses

LOGITS = jnp.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [jnp.nan, 0.0, 0.0]])
LABELS = jnp.array([0, 2, 1])


def test_misclassify():
    goal = goals.misclassify(losses.margin)
    np.testing.assert_array_equal(goal.success(LOGITS, LABELS), [False, True, True])
    np.testing.assert_allclose(goal.loss(LOGITS, LABELS)[:2], [-1.0, 2.0])


def test_target_reads_the_targets_and_never_the_labels():
    goal = goals.target(jnp.array([0, 1, 0]), losses.targeted_margin)
    for labels in (LABELS, LABELS + 5):
        np.testing.assert_array_equal(goal.success(LOGITS, labels), [True, True, False])
        np.testing.assert_allclose(goal.loss(LOGITS, labels)[:2], [1.0, 2.0])


def test_targets_are_leaves_and_structures_compare_equal():
    first, second = goals.target(jnp.array([0, 1, 2])), goals.target(jnp.array([2, 2, 2]))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(first))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert jax.tree.structure(goals.misclassify()) == jax.tree.structure(goals.misclassify())
    assert jax.tree.structure(goals.misclassify()) != jax.tree.structure(goals.misclassify(losses.dlr))
