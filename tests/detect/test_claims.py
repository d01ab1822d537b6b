"""The auditor against the paper: its tables, its derivations and its introduction."""

import dataclasses
import itertools

import numpy as np
import pytest

from rdx import metrics
from rdx.analyse import TransportBound
from rdx.detect import best_known, claims
from rdx.detect.claims import Claim, audit

ROWS = claims.table1()


def test_table_1_is_rederived():
    assert len(ROWS) == 16
    red = set()
    for row in ROWS:
        found = audit(row.claim, as_of=2021)
        assert found.classifier_eps == row.claim.eps / 2
        assert found.reference.accuracy == row.reference
        assert not found.reference.is_interpolated
        assert (found.verdict == "implies-breakthrough") == row.is_red
        assert found.is_settled
        if row.is_red:
            red.add(row.claim.name)
    names = {row.claim.name for row in ROWS}
    assert len(names) == 14
    assert len(red) == 12
    assert sum(row.is_red for row in ROWS) == 14
    assert names - red == {"Roth et al. (2019)", "Jha et al. (2019)"}
    assert all(row.provenance[cell] for row in ROWS for cell in ("inputs", "evidence", "claim", "reference"))


def test_the_two_derivations():
    cifar = next(row for row in ROWS if row.claim.name.startswith("Raghuram") and row.claim.dataset == "cifar10")
    pessimistic, optimistic = claims.robust_accuracy(**cifar.rates)
    assert pessimistic == pytest.approx(0.56) == pytest.approx(cifar.claim.accuracy)
    assert optimistic == pytest.approx(0.80)
    mnist = next(row for row in ROWS if row.claim.name.startswith("Raghuram") and row.claim.dataset == "mnist")
    assert "clean_error" not in mnist.rates  # which the paper does not print; 74 % leaves 1 % for it
    assert claims.robust_accuracy(clean_error=0.01, **mnist.rates)[0] == pytest.approx(0.74)


def test_table_2_is_consistent():
    for detector, classifier, published in claims.table2():
        found, other = audit(detector, as_of=2021), audit(classifier, as_of=2021)
        assert found.verdict == other.verdict == "consistent"
        assert other.implied == claims.Implied("detector", detector.eps, classifier.accuracy)
        assert found.certified.accuracy == classifier.accuracy
        assert 0 <= classifier.accuracy - detector.accuracy <= 0.02 + 1e-9  # "up to +-2 %"
        assert abs(published - detector.accuracy) < 0.01  # 36.37 % is printed as 37 %


def test_defences_a_and_b_of_the_introduction_are_the_same():
    a = audit(Claim("cifar10", "linf", 4 / 255, 0.9, kind="classifier", evidence="adaptive"), as_of=2021)
    b = audit(Claim("cifar10", "linf", 8 / 255, 0.9, evidence="adaptive"), as_of=2021)
    assert a.verdict == b.verdict == "implies-breakthrough"
    assert a.reference == b.reference
    assert a.reference.accuracy == 0.79
    assert a.implied == claims.Implied("detector", 8 / 255, 0.9)
    assert b.implied == claims.Implied("classifier", 4 / 255, 0.9)


def test_what_today_changes():
    changed = [row.claim.name for row in ROWS if audit(row.claim).verdict != audit(row.claim, as_of=2021).verdict]
    assert changed == ["Ma & Liu (2019)"]
    imagenet = next(r.claim for r in ROWS if r.claim.name == "Ma & Liu (2019)" and r.claim.dataset == "imagenet")
    found = audit(imagenet)
    assert found.verdict == "consistent"
    assert not found.is_settled  # no report at 1/255: between 59.68 % at 4/255 and 78.62 % clean
    assert found.reference.accuracy == pytest.approx(0.7862 - 0.25 * (0.7862 - 0.5968))
    assert "rests on interpolation" in found.sentence


@pytest.mark.parametrize("seed", range(20))
def test_equation_4_brackets_the_exact_value(seed):
    rng = np.random.default_rng(seed)
    size = 200
    labels, zeros = np.zeros(size, int), np.zeros(size, bool)
    clean, attacked = (rng.random((2, size)) < 0.2).astype(int)
    rejected, is_found = rng.random((2, size)) < 0.2
    exact = metrics.robust_risk_with_detection(clean, rejected, attacked, ~is_found, labels).value
    fpr, fnr = rejected.mean(), ((attacked == 1) & is_found).mean()
    low, high = claims.robust_accuracy(fpr=fpr, fnr=fnr, clean_error=clean.mean())
    assert low - 1e-12 <= 1 - exact <= high + 1e-12
    disjoint = metrics.robust_risk_with_detection(clean, zeros, clean, zeros, labels)
    assert 1 - disjoint.value == claims.robust_accuracy(fpr=0, fnr=0, clean_error=clean.mean())[0]


