"""What attacks did is judged: hand-made runs for every status, both ways; what is claimed; what is asked for."""

import jax.numpy as jnp
import masked
import numpy as np
import pytest
from jax.tree_util import Partial
from masked import APGD, BALL, KEY, NUM

from rdx.evaluate import attack_checks, extra_checks
from rdx.evaluate.attack_checks import Runs
from rdx.evaluate.extra_checks import Beside

# So many that shares decide: from 2 examples in a warning, from 11 a failure.
MANY = 200


def _first(share, num=MANY):
    return np.arange(num) < round(share * num)


def _runs(*, num=MANY, is_right=None, early=0.5, rising=0.0, **shares):
    """Makes runs of sound attacks, each breaking the first examples, but for the shares that are given."""
    sound = {
        "half": 0.2, "cross_entropy": 0.5, "double": 0.9, "unbounded": 1.0, "rescaled": 0.5, "margin": 0.5, "pgd": 0.5,
        "one_step": 0.3, "noise": 0.05, "square": 0.4,
    }
    broken = {name: _first(share, num) for name, share in (sound | shares).items()}
    by_name = lambda value: {"cross_entropy": value}
    is_right = np.ones(num, bool) if is_right is None else is_right
    first, early, rising = map(by_name, (broken["cross_entropy"], _first(early, num), np.full(num, rising)))
    return Runs(is_right, broken, first, early, rising, {})


def _status(runs):
    told = attack_checks.judge(runs)
    assert all(bool(one.try_next) == (one.status != "ok") for one in told)
    return {one.name: one.status for one in told if one.status != "ok"}


def test_sound_attacks_are_believed():
    assert _status(_runs()) == {}
    assert len(attack_checks.judge(_runs())) == 7


@pytest.mark.parametrize(("name", "attack", "start", "sign"), [
    ("loss", "margin", 0.5, 1), ("loss", "rescaled", 0.5, 1), ("fixed steps", "pgd", 0.5, 1),
    ("one step", "one_step", 0.5, 1), ("radius", "half", 0.5, 1), ("radius", "double", 0.5, -1),
    ("black box", "square", 0.5, 1), ("black box", "noise", 0.5, 1), ("unbounded", "unbounded", 1.0, -1),
])
def test_what_must_not_be_weaker_is_told_by_shares(name, attack, start, sign):
    # 1 % are two examples of 200; a loss that breaks more also leaves other attacks behind.
    for share, status in ((0.0, None), (0.01, "warn"), (0.04, "warn"), (0.06, "fail"), (0.3, "fail")):
        assert _status(_runs(**{attack: start + sign * share})).get(name) == status
        assert set(_status(_runs(**{attack: start + sign * share}))) <= {name}


@pytest.mark.parametrize(("changes", "status"), [
    ({"early": 0.5}, None), ({"early": 0.495}, None), ({"early": 0.48}, "warn"), ({"early": 0.0}, "warn"),
    ({"rising": 0.09}, None), ({"rising": 0.11}, "warn"),
    ({"rising": 0.9, "cross_entropy": 1.0, "double": 1.0, "early": 1.0}, None),
])
def test_optimisation_that_is_not_over(changes, status):
    # In the last case nothing stands, so that no loss matters.
    assert _status(_runs(**changes)).get("optimisation") == status


def test_how_losses_rose_counts_only_where_they_fail():
    runs = _runs(rising=0.9)
    runs.rising["cross_entropy"][~_first(0.5)] = 0.0
    assert _status(runs) == {}


def test_in_small_samples_numbers_decide():
    # Of 32 examples one is no difference, two warn, four fail; of a black box one is enough to warn.
    for number, step, box in ((1, None, "warn"), (2, "warn", "fail"), (3, "warn", "fail"), (4, "fail", "fail")):
        assert _status(_runs(num=32, one_step=0.5 + number / 32)).get("one step") == step
        assert _status(_runs(num=32, square=0.5 + number / 32)).get("black box") == box


