"""The loop: convergence, bitwise resumption, kills, NaN stops, sharding, phases."""

import pathlib
import subprocess
import sys

import interrupted_run
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from rdx import models, train
from rdx.train import loop, standard


def _assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_converges_and_logs(tmp_path):
    rows = []
    state, history = interrupted_run.run(None, 60, on_log=rows.append, log_every=20)
    model, _, x, labels = interrupted_run.problem()
    assert (models.logits_fn(model, {"params": state.params})(x).argmax(axis=1) == labels).all()
    assert [row["step"] for row in history] == [20, 40, 60]
    assert history == rows
    assert history[0]["loss"] > 2 * history[-1]["loss"]
    assert history[-1]["error"] == 0.0
    assert int(state.step) == 60


def test_rows_average_over_every_step():
    def loss(params, model_state, key, batch, step):
        return params["w"], (model_state, {"loss": params["w"], "at": step})

    optimizer = optax.sgd(0.0)
    state = train.init_state({"w": jnp.float32(2.0)}, {}, optimizer)
    _, history = train.fit(loss, state, optimizer, lambda step: {"x": np.zeros(1)}, key=jax.random.key(0), num_steps=7,
                           log_every=3, progress=False)
    assert [(row["step"], row["at"], row["gradient_norm"]) for row in history] == [(3, 1, 1), (6, 4, 1), (7, 6, 1)]


def test_the_given_state_is_not_consumed():
    optimizer = optax.sgd(0.1)
    model, batches, _, _ = interrupted_run.problem()
    state = interrupted_run.start(model, optimizer)
    loss = standard.cross_entropy(models.forward(model))
    runs = [train.fit(loss, state, optimizer, batches, key=jax.random.key(0), num_steps=3, progress=False)[0]
            for _ in range(2)]
    _assert_same_bits(*runs)


def test_resumed_run_is_bit_for_bit_the_straight_one(tmp_path):
    straight, _ = interrupted_run.run(None, 20)
    # 8 is neither a multiple of the saves nor of the logs.
    interrupted_run.run(tmp_path, 8)
    resumed, history = interrupted_run.run(tmp_path, 20)
    _assert_same_bits(resumed, straight)
    assert [row["step"] for row in history] == [10, 15, 20]


def test_finished_run_returns_at_once_and_a_longer_one_is_refused(tmp_path):
    finished, _ = interrupted_run.run(tmp_path, 10)

    def no_batches(step):
        raise AssertionError("a finished run needs no data")

    again, history = interrupted_run.run(tmp_path, 10, no_batches)
    _assert_same_bits(again, finished)
    assert history == []
    with pytest.raises(ValueError, match="past num_steps=5"):
        interrupted_run.run(tmp_path, 5)


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    script = str(pathlib.Path(__file__).with_name("interrupted_run.py"))
    with subprocess.Popen([sys.executable, script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if int(line) >= 17:
                    break
        finally:
            process.kill()
    assert process.returncode == -9
    saved = {int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()}
    assert saved
    assert max(saved) < 40
    resumed, history = interrupted_run.run(tmp_path, 40)
    assert history[0]["step"] > max(saved)
    _assert_same_bits(resumed, interrupted_run.run(None, 40)[0])


@pytest.mark.parametrize("where", ["metric", "gradient"])
def test_nan_stops_with_metric_step_and_last_checkpoint(where, tmp_path):
    def loss(params, model_state, key, batch, step):
        bad = step == 12
        value = jnp.square(params["w"])
        if where == "metric":
            return value, (model_state, {"loss": value, "ratio": jnp.where(bad, jnp.nan, 1.0)})
        # sqrt has a finite value and an infinite slope at 0.
        return value + jnp.sqrt(jnp.where(bad, 0.0, 1.0) * jnp.abs(params["w"])), (model_state, {"loss": value})

    optimizer = optax.sgd(0.01)
    state = train.init_state({"w": jnp.float32(1.0)}, {}, optimizer)
    name = {"metric": "ratio", "gradient": "gradient_norm"}[where]
    with pytest.raises(FloatingPointError, match=rf"{name} is nan at step 12 \(steps 10 to 14 .* step 10\."):
        train.fit(loss, state, optimizer, lambda step: {"x": np.zeros(1)}, key=jax.random.key(0), num_steps=100,
                  directory=tmp_path, save_every=5, log_every=10, progress=False)
    assert "15" not in {path.name for path in tmp_path.iterdir()}


def test_eight_devices_equal_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.random.uniform(jax.random.key(0), (16, 8, 8, 1))
    labels = jnp.arange(16, dtype=jnp.int32) % 3
    model = models.ResNet((4,), (1,), num_classes=3)
    variables = model.init(jax.random.key(1), x)
    optimizer = optax.sgd(0.1)
    state = train.init_state(variables["params"], {"batch_stats": variables["batch_stats"]}, optimizer)
    batch = {"x": x, "labels": labels, "index": jnp.arange(16)}

    def fit(batch):
        loss = standard.cross_entropy(models.forward(model))
        return train.fit(loss, state, optimizer, lambda step: batch, key=jax.random.key(2), num_steps=4,
                         progress=False)[0]

    single, spread = fit(batch), fit(jax.device_put(batch, rows))
    assert len(jax.tree.leaves(spread.params)[0].devices()) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), single, spread)