def test_vacuous_and_unknown_claims():
    vacuous = audit(Claim("cifar10", "linf", 8 / 255, fpr=0.5, fnr=0.4, clean_error=0.2))
    assert (vacuous.verdict, vacuous.accuracy, vacuous.optimistic) == ("vacuous", 0.0, 0.5)
    unknown = audit(Claim("svhn", "linf", 8 / 255, 0.9))
    assert unknown.verdict == "no-reference"
    assert unknown.reference == best_known.Reference(None, False, 0.0, 1.0, ())


def test_nothing_is_extrapolated_but_monotonicity_decides():
    beyond = audit(Claim("cifar10", "linf", 40 / 255, 0.5), as_of=2021)  # 20/255; the last report is 44 % at 13/255
    assert beyond.reference.accuracy is None
    assert beyond.verdict == "implies-breakthrough"
    assert audit(Claim("cifar10", "linf", 40 / 255, 0.4), as_of=2021).verdict == "no-reference"
    before = audit(Claim("cifar10", "linf", 1 / 255, 0.85), as_of=2021)  # the first report is 85 % at 2/255
    assert before.verdict == "consistent"
    assert audit(Claim("cifar10", "linf", 1 / 255, 0.86), as_of=2021).verdict == "no-reference"


@pytest.mark.parametrize("as_of", [2021, 2025])
@pytest.mark.parametrize(("dataset", "norm"), [
    ("mnist", "linf"), ("mnist", "l2"), ("cifar10", "linf"), ("cifar10", "l2"), ("imagenet", "linf"),
])
def test_curves_are_monotone_and_within_their_bounds(dataset, norm, as_of):
    radii = np.linspace(1e-3, 1.2 * max(r.eps for r in best_known.reports(dataset, norm, as_of=as_of)), 200)
    found = [best_known.best_known(dataset, norm, eps, as_of=as_of) for eps in radii]
    accuracy = [f.accuracy for f in found if f.accuracy is not None]
    assert len(accuracy) > 20
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(accuracy))
    assert all(f.low <= f.accuracy <= f.high for f in found if f.accuracy is not None)
    later = [best_known.best_known(dataset, norm, eps, as_of=2025) for eps in radii]
    assert all(b.accuracy >= a.accuracy for a, b in zip(found, later, strict=True) if a.accuracy is not None)


def test_reports_have_sources_and_pass_through_the_curve():
    for row in best_known.rows("best_known"):
        assert row["source"]
        eps, is_certified = best_known.radius(row["eps"]), row["evidence"] == "certified"
        found = best_known.best_known(
            row["dataset"], row["norm"], eps, as_of=int(row["as_of"]), is_certified=is_certified)
        assert found.low >= float(row["accuracy"])


def test_evidence_is_told_apart():
    fixed = audit(Claim("cifar10", "linf", 8 / 255, 0.5, evidence="fixed"))
    assert "a claim, not a bound" in fixed.sentence
    assert "a claim, not a bound" not in audit(dataclasses.replace(fixed.claim, evidence="adaptive")).sentence
    assert fixed.certified is None
    assert audit(dataclasses.replace(fixed.claim, evidence="certified"), as_of=2021).certified.accuracy == 0.39


def test_statistics_and_margins():
    claim = Claim("cifar10", "linf", 8 / 255, 0.80, num_images=100)
    assert audit(claim, as_of=2021).is_significant is False
    assert audit(dataclasses.replace(claim, num_images=100_000), as_of=2021).is_significant is True
    assert audit(claim, as_of=2021, margin=0.02).verdict == "consistent"


def test_data_can_exclude_a_claim():
    x, labels = np.array([[0.0], [0.2], [0.9], [1.0]]), np.array([0, 1, 0, 1])
    claim = Claim("toy", "linf", 0.3, 0.9)
    bound = claims.transport_limit(claim, x, labels)
    assert bound.robust_error == 0.5  # at 0.15 both pairs collide
    found = audit(claim, bound=bound)
    assert found.is_impossible
    assert found.exit_code == claims.IMPOSSIBLE
    assert "no classifier exceeds 50 %" in found.sentence
    assert audit(dataclasses.replace(claim, accuracy=0.5), bound=bound).is_impossible is False
    classifier = dataclasses.replace(claim, kind="classifier", eps=0.09)
    assert claims.transport_limit(classifier, x, labels) == TransportBound(0.25, 1, 4, ((0, 1),))


@pytest.mark.parametrize(("change", "text"), [
    ({"accuracy": None}, "all three"), ({"fpr": 0.1, "fnr": 0.1, "clean_error": 0.1}, "not both"),
    ({"accuracy": 90.0}, r"90 % is 0.9"), ({"eps": -1.0}, "positive"), ({"evidence": "hope"}, "evidence"),
    ({"kind": "oracle"}, "kind"), ({"norm": "l7"}, "norm"),
    ({"accuracy": None, "kind": "classifier", "fpr": 0.1, "fnr": 0.1, "clean_error": 0.1}, "rejects nothing"),
])
def test_what_is_no_claim(change, text):
    claim = dataclasses.replace(Claim("cifar10", "linf", 8 / 255, 0.9), **change)
    with pytest.raises(ValueError, match=text):
        audit(claim)
    with pytest.raises(ValueError, match="write 8/255"):
        best_known.radius("eight")
