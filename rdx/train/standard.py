"""Training on clean examples."""

import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses
from rdx.models import Forward
from rdx.types import Array, Key, PyTree


def cross_entropy(forward: Forward) -> Partial:
    """Builds the loss `mean_i CE(f(x_i), y_i)`.

    Args:
        forward: the model, from `models.forward`.

    Returns:
        A loss for `train.fit` with metrics `loss` and `error`.
    """
    return Partial(_cross_entropy, forward)


def batch_mean(values: Array, batch: PyTree) -> Array:
    """Averages per-example values over the rows that the batch's `mask [B]` keeps, all without one.

    Args:
        values: shape `[B]`, float or bool.
        batch: the batch, `{"x": ..., "labels": ..., optionally "mask": bool [B]}`.

    Returns:
        The mean, a float32 scalar; 0 where no row counts.
    """
    values = values.astype(jnp.float32)
    if "mask" not in batch:
        return values.mean()
    mask = batch["mask"].astype(bool)
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(mask.sum().astype(jnp.float32), 1.0)


def _cross_entropy(
    forward: Forward, params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    del key, step
    logits, model_state = forward(params, model_state, batch["x"], train=True)
    loss = batch_mean(losses.cross_entropy(logits, batch["labels"]), batch)
    error = batch_mean(losses.is_wrong(logits, batch["labels"]), batch)
    return loss, (model_state, {"loss": loss, "error": error})
