"""Trainings that run as one program end where each ends alone, on one device and on eight, and after a stop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from rdx import models, train
from rdx.balls import Ball
from rdx.train import certified, schedules, standard
from rdx.train.loop import scale_integers

_MODEL = models.ConvNet((models.Conv(2, 3, 2),), (), 3)
_OPTIMIZER = optax.adam(0.01)
_NUM_STEPS = 6
# Batched kernels sum in another order; Adam's first steps divide small gradients by themselves.
_CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def _batches(step, seed=0):
    key = jax.random.fold_in(jax.random.key(seed), step)
    x = jax.random.randint(key, (8, 6, 6, 1), 0, 256).astype(jnp.uint8)
    return {"x": x, "labels": (x[:, 0, 0, 0] % 3).astype(jnp.int32), "index": jnp.arange(8)}


def _jitter(key, batch):
    batch = scale_integers(key, batch)
    return {**batch, "x": jnp.clip(batch["x"] + 0.02 * jax.random.normal(key, batch["x"].shape), 0.0, 1.0)}


_TRANSFORM = Partial(_jitter)


def _cells(num_runs):
    """Radii, initial parameters and keys that differ: phases of certified training."""
    losses, states = [], []
    for run in range(num_runs):
        ramp = schedules.linear_ramp(0.01 * (run + 1), 1, 3)
        losses.append(certified.phases(models.forward(_MODEL), Ball("linf", 0.0), eps=ramp))
        params = _MODEL.init(jax.random.key(run), jnp.zeros((1, 6, 6, 1)))["params"]
        states.append(train.init_state(params, {}, _OPTIMIZER))
    return losses, states, jax.random.split(jax.random.key(7), num_runs)


def _together(num_runs, num_steps=_NUM_STEPS, batches=_batches, **options):
    losses, states, keys = _cells(num_runs)
    return train.fit_together(
        losses, states, _OPTIMIZER, batches, keys=keys, num_steps=num_steps, transform=_TRANSFORM, progress=False,
        **{"log_every": 2, **options},
    )


def _alone(num_runs, batches=_batches):
    losses, states, keys = _cells(num_runs)
    own = [batches] * num_runs if callable(batches) else batches
    return [
        train.fit(loss, state, _OPTIMIZER, batch, key=key, num_steps=_NUM_STEPS, transform=_TRANSFORM, log_every=2,
                  progress=False)
        for loss, state, key, batch in zip(losses, states, keys, own, strict=True)
    ]


def _assert_close(together, alone):
    states, histories = together
    assert len(states) == len(histories) == len(alone)
    for state, history, (one_state, one_history) in zip(states, histories, alone, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **_CLOSE), state.params, one_state.params)
        assert int(state.step) == int(one_state.step) == _NUM_STEPS
        for row, one_row in zip(history, one_history, strict=True):
            assert row.keys() == one_row.keys()
            np.testing.assert_allclose(list(row.values()), list(one_row.values()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_runs", [3, 8])
def test_runs_end_where_each_ends_alone(num_runs):
    """Three runs lie on one device of eight, eight runs on one device each."""
    alone, together = _alone(num_runs), _together(num_runs)
    _assert_close(together, alone)
    # The runs are not all the same: other radii, other starts.
    kernels = [np.asarray(state.params["Dense_0"]["kernel"]) for state, _ in alone]
    assert all(np.abs(kernels[0] - kernel).max() > 0.05 for kernel in kernels[1:])


def test_each_run_may_have_batches_of_its_own():
    own = [lambda step, seed=seed: _batches(step, seed) for seed in range(2)]
    _assert_close(_together(2, batches=own), _alone(2, own))


def test_eight_runs_use_all_devices(monkeypatch):
    seen = []
    losses, states, keys = _cells(8)

    def spy(step):
        return seen.append(step) or _batches(step)

    from rdx.train import together

    def looked_at(program, *args, **options):
        def update(loss, transform, optimizer, state, batch, key):
            seen.append({len(leaf.devices()) for leaf in jax.tree.leaves((loss, state, key, batch))})
            shards = jax.tree.leaves(state.params)[0].addressable_shards
            seen.append([shard.data.shape[0] for shard in shards])
            return program.update(loss, transform, optimizer, state, batch, key=key)

        return run(program._replace(update=update), *args, **options)

    run = together.run
    monkeypatch.setattr(together, "run", looked_at)
    train.fit_together(losses, states, _OPTIMIZER, spy, keys=keys, num_steps=1, progress=False)
    assert seen == [0, {8}, [1] * 8]


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    states, _ = _together(3)
    _together(3, num_steps=4, directory=tmp_path, save_every=2)
    resumed, histories = _together(3, directory=tmp_path, save_every=2)
    assert [[row["step"] for row in history] for history in histories] == [[6]] * 3
    jax.tree.map(np.testing.assert_array_equal, resumed, states)


def test_the_run_that_diverges_is_named():
    def loss(scale, params, model_state, key, batch, step):
        value = jnp.where(step == 1, scale, 1.0) * params["w"]
        return value, (model_state, {"loss": value})

    state = train.init_state({"w": jnp.float32(1.0)}, {}, _OPTIMIZER)
    with pytest.raises(FloatingPointError, match=r" is nan at step 1 in run 2 \("):
        train.fit_together(
            [Partial(loss, scale) for scale in (1.0, 2.0, jnp.nan)], [state] * 3, _OPTIMIZER,
            lambda step: {"x": np.zeros(1, np.float32)}, keys=jax.random.split(jax.random.key(0), 3), num_steps=3,
            progress=False,
        )


def test_runs_that_do_not_fit_each_other_are_refused():
    losses, states, keys = _cells(2)
    other = [standard.cross_entropy(models.forward(_MODEL)), losses[1]]
    moved = [states[0], states[1]._replace(step=jnp.int32(3))]
    for bad_losses, bad_states, bad_keys, message in (
        (other, states, keys, "2 kinds of losses|differ in values"), (losses, moved, keys, "start at one step"),
        (losses, states, keys[:1], "one of each a run"), (losses, [], keys[:0], "start at one step"),
    ):
        with pytest.raises(ValueError, match=message):
            train.fit_together(bad_losses, bad_states, _OPTIMIZER, _batches, keys=bad_keys, num_steps=6, progress=False)
