"""Fast adaptive boundary: steps onto the linearised decision boundary, drawn towards the clean input (FAB, FAB-T)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import goals, losses, norms
from rdx.attacks import base, driver, minimal
from rdx.attacks.hyperplane import project_onto_hyperplane
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn

# Secant steps of the final search.
_NUM_SEARCHES = 3
_AIM = 0.01


class _Data(NamedTuple):
    """What FAB keeps for each example."""

    classes: Array | None  # [B, n], the classes besides the label; None where a goal's loss is the only function
    clean_loss: Array  # [B]


class _Context(NamedTuple):
    problem: base.Problem
    alpha_max: Array
    eta: Array
    beta: Array
    num_gradients: Array  # of one restart


class _State(NamedTuple):
    point: Array
    classes: Array | None  # [B, n], whose boundaries this restart looks at
    found: base.Found


def fab(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_steps: int = 100, num_restarts: int = 1, alpha_max: ArrayLike = 0.1,
    eta: ArrayLike = 1.05, beta: ArrayLike = 0.9, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Projects iterate and clean input onto the nearest linearised boundary and mixes the two.

    With the hyperplane `f_j = 0` that is nearest to `x_k`, of the differences `f_j = z_j - z_y` linearised there, and
    the steps `d` and `d_0` that lead from `x_k` and from `x` onto it inside the box (`project_onto_hyperplane`):

        alpha = min(||d|| / (||d|| + ||d_0||), alpha_max)
        x_{k+1} = clip((1 - alpha) (x_k + eta d) + alpha (x + eta d_0))
        x_{k+1} <- (1 - beta) x + beta x_{k+1}         where x_{k+1} succeeds

    The first restart begins at `x`, the others at a random point at half the distance of the best success, or half of
    `ball.eps` if that is less. A final search moves the best success towards the boundary, by three secant steps
    between it and the clean input.

    Source: Croce & Hein (2020, arXiv:1907.02044, Algorithm 1). Differences: the boundary is the nearest one inside the
    box, where the paper leaves the box out of that choice; points that serve for gradients count as candidates, too;
    the radius of a random start shrinks with the best success, as in the paper (AutoAttack's code forgets it between
    restarts) and is 1/2 where neither that nor `ball.eps` is finite; a goal can be given.

    Args:
        key: one key; example `i` uses it folded with `index[i]`, restart `r` folds that with `r`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: norm, box, and the greatest radius that counts, which may be infinite.
        goal: whose loss is linearised instead of the differences; it must be positive where the goal is reached, as
            `losses.targeted_margin` is. By default any wrong class will do.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_steps: steps of each restart.
        num_restarts: number of restarts.
        alpha_max: greatest weight of the clean input's projection.
        eta: how far a step goes, in units of that onto the boundary.
        beta: what is left of the perturbation after a success.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found. 1 forward pass, 1 more without a
        goal and `num_steps + 3` for every restart; in every step a gradient for every wrong class, with a goal one.

    Raises:
        ValueError: on unusable inputs or NaN logits.
    """
    problem, clean = base.begin(logits_fn, x, labels, ball, goal or goals.misclassify(losses.margin))
    classes = minimal.other_classes(problem) if goal is None else None
    num_gradients = num_steps * (1 if classes is None else classes.shape[1])
    context = _context(problem, clean, classes, alpha_max, eta, beta, num_gradients)
    found = clean if classes is None else clean._replace(forwards=clean.forwards + 1)
    found, trace = driver.run(
        _ALL_CLASSES, context, base.example_keys(key, problem.x, index), found, num_steps=num_steps,
        num_restarts=num_restarts, loop=loop,
    )
    return base.report_nearest(problem, found, clean.best, trace)


