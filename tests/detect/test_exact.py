"""Theorems 4 and 5 without any search: on random finite metric spaces, on the line and on pixel grids."""

import numpy as np
import pytest
import scipy.ndimage

from rdx.detect import exact, intervals, metric_spaces

NUM_CLASSES = 3


def _clouds(rng, num, size):
    """Planar clouds of lattice points, under linf: distances are whole numbers, so no comparison rounds."""
    points = rng.integers(0, 9, (num, size, 2))
    return np.abs(points[:, :, None] - points[:, None]).max(axis=-1).astype(float)


def _paths(rng, num, size):
    """Shortest paths over random symmetric weights, by Floyd and Warshall."""
    weights = rng.integers(1, 12, (num, size, size))
    distances = np.minimum(weights, weights.swapaxes(1, 2)).astype(float)
    distances[:, np.arange(size), np.arange(size)] = 0
    for k in range(size):
        distances = np.minimum(distances, distances[:, :, k, None] + distances[:, None, k, :])
    return distances


def _words(rng, num, size):
    """Random words of 4 bits under Hamming distance."""
    words = rng.integers(0, 2, (num, size, 4))
    return (words[:, :, None] != words[:, None]).sum(axis=-1).astype(float)


def _lattice_lines(rng, num, size):
    """Consecutive integers: with an even eps every pair has its midpoint."""
    del rng
    line = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(float)
    return np.broadcast_to(line, (num, size, size))


GENERATORS = {"clouds": _clouds, "paths": _paths, "words": _words, "lines": _lattice_lines}


def _spaces(name, num, size=10, rejects=0.4):
    rng = np.random.default_rng(sum(map(ord, name)))
    distances = GENERATORS[name](rng, num, size)
    eps = rng.integers(1, 9, num).astype(float)
    # Classes clustered by a random cut, so that robust points are common enough to test something.
    side = (distances[:, 0] > eps[:, None]).astype(int)
    noise = rng.random((num, size)) < 0.15
    labels = np.where(noise, rng.integers(0, NUM_CLASSES, (num, size)), side)
    decided = np.where(rng.random((num, size)) < 0.1, rng.integers(0, NUM_CLASSES, (num, size)), side)
    decided = np.where(rng.random((num, size)) < rejects, -1, decided)
    return distances, eps, labels, exact.table(decided, NUM_CLASSES)


@pytest.mark.parametrize("name", GENERATORS)
def test_theorem_4_holds_example_by_example_for_every_selector(name):
    distances, eps, labels, detector = _spaces(name, 700)
    robust = exact.is_robust_with_detection(detector, exact.reach(distances, eps, detector), labels)
    classifier = exact.classify(detector, exact.reach(distances, eps / 2, detector))
    assert classifier.any(axis=-1).all()
    is_kept = exact.is_robust(exact.reach(distances, eps / 2, classifier), labels)
    assert robust.sum() > 300  # the premise is met often enough
    assert not (robust & ~is_kept).any()
    assert not (exact.is_right(detector, labels) & ~exact.is_right(classifier, labels)).any()


def test_theorem_4_needs_the_factor_two():
    # At any larger radius than eps / 2 the same construction fails somewhere.
    distances, eps, labels, detector = _spaces("lines", 700)
    robust = exact.is_robust_with_detection(detector, exact.reach(distances, eps, detector), labels)
    classifier = exact.classify(detector, exact.reach(distances, eps / 2 + 0.5, detector))
    assert (robust & ~exact.is_robust(exact.reach(distances, eps / 2 + 0.5, classifier), labels)).any()


@pytest.mark.parametrize("name", GENERATORS)
def test_theorem_5_is_an_equality_where_midpoints_exist_and_fails_elsewhere(name):
    distances, eps, labels, classifier = _spaces(name, 700, rejects=0.0)
    has_midpoints = metric_spaces.has_midpoints(distances, eps)
    half = exact.reach(distances, eps / 2, classifier)
    detector = exact.detect(classifier, half)
    robust = exact.is_robust(half, labels)
    detected = exact.is_robust_with_detection(detector, exact.reach(distances, eps, detector), labels)
    assert (robust == exact.is_right(detector, labels)).all()  # R(f_det) = R_adv(f_clf), in any space
    assert not (detected & ~robust).any()
    assert (robust == detected)[has_midpoints].all()
    if name == "lines":
        assert (has_midpoints == (eps % 2 == 0)).all()
        assert has_midpoints.sum() > 200
        assert robust[has_midpoints].sum() > 200
    assert (robust & ~detected)[~has_midpoints].any()


