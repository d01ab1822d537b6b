"""Auto-PGD: projected gradient descent that chooses its own step sizes (Croce & Hein 2020, arXiv:2003.01690)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdx import norms
from rdx.attacks import base, driver
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem
    windows: Array  # [num_steps]: length of the window that evaluation i closes, 0 where it closes none
    rho: Array
    alpha: Array


class _Peak(NamedTuple):
    """The point of greatest loss on this run, where the search returns to."""

    point: Array
    gradient: Array
    loss: Array


class _State(NamedTuple):
    point: Array
    previous: Array
    share: Array  # [B]: step size in units of eps
    peak: _Peak
    peak_loss_at_check: Array
    was_halved: Array
    last_loss: Array
    num_rises: Array
    found: base.Found


def checkpoints(num_steps: int) -> list[int]:
    """Lists the iterations, counted from 0, after which Auto-PGD may halve its step sizes.

    The windows between them are `0.22 n` long at first and shrink by `0.03 n` each, down to `0.06 n`, as integers of at
    least 1. Source: Croce & Hein (2020, arXiv:2003.01690, Sec. 3.2).

    Args:
        num_steps: number of iterations `n`.

    Returns:
        Increasing iterations below `num_steps`; for 50 they are 10, 20, 29, 37, 44.
    """
    window, decrement, shortest = (max(percent * num_steps // 100, 1) for percent in (22, 3, 6))
    found, last = [], window - 1
    while last < num_steps:
        found.append(last)
        window = max(window - decrement, shortest)
        last += window
    return found


def apgd(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_steps: int = 100, num_restarts: int = 1, rho: ArrayLike = 0.75,
    alpha: ArrayLike = 0.75, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs the loss with momentum, halving the step size and returning to the peak where progress stalls.

    `z = P(x_k + s * u(grad loss(x_k)))`, `x_{k+1} = P(x_k + alpha (z - x_k) + (1 - alpha) (x_k - x_{k-1}))`, starting
    on the ball's surface with `s = 2 eps`. After each of `checkpoints(num_steps)`, `s` is halved and the search resumes
    at the point of greatest loss where (1) at most `rho` of the window's iterations raised the loss, or (2) the step
    size was kept at the last checkpoint and the greatest loss has not risen since.

    Source: Croce & Hein (2020, arXiv:2003.01690, Algorithm 1). Where paper and released code differ: the threshold of
    (1) is inclusive and (2) cannot hold at the first checkpoint, as in the code. The first window counts the rise from
    the starting point, as in the paper (the code compares with a row of zeros, so that any positive loss counts as a
    rise). `P` projects onto the intersection of ball and box, as in the paper (the code's l2 attack rescales, then
    clips). The last iterate costs a forward pass only, where the code computes a gradient that it never uses. Returned
    is the successful input of greatest loss, not the last one.

    Args:
        key: one key; example `i` uses it folded with `index[i]`, restart `r` folds that with `r`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of norm linf or l2.
        goal: what is maximised and what counts as success; `goals.misclassify()` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_steps: steps of each restart.
        num_restarts: number of random starts.
        rho: share of rising iterations up to which a window counts as stalled.
        alpha: weight of the gradient step; the momentum has `1 - alpha`.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `1 + num_restarts` forward passes, `num_steps * num_restarts` gradients.

    Raises:
        ValueError: on an l1 ball, unusable inputs, or NaN logits.
    """
    norms.check(ball.norm)
    if ball.norm == "l1":
        raise ValueError("apgd handles linf and l2; use pgd for l1.")
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    context = _Context(problem, _windows(num_steps), *(jnp.asarray(value, problem.x.dtype) for value in (rho, alpha)))
    found, trace = driver.run(
        _METHOD, context, base.example_keys(key, problem.x, index), found, num_steps=num_steps,
        num_restarts=num_restarts, loop=loop,
    )
    return base.report(problem, found, trace)


def _windows(num_steps: int) -> Array:
    # Step i first evaluates what step i - 1 made, so a checkpoint after iteration c is acted upon in step c + 1.
    after = np.array([-1, *checkpoints(num_steps)])
    windows = np.zeros(num_steps + 1, np.int32)
    windows[after[1:] + 1] = np.diff(after)
    return jnp.asarray(windows[:num_steps])


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    ball, x = context.problem.ball, context.problem.x
    if ball.norm == "linf":
        draw = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype, -1.0))(keys)
    else:
        draw = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    unit = draw / norms.expand(norms.norm(draw, ball.norm), draw)
    point = ball.project(x + ball.radius(x) * unit, x)
    # By arithmetic: under jit, `zeros_like` forgets how an array is sharded over explicit axes (jax 0.11).
    still, lowest = point - point, jnp.minimum(found.best.loss, -jnp.inf)
    zero = norms.norm(still, "linf")
    peak = _Peak(point, still, lowest)
    return _State(point, point, 2.0 + zero, peak, lowest, zero == 0, lowest, zero.astype(jnp.int32), found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    ball, x = context.problem.ball, context.problem.x
    seen, gradient = base.value_and_gradient(context.problem, state.point)
    loss = seen.loss
    peak = base.choose(loss > state.peak.loss, _Peak(state.point, gradient, loss), state.peak)
    num_rises = state.num_rises + ((loss > state.last_loss) & (i > 0)).astype(jnp.int32)

    window = context.windows[i]
    is_check = window > 0
    has_stalled = num_rises.astype(x.dtype) <= context.rho * window.astype(x.dtype)
    is_halved = is_check & (has_stalled | (~state.was_halved & (state.peak_loss_at_check >= peak.loss)))
    share = jnp.where(is_halved, 0.5 * state.share, state.share)
    point, gradient = base.choose(is_halved, (peak.point, peak.gradient), (state.point, gradient))

    towards = base.ascend(ball, x, point, gradient, norms.expand(share, x) * ball.radius(x))
    alpha = jnp.where(i > 0, context.alpha, 1.0)
    moved = point + alpha * (towards - point) + (1.0 - alpha) * (point - state.previous)
    return _State(
        ball.project(moved, x), point, share, peak,
        jnp.where(is_check, peak.loss, state.peak_loss_at_check), jnp.where(is_check, is_halved, state.was_halved),
        loss, jnp.where(is_check, 0, num_rises), base.spend(state.found, seen, gradients=1),
    )


def _finish(context: _Context, state: _State) -> base.Found:
    return base.spend(state.found, base.evaluate(context.problem, state.point), forwards=1)


_METHOD = driver.Method(_start, _step, _finish)
