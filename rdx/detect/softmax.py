"""Maximum softmax probability and entropy: a network that doubts its answer rejects (Hendrycks & Gimpel 2017)."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses
from rdx.compilation import as_partial
from rdx.types import Array, ArrayLike, LogitsFn


def max_softmax(logits_fn: LogitsFn, *, temperature: ArrayLike = 1.0) -> Partial:
    """Builds the detector that rejects where the greatest softmax probability `p` is small.

    Source: Hendrycks & Gimpel (2017, arXiv:1610.02136, Sec. 2). Difference: the score is `log((1 - p) / p)`, which
    rejects what `-p` rejects and keeps its gradient where `p` rounds to 1.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        temperature: divides the logits.

    Returns:
        A `Detector`.
    """
    return Partial(_max_softmax, as_partial(logits_fn), temperature)


def entropy(logits_fn: LogitsFn, *, temperature: ArrayLike = 1.0) -> Partial:
    """Builds the detector that rejects where the entropy of the softmax, `-sum_k p_k log p_k` in nats, is large.

    Source: Hendrycks & Gimpel (2017, arXiv:1610.02136) compare with it. Arguments and result as of `max_softmax`.
    """
    return Partial(_entropy, as_partial(logits_fn), temperature)


def _max_softmax(logits_fn: Partial, temperature: ArrayLike, x: Array) -> tuple[Array, Array]:
    logits = logits_fn(x)
    return logits, -losses.targeted_log_odds(logits / temperature, logits.argmax(axis=1))


def _entropy(logits_fn: Partial, temperature: ArrayLike, x: Array) -> tuple[Array, Array]:
    logits = logits_fn(x)
    log_p = jax.nn.log_softmax(logits / temperature, axis=1)
    return logits, -(jnp.exp(log_p) * log_p).sum(axis=1)
