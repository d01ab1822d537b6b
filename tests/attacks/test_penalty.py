"""Carlini & Wagner and elastic-net attacks: exact minima, steps by hand, the search for the constant, decisions."""

from functools import partial

import jax
import jax.numpy as jnp
import minimal_norms
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, norms
from rdx.attacks import base, penalty
from rdx.balls import Ball

# On the small nets here one compiled loop is faster than thousands of launches.
LOOP = attacks.Loop("compiled")
CW = partial(attacks.cw, loop=LOOP)
CW_LINF = partial(attacks.cw_linf, loop=LOOP)
EAD_L1 = partial(attacks.ead, num_steps=300, beta=0.1, loop=LOOP)
EAD_L2 = partial(attacks.ead, num_steps=300, loop=LOOP)
EACH = [("l2", CW), ("linf", CW_LINF), ("l1", EAD_L1), ("l2", EAD_L2)]
each_attack = pytest.mark.parametrize(("norm", "attack"), EACH, ids=["cw", "cw_linf", "ead-l1", "ead-l2"])


@each_attack
@pytest.mark.parametrize("has_box", [False, True])
def test_closed_form_of_linear_models(norm, attack, has_box):
    setting = minimal_norms.linear(has_box=has_box)
    minimal_norms.check(minimal_norms.keyless(attack), setting, norm, at_most=1.05)


@each_attack
def test_brute_force_on_a_small_net(norm, attack):
    minimal_norms.check(minimal_norms.keyless(attack), minimal_norms.relu(), norm, at_most=1.05)


@each_attack
def test_targets(norm, attack):
    setting = minimal_norms.linear(has_box=True)
    minimal_norms.check(minimal_norms.keyless(attack), setting, norm, at_most=1.05, targets=setting.targets)


@each_attack
def test_the_radius_only_caps(norm, attack):
    setting = minimal_norms.linear(has_box=True)
    free = attack(setting.model, setting.x, setting.labels, ball=setting.ball(norm))
    ball = setting.ball(norm, jnp.median(free.distance))
    capped = attack(setting.model, setting.x, setting.labels, ball=ball)
    assert 0 < capped.success.sum() < len(setting.x)
    np.testing.assert_array_equal(capped.x_adv, attacks.limit(free, setting.x, ball))


@each_attack
def test_elements_of_radius_0_stay_and_others_take_over(norm, attack):
    setting = minimal_norms.linear()
    radius = jnp.full_like(setting.x, jnp.inf).at[:, ::2].set(0.0)
    found = attack(setting.model, setting.x, setting.labels, ball=setting.ball(norm, radius))
    assert found.success.all()
    np.testing.assert_array_equal(found.x_adv[:, ::2], setting.x[:, ::2])


def _affine(parameters, x):
    weights, bias = parameters
    loss = x @ weights + bias
    return jnp.stack([jnp.zeros_like(loss), loss], axis=1)


WEIGHTS = np.array([2.0, -1.0, 0.04])
X = np.array([[0.3, 0.6, 0.5]])


def _one(attack, norm, margin, *, box=(0.0, 1.0), x=X, **options):
    """Attacks a linear model whose loss at `x` is `-margin`."""
    bias = -margin - X @ WEIGHTS
    model = Partial(_affine, (jnp.asarray(WEIGHTS, jnp.float32), jnp.asarray(bias[0], jnp.float32)))
    ball = Ball(norm, jnp.inf, *box)
    return attack(model, jnp.asarray(x, jnp.float32), jnp.zeros(len(x), int), ball=ball, loop=LOOP, **options)


def test_cw_makes_adams_steps_in_tanh_space():
    # The first step of Adam has the length of its rate in every variable, whatever the slope.
    found = _one(attacks.cw, "l2", 0.01, num_search_steps=1, num_steps=2, initial_constant=1.0)
    w = np.arctanh(2.0 * X - 1.0) + 0.01 * np.sign(WEIGHTS)
    np.testing.assert_allclose(found.x_adv, 0.5 + 0.5 * np.tanh(w), rtol=1e-5)
    np.testing.assert_array_equal((found.forwards, found.gradients), ([1], [2]))


def test_ead_shrinks_every_step():
    # delta = 0.1 * 0.5 * WEIGHTS before, beta = 0.003 less after shrinkage: the third element stays.
    options = {"step_size": 0.1, "initial_constant": 0.5, "beta": 0.003}
    found = _one(attacks.ead, "l1", 0.01, num_search_steps=1, num_steps=1, **options)
    np.testing.assert_allclose(found.x_adv - X, [[0.097, -0.047, 0.0]], atol=1e-6)
    assert found.x_adv[0, 2] == np.float32(X[0, 2])
    np.testing.assert_array_equal((found.forwards, found.gradients), ([2], [1]))


