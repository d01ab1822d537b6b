"""The driver's loop, with an attack that counts: early stop, traces, budgets, resumption, the best so far."""

import dataclasses
import io
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks
from rdx.attacks import base, driver
from rdx.balls import Ball
from rdx.goals import Goal


class _Context(NamedTuple):
    problem: base.Problem
    gain: jax.Array


class _State(NamedTuple):
    point: jax.Array
    trail: jax.Array
    found: base.Found


def _init(context, keys, found):
    x = context.problem.x
    return _State(x + 0.01 * jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:]))(keys), _trail(x), found)


def _trail(x):
    return jnp.full((len(x), 10), -1)


def _step(context, state, i):
    point = state.point + context.gain
    seen = base.evaluate(context.problem, point)
    return _State(point, state.trail.at[:, i].set(i), base.spend(state.found, seen, forwards=1))


METHOD = driver.Method(_init, _step)


def _sum(x):
    return x.sum(axis=1, keepdims=True)


def _over(threshold):
    data = (jnp.asarray(threshold, jnp.float32),)
    return Goal(Partial(lambda z, y, t: z[:, 0] - t), Partial(lambda z, y, t: z[:, 0] > t), data)


_SUM = Partial(_sum)


def _mean(x):
    return x.mean(axis=1, keepdims=True)


def _climb(
    x, threshold, loop=driver.AUTO, *, gain=1.0, num_steps=7, num_restarts=1, stops=True, model=_SUM,
    norm="linf",
):
    x = jnp.asarray(x, jnp.float32)
    ball = Ball(norm, 100.0, -jnp.inf, jnp.inf)
    problem, found = base.begin(model, x, jnp.zeros(len(x), int), ball, _over(threshold))
    return driver.run(
        METHOD, _Context(problem, jnp.asarray(gain)), base.example_keys(jax.random.key(0), x), found,
        num_steps=num_steps, num_restarts=num_restarts, stops=stops, loop=loop,
    )


LOOPS = tuple(attacks.Loop(kind, chunk=3) for kind in ("auto", "host", "compiled"))
# Where nothing is traced "auto" is "host" on CPUs.
BOTH = LOOPS[1:]
X = np.zeros((20, 1), np.float32)
# Example i is done after step i; those beyond the seventh never are.
THRESHOLD = np.arange(20) + 0.5


@pytest.mark.parametrize("loop", BOTH)
def test_examples_stop_when_they_are_done_and_pay_until_then(loop):
    found, trace = _climb(X, THRESHOLD, loop)
    np.testing.assert_array_equal(found.forwards, 1 + np.minimum(np.arange(20) + 1, 7))
    np.testing.assert_array_equal(found.best.success, np.arange(20) < 7)
    np.testing.assert_allclose(found.best.x[:, 0], np.minimum(np.arange(20) + 1, 7), atol=0.02)
    assert trace is None


@pytest.mark.parametrize("loop", BOTH)
def test_nothing_stops_that_shall_not(loop):
    found, _ = _climb(X, THRESHOLD, dataclasses.replace(loop, stop=False))
    np.testing.assert_array_equal(found.forwards, 8)
    np.testing.assert_allclose(found.best.x[:, 0], 7, atol=0.02)


@pytest.mark.parametrize("loop", LOOPS)
def test_every_step_runs_once_in_order_under_jit_vmap_and_grad(loop):
    def total(gain):
        return _climb(X, THRESHOLD, loop, gain=gain, stops=False, num_steps=5)[0].best.loss.sum()

    expected = 20 * 5 * 2.0 - THRESHOLD.sum()
    np.testing.assert_allclose([total(2.0), jax.jit(total)(2.0)], expected, atol=0.3)
    np.testing.assert_allclose(jax.vmap(total)(jnp.arange(1.0, 3.0)), [expected - 100, expected], atol=0.3)
    for gradient in (jax.grad(total), jax.jit(jax.grad(total))):
        assert gradient(1.0) == 100.0


@pytest.mark.parametrize("loop", LOOPS)
def test_the_trace_tells_the_course_of_every_example(loop):
    loop = dataclasses.replace(loop, trace=True)
    found, trace = _climb(X, THRESHOLD, loop, num_restarts=2)
    steps = np.arange(1, 8)[:, None]
    np.testing.assert_array_equal(trace.success[:7], steps > np.arange(20)[None])
    np.testing.assert_array_equal(trace.forwards[:7], 1 + np.minimum(steps, np.arange(20)[None] + 1))
    np.testing.assert_allclose(trace.distance[:7], np.minimum(steps, np.arange(20)[None] + 1), atol=0.02)
    np.testing.assert_array_equal(trace.forwards[-1], found.forwards)
    np.testing.assert_array_equal(found.forwards[7:], 15)
    np.testing.assert_array_equal(trace.loss[-1], found.best.loss)
    traced = jax.jit(lambda x: _climb(x, THRESHOLD, loop, num_restarts=2)[1])(X)
    for a, b in zip(trace, traced, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("loop", BOTH)
def test_budgets_end_before_a_step(loop):
    found, _ = _climb(X, THRESHOLD, dataclasses.replace(loop, max_queries=4), num_restarts=2)
    np.testing.assert_array_equal(found.forwards, np.minimum(2 + np.arange(20), 4))


@pytest.mark.parametrize("loop", BOTH)
def test_progress_tells_who_is_still_running(loop):
    seen = []
    loop = dataclasses.replace(loop, progress=lambda *numbers: seen.append(numbers))
    _climb(X, THRESHOLD, loop, num_restarts=2)
    assert [numbers[:2] for numbers in seen] == [(3, 14), (6, 14), (7, 14), (10, 14), (13, 14), (14, 14)]
    assert [numbers[2] for numbers in seen] == [17, 14, 13, 13, 13, 13]
    quiet = _climb(X, THRESHOLD, dataclasses.replace(loop, progress=None), num_restarts=2)[0]
    found = _climb(X, THRESHOLD, loop, num_restarts=2)[0]
    for a, b in zip(jax.tree.leaves(quiet), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)


class _Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("progress", "is_shown"), [(True, True), (False, False), (None, False)])
def test_a_bar_is_shown_on_request(progress, is_shown, monkeypatch):
    screen = _Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    _climb(X, THRESHOLD, attacks.Loop(chunk=3, progress=progress), num_restarts=2)
    for word in ("test_driver", "14/14", "13 running", "steps/s"):
        assert (word in screen.getvalue()) == is_shown


