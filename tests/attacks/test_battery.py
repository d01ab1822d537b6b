"""The battery that every attack of a fixed radius must pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from rdx import attacks, goals, losses, norms
from rdx.balls import Ball

EPS = {"linf": 0.06, "l2": 0.25, "l1": 0.6}


def _fgsm(key, *args, index=None, loop="auto", **options):
    return attacks.fgsm(*args, **options)


_KINDS = {"fgsm": _fgsm, "pgd": partial(attacks.pgd, num_steps=6), "apgd": partial(attacks.apgd, num_steps=12)}
CASES = [(kind, norm) for kind in _KINDS for norm in EPS if (kind, norm) != ("apgd", "l1")]
each_attack = pytest.mark.parametrize(("kind", "norm"), CASES)
each_random_attack = pytest.mark.parametrize(("kind", "norm"), [case for case in CASES if case[0] != "fgsm"])


def _mlp(parameters, x):
    first, second = parameters
    return jnp.tanh(3.0 * (x.reshape(x.shape[0], -1) - 0.5) @ first) @ second


def _model():
    first, second = jax.random.split(jax.random.key(7))
    return Partial(_mlp, (jax.random.normal(first, (18, 12)), jax.random.normal(second, (12, 4))))


def _batch(num=8):
    # Some inputs touch the box, and some labels are wrong from the start.
    x = jnp.clip(1.4 * jax.random.uniform(jax.random.key(1), (num, 3, 3, 2)) - 0.2, 0.0, 1.0)
    labels = _model()(x).argmax(axis=1)
    return x, labels.at[0].set((labels[0] + 1) % 4)


def _run(kind, norm, x, labels, *, eps=None, seed=0, **options):
    ball = Ball(norm, EPS[norm] if eps is None else eps)
    return _KINDS[kind](jax.random.key(seed), _model(), x, labels, ball=ball, **options)


@each_attack
def test_results_are_what_they_claim(kind, norm):
    x, labels = _batch()
    found, ball = _run(kind, norm, x, labels), Ball(norm, EPS[norm])
    assert ball.contains(found.x_adv, x).all()
    assert ((found.x_adv >= 0) & (found.x_adv <= 1)).all()
    fresh = _model()(found.x_adv)
    np.testing.assert_array_equal(found.success, losses.is_wrong(fresh, labels))
    np.testing.assert_allclose(found.loss, losses.cross_entropy(fresh, labels), rtol=1e-4)
    np.testing.assert_allclose(found.distance, norms.norm(found.x_adv - x, norm), rtol=1e-6)
    assert found.success[0]
    clean = losses.cross_entropy(_model()(x), labels)
    assert (found.loss >= clean - 1e-6).all()
    assert (found.loss > clean + 0.01).mean() > 0.8
    assert 1 < found.success.sum() < len(x)
    shapes = [(leaf.shape, leaf.dtype) for leaf in found]
    assert shapes == [(x.shape, x.dtype), ((8,), bool), *[((8,), jnp.float32)] * 2, *[((8,), jnp.int32)] * 2]


@each_attack
def test_no_radius_means_no_change(kind, norm):
    x, labels = _batch()
    found = _run(kind, norm, x, labels, eps=0.0)
    np.testing.assert_array_equal(found.x_adv, x)
    np.testing.assert_array_equal(found.success, losses.is_wrong(_model()(x), labels))


@each_attack
def test_results_do_not_depend_on_the_batch(kind, norm):
    x, labels = _batch()
    together = _run(kind, norm, x, labels)
    order = np.array([6, 2, 0, 5, 1, 3, 4])
    for size in (1, 3, 7):
        for start in range(0, 7, size):
            rows = order[start:start + size]
            found = _run(kind, norm, x[rows], labels[rows], index=jnp.asarray(rows))
            np.testing.assert_array_equal(found.success, together.success[rows])
            np.testing.assert_allclose(found.loss, together.loss[rows], rtol=1e-4)


@each_attack
def test_radii_per_example_and_per_element(kind, norm):
    x, labels = _batch()
    radii = jnp.linspace(0.0, 2.0 * EPS[norm], 8)
    found = _run(kind, norm, x, labels, eps=radii)
    for i in (0, 3, 7):
        alone = _run(kind, norm, x[i:i + 1], labels[i:i + 1], eps=radii[i], index=jnp.array([i]))
        np.testing.assert_allclose(found.loss[i], alone.loss[0], rtol=1e-4)
    frozen = EPS[norm] * jnp.ones_like(x).at[:, 0].set(0.0)
    found = _run(kind, norm, x, labels, eps=frozen)
    assert Ball(norm, frozen).contains(found.x_adv, x).all()
    np.testing.assert_array_equal(found.x_adv[:, 0], x[:, 0])
    assert (found.distance > 0.5 * EPS[norm]).mean() > 0.7


@each_attack
def test_same_key_same_bits(kind, norm):
    x, labels = _batch()
    first, second = _run(kind, norm, x, labels), _run(kind, norm, x, labels)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@each_random_attack
def test_another_key_another_start(kind, norm):
    x, labels = _batch()
    options = {"step_size": 1e-3} if kind == "pgd" else {}
    first, second = (_run(kind, norm, x, labels, seed=seed, num_steps=1, **options) for seed in (0, 1))
    assert (first.x_adv != second.x_adv).reshape(8, -1).any(axis=1).mean() > 0.5


@each_attack
def test_targets_are_reached(kind, norm):
    x, labels = _batch()
    targets = (labels + 1) % 4
    goal = goals.target(targets)
    found = _run(kind, norm, x, labels, goal=goal, eps=8.0 * EPS[norm])
    np.testing.assert_array_equal(found.success, _model()(found.x_adv).argmax(axis=1) == targets)
    assert found.success.sum() >= (2 if kind == "fgsm" else 7)
    assert (found.loss >= goal.loss(_model()(x), labels) - 1e-6).all()


@each_attack
def test_jit_changes_nothing(kind, norm):
    x, labels = _batch()
    plain = _run(kind, norm, x, labels)
    compiled = jax.jit(lambda x, labels, eps: _run(kind, norm, x, labels, eps=eps))(x, labels, EPS[norm])
    np.testing.assert_array_equal(plain.success, compiled.success)
    np.testing.assert_allclose(plain.loss, compiled.loss, rtol=1e-4)


@pytest.mark.parametrize(("kind", "norm", "axis"), [
    *((*case, AxisType.Explicit) for case in CASES), ("pgd", "linf", AxisType.Auto), ("apgd", "l2", AxisType.Auto),
])
def test_sharding_changes_nothing(kind, norm, axis):
    x, labels = _batch()
    plain = _run(kind, norm, x, labels)
    sharding = NamedSharding(jax.make_mesh((8,), ("batch",), axis_types=(axis,)), PartitionSpec("batch"))
    sharded = _run(kind, norm, jax.device_put(x, sharding), jax.device_put(labels, sharding))
    assert len(sharded.x_adv.sharding.device_set) == 8
    np.testing.assert_array_equal(plain.success, sharded.success)
    np.testing.assert_allclose(plain.loss, sharded.loss, rtol=1e-4)


@each_attack
def test_a_detector_is_just_another_goal(kind, norm):
    x, labels = _batch()

    def detector(x):
        return _model()(x), x.reshape(x.shape[0], -1).std(axis=1)

    def evades(output, labels):
        return losses.is_wrong(output[0], labels) & (output[1] < 1.0)

    goal = goals.Goal(Partial(lambda out, y: losses.margin(out[0], y) - out[1]), Partial(evades))
    found = _KINDS[kind](jax.random.key(0), detector, x, labels, ball=Ball(norm, EPS[norm]), goal=goal)
    np.testing.assert_array_equal(found.success, evades(detector(found.x_adv), labels))
    assert found.success.any()
