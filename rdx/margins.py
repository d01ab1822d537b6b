"""Margin functions: the specifications that bounds certify.

A margin function is `(x [B, ...], labels [B]) -> [B, M]`; an input is classified correctly where every margin is
positive. Because the margin is traced together with the model, bounds fuse it into the last affine layer, which is
tighter than bounding logits and subtracting.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx.compilation import as_partial
from rdx.types import Array, LogitsFn


def of(logits_fn: LogitsFn) -> Partial:
    """Builds `(x, labels) -> z_y - z_j` for the `K - 1` classes `j != y`, in increasing order of `j`.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.

    Returns:
        A `Partial` `(x [B, ...], labels [B]) -> margins [B, K - 1]`.
    """
    return Partial(_against_all, as_partial(logits_fn))


def targeted(logits_fn: LogitsFn) -> Partial:
    """Builds `(x, labels, targets) -> z_y - z_t`, the margin against one class.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.

    Returns:
        A `Partial` `(x [B, ...], labels [B], targets [B]) -> margins [B, 1]`.
    """
    return Partial(_against_target, as_partial(logits_fn))


def specification(labels: Array, num_classes: int) -> Array:
    """Builds the matrix `C [B, K - 1, K]` whose rows are `e_y - e_j`, `j != y`: margins are `C @ logits`."""
    order = jnp.arange(num_classes - 1)[None, :]
    others = order + (order >= labels[:, None].astype(order.dtype)).astype(order.dtype)
    return _one_hot(labels, num_classes)[:, None, :] - _one_hot(others, num_classes)


def _one_hot(labels: Array, num_classes: int) -> Array:
    # As int32: in the dtype of small labels the classes that they are compared with would wrap around.
    return jax.nn.one_hot(labels.astype(jnp.int32), num_classes, dtype=jnp.float32)


def _against_all(logits_fn: Partial, x: Array, labels: Array) -> Array:
    logits = logits_fn(x)
    matrix = specification(labels, logits.shape[1]).astype(logits.dtype)
    return jnp.einsum("bk,bjk->bj", logits, matrix)


def _against_target(logits_fn: Partial, x: Array, labels: Array, targets: Array) -> Array:
    logits = logits_fn(x)
    row = (_one_hot(labels, logits.shape[1]) - _one_hot(targets, logits.shape[1])).astype(logits.dtype)
    return jnp.einsum("bk,bk->b", logits, row)[:, None]

