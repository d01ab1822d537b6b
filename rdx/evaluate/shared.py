"""What evaluations share: batches that are filled up, verdicts by a fresh forward pass, what attacks must keep to."""

import dataclasses
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rdx.attacks import driver
from rdx.balls import Ball, check_labels
from rdx.types import Array, Key, LogitsFn


def key_of(key: Key, name: str) -> Key:
    """Folds an attack's name into the run's key: it is the attack's own, whichever attacks run beside it."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def walk(rows: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts rows into batches; a last batch that is not full is filled up to one of few sizes; see `driver.size_for`.

    Args:
        rows: places of examples, shape `[M]`, int.
        batch_size: the largest batch.

    Returns:
        An iterator over the rows of each batch, and the same filled up with its first row.
    """
    for start in range(0, len(rows), batch_size):
        taken = rows[start : start + batch_size]
        yield taken, fill(taken, min(batch_size, driver.size_for(len(taken))))


def fill(rows: np.ndarray, size: int) -> np.ndarray:
    """Fills rows up to a size with the first of them."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows))])


def predict(logits_fn: LogitsFn, x: Array) -> Array:
    """Predicts classes `[B]` at the precision of certificates; -1 where a logit is NaN, which is always wrong."""
    # Both must speak of one function.
    with jax.default_matmul_precision("highest"):
        logits = logits_fn(x)
    return jnp.where(jnp.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))


predict_compiled = jax.jit(predict)


def check_inputs(logits_fn: LogitsFn, x: Array, labels: np.ndarray, ball: Ball) -> None:
    """Raises where inputs, labels and ball do not fit each other, before any work.

    Raises:
        ValueError: naming what does not fit.
    """
    if np.ndim(ball.eps) and np.shape(ball.eps)[0] != 1:
        raise ValueError(f"eps has shape {np.shape(ball.eps)}: errors are counted at one radius, give a scalar.")
    ball.check(x)
    check_labels(labels, x, jax.eval_shape(logits_fn, x[:1]).shape[1])


def check_attacked(name: str, x_adv: Array, x: Array, ball: Ball) -> None:
    """Raises where an attack does not keep to its ball.

    Raises:
        ValueError: naming the attack.
    """
    # Room for the rounding of x + delta, and no more.
    roomy = dataclasses.replace(ball, eps=1.0001 * ball.eps + 1e-6)
    if not bool(roomy.contains(x_adv, x).all()):
        raise ValueError(f"Attack {name!r} left the ball or the box: project, or apply `attacks.limit` to its result.")
