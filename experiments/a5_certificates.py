"""Certificates of the same defended images side by side, and of the 8-bit images that files hold.

A5 trains and certifies by intervals (Frosio & Kautz 2023; their released code leaves CROWN-IBP no share in the end).
How much of a certified error is the looseness of the bounds, tighter ones tell: CROWN-IBP intersected with intervals,
and alpha-CROWN, whose slopes are optimised for every margin. Every verdict is confirmed in float64.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rdx import bounds, metrics, robustify
from rdx.balls import Ball
from rdx.bounds import Interval
from rdx.evaluate import evaluate
from rdx.types import Array, LogitsFn

ALPHA_STEPS = 10
# What the columns of the table are called.
METHODS = ("IBP", "CROWN-IBP", "alpha-CROWN")


def alpha_crown(fn: Callable[..., Array], region: Any, *args: Any) -> Interval:
    """Bounds by alpha-CROWN: CROWN's hidden bounds, and `ALPHA_STEPS` steps for the slopes of the margins."""
    return bounds.alpha_crown(fn, region, *args, num_steps=ALPHA_STEPS, hidden_steps=0)


def compare(
    logits_fn: LogitsFn, x: Array, labels: np.ndarray, *, ball: Ball, by_crown_ibp: np.ndarray
) -> dict[str, np.ndarray]:
    """Certifies images by each of `METHODS`.

    Args:
        logits_fn: the classifier.
        x: (defended) images, shape `[N, ...]`.
        labels: shape `[N]`, int.
        ball: the attacker's.
        by_crown_ibp: which of them CROWN-IBP and IBP certify together, as the evaluation found, shape `[N]`, bool.

    Returns:
        Which images are certified, shape `[N]`, bool, by method.
    """
    flags = (
        _certify(logits_fn, x, labels, ball, bounds.ibp), by_crown_ibp,
        _certify(logits_fn, x, labels, ball, alpha_crown, batch_size=50),
    )
    return dict(zip(METHODS, flags, strict=True))


def in_8_bits(
    logits_fn: LogitsFn, x_defended: Array, x: Array, labels: np.ndarray, *, defense: Ball, ball: Ball
) -> np.ndarray:
    """Rounds defended images to 8 bits and certifies them, by CROWN-IBP and IBP together.

    Args:
        logits_fn: the classifier.
        x_defended: defended images, shape `[N, ...]`.
        x: the originals, shape `[N, ...]`.
        labels: shape `[N]`, int.
        defense: the defender's ball.
        ball: the attacker's.

    Returns:
        Which images are certified, shape `[N]`, bool.
    """
    return _certify(logits_fn, robustify.quantise(x_defended, x, defense), labels, ball, bounds.crown_ibp)


def errors(certified: dict[str, np.ndarray]) -> dict[str, metrics.Rate]:
    """Counts what is not certified, by method."""
    return {name: metrics.rate(~flags) for name, flags in certified.items()}


def _certify(
    logits_fn: LogitsFn, x: Array, labels: np.ndarray, ball: Ball, method: Callable[..., Interval],
    batch_size: int = 500,
) -> np.ndarray:
    return evaluate(
        jax.random.key(0), logits_fn, x, labels, ball=ball, attacks={}, method=method, diagnose=None,
        batch_size=min(batch_size, len(labels)),
    ).certified
