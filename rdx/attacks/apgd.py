"""Auto-PGD: projected gradient descent that chooses its own step sizes (Croce & Hein 2020, arXiv:2003.01690)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx import norms
from rdx.attacks import apgd_l1, base, driver
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn, Norm, PyTree

# Stages of a search that comes from outside: radii in units of eps, and their shares of the steps in tenths.
_LARGER_RADII = ((3, 3), (2, 3), (1, 4))


class Schedule(NamedTuple):
    """What happens at each of the search's `T` evaluations, for all examples alike; one more entry stands for its end.

    Attributes:
        window: length of the window that the evaluation closes, 0 where it closes none. Shape `[T + 1]`, int32.
        is_first: whether a stage begins. Shape `[T + 1]`, bool.
        radius: the stage's radius in units of eps, shape `[T + 1]`; None where there is a single stage.
    """

    window: Array
    is_first: Array
    radius: Array | None

    @property
    def num_steps(self) -> int:
        """Counts the evaluations, `T`."""
        return len(self.window) - 1


class Context(NamedTuple):
    """What stays fixed during a search."""

    problem: base.Problem
    climbed: Partial  # the loss to climb, `(output, labels, *aim) -> [B]`; what counts is the problem's goal
    schedule: Schedule
    rho: Array
    alpha: Array


class _Peak(NamedTuple):
    """The point of greatest loss in this stage, where the search returns to."""

    point: Array
    gradient: Array
    loss: Array


class _Progress(NamedTuple):
    """What the search in linf and l2 remembers from one checkpoint to the next, all `[B]`."""

    num_rises: Array
    last_loss: Array
    peak_loss: Array
    was_halved: Array


class State(NamedTuple):
    """What a search carries from step to step."""

    point: Array
    previous: Array
    share: Array  # [B]: step size in units of the radius
    peak: _Peak
    memory: _Progress | apgd_l1.Sparsity
    aim: PyTree
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
    index: ArrayLike | None = None, num_steps: int = 100, num_restarts: int = 1, rho: ArrayLike | None = None,
    alpha: ArrayLike | None = None, larger_radii: bool = False, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs the loss with steps that shrink, and a return to the peak, where progress stalls.

    linf and l2: `z = P(x_k + s * u(grad loss(x_k)))`, `x_{k+1} = P(x_k + alpha (z - x_k) + (1 - alpha) (x_k -
    x_{k-1}))`, starting on the ball's surface with `s = 2 eps`. After each of `checkpoints(num_steps)`, `s` is halved
    and the search resumes at the point of greatest loss where (1) at most `rho` of the window's iterations raised the
    loss, or (2) the step size was kept at the last checkpoint and the greatest loss has not risen since.

    l1: `x_{k+1} = P(x_k + s * sign(g_k) / m)` on the `m` largest elements of the gradient `g_k`, from Gaussian noise
    projected, with `s = eps` and a fifth of the elements. Every `0.04 n` iterations `m` becomes two thirds of the
    number of elements in which the point of greatest loss differs from `x`; where that number fell below 95 % of what
    it was, the search resumes there with `s = eps`, elsewhere `s` falls by 1.5, down to `eps / 10`. That is made for
    images: with few elements, or a radius that one of them exhausts, `pgd` finds more, because `m` counts elements that
    the box holds back and, rounded up, never falls from two to one.

    With `goals.misclassify(losses.dlr)` it is APGD-DLR, by default APGD-CE.

    Source: Croce & Hein (2020, arXiv:2003.01690, Algorithm 1); for l1 Croce & Hein (2021, arXiv:2103.01208, Algorithm
    1). Where paper and released code differ: the threshold of (1) is inclusive and (2) cannot hold at the first
    checkpoint, as in the code. The first window counts the rise from the starting point, as in the paper (the code
    compares with a row of zeros, so that any positive loss counts as a rise). `P` projects onto the intersection of
    ball and box, as in the papers (the code's l2 attack rescales, then clips). The support in l1 is exact (the code
    also counts elements that its rounding leaves off the clean value). The last iterate costs a forward pass only,
    where the code computes a gradient that it never uses. Returned is the successful input of greatest loss, not the
    last one.

    Args:
        key: one key; example `i` uses it folded with `index[i]`, restart `r` folds that with `r`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        goal: what is maximised and what counts as success; `goals.misclassify()` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_steps: steps of each restart.
        num_restarts: number of random starts.
        rho: share of rising iterations up to which a window counts as stalled, 0.75 by default; not for l1.
        alpha: weight of the gradient step, 0.75 by default; the momentum has `1 - alpha`; not for l1.
        larger_radii: whether to come from outside: 0.3 of the steps (rounded up) at radius `3 eps`, as many at `2 eps`
            and the rest at `eps`, each stage from the projected peak of the last (2021, Sec. 3.3). Only points of the
            last stage count.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `1 + num_restarts` forward passes, `num_steps * num_restarts` gradients, with
        `larger_radii` two more gradients a restart, of the first points of the later stages.

    Raises:
        ValueError: on unusable inputs or options, or NaN logits.
    """
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    context = prepare(problem, problem.goal.loss_fn, num_steps, rho=rho, alpha=alpha, larger_radii=larger_radii)
    found, trace = driver.run(
        _METHOD, context, base.example_keys(key, problem.x, index), found, num_steps=context.schedule.num_steps,
        num_restarts=num_restarts, loop=loop,
    )
    return base.report(problem, found, trace)


