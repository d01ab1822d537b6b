"""Decoupled direction and norm: the perturbation turns with the gradient, its norm with success (Rony et al. 2019)."""

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
    gamma: Array
    initial_norm: Array
    top_level: Array  # number of the last grey level, 0 where there are none


class _State(NamedTuple):
    point: Array
    norm: Array  # [B], what the perturbation is scaled to
    found: base.Found


def ddn(
    logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    num_steps: int = 100, initial_norm: ArrayLike = 1.0, gamma: ArrayLike = 0.05, num_levels: int | None = None,
    loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Steps along the gradient and rescales: to a smaller norm after success, to a greater one after failure.

    With the gradient `g` of the loss at `x + delta_k`:

        norm_{k+1} = (1 - gamma if x + delta_k succeeds else 1 + gamma) * norm_k
        delta = delta_k + alpha_k * g / ||g||_2
        delta_{k+1} = clip(x + norm_{k+1} * delta / ||delta||_2) - x

    where `alpha_k` falls from 1 to 0.01 along a cosine.

    Source: Rony et al. (2019, arXiv:1811.09600, Algorithm 1). Differences: the default loss is the margin, as of all
    minimal-norm attacks here, where the paper's is the cross entropy, `goals.misclassify()`, whose gradient vanishes in
    float32 on confident models; the norm never exceeds that of the farthest corner of the box, as in the authors' later
    code; a gradient of 0 makes no step, where the code draws a random one; the last iterate is evaluated, too.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the norm, which must be l2, the box, and the greatest radius that counts, which may be infinite.
        goal: what is climbed and what counts as success; the margin to any wrong class by default.
        num_steps: number of steps.
        initial_norm: the norm at first, in input units.
        gamma: relative change of the norm in each step.
        num_levels: number of grey levels in [0, 1], such as 256, to which every iterate is rounded, so that the result
            can be stored as an image; the inputs must lie on such levels themselves. By default nothing is rounded.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found. 2 forward passes, `num_steps`
        gradients.

    Raises:
        ValueError: on a norm other than l2, unusable inputs, NaN logits, or inputs between the levels.
    """
    if ball.norm != "l2":
        raise ValueError(f"ddn minimises the l2 norm, not {ball.norm}: use fmn or fab.")
    problem, clean = base.begin(logits_fn, x, labels, ball, goal or goals.misclassify(losses.margin))
    _check_levels(problem.x, num_levels)
    top_level = 0 if num_levels is None else num_levels - 1
    numbers = (minimal.cosine(1.0, 0.01, num_steps), gamma, initial_norm, top_level)
    context = _Context(problem, *(jnp.asarray(number, problem.x.dtype) for number in numbers))
    keys = base.example_keys(jax.random.key(0), problem.x)
    found, trace = driver.run(_METHOD, context, keys, clean, num_steps=num_steps, loop=loop)
    return base.report_nearest(problem, found, clean.best, trace)


def _check_levels(x: Array, num_levels: int | None) -> None:
    if num_levels is None:
        return
    if num_levels < 2:
        raise ValueError(f"num_levels={num_levels}: give at least 2, such as 256, or None for no rounding.")
    if not base.is_traced(x) and float(jnp.abs(_round(x, x.dtype.type(num_levels - 1)) - x).max()) > 1e-6:
        raise ValueError(f"Inputs lie between the {num_levels} grey levels: round them first, or use num_levels=None.")


def _round(x: Array, top_level: ArrayLike) -> Array:
    return jnp.round(x * top_level) / top_level


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    del keys
    x = context.problem.x
    # By arithmetic, which keeps how an array is sharded.
    return _State(x, context.initial_norm + norms.l2(x - x), found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem, x = context.problem, context.problem.x
    seen, gradient = base.value_and_gradient(problem, state.point)
    norm = state.norm * jnp.where(seen.success, 1.0 - context.gamma, 1.0 + context.gamma)
    norm = jnp.minimum(norm, minimal.farthest(problem))
    moved = state.point - x + context.sizes[i] * problem.ball.ascent_direction(gradient)
    point = x + norms.expand(norm, x) * problem.ball.ascent_direction(moved)
    low, high = minimal.limits(problem)
    point = jnp.clip(point, low, high)
    rounded = jnp.clip(_round(point, jnp.maximum(context.top_level, 1.0)), low, high)
    point = jnp.where(context.top_level > 0, rounded, point)
    return _State(point, norm, minimal.spend(problem, state.found, seen, gradients=1))


_METHOD = driver.Method(_start, _step, minimal.evaluate_last, minimal.is_within)
