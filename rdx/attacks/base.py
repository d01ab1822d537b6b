"""What every attack shares: checking the inputs, evaluating points, keeping the best, building the result.

Compilations are cached per function, model function and array shapes. A `jax.tree_util.Partial` over a module-level
function carries its parameters as leaves and is compiled once; a plain closure has its parameters baked in and is
compiled once per closure object, so build it once and keep it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from rdx import balls, compilation, goals, norms
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn, PyTree, Trace

_Tree = TypeVar("_Tree")


class Problem(NamedTuple):
    """What an attack is given, checked and converted: every leaf is an array, the ball's in the dtype of `x`."""

    logits_fn: Partial
    ball: Ball
    goal: Goal
    x: Array  # [B, ...]
    labels: Array  # [B], int
    data: PyTree = ()  # what else an attack keeps for each example, such as step sizes; batch axis first


class Candidate(NamedTuple):
    """One perturbed input per example and what the model makes of it."""

    x: Array  # [B, ...]
    success: Array  # [B], bool
    loss: Array  # [B]


class Found(NamedTuple):
    """The strongest input so far and what it cost."""

    best: Candidate
    forwards: Array  # [B], int32
    gradients: Array  # [B], int32; each one forward and one backward pass, not counted in `forwards`
    memory: PyTree = ()  # what else an attack carries from one restart to the next; batch axis first


def example_keys(key: Key, x: Array, index: ArrayLike | None = None) -> Key:
    """Folds each example's place in the data set into the key, so that results do not depend on the batch.

    Args:
        key: one key.
        x: the inputs, shape `[B, ...]`.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.

    Returns:
        Keys, shape `[B]`.

    Raises:
        ValueError: if `index` does not hold one integer per example.
    """
    places = jnp.arange(x.shape[0]) if index is None else jnp.asarray(index)
    if places.shape != (x.shape[0],) or not jnp.issubdtype(places.dtype, jnp.integer):
        raise ValueError(f"index is {places.dtype}{places.shape}: give one integer per example, [{x.shape[0]}].")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, places)


def fold(keys: Key, number: ArrayLike) -> Key:
    """Folds a step's or restart's number into every example's key, shape `[B]`."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def draw(keys: Key, sample: Callable[..., Array], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Draws a random array for every example.

    Args:
        keys: one per example, shape `[B]`.
        sample: `(key, shape, dtype) -> Array`, such as `jax.random.normal`.
        shape: of one example's array.
        dtype: of the array.

    Returns:
        Shape `[B, *shape]`: what `sample` gives in that shape, but drawn flat, which XLA compiles seven times faster.
    """
    size = math.prod(shape)
    return jax.vmap(lambda key: sample(key, (size,), dtype))(keys).reshape(len(keys), *shape)


def per_example(value: ArrayLike, x: Array) -> Array:
    """Gives a setting that is shaped as `Ball.eps` may be, a scalar say, the batch axis and the dtype of `x`."""
    value = jnp.asarray(value, x.dtype)
    value = norms.expand(value, x) if value.ndim == 1 and x.ndim > 1 else value
    return jnp.broadcast_to(value, jnp.broadcast_shapes(value.shape, (len(x),) + (1,) * (x.ndim - 1)))


def take(problem: Problem, rows: np.ndarray) -> Problem:
    """Restricts a problem to some of its examples, given by their places."""
    x, size = problem.x, len(problem.labels)

    def taken(value: Any, axes: tuple[int, ...]) -> Array:
        return value[rows] if value.ndim in axes and len(value) == size else value

    # A radius of one axis has one value for each example; the ends of the box are broadcast.
    ball, axes = problem.ball, (x.ndim,)
    ball = Ball(ball.norm, taken(ball.eps, (1, x.ndim)), taken(ball.low, axes), taken(ball.high, axes))
    data, others = jax.tree.map(lambda leaf: leaf[rows], (problem.goal.data, problem.data))
    goal = problem.goal._replace(data=data)
    return Problem(problem.logits_fn, ball, goal, x[rows], problem.labels[rows], others)


