"""Fast minimum-norm: projected gradient steps in a ball that follows the decision boundary (Pintor et al. 2021)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import goals, losses, norms
from rdx.attacks import base, driver, minimal
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem
    sizes: Array  # [num_steps], of the steps
    gammas: Array  # [num_steps], relative changes of the radius


class _State(NamedTuple):
    point: Array
    radius: Array  # [B]
    has_crossed: Array  # [B], whether this run has seen the other side
    found: base.Found


def fmn(
    logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    num_steps: int = 100, step_size: float = 1.0, gamma: float = 0.05, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs the margin in a ball around `x` that shrinks after success and grows after failure.

    With the loss `f` and its gradient `g` at `x_k`:

        eps_{k+1} = (1 + gamma_k) (||x_k - x||_p + |f| / ||g||_q)        before the first success
                  = min((1 - gamma_k) eps_k, distance of the best)      where x_k succeeds
                  = (1 + gamma_k) eps_k                                 else
        x_{k+1} = P_{eps_{k+1}}(x_k + alpha_k g / ||g||_2)

    where `alpha_k` and `gamma_k` fall along a cosine, to a hundredth of `step_size` and a fiftieth of `gamma`.

    Source: Pintor et al. (2021, arXiv:2102.12827, Algorithm 1). The paper sets the hyperparameters by model and norm;
    step sizes and rates default to those of Rony's adversarial-library. Differences: `P` projects onto the intersection
    of ball and box, where the code projects onto the ball and clips; the factor `1 + gamma_k` in the first line,
    without which the search of an almost linear model ends on the boundary, on the wrong side; the l0 variant is left
    out; the last iterate is evaluated, too.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: norm, box, and the greatest radius that counts, which may be infinite.
        goal: what is climbed; its loss must be positive where the goal is reached, as `losses.targeted_margin` is. The
            margin to any wrong class by default.
        num_steps: number of steps.
        step_size: l2 norm of the first step, in input units.
        gamma: relative change of the radius in the first step.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found. 2 forward passes, `num_steps`
        gradients.

    Raises:
        ValueError: on unusable inputs or NaN logits.
    """
    problem, clean = base.begin(logits_fn, x, labels, ball, goal or goals.misclassify(losses.margin))
    schedules = (minimal.cosine(step_size, step_size / 100, num_steps), minimal.cosine(gamma, gamma / 50, num_steps))
    context = _Context(problem, *(jnp.asarray(schedule, problem.x.dtype) for schedule in schedules))
    keys = base.example_keys(jax.random.key(0), problem.x)
    found, trace = driver.run(_METHOD, context, keys, clean, num_steps=num_steps, loop=loop)
    return base.report_nearest(problem, found, clean.best, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    del keys
    x = context.problem.x
    radius = norms.linf(x - x)
    return _State(x, radius, radius > 0, found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem, x, ball = context.problem, context.problem.x, context.problem.ball
    seen, gradient = base.value_and_gradient(problem, state.point)
    found = minimal.spend(problem, state.found, seen, gradients=1)
    has_crossed = state.has_crossed | seen.success

    steepness = norms.norm(gradient, norms.dual(ball.norm))
    to_boundary = jnp.abs(seen.loss) / jnp.maximum(steepness, jnp.finfo(x.dtype).tiny)
    nearest = jnp.where(found.best.success, ball.distance(found.best.x, x), jnp.inf)
    reach = jnp.where(has_crossed, state.radius, ball.distance(state.point, x) + to_boundary)
    gamma = context.gammas[i]
    radius = jnp.where(seen.success, jnp.minimum((1.0 - gamma) * state.radius, nearest), (1.0 + gamma) * reach)
    radius = jnp.minimum(radius, minimal.farthest(problem))

    low, high = minimal.limits(problem)
    moved = state.point + context.sizes[i] * Ball("l2", 1.0).ascent_direction(gradient)
    inside = dataclasses.replace(ball, eps=radius, low=low, high=high)
    return _State(inside.project(moved, x), radius, has_crossed, found)


_METHOD = driver.Method(_start, _step, minimal.evaluate_last, minimal.is_within)
