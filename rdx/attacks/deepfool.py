"""DeepFool: steps onto the nearest of the linearised decision boundaries (Moosavi-Dezfooli et al. 2016)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import goals, losses
from rdx.attacks import base, driver, minimal
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem  # its data are the classes whose boundaries are looked at, None for the goal's loss
    overshoot: Array


class _State(NamedTuple):
    total: Array  # the sum of all steps
    found: base.Found


def deepfool(
    logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    num_steps: int = 50, overshoot: ArrayLike = 0.02, num_candidates: int | None = None,
    loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Walks from boundary to boundary of the linearised model until the goal is reached.

    At `x_k = clip(x + (1 + overshoot) r_k)` every difference `f_j = z_j - z_y` is linearised, and `r_{k+1} = r_k + d`
    with the smallest `d` that leads onto one of the hyperplanes `f_j = 0` inside the box. Without a box that is
    `|f| / ||w||_2^2 * w` for l2, `|f| / ||w||_1 * sign(w)` for linf and, for l1, `|f| / |w_i|` on the one element of
    greatest `|w_i|`, for the `j` of smallest `|f_j| / ||w_j||_q` in the dual norm.

    Source: Moosavi-Dezfooli et al. (2016, arXiv:1511.04599, Algorithm 2 and Sec. 3.3). As in the authors' code the
    model is linearised, and success judged, where the total perturbation has its overshoot, and the first success is
    the result. Differences: the box is part of every step, where the paper has none; elements of radius 0 stay; a goal
    can be given. The code of Dong et al. (2020, ARES) steps by `|f| / ||w||_2 * sign(w)` in linf, which is too far by
    up to `sqrt(d)`.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: norm, box, and the greatest radius that counts, which may be infinite.
        goal: whose loss is linearised instead of the differences; it must be positive where the goal is reached, as
            `losses.targeted_margin` is. By default any wrong class will do.
        num_steps: greatest number of steps.
        overshoot: how much farther than onto the boundary the perturbation goes, relatively.
        num_candidates: how many classes are looked at, the likeliest ones of the clean input; by default all.
        loop: see `rdx.attacks.driver.Loop`; examples stop at success.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found. 1 forward pass, 1 more without a
        goal and 1 at the end if there is no success before; and in every step until then a gradient for every class
        that is looked at.

    Raises:
        ValueError: on unusable inputs, NaN logits, or no candidates or candidates for a goal.
    """
    if num_candidates is not None and (goal is not None or num_candidates < 1):
        raise ValueError(f"num_candidates={num_candidates}: give at least 1 wrong class to look at, and no goal.")
    problem, clean = base.begin(logits_fn, x, labels, ball, goal or goals.misclassify(losses.margin))
    classes = minimal.other_classes(problem)[:, :num_candidates] if goal is None else None
    found = clean if classes is None else clean._replace(forwards=clean.forwards + 1)
    context = _Context(problem._replace(data=classes), jnp.asarray(overshoot, problem.x.dtype))
    keys = base.example_keys(jax.random.key(0), problem.x)
    found, trace = driver.run(_METHOD, context, keys, found, num_steps=num_steps, stops=True, loop=loop)
    return base.report_nearest(problem, found, clean.best, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    del keys
    return _State(context.problem.x - context.problem.x, found)


def _point(context: _Context, total: Array) -> Array:
    return jnp.clip(context.problem.x + (1.0 + context.overshoot) * total, *minimal.limits(context.problem))


def _step(context: _Context, state: _State, i: Array) -> _State:
    del i
    problem, point = context.problem, _point(context, state.total)
    seen, linear = minimal.linearise(problem, point, problem.data)
    found = minimal.spend(problem, state.found, seen, gradients=linear.values.shape[1])
    nearest, _, _ = minimal.nearest_boundary(problem, point, linear)
    return _State(state.total + nearest - point, found)


def _finish(context: _Context, state: _State) -> base.Found:
    seen = base.evaluate(context.problem, _point(context, state.total))
    return minimal.spend(context.problem, state.found, seen, forwards=1)


_METHOD = driver.Method(_start, _step, _finish)
