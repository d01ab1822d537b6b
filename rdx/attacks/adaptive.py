"""Attacks on defences that mask gradients: surrogate gradients, expectations over randomness, ensembles.

Everything here turns a model into another model, so that every attack works on it unchanged:

    attacks.apgd(key, lambda x: net(straight_through(quantise)(x)), x, labels, ball=ball)
    attacks.apgd(key, eot(draws_key, random_fn, 20), x, labels, ball=ball, goal=goals.expected(goals.misclassify()))

Build such a function once and keep it: compilations are cached per function.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from rdx import goals, norms
from rdx.attacks import base
from rdx.compilation import as_partial
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, Key, LogitsFn, PyTree, RandomLogitsFn

# The gradients of n and 2n draws agree once their cosine exceeds this.
_AGREEMENT = 0.95
# Odd multipliers of the finalizer of MurmurHash3, and 2^32 divided by the golden ratio.
_MIXERS, _GOLDEN = ((16, 0x85EBCA6B), (13, 0xC2B2AE35)), 0x9E3779B9


def bpda(forward: Callable[..., PyTree], surrogate: Callable[..., PyTree]) -> Partial:
    """Replaces the gradient of a function by that of another: backward pass differentiable approximation.

    The value at `x` is `forward(x)`, exactly where `surrogate(x)` is finite; every derivative is that of `surrogate`.
    `forward` is never differentiated, so it may leave JAX through `jax.pure_callback`.

    Source: Athalye et al. (2018, arXiv:1802.00420, Sec. 4.1).

    Args:
        forward: `x -> y`: a defence, or a whole model.
        surrogate: `x -> y` of the same shapes: the identity for most input transformations, the undefended net for a
            whole model, a learned approximation.

    Returns:
        The function `x -> y`.
    """
    return Partial(_bpda, as_partial(forward), as_partial(surrogate))


def _bpda(forward: Partial, surrogate: Partial, x: PyTree) -> PyTree:
    value, smooth = lax.stop_gradient(forward(lax.stop_gradient(x))), surrogate(x)
    return jax.tree.map(lambda value, smooth: value + (smooth - lax.stop_gradient(smooth)), value, smooth)


def straight_through(forward: Callable[[Array], Array]) -> Partial:
    """Differentiates a function of unchanged shape as the identity: `bpda` with `surrogate(x) = x`.

    Source: Athalye et al. (2018, arXiv:1802.00420, Sec. 4.1.1), after Bengio et al. (2013, arXiv:1308.3432).
    """
    return bpda(forward, _identity)


def _identity(x: Array) -> Array:
    return x


def soft_sign(x: Array) -> Array:
    """Computes `sign(x)` with the derivative of `x / (1 + |x|)`; `bpda(jnp.sign, jnp.tanh)` is the other choice.

    Source: Xiao & Zheng (2020, Sec. 4.1), for gradients through the steps of an inner optimisation.
    """
    return bpda(jnp.sign, jax.nn.soft_sign)(x)


def soft_clip(x: Array, low: ArrayLike, high: ArrayLike) -> Array:
    """Computes `clip(x, low, high)` with the derivative 1 inside and `1 / (1 + |x - c|)^2` elsewhere.

    `c = (low + high) / 2`. Source: Xiao & Zheng (2020, Eq. 5), for the projection in an inner optimisation.

    Args:
        x: any shape.
        low: broadcastable to `x`.
        high: broadcastable to `x`.

    Returns:
        The clipped values, shaped as `x`.
    """
    low, high = (jnp.broadcast_to(jnp.asarray(end, x.dtype), x.shape) for end in (low, high))
    center = 0.5 * (low + high)

    def surrogate(x: Array) -> Array:
        # The derivative of the soft sign is the wanted one; that the values do not fit together is of no account.
        offset = x - center
        return jnp.where((low < x) & (x < high), offset, jax.nn.soft_sign(offset))

    return bpda(lambda x: jnp.clip(x, low, high), surrogate)(x)


def unrolled(step: Callable[[PyTree, Array], PyTree], state: PyTree, num_steps: int, *, unroll: int = 1) -> PyTree:
    """Iterates a step so that gradients flow through all of them in the memory of one: an inner optimisation.

    Every step is computed again on the way back. Signs and projections in the step have no useful gradient: write them
    with `soft_sign` and `soft_clip`.

    Args:
        step: `(state, i) -> state`.
        state: where to start.
        num_steps: number of steps.
        unroll: steps in one turn of the compiled loop; on CPUs, where convolutions are slow in loops, `num_steps`
            compiles longer and runs faster.

    Returns:
        The last state.
    """
    body = jax.checkpoint(lambda state, i: (step(state, i), None))
    return lax.scan(body, state, jnp.arange(num_steps), unroll=unroll)[0]


def point_keys(key: Key, x: Array) -> Key:
    """Folds a hash of each example's own bits into the key.

    So a function of `x` alone can draw afresh at every new point, and none of its results depends on the batch or on
    how often it was called. Equal examples meet equal draws.

    Args:
        key: one key.
        x: shape `[B, ...]`, float.

    Returns:
        Keys, shape `[B]`.
    """
    word = jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32
    words = lax.bitcast_convert_type(lax.stop_gradient(x), word).astype(jnp.uint32).reshape(len(x), -1)
    # Each word is mixed with its place, so that a sum, which may wrap around, tells the order.
    words = words + (jnp.uint32(_GOLDEN) * jnp.arange(words.shape[1], dtype=jnp.uint32))[None]
    for shift, multiplier in _MIXERS:
        words = (words ^ (words >> shift)) * jnp.uint32(multiplier)
    hashes = (words ^ (words >> 16)).sum(axis=1, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, hashes)


def eot(key: Key, random_fn: RandomLogitsFn, num_samples: int, *, num_chunks: int = 1) -> Partial:
    """Makes a random model a pure function that answers with several draws: expectation over transformation.

    With `goals.expected(goal)` the gradient of an attack is that of the mean loss, `mean_s grad loss(f(r_s, x))`. The
    draws at a point follow from the key and the point's own bits (`point_keys`): every new point meets fresh ones, so
    that an attack cannot adapt to them, and the same point always the same ones. A difference in the last bit, as
    between two ways of compiling, therefore means other draws.

    Source: Athalye et al. (2018, arXiv:1802.00420, Sec. 4.2). AutoAttack uses 20 samples (Croce & Hein 2020,
    arXiv:2003.01690, Sec. 5); `eot_report` tells how many are needed. Whether an attack succeeded is judged by draws
    that it has not seen: `stochastic_success`.

    Args:
        random_fn: `(keys [B], x [B, ...]) -> logits [B, K]`, each example using its own key.
        key: one key.
        num_samples: draws at a point; one forward pass of the result is as many of `random_fn`.
        num_chunks: in how many parts, one after the other, the draws are computed, and computed again on the way back;
            more need less memory. A divisor of `num_samples`.

    Returns:
        `x [B, ...] -> logits [B, num_samples, K]`.

    Raises:
        ValueError: if the samples cannot be divided into the chunks.
    """
    if num_samples < 1 or num_chunks < 1 or num_samples % num_chunks:
        raise ValueError(f"num_samples={num_samples} must be a positive multiple of num_chunks={num_chunks}.")
    numbers = jnp.arange(num_samples).reshape(num_chunks, -1)
    return Partial(_draws, as_partial(random_fn), key, numbers)


def _draws(random_fn: Partial, key: Key, numbers: Array, x: Array) -> Array:
    keys = point_keys(key, x)

    def chunk(numbers: Array) -> Array:
        # By vmap, so that what does not depend on the draw is computed once.
        return jax.vmap(lambda number: random_fn(base.fold(keys, number), x))(numbers)

    chunks = chunk(numbers[0])[None] if len(numbers) == 1 else lax.map(jax.checkpoint(chunk), numbers)
    return jnp.moveaxis(chunks.reshape(numbers.size, *chunks.shape[2:]), 0, 1)


class EotReport(NamedTuple):
    """How many draws a gradient needs.

    Attributes:
        num_samples: the numbers tried, increasing, shape `[T]`, int.
        cosine: between the gradients of `n` and of `2n` other draws, shape `[T, B]`; 0 where one of them vanishes.
        sufficient: the least `n` tried whose cosine exceeds 0.95, shape `[B]`, int; 0 where none does.
    """

    num_samples: Array
    cosine: Array
    sufficient: Array


def eot_report(
    key: Key, random_fn: RandomLogitsFn, x: Array, labels: Array, *, goal: Goal | None = None,
    num_samples: tuple[int, ...] = (1, 2, 4, 8, 16, 32), index: ArrayLike | None = None,
) -> EotReport:
    """Reports how the gradient of the expected loss converges with the number of draws.

    The two gradients that are compared share no draws: a gradient that is all noise then has cosine 0 with itself, and
    not `1 / sqrt(2)`.

    Args:
        key: one key.
        random_fn: `(keys [B], x [B, ...]) -> logits [B, K]`.
        x: where the gradients are taken, shape `[B, ...]`.
        labels: shape `[B]`, int.
        goal: whose loss is differentiated, for a single draw; `goals.misclassify()` by default.
        num_samples: numbers of draws to try, increasing.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.

    Returns:
        The report, after three times the greatest number of gradients.

    Raises:
        ValueError: if the numbers are not positive and increasing.
    """
    if num_samples[0] < 1 or any(a >= b for a, b in itertools.pairwise(num_samples)):
        raise ValueError(f"num_samples={num_samples} must be positive and increasing.")
    goal = goals.misclassify() if goal is None else goal
    context, keys = (as_partial(random_fn), goal, x, labels), base.example_keys(key, x, index)
    few, many, cosines = jnp.zeros_like(x), jnp.zeros_like(x), []
    for number in range(num_samples[-1]):
        few = base.call(_add_gradient, context, base.fold(keys, 3 * number), few)
        for offset in (1, 2):
            many = base.call(_add_gradient, context, base.fold(keys, 3 * number + offset), many)
        if number + 1 in num_samples:
            cosines.append(_cosine(few, many))
    cosine, tried = jnp.stack(cosines), jnp.asarray(num_samples)
    agrees = cosine > _AGREEMENT
    return EotReport(tried, cosine, jnp.where(agrees.any(axis=0), tried[agrees.argmax(axis=0)], 0))


def _add_gradient(context: tuple[Partial, Goal, Array, Array], keys: Key, total: Array) -> Array:
    random_fn, goal, x, labels = context
    gradient = jax.grad(lambda x: goal.loss(random_fn(keys, x), labels).sum())(x)
    return total + jnp.where(jnp.isfinite(gradient), gradient, 0.0)


def _cosine(a: Array, b: Array) -> Array:
    units = (norms.flatten(v) / jnp.where(norms.linf(v) == 0, 1.0, norms.linf(v))[:, None] for v in (a, b))
    a, b = units  # scaled first: the squares of small gradients would vanish
    sizes = norms.l2(a) * norms.l2(b)
    return (a * b).sum(axis=1) / jnp.where(sizes == 0, 1.0, sizes)


def stochastic_success(
    key: Key, random_fn: RandomLogitsFn, x_adv: Array, labels: Array, *, num_draws: int, goal: Goal | None = None,
    index: ArrayLike | None = None,
) -> Array:
    """Judges inputs against a random model: the share of fresh draws on which the goal is reached.

    An attack that believes the draws on which it searched succeeds by luck, the more steps it takes the oftener; so the
    key must be one that the attack has not seen. A model that answers by majority vote is broken where the share
    exceeds one half; `(x, 0.5 < share)` is what tables count.

    Args:
        key: one key.
        random_fn: `(keys [B], x [B, ...]) -> logits [B, K]`.
        x_adv: shape `[B, ...]`.
        labels: shape `[B]`, int.
        goal: what counts as success on a single draw; `goals.misclassify()` by default.
        num_draws: number of draws; the share's standard error is at most `0.5 / sqrt(num_draws)`.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.

    Returns:
        Share of successes, shape `[B]`.

    Raises:
        ValueError: if there are no draws.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws={num_draws} must be at least 1.")
    context = (as_partial(random_fn), goals.misclassify() if goal is None else goal, x_adv, labels)
    return base.call(_share, context, base.example_keys(key, x_adv, index), jnp.arange(num_draws))


