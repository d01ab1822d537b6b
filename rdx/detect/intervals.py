"""Piecewise constant functions on an interval: the reductions in one dimension, without any search.

Balls are intervals, so what is decided somewhere within a radius is again piecewise constant, with the edges moved by
the radius: label sets are dilated, and Theorem 5 erodes them. All statements are up to the finitely many edges, of
measure 0.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class IntervalMap:
    """A set-valued decision on each of `M` successive intervals; see `exact` for tables.

    Attributes:
        edges: rising ends of the intervals, shape `[M + 1]`; the first and the last are those of the space.
        decisions: shape `[M, K + 1]`, bool.
    """

    edges: np.ndarray
    decisions: np.ndarray

    def at(self, points: np.ndarray) -> np.ndarray:
        """Looks the decisions up at points inside the intervals, shape `[P] -> [P, K + 1]`."""
        place = np.searchsorted(self.edges, points, side="right") - 1
        return self.decisions[np.clip(place, 0, len(self.decisions) - 1)]

    @property
    def middles(self) -> np.ndarray:
        """The middle of each interval, shape `[M]`."""
        return 0.5 * (self.edges[1:] + self.edges[:-1])

    @property
    def lengths(self) -> np.ndarray:
        """The length of each interval, shape `[M]`."""
        return np.diff(self.edges)


def reach(function: IntervalMap, radius: float) -> IntervalMap:
    """Computes what is decided somewhere within a radius, `U_{|x - x'| < r} f(x')`.

    Args:
        function: on an interval.
        radius: at least 0.

    Returns:
        The union, with the edges of `function` moved by the radius both ways.
    """
    low, high = function.edges[0], function.edges[-1]
    inner = function.edges[1:-1]
    edges = np.unique(np.concatenate([[low, high], *(np.clip(inner + s * radius, low, high) for s in (-1, 1))]))
    middles = 0.5 * (edges[1:] + edges[:-1])[:, None]
    within = (function.edges[:-1] < middles + radius) & (function.edges[1:] > middles - radius)
    return IntervalMap(edges, within.astype(np.float32) @ function.decisions.astype(np.float32) > 0)


def combine(op: Callable[..., np.ndarray], *functions: IntervalMap) -> IntervalMap:
    """Applies a function of tables, such as `exact.classify`, on the common refinement of several maps.

    Args:
        op: `(decisions [M, K + 1], ...) -> [M, ...]`.
        functions: on the same interval.

    Returns:
        The result on the intervals of the refinement.
    """
    edges = np.unique(np.concatenate([function.edges for function in functions]))
    middles = 0.5 * (edges[1:] + edges[:-1])
    return IntervalMap(edges, op(*(function.at(middles) for function in functions)))
