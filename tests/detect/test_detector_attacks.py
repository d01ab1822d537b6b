"""Attacks on detectors: in the ball, honest about success, equal to closed forms, and stronger than fixed ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detect_cases import detectors, digits, trained
from jax.tree_util import Partial

from rdx import attacks, losses, models
from rdx.balls import Ball
from rdx.detect import extra_class, goals, joint_loss, matching, selective, suite, thresholds

KEY = jax.random.key(11)
BALL = Ball("linf", 0.25)


@functools.cache
def kde():
    """The kernel density detector, at 5 % false positives and unit scale, and the inputs that are attacked."""
    detector = detectors()["kernel density"]
    _, _, x, labels = digits()
    logits, score = thresholds.collect(detector, x[100:])
    threshold = thresholds.calibrate(score, logits.argmax(1) == labels[100:])
    return thresholds.calibrated(detector, threshold, scale=score.std()), jnp.asarray(x[:24]), jnp.asarray(labels[:24])


def embeddings():
    forward, variables = trained()
    return models.hidden_fn(forward.model, variables)


def cases():
    guides = matching.guides(kde()[0], embeddings(), digits()[2][100:], digits()[3][100:])
    return {
        "selective": functools.partial(selective.selective_pgd, num_steps=20),
        "orthogonal": functools.partial(selective.orthogonal_pgd, num_steps=20),
        "joint": functools.partial(joint_loss.joint_pgd, num_steps=10, num_rounds=3),
        "match": functools.partial(matching.match, embed=embeddings(), guides=guides, num_steps=20),
        "extra class": functools.partial(extra_class.carlini_wagner, num_steps=20, num_search_steps=2, step_size=0.1),
    }


@pytest.mark.parametrize("name", ["selective", "orthogonal", "joint", "match", "extra class"])
def test_battery(name):
    attack, (detector, x, labels) = cases()[name], kde()
    result = attack(KEY, detector, x, labels, ball=BALL)
    assert bool(BALL.contains(result.x_adv, x).all())
    # Judged by fresh passes: the goal is to be wrong and accepted, nothing else.
    logits, score = detector(result.x_adv)
    evades = losses.is_wrong(logits, labels) & ~(score > 0.0)
    np.testing.assert_array_equal(result.success, evades)
    assert bool(result.success.any())
    # Alone as in company: the same keys by index. Rounding may differ, which the sign of a gradient near 0 shows.
    alone = attack(KEY, detector, x[3:5], labels[3:5], ball=BALL, index=jnp.asarray([3, 4]))
    np.testing.assert_array_equal(alone.success, result.success[3:5])
    again = attack(KEY, detector, x, labels, ball=BALL)
    np.testing.assert_array_equal(again.x_adv, result.x_adv)


def _line(x):
    """On the plane: class 1 where x_0 > 0, rejected where x_1 < 0.5."""
    return jnp.stack([-x[:, 0], x[:, 0]], axis=1), 0.5 - x[:, 1]


PLANE = Partial(_line)
X, LABELS = jnp.asarray([[-0.2, 0.1]]), jnp.asarray([0])


@pytest.mark.parametrize("attack", [
    selective.selective_pgd, selective.orthogonal_pgd, functools.partial(joint_loss.joint_pgd, num_rounds=6),
    functools.partial(extra_class.carlini_wagner, num_steps=100),
])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_corner_of_the_plane_is_reached_exactly_where_it_can_be(attack, norm):
    # The nearest accepted point of class 1 is (0, 0.5): 0.4 away in linf, sqrt(0.2) in l2.
    nearest = 0.4 if norm == "linf" else 0.2**0.5
    near, far = (attack(KEY, PLANE, X, LABELS, ball=Ball(norm, by * nearest, -2.0, 2.0)) for by in (0.98, 1.1))
    assert not bool(near.success[0])
    assert bool(far.success[0])


def test_orthogonal_gradients_are_orthogonal():
    g, h = (jax.random.normal(key, (5, 4, 3)) for key in jax.random.split(KEY))
    projected = selective.without(g, 1e-20 * h)  # as small as a confident model's
    np.testing.assert_allclose((projected * h).sum(axis=(1, 2)), 0.0, atol=1e-5)
    removed = (g - projected) / h
    np.testing.assert_allclose(removed, jnp.broadcast_to(removed[:, :1, :1], removed.shape), rtol=1e-3)
    np.testing.assert_array_equal(selective.without(g, jnp.zeros_like(g)), g)


def test_the_weight_of_an_example_is_bracketed():
    weight = joint_loss._Weight(jnp.asarray([1.0, 1.0]), jnp.zeros(2), jnp.full(2, jnp.inf))
    weight = joint_loss._next_weight(weight, jnp.asarray([True, False]))
    np.testing.assert_allclose(weight.value, [10.0, 0.1])
    weight = joint_loss._next_weight(weight, jnp.asarray([False, True]))
    np.testing.assert_allclose(weight.value, [10.0**0.5, 10.0**-0.5], rtol=1e-6)


def test_the_extra_class_is_predicted_exactly_where_the_detector_rejects():
    key = jax.random.split(KEY)
    logits, score = 5.0 * jax.random.normal(key[0], (500, 4)) - 9.0, jax.random.normal(key[1], (500,))
    extended = extra_class.extra_class(Partial(lambda x: (x[:, :4], x[:, 4])), threshold=0.3)
    predicted = extended(jnp.concatenate([logits, score[:, None]], axis=1)).argmax(axis=1)
    decided = goals.decide((logits, score), 0.3)
    np.testing.assert_array_equal(jnp.where(predicted == 4, goals.REJECTED, predicted), decided)
    labels = jnp.zeros(500, jnp.int32)
    values = extended(jnp.concatenate([logits, score[:, None]], axis=1))
    goal = extra_class.evade_extra_class()
    np.testing.assert_array_equal(goal.success(values, labels), goals.evade(0.3).success((logits, score), labels))
    np.testing.assert_array_equal(goal.success(values, labels), goal.loss(values, labels) > 0)


def test_guides_are_accepted_and_of_another_class():
    detector, x, labels = kde()
    guides = matching.guides(detector, embeddings(), digits()[2][100:], digits()[3][100:])
    wanted = matching._nearest(guides, embeddings()(x), labels, 0)
    place = (np.asarray(wanted)[:, None] == guides.embeddings).all(axis=2).argmax(axis=1)
    assert (guides.labels[place] != np.asarray(labels)).all()
    own = np.square(np.asarray(embeddings()(x))[:, None] - guides.embeddings).sum(axis=2)
    own[guides.labels[None] == np.asarray(labels)[:, None]] = np.inf
    chosen = np.square(np.asarray(embeddings()(x)) - guides.embeddings[place]).sum(axis=1)
    np.testing.assert_allclose(chosen, own.min(axis=1), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="Fewer than two classes"):
        matching.guides(detector, embeddings(), digits()[2][:1], digits()[3][:1])


def test_the_suite_is_the_worst_case_and_beats_what_does_not_know_the_detector():
    detector, x, labels = kde()
    guides = matching.guides(detector, embeddings(), digits()[2][100:], digits()[3][100:])
    adaptive = suite.adaptive(
        matched={"features": (embeddings(), guides)}, num_steps=20, num_restarts=1, num_guides=1, num_queries=50
    )
    found = suite.worst_case(KEY, detector, x, labels, ball=BALL, attacks_on=adaptive)
    goal = goals.evade(0.0)
    for attack in suite.fixed(num_steps=20).values():
        fixed = attack(KEY, detector, x, labels, ball=BALL, index=jnp.arange(len(x)), loop=attacks.Loop())
        evades = goal.success(detector(fixed.x_adv), labels)
        assert bool(losses.is_wrong(detector(fixed.x_adv)[0], labels).mean() > 0.5)
        assert int(found.result.success.sum()) >= int(evades.sum())
    assert int(found.result.success.sum()) > int(evades.sum())
    np.testing.assert_array_equal(found.result.success, goal.success(detector(found.result.x_adv), labels))
    assert bool(((found.broken_by >= 0) & (found.broken_by < len(adaptive)))[found.result.success].any())
