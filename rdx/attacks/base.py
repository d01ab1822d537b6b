"""What every attack shares: checking the inputs, keeping the best candidate, restarts, and the one loop.

An attack is three module-level functions over explicit pytrees,

    init(context, keys [B], best) -> state
    step(context, state, i) -> state
    finish(context, state) -> Candidate

where `context` holds everything that stays fixed (model, ball, goal, inputs, schedules) as leaves, and `best` is the
strongest candidate so far. No attack holds a loop: `iterate` and `restart` do.

Compilations are cached per step function, model function and array shapes. A `jax.tree_util.Partial` over a
module-level function carries its parameters as leaves and is compiled once; a plain closure has its parameters baked in
and is compiled once per closure object, so build it once and keep it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from rdx import balls, compilation, goals, norms
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, LogitsFn, PyTree

Loop: TypeAlias = Literal["auto", "host", "compiled"]
_Functions: TypeAlias = tuple[Callable[..., PyTree], Callable[..., PyTree], Callable[..., "Candidate"]]


class Problem(NamedTuple):
    """What an attack is given, checked and converted: every leaf is an array, the ball's in the dtype of `x`."""

    logits_fn: Partial
    ball: Ball
    goal: Goal
    x: Array  # [B, ...]
    labels: Array  # [B], int


class Candidate(NamedTuple):
    """One perturbed input per example and what the model makes of it."""

    x: Array  # [B, ...]
    success: Array  # [B], bool
    loss: Array  # [B]


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


