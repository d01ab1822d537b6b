"""The optimisation-based attack: descends the distance to the boundary over directions (Cheng et al. 2019)."""

from typing import NamedTuple

import jax.numpy as jnp

from rdx import goals, losses, norms
from rdx.attacks import base, decision, driver, estimate, minimal
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn

# What a direction is measured for: to find a first one, to estimate the gradient, as a longer or a shorter step.
_EXPLORE, _ESTIMATE, _LENGTHEN, _SHORTEN = range(4)
# Stages of a measurement.
_PROBE, _SHRINK, _GROW, _BISECT = range(4)

# The bracket moves by this factor until it holds the boundary, outwards so many times at most.
_FINE = 0.01
_MOST_GROWTH = 1.25
# Bisection goes on to a tolerance of this share of beta, relative to the length.
_TOLERANCE = 1 / 500
# Steps: tries in a line search, factors of longer and shorter ones, the size from which it starts anew with finer beta.
_NUM_TRIES = 15
_LONGER, _SHORTER = 2.0, 0.25
_LEAST_STEP = 1e-4
_FINER, _LEAST_BETA = 0.1, 5e-5


class _Measurement(NamedTuple):
    """The search for the boundary along one direction, a probe at a time."""

    direction: Array  # of unit norm
    stage: Array  # [B], int32
    low: Array  # [B], a length that fails
    high: Array  # [B], one that succeeds
    guess: Array  # [B], where it began


class _Context(NamedTuple):
    problem: base.Problem  # its data is the given start
    num_directions: Array
    num_samples: Array
    step_size: Array
    beta: Array


class _State(NamedTuple):
    direction: Array  # theta, of unit norm
    length: Array  # [B], g(theta)
    mode: Array  # [B], int32
    num: Array  # [B], int32, of measurements finished in this mode
    trial: _Measurement
    offset: Array  # u, by which a sample differs from theta
    gradient: Array
    best_direction: Array  # of this iteration
    best_length: Array  # [B]
    line_length: Array  # [B], least of this iteration's steps
    step_size: Array  # [B], alpha
    beta: Array  # [B]
    keys: Key
    found: base.Found