def test_the_compositions_lose_nothing():
    distances, eps, labels, classifier = _spaces("lines", 700, rejects=0.0)
    half = exact.reach(distances, eps / 2, classifier)
    robust = exact.is_robust(half, labels)
    detector = exact.detect(classifier, half)
    again = exact.classify(detector, exact.reach(distances, eps / 2, detector))
    is_even = (eps % 2 == 0)[:, None]
    assert not (robust & ~exact.is_robust(exact.reach(distances, eps / 2, again), labels) & is_even).any()


def test_the_other_composition_loses_nothing():
    distances, eps, labels, detector = _spaces("lines", 700)
    robust = exact.is_robust_with_detection(detector, exact.reach(distances, eps, detector), labels)
    possible = exact.classify(detector, exact.reach(distances, eps / 2, detector))
    for select in (np.argmax, lambda sets, axis: NUM_CLASSES - np.argmax(sets[..., ::-1], axis=axis)):
        classifier = exact.table(select(possible, axis=-1), NUM_CLASSES)
        again = exact.detect(classifier, exact.reach(distances, eps / 2, classifier))
        kept = exact.is_robust_with_detection(again, exact.reach(distances, eps, again), labels)
        assert not (robust & ~kept)[eps % 2 == 0].any()


def test_both_counterexamples_to_theorem_5():
    # Two points: the classifier that tells them apart is robust at 1/2, the detector never rejects.
    two = np.array([[0.0, 1.0], [1.0, 0.0]])
    classifier, labels = exact.table(np.array([0, 1]), 2), np.array([0, 1])
    half = exact.reach(two, 0.5, classifier)
    detector = exact.detect(classifier, half)
    assert exact.is_robust(half, labels).all()
    assert not exact.is_robust_with_detection(detector, exact.reach(two, 1.0, detector), labels).any()
    assert not metric_spaces.has_midpoints(two, 1.0)
    # Eight-bit values: an odd number of levels can not be halved.
    line = np.abs(np.subtract.outer(np.arange(256.0), np.arange(256.0)))
    classifier = exact.table((np.arange(256) >= 128).astype(int), 2)
    labels = (np.arange(256) >= 128).astype(int)
    for eps in range(1, 9):
        half = exact.reach(line, eps / 2, classifier)
        detector = exact.detect(classifier, half)
        detected = exact.is_robust_with_detection(detector, exact.reach(line, eps, detector), labels)
        assert (exact.is_robust(half, labels) & ~detected).any() == (eps % 2 == 1)
        assert metric_spaces.has_midpoints(line, eps) == (eps % 2 == 0)
        for norm in ("linf", "l1"):
            assert metric_spaces.Lattice(norm).has_midpoints(eps / 255) == (eps % 2 == 0)


def test_identities_of_the_risks():
    distances, eps, labels, detector = _spaces("paths", 500)
    reached = exact.reach(distances, eps, detector)
    detected = exact.is_robust_with_detection(detector, reached, labels)
    assert not (detected & ~exact.is_right(detector, labels)).any()  # R <= R_adv-det
    further = exact.is_robust_with_detection(detector, exact.reach(distances, eps + 1, detector), labels)
    assert not (further & ~detected).any()  # monotone in eps
    never = detector.copy()
    never[..., -1] = False
    never[..., 0] |= detector[..., -1]
    reached = exact.reach(distances, eps, never)  # no rejection: the definitions agree
    assert (exact.is_robust_with_detection(never, reached, labels) == exact.is_robust(reached, labels)).all()
    always = exact.table(np.full_like(labels, -1), NUM_CLASSES)  # all rejected: everything is lost
    assert not exact.is_robust_with_detection(always, exact.reach(distances, eps, always), labels).any()


def test_rejecting_a_wrong_input_never_raises_the_risk():
    distances, eps, labels, detector = _spaces("clouds", 500)
    before = exact.is_robust_with_detection(detector, exact.reach(distances, eps, detector), labels)
    is_wrong = ~exact.is_right(detector, labels)[..., None]
    after = np.where(is_wrong, exact.table(np.full_like(labels, -1), NUM_CLASSES), detector)
    lost = before & ~exact.is_robust_with_detection(after, exact.reach(distances, eps, after), labels)
    assert not lost.any()


