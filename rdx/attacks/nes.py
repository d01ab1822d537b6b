"""Natural evolution strategies (Ilyas et al. 2018, arXiv:1804.08598)."""

from typing import NamedTuple

import jax.numpy as jnp

from rdx import goals, losses
from rdx.attacks import base, driver, estimate
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem  # its data are the largest and the least step size
    pairs: Array  # [num_samples / 2]: numbers of the directions
    window: Array  # [plateau_length], all -inf: losses not seen yet
    sigma: Array


class _State(NamedTuple):
    keys: Key
    point: Array
    share: Array  # [B], of the step size
    recent: Array  # [B, plateau_length]: mean losses since the last halving
    found: base.Found


def nes(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_steps: int = 200, num_samples: int = 100, sigma: ArrayLike = 1e-3,
    step_size: ArrayLike | None = None, min_step_size: ArrayLike | None = None, plateau_length: int = 20,
    loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs the gradient of the loss smoothed by a Gaussian, which differences of losses estimate.

    `g = 1/n sum_i loss(x_k + sigma u_i) u_i / sigma` over `n/2` normal directions and their opposites, then
    `x_{k+1} = P(x_k + s u(g))` as in PGD. The step size `s` is halved, down to its least value, where the mean loss of
    the samples is lower than `plateau_length - 1` steps ago; then the count begins anew.

    Source: Ilyas et al. (2018, arXiv:1804.08598, Algorithm 1). Defaults, step sizes relative to the radius, and the
    absence of momentum as in RealSafe (Dong et al. 2020, arXiv:1912.11852), whose code does not count the query that
    checks each iterate for success; here it counts.

    Args:
        key: one key; example `i` uses it folded with `index[i]`.
        logits_fn: `x [B, ...] -> logits [B, K]`; it sees `B * num_samples` points at once.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        goal: what is maximised and what counts as success; `goals.misclassify(losses.margin)` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_steps: iterations.
        num_samples: points `n` of an estimate, even.
        sigma: standard deviation of the directions, in input units.
        step_size: length of a step in the ball's norm, in input units, shaped as `Ball.eps` may be; `0.15 * eps` by
            default.
        min_step_size: its least value, `0.015 * eps` by default.
        plateau_length: steps over which the loss has to rise.
        loop: see `rdx.attacks.driver.Loop`; examples stop at success by default.

    Returns:
        The attack's result: `1 + num_steps * (num_samples + 1)` forward passes, fewer for examples that stop.

    Raises:
        ValueError: on an odd `num_samples`, unusable inputs, or NaN logits.
    """
    estimate.check_even(num_samples)
    goal = goals.misclassify(losses.margin) if goal is None else goal
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    eps = jnp.asarray(problem.ball.eps)
    sizes = (0.15 * eps if step_size is None else step_size, 0.015 * eps if min_step_size is None else min_step_size)
    problem = problem._replace(data=tuple(base.per_example(size, problem.x) for size in sizes))
    context = _Context(
        problem, jnp.arange(num_samples // 2), jnp.full(plateau_length, -jnp.inf, problem.x.dtype),
        jnp.asarray(sigma, problem.x.dtype),
    )
    found, trace = driver.run(
        _METHOD, context, base.example_keys(key, problem.x, index), found, num_steps=num_steps, stops=True, loop=loop
    )
    return base.report(problem, found, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    zero = 0.0 * found.best.success.astype(context.sigma.dtype)
    return _State(keys, context.problem.x, 1.0 + zero, zero[:, None] + context.window[None], found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem = context.problem
    pairs = estimate.directions(base.fold(state.keys, i), problem, len(context.pairs))
    gradient, loss = estimate.antithetic_gradient(problem, state.point, pairs, context.sigma)
    largest, least = problem.data
    size = jnp.maximum(base.per_example(state.share, largest) * largest, least)
    point = base.ascend(problem.ball, problem.x, state.point, gradient, size)
    recent = jnp.concatenate([state.recent[:, 1:], loss[:, None]], axis=1)
    has_stalled = loss < recent[:, 0]
    share = jnp.where(has_stalled, 0.5 * state.share, state.share)
    recent = jnp.where(has_stalled[:, None], -jnp.inf, recent)
    seen = base.evaluate(problem, point)
    return _State(state.keys, point, share, recent, base.spend(state.found, seen, forwards=2 * len(context.pairs) + 1))


_METHOD = driver.Method(_start, _step)
