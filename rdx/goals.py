"""What an attack wants: a loss to maximise and a predicate that says when the goal is reached.

A goal is a pytree whose callables are `jax.tree_util.Partial`s, so that targets are leaves and compiled loops are
cached. Any output of a model can be attacked: `Goal(Partial(my_loss), Partial(my_success))`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses
from rdx.types import Array, LossFn


class Goal(NamedTuple):
    """An attack's goal over the model's output.

    Attributes:
        loss: `(logits [B, K], labels [B]) -> [B]`, maximised by the attack.
        success: `(logits [B, K], labels [B]) -> bool [B]`.
    """

    loss: Partial
    success: Partial


def misclassify(loss: LossFn = losses.cross_entropy) -> Goal:
    """Builds the untargeted goal: any label but the true one.

    Args:
        loss: the per-example loss to climb, `(logits, labels) -> [B]`.

    Returns:
        The goal; NaN logits count as success.
    """
    return Goal(Partial(loss), Partial(losses.is_wrong))


def target(targets: Array, loss: LossFn = losses.targeted_cross_entropy) -> Goal:
    """Builds the targeted goal: the model predicts `targets`.

    Args:
        targets: the wanted labels, shape `[B]`, int.
        loss: `(logits, targets) -> [B]`, rising towards the target.

    Returns:
        The goal.
    """
    return Goal(Partial(_towards, Partial(loss), targets), Partial(_hits, targets))


def _towards(loss: Partial, targets: Array, logits: Array, labels: Array) -> Array:
    del labels
    return loss(logits, targets)


def _hits(targets: Array, logits: Array, labels: Array) -> Array:
    del labels
    return (logits.argmax(axis=1) == targets) & ~jnp.isnan(logits).any(axis=1)