def begin(
    logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, ball: Ball, goal: Goal | None
) -> tuple[Problem, Candidate]:
    """Checks an attack's inputs and evaluates the clean ones, which are the first candidate.

    Values are only looked at where they are concrete, and before any long work. The arguments are those of an attack.

    Returns:
        The problem and the clean candidate; one forward pass was spent.

    Raises:
        ValueError: on unusable inputs, labels or balls, and on a model that returns NaN for clean inputs.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"Inputs are {x.dtype}: convert images to float in [0, 1], such as x.astype('float32') / 255.")
    ball.check(x)
    balls.check_labels(labels, x)
    eps, low, high = (jnp.asarray(value, x.dtype) for value in (ball.eps, ball.low, ball.high))
    ball = dataclasses.replace(ball, eps=eps, low=low, high=high)
    goal = goals.misclassify() if goal is None else goal
    problem = Problem(compilation.as_partial(logits_fn), ball, goal, x, jnp.asarray(labels))
    output, clean = _call(_forward, problem, x)
    # A goal may read any output (a detector's pair, say); a single matrix holds the logits of K classes.
    if isinstance(output, jax.Array) and output.ndim == 2 and output.shape[1] > 1:
        balls.check_labels(labels, x, output.shape[1])
    if not _is_traced(output) and any(bool(jnp.isnan(leaf).any()) for leaf in jax.tree.leaves(output)):
        raise ValueError(
            "The model returns NaN logits on clean inputs: its parameters are probably NaN (a diverged training or a "
            "broken checkpoint), or its normalisation divides by zero. Check both before attacking."
        )
    return problem, clean


def evaluate(problem: Problem, x: Array) -> Candidate:
    """Runs the model on `x [B, ...]`: one forward pass."""
    return _forward(problem, x)[1]


def value_and_gradient(logits_fn: LogitsFn, goal: Goal, x: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Computes each example's loss, success and loss gradient in one forward and one backward pass.

    Examples are independent, so the gradient of the summed loss holds every example's own. Elements that are not
    finite become 0: a NaN would leave the ball and pass for a success.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        goal: the loss and the success predicate.
        x: shape `[B, ...]`.
        labels: shape `[B]`, int.

    Returns:
        Loss `[B]`, success `[B]` and gradient `[B, ...]`.
    """

    def total(point: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = logits_fn(point)
        loss = goal.loss(logits, labels)
        return loss.sum(), (loss, goal.success(logits, labels))

    (_, (loss, success)), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return loss, success, jnp.where(jnp.isfinite(gradient), gradient, 0.0)


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
    wins = (new.success & ~best.success) | ((new.success == best.success) & (new.loss > best.loss))
    return jax.tree.map(lambda old, other: jnp.where(norms.expand(wins, old), other, old), best, new)


def report(problem: Problem, best: Candidate, *, forwards: int, gradients: int) -> AttackResult:
    """Builds the result from the best candidate and the passes spent on each example."""
    spent = [jnp.full(best.loss.shape, count, jnp.int32) for count in (forwards, gradients)]
    return AttackResult(best.x, best.success, problem.ball.distance(best.x, problem.x), best.loss, *spent)


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


def iterate(
    step: Callable[[PyTree, PyTree, Array], PyTree], context: PyTree, state: PyTree, num_steps: int, *,
    loop: Loop = "auto", progress: Callable[[int], None] | None = None, chunk: int = 10,
) -> PyTree:
    """Applies `state = step(context, state, i)` for `i = 0..num_steps - 1`: the only loop of all attacks.

    XLA's CPU backend runs convolutions slowly inside loops, accelerators pay for every launch from the host. So "auto"
    loops on the host over one compiled step when the state lies on a CPU, and compiles the whole loop on accelerators
    and wherever anything is traced (under an outer `jit`, `vmap` or `grad`).

    Args:
        step: a module-level function; compilations are cached by its identity.
        context: pytree of arrays that stays fixed.
        state: pytree of arrays.
        num_steps: number of steps.
        loop: "auto", or "host" or "compiled" to force the choice; "host" under `vmap` still runs the fast compiled
            step, under `jit` it unrolls.
        progress: called with the number of finished steps after every chunk, where nothing is traced.
        chunk: steps between two calls of `progress`.

    Returns:
        The last state.
    """
    if loop not in ("auto", "host", "compiled"):
        raise ValueError(f"Unknown loop {loop!r}: use 'auto', 'host' or 'compiled'.")
    is_traced = _is_traced((context, state))
    on_host = loop == "host" or (loop == "auto" and not is_traced and _lies_on_cpu(state))
    if on_host and not is_traced:
        # The steps donate their state, and a fresh state may still share buffers with the caller's arrays.
        state = jax.tree.map(jnp.copy, state)
    stride = num_steps if is_traced or progress is None else chunk
    for first in range(0, num_steps, max(1, stride)):
        last = min(first + stride, num_steps)
        if not on_host:
            state = _loop(step, last - first, context, state, np.int32(first))
        else:
            advance = _call if is_traced else _donating_call
            for i in range(first, last):
                state = advance(step, context, state, np.int32(i))
        if progress is not None and not is_traced:
            jax.block_until_ready(state)
            progress(last)
    return state


def restart(
    init: Callable[[PyTree, Key, Candidate], PyTree], step: Callable[[PyTree, PyTree, Array], PyTree],
    finish: Callable[[PyTree, PyTree], Candidate], context: PyTree, keys: Key, best: Candidate, *, num_steps: int,
    num_restarts: int = 1, loop: Loop = "auto",
) -> Candidate:
    """Runs an attack several times, restart `r` with the keys folded with `r`, and carries the best candidate along.

    The first restarts of a longer run are the shorter run, so more restarts are never weaker.

    Args:
        init: see the module's docstring, as for `step` and `finish`.
        step: one iteration.
        finish: its candidate must be at least as good as the `best` given to `init`.
        context: pytree of arrays that stays fixed.
        keys: one per example, shape `[B]`.
        best: the strongest candidate so far.
        num_steps: steps of each restart.
        num_restarts: number of restarts.
        loop: see `iterate`.

    Returns:
        The strongest candidate seen.

    Raises:
        ValueError: if `num_steps` or `num_restarts` is below 1.
    """
    if num_steps < 1 or num_restarts < 1:
        raise ValueError(f"num_steps={num_steps} and num_restarts={num_restarts} must both be at least 1.")

    functions = init, step, finish
    if num_restarts > 1 and _is_traced((context, keys, best)) and loop != "host":
        return _loop_attempts(functions, num_steps, num_restarts, context, keys, best)
    for r in range(num_restarts):
        best = _attempt(functions, num_steps, loop, context, keys, best, np.int32(r))
    return best


def _attempt(
    functions: _Functions, num_steps: int, loop: Loop, context: PyTree, keys: Key, best: Candidate, r: ArrayLike
) -> Candidate:
    init, step, finish = functions
    state = _call(init, context, _call(_fold, keys, r), best)
    return _call(finish, context, iterate(step, context, state, num_steps, loop=loop))


def _fold(keys: Key, r: Array) -> Key:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, r)


def _forward(problem: Problem, x: Array) -> tuple[PyTree, Candidate]:
    output, goal = problem.logits_fn(x), problem.goal
    return output, Candidate(x, goal.success(output, problem.labels), goal.loss(output, problem.labels))


def _is_traced(tree: PyTree) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _lies_on_cpu(tree: PyTree) -> bool:
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return all(device.platform == "cpu" for array in arrays for device in array.devices())


# Module-level, with static functions, so that compilations are cached; inside an outer `jit` they are inlined.
_call = jax.jit(lambda fn, *args: fn(*args), static_argnums=0)
_donating_call = jax.jit(lambda fn, context, state, i: fn(context, state, i), static_argnums=0, donate_argnums=2)


@partial(jax.jit, static_argnums=(0, 1))
def _loop(step: Callable[..., PyTree], num_steps: int, context: PyTree, state: PyTree, first: Array) -> PyTree:
    # With static ends the loop becomes a scan, through which gradients flow.
    return jax.lax.fori_loop(0, num_steps, lambda i, carry: step(context, carry, first + i.astype(np.int32)), state)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _loop_attempts(
    functions: _Functions, num_steps: int, num_restarts: int, context: PyTree, keys: Key, best: Candidate
) -> Candidate:
    attempt = partial(_attempt, functions, num_steps, "compiled", context, keys)
    return jax.lax.fori_loop(0, num_restarts, lambda r, carry: attempt(carry, r), best)
