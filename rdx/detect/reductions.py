"""Detection and classification are as hard as each other, up to computation and a factor 2 in the radius.

Theorem 4: a detector that is robust at `eps` gives a classifier that is robust at `eps / 2`, which labels a rejected
input like an accepted one within `eps / 2`. Theorem 5: a classifier that is robust at `eps / 2` gives a detector that
is robust at `eps`, which rejects where the prediction is not constant within `eps / 2`. Both constructions search a
ball; with an exact search they are the paper's, with another one every miss is seen (`is_settled`) and can be counted
(`explain_failure`).

The constructed functions are ordinary callables, a `LogitsFn` and a `Detector`, and can be attacked. They are functions
of the input alone: a search draws its random numbers from a hash of the input. Gradients pass through the search
straight, as if the witness moved along with the input.

A certificate passes through by the theorems, not by bounding a search. A detector certified at `eps` makes the
classifier of Theorem 4 robust at `eps / 2`; `certify_detector` carries certificates through Theorem 5.

Source: Tramer (2022, arXiv:2107.11630, Theorems 4 and 5).
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx import bounds, goals, losses, norms
from rdx.attacks import base
from rdx.compilation import as_partial
from rdx.detect import searches
from rdx.detect.goals import REJECTED, accept, decide
from rdx.detect.metric_spaces import MetricSpace
from rdx.detect.searches import Search, Witness
from rdx.types import Array, ArrayLike, Detector, Key, LogitsFn

# What the logit of the label drawn in place of a missing witness exceeds the others by.
_DRAWN = 1.0


class MidpointError(ValueError):
    """Theorem 5 does not hold in the metric space, which lacks midpoints."""


class MidpointWarning(UserWarning):
    """Marks a detector of Theorem 5 in a metric space without midpoints: its guarantee is void."""


class Decoding(NamedTuple):
    """How the classifier of Theorem 4 came to its logits, example by example.

    Attributes:
        logits: of the classifier. Shape `[B, K]`.
        is_rejected: whether the detector rejects the input, so that a witness was searched. Shape `[B]`, bool.
        witness: the accepted point that the label is taken from; the input itself where it is accepted. Shape
            `[B, ...]`.
        is_found: whether `witness` is accepted; else the label is drawn. Shape `[B]`, bool.
        is_settled: whether it is found, or proved that the detector rejects the whole ball. Shape `[B]`, bool.
    """

    logits: Array
    is_rejected: Array
    witness: Array
    is_found: Array
    is_settled: Array


# What `explain_failure` may say of an example.
NO_FAILURE, ACCEPTED, BY_WITNESS, CLEAN, MISSED = range(5)


class Explanation(NamedTuple):
    """The failure of a detector behind a failure of its classifier, example by example.

    Attributes:
        kind: `NO_FAILURE`: the classifier is right. `ACCEPTED`: the detector accepts and misclassifies the perturbed
            input. `BY_WITNESS`: it misclassifies the witness. `CLEAN`: it rejects or misclassifies the clean input.
            `MISSED`: the search missed an accepted point, the clean input at least; no failure of the detector. Shape
            `[B]`, int32.
        point: where the detector fails; the clean input for `NO_FAILURE` and `MISSED`. Shape `[B, ...]`.
        distance: from the clean input to `point`. Shape `[B]`.
        is_valid: whether the detector was seen to fail at `point`, as Definition 3 has it, within `eps`. Shape `[B]`,
            bool.
    """

    kind: Array
    point: Array
    distance: Array
    is_valid: Array


def classifier_from_detector(
    key: Key, detector: Detector, *, metric: MetricSpace, eps: float, search: Search, threshold: ArrayLike = 0.0
) -> Partial:
    """Builds the classifier of Theorem 4, robust at `eps / 2` wherever the detector is robust at `eps`.

    `f_clf(x) = f_det(x')` with `x' = x` where the detector accepts `x`, else any accepted `x'` with `d(x, x') <= eps /
    2`, else a class drawn at random. With an exact search `R(f_clf) <= R(f_det)` and `R_adv^{eps/2}(f_clf) <=
    R_adv-det^eps(f_det)`, in any metric space and for any choice of `x'`; a search that misses accepted points adds at
    most the share of examples for which it does.

    Source: Tramer (2022, arXiv:2107.11630, Theorem 4). The minimum-distance variant, of which the paper speaks as
    decoding, is `search=searches.nearest(...)`, or `searches.exact` as it stands. The class drawn is a function of the
    input and the key, so that the classifier is deterministic.

    Args:
        key: of the search and of the classes drawn.
        detector: `x [B, ...] -> (logits [B, K], score [B])`.
        metric: the space.
        eps: radius at which the detector is robust, in the metric's units.
        search: how to find accepted points.
        threshold: the detector rejects where `score > threshold`.

    Returns:
        A `LogitsFn`: the detector's logits at `x'`, or 1 for a class drawn and 0 for the others.
    """
    return Partial(_logits, key, as_partial(detector), metric.ball(eps / 2), Partial(search), threshold)


def decode(
    key: Key, detector: Detector, x: Array, *, metric: MetricSpace, eps: float, search: Search,
    threshold: ArrayLike = 0.0,
) -> Decoding:
    """Runs the classifier of Theorem 4 and tells how it came to its labels.

    Args:
        key: as `classifier_from_detector`, for the same labels.
        detector: as there.
        x: inputs, shape `[B, ...]`.
        metric: as there.
        eps: as there.
        search: as there.
        threshold: as there.

    Returns:
        Logits, witnesses and what the search knows.
    """
    return _decode(key, as_partial(detector), metric.ball(eps / 2), Partial(search), threshold, x)


def detector_from_classifier(
    key: Key, logits_fn: LogitsFn, *, metric: MetricSpace, eps: float, search: Search, requires_proof: bool = False,
    allow_no_midpoints: bool = False,
) -> Partial:
    """Builds the detector of Theorem 5, robust at `eps` wherever the classifier is robust at `eps / 2`.

    `f_det(x)` rejects if there is an `x'` with `d(x, x') <= eps / 2` and `f_clf(x') != f_clf(x)`, else it is
    `f_clf(x)`. With an exact search, where midpoints exist, `R(f_det) = R_adv-det^eps(f_det) = R_adv^{eps/2}(f_clf)`,
    example by example: the paper has `<=`. A search that misses such an `x'` rejects too little, one that requires a
    proof too much: the guarantee is kept and the clean risk rises to one minus the certified accuracy.

    Source: Tramer (2022, arXiv:2107.11630, Theorem 5); with certificates it is implicit in Wong & Kolter (2018,
    arXiv:1711.00851, Sec. 3.1). The paper states the theorem for an arbitrary metric, but its proof takes a point
    within `eps / 2` of two points at distance `eps`; on two points at distance 1 the classifier that tells them apart
    is robust at 1/2, and this construction never rejects, so it is not robust at 1.

    Args:
        key: of the search.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        metric: the space; it needs midpoints.
        eps: radius at which the detector shall be robust, twice that of the classifier.
        search: how to find another prediction; its goal is `goals.misclassify(losses.margin)`.
        requires_proof: whether all is rejected but what the search has proved constant (`constant_prediction`).
        allow_no_midpoints: whether a space without midpoints is marked with a warning instead of refused.

    Returns:
        A `Detector` with the threshold 0. The score is the greatest margin loss found in the ball, or with a proof its
        upper bound.

    Raises:
        MidpointError: in a space without midpoints at `eps`.
    """
    _check_midpoints(metric, eps, is_allowed=allow_no_midpoints)
    return Partial(
        _reject_unless_constant, key, as_partial(logits_fn), metric.ball(eps / 2), Partial(search),
        jnp.asarray(requires_proof),
    )


def certify_detector(
    logits_fn: LogitsFn, x: Array, labels: Array, *, metric: MetricSpace, eps: float,
    certify: Callable[..., bounds.Certificate] = bounds.certify,
) -> Array:
    """Certifies that Theorem 5's detector is robust with detection at `eps`: its classifier is certified at `eps / 2`.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        metric: the space.
        eps: radius of the detector.
        certify: `bounds.certify`, `bounds.certify_in_float64`, or one of them with another method.

    Returns:
        Shape `[B]`, bool: of every point within `eps` the exact construction rejects it or gives the label, and it
        accepts `x`; so does the one that requires a proof, if the proof is as strong.

    Raises:
        MidpointError: in a space without midpoints at `eps`.
    """
    _check_midpoints(metric, eps, is_allowed=False)
    return certify(logits_fn, x, labels, ball=metric.ball(eps / 2)).certified


def explain_failure(
    detector: Detector, x: Array, labels: Array, x_adv: Array, decoding: Decoding, *, metric: MetricSpace, eps: float,
    threshold: ArrayLike = 0.0,
) -> Explanation:
    """Turns failures of Theorem 4's classifier into failures of its detector within `eps`, as the proof does.

    If `f_clf(x_adv) != y` with `d(x, x_adv) <= eps / 2`, then the detector accepts and misclassifies `x_adv`, or the
    witness, which is within `eps / 2 + eps / 2` of `x`; or no witness was found, and then it rejects `x`, which would
    be one, or the search missed it. The last case is the only one that an inexact search adds; it is told apart.

    Source: Tramer (2022, arXiv:2107.11630, proof of Theorem 4).

    Args:
        detector: `x [B, ...] -> (logits [B, K], score [B])`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        x_adv: perturbed inputs within `eps / 2`, shape `[B, ...]`.
        decoding: of `x_adv`, from `decode`.
        metric: the space.
        eps: the detector's radius.
        threshold: the detector's.

    Returns:
        The explanations; each kind but `NO_FAILURE` and `MISSED` names a point where the detector fails.
    """
    is_failure = losses.is_wrong(decoding.logits, labels)
    is_clean_failure = decide(detector(x), threshold) != labels
    kind = jnp.where(decoding.is_found, BY_WITNESS, jnp.where(is_clean_failure, CLEAN, MISSED))
    kind = jnp.where(is_failure, jnp.where(decoding.is_rejected, kind, ACCEPTED), NO_FAILURE)
    point = base.choose(kind == ACCEPTED, x_adv, base.choose(kind == BY_WITNESS, decoding.witness, x))
    decision = decide(detector(point), threshold)
    fails = (decision != labels) & ((decision != REJECTED) | (kind == CLEAN))
    distance = metric.distance(point, x)
    # Twice an attack's allowance for rounding, since two balls were walked through.
    is_within = distance <= eps * (1 + 4e-6)
    is_explained = (kind != NO_FAILURE) & (kind != MISSED)
    return Explanation(kind.astype(jnp.int32), point, distance, is_explained & fails & is_within)


def _check_midpoints(metric: MetricSpace, eps: float, *, is_allowed: bool) -> None:
    if metric.has_midpoints(eps):
        return
    message = (
        f"{metric} has no midpoints at eps = {eps}: two points at that distance need a point within eps / 2 of both, "
        "without which Theorem 5 does not hold. Take a continuous box, or an even number of levels of a lattice"
    )
    if not is_allowed:
        raise MidpointError(f"{message}; allow_no_midpoints=True builds the detector without its guarantee.")
    warnings.warn(f"{message}.", MidpointWarning, stacklevel=3)


def _fingerprint(x: Array) -> Array:
    """Hashes every example to a non-negative integer, so that what is drawn for it depends on nothing else."""
    flat = norms.flatten(x) if x.ndim > 1 else x[:, None]
    if flat.dtype == jnp.bool_ or flat.dtype.itemsize != 4:
        flat = flat.astype(jnp.float32)
    words = jax.lax.bitcast_convert_type(flat, jnp.uint32)
    weights = jnp.asarray(np.arange(1, 2 * flat.shape[1], 2, dtype=np.uint32) * np.uint32(0x9E3779B1))
    total = ((words ^ (words >> 15)) * weights[None]).sum(axis=1, dtype=jnp.uint32)
    total = (total ^ (total >> 16)) * jnp.uint32(0x85EBCA6B)
    return ((total ^ (total >> 13)) >> 1).astype(jnp.int32)


def _logits(key: Key, detector: Partial, ball: Any, search: Partial, threshold: ArrayLike, x: Array) -> Array:
    return _decode(key, detector, ball, search, threshold, x).logits


def _decode(key: Key, detector: Partial, ball: Any, search: Partial, threshold: ArrayLike, x: Array) -> Decoding:
    search_key, label_key = jax.random.split(key)
    index = _fingerprint(x)
    logits, score = detector(x)
    is_rejected = score > threshold
    found = searches.run(
        search_key, search, detector, jax.lax.stop_gradient(x), jnp.zeros(x.shape[0], jnp.int32), ball=ball,
        goal=accept(threshold), index=index,
    )
    witness = base.choose(is_rejected, _moving_with(x, found), x)
    draws = jax.vmap(lambda k: jax.random.randint(k, (), 0, logits.shape[1]))(base.example_keys(label_key, x, index))
    drawn = _DRAWN * jax.nn.one_hot(draws, logits.shape[1], dtype=logits.dtype)
    is_found = found.is_found | ~is_rejected
    logits = base.choose(is_rejected, base.choose(is_found, detector(witness)[0], drawn), logits)
    return Decoding(logits, is_rejected, witness, is_found, found.is_settled | ~is_rejected)


def _reject_unless_constant(
    key: Key, logits_fn: Partial, ball: Any, search: Partial, requires_proof: Array, x: Array
) -> tuple[Array, Array]:
    logits = logits_fn(x)
    labels = logits.argmax(axis=1).astype(jnp.int32)
    found = searches.run(
        key, search, logits_fn, jax.lax.stop_gradient(x), labels, ball=ball, goal=goals.misclassify(losses.margin),
        index=_fingerprint(x),
    )
    # Computed once more at an attack's strongest input, for the gradient; a bound over the ball stays as it is.
    at_witness = losses.margin(logits_fn(_moving_with(x, found)), labels)
    loss = jnp.where(requires_proof & ~found.is_found, found.loss, at_witness)
    is_rejected = found.is_found | (requires_proof & ~found.is_settled)
    tiny = jnp.finfo(loss.dtype).tiny
    return logits, jnp.where(is_rejected, jnp.maximum(loss, tiny), jnp.minimum(loss, 0.0))


def _moving_with(x: Array, found: Witness) -> Array:
    """Gives the witness the derivative of the input; its value is exact, for `x - x` is 0."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return found.x
    return jax.lax.stop_gradient(found.x) + (x - jax.lax.stop_gradient(x))
