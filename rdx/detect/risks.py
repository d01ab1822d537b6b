"""Risk, robust risk and robust risk with detection, example by example, over any metric and any search of its balls.

`metrics.rate` of what these functions return is the risk. With an exact search the maximum over the ball is exact;
with an attack it is a lower bound, and with a certificate beside it both ends are known.

Source: Tramer (2022, arXiv:2107.11630, Definitions 1-3).
"""

from collections.abc import Callable
from typing import Any

from rdx import goals, losses
from rdx.detect import searches
from rdx.detect.goals import decide, evade
from rdx.detect.searches import Search
from rdx.types import Array, ArrayLike, Detector, Key, LogitsFn


def errors(
    fn: Callable[[Array], Array | tuple[Array, Array]], x: Array, labels: Array, *, threshold: ArrayLike = 0.0
) -> Array:
    """Computes `1{f(x) != y}`; a detector that rejects a clean input errs (Definition 1).

    Args:
        fn: a classifier, `x [B, ...] -> logits [B, K]`, or a detector, `x -> (logits [B, K], score [B])`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        threshold: a detector rejects where `score > threshold`.

    Returns:
        Shape `[B]`, bool.
    """
    output = fn(x)
    if not isinstance(output, tuple):
        return losses.is_wrong(output, labels)
    return losses.is_wrong(output[0], labels) | (decide(output, threshold) != labels)


def robust_errors(
    key: Key, logits_fn: LogitsFn, x: Array, labels: Array, *, ball: Any, search: Search, index: Array | None = None
) -> Array:
    """Computes `max_{d(x, x') <= eps} 1{f(x') != y}`, as far as the search finds it (Definition 2).

    Args:
        key: of the search.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat, of the search's kind.
        search: an attack or another search; `searches.exact` in finite spaces.
        index: places in the data set, shape `[B]`, int.

    Returns:
        Shape `[B]`, bool; `x` itself is in the ball.
    """
    goal = goals.misclassify(losses.margin)
    found = searches.run(key, search, logits_fn, x, labels, ball=ball, goal=goal, index=index)
    return errors(logits_fn, x, labels) | found.is_found


def robust_errors_with_detection(
    key: Key, detector: Detector, x: Array, labels: Array, *, ball: Any, search: Search, threshold: ArrayLike = 0.0,
    index: Array | None = None,
) -> Array:
    """Computes `max_{d(x, x') <= eps} 1{f(x) != y or f(x') not in {y, rejected}}` (Definition 3).

    Args:
        key: of the search.
        detector: `x [B, ...] -> (logits [B, K], score [B])`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat, of the search's kind.
        search: an attack or another search, given the goal `goals.evade`.
        threshold: the detector rejects where `score > threshold`.
        index: places in the data set, shape `[B]`, int.

    Returns:
        Shape `[B]`, bool.
    """
    found = searches.run(key, search, detector, x, labels, ball=ball, goal=evade(threshold), index=index)
    return errors(detector, x, labels, threshold=threshold) | found.is_found
