"""Prior-guided random gradient-free attack, P-RGF (Cheng et al. 2019, arXiv:1906.06919), and RGF without a prior."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import compilation, goals, losses, norms
from rdx.attacks import base, driver, estimate
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn

# The gradient's norm is estimated anew in each tenth step, and in this one, since it changes fast at first.
_EARLY_STEP, _PERIOD = 3, 10


class _Context(NamedTuple):
    problem: base.Problem  # its data is the step size
    prior_fn: Partial | None
    samples: Array  # [num_samples]: their numbers
    norm_samples: Array  # [num_norm_samples]
    sigma: Array


class _State(NamedTuple):
    keys: Key
    current: base.Candidate
    norm: Array  # [B]: of the loss gradient, as last estimated
    found: base.Found


def optimal_lambda(alpha: Array, dimension: Array, num_samples: int) -> Array:
    """Computes the share of the prior in the sampled directions that makes the estimate best.

    With cosine `alpha` between prior and gradient, dimension `D` and `q` samples it is 0 for
    `alpha^2 <= 1 / (D + 2q - 2)`, 1 for `alpha^2 >= (2q - 1) / (D + 2q - 2)`, and between them

        (1 - alpha^2) (alpha^2 (D + 2q - 2) - 1) / (2 alpha^2 D q - alpha^4 D (D + 2q - 2) - 1).

    Source: Cheng et al. (2019, arXiv:1906.06919, Eq. 12).

    Args:
        alpha: shape `[B]`.
        dimension: shape `[B]`, float.
        num_samples: `q`.

    Returns:
        Lambda in [0, 1], shape `[B]`.
    """
    square, total = jnp.square(alpha), dimension + (2.0 * num_samples - 2.0)
    is_small, is_large = square * total <= 1.0, square * total >= 2.0 * num_samples - 1.0
    below = 2.0 * num_samples * square * dimension - jnp.square(square) * dimension * total - 1.0
    between = (1.0 - square) * (square * total - 1.0) / jnp.where(is_small | is_large, 1.0, below)
    return jnp.where(is_large, 1.0, jnp.where(is_small, 0.0, between))


def prgf(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    index: ArrayLike | None = None, prior_fn: Callable[..., Array] | None = None, num_steps: int = 200,
    num_samples: int = 50, num_norm_samples: int = 10, sigma: ArrayLike = 1e-4, step_size: ArrayLike | None = None,
    loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs a gradient estimated along random directions that lean towards the gradient of a substitute model.

    `g = 1/q sum_i (loss(x_k + h u_i) - loss(x_k)) / h u_i` with `u_i = sqrt(lambda) v + sqrt(1 - lambda) w_i`, `v` the
    prior of norm 1 and `w_i` uniform on the unit sphere of its complement; `h = sigma sqrt(D)`. `optimal_lambda` takes
    the cosine `alpha = <v, grad loss> / ||grad loss||`, whose terms are estimated by differences, too; the prior alone
    is used for `lambda = 1`. Then `x_{k+1} = P(x_k + s u(g))` as in PGD. Without a prior the directions are uniform:
    the random gradient-free method.

    Source: Cheng et al. (2019, arXiv:1906.06919, Algorithm 1), with the defaults of its code, where steps have 0.1
    (linf) or 0.12 (l2) of the radius. That code doubles `sigma` while a difference is 0; here the difference counts.

    Args:
        key: one key; example `i` uses it folded with `index[i]`.
        logits_fn: `x [B, ...] -> logits [B, K]`; it sees `B * num_samples` points at once.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        goal: what is maximised and what counts as success; `goals.misclassify(losses.margin)` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        prior_fn: `(x [B, ...], labels [B], *goal.data) -> [B, ...]`, such as `gradient_prior(substitute)`; its cost is
            no query. Examples may be dropped, so what differs from example to example comes through `goal.data`.
        num_steps: iterations.
        num_samples: directions `q` of an estimate.
        num_norm_samples: directions for the norm of the gradient, in every tenth step and the fourth.
        sigma: distance of the evaluated points, root mean square of all elements, in input units.
        step_size: length of a step in the ball's norm, in input units, shaped as `Ball.eps` may be; `0.1 * eps` by
            default.
        loop: see `rdx.attacks.driver.Loop`; examples stop at success by default.

    Returns:
        The attack's result: 1 forward pass, and in each step `num_samples + 1`, with a prior one more, without
        `num_samples` where the prior alone is used, and `num_norm_samples` more in those steps; fewer for examples that
        stop.

    Raises:
        ValueError: on unusable inputs, or NaN logits.
    """
    goal = goals.misclassify(losses.margin) if goal is None else goal
    problem, found = base.begin(logits_fn, x, labels, ball, goal)
    size = 0.1 * jnp.asarray(problem.ball.eps) if step_size is None else step_size
    problem = problem._replace(data=base.per_example(size, problem.x))
    prior = None if prior_fn is None else compilation.as_partial(prior_fn)
    context = _Context(
        problem, prior, jnp.arange(num_samples), jnp.arange(num_norm_samples), jnp.asarray(sigma, problem.x.dtype)
    )
    found, trace = driver.run(
        _METHOD, context, base.example_keys(key, problem.x, index), found, num_steps=num_steps, stops=True, loop=loop
    )
    return base.report(problem, found, trace)


