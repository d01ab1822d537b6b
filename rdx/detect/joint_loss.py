"""PGD on a joint loss of classifier and detector, with a weight for each example (Carlini & Wagner 2017)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses, norms
from rdx.attacks import base, driver
from rdx.balls import Ball
from rdx.detect.goals import evade
from rdx.types import Array, ArrayLike, AttackResult, Detector, Key, LossFn

# Between brackets the weight moves by this factor.
_FACTOR = 10.0


class _Context(NamedTuple):
    problem: base.Problem  # its data is the step size
    loss: Partial
    threshold: Array
    confidence: Array
    num_steps: Array  # of each round


class _Weight(NamedTuple):
    """The search for the weight of the score, one for each example; everything `[B]`."""

    value: Array
    lower: Array  # the greatest at which the input was rejected: too little
    upper: Array  # the least at which it was classified correctly: too much


class _State(NamedTuple):
    keys: Key
    point: Array
    weight: _Weight
    found: base.Found


def joint_pgd(
    key: Key, detector: Detector, x: ArrayLike, labels: ArrayLike, *, ball: Ball, threshold: ArrayLike = 0.0,
    index: ArrayLike | None = None, loss: LossFn = losses.margin, confidence: ArrayLike = 1.0,
    initial_weight: ArrayLike = 1.0, num_rounds: int = 5, num_steps: int = 40, step_size: ArrayLike | None = None,
    loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs `min(loss, confidence) - w * max(0, score - threshold)` and searches the weight `w` of each example.

    Each round starts at a random point of the ball. Where its last point is classified correctly, `w` was too great,
    where it is wrong but rejected, too small: `w` moves by the factor 10 until both have happened, then to the
    geometric mean. An example that has evaded the detector is done.

    Source: the loss of Carlini & Wagner (2017, arXiv:1705.07263, Sec. 4.1), the search as for their constant `c`.
    Differences: at a fixed radius, by projected steps; the loss is capped, so that all of the gradient goes to the
    score once an input is wrong by `confidence`.

    Args:
        key: one key; example `i` uses it folded with `index[i]`.
        detector: `x [B, ...] -> (logits [B, K], score [B])`, which rejects where `score > threshold`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        threshold: the detector's.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        loss: against the classifier; positive where it is wrong.
        confidence: where the loss is capped.
        initial_weight: the first `w`, positive.
        num_rounds: number of weights tried.
        num_steps: steps of each round.
        step_size: length of a step, in input units; `2.5 * eps / num_steps` by default.
        loop: see `rdx.attacks.driver.Loop`; examples stop at success by default.

    Returns:
        The attack's result; success is to be misclassified and not rejected. One forward pass and as many gradients
        as there are steps, of all rounds.

    Raises:
        ValueError: on unusable inputs or NaN outputs.
    """
    # What is attacked is not a LogitsFn but a Detector: the goal reads both of its outputs.
    problem, found = base.begin(detector, x, labels, ball, evade(threshold))  # pyright: ignore[reportArgumentType]
    size = 2.5 / num_steps * jnp.asarray(problem.ball.eps) if step_size is None else step_size
    weight = norms.linf(problem.x - problem.x) + jnp.asarray(initial_weight, problem.x.dtype)
    problem = problem._replace(data=(base.per_example(size, problem.x), weight))
    limits = [jnp.asarray(value, problem.x.dtype) for value in (threshold, confidence)]
    context = _Context(problem, Partial(loss), limits[0], limits[1], jnp.asarray(num_steps, jnp.int32))
    found, trace = driver.run(
        _METHOD, context, base.example_keys(key, problem.x, index), found, num_steps=num_rounds * num_steps,
        stops=True, loop=loop,
    )
    return base.report(problem, found, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    problem = context.problem
    weight = problem.data[1]
    bracket = _Weight(weight, 0.0 * weight, 0.0 * weight + jnp.inf)
    return _State(keys, problem.ball.sample(keys, problem.x), bracket, found)


def _step(context: _Context, state: _State, i: Array) -> _State:
    problem = context.problem

    def total(x: Array) -> tuple[Array, tuple[base.Candidate, Array]]:
        output = problem.logits_fn(x)
        goal, (logits, score) = problem.goal, output
        seen = base.Candidate(x, goal.success(output, problem.labels), goal.loss(output, problem.labels))
        loss = jnp.minimum(context.loss(logits, problem.labels), context.confidence)
        loss = loss - state.weight.value * jnp.maximum(score - context.threshold, 0.0)
        return loss.sum(), (seen, losses.is_wrong(logits, problem.labels))

    (_, (seen, is_wrong)), gradient = jax.value_and_grad(total, has_aux=True)(state.point)
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
    point = base.ascend(problem.ball, problem.x, state.point, gradient, problem.data[0])
    found = base.spend(state.found, seen, gradients=1)
    start = problem.ball.sample(base.fold(state.keys, i + 1), problem.x)
    following = (start, _next_weight(state.weight, is_wrong))
    is_over = i % context.num_steps == context.num_steps - 1
    point, weight = jax.tree.map(lambda new, old: jnp.where(is_over, new, old), following, (point, state.weight))
    return _State(state.keys, point, weight, found)


def _next_weight(weight: _Weight, is_wrong: Array) -> _Weight:
    lower = jnp.where(is_wrong, jnp.maximum(weight.lower, weight.value), weight.lower)
    upper = jnp.where(is_wrong, weight.upper, jnp.minimum(weight.upper, weight.value))
    middle = jnp.sqrt(lower * jnp.where(jnp.isfinite(upper), upper, 1.0))
    value = jnp.where(lower == 0, upper / _FACTOR, jnp.where(jnp.isfinite(upper), middle, lower * _FACTOR))
    return _Weight(value, lower, upper)


_METHOD = driver.Method(_start, _step)
