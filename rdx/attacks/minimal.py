"""What minimal-norm attacks share: where they search, how they keep score, and the model linearised at a point."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdx import norms
from rdx.attacks import base
from rdx.attacks.hyperplane import nearest_hyperplane
from rdx.types import Array, ArrayLike


class Linear(NamedTuple):
    """Functions `f_j` whose zeros are decision boundaries, linearised at one point of each example.

    Attributes:
        values: `f_j(x)`, negative on the clean side. Shape `[B, n]`.
        gradients: `grad f_j(x)`. Shape `[B, n, ...]`.
    """

    values: Array
    gradients: Array


def limits(problem: base.Problem) -> tuple[Array, Array]:
    """Gives the box in which the smallest perturbation is sought, each end of shape `[B, ...]`.

    It is the ball's box, whatever the radius; but elements of radius 0 stay as they are.
    """
    ball, x = problem.ball, problem.x
    is_fixed = ball.radius(x) == 0
    low, high = (jnp.where(is_fixed, x, jnp.broadcast_to(end, x.shape)) for end in (ball.low, ball.high))
    return low, high


def farthest(problem: base.Problem) -> Array:
    """Computes the norm of the longest perturbation in the box, shape `[B]`; infinite without a box."""
    low, high = limits(problem)
    return norms.norm(jnp.maximum(high - problem.x, problem.x - low), problem.ball.norm)


def cosine(first: float, last: float, num: int) -> np.ndarray:
    """Falls from `first` towards `last` along half a cosine, `last` excluded: `num` numbers."""
    return last + (first - last) * 0.5 * (1.0 + np.cos(np.pi * np.arange(num) / num))


def spend(problem: base.Problem, found: base.Found, new: base.Candidate, **cost: ArrayLike) -> base.Found:
    """Writes down what a step saw and what it cost, as `base.spend`; the nearest success is the best."""
    return base.spend(found, new, keep=partial(base.nearer, problem), **cost)


def evaluate_last(context: Any, state: Any) -> base.Found:
    """Evaluates the point that the last step has made, as `base.evaluate_last`; the nearest success is the best."""
    return spend(context.problem, state.found, base.evaluate(context.problem, state.point), forwards=1)


def is_within(context: Any, found: base.Found) -> Array:
    """Tells which examples have a success in the ball, shape `[B]`: more would not change success at this radius."""
    problem: base.Problem = context.problem
    return found.best.success & problem.ball.contains(found.best.x, problem.x)


def other_classes(problem: base.Problem) -> Array:
    """Ranks the classes other than the label by the clean logits: one forward pass.

    Args:
        problem: the attack's problem.

    Returns:
        Classes, the likeliest first, shape `[B, K - 1]`, int32.

    Raises:
        ValueError: if the model does not return logits `[B, K]`.
    """
    return base.call(_rank_others, problem)


def _rank_others(problem: base.Problem) -> Array:
    logits = problem.logits_fn(problem.x)
    if not isinstance(logits, jax.Array) or logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError("The model does not return logits [B, K] of classes to choose from: apgd attacks any output.")
    is_label = jnp.arange(logits.shape[1], dtype=jnp.int32)[None] == problem.labels[:, None].astype(jnp.int32)
    order = jnp.argsort(jnp.where(is_label, -jnp.inf, logits), axis=1, descending=True)
    return order[:, :-1].astype(jnp.int32)


def linearise(problem: base.Problem, x: Array, classes: Array | None) -> tuple[base.Candidate, Linear]:
    """Evaluates the goal and linearises `z_j - z_y` for every class `j` of interest, or the goal's loss.

    One forward pass and as many backward passes as there are functions, billed as that many gradients. What is not
    finite becomes 0.

    Args:
        problem: the attack's problem.
        x: shape `[B, ...]`.
        classes: classes `j`, shape `[B, n]`, int; without them the goal's loss is the one function.

    Returns:
        The candidate and the functions.
    """
    if classes is None:
        seen, gradient = base.value_and_gradient(problem, x)
        linear = Linear(seen.loss[:, None], gradient[:, None])
    else:
        logits, pull_back = jax.vjp(problem.logits_fn, x)
        goal = problem.goal
        seen = base.Candidate(x, goal.success(logits, problem.labels), goal.loss(logits, problem.labels))
        labels = problem.labels[:, None].astype(classes.dtype)
        ones = (jax.nn.one_hot(j, logits.shape[1], dtype=logits.dtype) for j in (classes, labels))
        (gradients,) = jax.vmap(pull_back, in_axes=1, out_axes=1)(jnp.subtract(*ones))
        values = (jnp.take_along_axis(logits, j, axis=1) for j in (classes, labels))
        linear = Linear(jnp.subtract(*values), gradients)
    return seen, jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0.0), linear)


def nearest_boundary(problem: base.Problem, x: Array, linear: Linear) -> tuple[Array, Array, Array]:
    """Finds the hyperplane `<w, v> = b`, where one of the linearised functions is 0, that is nearest in the box.

    Args:
        problem: the attack's problem.
        x: where the functions were linearised, in the box, shape `[B, ...]`.
        linear: the functions.

    Returns:
        The nearest point `v`, shape `[B, ...]`, the normal `w`, shape `[B, ...]`, and the offset `b`, shape `[B]`.
    """
    normals = linear.gradients
    offsets = (normals * x[:, None]).reshape(*normals.shape[:2], -1).sum(axis=2) - linear.values
    place, nearest = nearest_hyperplane(x, normals, offsets, *limits(problem), problem.ball.norm)
    w, b = (jnp.take_along_axis(leaf, norms.expand(place, leaf), axis=1)[:, 0] for leaf in (normals, offsets))
    return nearest, w, b
