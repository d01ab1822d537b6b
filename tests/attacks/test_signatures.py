"""One signature for all attacks, and goals whose data follow the examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_cases import CASES
from jax.tree_util import Partial

from rdx import attacks, evaluate, goals, losses
from rdx.attacks import signatures
from rdx.balls import Ball

NUM = 40


def _affine(weights, x):
    return (x - 0.5) @ weights


def _batch():
    model = Partial(_affine, jax.random.normal(jax.random.key(3), (6, 4)))
    x = jax.random.uniform(jax.random.key(4), (NUM, 6))
    labels = model(x).argmax(axis=1)
    return model, x, labels, (labels + 1 + jnp.arange(NUM) % 3) % 4


def test_attacks_with_and_without_keys_are_called_alike(key):
    model, x, labels = Partial(_affine, jnp.eye(2)), jnp.array([[0.6, 0.4], [0.9, 0.1]]), jnp.zeros(2, jnp.int32)
    options = {"ball": Ball("linf", 0.15), "index": np.arange(2), "loop": attacks.Loop(stop=False)}
    for attack in (attacks.fgsm, functools.partial(attacks.pgd, num_steps=3), functools.partial(attacks.bim)):
        found = attacks.keyed(attack)(key, model, x, labels, **options)
        np.testing.assert_array_equal(found.success, [True, False])

    def anything(*args, **options):
        return args, options

    assert attacks.keyed(attacks.pgd) is attacks.pgd
    assert attacks.keyed(anything) is anything
    assert attacks.keyed(attacks.keyed(attacks.fgsm))(key, model, x, labels, **options).success[0]


# Few steps: what is tested is how they are called.
FEW = {"num_steps": 2, "num_queries": 60, "num_search_steps": 1, "num_searches": 1, "patience": 2}


def _short(attack):
    options = getattr(attack, "keywords", {})
    return functools.partial(attack, **{name: value for name, value in FEW.items() if name in options})


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if case.is_random else ()) for name, case in CASES.items()
])
def test_every_attack_takes_part_in_a_cascade(name, key):
    model, x, labels, _ = _batch()
    x, labels = x[:8].reshape(8, 2, 3, 1), labels[:8]
    flat = Partial(_flat, model)
    attack, ball = _short(CASES[name].attack), Ball(CASES[name].norms[0], 0.02)
    found = attacks.cascade(key, {name: attack}, flat, x, labels, ball=ball)
    np.testing.assert_array_equal(found.result.success, losses.is_wrong(flat(found.result.x_adv), labels))
    assert (found.result.forwards > 1).all()


def _flat(model, x):
    return model(x.reshape(len(x), -1))


@pytest.mark.parametrize("name", ["fgsm", "bim"])
def test_attacks_without_keys_take_part_in_evaluations_and_transfers(name, key):
    model, x, labels, _ = _batch()
    attack, ball = _short(CASES[name].attack), Ball("linf", 0.1)
    transferred = attacks.transfer(attack, model)
    found = evaluate.evaluate(
        key, model, x, labels, ball=ball, attacks={name: attack, "again": transferred}, diagnose=None
    )
    assert found.broken.any()
    suite = {"transferred": transferred, name: attack}
    cascade = attacks.cascade(key, suite, model, x, labels, ball=ball)
    assert (np.asarray(cascade.broken_by) == 0).any()
    np.testing.assert_array_equal(cascade.result.success, found.broken)


@pytest.mark.parametrize("is_bound", [True, False])
def test_targets_follow_the_examples_that_stand(is_bound, key):
    model, x, labels, targets = _batch()
    goal, ball = goals.target(targets, losses.targeted_margin), Ball("linf", 0.15)
    weak, strong = (functools.partial(attacks.bim, num_steps=2, step_size=size) for size in (0.02, 0.1))
    alone = strong(model, x, labels, ball=ball, goal=goal)
    suite = {"weak": weak, "strong": strong}
    if is_bound:
        suite = {name: functools.partial(attack, goal=goal) for name, attack in suite.items()}
    found = attacks.cascade(key, suite, model, x, labels, ball=ball, goal=goal)
    np.testing.assert_array_equal(found.result.success, model(found.result.x_adv).argmax(axis=1) == targets)
    assert 2 < (np.asarray(found.broken_by) == 0).sum() < 8  # so that few are missing, and the arrays are as long
    np.testing.assert_array_equal(found.result.success, alone.success | (np.asarray(found.broken_by) == 0))


def test_targets_follow_the_examples_of_an_evaluation(key):
    model, x, labels, targets = _batch()
    labels = labels.at[::5].set(targets[::5])  # those that are wrong already are not attacked
    attack = functools.partial(attacks.bim, goal=goals.target(targets, losses.targeted_margin), num_steps=5)
    found = evaluate.evaluate(
        key, model, x, labels, ball=Ball("linf", 0.15), attacks={"bim": attack}, batch_size=16, diagnose=None
    )
    wanted = attack(model, x, labels, ball=Ball("linf", 0.15)).success
    reached = found.adversarial_prediction == np.asarray(targets)
    assert (found.attacked == (np.arange(NUM) % 5 > 0)).all()
    np.testing.assert_array_equal(reached[found.attacked], np.asarray(wanted)[found.attacked])


@pytest.mark.parametrize("attack", [
    attacks.pgd, attacks.apgd, attacks.square, attacks.fab_targeted, attacks.autoattack,
])
def test_empty_batches_are_refused(attack, key):
    model, x, labels, _ = _batch()
    with pytest.raises(ValueError, match="leave out empty batches"):
        attack(key, model, x[:0], labels[:0], ball=Ball("linf", 0.1))


def test_targets_of_other_examples_are_refused(key):
    model, x, labels, targets = _batch()
    goal = goals.target(targets[:8])
    with pytest.raises(ValueError, match="each of the 40 examples its own"):
        attacks.pgd(key, model, x, labels, ball=Ball("linf", 0.1), goal=goal)
    with pytest.raises(ValueError, match="each of the 40 examples its own"):
        signatures.restrict(functools.partial(attacks.pgd, goal=goal), np.arange(8), NUM)