def fab_targeted(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_steps: int = 100, num_restarts: int = 1, num_targets: int = 9,
    alpha_max: ArrayLike = 0.1, eta: ArrayLike = 1.05, beta: ArrayLike = 0.9, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Runs FAB towards the boundary of one class after the other, for a single gradient a step; see `fab`.

    The targets are the likeliest wrong classes of the clean input; any misclassification is a success.

    Source: Croce & Hein (2020, arXiv:1907.02044; for the targets 2020, arXiv:2003.01690). Differences: those of `fab`;
    the number of targets never exceeds that of wrong classes, where the released code fails.

    Args:
        key: one key; example `i` uses it folded with `index[i]`, restart `r` folds that with `r`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: norm, box, and the greatest radius that counts, which may be infinite.
        goal: what counts as success, and the loss that the final search reads; it must be positive where the goal is
            reached. Any misclassification by default. The steps do not depend on it.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_steps: steps towards each target.
        num_restarts: how many times all targets are gone through; the first time from `x`, then from random points.
        num_targets: number of targets, at least 1; all wrong classes if they are fewer.
        alpha_max: greatest weight of the clean input's projection.
        eta: how far a step goes, in units of that onto the boundary.
        beta: what is left of the perturbation after a success.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found. 2 forward passes and, for every
        target and restart, `num_steps` gradients and `num_steps + 3` forward passes.

    Raises:
        ValueError: on unusable inputs, NaN logits, or no targets.
    """
    if num_targets < 1:
        raise ValueError(f"num_targets={num_targets}: give at least 1.")
    problem, clean = base.begin(logits_fn, x, labels, ball, goal or goals.misclassify(losses.margin))
    classes = minimal.other_classes(problem)[:, :num_targets]
    context = _context(problem, clean, classes, alpha_max, eta, beta, num_steps)
    found, trace = driver.run(
        _ONE_CLASS, context, base.example_keys(key, problem.x, index), clean._replace(forwards=clean.forwards + 1),
        num_steps=num_steps, num_restarts=num_restarts * classes.shape[1], loop=loop,
    )
    return base.report_nearest(problem, found, clean.best, trace)


def _context(
    problem: base.Problem, clean: base.Found, classes: Array | None, alpha_max: ArrayLike, eta: ArrayLike,
    beta: ArrayLike, num_gradients: int,
) -> _Context:
    alpha_max, eta, beta = (jnp.asarray(number, problem.x.dtype) for number in (alpha_max, eta, beta))
    problem = problem._replace(data=_Data(classes, clean.best.loss))
    return _Context(problem, alpha_max, eta, beta, jnp.asarray(num_gradients))


def _restart(context: _Context, found: base.Found) -> Array:
    # The bill tells: whoever still takes part has paid for every restart in full.
    return found.gradients // context.num_gradients


def _start_with_all_classes(context: _Context, keys: Key, found: base.Found) -> _State:
    point = base.choose(_restart(context, found) == 0, context.problem.x, _random_point(context, keys, found))
    return _State(point, context.problem.data.classes, found)


def _start_with_one_class(context: _Context, keys: Key, found: base.Found) -> _State:
    classes, restart = context.problem.data.classes, _restart(context, found)
    num = classes.shape[1]
    point = base.choose(restart < num, context.problem.x, _random_point(context, keys, found))
    return _State(point, jnp.take_along_axis(classes, restart[:, None] % num, axis=1), found)


def _random_point(context: _Context, keys: Key, found: base.Found) -> Array:
    problem, x, ball = context.problem, context.problem.x, context.problem.ball
    if ball.norm == "linf":
        draw = jax.vmap(lambda key: jax.random.uniform(key, x.shape[1:], x.dtype, -1.0))(keys)
    else:
        draw = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    nearest = jnp.where(found.best.success, ball.distance(found.best.x, x), jnp.inf)
    radius = jnp.minimum(norms.expand(nearest, x), ball.radius(x))
    radius = 0.5 * jnp.where(jnp.isfinite(radius), radius, 1.0)
    return jnp.clip(x + radius * draw / norms.expand(norms.norm(draw, ball.norm), x), *minimal.limits(problem))


def _step(context: _Context, state: _State, i: Array) -> _State:
    del i
    problem, x, ball = context.problem, context.problem.x, context.problem.ball
    low, high = minimal.limits(problem)
    seen, linear = minimal.linearise(problem, state.point, state.classes)
    found = minimal.spend(problem, state.found, seen, gradients=linear.values.shape[1])
    nearest, w, b = minimal.nearest_boundary(problem, state.point, linear)
    step = nearest - state.point
    step_from_clean = project_onto_hyperplane(x, w, b, low, high, ball.norm) - x
    length, length_from_clean = norms.norm(step, ball.norm), norms.norm(step_from_clean, ball.norm)
    whole = length + length_from_clean
    alpha = jnp.minimum(length / jnp.where(whole > 0, whole, 1.0), context.alpha_max)
    alpha = norms.expand(alpha, x)
    moved = (1.0 - alpha) * (state.point + context.eta * step) + alpha * (x + context.eta * step_from_clean)

    reached = base.evaluate(problem, jnp.clip(moved, low, high))
    back = (1.0 - context.beta) * x + context.beta * reached.x
    point = base.choose(reached.success, back, reached.x)
    return _State(point, state.classes, minimal.spend(problem, found, reached, forwards=1))


def _finish(context: _Context, state: _State) -> base.Found:
    """Searches the zero of the loss between the clean input and the best success.

    It aims at a hundredth of the success's loss, not at 0, where rounding decides and often ends on the wrong side.
    """
    problem, found = context.problem, state.found
    inside, inside_loss = problem.x, problem.data.clean_loss
    for _ in range(_NUM_SEARCHES):
        outside = found.best
        share = (inside_loss - _AIM * outside.loss) / (inside_loss - outside.loss)
        share = norms.expand(jnp.where((share > 0) & (share < 1), share, 1.0), inside)
        seen = base.evaluate(problem, (1.0 - share) * inside + share * outside.x)
        found = minimal.spend(problem, found, seen, forwards=1)
        inside, inside_loss = base.choose(seen.success, (inside, inside_loss), (seen.x, seen.loss))
    return found


_ALL_CLASSES = driver.Method(_start_with_all_classes, _step, _finish, minimal.is_within)
_ONE_CLASS = driver.Method(_start_with_one_class, _step, _finish, minimal.is_within)
