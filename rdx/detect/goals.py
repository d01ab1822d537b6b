"""What attacks on detectors, and searches for accepted inputs, want: goals over the pair (logits, score).

A detector rejects where `score > threshold`, as `rdx.types.Detector` has it; a NaN score therefore accepts, and a NaN
logit counts as wrong.
"""

import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, LossFn

# The decision "no class": what the papers write as a bottom sign.
REJECTED = -1


def decide(output: tuple[Array, Array], threshold: ArrayLike) -> Array:
    """Computes a detector's decision, `argmax_k z_k` or `REJECTED` where `score > threshold`.

    Args:
        output: logits `[B, K]` and score `[B]`.
        threshold: a number.

    Returns:
        Classes, shape `[B]`, int32.
    """
    logits, score = output
    return jnp.where(score > threshold, REJECTED, logits.argmax(axis=1).astype(jnp.int32))


def accept(threshold: ArrayLike) -> Goal:
    """Builds the goal of an input that a detector does not reject, whatever its class.

    Args:
        threshold: the detector's, a number.

    Returns:
        The goal, with the loss `threshold - score`; labels are ignored.
    """
    return Goal(Partial(_acceptance, threshold), Partial(_is_accepted, threshold))


def evade(threshold: ArrayLike, *, loss: LossFn = losses.margin) -> Goal:
    """Builds the goal of an input that a detector neither rejects nor classifies correctly.

    The loss is `min(loss(z, y), threshold - score)`, which is positive where the goal is reached if `loss` is the
    margin. Success is the event of Definition 3 of Tramer (2022, arXiv:2107.11630) for a perturbed input.

    Args:
        threshold: the detector's, a number.
        loss: of the classification, `(logits, labels) -> [B]`, positive where it is wrong.

    Returns:
        The goal.
    """
    return Goal(Partial(_evasion, Partial(loss), threshold), Partial(_evades, threshold))


def _acceptance(threshold: ArrayLike, output: tuple[Array, Array], labels: Array) -> Array:
    del labels
    return jnp.asarray(threshold) - output[1]


def _is_accepted(threshold: ArrayLike, output: tuple[Array, Array], labels: Array) -> Array:
    del labels
    return ~(output[1] > threshold)


def _evasion(loss: Partial, threshold: ArrayLike, output: tuple[Array, Array], labels: Array) -> Array:
    logits, score = output
    return jnp.minimum(loss(logits, labels), jnp.asarray(threshold) - score)


def _evades(threshold: ArrayLike, output: tuple[Array, Array], labels: Array) -> Array:
    logits, score = output
    return losses.is_wrong(logits, labels) & ~(score > threshold)
