"""NATTACK: learning a distribution of adversarial examples (Li et al. 2019, arXiv:1905.00441)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdx import goals, losses
from rdx.attacks import base, driver, estimate
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn

# Where in [-1, 1] the box ends: its true ends lie at infinity behind arctanh.
_END = 1.0 - 1e-6
# Standard deviation of the first mean.
_FIRST_DEVIATION = 1e-3


class _Context(NamedTuple):
    problem: base.Problem
    samples: Array  # [num_samples]: their numbers
    sigma: Array
    rate: Array


class _State(NamedTuple):
    keys: Key
    mean: Array  # of the distribution, behind arctanh, relative to the clean input
    found: base.Found


def nattack(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_steps: int = 200, num_samples: int = 100, sigma: ArrayLike = 0.1,
    step_size: ArrayLike = 0.02, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Shifts the mean of a Gaussian behind `tanh` until its samples, brought into the ball, reach the goal.

    `x_i = P(g(arctanh(x) + mu + sigma z_i))` for normal `z_i`, with `g` from the real line onto the box and `P` onto
    the ball; then `mu += s / sigma * mean_i(A_i z_i)`, `A_i = (loss_i - mean) / (std + 1e-7)`.

    Source: Li et al. (2019, arXiv:1905.00441, Algorithm 1, Eqs. 4-8); defaults as in RealSafe (Dong et al. 2020,
    arXiv:1912.11852). All samples are candidates, as in the paper, and so is the one at the mean, as in RealSafe's
    code, which looks at no other. The l2 projection is exact, where the codes rescale.

    Args:
        key: one key; example `i` uses it folded with `index[i]`.
        logits_fn: `x [B, ...] -> logits [B, K]`; it sees `B * (num_samples + 1)` points at once.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm, in a bounded box.
        goal: what is maximised and what counts as success; `goals.misclassify(losses.margin)` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_steps: iterations.
        num_samples: samples of each, at least 2.
        sigma: standard deviation behind arctanh.
        step_size: rate `s` of the mean.
        loop: see `rdx.attacks.driver.Loop`; examples stop at success by default.

    Returns:
        The attack's result: `2 + num_steps * (num_samples + 1)` forward passes, fewer for examples that stop.

    Raises:
        ValueError: on a single sample, a box without ends, unusable inputs, or NaN logits.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples={num_samples}: losses are compared with their mean, give at least 2.")
    ends = (ball.low, ball.high)
    if not base.is_traced(ends) and not all(np.isfinite(np.asarray(end)).all() for end in ends):
        raise ValueError("nattack searches behind the arctanh of the box: give finite ends low and high.")
    goal = goals.misclassify(losses.margin) if goal is None else goal
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    numbers = (jnp.asarray(value, problem.x.dtype) for value in (sigma, step_size))
    found, trace = driver.run(
        _METHOD, _Context(problem, jnp.arange(num_samples), *numbers), base.example_keys(key, problem.x, index), found,
        num_steps=num_steps, stops=True, loop=loop,
    )
    return base.report(problem, found, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    x, keys = context.problem.x, jax.vmap(jax.random.split)(keys)
    draw = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys[:, 0])
    # Keys are not sharded as the inputs are; sums are.
    return _State(keys[:, 1], (x - x) + _FIRST_DEVIATION * draw, found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem, num = context.problem, len(context.samples)
    draws = estimate.directions(base.fold(state.keys, i), problem, num)
    # The mean itself is the last point.
    draws = jnp.concatenate([draws, 0.0 * draws[:, :1]], axis=1)
    points = _points(problem, state.mean[:, None] + context.sigma * draws)
    success, loss = base.evaluate_many(problem, points)
    found = base.spend(state.found, base.strongest(points, success, loss), forwards=num + 1)
    loss, draws = loss[:, :num], draws[:, :num]
    deviation = loss.std(axis=1, keepdims=True) + 1e-7
    rise = estimate.average((loss - loss.mean(axis=1, keepdims=True)) / deviation, draws)
    return _State(state.keys, state.mean + context.rate / context.sigma * rise, found)


def _finish(context: _Context, state: _State) -> base.Found:
    points = _points(context.problem, state.mean[:, None])
    return base.spend(state.found, base.evaluate(context.problem, points[:, 0]), forwards=1)


def _points(problem: base.Problem, shifts: Array) -> Array:
    """Maps shifts behind arctanh `[B, n, ...]` to points of ball and box."""
    ball, x = problem.ball, problem.x
    low, high = (jnp.asarray(end, x.dtype) for end in (ball.low, ball.high))
    place = jnp.arctanh(_END * (2.0 * (x - low) / (high - low) - 1.0))

    def point(shift: Array) -> Array:
        return ball.project(low + (high - low) * (0.5 * jnp.tanh(place + shift) + 0.5), x)

    return jax.vmap(point, in_axes=1, out_axes=1)(shifts)


_METHOD = driver.Method(_start, _step, _finish)
