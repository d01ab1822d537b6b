"""The masking zoo: defences that fool an attack are named as such, and the attack that is named breaks them."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import masked
import numpy as np
import pytest
from jax.tree_util import Partial
from masked import APGD, BALL, KEY, NUM

from rdx import attacks, goals, losses
from rdx.attacks import Loop, adaptive
from rdx.balls import Ball
from rdx.evaluate import diagnose

ZOO = {
    "saturating": (masked.saturating, "gradients", "attacks.transfer", partial(
        attacks.transfer(APGD, masked.net()), KEY, ball=BALL
    )),
    "quantised": (masked.quantised, "code", "straight_through", lambda model, *args: APGD(
        KEY, Partial(masked.through_the_quantiser, masked.net()), *args, ball=BALL
    )),
    "huge": (masked.huge, "loss", "losses.dlr", lambda model, *args: APGD(
        KEY, model, *args, ball=BALL, goal=goals.misclassify(losses.dlr)
    )),
    "stopped": (masked.stopped, "code", "adaptive.bpda", lambda model, *args: APGD(
        KEY, adaptive.bpda(model, masked.net()), *args, ball=BALL
    )),
}


@pytest.mark.parametrize("name", ZOO)
def test_masked_gradients_are_named_and_the_cure_works(name):
    wrapper, culprit, cure, attack = ZOO[name]
    x, labels = masked.images()
    model = Partial(wrapper, masked.net())
    # Under the same attack all but a few of the undefended net's answers are wrong.
    fooled = masked.accuracy(model, APGD(KEY, model, x, labels, ball=BALL).x_adv)
    assert fooled > masked.undefended() + 0.7
    diagnosis = diagnose(KEY, model, x, labels, ball=BALL, substitute=masked.net())
    assert diagnosis.status == "fail"
    assert diagnosis[culprit].status == "fail"
    assert cure in diagnosis[culprit].try_next
    # Huge logits mask cross entropy alone: the margin, another loss of who knows the model, breaks all that transfers.
    assert diagnosis["knowledge"].status == ("warn" if name == "huge" else "fail")
    assert diagnosis["determinism"].status == diagnosis["batch"].status == diagnosis["validity"].status == "ok"
    assert masked.accuracy(model, attack(model, x, labels).x_adv) <= masked.undefended() + 0.02


def test_a_transformation_at_test_time_is_named_and_its_straight_through_gradient_breaks_it():
    x, labels = masked.images()
    helper, classifier = masked.transformation_nets()
    model, by_signs, cure = (
        Partial(function, helper, classifier)
        for function in (masked.transformed, masked.transformed_by_signs, masked.through_the_transformation)
    )
    attacked = lambda target: masked.accuracy(by_signs, APGD(KEY, target, x, labels, ball=BALL).x_adv)
    assert masked.accuracy(by_signs, x) > 0.9
    alone = masked.accuracy(classifier, APGD(KEY, classifier, x, labels, ball=BALL).x_adv)
    assert attacked(model) > alone + 0.7
    diagnosis = diagnose(KEY, model, x, labels, ball=BALL, static=classifier)
    assert diagnosis.status == diagnosis["static"].status == "fail"
    assert diagnosis["code"].status == "warn"
    assert "straight_through" in diagnosis["code"].try_next
    assert "straight_through" in diagnosis["static"].try_next
    # 13 steps of which each is a forward and a backward pass.
    assert diagnosis["static"].numbers["cost"] > 2.0
    assert attacked(cure) <= alone + 0.02
    # Derivatives that JAX gives signs by itself, zeros, let through what stands beside the steps: the same attack.
    assert attacked(by_signs) <= alone + 0.02


def _one_draw(random_fn, x):
    return adaptive.eot(KEY, random_fn, 1)(x)[:, 0]


@pytest.mark.parametrize("wrapper", [masked.noisy, masked.resized])
def test_random_defences_are_named_and_expectation_breaks_them(wrapper):
    x, labels = masked.images()
    random_fn = Partial(wrapper, masked.net())

    def accuracy(x):
        rate = adaptive.stochastic_success(jax.random.key(9), random_fn, x, labels, num_draws=50)
        return float((rate <= 0.5).mean())

    assert accuracy(x) > 0.9
    # What stops at its first success, as suites of attacks do, stops by luck.
    lucky = APGD(KEY, Partial(_one_draw, random_fn), x, labels, ball=BALL, loop=Loop(stop=True))
    assert lucky.success.mean() > 0.95
    # In the undefended net, under the same attack, next to nothing stands.
    same = APGD(KEY, masked.net(), x, labels, ball=BALL, loop=Loop(stop=True))
    assert accuracy(lucky.x_adv) > masked.accuracy(masked.net(), same.x_adv) + 0.2
    diagnosis = diagnose(KEY, random_fn, x, labels, ball=BALL, is_random=True)
    assert diagnosis.status == diagnosis["luck"].status == "fail"
    assert "adaptive.eot" in diagnosis["luck"].try_next
    assert diagnosis["randomness"].status == "warn"
    assert "num_samples" in diagnosis["randomness"].try_next
    goal = goals.expected(goals.misclassify(losses.margin))
    found = APGD(KEY, adaptive.eot(KEY, random_fn, 8), x, labels, ball=BALL, goal=goal)
    assert accuracy(found.x_adv) <= masked.undefended() + 0.02


def test_nothing_is_held_against_an_honest_net():
    x, labels = masked.images()
    certified = np.zeros(NUM, bool)
    diagnosis = diagnose(KEY, masked.net(), x, labels, ball=Ball("linf", 0.1), certified=certified)
    wrong = [(one.name, one.evidence) for one in diagnosis.checks if one.status == "fail"]
    assert not wrong
    # Comparisons of short attacks may be off by an example or two; what looks at the model may not.
    assert all(diagnosis[name].status == "ok" for name in (
        "code", "logits", "finite", "accuracy", "determinism", "batch", "gradients", "differences",
        "landscape", "fixed steps", "radius", "black box", "unbounded", "validity", "certificates",
    ))
    summary = json.loads(json.dumps(diagnosis.summary(), allow_nan=False))
    assert summary["num_examples"] == 32
    assert summary["status"] == diagnosis.status != "fail"
    assert len(summary["checks"]) == len(diagnosis.checks) == 18
    again = diagnose(KEY, masked.net(), x, labels, ball=Ball("linf", 0.1), certified=certified)
    assert again == diagnosis


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms_and_no_box(norm):
    x, labels = masked.images()
    ball = Ball(norm, {"l2": 0.7, "l1": 3.0}[norm], -np.inf, np.inf)
    diagnosis = diagnose(KEY, masked.net(), x, labels, ball=ball, num_examples=16, num_steps=12, num_queries=20)
    assert diagnosis["differences"].status == diagnosis["unbounded"].status == diagnosis["radius"].status == "ok"


def test_no_radius_masks_and_inputs_of_many_axes():
    x, labels = masked.images()
    options = {"num_examples": 8, "num_steps": 12, "num_queries": 2}
    still = diagnose(KEY, masked.net(), x, labels, ball=Ball("linf", 0.0), **options)
    assert still["unbounded"].status == still["differences"].status == still["validity"].status == "ok"
    assert still["radius"].numbers["double"] == 0.0
    # Square knows no such inputs, and the mask holds a half of them still.
    boxes, mask = x.reshape(NUM, 4, 2, 4, 2), jnp.zeros((1, 4, 2, 4, 2)).at[:, 2:].set(0.1)
    held = diagnose(KEY, masked.net(), boxes, labels, ball=Ball("linf", mask), **options)
    assert held["validity"].numbers["outside"] == held["black box"].numbers["square"] == 0.0


def test_a_model_outside_jax_is_diagnosed_without_gradients():
    weights = np.asarray(masked.net().args[0][0] @ masked.net().args[0][1])

    def on_host(x):
        shape = jax.ShapeDtypeStruct((len(x), 10), x.dtype)
        return jax.pure_callback(lambda x: np.asarray(x).reshape(len(x), -1) @ weights, shape, x)

    x, labels = masked.images()
    diagnosis = diagnose(KEY, on_host, x, labels, ball=BALL, num_examples=8, num_steps=2, num_queries=5)
    assert diagnosis["code"].status == "fail"
    assert "pure_callback" in diagnosis["code"].evidence
    assert diagnosis["gradients"].status == "fail"
    assert "cannot be differentiated" in diagnosis["gradients"].evidence


def test_what_is_asked_for_is_not_held_against_an_honest_net_either():
    x, labels = masked.images()
    helper, _ = masked.transformation_nets()
    diagnosis = diagnose(
        KEY, masked.net(), x, labels, ball=Ball("linf", 0.1), is_thorough=True, substitute=helper, static=masked.net()
    )
    assert [one.name for one in diagnosis.checks if one.name in ("effort", "knowledge", "static")] == [
        "effort", "knowledge", "static"
    ]
    assert "fail" not in {diagnosis[name].status for name in ("effort", "knowledge", "static")}
    assert diagnosis["static"].status == "ok"
