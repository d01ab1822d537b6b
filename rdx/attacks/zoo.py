"""Zeroth order optimisation, ZOO-ADAM (Chen et al. 2017, arXiv:1708.03999)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import goals, losses, norms
from rdx.attacks import base, driver, estimate, minimal, penalty
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem
    coordinates: Array  # [num_coordinates]: numbers of those changed in a step
    num_steps: Array  # of each search
    initial_c: Array
    confidence: Array
    step_size: Array
    difference: Array


class _Descent(NamedTuple):
    """One search's descent, all `[B, D]`."""

    delta: Array
    moments: estimate.Moments
    counts: Array  # gradients that each element has seen


class _State(NamedTuple):
    keys: Key
    descent: _Descent
    search: penalty.Search
    found: base.Found


def zoo(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_steps: int = 1000, num_searches: int = 9, num_coordinates: int = 128,
    initial_c: ArrayLike = 0.01, confidence: ArrayLike = 0.0, step_size: ArrayLike = 0.01,
    difference: ArrayLike = 1e-4, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Minimises Carlini & Wagner's l2 objective by Adam, a few coordinates at a time, from differences of losses.

    `||delta||_2^2 + c max(0, confidence - loss(x + delta))` over `delta` that keep `x + delta` in the box. In each step
    Adam, with averages and a count for each element, moves random coordinates `j` along the gradient, whose hinge part
    is `(hinge(x + delta + h e_j) - hinge(x + delta - h e_j)) / (2 h)`. Then `c` is searched for: tenfold after a
    failure until it succeeds once, halfway between the greatest failure and the least success after that; each search
    begins at the clean input.

    Source: Chen et al. (2017, arXiv:1708.03999, Algorithms 1-2, Eqs. 4-6), basic version: no importance sampling, no
    growing images. Defaults are its CIFAR-10 settings; for ImageNet it takes one search with `c = 10`, 1,500 steps of
    size 0.002. Its margins of log-probabilities are margins of logits. The box is kept by clipping, as in its ImageNet
    code; the gradient of the distance is exact, where the code differences it; no search ends early.

    Args:
        key: one key; example `i` uses it folded with `index[i]`.
        logits_fn: `x [B, ...] -> logits [B, K]`; it sees `2 B * num_coordinates` points at once.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: of norm l2; `ball.eps` is the greatest distance that counts, `jnp.inf` for all. Elements of radius 0 stay.
        goal: its loss must be positive exactly where it is reached; `goals.misclassify(losses.margin)` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_steps: steps of each search.
        num_searches: values of `c`.
        num_coordinates: elements changed in a step, all of them if there are fewer.
        initial_c: the first `c`.
        confidence: loss that is aimed at.
        step_size: Adam's rate, in input units.
        difference: `h`, in input units.
        loop: see `rdx.attacks.driver.Loop`. By default examples do not stop, since nearer inputs are sought; with
            `Loop(stop=True)` they do once the goal is reached in the ball.

    Returns:
        The nearest success within `ball.eps`, or the clean input: `1 + num_searches * num_steps * (2 num_coordinates +
        1)` forward passes.

    Raises:
        ValueError: on another norm, unusable inputs or numbers, or NaN logits.
    """
    if ball.norm != "l2":
        raise ValueError(f"zoo minimises the l2 distance: give a ball of norm 'l2', not {ball.norm!r}.")
    if num_steps < 1 or num_searches < 1:
        raise ValueError(f"num_steps={num_steps} and num_searches={num_searches} must both be at least 1.")
    goal = goals.misclassify(losses.margin) if goal is None else goal
    problem, clean = base.begin(logits_fn, x, labels, ball, goal)
    numbers = (jnp.asarray(value, problem.x.dtype) for value in (initial_c, confidence, step_size, difference))
    coordinates = jnp.arange(min(num_coordinates, math.prod(problem.x.shape[1:])))
    found, trace = driver.run(
        _METHOD, _Context(problem, coordinates, jnp.asarray(num_steps, jnp.int32), *numbers),
        base.example_keys(key, problem.x, index), clean, num_steps=num_steps * num_searches, loop=loop,
    )
    return base.report_nearest(problem, found, clean.best, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    still = 0.0 * norms.flatten(context.problem.x)
    descent = _Descent(still, estimate.Moments(still, still), still)
    return _State(keys, descent, penalty.first_round(context.problem, context.initial_c), found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem = context.problem
    is_fresh = (i > 0) & (i % context.num_steps == 0)
    fresh = jax.tree.map(jnp.zeros_like, state.descent), penalty.next_round(state.search)
    descent, search = jax.tree.map(lambda new, old: jnp.where(is_fresh, new, old), fresh, (state.descent, state.search))

    chosen = _choose(context, base.fold(state.keys, i))
    slopes = _slopes(context, descent.delta, chosen)
    gradient = 2.0 * descent.delta + norms.expand(search.constant, slopes) * slopes
    is_chosen = chosen.any(axis=1)
    counts = descent.counts + is_chosen.astype(gradient.dtype)
    moments, direction = estimate.adam(descent.moments, gradient, jnp.maximum(counts, 1.0))
    moved = _in_box(problem, descent.delta - context.step_size * direction)
    delta, moments = jax.tree.map(
        lambda new, old: jnp.where(is_chosen, new, old), (moved, moments), (descent.delta, descent.moments)
    )
    seen = base.evaluate(problem, problem.x + delta.reshape(problem.x.shape))
    spent = 2 * len(context.coordinates) + 1
    found = minimal.spend(problem, state.found, seen, forwards=spent)
    search = search._replace(has_succeeded=search.has_succeeded | seen.success)
    return _State(state.keys, _Descent(delta, moments, counts), search, found)


def _choose(context: _Context, keys: Key) -> Array:
    """Draws different coordinates, among those that may change, as rows of bool `[B, num_coordinates, D]`."""
    x = norms.flatten(context.problem.x)
    is_free = norms.flatten(context.problem.ball.radius(context.problem.x)) > 0
    draws = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype))(keys)
    # Keys are not sharded as the inputs are; sums are. Draws lie below 1, so that fixed elements come last.
    order = jnp.argsort((x - x) + draws + jnp.where(is_free, 0.0, 1.0), axis=1)
    places = order[:, : len(context.coordinates)]
    return (places[:, :, None] == jnp.arange(x.shape[1])[None, None]) & is_free[:, None]


def _slopes(context: _Context, delta: Array, chosen: Array) -> Array:
    """Estimates the gradient of the hinge in the chosen coordinates, 0 elsewhere, shape `[B, D]`."""
    problem = context.problem
    steps = context.difference * chosen.astype(delta.dtype)
    moved = jnp.concatenate([delta[:, None] + steps, delta[:, None] - steps], axis=1)
    points = norms.flatten(problem.x)[:, None] + moved
    _, loss = base.evaluate_many(problem, points.reshape(*points.shape[:2], *problem.x.shape[1:]))
    above, below = jnp.split(jnp.maximum(context.confidence - loss, 0.0), 2, axis=1)
    slopes = (above - below) / (2.0 * context.difference)
    slopes = jnp.where(jnp.isfinite(slopes), slopes, 0.0)
    return jnp.where(chosen, slopes[:, :, None], 0.0).sum(axis=1)


def _in_box(problem: base.Problem, delta: Array) -> Array:
    low, high = (norms.flatten(end - problem.x) for end in minimal.limits(problem))
    return jnp.clip(delta, low, high)


_METHOD = driver.Method(_start, _step, done=minimal.is_within)