def test_many_steps_on_virtual_devices_do_not_deadlock():
    # Steps in flight together abort the process after 40 seconds.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = {"x": jax.random.uniform(jax.random.key(0), (64, 8, 8, 1)), "labels": jnp.arange(64, dtype=jnp.int32) % 10}
    batch = jax.device_put(batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    model = models.digits_cnn()
    optimizer = optax.adam(1e-3)
    state = train.init_state(model.init(jax.random.key(1), batch["x"])["params"], {}, optimizer)
    _, history = train.fit(standard.cross_entropy(models.forward(model)), state, optimizer, lambda step: batch,
                           key=jax.random.key(2), num_steps=150, log_every=150, progress=False)
    assert history[0]["step"] == 150


def test_arrays_held_by_a_loss_follow_the_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = {"x": jax.device_put(jnp.ones(8), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))}
    target = jax.device_put(jnp.float32(3.0), jax.devices()[0])
    optimizer = optax.sgd(1.0)
    state = train.init_state({"w": jax.device_put(jnp.float32(0.0), jax.devices()[0])}, {}, optimizer)
    state, _ = train.fit(Partial(_towards, target), state, optimizer, lambda step: batch, key=jax.random.key(0),
                         num_steps=2, progress=False)
    np.testing.assert_allclose(state.params["w"], 3.0)


def _towards(target, params, model_state, key, batch, step):
    loss = 0.5 * jnp.square(params["w"] * batch["x"].mean() - target)
    return loss, (model_state, {"loss": loss})


def _climb(amount, params, model_state, key, batch, step):
    return -amount * params["w"], (model_state, {"loss": params["w"]})


def _fit_phases(phases, num_steps, directory=None):
    optimizer = optax.sgd(1.0)
    state = train.init_state({"w": jnp.float32(0.0)}, {}, optimizer)
    state, _ = train.fit(phases, state, optimizer, lambda step: {"x": np.zeros(1)}, key=jax.random.key(0),
                         num_steps=num_steps, directory=directory, progress=False)
    return float(state.params["w"])


def test_phases_switch_and_resume_in_the_right_one(tmp_path):
    phases = [train.Phase(3, Partial(_climb, 1.0)), train.Phase(5, Partial(_climb, 10.0)),
              train.Phase(None, Partial(_climb, 100.0))]
    assert [_fit_phases(phases, n) for n in (2, 3, 4, 5, 7)] == [2, 3, 13, 23, 223]
    assert _fit_phases(phases, 4, tmp_path) == 13
    assert _fit_phases(phases, 7, tmp_path) == 223


def test_phases_must_cover_the_run():
    for phases in ([], [train.Phase(3, Partial(_climb, 1.0))], [train.Phase(None, Partial(_climb, 1.0))] * 2):
        with pytest.raises(ValueError, match="The phases end at"):
            _fit_phases(phases, 5)


def test_new_values_in_a_loss_do_not_recompile():
    optimizer = optax.sgd(1.0)
    state, traced = train.init_state({"w": jnp.float32(0.0)}, {}, optimizer), []

    def climb(amount, *rest):
        traced.append(amount)
        return _climb(amount, *rest)

    for amount in (1.0, 2.0, 3.0):
        train.fit(Partial(climb, amount), state, optimizer, lambda step: {"x": np.zeros(1)}, key=jax.random.key(0),
                  num_steps=2, progress=False)
    assert len(traced) == 1


def test_integer_images_are_scaled_and_float_ones_left_alone(key):
    scaled = loop.scale_integers(key, {"x": np.array([0, 51, 255], np.uint8), "labels": 1})
    np.testing.assert_allclose(scaled["x"], [0.0, 0.2, 1.0], rtol=1e-6)
    assert scaled["x"].dtype == jnp.float32
    batch = {"x": np.array([0.5], np.float32)}
    assert loop.scale_integers(key, batch) is batch


def test_masked_rows_do_not_count():
    model, _, x, labels = interrupted_run.problem()
    forward = models.forward(model)
    params = interrupted_run.start(model, optax.sgd(0.1)).params
    loss = standard.cross_entropy(forward)
    batch = {"x": x[:6], "labels": labels[:6]}
    padded = {"x": x[:8].at[6:].set(jnp.nan), "labels": labels[:8], "mask": jnp.arange(8) < 6}
    one, (_, metrics) = loss(params, {}, jax.random.key(0), batch, 0)
    other, (_, padded_metrics) = loss(params, {}, jax.random.key(0), padded, 0)
    np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_allclose(metrics["error"], padded_metrics["error"], rtol=1e-6)
    expected = -jax.nn.log_softmax(model.apply({"params": params}, x[:6]))[jnp.arange(6), labels[:6]].mean()
    np.testing.assert_allclose(one, expected, rtol=1e-5)


def test_a_step_is_compiled_once_wherever_its_arrays_come_from(compilations, tmp_path):
    optimizer = optax.sgd(1.0)

    def climb(*args):  # its own, so that no other test has compiled its step
        return _climb(jnp.float32(2.0), *args)

    def fit(w, num_steps, directory):
        state = train.init_state({"w": w}, {}, optimizer)
        train.fit(climb, state, optimizer, lambda step: {"x": jnp.zeros(1)},
                  key=jax.random.key(0), num_steps=num_steps, directory=directory, progress=False)

    fit(jnp.float32(0.0), 3, tmp_path)
    fit(jnp.float32(0.0), 6, tmp_path)  # from the checkpoint
    fit(jax.device_put(jnp.float32(0.0), jax.devices()[0]), 3, None)
    assert compilations.count("jit(update)") == 1
