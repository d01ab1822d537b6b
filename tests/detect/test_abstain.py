"""Abstain classes: the closed form against linear programs, soundness against points and attacks, training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from detect_cases import digits
from jax.tree_util import Partial

from rdx import attacks, bounds, losses, models
from rdx.balls import Ball
from rdx.bounds import Interval
from rdx.detect import abstain, abstain_bound, goals
from rdx.detect.abstain_bound import Network
from rdx.train import detectors, fit, init_state, schedules

NUM_CLASSES = 10
EPS = 0.1


@jax.jit
def solve(box, network, labels):
    best = abstain_bound.weights(box, network, labels)
    return best, abstain_bound.lower_bound(box, network, labels, best)


def random_case(seed, *, num_abstain=1, num_hidden=7, num_classes=4, batch=1):
    rng = np.random.default_rng(seed)
    lower = rng.normal(size=(batch, num_hidden)).clip(0)
    box = Interval(jnp.asarray(lower, jnp.float32), jnp.asarray(lower + rng.random(lower.shape), jnp.float32))
    outputs = num_classes + num_abstain
    kernel = rng.normal(size=(num_hidden, outputs)) * (rng.random((num_hidden, outputs)) < 0.8)
    network = Network(
        Partial(jnp.asarray), jnp.asarray(kernel, jnp.float32), jnp.asarray(rng.normal(size=outputs), jnp.float32),
        num_classes,
    )
    return box, network, jnp.asarray(rng.integers(num_classes, size=batch))


def linear_program(box, network, label, other):
    """min_h max_k (z_k - z_other) over label and abstain classes, as `min t` under linear constraints."""
    kernel, bias = np.asarray(network.kernel, float), np.asarray(network.bias, float)
    tops = [label, *range(network.num_classes, kernel.shape[1])]
    rows = np.stack([np.append(kernel[:, k] - kernel[:, other], -1.0) for k in tops])
    limits = np.stack([np.asarray(box.lower[0], float), np.asarray(box.upper[0], float)], axis=1).tolist()
    solved = scipy.optimize.linprog(
        np.append(np.zeros(len(kernel)), 1.0), A_ub=rows, b_ub=[bias[other] - bias[k] for k in tops],
        bounds=[*limits, (None, None)], method="highs",
    )
    assert solved.success
    return solved.fun


@pytest.mark.parametrize("seed", range(0, 200, 10))
def test_the_closed_form_is_the_linear_programs_optimum(seed):
    for case in range(seed, seed + 10):
        box, network, labels = random_case(case)
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            box, network = bounds.rounding.doubled((box, network))
            lower = jax.device_get(solve(box, network, labels)[1])[0]
        others = [i for i in range(network.num_classes) if i != int(labels[0])]
        expected = [linear_program(box, network, int(labels[0]), i) for i in others]
        np.testing.assert_allclose(lower, expected, atol=1e-6)


def test_float32_finds_the_same_weight_as_a_grid_or_better():
    box, network, labels = random_case(3, num_hidden=50, num_classes=6, batch=40)
    best, lower = solve(box, network, labels)
    np.testing.assert_allclose(best.sum(axis=2), 1.0, rtol=1e-6)
    for share in np.linspace(0, 1, 101, dtype=np.float32):
        fixed = jnp.broadcast_to(jnp.asarray([1 - share, share]), best.shape)
        tried = abstain_bound.lower_bound(box, network, labels, fixed)
        assert float((tried - lower).max()) < 1e-4  # rounding of sums of 50 terms of size 10
    within = abstain_bound.weights(box, network, labels, low=0.3, high=0.6)[..., 1]
    assert float(within.min()) >= 0.3 - 1e-6
    assert float(within.max()) <= 0.6 + 1e-6


def test_several_classes_are_near_the_linear_program_and_never_beyond():
    gaps = []
    for seed in range(20):
        box, network, labels = random_case(seed, num_abstain=3)
        lower = np.asarray(solve(box, network, labels)[1])[0]
        others = [i for i in range(network.num_classes) if i != int(labels[0])]
        gaps.append(np.array([linear_program(box, network, int(labels[0]), i) for i in others]) - lower)
    assert np.min(gaps) > -1e-4
    assert np.mean(gaps) < 0.05  # of bounds of size 2


def test_a_copied_abstain_class_changes_nothing_and_an_impossible_one_gives_plain_intervals():
    box, network, labels = random_case(5, num_hidden=20, batch=30)
    lower = lambda network: solve(box, network, labels)[1]
    doubled = dataclasses.replace(
        network, kernel=jnp.concatenate([network.kernel, network.kernel[:, -1:]], axis=1),
        bias=jnp.append(network.bias, network.bias[-1]),
    )
    np.testing.assert_allclose(lower(doubled), lower(network), atol=1e-5)
    never = dataclasses.replace(network, bias=network.bias.at[-1].set(-1e4))
    only_label = jnp.zeros((30, 3, 2)).at[:, :, 0].set(1.0)
    np.testing.assert_allclose(
        lower(never), abstain_bound.lower_bound(box, never, labels, only_label), atol=1e-5
    )
    with pytest.raises(ValueError, match="no abstain class"):
        abstain_bound.weights(box, dataclasses.replace(network, num_classes=5), labels)


def test_points_of_the_box_keep_to_the_bound():
    box, network, labels = random_case(8, num_abstain=2, batch=50)
    lower = solve(box, network, labels)[1]
    h = box.lower[None] + jax.random.uniform(jax.random.key(0), (200, 50, 7)) * (box.upper - box.lower)[None]
    logits = h @ network.kernel + network.bias[None, None]
    top = jnp.maximum(jnp.take_along_axis(logits, labels[None, :, None], axis=2)[..., 0], logits[..., 4:].max(axis=2))
    others = jnp.asarray([[i for i in range(4) if i != label] for label in labels.tolist()])
    gaps = top[..., None] - jnp.take_along_axis(logits, jnp.broadcast_to(others[None], (200, 50, 3)), axis=2)
    assert float((lower[None] - gaps).max()) < 1e-4


@functools.cache
def joint(num_abstain=1):
    """A small net trained jointly on digits, at linf radius 0.1."""
    forward = models.forward(models.MLP((32, 16), NUM_CLASSES + num_abstain))
    x, labels, _, _ = digits()
    params = forward.model.init(jax.random.key(2), x[:1])["params"]
    rows = lambda step: np.arange(64) + step * 64 % 1024
    batches = lambda step: {"x": jnp.asarray(x[rows(step)]), "labels": jnp.asarray(labels[rows(step)])}
    optimizer = optax.adam(3e-3)
    loss = detectors.joint_abstain(
        forward, Ball("linf", 0.0), eps=schedules.linear_ramp(EPS, 50, 150), num_classes=NUM_CLASSES,
        gamma=0.1 if num_abstain > 1 else 0.0,
    )
    state, history = fit(
        loss, init_state(params, {}, optimizer), optimizer, batches, key=jax.random.key(1), num_steps=400,
        progress=False,
    )
    return detectors.network(forward, state.params, num_classes=NUM_CLASSES), history


def test_training_certifies_and_nothing_certified_is_broken():
    network, history = joint()
    assert history[-1]["certified_error"] < 0.7
    x, labels = jnp.asarray(digits()[2][:80]), jnp.asarray(digits()[3][:80])
    ball = Ball("linf", EPS)
    loose = abstain.certify(network, x, labels, ball=ball)
    proved = abstain.certify_in_float64(network, x, labels, ball=ball)
    tight = abstain.certify(network, x, labels, ball=ball, method=bounds.crown)
    assert 0.2 < float(loose.certified.mean()) <= float(1.0 - losses.is_wrong(network(x), labels).mean())
    # A radius 1e-6 greater and the proved allowance cost at most an example that is just certified.
    assert (np.asarray(loose.certified) & ~proved.certified).sum() <= 1
    assert not (proved.certified & ~np.asarray(loose.certified)).any()
    certified = np.asarray(loose.certified | tight.certified)
    detector, goal = abstain.detector(network), goals.evade(0.0)
    attack = functools.partial(attacks.pgd, num_steps=40, num_restarts=3)
    for eps, may_break in ((EPS, False), (0.4, True)):
        found = attack(jax.random.key(5), detector, x, labels, ball=Ball("linf", eps), goal=goal)
        logits, score = detector(found.x_adv)
        is_broken = np.asarray(losses.is_wrong(logits, labels) & ~(score > 0))
        assert bool((is_broken & certified).any()) == may_break  # an attack that never succeeds would prove nothing
    clean, score = detector(x)
    assert not bool((losses.is_wrong(clean, labels) | (score > 0))[certified].any())


def test_the_generic_bound_is_the_closed_form():
    network, _ = joint()
    x, labels = jnp.asarray(digits()[2][:10]), jnp.asarray(digits()[3][:10])
    ball = Ball("linf", EPS)
    found = abstain.certify(network, x, labels, ball=ball)
    box = bounds.ibp(network.hidden_fn, ball.region(x))
    lower = abstain_bound.lower_bound(box, network, labels, found.weights)
    np.testing.assert_allclose(found.lower, lower, rtol=1e-3, atol=1e-3)
    assert not bool(abstain.certify(network, x, (labels + 1) % 10, ball=ball).certified.any())
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda x: abstain.certify_in_float64(network, x, labels, ball=ball))(x)


@pytest.mark.slow
def test_several_abstain_classes_train():
    network, history = joint(num_abstain=2)
    assert history[-1]["certified_error"] < 0.8
    x, labels = jnp.asarray(digits()[2][:40]), jnp.asarray(digits()[3][:40])
    found = abstain.certify(network, x, labels, ball=Ball("linf", EPS))
    assert found.weights.shape == (40, 9, 3)
    assert bool(found.certified.any())


def test_balance_is_zero_for_even_use():
    logits = jnp.asarray([[0.0, 5.0, -5.0], [0.0, -5.0, 5.0]])
    assert float(abstain.balance(logits, 1)) == pytest.approx(0.0, abs=1e-6)
    assert float(abstain.balance(logits[:1], 1)) > 0.6
    assert float(abstain.balance(logits[:, :2], 1)) == pytest.approx(0.0, abs=1e-6)