def prepare(
    problem: base.Problem, climbed: Partial, num_steps: int, *, rho: ArrayLike | None = None,
    alpha: ArrayLike | None = None, larger_radii: bool = False,
) -> Context:
    """Builds the context of a search; see `apgd` for the arguments and errors."""
    if problem.ball.norm == "l1" and not (rho is None and alpha is None):
        raise ValueError("Auto-PGD for l1 has no momentum and adapts to the support: leave out rho and alpha.")
    shares = (jnp.asarray(0.75 if value is None else value, problem.x.dtype) for value in (rho, alpha))
    return Context(problem, climbed, _schedule(num_steps, problem.ball.norm, larger_radii=larger_radii), *shares)


def _schedule(num_steps: int, norm: Norm, *, larger_radii: bool) -> Schedule:
    if num_steps < (5 if larger_radii else 1):
        raise ValueError(f"num_steps={num_steps} must be at least 1, and 5 with larger_radii.")
    *lengths, _ = [-(-tenths * num_steps // 10) for _, tenths in _LARGER_RADII] if larger_radii else [num_steps]
    lengths, windows, radii = [*lengths, num_steps - sum(lengths)], [], []
    for (radius, _), length in zip(_LARGER_RADII[-len(lengths):], lengths, strict=True):
        after = np.array([-1, *(apgd_l1.checkpoints if norm == "l1" else checkpoints)(length)])
        window = np.zeros(length + 1, np.int32)
        # Evaluation j of a stage is of what iteration j - 1 made: it acts upon a checkpoint after that iteration.
        window[after[1:] + 1] = np.diff(after)
        windows.append(window)
        radii.append(np.full(length + 1, float(radius)))
    is_first = np.concatenate([np.arange(len(window)) == 0 for window in windows])
    staged = jnp.asarray(np.concatenate(radii)) if larger_radii else None
    return Schedule(jnp.asarray(np.concatenate(windows)), jnp.asarray(is_first), staged)


def start(context: Context, keys: Key, found: base.Found, aim: PyTree) -> State:
    """Begins a restart at a random point of the first stage's ball, climbing the loss with `aim` as its data."""
    x = context.problem.x
    if context.problem.ball.norm == "linf":
        noise = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype, -1.0))(keys)
    else:
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    return start_from(context, noise, found, aim)


def start_from(context: Context, noise: Array, found: base.Found, aim: PyTree) -> State:
    """Begins a restart at noise `[B, ...]` that is scaled to the ball's surface, or in l1 projected onto the ball."""
    ball, x = _ball_at(context, 0), context.problem.x
    if ball.norm == "l1":
        return _enter(ball, x, ball.project(x + noise, x), found, aim, is_warm=context.schedule.radius is not None)
    unit = noise / norms.expand(norms.norm(noise, ball.norm), noise)
    return _enter(ball, x, ball.project(x + ball.radius(x) * unit, x), found, aim, is_warm=False)


def _enter(ball: Ball, x: Array, point: Array, found: base.Found, aim: PyTree, *, is_warm: bool) -> State:
    # By arithmetic: under jit, `zeros_like` forgets how an array is sharded over explicit axes (jax 0.11).
    still = point - point
    zero = norms.norm(still, "linf")
    peak = _Peak(point, still, zero - jnp.inf)
    if ball.norm == "l1":
        return State(point, point, 1.0 + zero, peak, apgd_l1.begin(point, x, is_warm=is_warm), aim, found)
    memory = _Progress(zero.astype(jnp.int32), zero + jnp.inf, zero - jnp.inf, zero == 0)
    return State(point, point, 2.0 + zero, peak, memory, aim, found)


