"""The boundary attack: a random walk along the decision boundary towards the clean input (Brendel et al. 2018)."""

from typing import NamedTuple

import jax.numpy as jnp

from rdx import goals, losses, norms
from rdx.attacks import base, decision, driver, estimate, minimal
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn

# Every tenth step is a test: the spherical candidates are queried, too, and the outcomes enter the windows.
_TEST_EVERY = 10
# Outcomes in the windows of spherical and of whole steps with the published budget, with less as many windows, but
# not so short that a share of them is all chance.
_BUDGET, _SPHERICAL_WINDOW, _SOURCE_WINDOW, _LEAST = 20_000, 100, 30, 10
# Shares of successes above which steps grow and below which they shrink.
_HIGH, _LOW = 0.5, 0.2


class _Window(NamedTuple):
    """The latest outcomes, the last one first; None has been seen where there are fewer."""

    outcomes: Array  # [B, n], 1 for success, 0 for failure
    num: Array  # [B], how many were seen, at most n


class _Sizes(NamedTuple):
    """Lengths of steps relative to the distance from the clean input."""

    spherical: Array  # [B], around it
    source: Array  # [B], towards it


class _Context(NamedTuple):
    problem: base.Problem  # its data is the given start
    sizes: _Sizes
    adaptation: Array
    num_directions: Array
    windows: tuple[Array, Array]  # spherical and source, of which only the shapes count


class _State(NamedTuple):
    point: Array
    waiting: Array  # the candidate whose spherical one has just succeeded
    is_waiting: Array  # [B], whether there is one
    steps: Array  # [B], steps finished
    tries: Array  # [B], directions tried in this step
    sizes: _Sizes
    spherical: _Window
    source: _Window
    keys: Key
    found: base.Found


