"""Functions of whole test sets, some examples at a time."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rdx import bounds
from rdx.balls import Ball
from rdx.types import Array, LogitsFn


def in_batches(fn: Callable[..., Array], *arrays: Array, batch_size: int = 1000) -> Array:
    """Applies `fn` to `batch_size` examples at a time and puts the results together."""
    starts = range(0, len(arrays[0]), batch_size)
    return jnp.concatenate([fn(*(array[start : start + batch_size] for array in arrays)) for start in starts])


def certified_by_intervals(
    logits_fn: LogitsFn, ball: Ball, x: Array, labels: np.ndarray, *, batch_size: int = 1000
) -> np.ndarray:
    """Tells which examples intervals alone certify, shape `[N]`, bool."""
    certify = functools.partial(_by_intervals, logits_fn, ball)
    return np.asarray(in_batches(certify, x, jnp.asarray(labels), batch_size=batch_size))


@jax.jit
def _by_intervals(logits_fn: LogitsFn, ball: Ball, x: Array, labels: Array) -> Array:
    return bounds.certify(logits_fn, x, labels, ball=ball, method=bounds.ibp).certified
