"""The adversarial loss against its definition, what is differentiated in it, and training that makes a net robust."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rdx import attacks, losses, models, train
from rdx.balls import Ball
from rdx.train import adversarial, schedules, standard

BALL = Ball("linf", 0.1)
SHORT = functools.partial(attacks.pgd, num_steps=3)
UNROLLED = functools.partial(attacks.pgd, num_steps=3, loop=attacks.Loop(kind="host"))


def _net(name, key):
    if name == "cnn":
        model = models.ConvNet((models.Conv(4, 3, 2),), (8,), 3)
    else:
        model = models.ResNet((4,), (1,), num_classes=3)
    x = jax.random.uniform(key, (6, 6, 6, 1))
    variables = model.init(jax.random.key(1), x)
    state = {"batch_stats": variables["batch_stats"]} if name == "resnet" else {}
    labels = jnp.arange(6, dtype=jnp.int32) % 3
    batch = {"x": x, "labels": labels, "index": jnp.arange(10, 16, dtype=jnp.int32)}
    return models.forward(model), variables["params"], state, batch


_value = jax.jit(lambda loss, params, state, batch, step: loss(params, state, jax.random.key(5), batch, step))


@pytest.mark.parametrize("name", ["cnn", "resnet"])
@pytest.mark.parametrize("attack", [SHORT, UNROLLED])
def test_the_loss_is_that_of_the_attacked_batch(name, attack, key):
    forward, params, state, batch = _net(name, key)
    loss, (next_state, metrics) = _value(adversarial.cross_entropy(forward, BALL, attack=attack), params, state, batch,
                                         jnp.int32(0))
    statistics = forward.statistics(params, state, batch["x"])
    found = SHORT(jax.random.key(5), forward.logits_fn(params, statistics), batch["x"], batch["labels"], ball=BALL,
                  index=batch["index"])
    logits, wanted_state = forward(params, state, found.x_adv, train=True)
    np.testing.assert_allclose(loss, losses.cross_entropy(logits, batch["labels"]).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["adversarial_error"], losses.is_wrong(logits, batch["labels"]).mean())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), next_state, wanted_state)
    clean = _value(standard.cross_entropy(forward), params, state, batch, jnp.int32(0))[0]
    assert loss > clean + 1e-3


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_the_gradient_is_that_at_the_attacked_inputs(name, key):
    forward, params, state, batch = _net(name, key)
    loss = adversarial.cross_entropy(forward, BALL, attack=SHORT)
    found = jax.jit(jax.grad(lambda p: loss(p, state, jax.random.key(5), batch, jnp.int32(0))[0]))(params)
    statistics = forward.statistics(params, state, batch["x"])
    x_adv = SHORT(jax.random.key(5), forward.logits_fn(params, statistics), batch["x"], batch["labels"], ball=BALL,
                  index=batch["index"]).x_adv
    wanted = jax.grad(lambda p: losses.cross_entropy(forward(p, state, x_adv, train=True)[0], batch["labels"]).mean())(
        params
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, wanted)


def test_without_a_radius_it_is_standard_training(key):
    forward, params, state, batch = _net("resnet", key)
    found = _value(adversarial.cross_entropy(forward, Ball("linf", 0.0), attack=SHORT), params, state, batch,
                   jnp.int32(3))
    wanted = _value(standard.cross_entropy(forward), params, state, batch, jnp.int32(3))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1][1]["adversarial_error"], wanted[1][1]["error"])


def test_the_ramp_replaces_the_radius(key):
    forward, params, state, batch = _net("cnn", key)
    ramp = schedules.linear_ramp(0.2, 0, 10)
    loss = adversarial.cross_entropy(forward, Ball("linf", 0.7), eps=ramp, attack=SHORT)
    values = []
    for step, eps in ((0, 0.0), (5, 0.1), (20, 0.2)):
        value, (_, metrics) = _value(loss, params, state, batch, jnp.int32(step))
        fixed = _value(adversarial.cross_entropy(forward, Ball("linf", eps), attack=SHORT), params, state, batch,
                       jnp.int32(step))[0]
        np.testing.assert_allclose(value, fixed, rtol=1e-5)
        np.testing.assert_allclose(metrics["eps"], eps, rtol=1e-6)
        values.append(float(value))
    assert values == sorted(values)


def test_masked_rows_do_not_count(key):
    forward, params, state, batch = _net("cnn", key)
    loss = adversarial.cross_entropy(forward, BALL, attack=SHORT)
    part = {name: value[:4] for name, value in batch.items()}
    wanted, (_, metrics) = _value(loss, params, state, part, jnp.int32(0))
    found, (_, masked) = _value(loss, params, state, {**batch, "mask": jnp.arange(6) < 4}, jnp.int32(0))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(masked["adversarial_error"], metrics["adversarial_error"])


def test_it_makes_robust_what_standard_training_leaves_fragile(key):
    # The first element says the label robustly; each of the others hints at it faintly, all together surely.
    labels = jnp.arange(64, dtype=jnp.int32) % 2
    sign = 2.0 * labels.astype(jnp.float32)[:, None] - 1.0
    x = jnp.concatenate([0.5 + 0.25 * sign, 0.5 + 0.05 * sign + jnp.zeros((64, 40))], axis=1)
    x = jnp.clip(x + 0.05 * jax.random.normal(key, x.shape), 0.0, 1.0)
    model, ball = models.MLP((16,), 2), Ball("linf", 0.15)
    # At the full radius from the start, the net would be driven to constant logits.
    ramp = schedules.linear_ramp(0.15, 50, 100)
    forward, batch = models.forward(model), {"x": x, "labels": labels, "index": jnp.arange(64)}
    errors = {}
    for name, loss in {
        "standard": standard.cross_entropy(forward), "adversarial": adversarial.cross_entropy(forward, ball, eps=ramp),
    }.items():
        optimizer = optax.adam(0.01)
        state = train.init_state(model.init(key, x)["params"], {}, optimizer)
        state, _ = train.fit(loss, state, optimizer, lambda step: batch, key=key, num_steps=200, progress=False)
        found = attacks.pgd(key, forward.logits_fn(state.params, {}), x, labels, ball=ball, num_steps=20)
        errors[name] = float(found.success.mean())
    assert errors["standard"] > 0.9
    assert errors["adversarial"] < 0.1
