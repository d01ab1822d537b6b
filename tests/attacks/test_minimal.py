"""DeepFool, FAB, DDN and FMN against the true minimal norms; steps by hand; what they count and what eps caps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from minimal_norms import check, keyless, linear, relu

from rdx import attacks, goals, losses
from rdx.attacks import base, minimal
from rdx.balls import Ball

ATTACKS = {
    # The overshoot is part of the distance: the default of 2 % leaves nothing of 1.02 to rounding.
    "deepfool": keyless(partial(attacks.deepfool, num_steps=20, overshoot=0.019)),
    "fab": partial(attacks.fab, num_steps=20),
    "fab_targeted": partial(attacks.fab_targeted, num_steps=20),
    "ddn": keyless(attacks.ddn),
    "fmn": keyless(attacks.fmn),
}
EACH = [(name, norm) for name in ATTACKS for norm in ("linf", "l2", "l1") if (name, norm) != ("ddn", "linf")]
EACH = [pair for pair in EACH if pair != ("ddn", "l1")]
each_attack_and_norm = pytest.mark.parametrize(("name", "norm"), EACH)


@each_attack_and_norm
@pytest.mark.parametrize("num_classes", [2, 3])
def test_linear_classifiers(name, norm, num_classes):
    for has_box in (False, True):
        at_most = 1.02 if name == "deepfool" else 1.005
        check(ATTACKS[name], linear(num_classes=num_classes, has_box=has_box), norm, at_most=at_most)


@each_attack_and_norm
def test_small_nets(name, norm):
    # No local search is sure of the nearest of many facets; DeepFool is content with the first one that it meets.
    check(ATTACKS[name], relu(), norm, at_most=1.2 if name == "deepfool" else 1.06)


@pytest.mark.parametrize(("name", "norm"), [pair for pair in EACH if pair[0] != "fab_targeted"])
def test_targets_of_linear_classifiers(name, norm):
    # With three classes a target is behind two hyperplanes, of which DeepFool and FAB see one at a time.
    setting, at_most = linear(num_classes=3, has_box=True), {"deepfool": 1.25, "fab": 1.1}.get(name, 1.01)
    check(ATTACKS[name], setting, norm, at_most=at_most, targets=setting.targets)


def _affine(parameters, x):
    weights, bias = parameters
    return x @ weights + bias[None]


def _plane(*weights):
    """Two classes whose margin to the second one is `<w, x> - 1`."""
    w = jnp.array(weights)
    return Partial(_affine, (jnp.stack([-0.5 * w, 0.5 * w], axis=1), jnp.array([0.5, -0.5])))


X, LABELS = jnp.array([[0.5, 0.1, 0.2]]), jnp.array([0])
MODEL = _plane(1.0, 2.0, -0.5)  # the margin at X is -0.4
STEPS = {
    "l2": 0.4 / 5.25 * np.array([[1.0, 2.0, -0.5]]),
    "linf": 0.4 / 3.5 * np.array([[1.0, 1.0, -1.0]]),
    "l1": 0.4 / 2.0 * np.array([[0.0, 1.0, 0.0]]),
}


@pytest.mark.parametrize("norm", STEPS)
def test_a_deepfool_step_by_hand(norm):
    found = attacks.deepfool(MODEL, X, LABELS, ball=Ball(norm, jnp.inf), overshoot=0.1)
    np.testing.assert_allclose(found.x_adv, X + 1.1 * STEPS[norm], atol=1e-6)
    # The clean logits twice; the gradient at x and that at the point that succeeds.
    assert (found.forwards[0], found.gradients[0]) == (2, 2)


def _parabola(parameters, x):
    return jnp.concatenate([0.0 * x, 2.0 * (x - x * x) - parameters], axis=1)


def test_deepfool_goes_on_where_the_model_bends():
    # Newton's steps from 0 towards the root 0.1838 of the margin 2 (x - x^2) - 0.3 stay below it.
    found = attacks.deepfool(
        Partial(_parabola, jnp.array(0.3)), jnp.zeros((1, 1)), LABELS, ball=Ball("linf", jnp.inf), overshoot=0.05,
    )
    total = 0.0
    for _ in range(2):
        point = 1.05 * total
        total -= (2.0 * (point - point**2) - 0.3) / (2.0 - 4.0 * point)
    np.testing.assert_allclose(found.x_adv, [[1.05 * total]], rtol=1e-5)
    assert found.gradients[0] == 3


def test_ddn_steps_by_hand():
    ball = Ball("l2", jnp.inf, -jnp.inf, jnp.inf)
    found = attacks.ddn(MODEL, X, LABELS, ball=ball, initial_norm=0.2, gamma=0.1, num_steps=2)
    # 0.4 / sqrt(5.25) = 0.1746: x fails, so 0.22; that succeeds, so 0.198, which succeeds, too, and is nearer.
    np.testing.assert_allclose(found.x_adv, X + 0.198 * np.array([[1.0, 2.0, -0.5]]) / np.sqrt(5.25), rtol=1e-6)
    assert (found.forwards[0], found.gradients[0]) == (2, 2)


def test_fmn_steps_by_hand():
    ball = Ball("linf", jnp.inf, -jnp.inf, jnp.inf)
    found = attacks.fmn(MODEL, X, LABELS, ball=ball, num_steps=2, gamma=0.1)
    # Gradient steps are longer than the radius. The first one is 1.1 times the distance of the boundary; the second one
    # (1 - gamma_1) times that, with gamma_1 in the middle of 0.1 and 0.002: still a success.
    np.testing.assert_allclose(found.x_adv, X + 1.1 * (1.0 - 0.051) * STEPS["linf"], rtol=1e-5)
    assert (found.forwards[0], found.gradients[0]) == (2, 2)


def test_a_fab_step_by_hand(key):
    goal = goals.misclassify(losses.margin)
    found = attacks.fab(key, MODEL, X, LABELS, ball=Ball("l2", jnp.inf), goal=goal, num_steps=1)
    # The step is 5 % too long; then every secant step leaves a hundredth of the rest.
    np.testing.assert_allclose(found.x_adv, X + (1.0 + 0.05 * 0.01**3) * STEPS["l2"], atol=1e-6)
    assert (found.forwards[0], found.gradients[0]) == (5, 1)


def test_what_fab_counts(key):
    setting = linear(num_classes=4, dim=5, num=3)
    arguments = (key, setting.model, setting.x, setting.labels)
    found = attacks.fab(*arguments, ball=setting.ball("linf"), num_steps=4, num_restarts=2)
    np.testing.assert_array_equal(found.forwards, 2 + 2 * (4 + 3))
    np.testing.assert_array_equal(found.gradients, 2 * 4 * 3)
    found = attacks.fab_targeted(*arguments, ball=setting.ball("linf"), num_steps=4, num_restarts=2)
    np.testing.assert_array_equal(found.forwards, 2 + 2 * 3 * (4 + 3))
    np.testing.assert_array_equal(found.gradients, 2 * 3 * 4)


@pytest.mark.parametrize("name", ["fab", "fab_targeted"])
def test_more_restarts_are_never_farther(name, key):
    setting, attack = relu(dim=4), getattr(attacks, name)
    few, many = (
        attack(key, setting.model, setting.x, setting.labels, ball=setting.ball("linf"), num_steps=5, num_restarts=num)
        for num in (1, 3)
    )
    assert (many.distance <= few.distance).all()
    assert (many.distance < few.distance).any()


def test_the_targets_of_fab(key):
    # The likeliest wrong class is 1, whose boundary is at 0.9; class 3 is at 0.2, class 2 at 0.5.
    weights = jnp.array([[0.0, 0.1, 1.0, 2.0]])
    model = Partial(_affine, (weights, jnp.array([0.0, -0.09, -0.5, -0.4])))
    x, labels, ball = jnp.zeros((1, 1)), jnp.array([0]), Ball("linf", jnp.inf)
    problem, _ = base.begin(model, x, labels, ball, None)
    np.testing.assert_array_equal(minimal.other_classes(problem), [[1, 3, 2]])
    one, two, all_three = (
        attacks.fab_targeted(key, model, x, labels, ball=ball, num_steps=1, num_targets=num) for num in (1, 2, 9)
    )
    # Past 0.2 class 3 wins: the final search from 0.945 finds its own way down.
    assert (one.distance >= two.distance).all()
    np.testing.assert_allclose(two.distance, 0.2, rtol=1e-4)
    np.testing.assert_array_equal(np.concatenate([one.gradients, two.gradients, all_three.gradients]), [1, 2, 3])
    with pytest.raises(ValueError, match="num_targets"):
        attacks.fab_targeted(key, model, x, labels, ball=ball, num_targets=0)


@pytest.mark.parametrize(("name", "norm"), [("deepfool", "linf"), ("fab", "linf"), ("ddn", "l2"), ("fmn", "l1")])
def test_the_radius_caps_what_counts(name, norm, key):
    setting = linear(has_box=True)
    run = partial(ATTACKS[name], key, setting.model, setting.x, setting.labels)
    free = run(ball=setting.ball(norm))
    ball = setting.ball(norm, jnp.sort(free.distance)[2:4].mean())
    capped = run(ball=ball)
    np.testing.assert_array_equal(capped.success, free.distance < ball.eps)
    assert 0 < capped.success.sum() < len(setting.x)
    np.testing.assert_allclose(capped.x_adv, attacks.limit(free, setting.x, ball), atol=1e-5)


def test_candidates_narrow_the_choice():
    setting = linear(num_classes=4)
    run = partial(attacks.deepfool, setting.model, setting.x, setting.labels, ball=setting.ball("l2"))
    everything, one = run(), run(num_candidates=1)
    np.testing.assert_array_equal(everything.gradients, 2 * 3)
    np.testing.assert_array_equal(one.gradients, 2)
    assert (one.distance >= everything.distance - 1e-6).all()
    for options in ({"num_candidates": 0}, {"num_candidates": 1, "goal": goals.misclassify(losses.margin)}):
        with pytest.raises(ValueError, match="num_candidates"):
            run(**options)


def test_ddn_keeps_to_grey_levels():
    setting = linear(has_box=True)
    x = jnp.round(setting.x * 63) / 63
    labels = setting.model(x).argmax(axis=1)
    run = partial(attacks.ddn, setting.model, x, labels, ball=setting.ball("l2"))
    found, plain = run(num_levels=64), run()
    assert found.success.all()
    np.testing.assert_allclose(found.x_adv * 63, jnp.round(found.x_adv * 63), atol=1e-5)
    # Rounding moves every element by half a level at most.
    assert (found.distance < plain.distance + np.sqrt(12) / 63).all()
    with pytest.raises(ValueError, match="grey levels"):
        attacks.ddn(setting.model, setting.x, labels, ball=setting.ball("l2"), num_levels=64)
    with pytest.raises(ValueError, match="at least 2"):
        run(num_levels=1)


def test_other_norms_than_ddns_are_named():
    with pytest.raises(ValueError, match="linf"):
        attacks.ddn(MODEL, X, LABELS, ball=Ball("linf", 1.0))


def test_linearisation_is_the_jacobian():
    setting = relu(num_classes=4, dim=3)
    problem, _ = base.begin(setting.model, setting.x, setting.labels, setting.ball("l2"), None)
    classes = minimal.other_classes(problem)
    _, functions = minimal.linearise(problem, setting.x, classes)
    logits, jacobian = setting.model(setting.x), jax.vmap(jax.jacobian(lambda v: setting.model(v[None])[0]))(setting.x)
    for i, label in enumerate(setting.labels):
        assert {*classes[i].tolist(), int(label)} == {0, 1, 2, 3}
        assert (jnp.diff(functions.values[i]) <= 0).all()
        np.testing.assert_allclose(functions.values[i], logits[i, classes[i]] - logits[i, label], rtol=1e-5)
        wanted = jacobian[i, classes[i]] - jacobian[i, label][None]
        np.testing.assert_allclose(functions.gradients[i], wanted, rtol=1e-4, atol=1e-6)


def _root(parameters, x):
    return jnp.stack([jnp.sqrt(jnp.abs(x.sum(axis=1) - 0.5)), 0.3 * x[:, 0] + parameters], axis=1)


@pytest.mark.parametrize("name", ATTACKS)
def test_gradients_that_are_not_finite_do_no_harm(name, key):
    # The root's gradient is not finite at the first input.
    x = jnp.array([[0.25, 0.25], [0.4, 0.4]])
    found = ATTACKS[name](key, Partial(_root, jnp.array(-0.1)), x, jnp.array([0, 0]), ball=Ball("l2", jnp.inf))
    assert ((found.x_adv >= 0) & (found.x_adv <= 1)).all()
    assert jnp.isfinite(found.loss).all()


def test_a_trace_of_distances(key):
    setting = relu()
    found = attacks.fab(
        key, setting.model, setting.x, setting.labels, ball=setting.ball("l2"), num_steps=6,
        loop=attacks.Loop(trace=True),
    )
    assert found.trace is not None
    assert found.trace.distance.shape == (6, len(setting.x))
    steps = np.diff(np.asarray(found.trace.distance), axis=0)[np.asarray(found.trace.success[:-1])]
    assert (steps <= 0).all()
    assert (steps < 0).any()


def test_a_misclassified_input_is_its_own_nearest(key):
    setting = linear(has_box=True)
    for name, attack in ATTACKS.items():
        found = attack(key, setting.model, setting.x, setting.targets, ball=setting.ball("l2"))
        np.testing.assert_array_equal(found.x_adv, setting.x, err_msg=name)
        np.testing.assert_array_equal(found.distance, 0.0)
        assert found.success.all()


@pytest.mark.parametrize("norm", STEPS)
def test_derivatives_and_grids_of_boxes(norm):
    def distance(bias, high):
        model = Partial(_affine, (MODEL.args[0][0], jnp.array([0.5, -0.5]) + jnp.array([0.0, 1.0]) * bias))
        ball = Ball(norm, jnp.inf, 0.0, high)
        return attacks.deepfool(model, X, LABELS, ball=ball, overshoot=0.1, num_steps=2).distance[0]

    # The margin rises with the bias, so the distance |f| / ||w||_q falls by 1 / ||w||_q.
    steepness = {"l2": np.sqrt(5.25), "linf": 3.5, "l1": 2.0}[norm]
    np.testing.assert_allclose(jax.grad(distance)(0.0, 1.0), -1.1 / steepness, rtol=1e-5)
    grid = jax.vmap(distance, in_axes=(None, 0))(0.0, jnp.array([1.0, 0.51]))
    np.testing.assert_allclose(grid, [distance(0.0, 1.0), distance(0.0, 0.51)], rtol=1e-6)
