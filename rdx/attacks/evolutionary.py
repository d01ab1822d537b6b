"""The evolutionary attack: a random search that learns along which pixels the boundary recedes (Dong et al. 2019)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import goals, losses, norms
from rdx.attacks import base, decision, driver, estimate, minimal
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn

# The step towards the clean input adapts whenever so many mutations have been tried.
_WINDOW = 30


class _Context(NamedTuple):
    problem: base.Problem  # its data is the given start
    step: Array
    spread: Array
    decay: Array
    rate: Array
    grid: Array  # only its shape counts: that of one example's mutation


class _State(NamedTuple):
    point: Array
    path: Array  # [B, *grid], of the successful mutations
    variance: Array  # [B, *grid]
    step: Array  # [B], mu
    num_tried: Array  # [B], since the step adapted
    num_kept: Array  # [B]
    keys: Key
    found: base.Found


def evolutionary(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_queries: int = 20_000, start: ArrayLike | None = None,
    step: ArrayLike = 1e-2, spread: ArrayLike = 3e-2, decay: ArrayLike = 0.99, rate: ArrayLike = 1e-3,
    resolution: tuple[int, int] | None = None, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Mutates an adversarial input and moves it towards `x`, keeping what stays adversarial.

    With the offset `d = x - x_k`, a mutation `z ~ N(0, C)` on `N / 20` of the `N` elements, drawn without replacement
    with probabilities proportional to the diagonal covariance `C`, is kept if it succeeds:

        v = x_k + mu d + sigma ||d|| z / ||z||
        x_{k+1} = x - (1 - mu) ||d|| (x - v) / ||x - v||,  clipped to the box
        p = decay p + sqrt(1 - decay^2) z,  C = (1 - rate) C + rate p^2

    and `mu` is multiplied by `exp(P - 1/5)` after every 30 mutations, of which the share `P` was kept. Only success is
    seen, no loss.

    Source: Dong et al. (2019, arXiv:1904.04433, Algorithm 1); the projection back to the sphere, `1/5` and the window
    of 30 as in RealSafe (Dong et al. 2020, arXiv:1912.11852). Differences: at least one element mutates; the nearest
    success is returned, which the clipped last one need not be.

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
        step: `mu` at first, the share of the way to `x`.
        spread: `sigma`, length of a mutation relative to the distance from `x`.
        decay: of the evolution path.
        rate: at which the covariance learns.
        resolution: height and width at which images `[B, H, W, C]` are mutated, upsampled bilinearly (Sec. 3.3); that
            of the images by default.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found. `num_queries` forward passes.

    Raises:
        ValueError: on a norm other than l2, too small a budget, a start or resolution that does not fit, unusable
            inputs, or NaN logits.
    """
    if ball.norm != "l2":
        raise ValueError(f"evolutionary minimises the l2 norm, not {ball.norm}: use hopskipjump.")
    problem, clean = base.begin(logits_fn, x, labels, ball, goal or goals.misclassify(losses.margin))
    problem, num_steps = decision.begin(problem, start, num_queries)
    shape = problem.x.shape[1:]
    if resolution is not None:
        if len(shape) != 3:
            raise ValueError(f"resolution={resolution} is for images [B, H, W, C], not for inputs {problem.x.shape}.")
        shape = (*resolution, shape[2])
    step, spread, decay, rate = (jnp.asarray(number, problem.x.dtype) for number in (step, spread, decay, rate))
    context = _Context(problem, step, spread, decay, rate, jnp.zeros(shape))
    keys = base.example_keys(key, problem.x, index)
    found, trace = driver.run(_METHOD, context, keys, clean, num_steps=num_steps, loop=loop)
    return base.report_nearest(problem, found, clean.best, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    found = decision.find_start(base.fold(keys, 0), context.problem, found)
    # By arithmetic, which keeps how an array is sharded.
    zeros = norms.linf(found.best.x - found.best.x)
    path = norms.expand(zeros, context.grid[None]) + jnp.zeros_like(context.grid, found.best.x.dtype)[None]
    return _State(found.best.x, path, 1.0 + path, context.step + zeros, zeros, zeros, base.fold(keys, 1), found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem, x = context.problem, context.problem.x
    mutation = _mutate(base.fold(state.keys, i), state.variance)
    offset, resized = x - state.point, jax.image.resize(mutation, x.shape, "bilinear")
    length = context.spread * norms.l2(offset)
    moved = state.point + norms.expand(state.step, x) * offset + norms.expand(length, x) * estimate.unit(resized)
    radius = (1.0 - state.step) * norms.l2(offset)
    returned = x - norms.expand(radius, x) * estimate.unit(x - moved)
    seen = base.evaluate(problem, decision.into_box(problem, returned))
    path = context.decay * state.path + jnp.sqrt(1.0 - jnp.square(context.decay)) * mutation
    variance = (1.0 - context.rate) * state.variance + context.rate * jnp.square(path)
    point, path, variance = base.choose(
        seen.success, (seen.x, path, variance), (state.point, state.path, state.variance)
    )
    step, num_tried, num_kept = _adapt(state, seen.success)
    found = minimal.spend(problem, state.found, seen, forwards=1)
    return _State(point, path, variance, step, num_tried, num_kept, state.keys, found)


def _mutate(keys: Key, variance: Array) -> Array:
    """Draws mutations on elements that win a lottery: the greatest sums of log-probabilities and Gumbel noise."""
    shape, dtype = variance.shape[1:], variance.dtype
    gumbel = base.draw(base.fold(keys, 0), jax.random.gumbel, shape, dtype)
    normal = base.draw(base.fold(keys, 1), jax.random.normal, shape, dtype)
    tickets = jnp.log(variance) + gumbel
    flat = norms.flatten(tickets)
    last = jax.lax.top_k(flat, max(1, flat.shape[1] // 20))[0][:, -1]
    return jnp.where(tickets >= norms.expand(last, tickets), jnp.sqrt(variance) * normal, 0.0)


def _adapt(state: _State, success: Array) -> tuple[Array, Array, Array]:
    num_tried, num_kept = state.num_tried + 1.0, state.num_kept + success.astype(state.num_kept.dtype)
    is_over = num_tried >= _WINDOW
    step = jnp.where(is_over, state.step * jnp.exp(num_kept / _WINDOW - 0.2), state.step)
    return step, jnp.where(is_over, 0.0, num_tried), jnp.where(is_over, 0.0, num_kept)


_METHOD = driver.Method(_start, _step, done=minimal.is_within)
