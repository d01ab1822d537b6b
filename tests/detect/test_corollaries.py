"""The limits against every function on finite models, against exact families, and the erratum."""

import math

import numpy as np
import pytest

from rdx.detect import corollaries, exact, intervals
from rdx.detect.corollaries import LatticeModel, SchmidtModel, TsiprasModel

MODEL = LatticeModel(p=0.8, shift=2, noise=np.array([0.05, 0.2, 0.5, 0.2, 0.05]))
CLASS = {-1: 0, 1: 1}


def _functions(seed, num, *, rejects):
    """Random and sensible functions of (x_0, s): by x_0, by s with a band, and noise over both."""
    rng, points = np.random.default_rng(seed), MODEL.points
    by_first = np.broadcast_to(points[:, 0] > 0, (num, len(points)))
    by_sum = points[None, :, 1] > rng.integers(-2, 3, (num, 1))
    is_first = rng.random((num, 1)) < 0.5
    labels = np.where(is_first, by_first, by_sum).astype(int)
    noise = rng.random((num, 1)) * 0.4
    labels = np.where(rng.random(labels.shape) < noise, rng.integers(0, 2, labels.shape), labels)
    if rejects:
        band = np.abs(points[None, :, 1]) < rng.integers(0, 9, (num, 1))
        labels = np.where(band | (rng.random(labels.shape) < 0.1 * rng.random((num, 1))), -1, labels)
    return exact.table(labels, 2)


def _accuracy(is_robust):
    """`is_robust(label) [num, N]` to the probability of being robust, over points and labels."""
    weights = MODEL.weights()
    return sum((is_robust(CLASS[y]) * weights[:, i]).sum(axis=-1) for i, y in enumerate((-1, 1)))


def _robust(table, distances, eps):
    reached = exact.reach(distances, eps, table)
    labels = lambda label: np.full(table.shape[:-1], label)
    return _accuracy(lambda label: exact.is_robust_with_detection(table, reached, labels(label)))


def _clean(table):
    return _accuracy(lambda label: exact.is_right(table, np.full(table.shape[:-1], label)))


def test_the_lattice_is_a_distribution():
    assert MODEL.weights().sum() == pytest.approx(1.0)
    # It lies so far inside that the attacker's moves are not cut.
    reach = np.abs(MODEL.points[MODEL.weights().sum(axis=1) > 0][:, 1]).max() + 4 * MODEL.shift
    assert reach <= np.abs(MODEL.points[:, 1]).max()


@pytest.mark.parametrize("rejects", [False, True])
def test_tsipras_trade_off_for_classifiers_and_detectors(rejects):
    # Classifiers at 2 shift, detectors at 4 shift: no function is above the limit.
    table, limit = _functions(0, 1000, rejects=rejects), TsiprasModel(MODEL.p, 1.0, 1).limit
    eps = (4.0 if rejects else 2.0) * MODEL.shift
    clean, robust = _clean(table), _robust(table, MODEL.distances("s"), eps)
    assert (robust <= MODEL.p / (1 - MODEL.p) * (1 - clean) + 1e-12).all()
    assert limit(0.1) == pytest.approx(0.4)
    assert robust.max() > 0.5  # by the first feature alone
    if rejects:
        # At half the radius of classifiers, which the paper prints, there are detectors above it.
        printed = _robust(table, MODEL.distances("s"), MODEL.shift)
        assert (printed > MODEL.p / (1 - MODEL.p) * (1 - clean) + 0.1).any()


def test_two_norms_exclude_each_other():
    for rejects, scale in ((False, 1), (True, 2)):
        table = _functions(1, 1000, rejects=rejects)
        radii = {"s": 2 * MODEL.shift, "flip": 2}
        errors = [1 - _robust(table, MODEL.distances(kind), scale * eps) for kind, eps in radii.items()]
        assert (0.5 * (errors[0] + errors[1]) >= corollaries.two_norm_limit() - 1e-12).all()
        assert min(errors[0].min(), errors[1].min()) < 0.25  # each alone is possible


