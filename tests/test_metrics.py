"""Rates on hand-made flags, their identities, and Wilson's interval against scipy."""

import math

import numpy as np
import pytest
import scipy.stats

from rdx import metrics

LABELS = np.array([0, 1, 2, 0, 1, 2])
CLEAN = np.array([0, 1, 2, 0, 1, 0])  # wrong: the last
ATTACKED = np.array([0, 2, 2, 1, 1, 2])  # wrong: the second and the fourth; the last became right


@pytest.mark.parametrize(("count", "total"), [(0, 1), (0, 20), (1, 1), (20, 20), (3, 20), (511, 1000), (9999, 10000)])
def test_wilson_is_scipys(count, total):
    expected = scipy.stats.binomtest(count, total).proportion_ci(method="wilson")
    np.testing.assert_allclose(metrics.wilson(count, total), (expected.low, expected.high), atol=1e-12)
    low, high = metrics.wilson(count, total)
    assert low <= count / total <= high


def test_wilson_at_other_levels_and_of_nothing():
    z = scipy.stats.norm.ppf(0.995)
    expected = scipy.stats.binomtest(3, 20).proportion_ci(0.99, method="wilson")
    np.testing.assert_allclose(metrics.wilson(3, 20, z=z), (expected.low, expected.high), atol=1e-12)
    assert metrics.wilson(0, 0) == (0.0, 1.0)


def test_a_rate_counts_what_the_mask_keeps():
    flags = np.array([1, 1, 0, 1, 0], bool)
    found = metrics.rate(flags, np.array([1, 1, 1, 0, 0], bool))
    assert (found.count, found.total, found.value) == (2, 3, 2 / 3)
    assert (found.low, found.high) == metrics.wilson(2, 3)
    assert (metrics.rate(flags).count, metrics.rate(flags).total) == (3, 5)
    empty = metrics.rate(flags, np.zeros(5, bool))
    assert math.isnan(empty.value)
    assert (empty.count, empty.total, empty.low, empty.high) == (0, 0, 0.0, 1.0)
    with pytest.raises(ValueError, match="per-example"):
        metrics.rate(np.zeros((2, 2)))


def test_risks_by_hand():
    assert metrics.risk(CLEAN, LABELS).count == 1
    # Wrong already counts as lost, though the attack's input is classified correctly.
    assert metrics.robust_risk(CLEAN, ATTACKED, LABELS).count == 3
    rejected, rejected_attacked = np.zeros(6, bool), np.zeros(6, bool)
    rejected[0], rejected_attacked[[1, 5]] = True, True
    found = metrics.robust_risk_with_detection(CLEAN, rejected, ATTACKED, rejected_attacked, LABELS)
    # Lost: 0 (rejected clean), 3 (wrong and accepted), 5 (wrong clean); 1 is saved by the detector.
    assert found.count == 3
    assert found.total == 6


@pytest.mark.parametrize("seed", range(5))
def test_identities(seed):
    draw = np.random.default_rng(seed)
    clean, attacked, labels = draw.integers(0, 3, (3, 40))
    flags, attacked_flags = draw.random((2, 40)) < 0.3
    risk, robust = metrics.risk(clean, labels), metrics.robust_risk(clean, attacked, labels)
    assert robust.count >= risk.count
    assert metrics.robust_risk(clean, clean, labels) == risk
    never, always = np.zeros(40, bool), np.ones(40, bool)
    detect = metrics.robust_risk_with_detection
    assert detect(clean, never, attacked, never, labels) == robust
    assert detect(clean, never, attacked, always, labels) == risk
    assert detect(clean, always, attacked, attacked_flags, labels).value == 1.0
    assert detect(clean, flags, attacked, attacked_flags, labels).count >= detect(
        clean, never, attacked, attacked_flags, labels
    ).count
    # Success among the correct, and risk, make up the robust risk.
    is_correct = clean == labels
    success = metrics.attack_success_rate(attacked != labels, is_correct)
    assert success.total == is_correct.sum()
    assert success.count + risk.count == robust.count


def test_certified_accuracy():
    assert metrics.certified_accuracy(np.array([1, 0, 1, 1], bool)).value == 0.75
