"""A5 in every pair of norms: budgets are kept and the certified loss falls; and steepest descent for A5/O."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from rdx import attacks, bounds, models
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.robustify import joint, objective, offline, online
from rdx.train import schedules

NORMS = ("linf", "l2", "l1")
DEFENSES = {"linf": 0.15, "l2": 0.4, "l1": 1.2}
THREATS = {"linf": 0.05, "l2": 0.1, "l1": 0.3}
END = jnp.int32(9)


@functools.cache
def _problem():
    classifier = models.forward(models.MLP((12,), 3))
    robustifier = models.forward(models.MLP((8,), 16))
    x = jax.random.uniform(jax.random.key(1), (8, 16))
    params = classifier.model.init(jax.random.key(2), x)["params"]
    maker = robustifier.model.init(jax.random.key(3), x)["params"]
    labels = classifier.logits_fn(params, {})(x).argmax(axis=1).astype(jnp.int32)
    return classifier, robustifier, params, maker, {"x": x, "labels": labels, "row": jnp.arange(8)}


_worst_case = jax.jit(bounds.worst_case)


def _threat(norm, *, has_crown=False):
    return Threat(Ball(norm, 0.0), schedules.linear_ramp(THREATS[norm], -1, 1), has_crown=has_crown)


def _offline(defense_norm, threat_norm):
    classifier, _, params, _, _ = _problem()
    defense = Ball(defense_norm, DEFENSES[defense_norm])
    logits_fn = classifier.logits_fn(params, {})
    return defense, offline.offline(logits_fn, defense=defense, threat=_threat(threat_norm))


@functools.partial(jax.jit, static_argnames=("optimizer", "num_steps"))
def _minimised(loss, params, batch, *, optimizer, num_steps):
    """The parameters after some steps, and the loss before each."""

    def step(carried, _):
        params, state = carried
        value, gradient = jax.value_and_grad(lambda p: loss(p, {}, jax.random.key(0), batch, END)[0])(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.lax.scan(step, (params, optimizer.init(params)), None, length=num_steps)
    return params, values


@pytest.mark.parametrize(("norm", "threat"), [("l2", "l2"), ("l1", "l1"), ("linf", "l2"), ("l1", "linf")])
def test_offline_in_equal_and_in_mixed_norms(norm, threat):
    defense, loss = _offline(norm, threat)
    classifier, _, params, _, batch = _problem()
    start = offline.init(8, (16,))
    end, values = _minimised(loss, start, batch, optimizer=offline.steepest(defense, 0.1), num_steps=30)
    defended = offline.apply(end, batch["x"], batch["row"], defense=defense)
    assert defense.contains(defended, batch["x"]).all()
    ball, logits_fn = Ball(threat, THREATS[threat]), classifier.logits_fn(params, {})
    before, after = (
        _worst_case(logits_fn, ball.region(at), batch["labels"]).loss for at in (batch["x"], defended)
    )
    assert (after < before).all()
    # The loss is of the attacker's ball in its own norm.
    np.testing.assert_allclose(values[0], before.sum(), rtol=1e-5)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("recipe", ["online", "joint"])
def test_networks_are_trained_in_l2_and_l1(recipe, norm):
    classifier, robustifier, params, maker, batch = _problem()
    defense, threat = Ball(norm, DEFENSES[norm]), _threat(norm, has_crown=True)
    if recipe == "online":
        start, logits_fn = maker, classifier.logits_fn(params, {})
        loss = online.online(logits_fn, robustifier, defense=defense, threat=threat)
    else:
        start, loss = joint.init(maker, params), joint.joint(classifier, robustifier, defense=defense, threat=threat)
    end, values = _minimised(loss, start, batch, optimizer=optax.rmsprop(0.003), num_steps=40)
    assert values[-1] < 0.95 * values[0]
    defended = online.apply(robustifier, end if recipe == "online" else end["robustifier"], batch["x"], defense=defense)
    assert defense.contains(defended, batch["x"]).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_gradients_are_finite_before_the_attack_has_a_radius(norm):
    classifier, robustifier, params, maker, batch = _problem()
    threat = Threat(Ball(norm, 0.0), schedules.linear_ramp(0.1, 5, 10))
    loss = online.online(classifier.logits_fn(params, {}), robustifier, defense=Ball(norm, 0.3), threat=threat)
    gradient = jax.jit(jax.grad(loss, has_aux=True))(maker, {}, jax.random.key(0), batch, jnp.int32(0))[0]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("norm", NORMS)
def test_the_unit_ball_and_back(norm, key):
    z = jax.random.normal(key, (5, 3, 4)) * jnp.asarray([0.0, 1e-3, 1.0, 4.0, 6.0])[:, None, None]
    back = objective.out_of_unit_ball(objective.into_unit_ball(z, norm), norm)
    # 1 - |v| has lost the digits that it needs where |v| is near 1; for linf |z| = 12 means 1 - |v| = 1e-5.
    np.testing.assert_allclose(back, z, rtol=2e-2 if norm == "linf" else 1e-4, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_is_projected_descent_where_no_box_interferes(norm, key):
    # In a box that is far away, the steps in z are those that PGD makes on the image itself.
    ball, target = Ball(norm, 0.5, low=-10.0, high=10.0), jax.random.normal(key, (4, 16))
    x, optimizer = jnp.zeros((4, 16)), offline.steepest(ball, 0.3)
    loss = Partial(_distance_to_target, ball, target)
    batch = {"x": x}
    end, _ = _minimised(loss, {"z": jnp.zeros((4, 16))}, batch, optimizer=optimizer, num_steps=6)
    point = x
    for _ in range(6):
        point = _ascend(ball, x, point, target - point, 0.15)
    # It stops at 0.999 of the radius.
    np.testing.assert_allclose(objective.defend(x, end["z"], ball), point, atol=2e-3)


_ascend = jax.jit(attacks.base.ascend)


def _distance_to_target(ball, target, params, model_state, key, batch, step):
    del key, step
    moved = objective.defend(batch["x"], params["z"], ball)
    return 0.5 * jnp.square(moved - target).sum(), (model_state, {})


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_leaves_rows_without_gradient_and_obeys_a_schedule(norm, key):
    z = {"z": jax.random.normal(key, (5, 16))}
    gradient = {"z": jax.random.normal(jax.random.fold_in(key, 1), (5, 16)).at[jnp.asarray([1, 3])].set(0.0)}
    optimizer = offline.steepest(Ball(norm, 0.3), lambda count: jnp.where(count < 1, 0.1, 0.0))
    update = jax.jit(optimizer.update)
    first, state = update(gradient, optimizer.init(z), z)
    moved = jnp.abs(first["z"]).max(axis=1) > 0
    np.testing.assert_array_equal(moved, [True, False, True, False, True])
    second, _ = update(gradient, state, z)  # the rate is 0 by now
    assert jnp.abs(second["z"]).max() < 0.02 * jnp.abs(first["z"]).max()


def test_steepest_beats_rmsprop_in_l1():
    # A linear classifier with few telling elements: a step of RMSProp spends the budget on all alike.
    weights = jnp.zeros((16, 2)).at[3, 0].set(4.0).at[:, 1].set(0.1)
    logits_fn, x = Partial(_linear, weights), jnp.full((4, 16), 0.5)
    defense = Ball("l1", 0.4)
    loss = offline.offline(logits_fn, defense=defense, threat=_threat("l1"))
    batch = {"x": x, "labels": jnp.zeros(4, jnp.int32), "row": jnp.arange(4)}
    rules = offline.steepest(defense, 0.1), optax.rmsprop(0.05, decay=0.99, eps_in_sqrt=False)
    steep, usual = (
        _minimised(loss, offline.init(4, (16,)), batch, optimizer=rule, num_steps=20)[1] for rule in rules
    )
    # The best that can be: the whole budget on the one element.
    best = x.at[:, 3].add(0.4)
    ideal = _worst_case(logits_fn, Ball("l1", THREATS["l1"]).region(best), batch["labels"]).loss.sum()
    assert steep[-1] < ideal + 0.02 * (steep[0] - ideal)
    assert usual[-1] > ideal + 0.2 * (usual[0] - ideal)


def _linear(weights, x):
    return x @ weights


def test_unusable_balls_are_refused_before_training():
    classifier, _, params, _, _ = _problem()
    builder = functools.partial(offline.offline, classifier.logits_fn(params, {}))
    for defense, message in (
        (Ball("l0", 2.0), "Unknown norm 'l0'"), (Ball("l2", -0.1), "eps must be at least 0"),
        (Ball("l1", float("nan")), "eps must be at least 0"), (Ball("l2", 0.1, low=1.0), "is empty"),
        (Ball("l2", 0.1, low=-1.0), "different boxes"),
    ):
        with pytest.raises(ValueError, match=message):
            builder(defense=defense, threat=_threat("l2"))
    with pytest.raises(ValueError, match="Unknown norm 'l0'"):
        builder(defense=Ball("l2", 0.1), threat=Threat(Ball("l0", 0.0), schedules.linear_ramp(0.1, -1, 1)))
    with pytest.raises(ValueError, match="Unknown norm 'l0'"):
        offline.steepest(Ball("l0", 2.0), 0.1)
    optimizer, start = offline.steepest(Ball("l2", 0.1), 0.1), offline.init(2, (3,))
    with pytest.raises(ValueError, match="update"):
        optimizer.update(start, optimizer.init(start))


@pytest.mark.parametrize("norm", NORMS)
def test_through_is_the_classifier_of_defended_images(norm, key):
    classifier, robustifier, params, maker, batch = _problem()
    logits_fn, defense = classifier.logits_fn(params, {}), Ball(norm, DEFENSES[norm])
    whole = online.through(robustifier.logits_fn(maker, {}), logits_fn, defense=defense)
    defended = online.apply(robustifier, maker, batch["x"], defense=defense)
    np.testing.assert_allclose(whole(batch["x"]), logits_fn(defended), rtol=1e-6)
    ball = Ball("linf", 0.02)
    attacked = attacks.pgd(key, whole, batch["x"], batch["labels"], ball=ball, num_steps=5)
    clean = -jax.nn.log_softmax(whole(batch["x"]))[jnp.arange(8), batch["labels"]]
    assert (attacked.loss > clean).all()
    # Sound, and not for nothing: inputs of the ball stay inside, and the bounds are not wider than ten times that.
    bound = jax.jit(bounds.crown_ibp)(whole, ball.region(batch["x"]))
    sample = jax.jit(lambda k: whole(ball.sample(jax.random.split(k, 8), batch["x"])))
    seen = jnp.stack([*map(sample, jax.random.split(key, 30)), whole(attacked.x_adv)])
    assert ((bound.lower <= seen.min(axis=0) + 1e-6) & (seen.max(axis=0) <= bound.upper + 1e-6)).all()
    assert (bound.upper - bound.lower < 10.0 * (seen.max(axis=0) - seen.min(axis=0))).all()


def test_through_refuses_a_radius_for_every_example():
    classifier, robustifier, params, maker, _ = _problem()
    parts = robustifier.logits_fn(maker, {}), classifier.logits_fn(params, {})
    for eps in (jnp.full(8, 0.1), jnp.full((8, 16), 0.1)):
        with pytest.raises(ValueError, match="batch axis"):
            online.through(*parts, defense=Ball("linf", eps))
    online.through(*parts, defense=Ball("linf", jnp.full((1, 16), 0.1)))


