"""HopSkipJump: estimates the boundary's normal from decisions and leaps along it (Chen et al. 2020)."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdx import goals, losses, norms
from rdx.attacks import base, decision, driver, estimate, minimal
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn

# Kinds of rounds.
_BISECT, _SAMPLE, _LEAP = range(3)
# Most samples in a round, and leaps in one.
_NUM_AT_ONCE = 25
_NUM_LEAPS = 10


class _Context(NamedTuple):
    problem: base.Problem  # its data is the given start
    kinds: Array  # [num_steps], int32, of the rounds
    iterations: Array  # [num_steps], t = 1, 2, ... to which they belong
    first_radius: Array
    share: Array  # radius of later samples, relative to the distance
    samples: Array  # only its shape counts: the samples in a round


class _State(NamedTuple):
    far: Array  # a success
    low: Array  # [B], share of the way from x to it that failed
    high: Array  # [B], share that succeeded
    moment: Array  # sum of the samples' directions, each times its decision, 1 or -1
    total: Array  # sum of the directions
    balance: Array  # [B], sum of the decisions
    num_samples: Array  # [B]
    keys: Key
    found: base.Found


def hopskipjump(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_queries: int = 20_000, start: ArrayLike | None = None,
    num_samples: int = 100, gamma: float = 1.0, first_radius: ArrayLike = 0.1, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Goes to the boundary by bisection, estimates its normal there, leaps along it, and again.

    In iteration `t`, at the boundary point `x_t` at distance `r_t`, where `phi` is 1 for success and -1 for failure:

        g = sum_b (phi(x_t + delta_t u_b) - mean phi) u_b,  b = 1 .. num_samples sqrt(t)
        v = x_t + r_t / sqrt(t) 2^-k u(g),  with the least k that succeeds
        x_{t+1} = the boundary between x and v, to a share theta of the way

    with random unit vectors `u_b`, normal for l2 and uniform in the cube for linf, `u(g)` the sign of `g` for linf and
    `g / ||g||` for l2; `theta = gamma d^-1.5` (l2) or `gamma d^-2` (linf), in `d` dimensions, and
    `delta_t = gamma r_t / d`. The way is a line for l2; for linf, the perturbation clipped to a fraction of `r_t`. Only
    success is seen, no loss.

    Source: Chen et al. (2020, arXiv:1904.02144, Algorithm 2); `delta_1` as in their code. Differences: samples come in
    rounds of 25, to which their number is rounded; all 10 leaps are tried at once and all count, where the paper halves
    until one succeeds; a leap that never succeeds is not made; no share is bisected below float precision; the nearest
    success is returned, be it only a sample.

    Args:
        key: one key; example `i` uses it folded with `index[i]`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the norm, l2 or linf, the box, and the greatest radius that counts, which may be infinite.
        goal: what counts as success; any wrong class by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_queries: most forward passes on each example, all told.
        start: inputs to begin at, such as images of the target class, shape `[B, ...]`; blended noise by default.
        num_samples: samples of the first iteration.
        gamma: scale of the tolerance of the bisection and of the radius of the samples.
        first_radius: radius of the first iteration's samples, in input units.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found. At most `num_queries` forward
        passes, less than a round of 25 below it.

    Raises:
        ValueError: on l1, too small a budget, no samples, a start that does not fit, unusable inputs, or NaN logits.
    """
    if ball.norm == "l1":
        raise ValueError("hopskipjump minimises the l2 or linf norm, not l1.")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: give at least 1.")
    problem, clean = base.begin(logits_fn, x, labels, ball, goal or goals.misclassify(losses.margin))
    problem, budget = decision.begin(problem, start, num_queries)
    size, precision = math.prod(problem.x.shape[1:]), float(jnp.finfo(problem.x.dtype).eps)
    theta = max(precision, gamma * size ** (-1.5 if ball.norm == "l2" else -2.0))
    at_once = min(_NUM_AT_ONCE, num_samples)
    kinds, iterations = _plan(budget, max(1, math.ceil(-math.log2(theta))), num_samples, at_once)
    times, radius, share = (jnp.asarray(number, problem.x.dtype) for number in (iterations, first_radius, gamma / size))
    context = _Context(problem, jnp.asarray(kinds), times, radius, share, jnp.zeros(at_once))
    keys = base.example_keys(key, problem.x, index)
    found, trace = driver.run(_METHOD, context, keys, clean, num_steps=len(kinds), loop=loop)
    return base.report_nearest(problem, found, clean.best, trace)


