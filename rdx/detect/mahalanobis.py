"""Mahalanobis distance to the nearest class in every layer (Lee et al. 2018, arXiv:1807.03888)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx.compilation import as_partial
from rdx.detect import thresholds
from rdx.types import Array, ArrayLike

# Added to the covariance, relative to its mean eigenvalue: units that never fire would make it singular.
_RIDGE = 1e-3


class Gaussians(NamedTuple):
    """Class-conditional Gaussians with one covariance, layer by layer.

    Attributes:
        means: each `[K, D]`.
        whitening: each `[D, D]`, `W` with `W W^T` the inverse of the covariance.
    """

    means: tuple[np.ndarray, ...]
    whitening: tuple[np.ndarray, ...]


def fit(
    features_fn: Callable[[Array], tuple[Array, tuple[Array, ...]]], x: ArrayLike, labels: ArrayLike
) -> Gaussians:
    """Fits means and the tied covariance of every hidden layer, of convolutions their means over the image.

    `mu_c = mean_{y_i = c} z_i`, `Sigma = 1/N sum_c sum_{y_i = c} (z_i - mu_c) (z_i - mu_c)^T`. Source: Lee et al.
    (2018, arXiv:1807.03888, Eq. 1). Difference: a thousandth of its mean eigenvalue is added to the covariance.

    Args:
        features_fn: `x [B, ...] -> (logits, hidden layers)`, from `models.features_fn`.
        x: training inputs, shape `[N, ...]`.
        labels: shape `[N]`, int; every class must occur.

    Returns:
        The Gaussians, in float32.

    Raises:
        ValueError: where a class has no inputs.
    """
    logits, layers = thresholds.collect(Partial(_pooled, as_partial(features_fn)), x)
    labels = np.asarray(labels)
    missing = set(range(logits.shape[1])) - set(labels.tolist())
    if missing:
        raise ValueError(f"No training inputs of the classes {sorted(missing)}: every class needs a mean.")
    means, whitening = [], []
    for layer in layers:
        layer = layer.astype(np.float64)
        mean = np.stack([layer[labels == c].mean(axis=0) for c in range(logits.shape[1])])
        centred = layer - mean[labels]
        covariance = centred.T @ centred / len(layer)
        ridge = _RIDGE * np.trace(covariance) / len(covariance)
        values, vectors = np.linalg.eigh(covariance + ridge * np.eye(len(covariance)))
        means.append(mean.astype(np.float32))
        whitening.append((vectors / np.sqrt(values)).astype(np.float32))
    return Gaussians(tuple(means), tuple(whitening))


def scores(
    features_fn: Callable[[Array], tuple[Array, tuple[Array, ...]]], gaussians: Gaussians, *,
    magnitude: ArrayLike | None = None,
) -> Partial:
    """Builds `x -> (logits, distances [B, L])` with `min_c (z - mu_c)^T Sigma^-1 (z - mu_c)` in each of `L` layers.

    With a magnitude `m` the input is first moved nearer to its class in each layer,
    `x' = x - m sign(grad_x distance(x))`, which separates clean inputs from others in the paper. `logistic.fit` and
    `logistic.combined` make a detector of the scores.

    Source: Lee et al. (2018, arXiv:1807.03888, Eqs. 2-3, Algorithm 1). Through the sign no gradient passes, as in the
    paper.

    Args:
        features_fn: as for `fit`.
        gaussians: from `fit`.
        magnitude: in input units; the paper tries 0.0005 to 0.01, and none.

    Returns:
        The squared distances; higher is more suspicious.
    """
    return Partial(_scores, as_partial(features_fn), gaussians, magnitude)


def _pooled(features_fn: Partial, x: Array) -> tuple[Array, tuple[Array, ...]]:
    logits, layers = features_fn(x)
    return logits, tuple(z.mean(axis=tuple(range(1, z.ndim - 1))) if z.ndim > 2 else z for z in layers)


def _scores(features_fn: Partial, gaussians: Gaussians, magnitude: ArrayLike | None, x: Array) -> tuple[Array, Array]:
    if magnitude is None:
        return _distances(features_fn, gaussians, x)
    columns = []
    for place in range(len(gaussians.means)):
        def total(x: Array, place: int = place) -> Array:
            return _distances(features_fn, gaussians, x)[1][:, place].sum()

        moved = x - magnitude * jnp.sign(jax.grad(total)(jax.lax.stop_gradient(x)))
        columns.append(_distances(features_fn, gaussians, moved)[1][:, place])
    return features_fn(x)[0], jnp.stack(columns, axis=1)


def _distances(features_fn: Partial, gaussians: Gaussians, x: Array) -> tuple[Array, Array]:
    logits, layers = _pooled(features_fn, x)
    nearest = []
    for z, mean, whitening in zip(layers, gaussians.means, gaussians.whitening, strict=True):
        white = (z @ whitening)[:, None] - (mean @ whitening)[None]
        nearest.append(jnp.square(white).sum(axis=2).min(axis=1))
    return logits, jnp.stack(nearest, axis=1)
