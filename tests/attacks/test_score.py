"""Score-based attacks: gradients estimated from losses, exact counts of queries, and what is special to each."""

import importlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import minimal_norms
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from rdx import attacks, goals, losses, norms
from rdx.attacks import base, driver, estimate
from rdx.balls import Ball

# `from rdx.attacks import nes` is the attack, not its module.
genattack, nattack, nes, prgf, zoo = (
    importlib.import_module(f"rdx.attacks.{name}") for name in ("genattack", "nattack", "nes", "prgf", "zoo")
)
MARGIN = goals.misclassify(losses.margin)


def _linear(weights, x):
    return x.reshape(x.shape[0], -1) @ weights


def _mlp(parameters, x):
    first, second = parameters
    return jnp.tanh(3.0 * (x.reshape(x.shape[0], -1) - 0.5) @ first) @ second


def _model():
    keys = jax.random.split(jax.random.key(3), 2)
    return Partial(_mlp, (jax.random.normal(keys[0], (98, 12)) / 4, jax.random.normal(keys[1], (12, 3))))


def _batch(num=8):
    x = jax.random.uniform(jax.random.split(jax.random.key(3), 3)[2], (num, 7, 7, 2))
    labels = _model()(x).argmax(axis=1)
    return x, labels.at[0].set((labels[0] + 1) % 3)


def _problem(model, x, labels, ball, goal=MARGIN):
    return base.begin(model, x, labels, ball, goal)


_estimate = jax.jit(estimate.antithetic_gradient)


@jax.jit
def _true_gradient(model, x, labels):
    return jax.grad(lambda v: losses.margin(model(v), labels).sum())(x)


def _cosine(a, b):
    a, b = norms.flatten(a), norms.flatten(b)
    return (a * b).sum(axis=1) / (norms.l2(a) * norms.l2(b))


# The gradient estimate.


@pytest.mark.parametrize("draw", [jax.random.normal, jax.random.rademacher])
def test_the_estimate_is_unbiased_on_linear_functions(draw):
    weights = jax.random.normal(jax.random.key(0), (8, 2))
    x, labels = jnp.full((2, 8), 0.5), jnp.array([0, 1])
    problem, _ = _problem(Partial(_linear, weights), x, labels, Ball("l2", 1.0))
    pairs = estimate.directions(jax.random.split(jax.random.key(1), 2), problem, 4000, draw=draw)
    gradient, loss = _estimate(problem, x, pairs, 1e-2)
    true = _true_gradient(Partial(_linear, weights), x, labels)
    # The relative error of m Gaussian pairs is sqrt((D + 1) / m) = 0.05, of random signs less.
    assert (norms.l2(gradient - true) < 0.1 * norms.l2(true)).all()
    # Opposite points cancel.
    np.testing.assert_allclose(loss, losses.margin(x @ weights, labels), rtol=1e-4)
    few = _estimate(problem, x, pairs[:, :3], 1e-2)[0]
    np.testing.assert_allclose(few, jnp.einsum("bnd,bd,bne->be", pairs[:, :3], true, pairs[:, :3]) / 3, rtol=1e-2)


def test_the_estimate_points_where_the_gradient_does():
    x, labels = _batch(16)
    problem, _ = _problem(_model(), x, labels, Ball("linf", 0.1))
    true, keys = _true_gradient(_model(), x, labels), jax.random.split(jax.random.key(1), 16)
    for draw in (jax.random.normal, jax.random.rademacher):
        pairs = estimate.directions(keys, problem, 50, draw=draw)
        cosine = _cosine(_estimate(problem, x, pairs, 1e-3)[0], true)
        # In 98 dimensions m pairs give sqrt(m / (m + 98)) = 0.58.
        assert cosine.mean() > 0.5


