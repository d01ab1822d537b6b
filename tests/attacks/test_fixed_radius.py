"""PGD and APGD through the driver: loops agree, restarts, the best seen, compilations, checks before long work."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, goals, losses
from rdx.attacks import base
from rdx.balls import Ball
from rdx.goals import Goal


def _linear(parameters, x):
    return x.reshape(x.shape[0], -1) @ parameters


def _model(key, classes=3, size=6):
    return Partial(_linear, jax.random.normal(key, (size, classes)))


def _wavy(parameters, x):
    hidden = jnp.sin(4.0 * _linear(parameters[0], x))
    return hidden @ parameters[1]


def _wavy_model():
    first, second = jax.random.split(jax.random.key(3))
    return Partial(_wavy, (jax.random.normal(first, (6, 16)), jax.random.normal(second, (16, 3))))


def _batch(num=5):
    x = jax.random.uniform(jax.random.key(1), (num, 2, 3))
    return x, _wavy_model()(x).argmax(axis=1)


def test_radii_and_boxes_follow_their_examples(key):
    # Some are done at once, so that the rest runs in smaller arrays.
    x, y = _batch(40)
    model, radii = _wavy_model(), jnp.linspace(0.0, 0.2, 40)
    low = jnp.maximum(x - jnp.linspace(0.05, 0.3, 40)[:, None, None], 0.0)
    for eps in (radii, radii[:, None, None] * jnp.ones_like(x)):
        ball = Ball("linf", eps, low, 1.0)
        stopped, full = (
            attacks.pgd(key, model, x, y, ball=ball, num_steps=12, loop=attacks.Loop(stop=stop, chunk=2))
            for stop in (True, False)
        )
        np.testing.assert_array_equal(stopped.success, full.success)
        failed = ~np.asarray(full.success)
        np.testing.assert_allclose(stopped.x_adv[failed], full.x_adv[failed], atol=1e-5)
        assert ball.contains(stopped.x_adv, x).all()
        assert 0 < failed.sum() < 32
        assert stopped.gradients.sum() < full.gradients.sum()


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_all_loops_agree(attack, key):
    x, y = _batch()
    model = _wavy_model()

    def run(eps, loop):
        return attack(key, model, x, y, ball=Ball("linf", eps), num_steps=4, num_restarts=2, loop=attacks.Loop(loop))

    expected = run(0.1, "host")
    compiled = jax.jit(run, static_argnums=1)
    for found in (run(0.1, "auto"), run(0.1, "compiled"), compiled(0.1, "auto"), compiled(0.1, "host")):
        np.testing.assert_array_equal(found.success, expected.success)
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)
        np.testing.assert_allclose(found.x_adv, expected.x_adv, atol=1e-5)
    for loop in ("host", "compiled"):
        grid = jax.vmap(lambda eps, loop=loop: run(eps, loop))(jnp.array([0.0, 0.1]))
        np.testing.assert_array_equal(grid.x_adv[0], x)
        np.testing.assert_array_equal(grid.success[1], expected.success)
        np.testing.assert_allclose(grid.loss[1], expected.loss, rtol=1e-4)


def test_models_can_be_vmapped(key):
    x, y = _batch()
    stacked = jax.vmap(lambda k: _model(k).args[0])(jax.random.split(key, 3))

    def loss(parameters):
        return attacks.pgd(key, Partial(_linear, parameters), x, y, ball=Ball("l2", 0.3), num_steps=3).loss

    together = jax.vmap(loss)(stacked)
    for row, parameters in zip(together, stacked, strict=True):
        np.testing.assert_allclose(row, loss(parameters), rtol=1e-5)


def test_the_gradient_through_an_attack_is_the_dual_norm(key):
    weights = jax.random.normal(key, (6, 2))
    x, y = jnp.full((3, 6), 0.5), jnp.array([0, 1, 0])
    goal = goals.misclassify(losses.margin)

    def worst(eps):
        return attacks.pgd(
            key, Partial(_linear, weights), x, y, ball=Ball("linf", eps), goal=goal, num_steps=4, random_start=False,
        ).loss.sum()

    np.testing.assert_allclose(jax.grad(worst)(0.05), 3 * jnp.abs(weights[:, 0] - weights[:, 1]).sum(), rtol=1e-5)


def _first_element(x):
    return x.reshape(x.shape[0], -1)[:, :1]


def test_a_success_on_the_way_is_kept_though_the_loss_rises_beyond_it(key):
    goal = Goal(
        Partial(lambda z, y: z[:, 0]), Partial(lambda z, y: (z[:, 0] > 0.29) & (z[:, 0] < 0.31))
    )
    found = attacks.pgd(
        key, _first_element, jnp.full((1, 1), 0.2), jnp.zeros(1, int), ball=Ball("linf", 0.5), goal=goal,
        step_size=0.1, num_steps=4, random_start=False,
    )
    assert found.success[0]
    np.testing.assert_allclose(found.x_adv, 0.3, atol=1e-6)


@pytest.mark.parametrize(("steps", "peak"), [(1, 0.45), (2, 0.45), (3, 0.45)])
def test_the_greatest_loss_is_kept_though_later_steps_are_worse(steps, peak, key):
    # From 0.2 the fixed step overshoots the peak at 0.4: 0.45, 0.2, 0.45, ...
    goal = Goal(Partial(lambda z, y: -jnp.square(z[:, 0] - 0.4)), Partial(lambda z, y: z[:, 0] > 2.0))
    found = attacks.pgd(
        key, _first_element, jnp.full((1, 1), 0.2), jnp.zeros(1, int), ball=Ball("linf", 0.5), goal=goal,
        step_size=0.25, num_steps=steps, random_start=False,
    )
    np.testing.assert_allclose(found.x_adv, peak, atol=1e-6)


def test_the_clean_input_is_a_candidate(key):
    # The only success is the clean input; every move leaves it.
    goal = Goal(Partial(lambda z, y: z[:, 0]), Partial(lambda z, y: z[:, 0] == 0.25))
    found = attacks.pgd(
        key, _first_element, jnp.full((1, 1), 0.25), jnp.zeros(1, int), ball=Ball("linf", 0.2), goal=goal, num_steps=3,
    )
    assert found.success[0]
    assert found.distance[0] == 0


def test_better_orders_by_success_then_loss():
    old = base.Candidate(jnp.zeros((4, 1)), jnp.array([True, False, False, True]), jnp.array([1.0, 5.0, 1.0, 2.0]))
    new = base.Candidate(jnp.ones((4, 1)), jnp.array([False, True, False, True]), jnp.array([9.0, 0.0, 2.0, 2.0]))
    kept = base.better(old, new)
    np.testing.assert_array_equal(kept.x[:, 0], [0, 1, 1, 0])
    np.testing.assert_array_equal(kept.success, [True, True, False, True])
    np.testing.assert_array_equal(kept.loss, [1.0, 0.0, 2.0, 2.0])


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_more_restarts_are_never_weaker_and_cost_what_they_say(attack, key):
    x, y = _batch(12)
    runs = [
        attack(key, _wavy_model(), x, y, ball=Ball("linf", 0.05), num_steps=3, num_restarts=r) for r in (1, 2, 4)
    ]
    for fewer, more in itertools.pairwise(runs):
        assert (more.success >= fewer.success).all()
        assert (more.loss >= fewer.loss)[more.success == fewer.success].all()
    assert (runs[2].loss > runs[0].loss).any()
    for found, restarts in zip(runs, (1, 2, 4), strict=True):
        np.testing.assert_array_equal(found.forwards, np.full(12, 1 + restarts))
        np.testing.assert_array_equal(found.gradients, np.full(12, 3 * restarts))


def test_the_counts_are_those_of_the_calls(key):
    x, y = _batch()
    forwards, gradients = [], []

    @jax.custom_vjp
    def counted(v):
        jax.debug.callback(lambda: forwards.append(1))
        return _wavy_model()(v)

    def forward(v):
        jax.debug.callback(lambda: gradients.append(1))
        return jax.vjp(_wavy_model(), v)

    counted.defvjp(forward, lambda pull, out: pull(out))
    found = attacks.pgd(key, counted, x, y, ball=Ball("linf", 0.1), num_steps=5, num_restarts=2)
    jax.effects_barrier()
    assert (len(forwards), len(gradients)) == (int(found.forwards[0]), int(found.gradients[0])) == (3, 10)


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
@pytest.mark.parametrize("loop", ["host", "compiled"])
def test_one_trace_per_signature(attack, loop):
    traces = []

    def counting(parameters, x):
        traces.append(1)
        return _linear(parameters, x)

    x, y = _batch()
    for trial, eps in enumerate((0.1, 0.2, 1, np.float32(0.3), jnp.float32(0.4))):
        model = Partial(counting, jax.random.normal(jax.random.key(trial), (6, 3)))
        options = {"step_size": eps / 3} if attack is attacks.pgd else {"rho": 0.5 + 0.1 * trial}
        options |= {"ball": Ball("linf", eps), "num_steps": 4, "num_restarts": 2, "loop": attacks.Loop(loop)}
        attack(jax.random.key(trial), model, x, y, **options)
        if trial == 0:
            first = len(traces)
    assert len(traces) == first
    # Clean forward, gradient step, last forward.
    assert first == 3


def test_gradients_that_are_not_finite_never_leave_the_ball(key):
    def model(x):
        return jnp.stack([jnp.sqrt(x[:, 0]), x[:, 1]], axis=1)

    x, y, ball = jnp.array([[0.0, 0.2], [0.5, 0.2]]), jnp.array([1, 0]), Ball("l2", 0.1)
    found = attacks.pgd(key, model, x, y, ball=ball, num_steps=5, random_start=False)
    assert ball.contains(found.x_adv, x).all()


@pytest.mark.parametrize("run", [
    lambda *a, **k: attacks.fgsm(*a, **k),
    lambda *a, **k: attacks.pgd(jax.random.key(0), *a, **k),
    lambda *a, **k: attacks.apgd(jax.random.key(0), *a, **k),
])
def test_unusable_inputs_name_the_cure(run, key):
    x, y = _batch()
    model, ball = _model(key), Ball("linf", 0.1)
    broken = Partial(_linear, jnp.full((6, 3), jnp.nan))
    for match, arguments in {
        "its parameters are probably NaN": (broken, x, y, ball),
        "eps must be at least 0": (model, x, y, Ball("linf", -0.1)),
        "Unknown norm": (model, x, y, Ball("l3", 0.1)),
        "scale images": (model, 255.0 * x, y, ball),
        "convert images to float": (model, (255 * x).astype(jnp.uint8), y, ball),
        "low must be below high": (model, x, y, Ball("linf", 0.1, 1.0, 0.0)),
        r"must lie in 0\.\.2": (model, x, y + 3, ball),
        "one integer per example": (model, x, y[:2], ball),
        "Labels must be integers": (model, x, y.astype(jnp.float32), ball),
    }.items():
        with pytest.raises(ValueError, match=match):
            run(*arguments[:3], ball=arguments[3])


def test_unusable_settings_name_the_cure(key):
    x, y = _batch()
    model = _model(key)
    with pytest.raises(ValueError, match="at least 1"):
        attacks.pgd(key, model, x, y, ball=Ball("linf", 0.1), num_steps=0, step_size=0.1)
    with pytest.raises(ValueError, match="random_start=True"):
        attacks.pgd(key, model, x, y, ball=Ball("linf", 0.1), num_restarts=2, random_start=False)
    with pytest.raises(ValueError, match="one integer per example"):
        attacks.pgd(key, model, x, y, ball=Ball("linf", 0.1), index=jnp.arange(3))


def test_limit_keeps_what_lies_in_the_ball(key):
    x, y = jnp.full((3, 2), 0.5), jnp.zeros(3, int)
    far = x + jnp.array([[0.05, 0.0], [0.2, 0.0], [0.0, -0.1]])
    result = base.report(
        base.Problem(Partial(_linear, jnp.eye(2)), Ball("linf", 1.0), goals.misclassify(), x, y),
        base.Found(base.Candidate(far, jnp.ones(3, bool), jnp.ones(3)), *[jnp.ones(3, int)] * 2),
    )
    np.testing.assert_allclose(result.distance, [0.05, 0.2, 0.1], rtol=1e-5)
    kept = attacks.limit(result, x, Ball("linf", 0.1))
    np.testing.assert_array_equal(kept, jnp.stack([far[0], x[1], far[2]]))
