"""A5/P, A5/PC and A5/PRC: who gets gradients, who is frozen, and that the worst case of new pictures falls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rdx import bounds, models, train
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.robustify import offline, physical
from rdx.robustify.acquisition import IDENTITY, Camera
from rdx.train import schedules

DEFENSE, PICTURE = Ball("linf", 0.4), Ball("linf", 0.1)
CAMERA = Camera(shift=0.5, degrees=3.0, distortion=0.1, noise=(0.0, 0.02), sigma=(0.0, 0.3), num_channels=1, num_taps=3)
SHAPE, NUM = (6, 6, 1), 5
EPS, END = 0.02, jnp.int32(9)


@jax.jit
def _apply(key, params, w, rows, index):
    return physical.apply(key, params, w, rows, CAMERA, defense=DEFENSE, index=index)


def _pictures(key, params, batch):
    return _apply(key, params, batch["x"], batch["row"], batch["index"])


def _threat(*, eps=EPS, has_crown=False):
    return Threat(Ball("linf", 0.0), schedules.linear_ramp(eps, -1, 1), has_crown=has_crown)


@functools.cache
def _problem():
    """Five prototypes, four pictures of each in a batch, and a classifier that knows them."""
    classifier = models.forward(models.MLP((16,), NUM))
    robustifier = models.forward(models.Robustifier((models.Conv(4, 3), models.Conv(1, 3))))
    w = jax.random.uniform(jax.random.key(1), (NUM, *SHAPE), minval=0.2, maxval=0.8)
    row = jnp.arange(4 * NUM) % NUM
    batch = {"x": w[row], "labels": row.astype(jnp.int32), "row": row, "index": jnp.arange(4 * NUM)}
    params = classifier.model.init(jax.random.key(2), w)["params"]
    maker = robustifier.model.init(jax.random.key(3), w)["params"]
    start = physical.init(NUM, SHAPE, classifier=params)
    # At radius 0 the loss is cross entropy.
    loss = physical.with_classifier(classifier, CAMERA, defense=Ball("linf", 0.0), threat=_threat(eps=0.0))
    params = _fit(loss, start, batch, 100, optax.adam(0.01))[0]["classifier"]
    return classifier, robustifier, params, maker, batch


def _fit(loss, params, batch, num_steps, optimizer):
    state = train.init_state(params, {}, optimizer)
    state, history = train.fit(loss, state, optimizer, lambda step: batch, key=jax.random.key(0), num_steps=num_steps,
                               log_every=num_steps // 2, progress=False)
    return state.params, history


def _losses(*, camera=CAMERA, defense=DEFENSE, picture=PICTURE, has_crown=False):
    classifier, robustifier, params, maker, _ = _problem()
    threat = _threat(has_crown=has_crown)
    return {
        "p": (physical.prototypes(classifier.logits_fn(params, {}), camera, defense=defense, threat=threat),
              physical.init(NUM, SHAPE)),
        "pc": (physical.with_classifier(classifier, camera, defense=defense, threat=threat),
               physical.init(NUM, SHAPE, classifier=params)),
        "prc": (physical.with_robustifier(classifier, robustifier, camera, defense=defense, defense_picture=picture,
                                          threat=threat),
                physical.init(NUM, SHAPE, classifier=params, robustifier=maker)),
    }


@jax.jit
def _value(loss, params, batch, key):
    return loss(params, {}, key, batch, END)[0]


@jax.jit
def _gradient(loss, params, batch):
    return jax.grad(loss, has_aux=True)(params, {}, jax.random.key(0), batch, END)[0]


@jax.jit
def _worst_case(logits_fn, x, labels):
    return bounds.worst_case(logits_fn, Ball("linf", EPS).region(x), labels)


def _sizes(tree):
    return [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)]


def test_without_a_camera_it_is_offline_robustification_in_the_mean():
    classifier, _, params, _, batch = _problem()
    loss, _ = _losses(camera=IDENTITY)["p"]
    z = {"z": jax.random.normal(jax.random.key(4), (NUM, *SHAPE))}
    plain = offline.offline(classifier.logits_fn(params, {}), defense=DEFENSE, threat=_threat())
    values = [_value(fn, z, batch, jax.random.key(0)) for fn in (loss, plain)]
    np.testing.assert_allclose(values[0], values[1] / (4 * NUM), rtol=1e-5)


def test_every_picture_of_a_prototype_is_another_one(key):
    _, _, _, _, batch = _problem()
    z = {"z": jnp.ones((NUM, *SHAPE))}
    x = _pictures(key, z, batch)
    assert len({picture.tobytes() for picture in np.asarray(x[::NUM])}) == 4
    # Steps have keys of their own, so the next pictures differ again.
    loss, params = _losses()["p"]
    assert _value(loss, params, batch, jax.random.key(0)) != _value(loss, params, batch, jax.random.key(1))


def test_the_loss_is_the_worst_case_of_the_pictures_that_apply_takes(key):
    classifier, robustifier, params, maker, batch = _problem()
    z = {"z": jax.random.normal(jax.random.key(4), (NUM, *SHAPE))}
    x = _pictures(key, z, batch)
    expected = _worst_case(classifier.logits_fn(params, {}), x, batch["labels"]).loss.mean()
    losses = _losses(picture=Ball("linf", 0.0))
    for name in ("p", "pc", "prc"):  # a robustifier without budget does nothing
        loss, start = losses[name]
        np.testing.assert_allclose(_value(loss, {**start, **z}, batch, key), expected, rtol=1e-5)
    loss, start = _losses()["prc"]
    from_maker, _ = robustifier(maker, {}, x, train=False)
    moved = jnp.clip(x + 0.1 * (2 * jax.nn.sigmoid(from_maker) - 1), 0, 1)
    expected = _worst_case(classifier.logits_fn(params, {}), moved, batch["labels"]).loss.mean()
    np.testing.assert_allclose(_value(loss, {**start, **z}, batch, key), expected, rtol=1e-5)


def test_gradients_reach_what_is_trained_and_the_rows_of_the_batch_only():
    _, _, _, _, batch = _problem()
    part = {name: value[jnp.array([0, 3, 5, 8])] for name, value in batch.items()}  # rows 0 and 3
    wanted = {"p": {"z"}, "pc": {"z", "classifier"}, "prc": {"z", "classifier", "robustifier"}}
    for name, (loss, start) in _losses().items():
        gradient = _gradient(loss, start, part)
        assert set(gradient) == wanted[name]
        assert all(size > 0 for size in _sizes(gradient))
        moved = np.asarray(jnp.abs(gradient["z"]).max(axis=(1, 2, 3)) > 0)
        np.testing.assert_array_equal(np.flatnonzero(moved), [0, 3])


@pytest.mark.parametrize("name", ["p", "pc", "prc"])
def test_training_lowers_the_worst_case_of_new_pictures(name):
    classifier, robustifier, params, _, batch = _problem()
    loss, start = _losses(has_crown=name == "p")[name]
    frozen = jax.tree.map(jnp.copy, params)
    trained, history = _fit(loss, start, batch, 80, optax.adam(0.1 if name == "p" else 0.005))
    assert history[-1]["loss"] < history[0]["loss"]
    jax.tree.map(np.testing.assert_array_equal, params, frozen)
    assert DEFENSE.contains(offline.apply(trained, batch["x"], batch["row"], defense=DEFENSE), batch["x"]).all()

    def worst(found):
        x = _pictures(jax.random.key(77), found, batch)
        if "robustifier" in found:
            z, _ = robustifier(found["robustifier"], {}, x, train=False)
            x = jnp.clip(x + PICTURE.eps * jnp.tanh(0.5 * z), 0, 1)
        logits_fn = classifier.logits_fn(found.get("classifier", params), {})
        return _worst_case(logits_fn, x, batch["labels"]).loss.mean()

    assert worst(trained) < 0.7 * worst(start)


def test_batchnorm_takes_the_statistics_of_the_pictures(key):
    _, _, _, _, batch = _problem()
    classifier = models.forward(models.ResNet((4,), (1,), num_classes=NUM))
    variables = classifier.model.init(jax.random.key(5), batch["x"])
    state = {"batch_stats": variables["batch_stats"]}
    loss = physical.with_classifier(classifier, CAMERA, defense=DEFENSE, threat=_threat())
    params = physical.init(NUM, SHAPE, classifier=variables["params"])
    _, (next_state, _) = jax.jit(loss)(params, state, key, batch, END)
    x = _pictures(key, params, batch)
    _, wanted = classifier(variables["params"], state, x, train=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), next_state, wanted)


def test_different_boxes_are_refused():
    other = dataclasses.replace(DEFENSE, low=-1.0)
    with pytest.raises(ValueError, match="different boxes"):
        _losses(defense=other)
    classifier, robustifier, _, _, _ = _problem()
    with pytest.raises(ValueError, match="different boxes"):
        physical.with_robustifier(
            classifier, robustifier, CAMERA, defense=DEFENSE, defense_picture=other, threat=_threat()
        )
