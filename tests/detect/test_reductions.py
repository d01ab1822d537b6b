"""The reductions as callables: against the set algebra, against closed forms, under attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reduction_nets as nets

from rdx import attacks, bounds, detect, goals, losses
from rdx.balls import Ball
from rdx.detect import exact, metric_spaces, reductions, risks, searches

NUM_CLASSES = 3
PGD = functools.partial(attacks.pgd, num_steps=10, num_restarts=3)
EXACT = searches.exact


def _space(seed, size=12):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 6, (size, 2))
    distances = np.abs(points[:, None] - points[None]).max(axis=-1).astype(np.float32)
    labels = (points[:, 0] > 2).astype(int)
    decisions = np.where(rng.random(size) < 0.15, rng.integers(0, NUM_CLASSES, size), labels)
    return metric_spaces.finite_space(distances), labels, np.where(rng.random(size) < 0.3, -1, decisions)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("search", [EXACT, functools.partial(EXACT, nearest=False)])
def test_theorem_4_on_finite_spaces(key, seed, search):
    space, labels, decisions = _space(seed)
    eps, points, x_labels = 2.0, jnp.arange(12), jnp.asarray(labels)
    detector = nets.tabulated_detector(decisions, NUM_CLASSES)
    classifier = detect.classifier_from_detector(key, detector, metric=space, eps=eps, search=search)
    table = exact.table(decisions, NUM_CLASSES)
    possible = exact.classify(table, exact.reach(space.distances, eps / 2, table))
    given = np.asarray(classifier(points).argmax(axis=1))
    assert possible[np.arange(12), given].all()
    # Risks by the callables' definitions equal those of the set algebra.
    ball, half = space.ball(eps), space.ball(eps / 2)
    lost = risks.robust_errors_with_detection(key, detector, points, x_labels, ball=ball, search=EXACT)
    reached = exact.reach(space.distances, eps, table)
    assert (~np.asarray(lost) == exact.is_robust_with_detection(table, reached, labels)).all()
    robust_lost = np.asarray(risks.robust_errors(key, classifier, points, x_labels, ball=half, search=EXACT))
    assert not (robust_lost & ~np.asarray(lost)).any()
    clean = np.asarray(risks.errors(classifier, points, x_labels))
    assert not (clean & ~np.asarray(risks.errors(detector, points, x_labels))).any()


@pytest.mark.parametrize("seed", range(10))
def test_theorem_5_on_finite_spaces(key, seed):
    rng = np.random.default_rng(seed)
    line = np.abs(np.subtract.outer(np.arange(12.0), np.arange(12.0))).astype(np.float32)
    space, labels = metric_spaces.finite_space(line), np.repeat(rng.integers(0, 3, 3), 4)
    classes = np.where(rng.random(12) < 0.2, rng.integers(0, 3, 12), labels)
    classifier, points = nets.tabulated_classifier(classes, NUM_CLASSES), jnp.arange(12)
    detector = detect.detector_from_classifier(key, classifier, metric=space, eps=4.0, search=EXACT)
    table = exact.table(classes, NUM_CLASSES)
    expected = exact.detect(table, exact.reach(line, 2.0, table))
    assert (exact.table(np.asarray(detect.decide(detector(points), 0.0)), NUM_CLASSES) == expected).all()
    lost = risks.robust_errors_with_detection(
        key, detector, points, jnp.asarray(labels), ball=space.ball(4.0), search=EXACT
    )
    robust_lost = risks.robust_errors(key, classifier, points, jnp.asarray(labels), ball=space.ball(2.0), search=EXACT)
    assert (lost == robust_lost).all()  # equality, example by example


def test_theorem_5_is_refused_or_marked_without_midpoints(key):
    two = metric_spaces.finite_space(np.array([[0.0, 1.0], [1.0, 0.0]]))
    classifier = nets.tabulated_classifier([0, 1], 2)
    with pytest.raises(detect.MidpointError, match="allow_no_midpoints"):
        detect.detector_from_classifier(key, classifier, metric=two, eps=1.0, search=EXACT)
    pixels = metric_spaces.Lattice("linf")
    linear = nets.linear_classifier(jnp.ones(2), -1.0)
    with pytest.raises(detect.MidpointError, match="even number of levels"):
        detect.detector_from_classifier(key, linear, metric=pixels, eps=3 / 255, search=PGD)
    with pytest.raises(detect.MidpointError):
        detect.certify_detector(linear, jnp.zeros((1, 2)), jnp.zeros(1, int), metric=pixels, eps=3 / 255)
    detect.detector_from_classifier(key, linear, metric=pixels, eps=4 / 255, search=PGD)
    with pytest.warns(reductions.MidpointWarning):
        detector = detect.detector_from_classifier(
            key, classifier, metric=two, eps=1.0, search=EXACT, allow_no_midpoints=True
        )
    lost = risks.robust_errors_with_detection(
        key, detector, jnp.arange(2), jnp.arange(2), ball=two.ball(1.0), search=EXACT
    )
    assert lost.all()  # although the classifier is robust at 1/2


BOX = metric_spaces.Box("linf")
W = np.array([1.0, 2.0], np.float32)


def _points(seed, size=400, num=2):
    return jnp.asarray(np.random.default_rng(seed).random((size, num)), jnp.float32)


SEARCHES = {
    "grid": functools.partial(searches.grid, num_each_side=8),
    "random": functools.partial(searches.random, num_samples=300),
    "pgd": PGD,
    "square": functools.partial(attacks.square, num_steps=60),
    "nearest": searches.nearest(PGD),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_theorem_4_on_a_band_by_hand(key, name):
    # |w x - 1.5| <= t is rejected, the ball reaches r * 3 further: with r * 3 > t every rejected point has a witness.
    detector, threshold, eps = nets.banded_detector(W, -1.5), -0.2, 0.3
    x = _points(0)
    x = x[(x > 0.16).all(axis=1) & (x < 0.84).all(axis=1)]  # where the box does not cut the ball
    options = {"metric": BOX, "eps": eps, "search": SEARCHES[name], "threshold": threshold}
    decoding = detect.decode(key, detector, x, **options)
    side = np.asarray(x @ W - 1.5)
    assert (np.asarray(decoding.is_rejected) == (np.abs(side) < 0.2)).all()
    # At random or by squares a witness in a corner of the ball may be missed.
    assert decoding.is_found.mean() >= (1.0 if name in {"grid", "pgd", "nearest"} else 0.95)
    found = np.asarray(decoding.is_found & decoding.is_rejected)
    assert found.sum() > 20
    assert (np.abs(np.asarray(decoding.witness) - np.asarray(x)).max(axis=1) <= eps / 2 + 1e-6).all()
    assert not np.asarray(detector(decoding.witness)[1] > threshold)[found].any()
    if name == "nearest":
        # The nearest accepted points are at distance (t - |w x - 1.5|) / 3; the gradient leads straight there, but
        # where a random start lies on the other side of the band.
        beyond = np.abs(np.asarray(decoding.witness - x)).max(axis=1) - (0.2 - np.abs(side)) / 3
        assert (beyond[found] > -1e-5).all()
        is_nearest = found & (beyond < 1e-5)
        assert is_nearest.sum() > 0.9 * found.sum()
        assert (np.asarray(decoding.logits.argmax(axis=1)) == (side > 0))[is_nearest].all()
    classifier = detect.classifier_from_detector(key, detector, **options)
    np.testing.assert_array_equal(classifier(x), decoding.logits)


def test_theorem_5_on_a_half_plane_by_hand(key):
    # The prediction is constant within r exactly where |w x - 1.5| > 3 r (inside of the box).
    classifier, eps = nets.linear_classifier(W, -1.5), 0.2
    x = _points(1)
    x = x[(x > 0.11).all(axis=1) & (x < 0.89).all(axis=1)]
    side = np.abs(np.asarray(x @ W - 1.5))
    x, side = x[np.abs(side - 0.3) > 1e-3], side[np.abs(side - 0.3) > 1e-3]
    expected = side < 0.3
    assert 20 < expected.sum() < len(x) - 20
    bracket = searches.in_turn(searches.constant_prediction, PGD)
    for search, requires_proof in ((PGD, False), (searches.constant_prediction, True), (bracket, True)):
        detector = detect.detector_from_classifier(
            key, classifier, metric=BOX, eps=eps, search=search, requires_proof=requires_proof
        )
        score = np.asarray(detector(x)[1])
        assert ((score > 0) == expected).all()
        if search is not searches.constant_prediction:
            # The score is the margin loss of the worst point in the ball: 2 (0.3 - |w x - 1.5|), or its bound with
            # the slack of certificates, 1e-5 of logits up to 1.8.
            np.testing.assert_allclose(score, 2 * (0.3 - side), atol=3e-5)
    labels = (x @ W - 1.5 > 0).astype(int)
    certified = detect.certify_detector(classifier, x, labels, metric=BOX, eps=eps, certify=functools.partial(
        bounds.certify, method=bounds.ibp))
    assert (np.asarray(certified) == ~expected).all()


def test_bounds_prove_that_there_is_no_witness(key):
    # |.| is bounded exactly on a linear function, so the whole ball is rejected exactly where 3 r < t - |w x - 1.5|.
    detector, x = nets.banded_detector(W, -1.5), _points(2)
    x = x[(x > 0.16).all(axis=1) & (x < 0.84).all(axis=1)]
    search = functools.partial(searches.rejected_everywhere, method=bounds.crown)
    decoding = detect.decode(key, detector, x, metric=BOX, eps=0.1, search=search, threshold=-0.3)
    depth = 0.3 - np.abs(np.asarray(x @ W - 1.5))
    assert not np.asarray(decoding.is_found & decoding.is_rejected).any()
    proved = np.asarray(decoding.is_settled & decoding.is_rejected)
    assert proved.any()
    assert not proved[depth < 0.15].any()
    # With an attack the bracket closes: found, or proved, but for the few that lie between.
    bracket = searches.in_turn(search, PGD)
    decoding = detect.decode(key, detector, x, metric=BOX, eps=0.1, search=bracket, threshold=-0.3)
    assert decoding.is_settled.mean() > 0.97
    assert (np.asarray(decoding.is_found) == (depth < 0.15))[np.abs(depth - 0.15) > 1e-3].all()


def _explained(seed, search):
    """Checks the explanations of one detector at clean, attacked and random points; returns the kinds seen."""
    key, eps, kinds = jax.random.key(seed), 0.3, []
    detector, x = nets.random_detector(key), _points(seed, 100, 6)
    threshold = float(jnp.median(detector(x)[1]))  # half of the clean inputs are rejected
    options = {"metric": BOX, "eps": eps, "search": search, "threshold": threshold}
    classifier = detect.classifier_from_detector(key, detector, **options)
    labels = classifier(x).argmax(axis=1)
    labels = jnp.where(jnp.arange(100) % 5 == 0, (labels + 1) % 3, labels)  # so that some are wrong from the start
    half = BOX.ball(eps / 2)
    x_adv = attacks.pgd(key, classifier, x, labels, ball=half, num_steps=5).x_adv
    for point in (x, x_adv, half.sample(jax.random.split(key, 100), x)):
        decoding = detect.decode(key, detector, point, **options)
        explained = detect.explain_failure(
            detector, x, labels, point, decoding, metric=BOX, eps=eps, threshold=threshold
        )
        is_failure = np.asarray(losses.is_wrong(decoding.logits, labels))
        kind = np.asarray(explained.kind)
        assert (is_failure == (kind != reductions.NO_FAILURE)).all()
        is_missed = kind == reductions.MISSED
        assert (np.asarray(explained.is_valid) == (is_failure & ~is_missed)).all()
        # An independent look at what makes a counterexample of Definition 3.
        decision = np.asarray(detect.decide(detector(explained.point), threshold))
        clean = np.asarray(detect.decide(detector(x), threshold))
        fails = ((decision != labels) & (decision != -1)) | (clean != labels)
        assert fails[is_failure & ~is_missed].all()
        assert (np.abs(np.asarray(explained.point - x)).max(axis=1) <= eps + 1e-5).all()
        # Where the search missed, the clean input is accepted: a witness that was there to be found.
        assert (clean[is_missed] != -1).all()
        kinds.extend(kind.tolist())
    return kinds


def test_every_failure_under_attack_is_explained():
    few = functools.partial(searches.random, num_samples=2)
    kinds = [kind for seed in range(3) for search in (PGD, few) for kind in _explained(seed, search)]
    assert set(kinds) == {
        reductions.NO_FAILURE, reductions.ACCEPTED, reductions.BY_WITNESS, reductions.CLEAN, reductions.MISSED
    }


def test_constructed_functions_do_not_depend_on_the_batch_or_on_jit(key):
    detector, x = nets.random_detector(key), _points(3, 40, 6)
    classifier = detect.classifier_from_detector(
        key, detector, metric=BOX, eps=0.1, search=functools.partial(searches.random, num_samples=5)
    )
    together = classifier(x)
    decoding = detect.decode(
        key, detector, x, metric=BOX, eps=0.1, search=functools.partial(searches.random, num_samples=5)
    )
    assert (decoding.is_rejected & ~decoding.is_found).any()  # so that labels are drawn
    for rows in (slice(0, 1), slice(7, 19), slice(None, None, -1)):
        np.testing.assert_allclose(classifier(x[rows]), together[rows], atol=1e-5)
    np.testing.assert_allclose(jax.jit(classifier)(x), together, atol=1e-5)
    other = detect.classifier_from_detector(
        jax.random.key(1), detector, metric=BOX, eps=0.1, search=functools.partial(searches.random, num_samples=5)
    )
    assert (other(x) != together).any()


def test_gradients_pass_through_the_search(key):
    detector, x = nets.banded_detector(W, -1.5), jnp.asarray([[0.5, 0.52], [0.1, 0.2]])
    classifier = detect.classifier_from_detector(key, detector, metric=BOX, eps=0.3, search=PGD, threshold=-0.2)
    gradient = jax.grad(lambda x: classifier(x)[:, 1].sum())(x)
    np.testing.assert_allclose(gradient, np.tile(W, (2, 1)), atol=1e-6)
    rejecting = detect.detector_from_classifier(key, nets.linear_classifier(W, -1.5), metric=BOX, eps=0.1, search=PGD)
    gradient = jax.grad(lambda x: rejecting(x)[1].sum())(x)
    # Both are class 1 and class 0: the score falls along, and rises along, w.
    np.testing.assert_allclose(gradient, 2 * np.stack([-W, W]), atol=1e-6)


def test_detectors_are_attacked_with_the_goal_to_evade(key):
    classifier, x = nets.random_classifier(key), _points(4, 60, 6)
    labels = classifier(x).argmax(axis=1)
    detector = detect.detector_from_classifier(key, classifier, metric=BOX, eps=0.2, search=PGD)
    result = attacks.pgd(key, detector, x, labels, ball=Ball("linf", 0.2), goal=detect.evade(0.0), num_steps=5)
    logits, score = detector(result.x_adv)
    evades = np.asarray(losses.is_wrong(logits, labels) & (score <= 0))
    assert (evades == np.asarray(result.success)).all()
    # Theorem 5: where it evades although the clean input is accepted, the classifier is not robust at 0.1.
    broken = attacks.apgd(key, classifier, x, labels, ball=Ball("linf", 0.1), num_steps=50, num_restarts=3).success
    is_accepted = np.asarray(detector(x)[1] <= 0)
    assert not (evades & is_accepted & ~np.asarray(broken)).any()


def test_random_labels_are_spread(key):
    detector = nets.banded_detector(W, -1.5)
    # A score above the threshold everywhere: every label is drawn.
    decoding = detect.decode(key, detector, _points(5, 2000), metric=BOX, eps=0.1, search=searches.rejected_everywhere,
                             threshold=-10.0)
    assert not decoding.is_found.any()
    # Binomial with n = 2000: four standard deviations are 0.045.
    assert abs(float(decoding.logits.argmax(axis=1).mean()) - 0.5) < 0.045


def test_on_lattice_keeps_to_levels(key):
    lattice = metric_spaces.Lattice("linf", num_levels=20)
    x = jnp.round(_points(6) * 20) / 20
    search = searches.on_lattice(PGD, num_levels=20)
    classifier = nets.linear_classifier(W, -1.52)
    detector = detect.detector_from_classifier(key, classifier, metric=lattice, eps=4 / 20, search=search)
    exhaustive = functools.partial(searches.grid, num_each_side=2, is_exhaustive=True)
    by_grid = detect.detector_from_classifier(
        key, classifier, metric=lattice, eps=4 / 20, search=exhaustive, requires_proof=True
    )
    assert ((detector(x)[1] > 0) == (by_grid(x)[1] > 0)).all()
    found = searches.run(
        key, search, classifier, x, classifier(x).argmax(axis=1), ball=lattice.ball(2 / 20),
        goal=goals.misclassify(losses.margin),
    )
    np.testing.assert_allclose(found.x * 20, np.round(found.x * 20), atol=1e-4)


def test_grids_refuse_too_many_points(key):
    with pytest.raises(ValueError, match="too fine"):
        searches.grid(key, nets.random_classifier(key), jnp.zeros((2, 6)), jnp.zeros(2, int), ball=Ball("linf", 0.1),
                      goal=goals.misclassify())


def test_risks_of_detectors(key):
    detector, x = nets.banded_detector(W, -1.5), _points(7)
    labels = (x @ W - 1.5 > 0).astype(int)
    rejected = np.abs(np.asarray(x @ W - 1.5)) < 0.2
    assert (np.asarray(risks.errors(detector, x, labels, threshold=-0.2)) == rejected).all()
    lost = functools.partial(
        risks.robust_errors_with_detection, key, detector, x, labels, search=PGD, threshold=-0.2
    )
    small, large = lost(ball=Ball("linf", 0.1)), lost(ball=Ball("linf", 0.3))
    assert (small == rejected).all()  # crossing the whole band takes 0.4 / 3
    assert large.sum() > small.sum()
