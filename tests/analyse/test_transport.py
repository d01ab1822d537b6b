"""The transport bound against brute force, against a certificate-free optimum, and on the digits."""

import itertools

import numpy as np
import pytest

from rdx import data
from rdx.analyse import lower_bound, lower_bound_of_pairs


def _least_errors(first, second, limit):
    """Smallest number of examples whose removal leaves no colliding pair, by trying all subsets."""
    pairs = [
        (i, len(first) + j) for i in range(len(first)) for j in range(len(second))
        if np.abs(first[i] - second[j]).max() <= limit
    ]
    everyone = range(len(first) + len(second))
    for size in itertools.count():
        for removed in itertools.combinations(everyone, size):
            if all(a in removed or b in removed for a, b in pairs):
                return size
    return None


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_is_what_the_best_classifier_reaches(seed):
    # A classifier robust on a set of examples exists exactly if no two of them collide.
    rng = np.random.default_rng(seed)
    first, second = rng.random((5, 2)), rng.random((6, 2))
    eps = 0.05 + 0.15 * rng.random()
    bound = lower_bound(first, second, eps=eps, norm="linf")
    assert bound.num_errors == _least_errors(first, second, 2 * eps)
    assert bound.robust_error == bound.num_errors / 11


@pytest.mark.parametrize(("norm", "distance"), [("linf", 0.4), ("l2", 0.5), ("l1", 0.7)])
def test_a_pair_collides_at_half_its_distance(norm, distance):
    first, second = np.array([[0.1, 0.2]]), np.array([[0.5, 0.5]])
    assert lower_bound(first, second, eps=0.501 * distance, norm=norm).robust_error == 0.5
    assert lower_bound(first, second, eps=0.499 * distance, norm=norm).robust_error == 0.0


def test_three_and_seven_of_the_digits():
    # Measured before, independently: 0 at 0.2, 0.175 at 0.45, 0.5 at 0.5, on as many threes as sevens.
    train = data.load("digits", "train")
    x, labels = train.images / 255.0, train.labels
    threes, sevens = x[labels == 3], x[labels == 7]
    size = min(len(threes), len(sevens))
    bound = [lower_bound(threes[:size], sevens[:size], eps=eps, norm="linf").robust_error for eps in (0.2, 0.45, 0.5)]
    assert bound[0] == 0.0
    assert 0.1 < bound[1] < 0.25
    assert bound[2] == 0.5
    assert bound == sorted(bound)


def test_pairs_of_classes_add_up():
    # Classes 0 and 3 coincide, 1 and 2 coincide, 4 is far: the best pairing finds both.
    x = np.array([0.0, 0.0, 1.0, 1.0, 2.0])[:, None]
    bound = lower_bound_of_pairs(x, np.array([0, 3, 1, 2, 4]), eps=0.1, norm="linf")
    assert bound.num_errors == 2
    assert {frozenset(pair) for pair in bound.pairs} >= {frozenset({0, 3}), frozenset({1, 2})}
    assert bound.robust_error == 2 / 5


def test_what_has_no_bound():
    with pytest.raises(ValueError, match="at least 0"):
        lower_bound(np.zeros((1, 2)), np.zeros((1, 2)), eps=-1.0, norm="linf")
    with pytest.raises(ValueError, match="no distance"):
        lower_bound(np.zeros((1, 2)), np.zeros((1, 3)), eps=1.0, norm="linf")
    with pytest.raises(ValueError, match="too many"):
        lower_bound_of_pairs(np.zeros((20, 1)), np.arange(20), eps=0.1, norm="l2")
    assert lower_bound(np.zeros((0, 2)), np.zeros((3, 2)), eps=1.0, norm="l2").num_errors == 0
