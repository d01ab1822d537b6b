"""Kernel density and dropout uncertainty: adversarial features lie off the data (Feinman et al. 2017)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx import norms
from rdx.attacks import adaptive
from rdx.compilation import as_partial
from rdx.detect import thresholds
from rdx.types import Array, ArrayLike, Key, LogitsFn, RandomLogitsFn


class Density(NamedTuple):
    """A kernel density of every class.

    Attributes:
        features: of training inputs. Shape `[N, D]`.
        labels: their classes. Shape `[N]`, int32.
        bandwidth: the `sigma` of the kernel.
    """

    features: np.ndarray
    labels: np.ndarray
    bandwidth: ArrayLike


def fit(
    features_fn: Callable[[Array], tuple[Array, tuple[Array, ...]]], x: ArrayLike, labels: ArrayLike, *,
    bandwidths: Sequence[float],
) -> Density:
    """Keeps the last hidden layer of training inputs and chooses the bandwidth that explains them best.

    Of the candidates that one is taken whose density, normalised and without the input itself, is the greatest in mean
    logarithm. Source: Feinman et al. (2017, arXiv:1703.00410, Sec. 4.1), who use 1.2 on MNIST and 0.26 on CIFAR-10.

    Args:
        features_fn: `x [B, ...] -> (logits, hidden layers)`, from `models.features_fn`.
        x: training inputs, shape `[N, ...]`.
        labels: shape `[N]`, int.
        bandwidths: candidates; a single one is simply used.

    Returns:
        The density.
    """
    features = thresholds.collect(Partial(_last, as_partial(features_fn)), x)
    labels = np.asarray(labels, np.int32)
    rows = np.arange(len(labels))
    square = np.square(features).sum(axis=1)
    distance = np.maximum(square[:, None] + square[None] - 2.0 * features @ features.T, 0.0)
    is_other = (labels[:, None] == labels[None]) & (rows[:, None] != rows[None])

    def likelihood(bandwidth: float) -> float:
        exponent = np.where(is_other, -distance / bandwidth**2, -np.inf)
        return float(np.logaddexp.reduce(exponent, axis=1).mean() - features.shape[1] * np.log(bandwidth))

    best = bandwidths[0] if len(bandwidths) == 1 else max(bandwidths, key=likelihood)
    return Density(features, labels, np.float32(best))


def kernel_density(
    features_fn: Callable[[Array], tuple[Array, tuple[Array, ...]]], density: Density
) -> Partial:
    """Builds the detector with the score `-log mean_{j: y_j = f(x)} exp(-||z(x) - z_j||^2 / sigma^2)`.

    `z` is the last hidden layer, the mean is over training inputs of the class that is predicted. Source: Feinman et
    al. (2017, arXiv:1703.00410, Sec. 4.1).

    Args:
        features_fn: as for `fit`.
        density: from `fit`.

    Returns:
        A `Detector`.
    """
    return Partial(_density_score, as_partial(features_fn), density)


def dropout_uncertainty(key: Key, logits_fn: LogitsFn, random_fn: RandomLogitsFn, *, num_draws: int = 50) -> Partial:
    """Builds the detector with the score `mean_t ||p_t||_2^2 - ||mean_t p_t||_2^2`, the variance under dropout.

    Source: Feinman et al. (2017, arXiv:1703.00410, Sec. 4.2). Difference: draws follow from the key and the input's
    bits (`attacks.eot`), so that the score is a function of the input.

    Args:
        key: of the draws.
        logits_fn: the network without dropout, `x [B, ...] -> logits [B, K]`.
        random_fn: with it, `(keys [B], x) -> logits [B, K]`, from `models.dropout_fn`.
        num_draws: passes with dropout.

    Returns:
        A `Detector`.
    """
    return Partial(_variance, as_partial(logits_fn), adaptive.eot(key, random_fn, num_draws))


def _last(features_fn: Partial, x: Array) -> Array:
    return norms.flatten(features_fn(x)[1][-1])


def _density_score(features_fn: Partial, density: Density, x: Array) -> tuple[Array, Array]:
    logits, layers = features_fn(x)
    z, known = norms.flatten(layers[-1]), jnp.asarray(density.features)
    distance = jnp.square(z).sum(axis=1)[:, None] + jnp.square(known).sum(axis=1)[None] - 2.0 * z @ known.T
    is_same = jnp.asarray(density.labels)[None] == logits.argmax(axis=1).astype(jnp.int32)[:, None]
    exponent = jnp.where(is_same, -jnp.maximum(distance, 0.0) / density.bandwidth**2, -jnp.inf)
    # A class without training inputs has no density: its score is infinite, and it is rejected.
    count = jnp.maximum(is_same.sum(axis=1), 1).astype(z.dtype)
    return logits, jnp.log(count) - jax.nn.logsumexp(exponent, axis=1)


def _variance(logits_fn: Partial, draws_fn: Partial, x: Array) -> tuple[Array, Array]:
    probs = jax.nn.softmax(draws_fn(x), axis=2)
    spread = jnp.square(probs).sum(axis=2).mean(axis=1) - jnp.square(probs.mean(axis=1)).sum(axis=1)
    return logits_fn(x), spread
