"""Square: the schedule, the shapes of its changes, and a search that never loses what it has."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, goals, losses, norms
from rdx.attacks import driver
from rdx.attacks.square import _move_mass, _pattern, _signed_square, _tiles, schedule
from rdx.balls import Ball

EPS = {"linf": 0.05, "l2": 0.6, "l1": 4.0}
each_norm = pytest.mark.parametrize("norm", EPS)


def _mlp(parameters, x):
    first, second = parameters
    return jnp.tanh(3.0 * (x.reshape(x.shape[0], -1) - 0.5) @ first) @ second


def _problem(shape=(7, 7, 2), num=6):
    keys = jax.random.split(jax.random.key(3), 3)
    size = int(np.prod(shape))
    model = Partial(_mlp, (jax.random.normal(keys[0], (size, 12)) / 4, jax.random.normal(keys[1], (12, 3))))
    x = jax.random.uniform(keys[2], (num, *shape))
    return model, x, model(x).argmax(axis=1)


def test_the_schedule_is_the_papers():
    # Sides that AutoAttack prints for CIFAR-10 and ImageNet, in iterations before and after each halving.
    iterations = [0, 10, 11, 50, 51, 200, 201, 500, 501, 1000, 1001, 2000, 2001, 4000, 4001, 6000, 6001, 8000, 8001]
    share, side = schedule(iterations, 32, 32)
    np.testing.assert_allclose(share, 0.8 / 2.0 ** np.array([0, 0, *np.repeat(np.arange(1, 9), 2), 9]))
    np.testing.assert_array_equal(side[::2], [29, 20, 14, 10, 7, 5, 4, 3, 2, 1])
    np.testing.assert_array_equal(schedule(iterations, 224, 224)[1][::2], [200, 142, 100, 71, 50, 35, 25, 18, 13, 9])
    assert schedule(0, 4, 4, p_init=1e-4)[1] == 1
    assert schedule(0, 3, 50)[1] == 3
    np.testing.assert_array_equal(schedule([0, 11, 60], 1, 100)[1], [80, 40, 20])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_last_row_and_column_can_be_spared(norm):
    # Only the last row and column matter: the first perturbation has random signs there, squares set them right.
    def model(x):
        rise = (x[:, -1].sum(axis=(1, 2)) + x[:, :, -1].sum(axis=(1, 2))) / 8
        return jnp.stack([0.0 * rise, rise - 9.0], axis=1)

    x, labels, losses_found = jnp.full((8, 6, 6, 1), 0.5), jnp.zeros(8, int), []
    for num_steps, spare_last in ((1, True), (60, True), (60, False)):
        found = attacks.square(
            jax.random.key(0), model, x, labels, ball=Ball(norm, EPS[norm]), num_steps=num_steps, p_init=0.1,
            spare_last=spare_last,
        )
        losses_found.append(np.asarray(found.loss))
    if norm == "linf":
        np.testing.assert_array_equal(losses_found[0], losses_found[1])
    assert (losses_found[2] > losses_found[1] + 1e-4).all()


def test_sides_of_l2_are_odd_and_at_least_three():
    np.testing.assert_array_equal(schedule([0, 11, 9000], 32, 32, norm="l2")[1], [29, 21, 3])
    assert schedule(0, 4, 4, norm="l2")[1] == 4
    assert schedule(9000, 2, 2, norm="l1")[1] == 2


@pytest.mark.parametrize(("side", "spared", "num_places"), [(3, 0, (3, 4)), (3, 1, (2, 3)), (5, 1, (1, 1))])
def test_squares_reach_every_place_and_no_further(side, spared, num_places):
    # With one row and column spared the places are those of AutoAttack's code, 0 where a square has no other.
    keys, numbers = jax.random.split(jax.random.key(0), 300), (jnp.asarray(side), jnp.asarray(spared))
    drawn = np.asarray(jax.vmap(lambda key: _signed_square(key, (5, 6, 2), *numbers, jnp.float32))(keys))
    covered = drawn != 0
    assert (covered.sum(axis=(1, 2)) == side**2).all()
    places = {(rows.min(), columns.min()) for rows, columns, _ in (np.nonzero(mask) for mask in covered)}
    assert places == {(row, column) for row in range(num_places[0]) for column in range(num_places[1])}
    assert {tuple(np.unique(image)) for image in drawn} >= {(-1.0, 0.0, 1.0), (0.0, 1.0), (-1.0, 0.0)}


@pytest.mark.parametrize(("norm", "power"), [("l2", 2), ("l1", 4)])
@pytest.mark.parametrize("side", [2, 3, 5, 8])
def test_patterns_are_sums_of_nested_squares(norm, power, side):
    # The released code adds squares of growing sides to each half, as here.
    def pyramid(height, width):
        total = np.zeros((height, width))
        row, column = height // 2, width // 2
        for r in range(max(row, column) + 1):
            total[max(row - r, 0):row + r + 1, max(column - r, 0):column + r + 1] += 1.0 / (r + 1) ** power
        return total / np.linalg.norm(total.ravel(), int(norm[1]))

    expected = np.concatenate([pyramid(side // 2, side), -pyramid(side - side // 2, side)])
    expected /= np.linalg.norm(expected.ravel(), int(norm[1]))
    rows, columns = jnp.arange(9)[:, None] - 1, jnp.arange(10)[None, :] - 2
    draw = jax.jit(lambda key, side: _pattern(key, rows, columns, side, side, norm, jnp.float32))
    found = [np.asarray(draw(key, jnp.asarray(side))) for key in jax.random.split(jax.random.key(0), 12)]
    turned = 0
    for image in found:
        inside = image[1:1 + side, 2:2 + side]
        assert np.abs(image).sum() == pytest.approx(np.abs(inside).sum())
        is_turned = np.abs(inside - expected).max() > 1e-5
        np.testing.assert_allclose(inside, expected.T if is_turned else expected, atol=1e-5)
        turned += is_turned
    assert 0 < turned < 12


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_moving_mass_keeps_the_size_and_the_rest(norm):
    delta = _tiles(jax.random.key(1), (11, 11, 3), jnp.float32, norm)
    assert (delta != 0).mean() > 0.5
    delta /= norms.norm(delta[None], norm)[:, None, None]
    moved = _move_mass(jax.random.key(2), delta, jnp.asarray(3), jnp.asarray(0), norm)
    changed = np.asarray((moved != delta).any(axis=2))
    assert 9 <= changed.sum() <= 18
    if norm == "l2":
        # What the windows had is what the first one gets; nothing is unspent.
        np.testing.assert_allclose(norms.l2(moved[None]), 1.0, rtol=1e-5)
    half = _move_mass(jax.random.key(2), 0.5 * delta, jnp.asarray(3), jnp.asarray(0), norm)
    assert norms.norm(half[None], norm)[0] > 0.99


def _logits_and_input(model, x):
    return model(x), x


def _leaves(norm, output, labels, x, eps):
    # A success would end the search: nowhere may a query leave ball or box.
    return ~Ball(norm, eps).contains(output[1], x)


@pytest.mark.parametrize(("norm", "shape"), [
    ("linf", (7, 7, 2)), ("l2", (7, 7, 2)), ("l1", (7, 7, 2)), ("linf", (30,)), ("l2", (30,)), ("l2", (2, 2)),
    ("l1", (1, 1, 1)),
])
def test_each_query_is_in_ball_and_box_and_no_loss_is_lost(norm, shape):
    model, x, labels = _problem(shape)
    eps = jnp.linspace(0.0, 2.0 * EPS[norm], len(x))
    goal = goals.Goal(Partial(lambda z, y, *_: losses.margin(z[0], y)), Partial(partial(_leaves, norm)), (x, eps))
    result = attacks.square(
        jax.random.key(0), Partial(_logits_and_input, model), x, labels, ball=Ball(norm, eps), goal=goal, num_steps=40,
        loop=driver.Loop("host", trace=True),
    )
    assert not result.success.any()
    np.testing.assert_array_equal(result.forwards, 42)
    np.testing.assert_allclose(result.loss, losses.margin(model(result.x_adv), labels), rtol=1e-4, atol=1e-5)
    assert (np.diff(result.trace.loss, axis=0) >= 0).all()
    assert (result.trace.loss[-1] > result.trace.loss[0])[1:].any() or shape == (1, 1, 1)
    np.testing.assert_array_equal(result.x_adv[0], x[0])


def test_the_first_queries_of_linf_are_stripes_then_one_square():
    model, x, labels = _problem((8, 8, 2))
    x = 0.5 * x + 0.25
    seen = []

    def watched(x):
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), x)
        return model(x)

    attacks.square(
        jax.random.key(0), watched, x, labels, ball=Ball("linf", 0.1), num_steps=1, loop=driver.Loop("host", stop=False)
    )
    jax.effects_barrier()
    stripes, changed = seen[1] - x, seen[2] - seen[1]
    np.testing.assert_allclose(np.abs(stripes), 0.1, rtol=1e-5)
    assert (np.ptp(stripes, axis=1) < 1e-6).all()
    assert len(np.unique(np.sign(stripes[:, 0]).reshape(len(x), -1), axis=0)) > 1
    # The square of 7 x 7 holds one sign for each channel.
    np.testing.assert_allclose(np.abs(seen[2] - x), 0.1, rtol=1e-5)
    assert (np.abs(changed).sum(axis=(1, 2, 3)) > 0).any()


@pytest.mark.parametrize("norm", ["linf", *(pytest.param(norm, marks=pytest.mark.slow) for norm in ("l2", "l1"))])
def test_success_stops_and_the_count_is_that_of_the_queries(norm):
    model, x, labels = _problem(num=12)
    labels = labels.at[0].set((labels[0] + 1) % 3)
    options = {"ball": Ball(norm, EPS[norm]), "num_steps": 120, "loop": driver.Loop(trace=True)}
    result = attacks.square(jax.random.key(0), model, x, labels, **options)
    assert result.forwards[0] == 1
    assert result.success.sum() >= 6
    assert (result.forwards[~result.success] == 122).all()
    for i in np.flatnonzero(result.success)[1:]:
        # Cost: the clean input, the start, and the steps until the first success.
        first = int(np.flatnonzero(result.trace.success[:, i])[0])
        at_start = result.forwards[i] == 2
        assert at_start or result.forwards[i] == 3 + first
    assert result.gradients.sum() == 0
    on = attacks.square(jax.random.key(0), model, x, labels, **options | {"loop": driver.Loop(stop=False)})
    assert (on.forwards == 122).all()
    np.testing.assert_array_equal(on.success, result.success)
    assert (on.loss >= result.loss).all()
    assert (on.loss > result.loss).any()


def test_restarts_and_a_rescaled_schedule():
    model, x, labels = _problem(num=12)
    run = lambda **options: attacks.square(
        jax.random.key(0), model, x, labels, ball=Ball("linf", 0.02), num_steps=20,
        loop=driver.Loop("host", stop=False), **options,
    )
    one, three, rescaled = run(), run(num_restarts=3), run(rescale_schedule=True)
    assert (three.loss >= one.loss).all()
    assert (three.forwards == 1 + 3 * 21).all()
    assert (rescaled.loss != one.loss).any()


def test_a_start_worse_than_the_clean_input_is_where_the_search_begins():
    # The loss falls away from x on both sides, so the start and each step are worse than x; the search still moves.
    goal = goals.Goal(Partial(lambda z, y: -jnp.abs(z).sum(axis=1)), Partial(lambda z, y: z[:, 0] > 9.0))
    x = jnp.full((1, 4, 4, 1), 0.5)
    seen = []

    def model(v):
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), v)
        return v.reshape(1, -1) - 0.5

    result = attacks.square(
        jax.random.key(0), model, x, jnp.zeros(1, int), ball=Ball("linf", 0.1), goal=goal, num_steps=4,
        loop=driver.Loop("host"),
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(result.x_adv, x)
    assert all(np.abs(point - 0.5).min() > 0.09 for point in seen[1:])


def test_unusable_settings_name_the_cure():
    model, x, labels = _problem()
    with pytest.raises(ValueError, match="p_init="):
        attacks.square(jax.random.key(0), model, x, labels, ball=Ball("linf", 0.1), p_init=1.5)
    with pytest.raises(ValueError, match="vectors"):
        attacks.square(jax.random.key(0), model, x[:, None], labels, ball=Ball("linf", 0.1))