def opt(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_queries: int = 20_000, start: ArrayLike | None = None,
    num_directions: int = 100, num_samples: ArrayLike = 20, step_size: ArrayLike = 0.2, beta: ArrayLike = 0.005,
    loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Descends `g(theta)`, the distance of the boundary in the direction `theta`, by gradients of random differences.

    `g(theta)` is the least length at which `x + g theta / ||theta||`, clipped to the box, succeeds. From the best of
    `num_directions` normal directions,

        grad = mean_u (g(theta + beta u) - g(theta)) / beta u,  over num_samples random unit vectors u
        theta' = theta - alpha grad

    where `alpha` doubles as long as that lowers `g`, or else falls to a quarter until it does; the least of all `g` of
    the iteration is the next `theta`. `g` near a known length is bracketed by steps of 1 % and bisected. Only success
    is seen, no loss.

    Source: Cheng et al. (2019, arXiv:1807.04457, Algorithms 1 and 2); line search and numbers as in their code.
    Differences: a step that fails at the length to beat is not measured further; a bracket grows by a quarter at most,
    where the code goes on to an absolute length; the tolerance is relative; `beta` stays at 5e-5, where lengths still
    differ in float32; the start's own direction is tried, too, and a given start's only. One step of the driver is one
    query of every example.

    Args:
        key: one key; example `i` uses it folded with `index[i]`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the norm, which must be l2, the box, and the greatest radius that counts, which may be infinite.
        goal: what counts as success; any wrong class by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_queries: forward passes on each example, all told.
        start: inputs to begin at, such as images of the target class, shape `[B, ...]`; blended noise by default.
        num_directions: directions tried at first.
        num_samples: samples of a gradient.
        step_size: `alpha` at first.
        beta: smoothing at first; a tenth whenever steps have become too short.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found. `num_queries` forward passes.

    Raises:
        ValueError: on a norm other than l2, too small a budget, a start that does not fit, unusable inputs, or NaN
            logits.
    """
    if ball.norm != "l2":
        raise ValueError(f"opt minimises the l2 norm, not {ball.norm}: use hopskipjump.")
    problem, clean = base.begin(logits_fn, x, labels, ball, goal or goals.misclassify(losses.margin))
    problem, num_steps = decision.begin(problem, start, num_queries)
    counts = (jnp.asarray(count, jnp.int32) for count in (num_directions if start is None else 0, num_samples))
    context = _Context(problem, *counts, *(jnp.asarray(number, problem.x.dtype) for number in (step_size, beta)))
    keys = base.example_keys(key, problem.x, index)
    found, trace = driver.run(_METHOD, context, keys, clean, num_steps=num_steps, loop=loop)
    return base.report_nearest(problem, found, clean.best, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    problem = context.problem
    found = decision.find_start(base.fold(keys, 0), problem, found)
    direction, length = estimate.unit(found.best.x - problem.x), problem.ball.distance(found.best.x, problem.x)
    # By arithmetic, which keeps how an array is sharded.
    none = 0 * found.forwards
    trial = _Measurement(direction, _PROBE + none, length, length, length)
    return _State(
        direction, length, _EXPLORE + none, none, trial, direction, 0.0 * direction, direction, length, length,
        context.step_size + 0.0 * length, context.beta + 0.0 * length, base.fold(keys, 1), found,
    )


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem, trial = context.problem, state.trial
    point = problem.x + norms.expand(_next_length(trial), problem.x) * trial.direction
    seen = base.evaluate(problem, decision.into_box(problem, point))
    trial, is_rejected, is_over = _advance(trial, state.mode, seen.success, _TOLERANCE * state.beta)
    state = state._replace(trial=trial, found=minimal.spend(problem, state.found, seen, forwards=1))
    concluded = _conclude(context, state, jnp.where(is_rejected, jnp.inf, trial.high))
    return base.choose(is_over, _launch(problem, concluded, base.fold(state.keys, i)), state)


def _next_length(trial: _Measurement) -> Array:
    middle = 0.5 * (trial.low + trial.high)
    return jnp.select(
        [trial.stage == stage for stage in (_PROBE, _SHRINK, _GROW)], [trial.guess, trial.low, trial.high], middle
    )


def _advance(trial: _Measurement, mode: Array, success: Array, tolerance: Array) -> tuple[_Measurement, Array, Array]:
    """Takes a probe's outcome into account; also says where the direction is rejected, and where it is measured."""
    low, high, guess, length = trial.low, trial.high, trial.guess, _next_length(trial)
    is_probe, is_shrinking, is_growing = (trial.stage == stage for stage in (_PROBE, _SHRINK, _GROW))
    is_rejected = is_probe & ~success & (mode != _ESTIMATE)
    # The last success is the upper end, the last failure the lower one; beyond it the bracket goes on by 1 %.
    high = jnp.where(success, length, jnp.where(is_probe | is_growing, (1.0 + _FINE) * length, high))
    goes_down = success & (is_probe | is_shrinking)
    low = jnp.where(success, jnp.where(goes_down, (1.0 - _FINE) * length, low), length)
    is_far = is_probe & success & (mode == _EXPLORE)
    low = jnp.where(is_far, 0.0, low)
    stage = jnp.select([is_far, goes_down, (is_probe | is_growing) & ~success], [_BISECT, _SHRINK, _GROW], _BISECT)
    is_lost = (stage == _GROW) & (high > _MOST_GROWTH * guess)
    is_narrow = (stage == _BISECT) & (high - low <= tolerance * guess)
    new = _Measurement(trial.direction, stage.astype(trial.stage.dtype), low, high, guess)
    return new, is_rejected, is_rejected | is_lost | is_narrow


def _conclude(context: _Context, state: _State, value: Array) -> _State:
    """Uses `g` of the trial's direction, infinite where it is no better than what it is held against."""
    is_explored, is_sample, is_longer, is_shorter = (state.mode == mode for mode in range(4))
    slope = jnp.where(is_sample, (value - state.length) / (state.beta * context.num_samples.astype(value.dtype)), 0.0)
    gradient = state.gradient + norms.expand(slope, state.offset) * state.offset
    is_best = value < state.best_length
    best_direction = base.choose(is_best, state.trial.direction, state.best_direction)
    best_length = jnp.where(is_best, value, state.best_length)
    is_lower = (is_longer | is_shorter) & (value < state.line_length)
    line_length = jnp.where(is_lower, value, state.line_length)

    num = state.num + 1
    has_tried = num >= _NUM_TRIES
    ends_line = is_longer & (~is_lower | has_tried)
    begins = (is_explored & (num > context.num_directions)) | (is_shorter & (is_lower | has_tried))
    begins |= ends_line & (line_length < state.length)
    shortens, lengthens = ends_line & ~begins, is_sample & (num >= context.num_samples)
    mode = jnp.select([begins, shortens, lengthens], [_ESTIMATE, _SHORTEN, _LENGTHEN], state.mode)
    num = jnp.where(begins | shortens | lengthens, 0, num)
    step_size = jnp.where(is_longer, _LONGER, 1.0) * jnp.where(mode == _SHORTEN, _SHORTER, 1.0) * state.step_size
    is_stuck = begins & (step_size < _LEAST_STEP)
    beta = jnp.where(is_stuck, jnp.maximum(_FINER * state.beta, _LEAST_BETA), state.beta)

    # Directions are compared with the best so far while they are explored, afterwards with the one they started from.
    is_new = begins | is_explored
    return state._replace(
        direction=base.choose(is_new, best_direction, state.direction),
        length=jnp.where(is_new, best_length, state.length), mode=mode.astype(state.mode.dtype), num=num,
        gradient=base.choose(begins, jnp.zeros_like(gradient), gradient), best_direction=best_direction,
        best_length=best_length, line_length=jnp.where(is_new, best_length, line_length),
        step_size=jnp.where(is_stuck, 1.0, step_size), beta=beta,
    )


def _launch(problem: base.Problem, state: _State, keys: Key) -> _State:
    """Begins to measure the next direction."""
    offset = estimate.unit(estimate.directions(keys, problem, 1)[:, 0])
    near = state.direction + norms.expand(state.beta, offset) * offset
    down = state.direction - norms.expand(state.step_size, offset) * state.gradient
    direction = base.choose(state.mode == _EXPLORE, offset, base.choose(state.mode == _ESTIMATE, near, down))
    guess = jnp.where(state.mode == _ESTIMATE, state.length, state.line_length)
    trial = _Measurement(estimate.unit(direction), jnp.full_like(state.mode, _PROBE), guess, guess, guess)
    return state._replace(trial=trial, offset=offset)


_METHOD = driver.Method(_start, _step, done=minimal.is_within)
