"""Averages of weights against their formulas, and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rdx import models, train
from rdx.train import averaging, standard


def test_averages_of_weights():
    optimizer = optax.sgd(0.1)
    params = {"w": jnp.array([1.0, -2.0])}
    gradient = {"w": jnp.array([1.0, 2.0])}
    for options, wanted in (
        ({"start": 1}, lambda seen: np.mean(seen[1:], axis=0)),
        ({"decay": 0.5, "start": 2}, lambda seen: 0.5 * seen[2] + 0.5 * seen[3]),
        ({"start": 9}, lambda seen: seen[3]),
    ):
        kept = averaging.averaged(optimizer, **options)
        state, now, seen = kept.init(params), params, []
        for _ in range(4):
            updates, state = kept.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
            seen.append(np.asarray(now["w"]))
        np.testing.assert_allclose(averaging.average((state, None))["w"], wanted(seen), rtol=1e-6)
    with pytest.raises(ValueError, match=r"wrap it in averaging\.averaged"):
        averaging.average(optimizer.init(params))
    with pytest.raises(ValueError, match="decay=1"):
        averaging.averaged(optimizer, decay=1.0)


def test_averages_ride_along_in_training_and_get_statistics_of_their_own():
    model = models.BatchNormConvNet((models.Conv(4, 3, 2), models.Conv(4, 3, 1)), (8,), 3)
    batch = {"x": jax.random.uniform(jax.random.key(0), (6, 6, 6, 1)), "labels": jnp.arange(6, dtype=jnp.int32) % 3}
    variables = dict(model.init(jax.random.key(1), batch["x"]))
    forward, params, state = models.forward(model), variables.pop("params"), variables
    optimizer = averaging.averaged(optax.adam(0.01), start=3)
    after, _ = train.fit(standard.cross_entropy(forward), train.init_state(params, state, optimizer), optimizer,
                         lambda step: batch, key=jax.random.key(0), num_steps=5, progress=False)
    mean = averaging.average(after.opt_state)
    found = averaging.statistics(forward, mean, after.model_state, [batch["x"][:3], batch["x"][3:]])
    parts = [forward.statistics(mean, after.model_state, x) for x in (batch["x"][:3], batch["x"][3:])]
    wanted = jax.tree.map(lambda a, b: 0.5 * (a + b), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    with pytest.raises(ValueError, match="at least one batch"):
        averaging.statistics(forward, mean, after.model_state, [])