def test_ead_extrapolates_like_fista():
    # The margin is reached after exactly three steps; until then the gradient of the penalty stays -c * WEIGHTS.
    size, constant, beta, num_steps = 0.05, 0.8, 0.003, 3
    point = slack = np.zeros(3)
    for k in range(num_steps):
        moved = slack - size * np.sqrt(1 - k / num_steps) * (2.0 * slack - constant * WEIGHTS)
        new = np.sign(moved) * np.maximum(np.abs(moved) - beta, 0.0)
        point, slack = new, new + k / (k + 3) * (new - point)
    options = {"step_size": size, "initial_constant": constant, "beta": beta}
    found = _one(attacks.ead, "l2", point @ WEIGHTS - 1e-3, num_search_steps=1, num_steps=num_steps, **options)
    np.testing.assert_allclose(found.x_adv - X, point[None], atol=1e-6)
    missed = _one(attacks.ead, "l2", point @ WEIGHTS + 1e-3, num_search_steps=1, num_steps=num_steps, **options)
    assert not missed.success.any()


def test_the_constant_rises_tenfold_then_bisects():
    problem, _ = base.begin(lambda x: x, jnp.ones((2, 2)), jnp.zeros(2, int), Ball("l2", 1.0), None)
    search, seen = penalty.first_round(problem, jnp.float32(0.1)), []
    for succeeded in ([False, True], [True, False], [False, True]):
        search = penalty.next_round(search._replace(has_succeeded=jnp.array(succeeded)))
        seen.append(search.constant)
    np.testing.assert_allclose(seen, [[1.0, 0.05], [0.55, 0.075], [0.775, 0.0625]], rtol=1e-6)
    assert not search.has_succeeded.any()


@pytest.mark.parametrize("attack", [attacks.cw, partial(attacks.ead, beta=0.0)], ids=["cw", "ead"])
def test_every_round_begins_anew(attack):
    # 1 / 64 fails, so the second round has 10 / 64, exactly, and nothing else of the first.
    first = _one(attack, "l2", 0.2, num_steps=100, num_search_steps=1, initial_constant=1 / 64)
    both = _one(attack, "l2", 0.2, num_steps=100, num_search_steps=2, initial_constant=1 / 64)
    second = _one(attack, "l2", 0.2, num_steps=100, num_search_steps=1, initial_constant=10 / 64)
    assert not first.success.any()
    assert second.success.all()
    np.testing.assert_array_equal(both.x_adv, second.x_adv)
    np.testing.assert_array_equal(both.gradients, [200])


def test_half_open_and_infinite_boxes():
    # The least l2 perturbation of a linear model, of which the box holds back the second element.
    low, high = jnp.array([[0.0, 0.599, -jnp.inf]]), jnp.array([[1.0, jnp.inf, jnp.inf]])
    for attack in (attacks.cw, partial(attacks.ead, beta=0.0)):
        found = _one(attack, "l2", 0.2, box=(low, high), num_steps=300)
        length = np.hypot(0.001, (0.2 - 0.001) / np.hypot(2.0, 0.04))
        np.testing.assert_allclose(found.distance, [length], rtol=0.01)
        assert (found.x_adv >= low).all()


@pytest.mark.parametrize("attack", [attacks.cw, partial(attacks.ead, beta=0.0)], ids=["cw", "ead"])
def test_confidence(attack):
    # The second input is wrong already, by 0.2, so it lacks only 0.1.
    x, options = np.stack([X[0], X[0] + [0.2, 0.0, 0.0]]), {"num_steps": 300, "confidence": 0.3}
    found = _one(attack, "l2", 0.2, x=x, **options)
    assert (found.loss >= 0.3).all()
    np.testing.assert_allclose(found.distance, np.array([0.5, 0.1]) / np.linalg.norm(WEIGHTS), rtol=0.02)
    # Where the box holds nothing so confident, a clean input that is wrong is still a success.
    found = _one(attack, "l2", 0.2, x=x, **options | {"confidence": 9.0})
    np.testing.assert_array_equal(found.success, [False, True])
    np.testing.assert_array_equal(found.x_adv, x.astype(np.float32))


