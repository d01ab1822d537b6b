"""From bounds to verdicts: which examples are certified, in spite of floating-point rounding.

`certify` is quick, may be traced, and rests on an allowance that was measured. `certify_in_float64` confirms its
verdicts with one that is proved; what a table calls certified has passed both.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from rdx import margins
from rdx.balls import Ball, Region, check_labels
from rdx.bounds import rounding
from rdx.bounds.crown import crown_ibp
from rdx.bounds.graph import UnsupportedPrimitiveError
from rdx.bounds.ibp import ibp
from rdx.bounds.interval import Interval
from rdx.compilation import as_partial
from rdx.types import Array, LogitsFn

# Outward allowance relative to the largest logit that can occur in the region. Float32 bounds were measured to exceed
# float64 ones by up to 4e-7 of that scale on convolutional nets with 10^4 neurons; the worst case of a sum of n terms
# grows like n * 6e-8, its typical size like sqrt(n) * 6e-8, which is 6e-6 at n = 10^4.
ROUNDING = 1e-5
# Widens a region of float64 numbers by more than the roundings of its ends and its radius.
_WIDER = 2.0**-50


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
    computed at the highest matmul precision. NaN, infinity and an empty region, such as around an input outside of the
    box, never certify. The allowance is measured, not proved: hidden values that cancel in the logits can defeat it,
    and `certify_in_float64` can not be defeated so.

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
    return _verdict(logits_fn, ball.region(x), labels, method, is_proof=False)


def certify_in_float64(
    logits_fn: LogitsFn, x: Array, labels: Array, *, ball: Ball, method: Callable[..., Interval] = crown_ibp
) -> Certificate:
    """Certifies like `certify`, in float64 and with an allowance for rounding that is proved.

    The guarantee, for functions of affine operations, relu and its like, and maxima: where an example is certified,
    every point of the ball, with `eps` as given or as the dtype of `x` rounds it, is classified as the label by the
    network that exact arithmetic makes of the given parameters. See `rounding.allowance` for what that assumes.
    Functions with other nonlinear operations, such as tanh or softmax, are computed in float64 as well, but there the
    allowance is only the one below.

    It does not say how the network is rounded when it runs in float32. For that the slack is still at least `1e-5 *
    max |z|`, as measured; `rounding.allowance` in float32 is the worst case, mostly far too large to certify with.

    This is a driver for the host: it compiles and cannot be traced. The parameters of a `jax.tree_util.Partial` are
    cast to float64, which is exact. Casts and dtypes in the code of `logits_fn` stay, and so do constants of a closure,
    with their own rounding; Python numbers are read in float64.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat.
        method: `ibp`, `crown_ibp` or `crown` with their default options, which the proof is for; any other function of
            that signature is computed in float64 as well.

    Returns:
        The certificate, as NumPy arrays, in float64.

    Raises:
        ValueError: as `certify`, and under a transformation of JAX.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((logits_fn, x, labels, ball))):
        raise ValueError("certify_in_float64 runs on the host: call it outside of jit, with the same arguments.")
    narrow, logits_fn = ball.region(x), as_partial(logits_fn)
    check_labels(labels, x, jax.eval_shape(logits_fn, x).shape[1])
    with rounding.double_precision():
        region = _hull(*rounding.doubled((narrow, ball)))
        found = _compiled_verdict(rounding.doubled(logits_fn), region, labels, method, is_proof=True)
        return jax.device_get(found)  # JAX warns of float64 arrays outside of this context


def _verdict(
    logits_fn: LogitsFn, region: Region, labels: Array, method: Callable[..., Interval], *, is_proof: bool
) -> Certificate:
    margins_fn = margins.of(logits_fn)
    with jax.default_matmul_precision("highest"):
        logits = ibp(logits_fn, region)
        check_labels(labels, region.center, logits.lower.shape[1])
        margins_lower = method(margins_fn, region, labels).lower
        slack = ROUNDING * jnp.maximum(jnp.abs(logits.lower), jnp.abs(logits.upper)).max(axis=1)
        if is_proof:
            slack = jnp.maximum(slack, _proved(margins_fn, region, labels))
    is_sound = jnp.isfinite(margins_lower).all(axis=1) & jnp.isfinite(slack) & _is_region(region)
    return Certificate(is_sound & (margins_lower.min(axis=1) > slack), margins_lower, slack)


_compiled_verdict = jax.jit(_verdict, static_argnames=("method", "is_proof"))


def _proved(margins_fn: Callable[..., Array], region: Region, labels: Array) -> Array:
    try:
        return rounding.allowance(margins_fn, region, labels).max(axis=1)
    except UnsupportedPrimitiveError:  # bounds have passed, so it is the analysis of rounding that knows no rule
        return jnp.zeros(region.center.shape[0], region.center.dtype)


def _is_region(region: Region) -> Array:
    """Tells where a region is around its center; no comparison with NaN holds."""
    is_around = (region.lower <= region.center) & (region.center <= region.upper) & (region.radius >= 0)
    return is_around.reshape(is_around.shape[0], -1).all(axis=1)


def _hull(rounded: Region, ball: Ball) -> Region:
    """Encloses the region as it was rounded, and the ball with its own radius and with the rounded one."""
    radius = jnp.maximum(rounded.radius, ball.radius(rounded.center))
    wide = dataclasses.replace(ball, eps=radius + _WIDER * (radius + jnp.abs(rounded.center))).region(rounded.center)
    return dataclasses.replace(
        wide, lower=jnp.minimum(rounded.lower, wide.lower), upper=jnp.maximum(rounded.upper, wide.upper)
    )
