"""A5/O, A5/R and A5/RC: who gets gradients, who is frozen, and that the worst case falls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from rdx import bounds, models, robustify, train
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.train import schedules

DEFENSE = Ball("linf", 0.2)
END = jnp.int32(9)


def _threat(*, has_crown=False):
    return Threat(Ball("linf", 0.0), schedules.linear_ramp(0.1, -1, 1), has_crown=has_crown)


@functools.cache
def _problem():
    classifier = models.forward(models.MLP((16,), 3))
    robustifier = models.forward(models.Robustifier((models.Conv(4, 3), models.Conv(1, 3))))
    x = jax.random.uniform(jax.random.key(1), (12, 4, 4, 1))
    params = classifier.model.init(jax.random.key(2), x)["params"]
    maker = robustifier.model.init(jax.random.key(3), x)["params"]
    labels = classifier.logits_fn(params, {})(x).argmax(axis=1).astype(jnp.int32)
    batch = {"x": x, "labels": labels, "row": jnp.arange(12), "index": jnp.arange(12)}
    return classifier, robustifier, params, maker, batch


@jax.jit
def _gradient(loss, params, batch):
    return jax.grad(loss, has_aux=True)(params, {}, jax.random.key(0), batch, END)[0]


_value = jax.jit(lambda loss, params, state, batch: loss(params, state, jax.random.key(0), batch, END))


@jax.jit
def _worst_case(logits_fn, x, labels):
    return bounds.worst_case(logits_fn, Ball("linf", 0.1).region(x), labels)


def _fit(loss, params, batch, num_steps, rate):
    optimizer = optax.rmsprop(rate, decay=0.99, eps_in_sqrt=False)
    state = train.init_state(params, {}, optimizer)
    return train.fit(loss, state, optimizer, lambda step: batch, key=jax.random.key(0), num_steps=num_steps,
                     log_every=num_steps // 2, progress=False)


def _norms(tree):
    return [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)]


def _offline():
    classifier, _, params, _, batch = _problem()
    logits_fn = classifier.logits_fn(params, {})
    return logits_fn, robustify.offline.offline(logits_fn, defense=DEFENSE, threat=_threat()), batch


def test_offline_moves_the_rows_of_the_batch_only():
    _, loss, batch = _offline()
    z = {"z": 0.3 * jax.random.normal(jax.random.key(4), (30, 4, 4, 1))}
    rows = np.array([3, 17, 4, 29, 0, 11, 22, 8, 9, 10, 5, 6])
    gradient = _gradient(loss, z, {**batch, "row": jnp.asarray(rows)})["z"]
    moved = np.asarray(jnp.abs(gradient).max(axis=(1, 2, 3)) > 0)
    np.testing.assert_array_equal(np.flatnonzero(moved), np.sort(rows))


def test_offline_is_a_sum_so_that_images_do_not_share_a_step():
    logits_fn, loss, batch = _offline()
    z = {"z": 0.3 * jax.random.normal(jax.random.key(4), (12, 4, 4, 1))}
    together = _gradient(loss, z, batch)["z"]
    alone = _gradient(loss, z, {name: value[:3] for name, value in batch.items()})["z"]
    np.testing.assert_allclose(alone[:3], together[:3], rtol=1e-4, atol=1e-7)
    total, (_, metrics) = _value(loss, z, {}, batch)
    defended = robustify.offline.apply(z, batch["x"], batch["row"], defense=DEFENSE)
    expected = _worst_case(logits_fn, defended, batch["labels"])
    np.testing.assert_allclose(total, expected.loss.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected.loss.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["certified_error"], 1.0 - expected.is_certified.mean(), atol=1e-6)


def test_offline_training_lowers_the_worst_case_and_freezes_the_classifier():
    logits_fn, loss, batch = _offline()
    before_params = jax.tree.map(jnp.copy, logits_fn.args)
    state, history = _fit(loss, robustify.offline.init(12, (4, 4, 1)), batch, 60, 0.05)
    defended = robustify.offline.apply(state.params, batch["x"], batch["row"], defense=DEFENSE)
    before, after = (_worst_case(logits_fn, x, batch["labels"]) for x in (batch["x"], defended))
    assert (after.loss < before.loss).all()
    assert after.is_certified.sum() >= before.is_certified.sum() + 3
    assert DEFENSE.contains(defended, batch["x"]).all()
    assert history[-1]["loss"] < history[0]["loss"]
    jax.tree.map(np.testing.assert_array_equal, logits_fn.args, before_params)


def test_the_quirk_of_rmsprop_over_all_rows():
    rate, optimizer = 1e-3, optax.rmsprop(1e-3, decay=0.99, eps_in_sqrt=False)
    state = optimizer.init(jnp.zeros(2))

    @jax.jit
    def pass_by(state):
        def step(_, carried):
            moved, state = carried
            updates, state = optimizer.update(jnp.zeros(2), state)
            return moved + jnp.abs(updates), state

        return jax.lax.fori_loop(0, 2999, step, (jnp.zeros(2), state))

    # Row 1 is never visited; row 0 once in 3000 steps, with gradients of very different sizes.
    for size in (1e-4, 30.0, 1e-4):
        updates, state = optimizer.update(jnp.asarray([size, 0.0]), state)
        np.testing.assert_allclose(updates, [-rate / np.sqrt(1.0 - 0.99), 0.0], rtol=0.02)
        moved, state = pass_by(state)
        assert not moved.any()


def test_online_reduces_the_worst_case_of_a_frozen_classifier():
    classifier, robustifier, params, maker, batch = _problem()
    logits_fn = classifier.logits_fn(params, {})
    loss = robustify.online.online(logits_fn, robustifier, defense=DEFENSE, threat=_threat(has_crown=True))
    assert all(size > 0 for size in _norms(_gradient(loss, maker, batch)))
    before_params = jax.tree.map(jnp.copy, logits_fn.args)
    state, history = _fit(loss, maker, batch, 300, 0.003)
    assert history[-1]["loss"] < history[0]["loss"]
    jax.tree.map(np.testing.assert_array_equal, logits_fn.args, before_params)
    defended = robustify.online.apply(robustifier, state.params, batch["x"], defense=DEFENSE)
    assert DEFENSE.contains(defended, batch["x"]).all()
    worst = [_worst_case(logits_fn, x, batch["labels"]).loss.mean() for x in (batch["x"], defended)]
    assert worst[1] < 0.9 * worst[0]
    # It takes no label: an image is defended in one way whatever its class, and whoever shares its batch.
    alone = robustify.online.apply(robustifier, state.params, batch["x"][4:5], defense=DEFENSE)
    np.testing.assert_allclose(alone[0], defended[4], atol=1e-6)


def test_online_loss_is_the_mean_over_defended_images():
    classifier, robustifier, params, maker, batch = _problem()
    logits_fn = classifier.logits_fn(params, {})
    loss = robustify.online.online(logits_fn, robustifier, defense=DEFENSE, threat=_threat())
    value, _ = _value(loss, maker, {}, batch)
    defended = robustify.defend(batch["x"], robustifier(maker, {}, batch["x"], train=False)[0], DEFENSE)
    np.testing.assert_allclose(value, _worst_case(logits_fn, defended, batch["labels"]).loss.mean(), rtol=1e-5)


def test_joint_starts_from_what_it_is_given_and_trains_both():
    classifier, robustifier, params, maker, batch = _problem()
    start = robustify.joint.init(maker, params)
    loss = robustify.joint.joint(classifier, robustifier, defense=DEFENSE, threat=_threat())
    frozen = robustify.online.online(classifier.logits_fn(params, {}), robustifier, defense=DEFENSE, threat=_threat())
    values = [_value(fn, at, {}, batch)[0] for fn, at in ((loss, start), (frozen, maker))]
    np.testing.assert_allclose(*values, rtol=1e-5)
    gradient = _gradient(loss, start, batch)
    assert set(gradient) == {"robustifier", "classifier"}
    assert all(size > 0 for size in _norms(gradient))
    state, history = _fit(loss, start, batch, 300, 0.003)
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    for part in start:
        assert max(_norms(jax.tree.map(jnp.subtract, state.params[part], start[part]))) > 0.01


def test_joint_takes_batchnorm_statistics_from_the_defended_batch():
    _, robustifier, _, maker, batch = _problem()
    classifier = models.forward(models.ResNet((4,), (1,), num_classes=3))
    variables = classifier.model.init(jax.random.key(5), batch["x"])
    state = {"batch_stats": variables["batch_stats"]}
    loss = robustify.joint.joint(classifier, robustifier, defense=DEFENSE, threat=_threat())
    params = robustify.joint.init(maker, variables["params"])
    value, (next_state, _) = _value(loss, params, state, batch)
    defended = robustify.online.apply(robustifier, maker, batch["x"], defense=DEFENSE)
    statistics = classifier.statistics(variables["params"], state, defended)
    expected = _worst_case(classifier.logits_fn(variables["params"], statistics), defended, batch["labels"])
    np.testing.assert_allclose(value, expected.loss.mean(), rtol=1e-4)
    _, wanted = classifier(variables["params"], state, defended, train=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), next_state, wanted)


@pytest.mark.parametrize("recipe", ["offline", "online", "joint"])
def test_every_recipe_refuses_different_boxes(recipe):
    classifier, robustifier, params, _, _ = _problem()
    logits_fn = classifier.logits_fn(params, {})
    builder = {
        "offline": Partial(robustify.offline.offline, logits_fn),
        "online": Partial(robustify.online.online, logits_fn, robustifier),
        "joint": Partial(robustify.joint.joint, classifier, robustifier),
    }[recipe]
    with pytest.raises(ValueError, match="different boxes"):
        builder(defense=Ball("linf", 0.1, low=-1.0), threat=_threat())
