"""Certified losses against their definition, limits at radius 0 and at the final radius, and a real training run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rdx import bounds, losses, margins, models, train
from rdx.balls import Ball
from rdx.train import certified, schedules, standard

BALL = Ball("linf", eps=0.0)
RAMP = schedules.linear_ramp(0.1, 10, 20)
START, QUARTER, END = (jnp.int32(step) for step in (10, 15, 30))


def _net(name, key):
    if name == "cnn":
        model = models.ConvNet((models.Conv(4, 3, 2),), (8,), 3)
    else:
        model = models.ResNet((4,), (1,), num_classes=3)
    x = jax.random.uniform(key, (6, 6, 6, 1))
    variables = model.init(jax.random.key(1), x)
    state = {"batch_stats": variables["batch_stats"]} if name == "resnet" else {}
    labels = jnp.arange(6, dtype=jnp.int32) % 3
    return models.forward(model), variables["params"], state, {"x": x, "labels": labels}


_value = jax.jit(lambda loss, params, state, batch, step: loss(params, state, jax.random.key(0), batch, step))


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_radius_zero_certifies_exactly_the_clean_loss(name, key):
    forward, params, state, batch = _net(name, key)
    loss, (_, metrics) = _value(certified.mixed(forward, BALL, eps=RAMP), params, state, batch, START)
    clean, (_, clean_metrics) = _value(standard.cross_entropy(forward), params, state, batch, START)
    np.testing.assert_allclose(loss, clean, rtol=1e-5)
    np.testing.assert_allclose(metrics["certified_loss"], clean, rtol=1e-4)
    np.testing.assert_allclose(metrics["certified_error"], clean_metrics["error"], atol=1e-6)
    assert metrics["eps"] == 0.0
    assert metrics["kappa"] == 1.0


@pytest.mark.parametrize("name", ["cnn", "resnet"])
@pytest.mark.parametrize("build", [certified.mixed, certified.ibp])
def test_the_certified_loss_is_worse_and_bounds_random_points(build, name, key):
    forward, params, state, batch = _net(name, key)
    _, (_, metrics) = _value(build(forward, BALL, eps=RAMP), params, state, batch, QUARTER)
    np.testing.assert_allclose(metrics["eps"], 0.025, rtol=1e-5)
    assert metrics["certified_error"] >= metrics["error"]
    logits = forward.logits_fn(params, forward.statistics(params, state, batch["x"]))
    for seed in range(5):
        noise = jax.random.rademacher(jax.random.key(seed), batch["x"].shape, jnp.float32)
        attacked = logits(jnp.clip(batch["x"] + 0.025 * noise, 0.0, 1.0))
        assert metrics["certified_loss"] > losses.cross_entropy(attacked, batch["labels"]).mean()
    assert metrics["certified_loss"] > metrics["clean_loss"]


def test_the_mixture_is_its_definition(key):
    forward, params, state, batch = _net("cnn", key)
    loss, (_, metrics) = _value(certified.mixed(forward, BALL, eps=RAMP, kappa_end=0.2), params, state, batch, QUARTER)
    fn = margins.of(forward.logits_fn(params, state))
    region = Ball("linf", 0.025).region(batch["x"])
    interval = jax.jit(bounds.ibp)(fn, region, batch["labels"]).lower
    crown_ibp = functools.partial(bounds.crown_ibp, relu_lower=bounds.relaxations.same_slope, intersect=False)
    linear = jax.jit(crown_ibp)(fn, region, batch["labels"]).lower
    assert not np.allclose(interval, linear, atol=1e-4)
    lower = 0.75 * np.asarray(linear) + 0.25 * np.asarray(interval)
    worst = np.log1p(np.exp(-lower).sum(axis=1)).mean()
    kappa = 0.75 + 0.2 * 0.25
    np.testing.assert_allclose(metrics["kappa"], kappa, rtol=1e-5)
    np.testing.assert_allclose(metrics["certified_loss"], worst, rtol=1e-4)
    np.testing.assert_allclose(loss, kappa * metrics["clean_loss"] + (1 - kappa) * worst, rtol=1e-4)
    np.testing.assert_allclose(metrics["certified_error"], (np.asarray(interval) <= 0).any(axis=1).mean(), atol=1e-6)


def test_losses_are_the_shared_objective(key):
    forward, params, state, batch = _net("cnn", key)
    x, labels = batch["x"], batch["labels"]
    logits_fn = forward.logits_fn(params, state)
    objective = jax.jit(bounds.phased_objective)
    values = []
    for build, has_crown in ((certified.mixed, True), (certified.ibp, False)):
        threat = bounds.Threat(BALL, RAMP, 0.2, has_crown=has_crown)
        expected, metrics = objective(threat, logits_fn(x), logits_fn, x, labels, QUARTER)
        loss, (_, found) = _value(build(forward, BALL, eps=RAMP, kappa_end=0.2), params, state, batch, QUARTER)
        np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
        assert set(found) == {"loss", *metrics}
        for name, value in metrics.items():
            np.testing.assert_allclose(found[name], value.mean(), rtol=1e-5, err_msg=name)
            assert found[name].dtype == jnp.float32
        values.append(float(loss))
    assert values[1] > values[0] + 1e-3


def test_masked_rows_do_not_count(key):
    forward, params, state, batch = _net("cnn", key)
    loss = certified.mixed(forward, BALL, eps=RAMP, kappa_end=0.2)
    part = {name: value[:4] for name, value in batch.items()}
    masked = {**batch, "mask": jnp.arange(6) < 4}
    expected, (_, wanted) = _value(loss, params, state, part, QUARTER)
    found, (_, metrics) = _value(loss, params, state, masked, QUARTER)
    assert abs(float(_value(loss, params, state, batch, QUARTER)[0]) - float(expected)) > 1e-4
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, wanted)


def test_mixed_ends_as_ibp_without_clean_loss(key):
    forward, params, state, batch = _net("cnn", key)
    ends = [_value(build(forward, BALL, eps=RAMP), params, state, batch, END)[1][1]
            for build in (certified.mixed, certified.ibp)]
    for metrics in ends:
        assert metrics["kappa"] == 0.0
        np.testing.assert_allclose(metrics["loss"], metrics["certified_loss"], rtol=1e-6)
    np.testing.assert_allclose(ends[0]["loss"], ends[1]["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_gradients_match_finite_differences(name, key):
    forward, params, state, batch = _net(name, key)
    loss = certified.mixed(forward, BALL, eps=RAMP)

    def value(p):
        return _value(loss, p, state, batch, QUARTER)[0]

    gradient = jax.grad(value)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    size, step = optax.tree.norm(gradient), 2e-3
    move = jax.tree.map(lambda g: step * g / size, gradient)
    above, below = value(optax.tree.add(params, move)), value(optax.tree.sub(params, move))
    np.testing.assert_allclose((above - below) / (2 * step), size, rtol=0.03)


def test_bounds_use_the_batch_statistics_and_their_gradient(key):
    forward, params, state, batch = _net("resnet", key)
    # Wrong running statistics change nothing in training.
    other = jax.tree.map(lambda leaf: leaf + 5.0, state)
    loss = certified.ibp(forward, BALL, eps=RAMP)
    np.testing.assert_allclose(
        _value(loss, params, state, batch, END)[0], _value(loss, params, other, batch, END)[0], rtol=1e-5
    )
    # The scale of a convolution before BatchNorm only matters if the statistics are held constant.
    statistics = forward.statistics(params, state, batch["x"])

    def held_constant(p):
        fn = margins.of(forward.logits_fn(p, statistics))
        lower = bounds.ibp(fn, Ball("linf", 0.1).region(batch["x"]), batch["labels"]).lower
        return losses.worst_case_cross_entropy(lower).mean()

    def along_scale(fn):
        gradient, kernel = jax.jit(jax.grad(fn))(params)["Conv_0"]["kernel"], params["Conv_0"]["kernel"]
        return abs(float((gradient * kernel).sum() / (optax.tree.norm(gradient) * optax.tree.norm(kernel))))

    flowing, held = along_scale(lambda p: loss(p, state, key, batch, END)[0]), along_scale(held_constant)
    assert flowing < 1e-3
    assert held > 1e-2


def test_phases_follow_the_ramp_and_train_a_certified_net(key):
    centres = jnp.asarray([[0.2, 0.2], [0.8, 0.3], [0.4, 0.8]])
    labels = jnp.arange(48, dtype=jnp.int32) % 3
    x = centres[labels] + 0.05 * jax.random.normal(key, (48, 2)).clip(-1, 1)
    model = models.MLP((16, 16), 3)
    forward = models.forward(model)
    ramp = schedules.linear_ramp(0.08, 20, 80)
    phases = certified.phases(forward, BALL, eps=ramp)
    assert [phase.until_step for phase in phases] == [21, 100, None]
    for step, phase in ((20, phases[0]), (100, phases[2])):
        params = model.init(key, x)["params"]
        batch = {"x": x, "labels": labels}
        mixed = certified.mixed(forward, BALL, eps=ramp)
        np.testing.assert_allclose(*(_value(loss, params, {}, batch, jnp.int32(step))[0] for loss in
                                     (phase.loss, mixed)), rtol=1e-5)
    optimizer = optax.adam(0.02)
    state = train.init_state(model.init(key, x)["params"], {}, optimizer)
    _, history = train.fit(phases, state, optimizer, lambda step: {"x": x, "labels": labels}, key=key, num_steps=200,
                           log_every=20, progress=False)
    assert "certified_error" not in history[0]
    assert "certified_error" in history[1]
    assert history[-1]["certified_error"] == 0.0
    np.testing.assert_allclose(history[-1]["eps"], 0.08, rtol=1e-5)


def test_ramps_and_radii_do_not_recompile(key):
    forward, params, state, batch = _net("cnn", key)
    traces = []

    @jax.jit
    def value(loss, step):
        traces.append(None)
        return loss(params, state, key, batch, step)[0]

    values = [float(value(certified.ibp(forward, BALL, eps=schedules.linear_ramp(eps, 0, 4)), jnp.int32(4)))
              for eps in (0.05, 0.1)]
    assert len(traces) == 1
    assert values[0] < values[1]
