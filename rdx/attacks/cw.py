"""The l2 attack of Carlini & Wagner (2017, arXiv:1608.04644)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import goals, losses
from rdx.attacks import base, driver, minimal, penalty
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem
    num_steps: Array  # of each round
    step_size: Array
    initial_constant: Array
    confidence: Array


class _State(NamedTuple):
    descent: penalty.Descent
    search: penalty.Search
    found: base.Found


def cw(
    logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    num_search_steps: int = 9, num_steps: int = 1000, step_size: ArrayLike = 0.01, initial_constant: ArrayLike = 1e-3,
    confidence: ArrayLike = 0.0, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Minimises squared distance plus a penalty for failure by Adam, in variables that the box does not bound.

        min_w ||x(w) - x||_2^2 + c * max(0, confidence - loss(x(w))),    x(w) = middle + half * tanh(w)

    where `middle` and `half` are those of the box. In each of `num_search_steps` rounds Adam starts from the clean
    input; between them the constant `c` of each example is multiplied by 10 until it succeeds, and then bisected to the
    least that does.

    Source: Carlini & Wagner (2017, arXiv:1608.04644, Secs. V and VI-A). The defaults are those of the authors' code but
    for the length of a round, which is 10,000 there and ends early when the objective stops falling; here all rounds
    have one length, so that the cost is known. Further differences: elements without a finite box are not transformed;
    untargeted attacks, too, demand the confidence, where a wrong sign in the authors' code makes them accept its
    opposite; the last round is not repeated at the least constant that succeeded, which would give the same result.
    Elements at the ends of the box start where tanh is flat: rounds of fewer than about 500 steps barely move them.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the norm, which must be l2, the box, and the greatest radius that counts, which may be infinite.
        goal: what is climbed; its loss must be positive where the goal is reached, as `losses.targeted_margin` is. The
            margin to any wrong class by default.
        num_search_steps: number of rounds, each with another constant.
        num_steps: steps of each round.
        step_size: Adam's learning rate, in units of `w`.
        initial_constant: the first `c`.
        confidence: the loss from which on a success counts; where none is found the result is `x`, be it wrong or not.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found. One forward pass,
        `num_search_steps * num_steps` gradients.

    Raises:
        ValueError: on a norm other than l2, unusable inputs, or NaN logits.
    """
    if ball.norm != "l2":
        raise ValueError(f"cw minimises the l2 norm, not {ball.norm}: use cw_linf, ead (l1), or fmn (all).")
    problem, clean = base.begin(logits_fn, x, labels, ball, goal or goals.misclassify(losses.margin))
    numbers = (jnp.asarray(number, problem.x.dtype) for number in (step_size, initial_constant, confidence))
    context = _Context(problem, jnp.asarray(num_steps, jnp.int32), *numbers)
    start = clean._replace(best=penalty.confident(clean.best, context.confidence))
    keys = base.example_keys(jax.random.key(0), problem.x)
    found, trace = driver.run(_METHOD, context, keys, start, num_steps=num_search_steps * num_steps, loop=loop)
    return base.report_nearest(problem, found, clean.best, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    del keys
    return _State(_at_clean(context.problem), penalty.first_round(context.problem, context.initial_constant), found)


def _at_clean(problem: base.Problem) -> penalty.Descent:
    return penalty.begin_descent(penalty.tanh_space(problem).enter(problem.x))


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem, search, space = context.problem, state.search, penalty.tanh_space(context.problem)
    point = space.leave(state.descent.point)
    seen, gradient = base.value_and_gradient(problem, point)
    slope = 2.0 * (point - problem.x) + penalty.slope(seen, gradient, search.constant, context.confidence)
    slope = slope * space.derivative(state.descent.point)

    seen = penalty.confident(seen, context.confidence)
    found = minimal.spend(problem, state.found, seen, gradients=1)
    search = search._replace(has_succeeded=search.has_succeeded | seen.success)

    place = i % context.num_steps
    is_over = place == context.num_steps - 1
    descent = penalty.descend(state.descent, slope, context.step_size, place)
    following = _State(_at_clean(problem), penalty.next_round(search), found)
    state = _State(descent, search, found)
    return jax.tree.map(lambda new, old: jnp.where(is_over, new, old), following, state)


_METHOD = driver.Method(_start, _step, done=minimal.is_within)
