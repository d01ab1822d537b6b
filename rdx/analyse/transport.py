"""Lower bounds of the robust error of every classifier, from the data alone, by optimal transport between classes.

Two examples of different classes whose balls of radius `eps` meet cannot both be robust: whichever class the common
point is given, one of them errs. Pairs without a common example err separately, so a largest matching of such pairs
bounds the number of errors from below; for two classes the bound is attained (Koenig's theorem).

Source: Bhagoji et al. (2019, arXiv:1909.12272, Theorem 1); the cost of a pair is 0 where `d(x, x') <= 2 eps`, else 1.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array, vstack
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial.distance import cdist

from rdx import norms
from rdx.types import ArrayLike, Norm

_METRICS = {"linf": "chebyshev", "l2": "euclidean", "l1": "cityblock"}
# Rows of distances that are held at once.
_CHUNK = 500
# All ways to pair classes up are tried; beyond this many classes there are too many.
_MOST_CLASSES = 16


class TransportBound(NamedTuple):
    """What no classifier can beat on these examples.

    Attributes:
        robust_error: least share of examples that err under attack, whatever the classifier.
        num_errors: least number of them: the size of the matching.
        num_examples: how many there are.
        pairs: classes whose examples were matched with each other.
    """

    robust_error: float
    num_errors: int
    num_examples: int
    pairs: tuple[tuple[int, int], ...]


def lower_bound(x: ArrayLike, others: ArrayLike, *, eps: float, norm: Norm) -> TransportBound:
    """Bounds the robust error of every classifier on the examples of two classes from below.

    `min_f R_adv^eps(f) = M / (n + m)` with the size `M` of a maximum matching of the pairs at distance `<= 2 eps`; for
    `n = m` that is `(1 - C / n) / 2` with the optimal transport cost `C`. It is exact on a convex box, where such a
    pair has its middle in both balls. Distances are computed in float64, whose last digits decide about pairs at `2
    eps` itself.

    Source: Bhagoji et al. (2019, arXiv:1909.12272, Theorem 1); matched by Hopcroft & Karp (1973), not as an assignment.

    Args:
        x: examples of one class, shape `[N, ...]`.
        others: of the other, shape `[M, ...]`.
        eps: the attacker's radius in input units.
        norm: of the attacker's ball.

    Returns:
        The bound; with an error below it, an attack on any classifier was too weak.

    Raises:
        ValueError: on a negative radius or examples of different shapes.
    """
    norms.check(norm)
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}: give a radius in input units, such as 8 / 255.")
    first, second = np.asarray(x, np.float64), np.asarray(others, np.float64)
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(f"Examples of shapes {first.shape[1:]} and {second.shape[1:]} have no distance.")
    first, second = (part.reshape(len(part), math.prod(part.shape[1:])) for part in (first, second))
    num_errors, total = _matching(first, second, eps, norm), len(first) + len(second)
    return TransportBound(num_errors / total if total else 0.0, num_errors, total, ((0, 1),))


def lower_bound_of_pairs(x: ArrayLike, labels: ArrayLike, *, eps: float, norm: Norm) -> TransportBound:
    """Bounds the robust error on several classes from below, by pairing classes up.

    Errors on disjoint pairs of classes add up, so `R >= max over pairings of sum M_ij / N`. It ignores collisions
    between pairs, so unlike `lower_bound` it may not be attained.

    Args:
        x: examples, shape `[N, ...]`.
        labels: shape `[N]`, int.
        eps: the attacker's radius in input units.
        norm: of the attacker's ball.

    Returns:
        The bound, with the best pairing.

    Raises:
        ValueError: on more than 16 classes, or as `lower_bound`.
    """
    x, labels = np.asarray(x), np.asarray(labels)
    classes = [int(label) for label in np.unique(labels)]
    if len(classes) > _MOST_CLASSES:
        raise ValueError(f"Pairings of {len(classes)} classes are too many: choose {_MOST_CLASSES} classes.")
    gain = {
        (a, b): lower_bound(x[labels == a], x[labels == b], eps=eps, norm=norm).num_errors
        for a in classes for b in classes if a < b
    }

    @functools.cache
    def best(left: tuple[int, ...]) -> tuple[int, tuple[tuple[int, int], ...]]:
        if len(left) < 2:
            return 0, ()
        head, *rest = left
        candidates = [best(tuple(rest))] if len(left) % 2 else []
        for other in rest:
            errors, pairs = best(tuple(label for label in rest if label != other))
            candidates.append((errors + gain[head, other], ((head, other), *pairs)))
        return max(candidates)

    num_errors, pairs = best(tuple(classes))
    return TransportBound(num_errors / len(labels) if len(labels) else 0.0, num_errors, len(labels), pairs)


def _matching(first: np.ndarray, second: np.ndarray, eps: float, norm: Norm) -> int:
    rows = []
    for start in range(0, len(first), _CHUNK):
        distances = cdist(first[start : start + _CHUNK], second, _METRICS[norm])  # pyright: ignore - it takes names
        rows.append(csr_array(distances <= 2.0 * eps))
    if not rows or not len(second):
        return 0
    graph = vstack(rows, format="csr")
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())
