"""Class-conditional detectors trained adversarially: GAT (Yin et al. 2020, arXiv:1905.11475)."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx.compilation import as_partial
from rdx.goals import Goal
from rdx.types import Array, LogitsFn


def class_conditional(logits_fn: LogitsFn, detectors_fn: LogitsFn) -> Partial:
    """Builds the detector with the score `-d_y(x)`, where `y` is the class that the classifier predicts.

    `d_k(x) > 0` says that `x` is a natural input of class `k`. Source: Yin et al. (2020, arXiv:1905.11475, Sec. 3.2,
    integrated detection). Difference: one network with `K` outputs stands for the paper's `K` networks.

    Args:
        logits_fn: the classifier, `x [B, ...] -> logits [B, K]`.
        detectors_fn: `x [B, ...] -> d [B, K]`.

    Returns:
        A `Detector`.
    """
    return Partial(_integrated, as_partial(logits_fn), as_partial(detectors_fn))


def generative(detectors_fn: LogitsFn) -> Partial:
    """Builds the detector that classifies by the greatest `d_k(x)` and rejects where it is small.

    Source: Yin et al. (2020, arXiv:1905.11475, Sec. 3.3, generative detection).

    Args:
        detectors_fn: `x [B, ...] -> d [B, K]`.

    Returns:
        A `Detector` with the score `-max_k d_k(x)`.
    """
    return Partial(_generative, as_partial(detectors_fn))


def loss(outputs: Array, labels: Array, adversarial_outputs: Array, targets: Array) -> Array:
    """Computes `-log sigmoid(d_y(x)) - log(1 - sigmoid(d_k(x')))` for an input `x'` that poses as class `k`.

    Source: Yin et al. (2020, arXiv:1905.11475, Eq. 4), where `x'` comes from every class but `k`.

    Args:
        outputs: `d` of clean inputs, shape `[B, K]`.
        labels: their classes, shape `[B]`, int.
        adversarial_outputs: `d` of perturbed inputs, shape `[B, K]`.
        targets: the classes `k != y` that they pose as, shape `[B]`, int.

    Returns:
        Loss, shape `[B]`.
    """
    return jax.nn.softplus(-_pick(outputs, labels)) + jax.nn.softplus(_pick(adversarial_outputs, targets))


def pose(targets: Array) -> Goal:
    """Builds the goal of an input that the detector of another class takes for natural: `d_k(x') > 0`.

    Args:
        targets: the classes `k`, shape `[B]`, int.

    Returns:
        The goal, with the loss `d_k`.
    """
    return Goal(Partial(_posing), Partial(_poses), (targets,))


def _pick(outputs: Array, labels: Array) -> Array:
    return jnp.take_along_axis(outputs, labels[:, None].astype(jnp.int32), axis=1)[:, 0]


def _posing(outputs: Array, labels: Array, targets: Array) -> Array:
    del labels
    return _pick(outputs, targets)


def _poses(outputs: Array, labels: Array, targets: Array) -> Array:
    del labels
    return _pick(outputs, targets) > 0


def _integrated(logits_fn: Partial, detectors_fn: Partial, x: Array) -> tuple[Array, Array]:
    logits = logits_fn(x)
    return logits, -_pick(detectors_fn(x), logits.argmax(axis=1))


def _generative(detectors_fn: Partial, x: Array) -> tuple[Array, Array]:
    outputs = detectors_fn(x)
    return outputs, -outputs.max(axis=1)
