"""The odds are odd: how noise moves the log-odds (Roth et al. 2019, arXiv:1902.04818)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx.attacks import adaptive, base
from rdx.compilation import as_partial
from rdx.detect import thresholds
from rdx.types import Array, ArrayLike, Key, LogitsFn


class Odds(NamedTuple):
    """How noise moves the log-odds of clean inputs.

    Attributes:
        mean: of `g_{y,z}` for the predicted class `y` and every other `z`. Shape `[K, K]`.
        scale: their standard deviation. Shape `[K, K]`.
    """

    mean: np.ndarray
    scale: np.ndarray


def fit(key: Key, logits_fn: LogitsFn, x: ArrayLike, *, sigma: float, num_draws: int = 64) -> Odds:
    """Fits mean and deviation of `g_{y,z}(x, n) = (f_z - f_y)(x + n) - (f_z - f_y)(x)` over clean `x` and noise `n`.

    Source: Roth et al. (2019, arXiv:1902.04818, Eqs. 4-6). Difference: `y` is the predicted class, as in the test.

    Args:
        key: of the noise.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[N, ...]`.
        sigma: deviation of the Gaussian noise, in input units.
        num_draws: draws for each input; the paper's code takes 256.

    Returns:
        The statistics; pairs that never occur have mean 0 and an infinite deviation, so that they never reject.
    """
    moves = Partial(_moves, as_partial(logits_fn), key, sigma, jnp.arange(num_draws))
    labels, moved = thresholds.collect(moves, x)  # [N], [N, S, K]
    num_classes = moved.shape[2]
    mean, scale = np.zeros((num_classes,) * 2, np.float32), np.full((num_classes,) * 2, np.inf, np.float32)
    for label in np.unique(labels):
        chosen = moved[labels == label].reshape(-1, num_classes)
        mean[label], scale[label] = chosen.mean(axis=0), np.maximum(chosen.std(axis=0), 1e-6)
    scale[np.arange(num_classes), np.arange(num_classes)] = np.inf
    return Odds(mean, scale)


def odds(key: Key, logits_fn: LogitsFn, statistics: Odds, *, sigma: ArrayLike, num_draws: int = 64) -> Partial:
    """Builds the detector with the score `max_z (mean_n g_{y,z}(x, n) - mean_{y,z}) / scale_{y,z}`.

    `y` is the predicted class. Noise moves an adversarial input back to its true class, so that its odds rise. Source:
    Roth et al. (2019, arXiv:1902.04818, Eqs. 6-7). Differences: noise follows from the key and the input's bits, so
    that the score is a function of the input; the correction of the label that the paper adds is left out.

    Args:
        key: of the noise.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        statistics: from `fit`.
        sigma: as for `fit`.
        num_draws: draws at each input.

    Returns:
        A `Detector`.
    """
    return Partial(_score, as_partial(logits_fn), key, sigma, jnp.arange(num_draws), statistics)


def _moves(logits_fn: Partial, key: Key, sigma: ArrayLike, numbers: Array, x: Array) -> tuple[Array, Array]:
    logits = logits_fn(x)
    noisy = adaptive.eot(key, Partial(noisy_logits, logits_fn=logits_fn, sigma=sigma), len(numbers))(x)
    labels = logits.argmax(axis=1).astype(jnp.int32)
    moved = noisy - logits[:, None]
    return labels, moved - jnp.take_along_axis(moved, labels[:, None, None], axis=2)


def noisy_logits(keys: Key, x: Array, *, logits_fn: LogitsFn, sigma: ArrayLike) -> Array:
    """Computes the logits of inputs with Gaussian noise: a `RandomLogitsFn` once the options are bound.

    Args:
        keys: one per example, shape `[B]`.
        x: shape `[B, ...]`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        sigma: deviation, in input units.

    Returns:
        Logits, shape `[B, K]`.
    """
    return logits_fn(x + sigma * base.draw(keys, jax.random.normal, x.shape[1:], x.dtype))


def _score(
    logits_fn: Partial, key: Key, sigma: ArrayLike, numbers: Array, statistics: Odds, x: Array
) -> tuple[Array, Array]:
    labels, moved = _moves(logits_fn, key, sigma, numbers, x)
    mean, scale = (jnp.asarray(table)[labels] for table in statistics)
    standard = (moved.mean(axis=1) - mean) / scale
    is_own = jnp.arange(standard.shape[1], dtype=jnp.int32)[None] == labels[:, None]
    return logits_fn(x), jnp.where(is_own, -jnp.inf, standard).max(axis=1)
