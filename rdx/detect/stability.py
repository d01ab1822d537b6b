"""Logit stability: natural inputs withstand noise but fall to attacks fast (Yu, Hu et al. 2019, arXiv:1910.07629)."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import attacks, goals
from rdx.attacks import adaptive
from rdx.balls import Ball
from rdx.compilation import as_partial
from rdx.detect.odds import noisy_logits
from rdx.types import Array, ArrayLike, Key, LogitsFn


def logit_stability(key: Key, logits_fn: LogitsFn, *, sigma: ArrayLike, num_draws: int = 32) -> Partial:
    """Builds the detector with the score `||p(x) - mean_n p(x + n)||_1` of softmax outputs `p` and Gaussian noise `n`.

    Source: Yu, Hu et al. (2019, arXiv:1910.07629, Eq. 1, criterion C1), who draw once. Difference: noise follows from
    the key and the input's bits, so that the score is a function of the input.

    Args:
        key: of the noise.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        sigma: deviation of the noise, in input units.
        num_draws: draws at each input.

    Returns:
        A `Detector`.
    """
    logits_fn = as_partial(logits_fn)
    random_fn = Partial(noisy_logits, logits_fn=logits_fn, sigma=sigma)
    return Partial(_stability, logits_fn, adaptive.eot(key, random_fn, num_draws))


def attack_length(key: Key, logits_fn: LogitsFn, *, ball: Ball, num_steps: int = 20) -> Partial:
    """Builds the detector whose score is the number of steps that PGD needs to change the prediction.

    Source: Yu, Hu et al. (2019, arXiv:1910.07629, Eq. 2, criterion C2u): natural inputs are near a boundary in
    directions that gradients find, inputs that an attack has moved are not. The score is a count and has no gradient.

    Args:
        key: not drawn from, for the attack starts at the input; there as for the other criterion.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        ball: where PGD moves, in steps of a `num_steps`-th of its radius.
        num_steps: steps at most; the score of what stands is one more.

    Returns:
        A `Detector`.
    """
    return Partial(_length, key, as_partial(logits_fn), ball, jnp.arange(num_steps))


def _stability(logits_fn: Partial, draws_fn: Partial, x: Array) -> tuple[Array, Array]:
    logits = logits_fn(x)
    noisy = jax.nn.softmax(draws_fn(x), axis=2).mean(axis=1)
    return logits, jnp.abs(jax.nn.softmax(logits, axis=1) - noisy).sum(axis=1)


def _length(key: Key, logits_fn: Partial, ball: Ball, steps: Array, x: Array) -> tuple[Array, Array]:
    logits, center = logits_fn(x), jax.lax.stop_gradient(x)
    result = attacks.pgd(
        key, logits_fn, center, logits.argmax(axis=1).astype(jnp.int32), ball=ball, goal=goals.misclassify(),
        num_steps=len(steps), step_size=jnp.asarray(ball.eps) / len(steps), random_start=False,
        loop=attacks.Loop(trace=True),
    )
    assert result.trace is not None
    return logits, (~result.trace.success).sum(axis=0).astype(x.dtype) + (~result.success).astype(x.dtype)
