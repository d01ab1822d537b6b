"""Reductions over a test set: risks, rates and their confidence intervals.

All functions take per-example results (`[N]`, bool) and return Python floats; `mask [N]` drops padded rows.
"""

import dataclasses
import math

import numpy as np

from rdx.types import ArrayLike


@dataclasses.dataclass(frozen=True)
class Rate:
    """A proportion with its Wilson interval.

    Attributes:
        value: `count / total`.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        count: how many examples are counted.
        total: out of how many.
    """

    value: float
    low: float
    high: float
    count: int
    total: int


def wilson(count: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Computes the score interval of a proportion.

    `(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`; unlike the normal approximation it stays informative
    at 0 and 1. Source: Wilson (1927, J. Amer. Statist. Assoc. 22).

    Args:
        count: number of successes.
        total: number of trials; with 0 trials the interval is [0, 1].
        z: normal quantile, 1.96 for 95 %.

    Returns:
        The lower and the upper end.
    """
    if total == 0:
        return 0.0, 1.0
    p, n = count / total, float(total)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The interval contains p; at 0 and 1 rounding could leave it out by one ulp.
    return max(0.0, min(centre - half, p)), min(1.0, max(centre + half, p))


def rate(flags: ArrayLike, mask: ArrayLike | None = None) -> Rate:
    """Counts the true `flags`.

    Args:
        flags: shape `[N]`, bool.
        mask: which rows count, shape `[N]`, bool; all by default.

    Returns:
        The proportion with its 95 % Wilson interval; NaN over no examples.
    """
    flags = np.asarray(flags, dtype=bool)
    if flags.ndim != 1:
        raise ValueError(f"Expected per-example flags of shape [N], got shape {flags.shape}.")
    counted = flags if mask is None else flags[np.asarray(mask, dtype=bool)]
    count, total = int(counted.sum()), int(counted.size)
    low, high = wilson(count, total)
    return Rate(count / total if total else math.nan, low, high, count, total)


def risk(predictions: ArrayLike, labels: ArrayLike) -> Rate:
    """Computes the standard risk: the share of inputs with a wrong prediction (Tramer 2022, Sec. 2)."""
    return rate(np.asarray(predictions) != np.asarray(labels))


def robust_risk(predictions: ArrayLike, adversarial_predictions: ArrayLike, labels: ArrayLike) -> Rate:
    """Computes the robust risk: the share of inputs that are wrong already, or wrong under attack.

    Source: Tramer (2022, arXiv:2107.11630, Definition 1), with the attack's result in place of the supremum.
    """
    labels = np.asarray(labels)
    return rate((np.asarray(predictions) != labels) | (np.asarray(adversarial_predictions) != labels))


def robust_risk_with_detection(
    predictions: ArrayLike, is_rejected: ArrayLike, adversarial_predictions: ArrayLike,
    is_adversarial_rejected: ArrayLike, labels: ArrayLike,
) -> Rate:
    """Computes the robust risk with detection.

    An input is lost if it is rejected or wrong while clean, or accepted and wrong under attack. Source: Tramer (2022,
    arXiv:2107.11630, Definition 3).
    """
    labels = np.asarray(labels)
    lost_clean = (np.asarray(predictions) != labels) | np.asarray(is_rejected)
    lost_attacked = (np.asarray(adversarial_predictions) != labels) & ~np.asarray(is_adversarial_rejected)
    return rate(lost_clean | lost_attacked)


def attack_success_rate(success: ArrayLike, is_correct: ArrayLike) -> Rate:
    """Computes the share of successes among inputs that were classified correctly before (Dong et al. 2020, Sec. 3)."""
    return rate(success, mask=is_correct)


def certified_accuracy(is_certified: ArrayLike) -> Rate:
    """Computes the share of inputs whose every margin has a certified positive lower bound."""
    return rate(is_certified)