def gradient_prior(logits_fn: LogitsFn, *, goal: Goal | None = None) -> Partial:
    """Builds the prior that is a substitute model's own loss gradient.

    Args:
        logits_fn: the substitute, `x [B, ...] -> logits [B, K]`.
        goal: whose loss is differentiated; its data are not used but those of the attack's goal.
            `goals.misclassify(losses.margin)` by default.

    Returns:
        `(x, labels, *data) -> gradient`, for `prgf`.
    """
    goal = goals.misclassify(losses.margin) if goal is None else goal
    return Partial(_gradient, compilation.as_partial(logits_fn), goal.loss_fn)


def _gradient(logits_fn: Partial, loss_fn: Partial, x: Array, labels: Array, *data: Array) -> Array:
    return jax.grad(lambda point: loss_fn(logits_fn(point), labels, *data).sum())(x)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    del context
    return _State(keys, found.best, 0.0 * found.best.loss, found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem, current, num = context.problem, state.current, len(context.samples)
    draw_keys, norm_keys = (base.fold(base.fold(state.keys, i), part) for part in range(2))
    draws = estimate.directions(draw_keys, problem, num)
    if context.prior_fn is None:
        units, norm, spent = estimate.unit(draws, axis=2), state.norm, num
        gradient = estimate.average(_slopes(context, current, units), units)
    else:
        norm, spent = _update_norm(context, norm_keys, state, i)
        prior, share = _weigh_prior(context, current, norm)
        units = _lean(draws, prior, share)
        gradient = estimate.average(_slopes(context, current, units), units)
        gradient = base.choose(share < 1.0, gradient, prior)
        spent = spent + 1 + jnp.where(share < 1.0, num, 0)
    point = base.ascend(problem.ball, problem.x, current.x, gradient, problem.data)
    seen = base.evaluate(problem, point)
    return _State(state.keys, seen, norm, base.spend(state.found, seen, forwards=spent + 1))


def _dimension(problem: base.Problem) -> Array:
    """Counts the elements that may change, shape `[B]`, at least 1."""
    is_free = problem.ball.radius(problem.x) > 0
    return jnp.maximum(norms.l0(is_free.astype(problem.x.dtype)), 1.0)


def _slopes(context: _Context, current: base.Candidate, units: Array) -> Array:
    """Computes the forward differences `[B, n]` along directions of norm 1, `[B, n, ...]`."""
    length = (context.sigma * jnp.sqrt(_dimension(context.problem)))[:, None]
    points = current.x[:, None] + norms.expand(length, units) * units
    _, loss = base.evaluate_many(context.problem, points)
    return (loss - current.loss[:, None]) / length


def _update_norm(context: _Context, keys: Key, state: _State, i: Array) -> tuple[Array, Array]:
    """Estimates `||grad||^2 = D E <u, grad>^2` where that is due; also tells the forward passes that it took."""

    def measure() -> Array:
        num = len(context.norm_samples)
        units = estimate.unit(estimate.directions(keys, context.problem, num), axis=2)
        mean = jnp.square(_slopes(context, state.current, units)).mean(axis=1)
        return jnp.sqrt(_dimension(context.problem) * mean)

    is_due = (i % _PERIOD == 0) | (i == _EARLY_STEP)
    norm = jax.lax.cond(is_due, measure, lambda: state.norm)
    return norm, jnp.where(is_due, len(context.norm_samples), 0)


def _weigh_prior(context: _Context, current: base.Candidate, norm: Array) -> tuple[Array, Array]:
    """Computes the prior, of norm 1 and up the loss, and its lambda `[B]`, for one forward pass."""
    problem = context.problem
    assert context.prior_fn is not None
    prior = context.prior_fn(current.x, problem.labels, *problem.goal.data)
    prior = estimate.unit(jnp.where(jnp.isfinite(prior) & (problem.ball.radius(problem.x) > 0), prior, 0.0))
    slope = jnp.nan_to_num(_slopes(context, current, prior[:, None])[:, 0])
    # Never more than the prior itself tells, whatever the estimate of the norm.
    steepest = jnp.maximum(jnp.abs(slope), norm)
    alpha = jnp.abs(slope) / jnp.where(steepest > 0, steepest, 1.0)
    share = optimal_lambda(alpha, _dimension(problem), len(context.samples))
    return jnp.where(norms.expand(slope < 0, prior), -prior, prior), share


def _lean(draws: Array, prior: Array, share: Array) -> Array:
    """Builds unit directions `sqrt(lambda) v + sqrt(1 - lambda) w` from normal ones, `[B, n, ...]`."""
    prior, share = prior[:, None], norms.expand(share, draws)
    along = (draws * prior).reshape(*draws.shape[:2], -1).sum(axis=2)
    across = estimate.unit(draws - norms.expand(along, draws) * prior, axis=2)
    return jnp.sqrt(share) * prior + jnp.sqrt(1.0 - share) * across


_METHOD = driver.Method(_start, _step)