def _share(context: tuple[Partial, Goal, Array, Array], keys: Key, numbers: Array) -> Array:
    random_fn, goal, x, labels = context
    flags = jax.vmap(lambda number: goal.success(random_fn(base.fold(keys, number), x), labels))(numbers)
    return flags.mean(axis=0, dtype=x.dtype)


def ensemble(*models: LogitsFn) -> Partial:
    """Makes several models one that answers for each of them.

    With `goals.expected(goal)` an attack climbs their mean loss and succeeds on most of them; on all with
    `goals.expected(goal, jnp.all)`. The mean of the answers, `lambda x: ensemble(*models)(x).mean(axis=1)`, fuses the
    logits instead, which transfers best in Dong et al. (2018, arXiv:1710.06081, Sec. 3.3).

    Source: Liu et al. (2017, arXiv:1611.02770, Sec. 5), with the mean of the losses for the loss of the mean.

    Args:
        *models: each `x [B, ...] -> logits [B, K]`.

    Returns:
        `x [B, ...] -> logits [B, M, K]`.

    Raises:
        ValueError: without models.
    """
    if not models:
        raise ValueError("An ensemble needs at least one model.")
    return Partial(_answers, tuple(as_partial(model) for model in models))


def _answers(models: tuple[Partial, ...], x: Array) -> Array:
    return jnp.stack([model(x) for model in models], axis=1)
