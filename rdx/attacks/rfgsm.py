"""The fast gradient sign method after a random step (Tramer et al. 2018, arXiv:1705.07204)."""

from typing import NamedTuple

import jax

from rdx.attacks import base, driver
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn


class _Context(NamedTuple):
    problem: base.Problem  # its data is the sizes of the two steps


class _State(NamedTuple):
    point: Array
    found: base.Found


def rfgsm(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, random_share: float = 0.5, num_restarts: int = 1, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Leaves the neighbourhood of the data, where gradients may be masked, by a random step before a gradient step.

        x' = P(x + alpha * u(n)),   n ~ N(0, I),   alpha = random_share * eps
        x_adv = P(x' + (eps - alpha) * u(grad loss(x')))

    `u` is the sign for linf, the method of the paper, and the steepest direction of the norm for l2 and l1. The
    strongest of `x`, `x'` and `x_adv` is returned.

    Source: Tramer et al. (2018, arXiv:1705.07204, R+FGSM). Difference: `x'` is projected, too, so that the model is
    never asked about inputs outside of the box.

    Args:
        key: one key; example `i` uses it folded with `index[i]`, restart `r` folds that with `r`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        goal: what is maximised and what counts as success; `goals.misclassify()` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        random_share: share of the radius that the random step spends, in [0, 1].
        num_restarts: number of random steps that are tried.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `1 + num_restarts` forward passes, `num_restarts` gradients.

    Raises:
        ValueError: on unusable inputs, NaN logits, or a share outside of [0, 1].
    """
    if not 0.0 <= random_share <= 1.0:
        raise ValueError(f"random_share={random_share}: the random step spends a share of the radius, in [0, 1].")
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    sizes = (base.per_example(share * problem.ball.eps, problem.x) for share in (random_share, 1.0 - random_share))
    context = _Context(problem._replace(data=tuple(sizes)))
    keys = base.example_keys(key, problem.x, index)
    found, trace = driver.run(_METHOD, context, keys, found, num_steps=1, num_restarts=num_restarts, loop=loop)
    return base.report(problem, found, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    problem, x = context.problem, context.problem.x
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
    return _State(base.ascend(problem.ball, x, x, noise, problem.data[0]), found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    del i
    problem = context.problem
    seen, gradient = base.value_and_gradient(problem, state.point)
    point = base.ascend(problem.ball, problem.x, state.point, gradient, problem.data[1])
    return _State(point, base.spend(state.found, seen, gradients=1))


_METHOD = driver.Method(_start, _step, base.evaluate_last)