def test_what_the_authors_beta_costs_in_l1():
    # No fault of the search: what is nearest in l1 has a larger elastic net.
    setting = minimal_norms.linear(has_box=True)
    run = lambda beta: attacks.ead(
        setting.model, setting.x, setting.labels, ball=setting.ball("l1"), num_steps=300, beta=beta, loop=LOOP
    )
    found, sparse = run(1e-3), run(0.1)
    elastic_net = lambda found: jnp.square(norms.l2(found.x_adv - setting.x)) + 1e-3 * found.distance
    assert (elastic_net(found) < elastic_net(sparse)).all()
    assert 1.15 < (found.distance / setting.optimum("l1")).mean() < 1.3


def test_decisions_of_ead():
    setting = minimal_norms.linear()
    results = [
        EAD_L1(setting.model, setting.x, setting.labels, ball=setting.ball("l1"), decision=decision)
        for decision in ("norm", "elastic_net")
    ]
    l1, l2 = ([norm(found.x_adv - setting.x) for found in results] for norm in (norms.l1, norms.l2))
    assert (l1[0] <= l1[1]).all()
    assert (0.1 * l1[1] + l2[1] ** 2 <= 0.1 * l1[0] + l2[0] ** 2 + 1e-6).all()
    assert (l1[0] < l1[1]).any()


@each_attack
def test_extreme_models_stay_finite(norm, attack):
    # A flat one never succeeds; one of enormous logits succeeds, and no NaN passes for a success.
    x, labels = jnp.full((2, 3), 0.5), jnp.zeros(2, int)
    for scale, succeeds in ((0.0, False), (1e30, True)):
        model = Partial(_affine, (scale * jnp.array([1.0, 0.0, 0.0]), jnp.float32(-0.7 * max(scale, 1.0))))
        found = attack(model, x, labels, ball=Ball(norm, jnp.inf))
        assert jnp.isfinite(found.x_adv).all()
        assert (found.success == succeeds).all()


@pytest.mark.parametrize(("attack", "norm", "options"), [
    (attacks.cw, "l2", {"num_search_steps": 2, "confidence": 0.1}), (attacks.cw_linf, "linf", {"patience": 3}),
    (attacks.ead, "l1", {"num_search_steps": 2, "beta": 0.1, "decision": "elastic_net"}),
])
def test_settings_do_not_recompile(attack, norm, options):
    traces = []

    def model(x):
        traces.append(x.shape)
        return jnp.stack([x[:, 0], x[:, 1]], axis=1)

    arguments = (model, jnp.array([[0.6, 0.3]]), jnp.zeros(1, int))
    attack(*arguments, ball=Ball(norm, 1.0), num_steps=2)
    num_traces = len(traces)
    attack(*arguments, ball=Ball(norm, 2.0), num_steps=3, step_size=0.1, initial_constant=0.5, **options)
    assert len(traces) == num_traces


def test_unusable_norms_and_rules():
    arguments = (lambda x: x, jnp.ones((1, 2)), jnp.zeros(1, int))
    for attack, norm in ((attacks.cw, "linf"), (attacks.cw_linf, "l2"), (attacks.ead, "linf")):
        with pytest.raises(ValueError, match="minimises"):
            attack(*arguments, ball=Ball(norm, 1.0))
    with pytest.raises(ValueError, match="decision"):
        attacks.ead(*arguments, ball=Ball("l1", 1.0), decision="en")


def test_tanh_space_holds_the_box():
    x = jnp.array([[0.0, 1.0, 0.25, 0.5]])
    problem, _ = base.begin(lambda x: x, x, jnp.zeros(1, int), Ball("l2", jnp.array([[1.0, 1.0, 1.0, 0.0]])), None)
    space = penalty.tanh_space(problem)
    np.testing.assert_allclose(space.leave(space.enter(x)), x, atol=1e-6)
    far = space.leave(jnp.array([[-50.0, 50.0, 3.0, 9.0]]))
    np.testing.assert_allclose(far, [[0.0, 1.0, 0.5 + 0.5 * np.tanh(3.0), 0.5]], rtol=1e-6)
    w = jnp.array([[0.3, -1.0, 2.0, 0.0]])
    slope = jax.grad(lambda w: space.leave(w).sum())(w)
    np.testing.assert_allclose(space.derivative(w), slope, rtol=1e-5)


def test_the_penalty_ends_at_the_confidence():
    seen = base.Candidate(jnp.zeros((3, 2)), jnp.array([False, True, True]), jnp.array([-1.0, 0.5, jnp.nan]))
    slope = penalty.slope(seen, jnp.ones((3, 2)), jnp.array([2.0, 2.0, 2.0]), 0.5)
    np.testing.assert_array_equal(slope, [[-2.0, -2.0], [0.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(penalty.confident(seen, 0.6).success, [False, False, True])
