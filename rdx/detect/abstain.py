"""Joint classification and detection with abstain classes, certified by interval bounds.

A network has `K` classes and `M` classes more: an input is rejected where one of these has the greatest logit. The
example `(x, y)` is robust with detection where every perturbed input gets the label or is rejected, that is where for
every other class `i < K`

    min_{x'} max(z_y - z_i, z_{a_1} - z_i, ..., z_{a_M} - z_i) > 0.

The maximum is at least any convex combination, so for weights `w` on `(y, a_1, ..., a_M)` that sum to 1 the left side
is at least `J_i(w) = min_{x'} sum_k w_k z_k - z_i`. Over the box `[l, u]` of the last hidden layer, `J_i` is concave
and piecewise linear; for one abstain class its maximum has a closed form, which by minimax is the exact value of the
left side over that box.

Source: Sheikholeslami, Lotfi & Kolter (2021, "Provably robust classification of adversarial examples with detection",
ICLR); several abstain classes: Baharlouei et al. (2023, arXiv:2210.14410).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import Partial

from rdx import bounds, losses
from rdx.balls import Ball, Region
from rdx.bounds import Interval, UnsupportedPrimitiveError, rounding
from rdx.bounds.certify import ROUNDING
from rdx.detect.abstain_bound import Network, lower_bound, specification, weights
from rdx.types import Array, ArrayLike

# A region of float64 numbers is this much wider than the ball: more than float32 inputs are off by.
_WIDER = 1e-6


class Certificate(NamedTuple):
    """What bounds say about a batch.

    Attributes:
        certified: the clean input gets its label, and every perturbed one its label or is rejected. Shape `[B]`, bool.
        lower: `J_i` for the `K - 1` other classes, before the allowance for rounding. Shape `[B, K - 1]`.
        weights: of label and abstain classes. Shape `[B, K - 1, 1 + M]`.
        slack: the allowance. Shape `[B]`.
    """

    certified: Array
    lower: Array
    weights: Array
    slack: Array


def logits_fn(network: Network) -> Partial:
    """Builds the `LogitsFn` `x [B, ...] -> [B, K + M]` of a network."""
    return Partial(_forward, network)


def detector(network: Network) -> Partial:
    """Builds the detector that rejects where an abstain class has the greatest logit.

    Args:
        network: with `K` classes and `M` abstain classes.

    Returns:
        A `Detector` with the score `max_a z_a - max_{k < K} z_k` and the threshold 0.
    """
    return Partial(_detect, network)


def certify(
    network: Network, x: Array, labels: Array, *, ball: Ball, method: Callable[..., Interval] = bounds.ibp,
) -> Certificate:
    """Certifies that every input in the ball is classified as its label or rejected, and the clean one not rejected.

    The weights are best for intervals; with them, the combinations `sum_k w_k z_k - z_i` are bounded by any method. As
    in `bounds.certify`, what is certified exceeds `1e-5 * max |z|` at the highest matmul precision.

    Args:
        network: with `K` classes and `M` abstain classes.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat.
        method: `bounds.ibp`, `bounds.crown_ibp` or `bounds.crown`.

    Returns:
        The certificate.
    """
    return _certify(network, x, labels, ball, method, is_proof=False)


def certify_in_float64(
    network: Network, x: Array, labels: Array, *, ball: Ball, method: Callable[..., Interval] = bounds.ibp,
) -> Certificate:
    """Certifies like `certify`, in float64 and with an allowance for rounding that is proved (`rounding.allowance`).

    The radius is taken 1e-6 greater, which covers inputs and perturbations in float32. Arguments are those of
    `certify`; it runs on the host, outside of `jit`.

    Returns:
        The certificate, as NumPy arrays.

    Raises:
        ValueError: under a transformation of JAX.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((network, x, labels, ball))):
        raise ValueError("certify_in_float64 runs on the host: call it outside of jit, with the same arguments.")
    with rounding.double_precision():
        wide = dataclasses.replace(ball, eps=jnp.asarray(ball.eps, jnp.float64) + _WIDER)
        given = rounding.doubled((network, x))
        return jax.device_get(_compiled(*given, labels, rounding.doubled(wide), method, is_proof=True))


class Objective(NamedTuple):
    """The weights of the training loss; see `objective`.

    Attributes:
        detection: `lambda_1`, of the worst case with detection.
        classification: of the worst case without.
        natural: `lambda_2`, of the clean loss.
        low: least weight of the abstain class in the bound.
        high: greatest weight.
    """

    detection: ArrayLike = 1.0
    classification: ArrayLike = 1.0
    natural: ArrayLike = 1.0
    low: ArrayLike = 0.1
    high: ArrayLike = 0.9


DEFAULT = Objective()