def _plan(budget: int, num_halvings: int, num_samples: int, at_once: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists the rounds that the budget pays for: their kinds and iterations."""
    rounds: list[tuple[int, int]] = []
    for t in itertools.count(1):
        num_rounds = max(1, round(num_samples * math.sqrt(t) / at_once))
        for kind in [_BISECT] * num_halvings + [_SAMPLE] * num_rounds + [_LEAP]:
            budget -= (1, at_once, _NUM_LEAPS)[kind]
            if budget < 0:
                return tuple(np.array(rounds, np.int32).T)
            rounds.append((kind, t))
    raise AssertionError


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    found = decision.find_start(base.fold(keys, 0), context.problem, found)
    far = found.best.x
    # By arithmetic, which keeps how an array is sharded.
    zeros = norms.linf(far - far)
    return _State(far, zeros, zeros + 1.0, far - far, far - far, zeros, zeros, base.fold(keys, 1), found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    # The kind is that of all examples, so only one branch runs.
    return jax.lax.switch(context.kinds[i], [_bisect, _sample, _leap], context, state, i)


def _bisect(context: _Context, state: _State, i: Array) -> _State:
    del i
    middle = 0.5 * (state.low + state.high)
    seen = base.evaluate(context.problem, _between(context.problem, state.far, middle))
    low, high = jnp.where(seen.success, state.low, middle), jnp.where(seen.success, middle, state.high)
    return state._replace(low=low, high=high, found=minimal.spend(context.problem, state.found, seen, forwards=1))


def _sample(context: _Context, state: _State, i: Array) -> _State:
    problem, point = context.problem, _between(context.problem, state.far, state.high)
    is_first, distance = context.iterations[i] == 1, problem.ball.distance(point, problem.x)
    radius = norms.expand(jnp.where(is_first, context.first_radius, context.share * distance), point)
    draw, keys = _cube if problem.ball.norm == "linf" else jax.random.normal, base.fold(state.keys, i)
    drawn = estimate.directions(keys, problem, len(context.samples), draw=draw)
    points = decision.into_box(problem, point[:, None] + radius[:, None] * estimate.unit(drawn, axis=2))
    nearest, success = decision.nearest(problem, points)
    # The box may have bent the directions.
    directions, decisions = points - point[:, None], jnp.where(success, 1.0, -1.0).astype(point.dtype)
    return state._replace(
        moment=state.moment + (norms.expand(decisions, directions) * directions).sum(axis=1),
        total=state.total + directions.sum(axis=1), balance=state.balance + decisions.sum(axis=1),
        num_samples=state.num_samples + decisions.shape[1],
        found=minimal.spend(problem, state.found, nearest, forwards=decisions.shape[1]),
    )


def _leap(context: _Context, state: _State, i: Array) -> _State:
    problem, point = context.problem, _between(context.problem, state.far, state.high)
    mean = state.balance / state.num_samples
    # Where all samples agree their mean is all that is known.
    mean = jnp.where(jnp.abs(mean) < 1.0, mean, 0.0)
    direction = problem.ball.ascent_direction(state.moment - norms.expand(mean, point) * state.total)
    length = problem.ball.distance(point, problem.x) / jnp.sqrt(context.iterations[i])
    lengths = length[:, None] * jnp.exp2(-jnp.arange(_NUM_LEAPS, dtype=point.dtype))[None]
    points = point[:, None] + norms.expand(lengths, point[:, None]) * direction[:, None]
    points = decision.into_box(problem, points)
    nearest, success = decision.nearest(problem, points)
    longest = norms.expand(success.argmax(axis=1)[:, None], points)
    leapt = jnp.take_along_axis(points, longest, axis=1)[:, 0]
    zeros = 0.0 * length
    return _State(
        base.choose(success.any(axis=1), leapt, point), zeros, zeros + 1.0, 0.0 * point, 0.0 * point, zeros, zeros,
        state.keys, minimal.spend(problem, state.found, nearest, forwards=_NUM_LEAPS),
    )


def _between(problem: base.Problem, far: Array, share: Array) -> Array:
    """Goes the share `[B]` of the way from `x` to `far`."""
    x, share = problem.x, norms.expand(share, problem.x)
    delta = far - x
    if problem.ball.norm == "linf":
        limit = share * norms.expand(norms.linf(delta), x)
        return decision.into_box(problem, x + jnp.clip(delta, -limit, limit))
    return decision.into_box(problem, x + share * delta)


def _cube(key: Key, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0)


_METHOD = driver.Method(_start, _step, done=minimal.is_within)
