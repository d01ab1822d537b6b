"""Surrogate gradients, draws that follow from the point, expectations, ensembles: against values known by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, goals, losses
from rdx.attacks import adaptive
from rdx.balls import Ball

KEY = jax.random.key(5)


def _linear(weight, x):
    return x.reshape(len(x), -1) @ weight


def _net(num_classes=3, size=6, seed=1):
    return Partial(_linear, jax.random.normal(jax.random.key(seed), (size, num_classes)))


def _batch(num=5, size=6):
    x = jax.random.uniform(jax.random.key(2), (num, size))
    return x, _net(size=size)(x).argmax(axis=1)


def _noisy(net, scale, keys, x):
    logits = net(x)
    return logits + scale * jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:]))(keys)


def test_bpda_has_the_value_of_one_and_the_derivatives_of_the_other():
    x = jnp.array([-1.3, 0.1, 2.7, 1e-8])
    fn = adaptive.bpda(jnp.round, jnp.sin)
    np.testing.assert_array_equal(fn(x), jnp.round(x))
    np.testing.assert_array_equal(jax.jit(fn)(x), jnp.round(x))
    np.testing.assert_allclose(jax.grad(lambda x: (3.0 * fn(x)).sum())(x), 3.0 * jnp.cos(x), rtol=1e-6)
    _, tangent = jax.jvp(jax.vmap(fn), (x,), (jnp.ones(4),))
    np.testing.assert_allclose(tangent, jnp.cos(x), rtol=1e-6)
    gradient = jax.grad(lambda x: adaptive.straight_through(jnp.floor)(x).sum())(x)
    np.testing.assert_array_equal(gradient, jnp.ones(4))


def test_bpda_reaches_functions_outside_jax():
    def on_host(x):
        return jax.pure_callback(lambda x: np.round(np.asarray(x)), jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    x, fn = jnp.array([[0.2, 0.9]]), adaptive.straight_through(on_host)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.square(fn(x)).sum()))(x)
    assert value == 1.0
    np.testing.assert_array_equal(gradient, [[0.0, 2.0]])


def test_soft_sign_and_soft_clip():
    x = jnp.array([-3.0, -0.5, 0.5, 4.0])
    np.testing.assert_array_equal(adaptive.soft_sign(x), jnp.sign(x))
    np.testing.assert_allclose(
        jax.grad(lambda x: adaptive.soft_sign(x).sum())(x), 1.0 / jnp.square(1.0 + jnp.abs(x)), rtol=1e-6
    )
    # Around the center 1, of radius 2.
    np.testing.assert_array_equal(adaptive.soft_clip(x, -1.0, 3.0), jnp.clip(x, -1.0, 3.0))
    np.testing.assert_allclose(
        jax.grad(lambda x: adaptive.soft_clip(x, -1.0, 3.0).sum())(x), [1 / 25, 1.0, 1.0, 1 / 16], rtol=1e-6
    )


@pytest.mark.parametrize("unroll", [1, 4])
def test_unrolled_is_the_loop_written_out(unroll):
    def step(x, i):
        return adaptive.soft_clip(x + 0.3 * adaptive.soft_sign(jnp.sin(3.0 * x)) * (i + 1.0), -1.0, 1.0)

    def written_out(x):
        for i in range(4):
            x = step(x, jnp.float32(i))
        return x

    x = jnp.array([0.1, -0.4, 0.7])
    loop = partial(adaptive.unrolled, lambda x, i: step(x, i.astype(jnp.float32)), num_steps=4, unroll=unroll)
    np.testing.assert_allclose(loop(x), written_out(x), rtol=1e-6)
    gradients = [jax.grad(lambda x, fn=fn: jnp.square(fn(x)).sum())(x) for fn in (loop, written_out)]
    assert (np.abs(gradients[1]) > 1e-4).all()
    np.testing.assert_allclose(*gradients, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_draws_follow_from_the_bits_of_each_example_alone(dtype):
    x = jax.random.uniform(KEY, (40, 3, 2)).astype(dtype)
    keys = jax.random.key_data(adaptive.point_keys(KEY, x))
    for i in (0, 7):
        np.testing.assert_array_equal(keys[i], jax.random.key_data(adaptive.point_keys(KEY, x[i:i + 1]))[0])
    order = jnp.arange(40)[::-1]
    np.testing.assert_array_equal(keys[::-1], jax.random.key_data(jax.jit(adaptive.point_keys)(KEY, x[order])))
    # One element's last bit, two elements exchanged, and another key: other draws.
    nearby = x.at[:, 1, 1].set(jnp.nextafter(x[:, 1, 1], jnp.ones(40, dtype)))
    changed = [(KEY, nearby), (KEY, x[:, ::-1]), (jax.random.key(6), x)]
    for other in changed:
        assert (jax.random.key_data(adaptive.point_keys(*other)) != keys).any(axis=1).all()
    assert len(np.unique(keys, axis=0)) == 40


def test_hashes_of_close_points_are_spread_evenly():
    # 4,096 points on a line, one bit apart: each of 16 bins holds 256 +- 4 standard deviations of 15.5.
    start = jax.lax.bitcast_convert_type(jnp.float32(0.5), jnp.int32)
    x = jax.lax.bitcast_convert_type(start + jnp.arange(4096), jnp.float32)[:, None]
    draws = jax.vmap(jax.random.uniform)(adaptive.point_keys(KEY, x))
    counts = np.histogram(draws, 16, (0.0, 1.0))[0]
    assert counts.min() > 256 - 62
    assert counts.max() < 256 + 62


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_eot_answers_with_draws_and_its_gradient_is_their_mean(num_chunks):
    x, labels = _batch()
    random_fn = Partial(_noisy, _net(), jnp.float32(0.7))
    fn = adaptive.eot(KEY, random_fn, 6, num_chunks=num_chunks)
    output = fn(x)
    assert output.shape == (5, 6, 3)
    by_hand = jnp.stack([
        random_fn(jax.vmap(jax.random.fold_in, (0, None))(adaptive.point_keys(KEY, x), s), x) for s in range(6)
    ], axis=1)
    np.testing.assert_allclose(output, by_hand, rtol=1e-5, atol=1e-6)
    goal = goals.expected(goals.misclassify())
    np.testing.assert_allclose(
        goal.loss(output, labels), jnp.stack([losses.cross_entropy(z, labels) for z in by_hand.swapaxes(0, 1)]).mean(0),
        rtol=1e-5,
    )
    gradient = jax.grad(lambda x: goal.loss(fn(x), labels).sum())(x)
    noise = by_hand - _net()(x)[:, None]
    single = jax.grad(lambda x, noise: losses.cross_entropy(_net()(x) + noise, labels).sum())
    by_hand = sum(single(x, noise[:, s]) for s in range(6)) / 6
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-4, atol=1e-6)


def test_wrong_numbers_of_draws():
    for num_samples, num_chunks in ((0, 1), (5, 2)):
        with pytest.raises(ValueError, match="multiple"):
            adaptive.eot(KEY, Partial(_noisy, _net(), 1.0), num_samples, num_chunks=num_chunks)
    x, labels = _batch()
    with pytest.raises(ValueError, match="at least 1"):
        adaptive.stochastic_success(KEY, Partial(_noisy, _net(), 1.0), x, labels, num_draws=0)
    with pytest.raises(ValueError, match="increasing"):
        adaptive.eot_report(KEY, Partial(_noisy, _net(), 1.0), x, labels, num_samples=(2, 2))


def test_expected_goals_count_answers():
    goal = goals.misclassify(losses.margin)
    # Two examples of label 0, four answers of two classes.
    output = jnp.array([[[0, 1], [0, 3], [1, 0], [2, 0]], [[0, 1], [0, 1], [0, 1], [4, 0]]], jnp.float32)
    labels = jnp.zeros(2, int)
    np.testing.assert_allclose(goals.expected(goal).loss(output, labels), [0.25, -0.25])
    for reduction, wanted in ((goals.majority, [False, True]), (jnp.any, [True, True]), (jnp.all, [False, False])):
        np.testing.assert_array_equal(goals.expected(goal, reduction).success(output, labels), wanted)
    aimed = goals.expected(goals.target(jnp.array([1, 0]), losses.targeted_margin))
    np.testing.assert_array_equal(aimed.success(output, labels), [False, False])
    np.testing.assert_allclose(aimed.loss(output, labels), [0.25, 0.25])


@pytest.mark.parametrize("attack", [partial(attacks.pgd, num_steps=5), partial(attacks.apgd, num_steps=5)])
def test_attacks_work_unchanged_on_draws(attack):
    x, labels = _batch(9)
    fn, goal = adaptive.eot(KEY, Partial(_noisy, _net(), jnp.float32(0.3)), 4), goals.expected(goals.misclassify())

    def run(x, labels, index):
        return attack(KEY, fn, x, labels, ball=Ball("linf", 0.1), goal=goal, index=index)

    found = run(x, labels, jnp.arange(9))
    fresh = fn(found.x_adv)
    np.testing.assert_array_equal(found.success, goal.success(fresh, labels))
    np.testing.assert_allclose(found.loss, goal.loss(fresh, labels), rtol=1e-4)
    assert found.success.any()
    compiled = jax.jit(run)(x, labels, jnp.arange(9))
    alone = run(x[3:4], labels[3:4], jnp.array([3]))
    # A last bit that differs would change the draws; on CPUs those of a linear net agree.
    np.testing.assert_allclose(alone.loss[0], found.loss[3], rtol=1e-4)
    np.testing.assert_allclose(compiled.loss, found.loss, rtol=1e-4)


def test_the_report_knows_how_many_draws_a_gradient_needs():
    # f = (0, <c + s n, x>): the gradient of the margin is c + s n, so two means of n and 2n draws have a known angle.
    size, scale, direction = 400, 0.6, jnp.ones(400) / 20.0

    def random_fn(keys, x):
        noise = jax.vmap(lambda key: jax.random.normal(key, (size,)))(keys)
        slope = direction[None] + scale * noise / jnp.sqrt(1.0 * size)
        return jnp.stack([jnp.zeros(len(x)), (slope * x).sum(axis=1)], axis=1)

    x, labels = jax.random.uniform(KEY, (8, size)), jnp.zeros(8, int)
    goal = goals.misclassify(losses.margin)
    report = adaptive.eot_report(KEY, random_fn, x, labels, goal=goal, num_samples=(1, 2, 4, 8))
    n = np.array([1.0, 2.0, 4.0, 8.0])
    exact = 1.0 / np.sqrt((1.0 + scale**2 / n) * (1.0 + scale**2 / (2.0 * n)))
    # In 400 dimensions the angle between means scatters by some hundredths.
    np.testing.assert_allclose(report.cosine, np.repeat(exact[:, None], 8, axis=1), atol=0.06)
    assert exact[2] < 0.95 < exact[3]
    assert (np.abs(np.log2(report.sufficient) - 2.5) < 1.0).all()
    noise_only = adaptive.eot_report(
        KEY, lambda keys, x: random_fn(keys, x) - jnp.stack([jnp.zeros(len(x)), x @ direction], axis=1), x, labels,
        goal=goal, num_samples=(1, 2),
    )
    assert (jnp.abs(noise_only.cosine) < 0.25).all()
    assert (noise_only.sufficient == 0).all()


def test_success_is_judged_on_fresh_draws():
    # The label loses where a standard normal exceeds x: the rate is known.
    def random_fn(keys, x):
        draw = jax.vmap(jax.random.normal)(keys)
        return jnp.stack([x[:, 0], draw], axis=1)

    x, labels = jnp.array([[-5.0], [0.0], [1.0], [6.0]]), jnp.zeros(4, int)
    rate = adaptive.stochastic_success(KEY, random_fn, x, labels, num_draws=2000)
    # Four standard errors.
    np.testing.assert_allclose(rate, [1.0, 0.5, 0.1587, 0.0], atol=4 * 0.5 / np.sqrt(2000))
    alone = adaptive.stochastic_success(
        KEY, random_fn, x[2:3], labels[2:3], num_draws=2000, index=jnp.array([2])
    )
    np.testing.assert_array_equal(alone[0], rate[2])


def test_an_ensemble_is_attacked_as_one():
    first = _net(2, 4)
    second = Partial(_linear, first.args[0] + 0.5 * _net(2, 4, seed=3).args[0])
    x = jax.random.uniform(KEY, (20, 4))
    labels = (first(x) + second(x)).argmax(axis=1)
    both = adaptive.ensemble(first, second)
    np.testing.assert_array_equal(both(x)[:, 1], second(x))
    # The margin of two linear nets: the mean loss is linear, and its maximum over the ball is a corner.
    goal, ball = goals.expected(goals.misclassify(losses.margin), jnp.all), Ball("linf", 0.4)
    found = attacks.pgd(KEY, both, x, labels, ball=ball, goal=goal, num_steps=10)
    slope = jax.grad(lambda x: goal.loss(both(x), labels).sum())(x)
    corner = jnp.where(slope > 0, ball.limits(x)[1], ball.limits(x)[0])
    fooled = losses.is_wrong(first(found.x_adv), labels) & losses.is_wrong(second(found.x_adv), labels)
    np.testing.assert_array_equal(found.success, fooled)
    failed = ~np.asarray(found.success)
    np.testing.assert_allclose(found.loss[failed], goal.loss(both(corner), labels)[failed], rtol=1e-4, atol=1e-5)
    assert 0 < found.success.sum() < 20
    with pytest.raises(ValueError, match="at least one"):
        adaptive.ensemble()