def step(context: Context, state: State, i: Array) -> State:
    """Evaluates the point that the last step made, checks the progress, and moves."""
    ball, x = _ball_at(context, i), context.problem.x
    seen, loss, gradient = _look(context, state)
    found = base.spend(state.found, _if_inside(context, seen, i), gradients=1)
    peak = base.choose(loss > state.peak.loss, _Peak(state.point, gradient, loss), state.peak)
    memory, share, returns = _check(context, state, peak, loss, i)
    point, gradient = base.choose(returns, (peak.point, peak.gradient), (state.point, gradient))
    if isinstance(memory, apgd_l1.Sparsity):
        moved = apgd_l1.ascend(ball, x, point, gradient, share, memory.num_moved)
    else:
        towards = base.ascend(ball, x, point, gradient, norms.expand(share, x) * ball.radius(x))
        alpha = jnp.where(context.schedule.is_first[i], 1.0, context.alpha)
        moved = ball.project(point + alpha * (towards - point) + (1.0 - alpha) * (point - state.previous), x)
    state = State(moved, point, share, peak, memory, state.aim, found)
    return state if context.schedule.radius is None else _change_stage(context, state, i)


def _ball_at(context: Context, i: ArrayLike) -> Ball:
    ball, radius = context.problem.ball, context.schedule.radius
    if radius is None:
        return ball
    return dataclasses.replace(ball, eps=radius[i].astype(context.problem.x.dtype) * ball.eps)


def _look(context: Context, state: State) -> tuple[base.Candidate, Array, Array]:
    """Computes what counts at the point, and the climbed loss with its gradient."""
    logits_fn, goal, labels = context.problem.logits_fn, context.problem.goal, context.problem.labels

    def total(point: Array) -> tuple[Array, tuple[base.Candidate, Array]]:
        output = logits_fn(point)
        loss = context.climbed(output, labels, *state.aim)
        return loss.sum(), (base.Candidate(point, goal.success(output, labels), goal.loss(output, labels)), loss)

    (_, (seen, loss)), gradient = jax.value_and_grad(total, has_aux=True)(state.point)
    return seen, loss, jnp.where(jnp.isfinite(gradient), gradient, 0.0)


def _if_inside(context: Context, seen: base.Candidate, i: Array) -> base.Candidate:
    """Makes sure that points of the larger balls are never the best."""
    if context.schedule.radius is None:
        return seen
    is_inside = context.schedule.radius[i] == 1.0
    return seen._replace(success=seen.success & is_inside, loss=jnp.where(is_inside, seen.loss, -jnp.inf))


def _check(
    context: Context, state: State, peak: _Peak, loss: Array, i: Array
) -> tuple[_Progress | apgd_l1.Sparsity, Array, Array]:
    """Checks the progress at checkpoints: the new memory and step size, and where the search returns to the peak."""
    window, x, memory = context.schedule.window[i], context.problem.x, state.memory
    is_check = window > 0
    if isinstance(memory, apgd_l1.Sparsity):
        checked, share, returns = apgd_l1.check(memory, state.share, peak.point, x)
    else:
        num_rises = memory.num_rises + (loss > memory.last_loss).astype(jnp.int32)
        has_stalled = num_rises.astype(x.dtype) <= context.rho * window.astype(x.dtype)
        returns = has_stalled | (~memory.was_halved & (memory.peak_loss >= peak.loss))
        share = jnp.where(returns, 0.5 * state.share, state.share)
        memory = memory._replace(num_rises=num_rises, last_loss=loss)
        checked = _Progress(0 * num_rises, loss, peak.loss, returns)
    new, old = (checked, share), (memory, state.share)
    memory, share = jax.tree.map(lambda a, b: jnp.where(is_check, a, b), new, old)
    return memory, share, is_check & returns


def _change_stage(context: Context, state: State, i: Array) -> State:
    """Begins the next stage at the projected peak where this one ends."""
    x = context.problem.x
    ball = _ball_at(context, i + 1)
    fresh = _enter(ball, x, ball.project(state.peak.point, x), state.found, state.aim, is_warm=True)
    return jax.tree.map(lambda new, old: jnp.where(context.schedule.is_first[i + 1], new, old), fresh, state)


def _start(context: Context, keys: Key, found: base.Found) -> State:
    return start(context, keys, found, context.problem.goal.data)


_METHOD = driver.Method(_start, step, base.evaluate_last)
