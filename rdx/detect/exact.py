"""The reductions exactly, whatever a search may choose: decisions as sets, over finite spaces or over intervals.

A function with a rejection is a table `decisions [..., N, K + 1]`, bool: which of the `K` classes, or the rejection in
the last column, it may give at each of `N` places. What it may give somewhere in a ball is `reached`, the same shape,
from `reach` in a finite space or from `intervals.reach` on the line. Everything else is set algebra, and holds for the
worst selector of Theorem 4, which may take any accepted point and any class where there is none.

Source: Tramer (2022, arXiv:2107.11630, Definitions 1-3, Theorems 4 and 5).
"""

import numpy as np


def table(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Writes single decisions as sets.

    Args:
        labels: classes, or -1 for a rejection, shape `[..., N]`, int.
        num_classes: `K`.

    Returns:
        Shape `[..., N, K + 1]`, bool.
    """
    return np.asarray(labels)[..., None] == np.append(np.arange(num_classes), -1)


def reach(distances: np.ndarray, radius: np.ndarray | float, decisions: np.ndarray) -> np.ndarray:
    """Computes what is decided somewhere within a radius, in finite spaces.

    Args:
        distances: shape `[..., N, N]`.
        radius: shape `[...]`.
        decisions: shape `[..., N, K + 1]`, bool.

    Returns:
        Shape `[..., N, K + 1]`, bool.
    """
    within = distances <= np.asarray(radius)[..., None, None]
    return within.astype(np.float32) @ decisions.astype(np.float32) > 0


def is_right(decisions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tells where nothing but the label is decided: `f(x) = y` for every selector. Shape `[..., N]`, bool."""
    return (decisions == table(labels, decisions.shape[-1] - 1)).all(axis=-1)


def is_robust(reached: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tells where nothing but the label is reached (Definition 2). Shape `[..., N]`, bool."""
    return is_right(reached, labels)


def is_robust_with_detection(decisions: np.ndarray, reached: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tells where the label is decided, and reached are at most it and the rejection (Definition 3).

    Args:
        decisions: shape `[..., N, K + 1]`, bool.
        reached: within `eps`, the same shape.
        labels: shape `[..., N]`, int.

    Returns:
        Shape `[..., N]`, bool.
    """
    without = reached.copy()
    without[..., -1] = False
    return is_right(decisions, labels) & is_right(without, labels)


def classify(decisions: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Computes all that the classifier of Theorem 4 may give, over all selectors and all random classes.

    Args:
        decisions: of the detector, shape `[..., N, K + 1]`, bool.
        reached: by it within `eps / 2`, the same shape.

    Returns:
        Shape `[..., N, K + 1]`; the last column is False.
    """
    accepted = reached.copy()
    accepted[..., -1] = False
    accepted[..., :-1] |= ~accepted.any(axis=-1, keepdims=True)
    own = decisions.copy()
    own[..., -1] = False
    return np.where(decisions[..., -1:], accepted | own, own)


def detect(decisions: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Computes the detector of Theorem 5: the class where it is all that is reached, else a rejection.

    Args:
        decisions: of the classifier, one for each place, shape `[..., N, K + 1]`, bool.
        reached: by it within `eps / 2`, the same shape.

    Returns:
        Shape `[..., N, K + 1]`, bool.

    Raises:
        ValueError: where the classifier may give several classes, or none.
    """
    if not (decisions.sum(axis=-1) == 1).all() or decisions[..., -1].any():
        raise ValueError("Theorem 5 takes a classifier with one class at every place: choose a selector first.")
    is_constant = reached.sum(axis=-1, keepdims=True) == 1
    rejection = np.zeros(decisions.shape[-1], bool)
    rejection[-1] = True
    return np.where(is_constant, decisions, rejection)
