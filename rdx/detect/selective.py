"""Selective and orthogonal PGD on detectors (Bryniarski et al. 2021, arXiv:2106.15023)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses, norms
from rdx.attacks import base, driver
from rdx.balls import Ball
from rdx.detect.goals import evade
from rdx.types import Array, ArrayLike, AttackResult, Detector, Key, LossFn


class _Context(NamedTuple):
    problem: base.Problem  # its data is the step size
    loss: Partial
    confidence: Array


class _State(NamedTuple):
    point: Array
    found: base.Found


def selective_pgd(
    key: Key, detector: Detector, x: ArrayLike, labels: ArrayLike, *, ball: Ball, threshold: ArrayLike = 0.0,
    index: ArrayLike | None = None, loss: LossFn = losses.margin, confidence: ArrayLike = 0.0, num_steps: int = 100,
    step_size: ArrayLike | None = None, num_restarts: int = 1, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs the classifier's loss until the input is misclassified, and descends the score where it is.

        x_{k+1} = P(x_k + s * u(g)),    g = grad loss if z_y - max_{j != y} z_j >= -confidence, else -grad score

    No weight between the two losses has to be chosen, and neither gradient is diluted by the other. Source: Bryniarski
    et al. (2021, arXiv:2106.15023, Sec. 4.1). Differences: untargeted; random starts; the default step is `pgd`'s.

    Args:
        key: one key; example `i` uses it folded with `index[i]`, restart `r` folds that with `r`.
        detector: `x [B, ...] -> (logits [B, K], score [B])`, which rejects where `score > threshold`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        threshold: the detector's.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        loss: what is climbed against the classifier.
        confidence: the margin, in logits, up to which the classifier is attacked although it is wrong.
        num_steps: steps of each restart.
        step_size: length of a step, in input units; `2.5 * eps / num_steps` by default.
        num_restarts: number of random starts.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result; success is to be misclassified and not rejected. `1 + num_restarts` forward passes, two
        gradients a step.

    Raises:
        ValueError: on unusable inputs or NaN outputs.
    """
    return _run(
        _SELECTIVE, key, detector, x, labels, ball, threshold, index, loss, confidence, num_steps, step_size,
        num_restarts, loop,
    )


def orthogonal_pgd(
    key: Key, detector: Detector, x: ArrayLike, labels: ArrayLike, *, ball: Ball, threshold: ArrayLike = 0.0,
    index: ArrayLike | None = None, loss: LossFn = losses.margin, confidence: ArrayLike = 0.0, num_steps: int = 100,
    step_size: ArrayLike | None = None, num_restarts: int = 1, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Alternates as `selective_pgd` does, along what of the one gradient is orthogonal to the other.

        g_c' = g_c - <g_c, g_d> / <g_d, g_d> g_d,    g_d' = g_d - <g_d, g_c> / <g_c, g_c> g_c

    so that, to first order, a step against the classifier leaves the score as it is, and the reverse. Source:
    Bryniarski et al. (2021, arXiv:2106.15023, Sec. 4.2, Eqs. 8-9). As in the authors' code, the sign that linf takes of
    the projected gradient is not orthogonal any more. Arguments, result and errors are those of `selective_pgd`.
    """
    return _run(
        _ORTHOGONAL, key, detector, x, labels, ball, threshold, index, loss, confidence, num_steps, step_size,
        num_restarts, loop,
    )


def _run(
    method: driver.Method, key: Key, detector: Detector, x: ArrayLike, labels: ArrayLike, ball: Ball,
    threshold: ArrayLike, index: ArrayLike | None, loss: LossFn, confidence: ArrayLike, num_steps: int,
    step_size: ArrayLike | None, num_restarts: int, loop: driver.Loop,
) -> AttackResult:
    # What is attacked is not a LogitsFn but a Detector: the goal reads both of its outputs.
    problem, found = base.begin(detector, x, labels, ball, evade(threshold))  # pyright: ignore[reportArgumentType]
    size = 2.5 / num_steps * jnp.asarray(problem.ball.eps) if step_size is None else step_size
    problem = problem._replace(data=base.per_example(size, problem.x))
    context = _Context(problem, Partial(loss), jnp.asarray(confidence, problem.x.dtype))
    found, trace = driver.run(
        method, context, base.example_keys(key, problem.x, index), found, num_steps=num_steps,
        num_restarts=num_restarts, loop=loop,
    )
    return base.report(problem, found, trace)


def _start(context: _Context, keys: Key, found: base.Found) -> _State:
    return _State(context.problem.ball.sample(keys, context.problem.x), found)


def _step_selective(context: _Context, state: _State, i: Array) -> _State:
    del i
    seen, is_wrong, against_classifier, against_detector = _both(context, state.point)
    return _move(context, state, seen, base.choose(is_wrong, against_detector, against_classifier))


def _step_orthogonal(context: _Context, state: _State, i: Array) -> _State:
    del i
    seen, is_wrong, against_classifier, against_detector = _both(context, state.point)
    classifier = without(against_classifier, against_detector)
    detector = without(against_detector, against_classifier)
    return _move(context, state, seen, base.choose(is_wrong, detector, classifier))


def _both(context: _Context, point: Array) -> tuple[base.Candidate, Array, Array, Array]:
    """Evaluates a point and computes the gradients of the classifier's loss and of minus the score: two gradients."""
    problem = context.problem

    def outputs(x: Array) -> tuple[tuple[Array, Array], tuple[base.Candidate, Array]]:
        output = problem.logits_fn(x)
        goal, (logits, score) = problem.goal, output
        seen = base.Candidate(x, goal.success(output, problem.labels), goal.loss(output, problem.labels))
        is_wrong = losses.margin(logits, problem.labels) > context.confidence
        return (context.loss(logits, problem.labels), -score), (seen, is_wrong)

    (loss, score), pull_back, (seen, is_wrong) = jax.vjp(outputs, point, has_aux=True)
    ones, zeros = jnp.ones_like(loss), jnp.zeros_like(score)
    gradients = (pull_back(cotangents)[0] for cotangents in ((ones, zeros), (zeros, ones)))
    classifier, detector = (jnp.where(jnp.isfinite(gradient), gradient, 0.0) for gradient in gradients)
    return seen, is_wrong, classifier, detector


def without(gradient: Array, other: Array) -> Array:
    """Removes the projection of each example's gradient on another one: `g - <g, h> / <h, h> h`.

    Args:
        gradient: `g`, shape `[B, ...]`.
        other: `h`, shape `[B, ...]`; where it is 0 nothing is removed.

    Returns:
        Shape `[B, ...]`.
    """
    largest = norms.linf(other)
    # Scaled first: the squares of a confident model's gradient would vanish in float32.
    unit = other / norms.expand(jnp.where(largest == 0, 1.0, largest), other)
    square = norms.flatten(unit * unit).sum(axis=1)
    share = norms.flatten(gradient * unit).sum(axis=1) / jnp.where(square == 0, 1.0, square)
    return gradient - norms.expand(share, unit) * unit


def _move(context: _Context, state: _State, seen: base.Candidate, gradient: Array) -> _State:
    problem = context.problem
    point = base.ascend(problem.ball, problem.x, state.point, gradient, problem.data)
    return _State(point, base.spend(state.found, seen, gradients=2))


def _finish(context: _Context, state: _State) -> base.Found:
    return base.spend(state.found, base.evaluate(context.problem, state.point), forwards=1)


_SELECTIVE, _ORTHOGONAL = (driver.Method(_start, step, _finish) for step in (_step_selective, _step_orthogonal))
