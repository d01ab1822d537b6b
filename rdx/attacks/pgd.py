"""Projected gradient descent (Madry et al. 2018, arXiv:1706.06083)."""

from typing import NamedTuple

import jax.numpy as jnp

from rdx.attacks import base, driver
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem  # its data is the step size


class _State(NamedTuple):
    point: Array
    found: base.Found


def pgd(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_steps: int = 40, step_size: ArrayLike | None = None, num_restarts: int = 1,
    random_start: bool = True, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs the loss by projected steepest ascent from a random point of the ball.

    `x_{k+1} = P(x_k + s * u(grad loss(x_k)))` with the projection `P` onto ball and box and the steepest direction `u`
    of the ball's norm: the sign for linf, the normalised gradient for l2, the sign on the largest elements that
    the box lets move for l1. The strongest input seen is returned, be it the clean one, an iterate or the last one.

    Source: Madry et al. (2018, arXiv:1706.06083, Sec. 2.1); l1 steps after Tramer & Boneh (2019, arXiv:1904.13000).

    Args:
        key: one key; example `i` uses it folded with `index[i]`, restart `r` folds that with `r`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        goal: what is maximised and what counts as success; `goals.misclassify()` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_steps: steps of each restart.
        step_size: length of a step in the ball's norm, in input units, shaped as `Ball.eps` may be;
            `2.5 * eps / num_steps` by default, with which every point of the ball can be reached.
        num_restarts: number of random starts.
        random_start: whether to start at a random point of the ball or at `x`.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `1 + num_restarts` forward passes, `num_steps * num_restarts` gradients.

    Raises:
        ValueError: on unusable inputs, NaN logits, or restarts without a random start.
    """
    if num_restarts > 1 and not random_start:
        raise ValueError("Restarts from the clean input all repeat the first: use random_start=True or num_restarts=1.")
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    size = 2.5 / num_steps * jnp.asarray(problem.ball.eps) if step_size is None else step_size
    problem = problem._replace(data=base.per_example(size, problem.x))
    found, trace = driver.run(
        _FROM_RANDOM if random_start else _FROM_CLEAN, _Context(problem), base.example_keys(key, problem.x, index),
        found, num_steps=num_steps, num_restarts=num_restarts, loop=loop,
    )
    return base.report(problem, found, trace)


def _start_at_random(context: _Context, keys: Key, found: base.Found) -> _State:
    return _State(context.problem.ball.sample(keys, context.problem.x), found)


def _start_at_clean(context: _Context, keys: Key, found: base.Found) -> _State:
    del keys
    return _State(context.problem.x, found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    del i
    ball, x = context.problem.ball, context.problem.x
    seen, gradient = base.value_and_gradient(context.problem, state.point)
    point = base.ascend(ball, x, state.point, gradient, context.problem.data)
    return _State(point, base.spend(state.found, seen, gradients=1))


_FROM_RANDOM = driver.Method(_start_at_random, _step, base.evaluate_last)
_FROM_CLEAN = driver.Method(_start_at_clean, _step, base.evaluate_last)
