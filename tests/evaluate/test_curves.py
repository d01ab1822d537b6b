"""Curves against closed forms on linear models, toy attacks that are not monotone, and counting by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, goals, losses, metrics, norms
from rdx.attacks import Loop
from rdx.balls import Ball
from rdx.evaluate import curves
from rdx.evaluate.curves import Curve
from rdx.types import AttackResult

N = 21
PGD = functools.partial(attacks.pgd, num_steps=20)
FREE = {"low": -jnp.inf, "high": jnp.inf}


def _affine(parameters, x):
    weights, bias = parameters
    return x.reshape(x.shape[0], -1) @ weights + bias[None]


@functools.cache
def _setting():
    """A linear model of two classes; every seventh label is wrong."""
    weights_key, x_key = jax.random.split(jax.random.key(5))
    model = Partial(_affine, (jax.random.normal(weights_key, (9, 2)), jnp.array([0.3, -0.2])))
    x = jax.random.uniform(x_key, (N, 3, 3), minval=0.2, maxval=0.8)
    labels = np.array(model(x).argmax(axis=1))
    labels[::7] = 1 - labels[::7]
    return model, x, labels


def _margins(norm):
    """The distance to the hyperplane: the margin over the dual norm of the weights; 0 where the label is wrong."""
    model, x, labels = _setting()
    weights = model.args[0][0]
    slope = norms.norm((weights[:, 0] - weights[:, 1])[None], norms.dual(norm))[0]
    return np.maximum(0.0, np.asarray(-losses.margin(model(x), labels) / slope))


def _minimal(attack, ball, **options):
    model, x, labels = _setting()
    return curves.minimal_eps(jax.random.key(3), model, x, labels, attack=attack, ball=ball, **options)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("start", [0.001, 1.0])
def test_the_minimal_radius_is_the_margin_over_the_dual_norm(norm, start):
    wanted = _margins(norm)
    curve = _minimal(PGD, Ball(norm, start, **FREE), num_doublings=14)
    assert (curve.threshold >= wanted * (1 - 1e-5)).all()
    # From a random start fixed l2 steps turn towards the optimum only slowly; ten bisections leave a thousandth of the
    # bracket.
    assert (curve.threshold <= (1.04 if norm == "l2" else 1.005) * wanted + 1e-3 * start).all()
    np.testing.assert_array_equal(curve.threshold == 0, np.arange(N) % 7 == 0)
    np.testing.assert_array_equal(curve.is_correct, np.arange(N) % 7 != 0)
    np.testing.assert_array_equal(curve.threshold, curve.details["searched"])
    runs = np.where(curve.is_correct, 24, 0)
    np.testing.assert_array_equal(curve.details["gradients"], 20 * runs)
    np.testing.assert_array_equal(curve.details["forwards"], 2 * runs)


def test_what_never_falls_has_no_radius():
    wanted = _margins("linf")
    reach = 0.02 * 2**3  # three doublings, and the bisections look up to the next
    curve = _minimal(PGD, Ball("linf", 0.02, **FREE), num_doublings=3)
    falls = wanted < reach * (1 - 1e-3)
    assert 3 < falls.sum() < N - 3
    np.testing.assert_array_equal(np.isfinite(curve.threshold), falls)
    assert curve.accuracy()[-1].count == (~falls).sum()


def test_bisection_goes_on_where_doubling_ends_early():
    # 3 + 4 runs: whoever falls at once halves six times, whoever falls last four times.
    seen = []

    def attack(key, logits_fn, x, labels, *, ball, index):
        seen.append(np.asarray(ball.eps))
        return attacks.pgd(key, logits_fn, x, labels, ball=ball, index=index, num_steps=1, random_start=False,
                           step_size=ball.eps)

    curve = _minimal(attack, Ball("linf", 0.05, **FREE), num_doublings=3, num_bisections=4)
    wanted, eps = _margins("linf")[curve.is_correct], np.stack(seen)[:, : curve.is_correct.sum()]
    assert eps.shape[0] == 7
    at_once = wanted < 0.05
    np.testing.assert_allclose(eps[0], 0.05)
    np.testing.assert_allclose(eps[1], np.where(at_once, 0.025, 0.1))
    assert (np.abs(eps[-1] - wanted)[at_once] <= 0.05 / 2**6 * 1.01).all()
    late = (wanted > 0.1) & (wanted < 0.2)
    assert late.any()
    assert (np.abs(eps[-1] - wanted)[late] <= 0.1 / 2**4 * 1.01).all()


def test_fgsm_takes_no_key_and_meets_the_closed_form():
    curve = _minimal(attacks.fgsm, Ball("linf", 0.1, **FREE))
    np.testing.assert_allclose(curve.threshold, _margins("linf"), rtol=1e-2, atol=1e-4)


def _oversteps(key, logits_fn, x, labels, *, ball, index):
    """Succeeds between 0.05 and 0.1 and from 0.4 on, by moving the first pixel of `_fragile`."""
    x_adv = x.at[:, 0, 0].add(ball.radius(x)[:, 0, 0])
    counts = jnp.ones(len(x), jnp.int32)
    return AttackResult(x_adv, jnp.zeros(len(x), bool), ball.distance(x_adv, x), jnp.zeros(len(x)), counts, counts)


def _fragile(x):
    moved = x[:, 0, 0]
    falls = ((moved > 0.05) & (moved < 0.1)) | (moved > 0.4)
    return jnp.stack([jnp.where(falls, -1.0, 1.0), jnp.zeros(len(x))], axis=1)


def test_the_grid_finds_what_bisection_misses():
    x, labels, ball = jnp.zeros((5, 2, 2)), jnp.zeros(5, jnp.int32), Ball("linf", 0.2)
    options = {"attack": _oversteps, "ball": ball, "num_bisections": 12}
    blind = curves.minimal_eps(jax.random.key(0), _fragile, x, labels, **options)
    np.testing.assert_allclose(blind.threshold, 0.4, atol=1e-3)
    seeing = curves.minimal_eps(jax.random.key(0), _fragile, x, labels, **options, grid=(0.02, 0.07, 0.3, 0.5))
    np.testing.assert_allclose(seeing.threshold, 0.07, rtol=1e-6)
    np.testing.assert_allclose(seeing.details["searched"], blind.threshold)
    np.testing.assert_allclose(seeing.details["on_grid"], 0.07, rtol=1e-6)
    assert not seeing.details["is_monotone"].any()
    np.testing.assert_array_equal(seeing.details["grid_success"][0], [False, True, False, True])
    assert [rate.value for rate in seeing.accuracy()] == [1.0, 0.0, 0.0, 0.0]
    assert _minimal(PGD, Ball("linf", 0.1), grid=(0.05, 0.1, 0.2, 0.3)).details["is_monotone"].all()


def test_a_success_on_the_grid_counts_at_its_own_radius():
    # In float32 the length of x + 0.1 - x may be above 0.1.
    curve = _minimal(PGD, Ball("linf", 0.1), grid=(0.05, 0.1, 0.2))
    wanted = _margins("linf")
    for rate, eps in zip(curve.accuracy(), (0.05, 0.1, 0.2), strict=True):
        assert rate.count == (wanted > eps).sum()
    for i in range(3):
        assert (curve.threshold[curve.details["grid_success"][:, i]] <= curve.values[i]).all()


@pytest.mark.parametrize("batch_size", [4, 64])
def test_nothing_depends_on_the_batch(batch_size):
    model, x, labels = _setting()
    wavy = Partial(_wavy, model.args[0])
    options = {"attack": functools.partial(attacks.pgd, num_steps=4), "grid": (0.1, 0.3), "index": 100 + np.arange(N)}
    wanted, found = (
        curves.minimal_eps(jax.random.key(1), wavy, x, labels, ball=Ball("linf", 0.1), batch_size=size, **options)
        for size in (16, batch_size)
    )
    assert np.unique(wanted.threshold).size > 1
    np.testing.assert_allclose(found.threshold, wanted.threshold, rtol=1e-4, atol=1e-6)
    for name in ("grid_success", "is_monotone", "forwards", "gradients"):
        np.testing.assert_array_equal(found.details[name], wanted.details[name], err_msg=name)
    np.testing.assert_array_equal(found.index, 100 + np.arange(N))
    traced = functools.partial(attacks.pgd, num_steps=4, loop=Loop(trace=True))
    wanted, found = (
        curves.against_strength(jax.random.key(1), wavy, x, labels, ball=Ball("linf", 0.1), attack=traced,
                                batch_size=size) for size in (16, batch_size)
    )
    np.testing.assert_array_equal(found.threshold, wanted.threshold)
    assert np.unique(wanted.threshold).size > 1


def _wavy(parameters, x):
    return jnp.sin(6.0 * _affine(parameters, x)) + _affine(parameters, x)


def _nearest(key, logits_fn, x, labels, *, ball, index):
    """The exact minimal-norm attack on the linear model, in l2."""
    weights = logits_fn.args[0][0]
    w = weights[:, 0] - weights[:, 1]
    logits = logits_fn(x)
    gap = (logits[:, 0] - logits[:, 1]) / (w @ w)
    x_adv = x - (1.001 * gap[:, None] * w[None]).reshape(x.shape)
    kept = norms.expand(ball.contains(x_adv, x), x)
    x_adv = jnp.where(kept, x_adv, x)
    counts = jnp.ones(len(x), jnp.int32)
    return AttackResult(x_adv, kept[:, 0, 0], ball.distance(x_adv, x), jnp.zeros(len(x)), counts, 2 * counts)


def test_minimal_norm_attacks_give_their_distances():
    model, x, labels = _setting()
    wanted = _margins("l2")
    cap = float(np.median(wanted))
    free, capped = (
        curves.against_strength(jax.random.key(0), model, x, labels, attack=_nearest, ball=Ball("l2", eps, **FREE),
                                within=cap) for eps in (jnp.inf, cap)
    )
    curve = curves.against_eps(free)
    np.testing.assert_allclose(curve.threshold, 1.001 * wanted, rtol=1e-4)
    assert curve.median() == np.sort(curve.threshold)[N // 2]
    assert curve.accuracy()[-1].count == 0
    near = curve.threshold <= cap
    assert 0 < (~near).sum() < N
    for found in (free, capped):
        # One forward pass and two gradients, all in one step.
        np.testing.assert_array_equal(found.threshold, np.where(near, np.where(found.is_correct, 3, 0), np.inf))
    assert np.isinf(capped.details["distance"][~near]).all()
    np.testing.assert_allclose(capped.details["distance"][near], curve.threshold[near], rtol=1e-5)
    np.testing.assert_array_equal(curve.details["gradients"], np.where(free.is_correct, 2, 0))


def test_strength_is_what_the_trace_says_and_the_end_adds():
    """PGD without a random start on one pixel: step k of 0.1 sees 0.1 (k - 1), and the end sees what the last made."""
    x, labels = jnp.zeros((4, 1)), jnp.zeros(4, jnp.int32)
    edges = jnp.array([0.05, 0.25, 0.45, 9.0])

    def model(v):
        # The k-th example's own edge, by its place in the batch of four.
        return jnp.concatenate([edges[:, None] - v, jnp.zeros((4, 1))], axis=1)

    attack = functools.partial(attacks.pgd, num_steps=5, step_size=0.1, random_start=False, loop=Loop(trace=True))
    options = {"attack": attack, "ball": Ball("linf", 0.5), "batch_size": 4}
    curve = curves.against_strength(jax.random.key(0), model, x, labels, **options)
    # 1 forward pass for the clean input, then a gradient a step; the end is the fifth step's: one forward pass more.
    np.testing.assert_array_equal(curve.threshold, [1 + 2, 1 + 4, 1 + 5 + 1, np.inf])
    np.testing.assert_array_equal(curve.details["steps"], [2, 4, 5, np.inf])
    np.testing.assert_allclose(curve.details["distance"], [0.5, 0.5, 0.5, np.inf], rtol=1e-5)
    assert curve.values[-1] == 7
    steps = curves.against_strength(jax.random.key(0), model, x, labels, axis="steps", values=(1, 2, 3, 4, 5),
                                    **options)
    assert [rate.count for rate in steps.accuracy()] == [4, 3, 3, 2, 1]
    untraced = functools.partial(attack, loop=attacks.Loop())
    ends = curves.against_strength(jax.random.key(0), model, x, labels, **{**options, "attack": untraced})
    np.testing.assert_array_equal(ends.threshold, [7, 7, 7, np.inf])
    np.testing.assert_array_equal(ends.details["steps"], [1, 1, 1, np.inf])


def test_a_success_beyond_the_radius_is_none():
    """A minimal-norm attack comes nearer with each step; before 0.3 it is not within the radius."""
    lengths = jnp.array([0.9, 0.5, 0.3, 0.2])

    def attack(key, logits_fn, x, labels, *, ball, index):
        ones = jnp.ones((4, len(x)))
        counts = jnp.arange(1, 5, dtype=jnp.int32)[:, None] * jnp.ones(len(x), jnp.int32)[None]
        trace = attacks.base.Trace(ones > 0, ones, lengths[:, None] * ones, counts, 0 * counts)
        return AttackResult(x + 0.2, ones[0] > 0, 0.2 * ones[0], ones[0], counts[-1], 0 * counts[-1], trace)

    model, x, labels = lambda v: jnp.stack([0.1 - v[:, 0], 0 * v[:, 0]], axis=1), jnp.zeros((2, 1)), jnp.zeros(2, int)
    for eps, within, queries in ((0.3, None, 3), (jnp.inf, 0.3, 3), (jnp.inf, 0.6, 2), (jnp.inf, 0.1, np.inf)):
        curve = curves.against_strength(jax.random.key(0), model, x, labels, attack=attack, ball=Ball("linf", eps),
                                        within=within)
        np.testing.assert_array_equal(curve.threshold, [queries, queries])
        np.testing.assert_allclose(curves.against_eps(curve).threshold, 0.2, rtol=1e-6)


def test_success_is_judged_by_a_fresh_forward_pass():
    def boast(key, logits_fn, x, labels, *, ball, index):
        counts = jnp.ones(len(x), jnp.int32)
        return AttackResult(x, jnp.ones(len(x), bool), jnp.zeros(len(x)), jnp.zeros(len(x)), counts, counts)

    model, x, labels = _setting()
    for curve in (_minimal(boast, Ball("linf", 0.1)), curves.against_strength(
        jax.random.key(0), model, x, labels, attack=boast, ball=Ball("linf", 0.1)
    )):
        np.testing.assert_array_equal(np.isfinite(curve.threshold), ~curve.is_correct)

    def stray(*args, ball, **options):
        return boast(*args, ball=ball, **options)._replace(x_adv=jnp.clip(args[2] + 1.1 * ball.radius(args[2]), 0, 1))

    with pytest.raises(ValueError, match="'stray' left the ball"):
        _minimal(stray, Ball("linf", 0.1))


def test_targeted_success_is_counted_over_all():
    labels = _setting()[2]
    targets = jnp.asarray(1 - labels)
    curve = _minimal(PGD, Ball("linf", 0.1, **FREE), goal=goals.target(targets), is_targeted=True, batch_size=8)
    untargeted = _minimal(PGD, Ball("linf", 0.1, **FREE), batch_size=8)
    # With two classes the target is the other one: the same thresholds, counted differently.
    np.testing.assert_allclose(curve.threshold, untargeted.threshold, rtol=0.02, atol=1e-4)
    assert {rate.total for rate in curve.success_rate()} == {N}
    assert {rate.total for rate in untargeted.success_rate()} == {int(curve.is_correct.sum())}


def _curve(**changes):
    fields = {
        "axis": "eps", "values": np.array([0.0, 0.1, 0.2]), "threshold": np.array([0.0, 0.1, 0.15, np.inf]),
        "is_correct": np.array([False, True, True, True]), "index": np.arange(4, dtype=np.int32),
        "label": np.array([0, 1, 2, 0]), "details": {"searched": np.arange(4.0)},
    }
    return Curve(**(fields | changes))


def test_rates_count_by_hand():
    curve = _curve()
    assert [rate.count for rate in curve.accuracy()] == [3, 2, 1]
    assert [(rate.count, rate.total) for rate in curve.success_rate()] == [(0, 3), (1, 3), (2, 3)]
    assert (curve.accuracy()[1].low, curve.accuracy()[1].high) == metrics.wilson(2, 4)
    assert curve.median() == 0.1
    targeted = _curve(is_targeted=True, threshold=np.array([0.1, 0.1, np.inf, np.inf]))
    # The first one is wrong from the start and counts as a success at 0.1 all the same.
    assert [(rate.count, rate.total) for rate in targeted.success_rate()] == [(0, 4), (2, 4), (2, 4)]
    assert [rate.count for rate in targeted.accuracy()] == [3, 2, 2]


def test_the_worst_case_is_the_first_to_fall():
    other = _curve(threshold=np.array([0.0, 0.3, 0.05, 0.2]))
    worst = curves.worst_case([_curve(), other])
    np.testing.assert_array_equal(worst.threshold, [0.0, 0.1, 0.05, 0.2])
    assert [rate.count for rate in worst.accuracy()] == [3, 1, 0]
    for changes in ({"axis": "queries"}, {"index": np.arange(1, 5, dtype=np.int32)}, {"is_targeted": True}):
        with pytest.raises(ValueError, match="same examples"):
            curves.worst_case([_curve(), _curve(**changes)])
    with pytest.raises(ValueError, match="at least one"):
        curves.worst_case([])


def test_what_is_written_is_read(tmp_path):
    curve = _curve()
    assert curves.read(tmp_path, "attack") is None
    curves.write(tmp_path, "attack", {"seed": 3}, curve)
    record, again = curves.read(tmp_path, "attack")
    for field in dataclasses.fields(Curve):
        if field.name != "details":
            np.testing.assert_array_equal(getattr(again, field.name), getattr(curve, field.name))
    np.testing.assert_array_equal(again.details["searched"], curve.details["searched"])
    assert record["seed"] == 3
    assert [rate["count"] for rate in record["curve"]["accuracy"]] == [3, 2, 1]
    assert record["curve"]["median"] == 0.1
    assert record["environment"]["versions"]
    assert {path.name for path in tmp_path.iterdir()} == {"attack.json", "attack.npz"}


@pytest.mark.parametrize(("changes", "message"), [
    ({"ball": Ball("linf", 0.0)}, "positive radius"), ({"ball": Ball("linf", jnp.full(N, 0.1))}, "give a scalar"),
    ({"grid": (0.2, 0.1)}, "increasing"), ({"num_doublings": 0}, "at least 1"),
])
def test_unusable_settings_are_refused_before_any_work(changes, message):
    def never(*args, **options):
        raise AssertionError("work began")

    with pytest.raises(ValueError, match=message):
        _minimal(never, **{"ball": Ball("linf", 0.1), **changes})
    model, x, labels = _setting()
    with pytest.raises(ValueError, match="'queries' or 'steps'"):
        curves.against_strength(jax.random.key(0), model, x, labels, attack=never, ball=Ball("linf", 0.1), axis="eps")


def test_progress_counts_runs():
    seen = []
    _minimal(attacks.fgsm, Ball("linf", 0.1), num_doublings=2, num_bisections=3, grid=(0.1,),
             on_progress=lambda *row: seen.append(row))
    assert seen == [(i, 6) for i in range(1, 7)]