def test_only_what_is_classified_correctly_counts():
    excess = {"pgd": 0.7, "one_step": 0.7, "square": 0.7, "margin": 0.7}
    assert set(_status(_runs(**excess | {"margin": 0.5}))) == {"fixed steps", "one step", "black box"}
    assert _status(_runs(**excess, is_right=_first(0.5))) == {}
    assert _status(_runs(is_right=np.zeros(MANY, bool))) == {}


def _asked(beside=None, *, is_masked=False, **shares):
    told = extra_checks.judge(_runs(**shares), beside, is_masked=is_masked)
    assert all(bool(one.try_next) == (one.status != "ok") for one in told)
    return {one.name: one.status for one in told}


def test_nothing_is_said_that_was_not_asked_for():
    assert _asked() == {}


def test_effort_must_not_pay():
    for share, status in ((0.5, "ok"), (0.505, "ok"), (0.51, "warn"), (0.6, "fail")):
        assert _asked(effort=share) == {"effort": status}


def test_who_knows_more_must_break_more():
    for share, status in ((0.3, "ok"), (0.4, "ok"), (0.42, "warn"), (0.5, "warn"), (0.505, "warn"), (0.6, "fail")):
        assert _asked(transfer=share) == {"knowledge": status}
    poor, masks = (extra_checks.judge(_runs(transfer=share), None, is_masked=False)[0].try_next for share in (0.5, 0.6))
    assert poor == attack_checks.SQUARE
    assert "bpda" in masks


@pytest.mark.parametrize(("alone", "is_masked", "shares", "status"), [
    (0.5, True, {}, "ok"), (0.4, True, {}, "ok"), (0.52, True, {}, "warn"), (0.6, True, {}, "fail"),
    (0.6, False, {}, "warn"), (0.5, False, {"static_transfer": 0.505}, "warn"),
    (0.5, False, {"static_gradient": 0.505}, "warn"), (0.5, False, {"static_transfer": 0.6}, "fail"),
    (0.5, False, {"static_gradient": 0.6}, "fail"), (0.6, True, {"static_gradient": 0.6}, "fail"),
])
def test_a_defence_at_test_time_beside_its_static_model(alone, is_masked, shares, status):
    # The static model loses the share `alone` where the defended one loses a half, or what is broken through it.
    through = {"static_transfer": 0.3, "static_gradient": 0.45} | shares
    assert _asked(Beside(_first(alone), 13.0), is_masked=is_masked, **through) == {"static": status}


def test_validity_and_certificates():
    x, labels = masked.images()
    found = APGD(KEY, masked.net(), x, labels, ball=BALL)
    judge = lambda x_adv, success: attack_checks.validity(masked.net(), x, labels, x_adv, success, BALL)
    assert judge(found.x_adv, found.success).status == "ok"
    assert judge(x, found.success).numbers["false"] > 0.9
    assert judge(found.x_adv.at[0, 0, 0].add(0.3), found.success).numbers["outside"] == pytest.approx(1 / NUM)
    assert judge(found.x_adv.at[0, 0, 0].set(jnp.nan), found.success).status == "fail"
    # Perturbations below half a grey level vanish as images.
    odd = lambda x: jnp.abs(255.0 * x - jnp.round(255.0 * x)).sum(axis=(1, 2, 3))
    tiny = Partial(lambda x: jnp.stack([-odd(x), jnp.full(len(x), -1.0)], axis=1))
    inside = jnp.clip(x + 0.001, 0.0, 1.0)
    undone = attack_checks.validity(tiny, x, jnp.zeros(NUM, int), inside, jnp.ones(NUM, bool), BALL)
    assert undone.status == "warn"
    assert undone.numbers["undone"] == 1.0
    broken = np.array([True, False, True])
    assert attack_checks.certified_versus_attacked(jnp.array([False, True, False]), broken).status == "ok"
    assert attack_checks.certified_versus_attacked(jnp.array([False, True, True]), broken).status == "fail"