def test_the_printed_factor_is_refuted_by_an_exact_detector():
    model = TsiprasModel(p=0.95, eta=3 / 100, num_features=100**2)
    # Every classifier, and every detector at 2 eps, of this accuracy has at most 2.6 % robust accuracy.
    clean, at_printed = model.mean_detector(model.eps / 2, threshold=0.0)
    assert 1 - clean == pytest.approx(0.00135, abs=1e-5)
    assert model.limit(1 - clean) < 0.03
    # With the best threshold for eps / 2 the clean accuracy is 93 %, and so is the robust one, far above its limit.
    clean, at_printed = model.mean_detector(model.eps / 2, threshold=model.eps / 4)
    assert clean == at_printed == pytest.approx(0.9332, abs=1e-4)
    loose = TsiprasModel(p=0.7, eta=model.eta, num_features=model.num_features)
    assert loose.limit(1 - clean) < 0.2 < at_printed
    for threshold in np.linspace(0, 0.2, 50):
        clean, robust = loose.mean_detector(loose.detector_eps, threshold=threshold)
        assert robust <= loose.limit(1 - clean) + 1e-12


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.03, 0.05])
def test_linear_detectors_meet_the_theorems_with_equality(eps):
    model = TsiprasModel(p=0.95, eta=0.03, num_features=2500)
    best = max(model.mean_detector(eps, threshold=t)[1] for t in np.linspace(0, 0.06, 601))
    assert best == pytest.approx(model.mean_classifier(eps / 2), abs=1e-9)
    # The closed forms against the exact construction on the line of the mean.
    edges = np.linspace(-1, 1, 4001)
    middles = 0.5 * (edges[1:] + edges[:-1])
    sign = intervals.IntervalMap(edges, exact.table((middles > 0).astype(int), 2))
    detector = intervals.combine(exact.detect, sign, intervals.reach(sign, eps / 2))
    rejected = detector.lengths[detector.decisions[:, -1]].sum()
    assert rejected == pytest.approx(eps, abs=1e-9)  # the band |m| < eps / 2


def test_the_mean_detector_by_simulation():
    model, rng, eps, t = TsiprasModel(p=0.9, eta=0.1, num_features=400), np.random.default_rng(0), 0.08, 0.05
    means = rng.normal(model.eta, 1 / 20, 200_000)
    clean, robust = model.mean_detector(eps, threshold=t)
    # Four standard deviations of 200,000 draws: 0.0045.
    assert (means >= t).mean() == pytest.approx(clean, abs=0.0045)
    assert ((means >= t) & (means - eps > -t)).mean() == pytest.approx(robust, abs=0.0045)


def test_schmidts_limit_by_simulation():
    # Naively: the posterior mean of theta within eps in every feature.
    model, num, eps, rng = SchmidtModel(50, 3.0), 4, 1.0, np.random.default_rng(0)
    theta = rng.standard_normal((4000, 50))
    mean = theta + model.sigma / math.sqrt(num) * rng.standard_normal(theta.shape)
    posterior = num / (model.sigma**2 + num) * mean
    share = (np.abs(posterior).max(axis=1) <= eps).mean()
    # Four standard deviations of 4,000 draws: 0.032, halved.
    assert model.limit(num, eps) == pytest.approx(0.5 * share, abs=0.016)


def test_robustness_needs_more_examples_than_accuracy():
    counts = []
    for d in (10**6, 10**8, 10**10):
        model = SchmidtModel(d, 0.6 * d**0.25)
        counts.append(model.num_samples(0.5, error=0.25))
        assert model.limit(counts[-1], 0.5) <= 0.25 < model.limit(counts[-1] - 1, 0.5)
        # eps^2 sigma^2 / (2 log d), to a factor for the constant.
        predicted = 0.25 * model.sigma**2 / (2 * math.log(d))
        assert 0.7 < counts[-1] / predicted < 2.0
    assert counts[0] < counts[1] < counts[2]
    # One example is enough for clean accuracy, and far from it for robust accuracy.
    rng, model = np.random.default_rng(0), SchmidtModel(10**6, 0.6 * 10**1.5)
    theta = rng.standard_normal(10**6)
    sample = theta + model.sigma * rng.standard_normal(10**6)
    assert model.one_sample_error(theta, sample, 0.0) < 0.01
    assert model.one_sample_error(theta, sample, 0.5) > 0.49
    assert model.limit(1, 0.5) > 0.49  # nor is any other learner better
    with pytest.raises(ValueError, match="smaller radius"):
        SchmidtModel(10, 1.0).num_samples(5.0, error=0.01)
    assert corollaries.detector_radius(0.5) == 1.0
