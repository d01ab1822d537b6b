"""The linf attack of Carlini & Wagner (2017, arXiv:1608.04644)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import goals, losses, norms
from rdx.attacks import base, driver, minimal, penalty
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem
    patience: Array
    step_size: Array
    initial_constant: Array
    shrinkage: Array


class _State(NamedTuple):
    descent: penalty.Descent
    constant: Array  # [B]
    tau: Array  # [B], up to where perturbations are free
    waited: Array  # [B], int32, steps since tau or the constant changed
    found: base.Found


def cw_linf(
    logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    num_steps: int = 5000, patience: int = 100, step_size: ArrayLike = 0.005, initial_constant: ArrayLike = 1e-5,
    shrinkage: ArrayLike = 0.9, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Penalises what exceeds a bound `tau`, and lowers the bound whenever a success lies within it.

        min_w sum_i max(0, |x_i(w) - x_i| - tau) + c * max(0, -loss(x(w))),    x(w) = middle + half * tanh(w)

    is followed by Adam, where `middle` and `half` are those of the box. At a success within `tau`, `tau` becomes
    `shrinkage` times the length of that perturbation; after `patience` steps without one, `c` is doubled. At first
    `tau` admits the whole box.

    Source: Carlini & Wagner (2017, arXiv:1608.04644, Sec. VI-C). The defaults are those of the authors' code but for
    `patience`, 1000 there, so that the 21 doublings up to 20 alone cost 21,000 steps. Differences: the code goes on
    until `c` exceeds 20 or `tau` falls below 1 / 256, where `num_steps` bounds the cost here; Adam's moments stay when
    `tau` changes; elements without a finite box are not transformed. What is found ends a little above the least `tau`
    that could be reached, so a greater `shrinkage` is more exact and slower. On linear classifiers of 12 dimensions the
    default ends at 1.02 times the least norm, in a box at 1.04.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the norm, which must be linf, the box, and the greatest radius that counts, which may be infinite.
        goal: what is climbed; its loss must be positive where the goal is reached, as `losses.targeted_margin` is. The
            margin to any wrong class by default.
        num_steps: number of steps in all.
        patience: steps without a success within `tau` until `c` is doubled.
        step_size: Adam's learning rate, in units of `w`.
        initial_constant: the first `c`.
        shrinkage: factor of `tau`, in (0, 1).
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found. One forward pass, `num_steps`
        gradients.

    Raises:
        ValueError: on a norm other than linf, unusable inputs, or NaN logits.
    """
    if ball.norm != "linf":
        raise ValueError(f"cw_linf minimises the linf norm, not {ball.norm}: use cw (l2), ead (l1), or fmn (all).")
    problem, clean = base.begin(logits_fn, x, labels, ball, goal or goals.misclassify(losses.margin))
    numbers = (jnp.asarray(number, problem.x.dtype) for number in (step_size, initial_constant, shrinkage))
    context = _Context(problem, jnp.asarray(patience, jnp.int32), *numbers)
    keys = base.example_keys(jax.random.key(0), problem.x)
    found, trace = driver.run(_METHOD, context, keys, clean, num_steps=num_steps, loop=loop)
    return base.report_nearest(problem, found, clean.best, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    del keys
    problem = context.problem
    tau = minimal.farthest(problem)
    constant = context.initial_constant + jnp.zeros_like(tau)
    descent = penalty.begin_descent(penalty.tanh_space(problem).enter(problem.x))
    return _State(descent, constant, tau, jnp.zeros_like(found.forwards), found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem, space = context.problem, penalty.tanh_space(context.problem)
    point = space.leave(state.descent.point)
    seen, gradient = base.value_and_gradient(problem, point)
    delta, tau = point - problem.x, state.tau
    excess = jnp.where(jnp.abs(delta) > norms.expand(tau, delta), jnp.sign(delta), 0.0)
    slope = (excess + penalty.slope(seen, gradient, state.constant, 0.0)) * space.derivative(state.descent.point)
    descent = penalty.descend(state.descent, slope, context.step_size, i)

    length = norms.linf(delta)
    is_solved = seen.success & (length <= tau)
    is_stuck = ~is_solved & (state.waited + 1 >= context.patience)
    tau = jnp.where(is_solved, context.shrinkage * length, tau)
    constant = jnp.where(is_stuck, jnp.minimum(2.0 * state.constant, penalty.LARGEST), state.constant)
    waited = jnp.where(is_solved | is_stuck, 0, state.waited + 1)
    return _State(descent, constant, tau, waited, minimal.spend(problem, state.found, seen, gradients=1))


_METHOD = driver.Method(_start, _step, done=minimal.is_within)
