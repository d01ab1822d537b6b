"""Targeted Auto-PGD: one search towards each likely class, for any misclassification (arXiv:2003.01690)."""

import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses
from rdx.attacks import base, driver, minimal
from rdx.attacks.apgd import Context, State, prepare, start, step
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import ArrayLike, AttackResult, Key, LogitsFn


def apgd_targeted(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, num_targets: int = 9, num_steps: int = 100, num_restarts: int = 1,
    rho: ArrayLike | None = None, alpha: ArrayLike | None = None, larger_radii: bool = False,
    loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs the targeted DLR loss by Auto-PGD towards one likely class after the other.

    The targets are the `min(num_targets, K - 1)` classes of greatest clean logit but the label. Each has a random start
    of its own and meets the examples that still stand. What counts is the goal: with the default one any wrong label.
    The loss is `losses.targeted_dlr`, with fewer than four classes the difference of logits.

    Source: Croce & Hein (2020, arXiv:2003.01690, Eq. 7 and Sec. 4), APGD-T. The released code computes the ranking anew
    for every target and needs more classes than targets. See `apgd` for the search and its differences.

    Args:
        key: one key; example `i` uses it folded with `index[i]`, the search towards the target of rank `r` folds that
            with `r`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        goal: what counts as success, and the loss that orders what fails; `goals.misclassify()` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        num_targets: number of targets.
        num_steps: steps towards each target.
        num_restarts: random starts for each target; all targets have their turn before the next.
        rho: see `apgd`.
        alpha: see `apgd`.
        larger_radii: see `apgd`.
        loop: see `rdx.attacks.driver.Loop`; by default examples stop at success.

    Returns:
        The attack's result: two forward passes, and for every search one more and `num_steps` gradients (two more with
        `larger_radii`), until the goal is reached.

    Raises:
        ValueError: on unusable inputs or options, NaN logits, or a model whose output is not a matrix of logits.
    """
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    if num_targets < 1 or num_restarts < 1:
        raise ValueError(f"num_targets={num_targets} and num_restarts={num_restarts} must both be at least 1.")
    targets = minimal.other_classes(problem)[:, :num_targets]
    context = prepare(
        problem._replace(data=targets), Partial(losses.targeted_dlr), num_steps, rho=rho, alpha=alpha,
        larger_radii=larger_radii,
    )
    # The clean logits were computed twice; no search has been made yet.
    found = found._replace(forwards=found.forwards + 1, memory=0 * found.forwards)
    found, trace = driver.run(
        _METHOD, context, base.example_keys(key, problem.x, index), found, num_steps=context.schedule.num_steps,
        num_restarts=targets.shape[1] * num_restarts, stops=True, loop=loop,
    )
    return base.report(problem, found, trace)


def _start(context: Context, keys: Key, found: base.Found) -> State:
    targets, turn = context.problem.data, found.memory
    target = jnp.take_along_axis(targets, (turn % targets.shape[1])[:, None], axis=1)[:, 0]
    return start(context, keys, found, (target,))


def _finish(context: Context, state: State) -> base.Found:
    found = base.evaluate_last(context, state)
    return found._replace(memory=found.memory + 1)


_METHOD = driver.Method(_start, step, _finish)