def test_elements_of_radius_0_stay_and_what_is_not_finite_counts_as_0():
    x, labels = _batch()
    radius = jnp.full_like(x, 0.1).at[:, 3].set(0.0)
    problem, _ = _problem(_model(), x, labels, Ball("linf", radius))
    pairs = estimate.directions(jax.random.split(jax.random.key(1), 8), problem, 4)
    assert (pairs[:, :, 3] == 0).all()
    assert (pairs[:, :, :3] != 0).all()
    vectors = jnp.array([[[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]]])
    np.testing.assert_array_equal(estimate.average(jnp.array([[1.0, 2.0]]), vectors), [[3.5, 5.0, 0.0]])
    np.testing.assert_array_equal(estimate.average(jnp.array([[jnp.nan, 2.0]]), vectors), jnp.zeros((1, 3)))
    np.testing.assert_allclose(estimate.unit(vectors, axis=2)[0, 1], [0.6, 0.8, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(estimate.unit(0.0 * vectors), 0.0 * vectors)


def test_adam_is_optax():
    gradients = jax.random.normal(jax.random.key(0), (3, 5))
    rule = optax.scale_by_adam(eps=1e-9)
    state, moments = rule.init(gradients[0]), estimate.Moments(jnp.zeros(5), jnp.zeros(5))
    for i, gradient in enumerate(gradients):
        with jax.numpy_dtype_promotion("standard"):
            expected, state = rule.update(gradient, state)
        moments, found = estimate.adam(moments, gradient, jnp.asarray(i + 1))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


# All of them: success, counts and stops.


class _Cost(NamedTuple):
    attack: object
    start: int  # forward passes before the first step
    step: int
    rows: tuple  # evaluated for one example in each use of the model
    budget: int  # within which all of the examples must be broken


_COSTS = {
    "nes": _Cost(partial(attacks.nes, num_samples=20, num_steps=60), 1, 21, (1, 20, 1), 800),
    "spsa": _Cost(partial(attacks.spsa, num_samples=20, num_steps=60), 1, 21, (1, 20, 1), 800),
    "nattack": _Cost(partial(attacks.nattack, num_samples=20, num_steps=60), 1, 21, (1, 21), 800),
    "rgf": _Cost(partial(attacks.prgf, num_samples=20, num_steps=60), 1, 21, (1, 20, 1), 800),
    "genattack": _Cost(partial(attacks.genattack, population_size=6, num_steps=400), 7, 5, (1, 6, 5), 1500),
    "zoo": _Cost(
        partial(attacks.zoo, num_coordinates=49, num_steps=100, num_searches=2, initial_c=1.0), 1, 99, (1, 98, 1), 2000,
    ),
}


@pytest.mark.parametrize("name", _COSTS)
def test_success_comes_within_the_budget_and_costs_what_was_evaluated(name):
    attack, start, step, rows, budget = _COSTS[name]
    x, labels = _batch()
    ball = Ball("l2", 0.6) if name == "zoo" else Ball("linf", 0.06)
    uses = []

    def watched(x):
        # Python runs this once for each compiled use of the model: the rows are those that this use evaluates.
        uses.append(len(x))
        return _model()(x)

    result = attack(jax.random.key(0), watched, x, labels, ball=ball, loop=driver.Loop("host", stop=True, trace=True))
    np.testing.assert_array_equal(uses[:len(rows)], 8 * np.array(rows))
    assert result.success.all()
    assert result.forwards[0] == 1
    assert result.forwards.max() <= budget
    assert (result.gradients == 0).all()
    for i in range(1, 8):
        first = int(np.flatnonzero(result.trace.success[:, i])[0])
        assert result.forwards[i] in ((start + (first + 1) * step,) if first else (start, start + step))


def test_settings_that_make_no_sense_name_the_cure():
    x, labels = _batch()
    for match, attack, ball in [
        ("even", partial(attacks.nes, num_samples=5), Ball("linf", 0.1)),
        ("even", partial(attacks.spsa, num_samples=0), Ball("linf", 0.1)),
        ("at least 2", partial(attacks.nattack, num_samples=1), Ball("linf", 0.1)),
        ("finite ends", attacks.nattack, Ball("linf", 0.1, -jnp.inf, jnp.inf)),
        ("at least 2", partial(attacks.genattack, population_size=1), Ball("linf", 0.1)),
        ("norm 'l2'", attacks.zoo, Ball("linf", 0.1)),
        ("at least 1", partial(attacks.zoo, num_searches=0), Ball("l2", 0.1)),
    ]:
        with pytest.raises(ValueError, match=match):
            attack(jax.random.key(0), _model(), x, labels, ball=ball)


# NES and NATTACK.


def test_nes_halves_steps_where_the_loss_has_fallen_down_to_the_least():
    x, labels = 0.4 + 0.2 * _batch()[0][:3], _batch()[1][:3]
    problem, found = _problem(_model(), x, labels, Ball("linf", 0.3))
    problem = problem._replace(data=(jnp.full((3, 1, 1, 1), 0.1), jnp.full((3, 1, 1, 1), 0.02)))
    context = nes._Context(problem, jnp.arange(10), jnp.full(4, -jnp.inf), jnp.float32(1e-3))
    keys = jax.random.split(jax.random.key(0), 3)
    fell = jnp.array([[0.0, 99.0, 0.0, 0.0], [99.0, -99.0, 99.0, 99.0], [-jnp.inf, -jnp.inf, 99.0, 99.0]])
    step = jax.jit(nes._METHOD.step)
    new = step(context, nes._State(keys, x, jnp.array([1.0, 0.5, 1e-3]), fell, found), jnp.int32(0))
    np.testing.assert_allclose(norms.linf(new.point - x), [0.1, 0.05, 0.02], rtol=1e-4)
    # Compared with the loss three steps before: only the first example's has fallen.
    np.testing.assert_allclose(new.share, [0.5, 0.5, 1e-3])
    assert (new.recent[0] == -jnp.inf).all()
    np.testing.assert_array_equal(new.recent[1:, :3], fell[1:, 1:])


def test_nattack_moves_its_mean_up_the_loss_and_not_at_all_where_all_are_equal():
    x, labels = 0.2 + 0.6 * _batch()[0], _batch()[1]
    problem, found = _problem(_model(), x, labels, Ball("linf", 1.0))
    keys = jax.random.split(jax.random.key(0), 8)
    context = nattack._Context(problem, jnp.arange(100), jnp.float32(0.1), jnp.float32(0.02))
    start = nattack._METHOD.init(context, keys, found)
    step = jax.jit(nattack._METHOD.step)
    moved = step(context, start, jnp.int32(0)).mean - start.mean

    def behind(shift):
        return losses.margin(_model()(nattack._points(problem, shift[:, None])[:, 0]), labels).sum()

    # 100 samples without opposites in 98 dimensions.
    assert _cosine(moved, jax.grad(behind)(start.mean)).mean() > 0.5
    # Weights of variance 1: a step has the length s / sigma sqrt(D / n).
    np.testing.assert_allclose(norms.l2(moved).mean(), 0.2 * np.sqrt(98 / 100), rtol=0.5)
    flat = problem._replace(goal=goals.Goal(Partial(lambda z, y: 0.0 * z[:, 0]), Partial(lambda z, y: z[:, 0] > 1e9)))
    still = jax.jit(nattack._METHOD.step)(context._replace(problem=flat), start, jnp.int32(0))
    np.testing.assert_array_equal(still.mean, start.mean)


def test_nattack_starts_at_the_input_even_at_the_ends_of_the_box():
    x = jnp.array([[0.0, 1.0, 0.3]])
    problem, _ = _problem(Partial(_linear, jnp.eye(3)), x, jnp.array([1]), Ball("l2", 0.5))
    np.testing.assert_allclose(nattack._points(problem, jnp.zeros((1, 1, 3)))[0], x, atol=1e-6)
    far = nattack._points(problem, jnp.full((1, 1, 3), 50.0))[:, 0]
    assert problem.ball.contains(far, x).all()


# P-RGF.


@pytest.mark.parametrize("num_samples", [1, 10, 50])
def test_lambda_minimises_the_loss_of_the_estimate(num_samples):
    # Theorem 1 of the paper: the loss falls with (g' C g)^2 / ((1 - 1/q) g' C^2 g + 1/q g' C g), C = E[u u'].
    dimension, grid = 200.0, np.linspace(0.0, 1.0, 20_001)
    alphas = np.array([0.001, 0.03, 0.06, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99])
    across = (1.0 - grid) / (dimension - 1.0)
    best = []
    for square in alphas**2:
        first = grid * square + across * (1.0 - square)
        second = grid**2 * square + across**2 * (1.0 - square)
        best.append(grid[np.argmax(first**2 / ((1.0 - 1.0 / num_samples) * second + first / num_samples))])
    found = prgf.optimal_lambda(jnp.asarray(alphas, jnp.float32), jnp.full(10, dimension), num_samples)
    np.testing.assert_allclose(found, best, atol=1e-3)
    assert best[0] == 0.0
    assert best[-1] == 1.0
    ends = prgf.optimal_lambda(jnp.array([0.0, 1.0]), jnp.full(2, dimension), num_samples)
    np.testing.assert_array_equal(ends, [0.0, 1.0])


def test_directions_lean_towards_the_prior():
    draws = jax.random.normal(jax.random.key(0), (3, 40, 5, 2))
    prior = estimate.unit(jax.random.normal(jax.random.key(1), (3, 5, 2)))
    share = jnp.array([0.0, 0.25, 1.0])
    units = prgf._lean(draws, prior, share)
    np.testing.assert_allclose(jnp.square(units).sum(axis=(2, 3)), 1.0, rtol=1e-5)
    along = (units * prior[:, None]).sum(axis=(2, 3))
    np.testing.assert_allclose(along, jnp.broadcast_to(jnp.sqrt(share)[:, None], (3, 40)), atol=1e-5)


def _signed_prior(sign, model, x, labels):
    return sign * prgf.gradient_prior(model, goal=MARGIN)(x, labels)


def test_a_perfect_prior_saves_queries_of_either_sign():
    x, labels = _batch()
    run = lambda prior_fn: attacks.prgf(
        jax.random.key(0), _model(), x, labels, ball=Ball("linf", 0.06), prior_fn=prior_fn, num_steps=60
    )
    without = run(None)
    with_it, negated = (run(Partial(_signed_prior, jnp.float32(sign), _model())) for sign in (1.0, -1.0))
    assert without.success.all()
    assert with_it.success.all()
    assert (with_it.forwards <= without.forwards).all()
    assert 3 * with_it.forwards[1:].sum() < without.forwards[1:].sum()
    np.testing.assert_array_equal(with_it.forwards, negated.forwards)
    # One for the clean input; 10 for the norm in steps 0 and 3; 50 samples where the prior alone is not enough; 2 more.
    spent = np.asarray(with_it.forwards[1:]) - 1
    possible = {2 * k + 10 * ((k > 0) + (k > 3) + (k > 10)) + 50 * used for k in range(12) for used in range(k + 1)}
    assert set(spent.tolist()) <= possible


def test_priors_see_the_data_of_the_goal():
    x, labels = _batch()
    targets = (labels + 1) % 3
    goal = goals.target(targets, losses.targeted_log_odds)
    result = attacks.prgf(
        jax.random.key(0), _model(), x, labels, ball=Ball("linf", 0.3), goal=goal, num_steps=40,
        prior_fn=prgf.gradient_prior(_model(), goal=goal),
    )
    np.testing.assert_array_equal(_model()(result.x_adv).argmax(axis=1) == targets, result.success)
    assert result.success.all()


# GenAttack.


def test_genattack_keeps_its_elite():
    x, labels = _batch()
    problem, found = _problem(_model(), x, labels, Ball("linf", 0.02))
    numbers = (jnp.float32(value) for value in (0.1, 0.15, 0.3))
    context = genattack._Context(problem, jnp.arange(6), *numbers, jnp.int32(3))
    state = jax.jit(genattack._METHOD.init)(context, jax.random.split(jax.random.key(0), 8), found)
    step = jax.jit(genattack._METHOD.step)
    for i in range(8):
        elite, best = base.strongest(*state.population), state.population.loss.max(axis=1)
        state = step(context, state, jnp.int32(i))
        np.testing.assert_array_equal(state.population.points[:, 0], elite.x)
        np.testing.assert_array_equal(state.population.loss[:, 0], elite.loss)
        assert (state.population.loss.max(axis=1) >= best)[~elite.success].all()
    flat = goals.Goal(Partial(lambda z, y: 0.0 * z[:, 0]), Partial(lambda z, y: z[:, 0] > 1e9))
    context, step = context._replace(problem=problem._replace(goal=flat)), jax.jit(genattack._METHOD.step)
    state = genattack._METHOD.init(context, jax.random.split(jax.random.key(0), 8), found)
    for i in range(7):
        state = step(context, state, jnp.int32(i))
    np.testing.assert_array_equal(state.num_plateaus, 2)
    np.testing.assert_array_equal(state.age, 1)


def test_children_take_their_elements_from_fit_parents():
    points = jnp.arange(4.0)[:, None] * jnp.ones((4, 500))
    breed = jax.jit(genattack._breed)
    children = breed(jax.random.key(0), points, jnp.array([0.0, 0.3, -99.0, jnp.nan]), jnp.float32(0.3), jnp.float32(0))
    assert (children.mutations == 0).all()
    assert set(np.unique(children.points)) == {0.0, 1.0}
    mixed = np.concatenate([
        breed(key, points, jnp.array([0.0, 0.3, -99.0, jnp.nan]), jnp.float32(0.3), jnp.float32(0.1)).points
        for key in jax.random.split(jax.random.key(1), 200)
    ])
    share = mixed.mean(axis=1)
    is_mixed = (share > 0.05) & (share < 0.95)
    # The odds are e^1 : e^0; two parents differ with probability 2 * 0.73 * 0.27.
    np.testing.assert_allclose(share[is_mixed].mean(), 0.731, atol=0.01)
    np.testing.assert_allclose(is_mixed.mean(), 0.393, atol=0.08)
    mutated = breed(jax.random.key(0), points, jnp.zeros(4), jnp.float32(0.3), jnp.float32(0.1)).mutations
    np.testing.assert_allclose((mutated != 0).mean(), 0.1, atol=0.03)
    assert (jnp.abs(mutated) <= 1).all()


# ZOO.


def _half_planes():
    weights = jax.random.normal(jax.random.key(5), (6, 2))
    x = 0.35 + 0.3 * jax.random.uniform(jax.random.key(6), (16, 6))
    logits = x @ weights
    distance = jnp.abs(logits[:, 0] - logits[:, 1]) / norms.l2((weights[:, 0] - weights[:, 1])[None])
    return Partial(_linear, weights), x, logits.argmax(axis=1), distance


def test_zoo_finds_the_nearest_point_of_a_half_plane():
    model, x, labels, distance = _half_planes()
    options = {"num_steps": 60, "num_searches": 6, "initial_c": 0.1}
    run = lambda eps: attacks.zoo(jax.random.key(0), model, x, labels, ball=Ball("l2", eps), **options)
    result = run(jnp.inf)
    assert result.success.all()
    ratio = result.distance / distance
    assert ratio.min() > 0.999
    assert ratio.mean() < 1.02
    assert (result.forwards == 1 + 360 * 13).all()
    eps = float(jnp.median(distance))
    capped = run(eps)
    is_near = result.distance <= eps
    np.testing.assert_array_equal(capped.success, is_near)
    np.testing.assert_array_equal(capped.x_adv, jnp.where(is_near[:, None], result.x_adv, x))


@pytest.mark.parametrize(("dim", "at_most"), [(2, 1.03), (3, 1.03), (4, 1.2)])
def test_zoo_agrees_with_brute_force_but_for_other_minima(dim, at_most):
    # 1.02, 1.02 and 1.18: two of six inputs in four dimensions end at a facet 1.3 and 1.8 times as far away.
    attack = partial(attacks.zoo, num_steps=300, loop=driver.Loop("compiled"))
    minimal_norms.check(attack, minimal_norms.relu(dim=dim), "l2", at_most=at_most)


def test_zoo_estimates_the_gradient_in_distinct_free_coordinates():
    x, labels = _batch()
    radius = jnp.ones_like(x).at[:, 3].set(0.0)
    problem, _ = _problem(_model(), x, (labels + 1) % 3, Ball("l2", radius))
    numbers = (jnp.float32(value) for value in (1.0, 5.0, 0.01, 1e-3))
    context = zoo._Context(problem, jnp.arange(30), jnp.int32(9), *numbers)
    chosen = zoo._choose(context, jax.random.split(jax.random.key(0), 8))
    assert (chosen.sum(axis=2) == 1).all()
    assert (chosen.any(axis=1).sum(axis=1) == 30).all()
    assert not chosen.any(axis=1).reshape(x.shape)[:, 3].any()
    slopes = zoo._slopes(context, jnp.zeros((8, 98)), chosen)
    hinge = lambda v: jnp.maximum(5.0 - losses.margin(_model()(v), (labels + 1) % 3), 0.0).sum()
    true = norms.flatten(jax.grad(hinge)(x))
    # Differences of float32 losses over 2e-3.
    np.testing.assert_allclose(slopes, jnp.where(chosen.any(axis=1), true, 0.0), atol=5e-3)
    assert (jnp.abs(slopes) > 0.1).any()
