"""Training of detectors: an outlier class and class-conditional detectors learn what they are trained for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rdx import attacks, data, models
from rdx.balls import Ball
from rdx.train import detectors, fit, init_state, standard

LOOP = attacks.Loop(kind="host")
ATTACK = functools.partial(attacks.pgd, num_steps=3, loop=LOOP)
BALL = Ball("linf", 0.2)


def _train(loss, num_classes, num_steps=100):
    forward = models.forward(models.MLP((32,), num_classes))
    source = data.load("digits", "train")
    x, labels = np.asarray(data.to_float(source.images)), source.labels
    params = forward.model.init(jax.random.key(0), x[:1])["params"]
    rows = lambda step: np.arange(64) + step * 64 % 1024
    batches = lambda step: {"x": jnp.asarray(x[rows(step)]), "labels": jnp.asarray(labels[rows(step)])}
    optimizer = optax.adam(5e-3)
    state, history = fit(
        loss(forward), init_state(params, {}, optimizer), optimizer, batches, key=jax.random.key(1),
        num_steps=num_steps, log_every=5, progress=False,
    )
    return models.logits_fn(forward.model, {"params": state.params}), history


def test_an_outlier_class_catches_what_it_was_trained_on():
    source, _ = _train(standard.cross_entropy, 10)
    builder = functools.partial(detectors.outlier_class, ball=BALL, source=source, attack=ATTACK)
    _, history = _train(builder, 11)
    assert history[-1]["missed"] < 0.1 < history[0]["missed"]
    assert history[-1]["error"] < 0.2


def test_class_conditional_detectors_withstand_their_attack_better():
    builder = functools.partial(detectors.gat, ball=BALL, attack=ATTACK)
    _, history = _train(builder, 10, num_steps=200)
    assert history[-1]["missed"] < 0.2
    assert history[-1]["error"] < 0.6 * history[0]["error"]


def test_dropout_trains():
    _, history = _train(functools.partial(detectors.with_dropout, rate=0.2), 10)
    assert history[-1]["error"] < 0.35 < history[0]["error"]
