"""Variance of the late coefficients of whitened principal components (Hendrycks & Gimpel 2017, arXiv:1608.00530)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx import norms
from rdx.compilation import as_partial
from rdx.types import Array, ArrayLike, LogitsFn


class Components(NamedTuple):
    """The principal components of least variance, whitened.

    Attributes:
        mean: of the training inputs. Shape `[D]`.
        basis: one component a column, divided by its standard deviation. Shape `[D, L]`.
    """

    mean: np.ndarray
    basis: np.ndarray


def fit(x: ArrayLike, *, num_last: int, least: float = 1e-6) -> Components:
    """Finds the last principal components of training inputs.

    Components whose variance is below `least` times the greatest are left out: pixels that never change would divide
    by 0, and any perturbation of them is detected by looking. Source: Hendrycks & Gimpel (2017, arXiv:1608.00530,
    Sec. 2), on flattened images.

    Args:
        x: training inputs, shape `[N, ...]`.
        num_last: how many of the last ones are kept.
        least: least relative variance of a component.

    Returns:
        The components, in float32.

    Raises:
        ValueError: where there are fewer components.
    """
    flat = np.asarray(x, np.float64).reshape(len(np.asarray(x)), -1)
    mean = flat.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(flat - mean, rowvar=False))  # in increasing order
    kept = np.flatnonzero(values > least * values[-1])[:num_last]
    if len(kept) < num_last:
        raise ValueError(f"Only {len(kept)} components vary, not num_last={num_last}: ask for fewer, or lower `least`.")
    return Components(mean.astype(np.float32), (vectors[:, kept] / np.sqrt(values[kept])).astype(np.float32))


def pca_coefficients(logits_fn: LogitsFn, components: Components) -> Partial:
    """Builds the detector with the score `variance of the whitened coefficients (x - mean) @ basis`.

    Source: Hendrycks & Gimpel (2017, arXiv:1608.00530, Sec. 2).

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        components: from `fit`.

    Returns:
        A `Detector`.
    """
    return Partial(_score, as_partial(logits_fn), components)


def _score(logits_fn: Partial, components: Components, x: Array) -> tuple[Array, Array]:
    coefficients = (norms.flatten(x) - components.mean[None]) @ components.basis
    return logits_fn(x), jnp.square(coefficients - coefficients.mean(axis=1, keepdims=True)).mean(axis=1)
