"""Baselines that the paper of A5 names: the true loss falls under them, inside ball and box."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx import attacks, losses, models, robustify
from rdx.balls import Ball

DEFENSES = {"linf": 0.15, "l2": 0.5, "l1": 1.5}
THREATS = {"linf": 0.06, "l2": 0.2, "l1": 0.6}


@functools.cache
def _problem():
    x = jax.random.uniform(jax.random.key(1), (16, 4, 4, 1))
    net = models.forward(models.MLP((16,), 3))
    logits_fn = net.logits_fn(net.model.init(jax.random.key(2), x)["params"], {})
    # Some labels are not what the net predicts.
    labels = logits_fn(x).argmax(axis=1).astype(jnp.int32).at[:4].add(1) % 3
    return logits_fn, x, labels


@functools.cache
def _attacked(norm, defended):
    """The loss under an attack that neither recipe has seen, of `x` or of what preemptive robustification makes."""
    logits_fn, x, labels = _problem()
    x = _preemptive(norm) if defended else x
    ball = Ball(norm, THREATS[norm])
    return attacks.pgd(jax.random.key(9), logits_fn, x, labels, ball=ball, num_steps=20, num_restarts=2)


@functools.cache
def _preemptive(norm, rows=(0, 16), *, labels=True):
    logits_fn, x, given = _problem()
    batch = slice(*rows)
    return robustify.preemptive(
        jax.random.key(3), logits_fn, x[batch], given[batch] if labels else None, defense=Ball(norm, DEFENSES[norm]),
        threat=Ball(norm, THREATS[norm]), num_steps=15, attack_steps=4, index=jnp.arange(16)[batch],
    )


def _clean_loss(x):
    logits_fn, _, labels = _problem()
    return losses.cross_entropy(logits_fn(x), labels)


@pytest.mark.parametrize("norm", DEFENSES)
def test_unadversarial_lowers_the_clean_loss_and_keeps_the_budget(norm, key):
    logits_fn, x, labels = _problem()
    ball = Ball(norm, DEFENSES[norm])
    defended = robustify.unadversarial(key, logits_fn, x, labels, defense=ball, num_steps=20)
    assert ball.contains(defended, x).all()
    assert (_clean_loss(defended) < _clean_loss(x)).all()
    # The other way it would have been an attack.
    opposite = ball.project(2.0 * x - defended, x)
    assert (_clean_loss(defended) < _clean_loss(opposite)).all()


def test_an_unadversarial_patch_stays_under_its_mask(key):
    logits_fn, x, labels = _problem()
    mask = jnp.zeros(x.shape[1:], bool).at[1:3, 1:3].set(True)
    ball = Ball("linf", jnp.where(mask, 1.0, 0.0)[None])
    defended = robustify.unadversarial(key, logits_fn, x, labels, defense=ball, num_steps=10)
    np.testing.assert_array_equal(jnp.where(mask, 0.0, defended), jnp.where(mask, 0.0, x))
    assert (_clean_loss(defended) < _clean_loss(x)).all()


@pytest.mark.parametrize("norm", DEFENSES)
def test_preemptive_lowers_the_loss_under_attack_and_keeps_the_budget(norm):
    _, x, _ = _problem()
    assert Ball(norm, DEFENSES[norm]).contains(_preemptive(norm), x).all()
    before, after = _attacked(norm, defended=False), _attacked(norm, defended=True)
    assert (after.loss < before.loss).all()
    assert after.success.sum() < before.success.sum()


def test_preemptive_does_not_depend_on_who_shares_the_batch():
    np.testing.assert_allclose(_preemptive("l2", (5, 8)), _preemptive("l2")[5:8], atol=1e-5)


def test_without_labels_it_takes_the_prediction_for_the_truth():
    logits_fn, x, labels = _problem()
    predicted, guessed = logits_fn(x).argmax(axis=1), _preemptive("linf", labels=False)
    np.testing.assert_array_equal(guessed[4:], _preemptive("linf")[4:])
    # Where the classifier is wrong, its error is what gets robust.
    wrong = np.flatnonzero(predicted != labels)
    assert len(wrong) == 4
    after = losses.cross_entropy(logits_fn(guessed), predicted)
    assert (after < losses.cross_entropy(logits_fn(x), predicted))[wrong].all()


def test_preemptive_is_one_descent_step_after_one_attack_by_hand(key):
    # A linear net: attack and descent go the way of one gradient, whatever the point.
    weights = jax.random.normal(key, (9, 2))
    logits_fn = jax.tree_util.Partial(_linear, weights)
    x, labels = jnp.full((3, 9), 0.5), jnp.zeros(3, jnp.int32)
    for norm in ("linf", "l1"):
        ball = Ball(norm, 0.2)
        defended = robustify.preemptive(
            key, logits_fn, x, labels, defense=ball, threat=Ball(norm, 0.1), num_steps=8, step_size=0.2, attack_steps=1
        )
        away = ball.ascent_direction(jnp.tile(weights[:, 0] - weights[:, 1], (3, 1)))
        np.testing.assert_allclose(defended, x + 0.2 * away, atol=2e-3)  # steps as long as the radius end close by


def _linear(weights, x):
    return x @ weights


def test_wrong_arguments_of_preemptive_are_refused(key):
    logits_fn, x, labels = _problem()
    robust = functools.partial(robustify.preemptive, key, logits_fn, x, labels)
    ball = Ball("l2", 0.1)
    with pytest.raises(ValueError, match="different boxes"):
        robust(defense=ball, threat=Ball("linf", 0.1, low=-1.0))
    with pytest.raises(ValueError, match="at least 1"):
        robust(defense=ball, threat=ball, attack_steps=0)
    with pytest.raises(ValueError, match="eps must be at least 0"):
        robust(defense=ball, threat=Ball("l2", -0.1))