def boundary(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_queries: int = 20_000, start: ArrayLike | None = None,
    num_directions: ArrayLike = 25, spherical_step: ArrayLike = 1e-2, source_step: ArrayLike = 1e-2,
    step_adaptation: ArrayLike = 1.5, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Walks along the boundary by small random steps around `x` and towards it, keeping those that stay adversarial.

    With the offset `d = x - x_k`, its length `r` and a normal direction orthogonal to `d`, scaled to `eta` of length
    `spherical_step * r`, the candidates are, each clipped to the box,

        s = x + (eta - d) / sqrt(1 + spherical_step^2)
        v = s + max(0, source_step * r + ||x - s|| - r) (x - s) / ||x - s||

    A step tries `num_directions` directions until a `v` succeeds, which becomes `x_{k+1}`. In every tenth step `v` is
    tried only where `s` succeeds, and the outcomes adapt the steps: of the last 100 `s` more than half (less than a
    fifth) succeeding, both steps grow (shrink) by the factor `step_adaptation`; of the last 30 `v`, `source_step`.
    Whatever made steps change is forgotten. Only success is seen, no loss.

    Source: Brendel et al. (2018, arXiv:1712.04248, Algorithm 1); numbers and windows as in RealSafe (Dong et al. 2020,
    arXiv:1912.11852) and the authors' code. Differences: the nearest success is returned, which the clipped last one
    need not be; the walk does not stop at convergence. One step of the driver is one query of every example.

    The published windows of 100 and 30 outcomes, which the paper leaves open, are made for 20,000 queries: in 2,000
    they adapt a step a few times at most. So with less than 20,000 queries they are shorter in proportion, down to 10
    outcomes. On linear classifiers of 12 dimensions 2,000 queries then end 1.01 to 1.27 times the least norm away,
    averaged over examples, 1.06 over 24 settings and keys; 1.26 to 1.94, and 1.42, with the published windows.

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
        num_directions: directions tried in a step at most.
        spherical_step: length of the step around `x` at first, relative to the distance.
        source_step: length of the step towards `x` at first, relative to the distance.
        step_adaptation: factor by which they change.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found. `num_queries` forward passes.

    Raises:
        ValueError: on a norm other than l2, too small a budget, a start that does not fit, unusable inputs, or NaN
            logits.
    """
    if ball.norm != "l2":
        raise ValueError(f"boundary minimises the l2 norm, not {ball.norm}: use hopskipjump.")
    problem, clean = base.begin(logits_fn, x, labels, ball, goal or goals.misclassify(losses.margin))
    problem, num_steps = decision.begin(problem, start, num_queries)
    spherical, source, adaptation = (
        jnp.asarray(number, problem.x.dtype) for number in (spherical_step, source_step, step_adaptation)
    )
    directions = jnp.asarray(num_directions, jnp.int32)
    windows = _window(_SPHERICAL_WINDOW, num_queries), _window(_SOURCE_WINDOW, num_queries)
    context = _Context(problem, _Sizes(spherical, source), adaptation, directions, windows)
    keys = base.example_keys(key, problem.x, index)
    found, trace = driver.run(_METHOD, context, keys, clean, num_steps=num_steps, loop=loop)
    return base.report_nearest(problem, found, clean.best, trace)


def _window(size: int, num_queries: int) -> Array:
    return jnp.zeros(max(min(size, size * num_queries // _BUDGET), _LEAST))


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    found = decision.find_start(base.fold(keys, 0), context.problem, found)
    point = found.best.x
    # By arithmetic, which keeps how an array is sharded.
    zeros, none = norms.linf(point - point), 0 * found.forwards
    sizes = _Sizes(*(size + zeros for size in context.sizes))
    spherical, source = (
        _Window(jnp.repeat(zeros[:, None], window.size, axis=1), none) for window in context.windows
    )
    return _State(point, point, none > 0, none, none, sizes, spherical, source, base.fold(keys, 1), found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem = context.problem
    spherical, candidate = _propose(problem, state, base.fold(state.keys, i))
    is_test = state.steps % _TEST_EVERY == _TEST_EVERY - 1
    is_spherical = is_test & ~state.is_waiting
    probe = base.choose(is_spherical, spherical, base.choose(state.is_waiting, state.waiting, candidate))
    seen = base.evaluate(problem, probe)
    is_accepted = seen.success & ~is_spherical
    point = base.choose(is_accepted, seen.x, state.point)

    tries = state.tries + (~seen.success).astype(state.tries.dtype)
    is_over = is_accepted | (tries >= context.num_directions)
    steps, tries = state.steps + is_over.astype(state.steps.dtype), jnp.where(is_over, 0, tries)
    windows = _push(state.spherical, seen.success, is_spherical), _push(state.source, seen.success, state.is_waiting)
    sizes, spherical_window, source_window = _adapt(context, state.sizes, is_over, *windows)
    is_waiting = seen.success & is_spherical
    found = minimal.spend(problem, state.found, seen, forwards=1)
    return _State(
        point, candidate, is_waiting, steps, tries, sizes, spherical_window, source_window, state.keys, found
    )


def _propose(problem: base.Problem, state: _State, keys: Key) -> tuple[Array, Array]:
    """Draws a spherical candidate and the one that is nearer to the clean input."""
    x = problem.x
    offset, drawn = x - state.point, estimate.directions(keys, problem, 1)[:, 0]
    distance = norms.l2(offset)
    toward = estimate.unit(offset)
    around = estimate.unit(drawn - norms.expand(norms.flatten(drawn * toward).sum(axis=1), x) * toward)
    moved = norms.expand(state.sizes.spherical * distance, x) * around - offset
    shrink = 1.0 / jnp.sqrt(1.0 + jnp.square(state.sizes.spherical))
    spherical = decision.into_box(problem, x + norms.expand(shrink, x) * moved)
    offset = x - spherical
    length = jnp.maximum(0.0, state.sizes.source * distance + norms.l2(offset) - distance)
    return spherical, decision.into_box(problem, spherical + norms.expand(length, x) * estimate.unit(offset))


def _push(window: _Window, outcome: Array, where: Array) -> _Window:
    outcome = outcome.astype(window.outcomes.dtype)
    size = window.outcomes.shape[1]
    pushed = jnp.concatenate([outcome[:, None], window.outcomes[:, :-1]], axis=1)
    return base.choose(where, _Window(pushed, jnp.minimum(window.num + 1, size)), window)


def _adapt(
    context: _Context, sizes: _Sizes, where: Array, spherical: _Window, source: _Window
) -> tuple[_Sizes, _Window, _Window]:
    """Changes the sizes of steps of the examples named by `where [B]`, once both windows are full."""
    is_due = where & (spherical.num == spherical.outcomes.shape[1]) & (source.num == source.outcomes.shape[1])
    (both, spherical), (alone, source) = (_factor(context, window, is_due) for window in (spherical, source))
    return _Sizes(sizes.spherical * both, sizes.source * both * alone), spherical, source


def _factor(context: _Context, window: _Window, where: Array) -> tuple[Array, _Window]:
    """Says by what a window changes step sizes, shape `[B]`; what does is forgotten."""
    share = window.outcomes.mean(axis=1)
    grows, shrinks = where & (share > _HIGH), where & (share < _LOW)
    factor = jnp.where(grows, context.adaptation, jnp.where(shrinks, 1.0 / context.adaptation, 1.0))
    return factor, window._replace(num=jnp.where(grows | shrinks, 0, window.num))


_METHOD = driver.Method(_start, _step, done=minimal.is_within)