def objective(
    network: Network, x: Array, labels: Array, *, ball: Ball, kappa: ArrayLike,
    settings: Objective = DEFAULT,
) -> tuple[Array, dict[str, Array]]:
    """Computes the training loss `(1 - kappa) (lambda_1 E(J) + lambda_c E(m)) + lambda_2 kappa CE(z, y)`.

    `E` is the worst-case cross entropy of the bounds `J` with detection, and of the plain margins `m` (`eta = 0`); both
    are over the `K` classes, and the clean loss over all `K + M`. The weights `eta` are those of `weights`, without a
    gradient of their own, which by the envelope theorem they do not need.

    Source: Sheikholeslami et al. (2021, Eq. 11) as their released code has it, in which `eta` is kept in an interval
    so that the abstain class learns from the start.

    Args:
        network: with `K` classes and `M` abstain classes.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the perturbations at this step.
        kappa: weight of the clean loss, 1 at first.
        settings: the other weights.

    Returns:
        Loss `[B]`, and metrics `[B]`: `clean_loss`, `detection_loss`, `error`, `certified_error`.
    """
    box = bounds.ibp(network.hidden_fn, ball.region(x))
    best = weights(*jax.lax.stop_gradient((box, network)), labels, low=settings.low, high=settings.high)
    with_detection = lower_bound(box, network, labels, best)
    plain = lower_bound(box, network, labels, jnp.zeros_like(best).at[:, :, 0].set(1.0))
    logits = network(x)
    clean, worst = losses.cross_entropy(logits, labels), losses.worst_case_cross_entropy(with_detection)
    detection, classification, natural = (jnp.asarray(weight, clean.dtype) for weight in settings[:3])
    robust = detection * worst + classification * losses.worst_case_cross_entropy(plain)
    is_wrong = losses.is_wrong(logits, labels)
    metrics = {
        "clean_loss": clean, "detection_loss": worst, "error": is_wrong,
        "certified_error": is_wrong | ~(with_detection > 0).all(axis=1),
    }
    kappa = jnp.asarray(kappa, clean.dtype)
    return (1.0 - kappa) * robust + natural * kappa * clean, metrics


def balance(logits: Array, num_classes: int) -> Array:
    """Computes how unevenly a batch uses the abstain classes: `log M - H(mean_b softmax(z_{a_1}, ..., z_{a_M}))`.

    Training with several abstain classes tends to use one; this penalty, 0 for even use and 0 with one class, counters
    it. Baharlouei et al. (2023, arXiv:2210.14410) describe the degeneracy and a regulariser of their own; this one is
    simpler. It is a property of the batch, not of examples.

    Args:
        logits: shape `[B, K + M]`.
        num_classes: `K`.

    Returns:
        A scalar.
    """
    share = jax.nn.softmax(logits[:, num_classes:], axis=1).mean(axis=0)
    return jnp.log(jnp.asarray(share.shape[0], share.dtype)) + (share * jnp.log(jnp.maximum(share, 1e-12))).sum()


def _forward(network: Network, x: Array) -> Array:
    return network(x)


def _detect(network: Network, x: Array) -> tuple[Array, Array]:
    logits, num_classes = network(x), network.num_classes
    return logits[:, :num_classes], logits[:, num_classes:].max(axis=1) - logits[:, :num_classes].max(axis=1)


def _combinations(network: Network, x: Array, labels: Array, weights: Array) -> Array:
    logits = network(x)
    return jnp.einsum("bk,bik->bi", logits, specification(labels, weights, logits.shape[1]))


def _certify(
    network: Network, x: Array, labels: Array, ball: Ball, method: Callable[..., Interval], *, is_proof: bool
) -> Certificate:
    region, fn = ball.region(x), Partial(_combinations, network)
    with jax.default_matmul_precision("highest"):
        box = bounds.ibp(network.hidden_fn, region)
        best = weights(box, network, labels)
        lower, logits = method(fn, region, labels, best).lower, bounds.ibp(logits_fn(network), region)
        slack = ROUNDING * jnp.maximum(jnp.abs(logits.lower), jnp.abs(logits.upper)).max(axis=1)
        if is_proof:
            slack = jnp.maximum(slack, _proved(fn, region, labels, best))
        is_right = ~losses.is_wrong(network(x), labels)
    is_sound = jnp.isfinite(lower).all(axis=1) & jnp.isfinite(slack) & is_right
    return Certificate(is_sound & (lower.min(axis=1) > slack), lower, best, slack)


_compiled = jax.jit(_certify, static_argnames=("method", "is_proof"))


def _proved(fn: Partial, region: Region, labels: Array, best: Array) -> Array:
    try:
        return rounding.allowance(fn, region, labels, best).max(axis=1)
    except UnsupportedPrimitiveError:  # bounds have passed, so it is the analysis of rounding that knows no rule
        return jnp.zeros(len(labels), best.dtype)
