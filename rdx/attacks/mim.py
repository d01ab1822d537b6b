"""The momentum iterative method (Dong et al. 2018, arXiv:1710.06081)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import norms
from rdx.attacks import base, driver
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem  # its data is the step size
    decay: Array


class _State(NamedTuple):
    point: Array
    momentum: Array
    found: base.Found


def mim(
    logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    num_steps: int = 10, step_size: ArrayLike | None = None, decay: ArrayLike = 1.0, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs the loss along an accumulated gradient, which carries over poor local maxima and transfers better.

        g_{k+1} = decay * g_k + grad loss(x_k) / ||grad loss(x_k)||_1
        x_{k+1} = P(x_k + s * u(g_{k+1}))

    with `x_0 = x`, `g_0 = 0`, the projection `P` onto ball and box and the steepest direction `u` of the ball's norm:
    the sign for linf, the normalised momentum for l2, as in the paper, and sparse signs for l1, as in `pgd`.

    Source: Dong et al. (2018, arXiv:1710.06081, Algorithm 1). Differences: a gradient of 0 adds nothing, where the
    authors' benchmark RealSafe divides by 0; the strongest input seen is returned, be it the clean one, an iterate or
    the last one, where the paper returns the last.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        goal: what is maximised and what counts as success; `goals.misclassify()` by default.
        num_steps: number of steps.
        step_size: length of a step in the ball's norm, in input units, shaped as `Ball.eps` may be; `eps / num_steps`
            by default.
        decay: share of the accumulated gradient that a step keeps.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: 2 forward passes, `num_steps` gradients.

    Raises:
        ValueError: on unusable inputs or NaN logits.
    """
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    size = jnp.asarray(problem.ball.eps) / num_steps if step_size is None else step_size
    problem = problem._replace(data=base.per_example(size, problem.x))
    context = _Context(problem, jnp.asarray(decay, problem.x.dtype))
    keys = base.example_keys(jax.random.key(0), problem.x)
    found, trace = driver.run(_METHOD, context, keys, found, num_steps=num_steps, loop=loop)
    return base.report(problem, found, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    del keys
    x = context.problem.x
    return _State(x, jnp.zeros_like(x), found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    del i
    problem = context.problem
    seen, gradient = base.value_and_gradient(problem, state.point)
    momentum = context.decay * state.momentum + _normalise(gradient)
    point = base.ascend(problem.ball, problem.x, state.point, momentum, problem.data)
    return _State(point, momentum, base.spend(state.found, seen, gradients=1))


def _normalise(gradient: Array) -> Array:
    """Divides by the l1 norm; scaled first, so that the sum over a large or tiny gradient stays in float's range."""
    largest = norms.linf(gradient)
    scaled = gradient / norms.expand(jnp.where(largest == 0, 1.0, largest), gradient)
    return scaled / norms.expand(jnp.maximum(norms.l1(scaled), 1.0), gradient)


_METHOD = driver.Method(_start, _step, base.evaluate_last)
