"""The battery that every attack must pass, at a fixed radius; minimal-norm attacks have it as their limit."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_cases import CASES, WITHOUT
from attack_cases import model as _model
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from rdx import attacks, goals, losses, norms
from rdx.balls import Ball

EPS = {"linf": 0.06, "l2": 0.25, "l1": 0.6}
GOAL = goals.misclassify(losses.margin)
# What every kind of attack has in common with others is asked of these at all times, of the others with the slow tests:
# each kind of search once, in the first of its norms.
CORE = {"fgsm", "pgd", "apgd", "fab_targeted", "cw", "square", "nes", "hopskipjump"}
# In every norm, as all steps and projections are.
EVERY_NORM = {"fgsm", "pgd", "apgd"}


def _marks(name, place=0):
    return () if name in (EVERY_NORM if place else CORE) else pytest.mark.slow


def _first(*more):
    return [pytest.param(name, case.norms[0], *more, marks=_marks(name)) for name, case in CASES.items()]


EACH = [
    pytest.param(name, norm, marks=_marks(name, place))
    for name, case in CASES.items() for place, norm in enumerate(case.norms)
]
each_attack_and_norm = pytest.mark.parametrize(("name", "norm"), EACH)
each_attack = pytest.mark.parametrize(("name", "norm"), _first())


def _batch(num=8):
    # Some inputs touch the box, and the first label is wrong from the start.
    x = jnp.clip(1.4 * jax.random.uniform(jax.random.key(1), (num, 3, 3, 2)) - 0.2, 0.0, 1.0)
    labels = _model()(x).argmax(axis=1)
    return x, labels.at[0].set((labels[0] + 1) % 4)


def _run(name, norm, x, labels, *, eps=None, seed=0, index=None, goal=GOAL, **options):
    ball, case = Ball(norm, EPS[norm] if eps is None else eps), CASES[name]
    if not case.is_random:
        return case.attack(_model(), x, labels, ball=ball, goal=goal, **options)
    return case.attack(jax.random.key(seed), _model(), x, labels, ball=ball, goal=goal, index=index, **options)


def _check_claims(found, norm, x, labels, eps, goal):
    assert Ball(norm, eps).contains(found.x_adv, x).all()
    assert ((found.x_adv >= 0) & (found.x_adv <= 1)).all()
    fresh = _model()(found.x_adv)
    np.testing.assert_array_equal(found.success, goal.success(fresh, labels))
    np.testing.assert_allclose(found.loss, goal.loss(fresh, labels), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.distance, norms.norm(found.x_adv - x, norm), rtol=1e-6)
    size = len(x)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(found)]
    assert shapes == [(x.shape, x.dtype), ((size,), bool), *[((size,), jnp.float32)] * 2, *[((size,), jnp.int32)] * 2]


@each_attack_and_norm
def test_results_are_what_they_claim(name, norm):
    x, labels = _batch()
    found = _run(name, norm, x, labels)
    _check_claims(found, norm, x, labels, EPS[norm], GOAL)
    assert found.success[0]
    assert found.success.sum() > CASES[name].breaks
    assert (found.forwards >= 1).all()
    assert (found.success | (found.loss >= losses.margin(_model()(x), labels) - 1e-6)).all()
    again = _run(name, norm, x, labels)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@each_attack_and_norm
def test_no_radius_means_no_change(name, norm):
    x, labels = _batch()
    found = _run(name, norm, x, labels, eps=0.0)
    np.testing.assert_array_equal(found.x_adv, x)
    np.testing.assert_array_equal(found.success, losses.is_wrong(_model()(x), labels))


@pytest.mark.parametrize(("name", "norm"), [
    *_first(), *[(name, norm) for name in ("fgsm", "pgd", "apgd") for norm in CASES[name].norms[1:]],
])
def test_results_do_not_depend_on_the_batch(name, norm):
    x, labels = _batch(64)
    # Examples stop, and leave the arrays of 64 but not those of fewer than 9.
    options = {} if name == "fgsm" else {"loop": attacks.Loop(stop=True, chunk=3)}
    together, rtol = _run(name, norm, x, labels, **options), CASES[name].rtol
    order = np.array([6, 2, 60, 5, 31, 3, 4, 0, 44, 12, 17, 63, 59, 21])
    for rows in (order[:7], order[7:], order[:1], order[1:2], order[2:3]):
        found = _run(name, norm, x[rows], labels[rows], index=jnp.asarray(rows), **options)
        np.testing.assert_array_equal(found.success, together.success[rows])
        np.testing.assert_allclose(found.loss, together.loss[rows], rtol=rtol, atol=rtol)
        np.testing.assert_array_equal(found.forwards, together.forwards[rows])
        np.testing.assert_array_equal(found.gradients, together.gradients[rows])


def test_every_public_attack_is_in_the_battery():
    def is_attack(value):
        names = set(inspect.signature(value).parameters) if inspect.isfunction(value) else set()
        return {"x", "labels", "ball"} <= names or "attack" in names

    public = {name for name in attacks.__all__ if is_attack(getattr(attacks, name))} - {"keyed"}
    assert public <= {*CASES, *WITHOUT}
    assert {*WITHOUT} <= public


def test_apgd_climbs_the_difference_of_logits_ratio():
    (x, labels), goal = _batch(), goals.misclassify(losses.dlr)
    found = _run("apgd", "linf", x, labels, goal=goal)
    _check_claims(found, "linf", x, labels, EPS["linf"], goal)
    assert found.success.sum() > 1


@each_attack
def test_radii_per_example_and_per_element(name, norm):
    x, labels = _batch()
    radii = jnp.linspace(0.0, 2.0 * EPS[norm], 8)
    found = _run(name, norm, x, labels, eps=radii)
    assert Ball(norm, radii).contains(found.x_adv, x).all()
    alone = _run(name, norm, x[7:], labels[7:], eps=radii[7], index=jnp.array([7]))
    np.testing.assert_allclose(found.loss[7], alone.loss[0], rtol=CASES[name].rtol, atol=CASES[name].rtol)
    frozen = EPS[norm] * jnp.ones_like(x).at[:, 0].set(0.0)
    found = _run(name, norm, x, labels, eps=frozen)
    assert Ball(norm, frozen).contains(found.x_adv, x).all()
    np.testing.assert_array_equal(found.x_adv[:, 0], x[:, 0])


@each_attack
def test_another_key_another_result(name, norm):
    if not CASES[name].is_random:
        return
    x, labels = _batch()
    first, second = (_run(name, norm, x, labels, seed=seed, eps=4.0 * EPS[norm]) for seed in (0, 1))
    assert (first.x_adv != second.x_adv).reshape(8, -1).any(axis=1).mean() > CASES[name].varies


@each_attack
def test_more_restarts_are_never_weaker(name, norm):
    if not CASES[name].has_restarts:
        return
    x, labels = _batch()
    fewer, more = (_run(name, norm, x, labels, num_restarts=num) for num in (1, 3))
    assert (more.success >= fewer.success).all()
    assert (more.loss >= fewer.loss)[more.success == fewer.success].all()


@each_attack
def test_targets_are_reached(name, norm):
    x, labels = _batch()
    goal = goals.target((labels + 1) % 4, losses.targeted_margin)
    found = _run(name, norm, x, labels, goal=goal, eps=8.0 * EPS[norm])
    _check_claims(found, norm, x, labels, 8.0 * EPS[norm], goal)
    assert found.success.sum() >= CASES[name].breaks


@each_attack
def test_jit_and_every_loop_change_nothing(name, norm):
    x, labels = _batch()
    plain, rtol = _run(name, norm, x, labels), CASES[name].rtol
    compiled = jax.jit(lambda x, labels, eps: _run(name, norm, x, labels, eps=eps))(x, labels, EPS[norm])
    others = [compiled]
    if name != "fgsm":
        # A step at a time on the host above, loops of few steps here.
        others += [_run(name, norm, x, labels, loop=attacks.Loop("compiled", chunk=3))]
    for other in others:
        np.testing.assert_array_equal(plain.success, other.success)
        np.testing.assert_allclose(plain.loss, other.loss, rtol=rtol, atol=rtol)
        np.testing.assert_array_equal(plain.forwards, other.forwards)
        np.testing.assert_array_equal(plain.gradients, other.gradients)


@pytest.mark.parametrize(("name", "norm", "axis"), [
    *_first(AxisType.Explicit), ("pgd", "linf", AxisType.Auto), ("apgd", "l2", AxisType.Auto),
])
def test_sharding_changes_nothing(name, norm, axis):
    x, labels = _batch()
    plain = _run(name, norm, x, labels)
    sharding = NamedSharding(jax.make_mesh((8,), ("batch",), axis_types=(axis,)), PartitionSpec("batch"))
    sharded = _run(name, norm, jax.device_put(x, sharding), jax.device_put(labels, sharding))
    assert len(sharded.x_adv.sharding.device_set) == 8
    np.testing.assert_array_equal(plain.success, sharded.success)
    np.testing.assert_allclose(plain.loss, sharded.loss, rtol=CASES[name].rtol, atol=CASES[name].rtol)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd"])
def test_a_detector_is_just_another_goal(name):
    x, labels = _batch()

    def detector(x):
        return _model()(x), x.reshape(x.shape[0], -1).std(axis=1)

    def evades(output, labels):
        return losses.is_wrong(output[0], labels) & (output[1] < 1.0)

    goal, case = goals.Goal(Partial(lambda out, y: losses.margin(out[0], y) - out[1]), Partial(evades)), CASES[name]
    arguments = (jax.random.key(0),) if case.is_random else ()
    found = case.attack(*arguments, detector, x, labels, ball=Ball("l2", EPS["l2"]), goal=goal)
    np.testing.assert_array_equal(found.success, evades(detector(found.x_adv), labels))
    assert found.success.any()
