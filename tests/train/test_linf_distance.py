"""linf-distance nets: distances against their definition, Lipschitz constants, certificates, and training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rdx import attacks, bounds, margins, models, train
from rdx.balls import Ball
from rdx.models.linf_distance import lp_distance
from rdx.train import linf_distance, schedules

NET = models.LinfDistanceNet((12, 8), 3)
RAMP = schedules.GeometricRamp(8.0, 1000.0, 40, 240)
WEIGHT = schedules.GeometricRamp(0.1, 0.001, 40, 240)


@functools.cache
def _start():
    x = jax.random.uniform(jax.random.key(0), (20, 4, 4, 1))
    variables = NET.init(jax.random.key(1), x)
    forward = models.forward(NET)
    state = {"batch_stats": variables["batch_stats"]}
    return forward, variables["params"], forward.statistics(variables["params"], state, x), x


@pytest.mark.parametrize("p", [1.0, 2.0, 8.0, 60.0])
def test_distances_and_their_gradients(p):
    keys = jax.random.split(jax.random.key(2), 3)
    x, points, pull = (jax.random.normal(key, shape) for key, shape in zip(keys, ((3, 5), (4, 5), (3, 4)), strict=True))
    found, back = jax.vjp(lambda x, points: lp_distance(x, points, jnp.float32(p)), x, points)
    plain = lambda x, points: (jnp.abs(x[:, None] - points[None]) ** p).sum(axis=2) ** (1 / p)
    wanted, plain_back = jax.vjp(plain, x, points)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    for a, b in zip(back(pull), plain_back(pull), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_large_norms_are_the_limit_and_points_on_inputs_do_no_harm():
    keys = jax.random.split(jax.random.key(2), 2)
    x, points = jax.random.normal(keys[0], (3, 5)), jax.random.normal(keys[1], (4, 5))
    value = lp_distance(x, points, jnp.float32(1000.0))
    np.testing.assert_allclose(value, np.abs(x[:, None] - points[None]).max(axis=2), rtol=2e-3)  # 5^(1/1000)
    value, gradient = jax.value_and_grad(lambda x: lp_distance(x, x, jnp.float32(8.0)).sum())(x)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_the_net_is_1_lipschitz_in_linf():
    forward, params, statistics, x = _start()
    logits_fn = jax.jit(forward.logits_fn(params, statistics))
    widest = 0.0
    for seed in range(20):
        step = 0.1 * jax.random.rademacher(jax.random.key(seed), x.shape, jnp.float32)
        widest = max(widest, float(jnp.abs(logits_fn(x + step) - logits_fn(x)).max()))
    assert 0.05 < widest <= 0.1 + 1e-5  # float32 rounding of distances near 3


def test_means_are_those_of_the_batch_in_training_and_the_running_ones_after():
    forward, params, statistics, x = _start()
    trained, state = forward(params, statistics, x, train=True)
    np.testing.assert_allclose(trained, forward.logits_fn(params, statistics)(x), atol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["MeanShift_0"]["mean"],
                               statistics["batch_stats"]["MeanShift_0"]["mean"], rtol=1e-5)
    half = forward(params, statistics, x[:10], train=True)[1]["batch_stats"]["MeanShift_0"]["mean"]
    other = forward.statistics(params, statistics, x[:10])["batch_stats"]["MeanShift_0"]["mean"]
    mixed = 0.9 * statistics["batch_stats"]["MeanShift_0"]["mean"] + 0.1 * other
    np.testing.assert_allclose(half, mixed, rtol=1e-5)


def test_intervals_know_the_lipschitz_bound_by_themselves():
    forward, params, statistics, x = _start()
    fn = margins.of(forward.logits_fn(params, statistics))
    labels = jnp.arange(20, dtype=jnp.int32) % 3
    open_ball = Ball("linf", 0.03, low=-jnp.inf, high=jnp.inf)
    by_constant = bounds.lipschitz(fn, open_ball.region(x), labels, constant=2.0)
    np.testing.assert_allclose(by_constant.lower, fn(x, labels) - 0.06, atol=1e-6)
    by_intervals = jax.jit(bounds.ibp)(fn, open_ball.region(x), labels)
    assert (by_intervals.lower >= by_constant.lower - 1e-5).all()
    np.testing.assert_allclose(by_intervals.lower.min(), by_constant.lower.min(), atol=0.02)


def test_the_lipschitz_bound_of_a_linear_net_is_met():
    kernel = jnp.array([[3.0], [4.0]])
    x, radius = jnp.array([[0.5, 0.5], [0.2, 0.4]]), jnp.array([0.1, 0.2])
    found = bounds.lipschitz(lambda x: x @ kernel, Ball("l2", radius).region(x), constant=5.0)
    np.testing.assert_allclose(found.lower[:, 0], (x @ kernel)[:, 0] - 5.0 * radius, rtol=1e-5)
    np.testing.assert_allclose(found.upper[:, 0], (x @ kernel)[:, 0] + 5.0 * radius, rtol=1e-5)


@pytest.fixture(scope="module")
def trained():
    centers = jax.random.uniform(jax.random.key(3), (3, 16))
    labels = jnp.arange(60, dtype=jnp.int32) % 3
    x = jnp.clip(centers[labels] + 0.05 * jax.random.normal(jax.random.key(4), (60, 16)), 0.0, 1.0)
    forward = models.forward(NET)
    variables = NET.init(jax.random.key(1), x)
    phases = linf_distance.phases(forward, theta=0.3, p=RAMP, weight=WEIGHT)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(0.02, b2=0.99, eps=1e-10))
    start = train.init_state(variables["params"], {"batch_stats": variables["batch_stats"]}, optimizer)
    state, history = train.fit(phases, start, optimizer, lambda step: {"x": x, "labels": labels},
                               key=jax.random.key(0), num_steps=300, log_every=60, progress=False)
    return forward, state, history, x, labels


def test_training_follows_the_norm_and_certifies(trained):
    forward, state, history, x, labels = trained
    assert "p" in history[0]
    assert "p" not in history[-1]
    assert history[1]["p"] > history[0]["p"]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    logits_fn = forward.logits_fn(state.params, state.model_state)
    method = functools.partial(bounds.lipschitz, constant=2.0)
    found = bounds.certify(logits_fn, x, labels, ball=Ball("linf", 0.05), method=method)
    assert found.certified.mean() > 0.8
    by_intervals = bounds.certify(logits_fn, x, labels, ball=Ball("linf", 0.05), method=bounds.ibp)
    assert (by_intervals.certified >= found.certified).all()


def test_nothing_certified_is_broken(trained):
    forward, state, _, x, labels = trained
    logits_fn, ball = forward.logits_fn(state.params, state.model_state), Ball("linf", 0.1)
    certified = bounds.certify_in_float64(logits_fn, x, labels, ball=ball, method=bounds.ibp).certified
    broken = attacks.pgd(jax.random.key(0), logits_fn, x, labels, ball=ball, num_steps=20).success
    assert not (certified & np.asarray(broken)).any()
    assert certified.any()


def test_the_loss_is_its_formula():
    forward, params, statistics, x = _start()
    labels = jnp.arange(20, dtype=jnp.int32) % 3
    batch = {"x": x, "labels": labels, "mask": jnp.arange(20) < 10}
    loss = linf_distance.hinge_and_cross_entropy(forward, theta=0.2, p=RAMP, weight=WEIGHT, is_limit=True)
    scaled = {**params, "scale": jnp.float32(3.0)}
    value, _ = jax.jit(loss)(scaled, statistics, jax.random.key(0), batch, jnp.int32(140))
    logits = np.asarray(forward(params, statistics, x, train=True)[0])[:10]
    picked = logits[np.arange(10), np.asarray(labels)[:10]]
    others = np.where(np.arange(3) == np.asarray(labels)[:10, None], -np.inf, logits).max(axis=1)
    hinge = np.clip(1 - (picked - others) / 0.2, 0, 1).mean()
    entropy = (np.log(np.exp(3 * logits).sum(axis=1)) - 3 * picked).mean()
    np.testing.assert_allclose(value, hinge + 0.01 * entropy, rtol=1e-4)
    assert 0 < hinge < 1
