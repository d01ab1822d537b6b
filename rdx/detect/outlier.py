"""An outlier class: a network with one more class, of adversarial inputs (Grosse et al. 2017, arXiv:1702.06280)."""

import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses
from rdx.compilation import as_partial
from rdx.types import Array, LogitsFn


def outlier_class(logits_fn: LogitsFn) -> Partial:
    """Builds the detector with the score `z_K - max_{k < K} z_k` of a network with `K + 1` classes.

    At the threshold 0 it rejects what the network puts into the last class. Source: Grosse et al. (2017,
    arXiv:1702.06280, Sec. 6); `loss` trains it.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K + 1]`.

    Returns:
        A `Detector` with `K` classes.
    """
    return Partial(_score, as_partial(logits_fn))


def loss(logits: Array, labels: Array, adversarial_logits: Array) -> Array:
    """Computes `(CE(f(x), y) + CE(f(x_adv), K)) / 2`: perturbed inputs belong to the last class.

    Args:
        logits: of clean inputs, shape `[B, K + 1]`.
        labels: shape `[B]`, int.
        adversarial_logits: of perturbed inputs, shape `[B, K + 1]`.

    Returns:
        Loss, shape `[B]`.
    """
    outlier = jnp.full_like(labels, logits.shape[1] - 1)
    return 0.5 * (losses.cross_entropy(logits, labels) + losses.cross_entropy(adversarial_logits, outlier))


def _score(logits_fn: Partial, x: Array) -> tuple[Array, Array]:
    logits = logits_fn(x)
    return logits[:, :-1], logits[:, -1] - logits[:, :-1].max(axis=1)