def test_arrays_have_few_sizes_and_few_fillers():
    numbers = np.arange(1, 1025)
    sizes = np.array([driver.size_for(num) for num in range(1, 1025)])
    assert (sizes >= numbers).all()
    assert len(np.unique(sizes)) == 3 + 4 * 5  # up to 32, then in every octave
    assert ((sizes - numbers) / sizes)[numbers > 32].max() < 0.2


def test_everything_done_ends_the_run():
    seen = []
    _climb(X[:5], THRESHOLD[:5], attacks.Loop(chunk=2, progress=lambda *numbers: seen.append(numbers)), num_restarts=9)
    assert [numbers[0] for numbers in seen] == [2, 4, 6]
    assert seen[-1][2] == 0


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("loop", BOTH)
@pytest.mark.parametrize("after", [1, 2, 5])
def test_an_interrupted_run_goes_on(loop, after, tmp_path):
    loop = dataclasses.replace(loop, trace=True, checkpoint=tmp_path / "state.npz")
    expected = _climb(X, THRESHOLD, dataclasses.replace(loop, checkpoint=None), num_restarts=2)
    calls = []

    def kill(*numbers):
        calls.append(numbers)
        if len(calls) == after + 1:
            raise _KilledError

    with pytest.raises(_KilledError):
        _climb(X, THRESHOLD, dataclasses.replace(loop, progress=kill), num_restarts=2)
    seen = []
    found = _climb(X, THRESHOLD, dataclasses.replace(loop, progress=lambda *n: seen.append(n)), num_restarts=2)
    assert seen[0] == calls[after]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    loop = attacks.Loop(chunk=3, checkpoint=tmp_path / "state.npz")

    def kill(*numbers):
        if numbers[0] > 3:
            raise _KilledError

    with pytest.raises(_KilledError):
        _climb(X, THRESHOLD, dataclasses.replace(loop, progress=kill))
    for others in (
        {"x": X + 1}, {"threshold": THRESHOLD + 1}, {"num_steps": 8}, {"gain": 2.0}, {"model": Partial(_mean)},
        {"norm": "l2"},
    ):
        with pytest.raises(ValueError, match="delete it or name another file"):
            _climb(**{"x": X, "threshold": THRESHOLD} | others, loop=loop)


def test_the_callers_arrays_survive():
    x = jnp.asarray(X)
    _climb(x, THRESHOLD)
    np.testing.assert_array_equal(x, X)


def test_unknown_loops_are_named():
    with pytest.raises(ValueError, match=r"'fast'.*'compiled'"):
        _climb(X, THRESHOLD, attacks.Loop("fast"))
    with pytest.raises(ValueError, match="at least 1"):
        _climb(X, THRESHOLD, attacks.Loop(chunk=0))


def test_many_points_of_each_example_are_evaluated_together():
    goal, ball = _over([0.5, 1.5, 2.5]), Ball("l2", 1.0)
    problem, _ = base.begin(Partial(_sum), jnp.asarray(X[:3]), jnp.zeros(3, int), ball, goal)
    points = jnp.arange(12.0).reshape(3, 4, 1)
    success, loss = base.evaluate_many(problem, points)
    np.testing.assert_allclose(loss, points[:, :, 0] - jnp.array([[0.5], [1.5], [2.5]]))
    np.testing.assert_array_equal(success, loss > 0)
    success = jnp.array([[False] * 4, [False, True, True, False], [True] * 4])
    loss = jnp.array([[-3.0, jnp.nan, -1.0, -2.0], [9.0, 1.0, 2.0, 9.0], [jnp.nan, -jnp.inf, 3.0, 2.0]])
    best = base.strongest(points, success, loss)
    np.testing.assert_array_equal(best.x[:, 0], [2.0, 6.0, 10.0])
    np.testing.assert_array_equal(best.success, [False, True, True])


def test_nearer_orders_by_success_then_distance():
    problem, _ = base.begin(Partial(_sum), jnp.zeros((4, 1)), jnp.zeros(4, int), Ball("l2", 1.0), _over([0.5] * 4))
    old = base.Candidate(jnp.full((4, 1), 0.5), jnp.array([True, False, False, True]), jnp.zeros(4))
    new = base.Candidate(jnp.array([[0.2], [0.9], [0.1], [0.5]]), jnp.array([True, True, False, True]), jnp.ones(4))
    kept = base.nearer(problem, old, new)
    np.testing.assert_allclose(kept.x[:, 0], [0.2, 0.9, 0.5, 0.5])
    np.testing.assert_array_equal(kept.loss, [1, 1, 0, 0])
