"""From bounds to verdicts: which examples are certified, with an allowance for floating-point rounding."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import margins
from rdx.balls import Ball, check_labels
from rdx.bounds.crown import crown_ibp
from rdx.bounds.ibp import ibp
from rdx.bounds.interval import Interval
from rdx.types import Array, LogitsFn

# Outward allowance relative to the largest logit that can occur in the region. Float32 bounds were measured to exceed
# float64 ones by up to 4e-7 of that scale on convolutional nets with 10^4 neurons; the worst case of a sum of n terms
# grows like n * 6e-8, its typical size like sqrt(n) * 6e-8, which is 6e-6 at n = 10^4.
ROUNDING = 1e-5


class Certificate(NamedTuple):
    """What bounds say about a batch.

    Attributes:
        certified: every margin is positive over the whole region, with the allowance for rounding. Shape `[B]`, bool.
        margins_lower: lower bounds of `z_y - z_j` for `j != y`, before the allowance. Shape `[B, K - 1]`.
        slack: the allowance for rounding. Shape `[B]`.
    """

    certified: Array
    margins_lower: Array
    slack: Array


def certify(
    logits_fn: LogitsFn, x: Array, labels: Array, *, ball: Ball, method: Callable[..., Interval] = crown_ibp
) -> Certificate:
    """Certifies that no input in the ball around `x` is classified as anything but its label.

    An example is certified where `min_j lower(z_y - z_j) > slack`, with `slack = 1e-5 * max |z|` over the region, all
    computed at the highest matmul precision. NaN and infinity never certify.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat.
        method: `ibp`, `crown_ibp` or `crown`, or any function of that signature.

    Returns:
        The certificate.

    Raises:
        ValueError: on inputs outside the box, a bad ball or labels that do not fit.
    """
    with jax.default_matmul_precision("highest"):
        region = ball.region(x)
        logits = ibp(logits_fn, region)
        check_labels(labels, x, logits.lower.shape[1])
        margins_lower = method(margins.of(logits_fn), region, labels).lower
    largest = jnp.maximum(jnp.abs(logits.lower), jnp.abs(logits.upper)).max(axis=1)
    slack = ROUNDING * largest
    is_finite = jnp.isfinite(margins_lower).all(axis=1) & jnp.isfinite(slack)
    return Certificate(is_finite & (margins_lower.min(axis=1) > slack), margins_lower, slack)
