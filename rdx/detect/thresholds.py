"""Thresholds at a fixed false-positive rate, and what scores are worth: ROC and the area under it (Fawcett 2006)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx.attacks import base
from rdx.compilation import as_partial
from rdx.types import Array, ArrayLike, Detector, LogitsFn


class Roc(NamedTuple):
    """A detector's rates at every threshold, from the one that rejects nothing to the one that rejects all.

    Attributes:
        fpr: share of clean inputs rejected. Shape `[T]`.
        tpr: share of perturbed inputs rejected. Shape `[T]`.
        threshold: an input is rejected where its score exceeds it. Shape `[T]`.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    threshold: np.ndarray


def calibrate(scores: ArrayLike, is_correct: ArrayLike, *, fpr: float = 0.05) -> float:
    """Finds the least threshold that rejects at most the share `fpr` of the correctly classified clean inputs.

    It is the score of rank `n - floor(fpr n)` from below, so that ties and small samples reject too little rather than
    too much. The inputs must be held out: neither the network nor the detector was fitted on them.

    Args:
        scores: of held-out clean inputs, shape `[N]`.
        is_correct: which of them are classified correctly, shape `[N]`, bool.
        fpr: share that may be rejected, in [0, 1).

    Returns:
        The threshold: an input is rejected where its score exceeds it.

    Raises:
        ValueError: on a rate outside [0, 1), NaN scores, or no correct input.
    """
    values = np.sort(np.asarray(scores)[np.asarray(is_correct, bool)])
    if not 0.0 <= fpr < 1.0:
        raise ValueError(f"fpr={fpr} is not a share of the inputs: give a number from 0 to below 1.")
    if not len(values) or np.isnan(values).any():
        raise ValueError("No threshold: no input is classified correctly, or scores are NaN. Check the detector's fit.")
    return float(values[len(values) - 1 - int(fpr * len(values))])


def calibrated(detector: Detector, threshold: ArrayLike, *, scale: ArrayLike = 1.0) -> Partial:
    """Brings a detector's scores to the threshold 0 and a common scale: `(score - threshold) / scale`.

    Detectors then compare, combine and can be attacked with the same settings; decisions stay as they are.

    Args:
        detector: `x [B, ...] -> (logits [B, K], score [B])`.
        threshold: where it rejects.
        scale: a positive number, such as the standard deviation of clean scores.

    Returns:
        The `Detector` that rejects where its score exceeds 0.
    """
    return Partial(_calibrated, as_partial(detector), threshold, scale)


def classifier_of(detector: Detector) -> LogitsFn:
    """Builds the `LogitsFn` of a detector's classifier alone: what an attack meets that knows of no detector."""
    return Partial(_logits, as_partial(detector))


def collect(fn: Callable[[Array], Any], x: ArrayLike, *, batch_size: int = 256) -> Any:
    """Computes a function of many inputs batch by batch, on the host.

    Args:
        fn: `x [B, ...] ->` a pytree of arrays `[B, ...]`.
        x: shape `[N, ...]`.
        batch_size: inputs per call; the last ones are filled up, so that one size is compiled.

    Returns:
        The pytree with NumPy arrays `[N, ...]`.
    """
    x, fn, parts = np.asarray(x), as_partial(fn), []
    size = min(batch_size, len(x))
    for start in range(0, len(x), size):
        rows = np.minimum(np.arange(start, start + size), len(x) - 1)
        output = base.call(_apply, fn, jnp.asarray(x[rows]))
        parts.append(jax.tree.map(np.asarray, output))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(x)], *parts)


def roc(clean: ArrayLike, perturbed: ArrayLike) -> Roc:
    """Computes the receiver operating characteristic of scores.

    Args:
        clean: scores of clean inputs, shape `[N]`.
        perturbed: scores of perturbed inputs, shape `[M]`.

    Returns:
        The curve, one point per distinct score and one before.
    """
    clean, perturbed = np.sort(np.asarray(clean, float)), np.sort(np.asarray(perturbed, float))
    threshold = np.concatenate([[np.inf], np.unique(np.concatenate([clean, perturbed]))[::-1], [-np.inf]])
    share = lambda scores: 1.0 - np.searchsorted(scores, threshold, side="right") / max(len(scores), 1)
    return Roc(share(clean), share(perturbed), threshold)


def auroc(clean: ArrayLike, perturbed: ArrayLike) -> float:
    """Computes the area under the ROC: how often a perturbed input's score exceeds a clean one's, ties counting half.

    Args:
        clean: scores of clean inputs, shape `[N]`.
        perturbed: scores of perturbed inputs, shape `[M]`.

    Returns:
        The area, in [0, 1]; NaN without inputs of either kind.
    """
    clean, perturbed = np.sort(np.asarray(clean, float)), np.asarray(perturbed, float)
    if not len(clean) or not len(perturbed):
        return float("nan")
    below, upto = (np.searchsorted(clean, perturbed, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(clean)))


def _calibrated(detector: Partial, threshold: ArrayLike, scale: ArrayLike, x: Array) -> tuple[Array, Array]:
    logits, score = detector(x)
    return logits, (score - threshold) / scale


def _logits(detector: Partial, x: Array) -> Array:
    return detector(x)[0]


def _apply(fn: Partial, x: Array) -> Any:
    return fn(x)