def test_a_patch_size_is_no_metric_and_theorem_4_fails_with_it():
    # x and z differ in one pixel of four, z and y in another, far away: two patches of size 1, one of size 4.
    sizes = np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match="triangle inequality"):
        metric_spaces.finite_space(sizes)
    detector, labels = exact.table(np.array([0, -1, 1]), 2), np.array([0, 0, 1])
    robust = exact.is_robust_with_detection(detector, exact.reach(sizes, 2.0, detector), labels)
    classifier = exact.classify(detector, exact.reach(sizes, 1.0, detector))
    assert robust[0]
    assert not exact.is_robust(exact.reach(sizes, 1.0, classifier), labels)[0]


def _line_map(rng, num_edges, rejects):
    edges = np.concatenate([[0.0], np.sort(rng.random(num_edges)), [1.0]])
    labels = rng.integers(-1 if rejects else 0, NUM_CLASSES, num_edges + 1)
    return intervals.IntervalMap(edges, exact.table(labels, NUM_CLASSES))


def _measure(robust):
    return float((robust.lengths * robust.decisions).sum())


def _labels_of(truth):
    return truth.decisions[:, :-1].argmax(axis=1)


@pytest.mark.parametrize("seed", range(40))
def test_the_line_is_exact(seed):
    rng = np.random.default_rng(seed)
    truth, eps = _line_map(rng, 2, rejects=False), 0.02 + 0.1 * rng.random()
    other = _line_map(rng, 4, rejects=True)
    merged = intervals.combine(lambda t, f: np.where(rng.random((len(t), 1)) < 0.8, t, f), truth, other)

    def loss(check, *functions):
        return intervals.combine(
            lambda t, *tables: check(*tables, t[:, :-1].argmax(axis=1)), truth, *functions
        )

    detector, reach = merged, intervals.reach
    robust = loss(exact.is_robust_with_detection, detector, reach(detector, eps))
    classifier = intervals.combine(exact.classify, detector, reach(detector, eps / 2))
    kept = loss(exact.is_robust, reach(classifier, eps / 2))
    assert _measure(intervals.combine(lambda a, b: a & ~b, robust, kept)) == 0
    # Theorem 5 on the classifier that takes class 0 for rejections; the line has midpoints.
    single = intervals.IntervalMap(detector.edges, exact.table(np.maximum(
        np.where(detector.decisions[:, -1], 0, detector.decisions.argmax(axis=1)), 0), NUM_CLASSES))
    half = reach(single, eps / 2)
    back = intervals.combine(exact.detect, single, half)
    robust, detected = loss(exact.is_robust, half), loss(exact.is_robust_with_detection, back, reach(back, eps))
    # Edges that should coincide differ by rounding, so intervals of length 1e-16 may disagree.
    differs = intervals.combine(lambda a, b: a != b, robust, detected)
    assert _measure(differs) < 1e-12


def test_erosion_on_the_line_by_hand():
    two = intervals.IntervalMap(np.array([0.0, 0.4, 1.0]), exact.table(np.array([0, 1]), 2))
    detector = intervals.combine(exact.detect, two, intervals.reach(two, 0.1))
    np.testing.assert_allclose(detector.edges, [0.0, 0.3, 0.4, 0.5, 1.0])
    assert detector.decisions.tolist() == exact.table(np.array([0, -1, -1, 1]), 2).tolist()
    classifier = intervals.combine(exact.classify, detector, intervals.reach(detector, 0.1))
    # The rejected band is labelled again by the nearer accepted side, exactly as before.
    places = np.array([0.1, 0.35, 0.39, 0.41, 0.45, 0.9])
    assert classifier.at(places).tolist() == two.at(places).tolist()


@pytest.mark.parametrize("levels", [4, 5])
def test_pixel_grids_by_morphology(levels):
    # 61 x 61 points of an linf lattice; a maximum filter is the exact search of a ball.
    rng = np.random.default_rng(levels)
    smooth = scipy.ndimage.gaussian_filter(rng.standard_normal((61, 61)), 4)
    labels = (smooth > 0).astype(int)
    classifier = exact.table(labels, 2)

    def reach(decisions, radius):
        size = 2 * int(radius) + 1
        return np.stack([
            scipy.ndimage.maximum_filter(decisions[..., k], size=size) for k in range(decisions.shape[-1])
        ], axis=-1)

    half = reach(classifier, levels / 2)
    detector = exact.detect(classifier, half)
    robust = exact.is_robust(half, labels)
    detected = exact.is_robust_with_detection(detector, reach(detector, levels), labels)
    assert robust.any()
    assert not robust.all()
    assert (robust == detected).all() == (levels % 2 == 0)


def test_theorem_5_asks_for_single_decisions():
    with pytest.raises(ValueError, match="selector"):
        exact.detect(np.ones((3, 3), bool), np.ones((3, 3), bool))
