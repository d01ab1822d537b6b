"""Targeted Auto-PGD: the order of targets, who meets them, and what it costs."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, losses
from rdx.attacks import Loop
from rdx.balls import Ball
from rdx.goals import Goal

BALL = Ball("linf", 0.1)


def _ladder(gains, x):
    """Class `j` has the logit `gains[j] * mean(x) - j`: by clean logits the order is 0, 1, 2, ..."""
    return gains[None, :] * x.mean(axis=1, keepdims=True) - jnp.arange(len(gains), dtype=x.dtype)[None, :]


def _run(key, gains, num=3, **options):
    x, labels = jnp.full((num, 4), 0.0), jnp.zeros(num, int)
    return attacks.apgd_targeted(key, Partial(_ladder, jnp.array(gains)), x, labels, ball=BALL, **options)


@pytest.mark.parametrize(("num_targets", "is_found"), [(2, False), (3, True), (9, True)])
def test_targets_come_by_rank(num_targets, is_found, key):
    # In the ball only class 3, of rank 4, gains enough, and only near a corner where no search begins.
    # Towards classes 1 and 2 the loss rises as the mean falls, which the box forbids.
    found = _run(key, [0.0, -1.0, -1.0, 31.0, -1.0, -1.0], num_targets=num_targets, num_steps=7)
    assert (found.success == is_found).all()


def test_who_stands_meets_every_target_and_pays(key):
    found = _run(key, [0.0, 1.0, 1.0, 1.0, 1.0], num_targets=9, num_steps=6)
    assert not found.success.any()
    np.testing.assert_array_equal(found.gradients, 4 * 6)
    np.testing.assert_array_equal(found.forwards, 2 + 4)
    again = _run(key, [0.0, 1.0, 1.0, 1.0, 1.0], num_targets=9, num_steps=6, num_restarts=2)
    np.testing.assert_array_equal(again.gradients, 2 * 4 * 6)


def test_who_falls_pays_no_more(key):
    gains = [0.0, 40.0, 1.0, 1.0, 1.0]
    found = _run(key, gains, num_steps=6)
    assert found.success.all()
    assert (found.gradients <= 6).all()
    on = _run(key, gains, num_steps=6, loop=Loop(stop=False))
    np.testing.assert_array_equal(on.gradients, 4 * 6)
    wrong = attacks.apgd_targeted(
        key, Partial(_ladder, jnp.array(gains)), jnp.zeros((1, 4)), jnp.array([1]), ball=BALL, num_steps=6
    )
    np.testing.assert_array_equal((wrong.gradients, wrong.forwards), [[0], [2]])


@pytest.mark.parametrize("num_classes", [2, 3])
def test_few_classes_climb_the_margin(num_classes, key):
    assert _run(key, [0.0, 11.0, 1.0][:num_classes], num_steps=10).success.all()
    assert not _run(key, [0.0, 9.0, 1.0][:num_classes], num_steps=10).success.any()


def test_any_wrong_label_counts(key):
    # Climbing towards class 1 from within the ball meets class 2 on the way.
    def model(x):
        rise = x.mean(axis=1)
        return jnp.stack([0.0 * rise, 5.0 * rise - 0.9, 30.0 * rise - 2.0, 0.0 * rise - 9.0], axis=1)

    x, labels = jnp.zeros((2, 4)), jnp.zeros(2, int)
    found = attacks.apgd_targeted(key, model, x, labels, ball=BALL, num_targets=1, num_steps=10)
    np.testing.assert_array_equal(model(found.x_adv).argmax(axis=1), [2, 2])
    assert found.success.all()
    np.testing.assert_allclose(found.loss, losses.cross_entropy(model(found.x_adv), labels), rtol=1e-5)


def test_unusable_models_and_options_are_refused(key):
    x, labels = jnp.zeros((2, 4)), jnp.zeros(2, int)
    with pytest.raises(ValueError, match="logits"):
        attacks.apgd_targeted(
            key, lambda x: (x, x), x, labels, ball=BALL,
            goal=Goal(Partial(lambda out, y: out[0][:, 0]), Partial(lambda out, y: out[0][:, 0] > 1.0)),
        )
    with pytest.raises(ValueError, match="num_targets"):
        attacks.apgd_targeted(key, lambda x: x, x, labels, ball=BALL, num_targets=0)
