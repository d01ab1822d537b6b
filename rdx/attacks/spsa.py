"""Simultaneous perturbation stochastic approximation (Uesato et al. 2018, arXiv:1802.05666)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import goals, losses
from rdx.attacks import base, driver, estimate
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem  # its data is the rate of Adam
    pairs: Array  # [num_samples / 2]: numbers of the directions
    sigma: Array


class _State(NamedTuple):
    keys: Key
    point: Array
    moments: estimate.Moments
    found: base.Found


def spsa(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_steps: int = 200, num_samples: int = 100, sigma: ArrayLike = 1e-3,
    step_size: ArrayLike | None = None, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs by Adam along gradients estimated from differences between opposite corners of small cubes.

    `g = 1/n sum_i loss(x_k + sigma u_i) u_i / sigma` over `n/2` directions of random signs and their opposites, then
    `x_{k+1} = P(x_k + s Adam(g))`.

    Source: Uesato et al. (2018, arXiv:1802.05666, Algorithm 1), whose loss is the negative of ours. Defaults as in
    RealSafe (Dong et al. 2020, arXiv:1912.11852), whose rates, 0.3 eps for linf and 0.005 for CIFAR-10 in the l2 ball
    of radius 1, both make the length of a full Adam step 0.3 eps.

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
        sigma: half an edge of the cubes, in input units.
        step_size: length in the ball's norm of a step that moves every element as far as Adam does at first, in input
            units, shaped as `Ball.eps` may be; `0.3 * eps` by default. For inputs of `D` elements Adam's rate is this
            for linf, over `sqrt(D)` for l2 and over `D` for l1.
        loop: see `rdx.attacks.driver.Loop`; examples stop at success by default.

    Returns:
        The attack's result: `1 + num_steps * (num_samples + 1)` forward passes, fewer for examples that stop.

    Raises:
        ValueError: on an odd `num_samples`, unusable inputs, or NaN logits.
    """
    estimate.check_even(num_samples)
    goal = goals.misclassify(losses.margin) if goal is None else goal
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    size = math.prod(problem.x.shape[1:])
    shrinkage = {"linf": 1.0, "l2": size**-0.5, "l1": 1.0 / size}[ball.norm]
    length = 0.3 * jnp.asarray(problem.ball.eps) if step_size is None else step_size
    problem = problem._replace(data=shrinkage * base.per_example(length, problem.x))
    context = _Context(problem, jnp.arange(num_samples // 2), jnp.asarray(sigma, problem.x.dtype))
    found, trace = driver.run(
        _METHOD, context, base.example_keys(key, problem.x, index), found, num_steps=num_steps, stops=True, loop=loop
    )
    return base.report(problem, found, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    x = context.problem.x
    return _State(keys, x, estimate.Moments(x - x, x - x), found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem = context.problem
    pairs = estimate.directions(
        base.fold(state.keys, i), problem, len(context.pairs), draw=jax.random.rademacher
    )
    gradient, _ = estimate.antithetic_gradient(problem, state.point, pairs, context.sigma)
    moments, direction = estimate.adam(state.moments, gradient, i + 1)
    point = problem.ball.project(state.point + problem.data * direction, problem.x)
    seen = base.evaluate(problem, point)
    return _State(state.keys, point, moments, base.spend(state.found, seen, forwards=2 * len(context.pairs) + 1))


_METHOD = driver.Method(_start, _step)