def begin(
    logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, ball: Ball, goal: Goal | None
) -> tuple[Problem, Found]:
    """Checks an attack's inputs and evaluates the clean ones, which are the first candidate.

    Values are only looked at where they are concrete, and before any long work. The arguments are those of an attack.

    Returns:
        The problem, and the clean inputs as the first candidates, on each of which one forward pass was spent.

    Raises:
        ValueError: on unusable inputs, labels, balls or data of the goal, on an empty batch, and on a model that
            returns NaN for clean inputs.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"Inputs are {x.dtype}: convert images to float in [0, 1], such as x.astype('float32') / 255.")
    if not x.size:
        raise ValueError(f"Inputs have shape {x.shape}: an attack needs at least one example, leave out empty batches.")
    ball.check(x)
    balls.check_labels(labels, x)
    eps, low, high = (jnp.asarray(value, x.dtype) for value in (ball.eps, ball.low, ball.high))
    ball = dataclasses.replace(ball, eps=eps, low=low, high=high)
    goal = goals.misclassify() if goal is None else goal
    goal.check(len(x))
    problem = Problem(compilation.as_partial(logits_fn), ball, goal, x, jnp.asarray(labels))
    output, clean = call(_forward, problem, x)
    # A goal may read any output (a detector's pair, say); a single matrix holds the logits of K classes.
    if isinstance(output, jax.Array) and output.ndim == 2 and output.shape[1] > 1:
        balls.check_labels(labels, x, output.shape[1])
    if not is_traced(output) and any(bool(jnp.isnan(leaf).any()) for leaf in jax.tree.leaves(output)):
        raise ValueError(
            "The model returns NaN logits on clean inputs: its parameters are probably NaN (a diverged training or a "
            "broken checkpoint), or its normalisation divides by zero. Check both before attacking."
        )
    none = 0 * clean.success.astype(jnp.int32)  # by arithmetic, which keeps how an array is sharded
    return problem, Found(clean, 1 + none, none)


def evaluate(problem: Problem, x: Array) -> Candidate:
    """Runs the model on `x [B, ...]`: one forward pass."""
    return _forward(problem, x)[1]


def evaluate_many(problem: Problem, points: Array) -> tuple[Array, Array]:
    """Runs the model on several points of each example in one large batch: `n` forward passes.

    Args:
        problem: the attack's problem.
        points: shape `[B, n, ...]`.

    Returns:
        Success, bool, and loss, both of shape `[B, n]`.
    """
    size, num = points.shape[:2]
    labels, data = jax.tree.map(lambda leaf: jnp.repeat(leaf, num, axis=0), (problem.labels, problem.goal.data))
    output, goal = problem.logits_fn(points.reshape(-1, *points.shape[2:])), problem.goal._replace(data=data)
    return goal.success(output, labels).reshape(size, num), goal.loss(output, labels).reshape(size, num)


def value_and_gradient(problem: Problem, x: Array) -> tuple[Candidate, Array]:
    """Computes each example's success, loss and loss gradient in one forward and one backward pass.

    Examples are independent, so the gradient of the summed loss holds every example's own. Elements that are not
    finite become 0: a NaN would leave the ball and pass for a success.

    Args:
        problem: the attack's problem.
        x: shape `[B, ...]`.

    Returns:
        The candidate and the gradient `[B, ...]`.
    """

    def total(point: Array) -> tuple[Array, Candidate]:
        candidate = evaluate(problem, point)
        return candidate.loss.sum(), candidate

    (_, candidate), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return candidate, jnp.where(jnp.isfinite(gradient), gradient, 0.0)


def ascend(ball: Ball, center: Array, point: Array, gradient: Array, step_size: ArrayLike) -> Array:
    """Moves `point` up the gradient by `step_size` in the ball's norm and projects: `P(point + s * u(s * g))`.

    `u` is `Ball.ascent_direction`. With a size per element, `s * u(s * g)` is the steepest direction in the norm
    `||delta / s||` of such a ball; with one size per example it is `s * u(g)`.

    Args:
        ball: the threat model.
        center: clean inputs, shape `[B, ...]`.
        point: shape `[B, ...]`.
        gradient: shape `[B, ...]`.
        step_size: in input units, shaped as `Ball.eps` may be.

    Returns:
        The moved points, in ball and box, shape `[B, ...]`.
    """
    if ball.norm == "l1":
        # An l1 step moves few elements: one that the box holds back would waste it, for ever (as SLIDE avoids).
        is_held = ((gradient > 0) & (point >= ball.high)) | ((gradient < 0) & (point <= ball.low))
        gradient = jnp.where(is_held, 0.0, gradient)
    size = dataclasses.replace(ball, eps=step_size).radius(center)
    return ball.project(point + size * ball.ascent_direction(size * gradient), center)


def better(best: Candidate, new: Candidate) -> Candidate:
    """Keeps, example by example, the greater of two candidates in the order (success, loss); `best` wins ties."""
    return choose((new.success & ~best.success) | ((new.success == best.success) & (new.loss > best.loss)), new, best)


def nearer(problem: Problem, best: Candidate, new: Candidate) -> Candidate:
    """Keeps, example by example, the successful candidate nearest to the clean input; `best` wins ties."""
    is_near = problem.ball.distance(new.x, problem.x) < problem.ball.distance(best.x, problem.x)
    return choose(new.success & (~best.success | is_near), new, best)


def strongest(points: Array, success: Array, loss: Array) -> Candidate:
    """Picks each example's greatest of several points in the order (success, loss).

    Args:
        points: shape `[B, n, ...]`.
        success: shape `[B, n]`, bool.
        loss: shape `[B, n]`.

    Returns:
        One candidate for each example; the first of equals.
    """
    is_eligible = success == success.any(axis=1, keepdims=True)
    ranked = jnp.nan_to_num(loss, nan=jnp.finfo(loss.dtype).min)
    place = jnp.where(is_eligible, ranked, -jnp.inf).argmax(axis=1)
    return Candidate(*(
        jnp.take_along_axis(leaf, norms.expand(place, leaf), axis=1)[:, 0] for leaf in (points, success, loss)
    ))


def spend(
    found: Found, new: Candidate, *, forwards: ArrayLike = 0, gradients: ArrayLike = 0,
    keep: Callable[[Candidate, Candidate], Candidate] = better,
) -> Found:
    """Writes down what a step saw and what it cost.

    Args:
        found: the strongest input so far.
        new: what the step evaluated.
        forwards: forward passes spent on each example, a number or `[B]`.
        gradients: gradients spent on each example, a number or `[B]`.
        keep: `(best, new) -> Candidate`; `partial(nearer, problem)` for minimal-norm attacks.

    Returns:
        The strongest input and the sums.
    """
    return found._replace(
        best=keep(found.best, new), forwards=found.forwards + forwards, gradients=found.gradients + gradients
    )


def evaluate_last(context: Any, state: Any) -> Found:
    """Evaluates the point that the last step has made: the `finish` of attacks that evaluate before they move."""
    return spend(state.found, evaluate(context.problem, state.point), forwards=1)


def choose(where: Array, new: _Tree, old: _Tree) -> _Tree:
    """Picks `new` for the examples named by `where [B]`, `old` for the others, in every leaf `[B, ...]` of a tree."""
    return jax.tree.map(lambda a, b: jnp.where(norms.expand(where, a), a, b), new, old)


def report(problem: Problem, found: Found, trace: Trace | None = None) -> AttackResult:
    """Builds the result of an attack at a fixed radius."""
    best = found.best
    distance = call(_distance, problem.ball, best.x, problem.x)
    return AttackResult(best.x, best.success, distance, best.loss, found.forwards, found.gradients, trace)


def report_nearest(problem: Problem, found: Found, clean: Candidate, trace: Trace | None = None) -> AttackResult:
    """Builds the result of a minimal-norm attack: the clean input where nothing adversarial lies within `ball.eps`."""
    return report(problem, found._replace(best=call(_within, problem.ball, problem.x, found.best, clean)), trace)


def limit(result: AttackResult, x: Array, ball: Ball) -> Array:
    """Restricts an attack to a ball: `A_eps(x) = x_adv` where `x_adv` lies in the ball, else `x`.

    It turns one run of a minimal-norm attack into the attack at every radius. Source: Dong et al. (2020,
    arXiv:1912.11852, Sec. 3.2).

    Args:
        result: what the attack found for `x`.
        x: clean inputs, shape `[B, ...]`.
        ball: the threat model.

    Returns:
        Inputs in ball and box, shape `[B, ...]`.
    """
    return jnp.where(norms.expand(ball.contains(result.x_adv, x), x), result.x_adv, x)


def _distance(ball: Ball, point: Array, x: Array) -> Array:
    return ball.distance(point, x)


def _within(ball: Ball, x: Array, best: Candidate, clean: Candidate) -> Candidate:
    return choose(best.success & ball.contains(best.x, x), best, clean)


def _forward(problem: Problem, x: Array) -> tuple[PyTree, Candidate]:
    output, goal = problem.logits_fn(x), problem.goal
    return output, Candidate(x, goal.success(output, problem.labels), goal.loss(output, problem.labels))


def is_traced(tree: PyTree) -> bool:
    """Tells whether a tree holds tracers: the caller is being transformed by `jit`, `vmap` or `grad`."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


# Module-level, with a static function, so that compilations are cached; inside an outer `jit` it is inlined.
call = jax.jit(lambda fn, *args: fn(*args), static_argnums=0)
