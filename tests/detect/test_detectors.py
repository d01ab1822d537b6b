"""What every detector must keep to, and what each is known to compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from detect_cases import FLAT, detectors, digits, trained
from jax.tree_util import Partial

from rdx import losses, models
from rdx.balls import Ball
from rdx.detect import (
    class_conditional,
    density,
    lid,
    logistic,
    mahalanobis,
    odds,
    outlier,
    pca,
    softmax,
    squeezing,
    stability,
    thresholds,
)

NAMES = [
    "max softmax", "entropy", "feature squeezing", "kernel density", "dropout", "density and dropout", "lid",
    "mahalanobis", "odds", "outlier class", "pca", "class conditional", "generative", "logit stability",
    "attack length",
]
RUN = jax.jit(lambda detector, x: detector(x))


def test_the_battery_knows_every_detector():
    assert sorted(detectors()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_battery(name):
    detector, x = detectors()[name], jnp.asarray(digits()[2][:6])
    logits, score = RUN(detector, x)
    assert logits.shape == (6, 10)
    assert score.shape == (6,)
    assert score.dtype == jnp.float32
    assert bool(jnp.isfinite(score).all())
    # Alone or in company: 1e-4 of the score, since sums are ordered otherwise.
    _, alone = RUN(detector, x[2:3])
    np.testing.assert_allclose(alone, score[2:3], rtol=1e-4, atol=1e-4)
    gradient = jax.jit(jax.grad(lambda x: detector(x)[1].sum()))(x)
    assert bool(jnp.isfinite(gradient).all())
    assert bool((gradient != 0).any()) == (name not in FLAT)


def test_parameters_are_arguments_of_compiled_code():
    (forward, variables), traced = trained(), []

    @jax.jit
    def run(detector, x):
        traced.append(x.shape)
        return detector(x)

    for scale in (1.0, 2.0, 3.0):
        scaled = jax.tree.map(lambda leaf, by=scale: by * leaf, variables)
        run(softmax.max_softmax(models.logits_fn(forward.model, scaled)), jnp.asarray(digits()[2][:5]))
    assert len(traced) == 1


def _table(logits, x):
    return logits[x.astype(jnp.int32)[:, 0]]


def _classifier(logits):
    return Partial(_table, jnp.asarray(logits, jnp.float32))


def test_softmax_scores_by_hand():
    logits = np.array([[2.0, 0.0, 0.0], [1.0, 1.0, 1.0], [90.0, 0.0, 0.0]])
    x = jnp.arange(3.0)[:, None]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    _, score = softmax.max_softmax(_classifier(logits))(x)
    np.testing.assert_allclose(score[:2], np.log((1 - p[:2].max(1)) / p[:2].max(1)), rtol=1e-5)
    np.testing.assert_allclose(score[2], np.log(2.0) - 90.0, rtol=1e-5)  # where p rounds to 1
    _, entropy = softmax.entropy(_classifier(logits))(x)
    np.testing.assert_allclose(entropy[:2], -(p * np.log(p))[:2].sum(1), rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_median_filter_is_scipys(size):
    x = np.random.default_rng(0).random((2, 7, 6, 2), np.float32)
    expected = scipy.ndimage.median_filter(x, size=(1, size, size, 1), mode="reflect")
    np.testing.assert_array_equal(squeezing.median_filter(size)(jnp.asarray(x)), expected)


def test_bit_depth_rounds_and_passes_gradients():
    x = jnp.asarray([[0.1, 0.4, 0.6, 1.0]])
    squeeze = squeezing.bit_depth(2)
    np.testing.assert_allclose(squeeze(x), [[0.0, 1 / 3, 2 / 3, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: squeeze(x).sum())(x), jnp.ones_like(x))


def test_non_local_means_by_brute_force():
    x = np.random.default_rng(0).random((1, 5, 4, 2), np.float32)
    got = squeezing.non_local_means(search=3, patch=3, strength=0.5)(jnp.asarray(x))[0]
    wide = np.pad(x[0], ((1, 1), (1, 1), (0, 0)), mode="symmetric")
    expected, total = np.zeros_like(x[0]), np.zeros((5, 4, 1))
    for i in range(3):
        for j in range(3):
            moved = wide[i:i + 5, j:j + 4]
            square = np.square(moved - x[0]).mean(axis=2)
            patch = scipy.ndimage.correlate(square, np.ones((3, 3)) / 9, mode="constant")[..., None]
            weight = np.exp(-patch / 0.25)
            expected, total = expected + weight * moved, total + weight
    np.testing.assert_allclose(got, expected / total, rtol=1e-4)


def _identity_layers(x):
    return jnp.concatenate([x, -x], axis=1), (x,)


def test_kernel_density_by_hand():
    known, labels = np.array([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0]], np.float32), np.array([0, 0, 1])
    statistics = density.fit(_two_layers, known, labels, bandwidths=(2.0,))
    _, score = density.kernel_density(_two_layers, statistics)(jnp.asarray([[0.5, 0.0]]))  # predicted as class 0
    kernel = np.exp(-np.array([0.25, 2.5**2 + 16.0]) / 4.0).mean()
    np.testing.assert_allclose(score, [-np.log(kernel)], rtol=1e-5)


def _two_layers(x):
    return jnp.stack([5.0 - x.sum(axis=1), x.sum(axis=1) - 5.0], axis=1), (x,)


def test_the_bandwidth_is_near_that_of_the_data():
    x = np.random.default_rng(0).normal(scale=1.0, size=(400, 2)).astype(np.float32)
    chosen = density.fit(_two_layers, x, np.zeros(400, int), bandwidths=(0.01, 0.5, 30.0)).bandwidth
    assert chosen == np.float32(0.5)


def test_lid_by_hand_and_of_the_dimension():
    rng = np.random.default_rng(0)
    for dimension in (2, 6):
        cloud = rng.random((800, dimension)).astype(np.float32)
        neighbours = lid.fit(_identity_layers, cloud, num_neighbours=50)
        _, scores = jax.jit(lid.scores(_identity_layers, neighbours))(jnp.asarray(cloud[:60]))
        # Maximum likelihood from 50 neighbours has a deviation of 1/sqrt(50) each; edges of the cube bias it down.
        assert abs(float(scores[:, 0].mean()) / dimension - 1.0) < 0.25
    x = cloud[0]
    distance = np.sort(np.linalg.norm(cloud[1:] - x, axis=1))[:50]
    np.testing.assert_allclose(scores[0, 0], -50 / np.log(distance / distance[-1]).sum(), rtol=1e-3)


def test_mahalanobis_by_hand():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal((c, 0), (1.0, 0.1), (500, 2)) for c in (-3, 3)]).astype(np.float32)
    labels = np.repeat([1, 0], 500)  # the logits (x.sum, ...) of `_pair` predict class 0 on the right
    statistics = mahalanobis.fit(_pair, x, labels)
    _, scores = mahalanobis.scores(_pair, statistics)(jnp.asarray([[3.0, 0.3], [5.0, 0.0]]))
    # Distances in deviations: 3^2 and 2^2, up to the sampling of means and variances and the ridge.
    np.testing.assert_allclose(scores[:, 0], [9.0, 4.0], rtol=0.3)


def _pair(x):
    return jnp.stack([x[:, 0], -x[:, 0]], axis=1), (x,)


def test_a_class_without_inputs_is_named():
    with pytest.raises(ValueError, match=r"classes \[1\]"):
        mahalanobis.fit(_pair, np.ones((4, 2), np.float32), np.zeros(4, int))


def test_odds_of_a_linear_model_are_standard_normal():
    logits_fn = Partial(lambda w, x: x @ w, jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32))
    x = np.random.default_rng(1).normal(size=(300, 4)).astype(np.float32)
    statistics = odds.fit(jax.random.key(0), logits_fn, x, sigma=0.5, num_draws=16)
    assert np.isinf(np.diag(statistics.scale)).all()
    detector = odds.odds(jax.random.key(7), logits_fn, statistics, sigma=0.5, num_draws=16)
    _, score = jax.jit(detector)(jnp.asarray(x))
    # The greater of two means of 16 unit normals: mean at most 0.56 / 4, deviation at most 1 / 4.
    assert abs(float(score.mean()) - 0.1) < 0.1
    assert 0.15 < float(score.std()) < 0.3


def test_pca_reads_the_directions_that_clean_data_lack():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 6)) * [3, 2, 1, 0.1, 0.1, 0.1]).astype(np.float32)
    logits_fn = Partial(lambda x: x)
    detector = pca.pca_coefficients(logits_fn, pca.fit(x, num_last=3))
    _, inside = detector(jnp.asarray([[6.0, 4.0, 2.0, 0.0, 0.0, 0.0]]))
    _, outside = detector(jnp.asarray([[0.0, 0.0, 0.0, 0.6, -0.6, 0.3]]))
    assert float(outside[0]) > 10.0 > 1.0 > float(inside[0])
    with pytest.raises(ValueError, match="num_last=9"):
        pca.fit(x, num_last=9)


def test_outlier_and_class_conditional_scores():
    x = jnp.zeros((1, 1))
    logits, score = outlier.outlier_class(_classifier([[1.0, 3.0, 2.5]]))(x)
    assert logits.shape == (1, 2)
    assert float(score[0]) == -0.5
    _, score = class_conditional.class_conditional(_classifier([[0.0, 2.0]]), _classifier([[9.0, -4.0]]))(x)
    assert float(score[0]) == 4.0
    _, score = class_conditional.generative(_classifier([[9.0, -4.0]]))(x)
    assert float(score[0]) == -9.0
    own, posing = jnp.asarray([[2.0, 0.0]]), jnp.asarray([[0.0, -1.0]])
    value = class_conditional.loss(own, jnp.asarray([0]), posing, jnp.asarray([1]))
    np.testing.assert_allclose(value, [np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-1.0))], rtol=1e-6)


def test_attack_length_counts_steps():
    # On a line with the boundary at 0 and steps of 0.1: an input at 0.25 falls after 3, one at 2 never.
    logits_fn = Partial(lambda x: jnp.concatenate([x, -x], axis=1))
    detector = stability.attack_length(
        jax.random.key(0), logits_fn, ball=Ball("linf", 0.5, low=-9.0, high=9.0), num_steps=5
    )
    _, score = jax.jit(detector)(jnp.asarray([[0.25], [0.05], [2.0]]))
    np.testing.assert_array_equal(score, [3.0, 1.0, 6.0])


def test_dropout_variance_vanishes_without_dropout():
    forward, variables = trained()
    x, key = jnp.asarray(digits()[2][:4]), jax.random.key(0)
    logits_fn = models.logits_fn(forward.model, variables)
    for rate, is_still in ((0.0, True), (0.5, False)):
        random_fn = models.dropout_fn(forward.model, variables, rate=rate)
        _, score = RUN(density.dropout_uncertainty(key, logits_fn, random_fn, num_draws=8), x)
        assert bool((jnp.abs(score) < 1e-6).all()) == is_still
    drawn = jax.jit(random_fn)(jax.random.split(key, 4), x)
    assert not np.allclose(drawn, logits_fn(x))


def test_features_are_the_layers():
    forward, variables = trained()
    x = jnp.asarray(digits()[2][:4])
    logits, layers = models.features_fn(forward.model, variables)(x)
    assert [layer.shape for layer in layers] == [(4, 4, 4, 8), (4, 16)]
    kernel, bias = models.last_layer(variables)
    np.testing.assert_allclose(layers[-1] @ kernel + bias[None], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(models.hidden_fn(forward.model, variables)(x), layers[-1])


def test_logistic_regression_is_at_the_minimum():
    rng = np.random.default_rng(0)
    negative, positive = rng.normal(0, 1, (200, 2)), rng.normal(1, 2, (300, 2))
    found = logistic.fit(negative, positive)

    def loss(theta):
        inputs = (jnp.asarray(np.concatenate([negative, positive]), jnp.float32) - found.mean[None]) / found.scale[None]
        signs = jnp.concatenate([-jnp.ones(200), jnp.ones(300)])
        value = jax.nn.softplus(-signs * (inputs @ theta[:2] + theta[2])).sum()
        return value + 0.5 * jnp.square(theta[:2]).sum()

    slope = jax.grad(loss)(jnp.append(jnp.asarray(found.weights), found.bias))
    assert float(jnp.abs(slope).max()) < 0.05  # of 500 terms
    detector = logistic.combined(lambda x: (x, x), found)
    scores = (detector(jnp.asarray(part, jnp.float32))[1] for part in (negative, positive))
    assert thresholds.auroc(*scores) > 0.6


def test_thresholds_keep_the_false_positive_rate():
    rng = np.random.default_rng(0)
    for total in (7, 100, 333):
        scores, is_correct = rng.normal(size=total).round(1), rng.random(total) < 0.9
        for fpr in (0.0, 0.05, 0.5):
            threshold = thresholds.calibrate(scores, is_correct, fpr=fpr)
            kept = scores[is_correct]
            assert (kept > threshold).mean() <= fpr
            below = kept[kept < threshold]
            assert not below.size or (kept > below.max()).mean() > fpr  # no lower score would do
    with pytest.raises(ValueError, match="no input is classified correctly"):
        thresholds.calibrate([1.0], [False])
    with pytest.raises(ValueError, match="fpr=1"):
        thresholds.calibrate([1.0], [True], fpr=1.0)


def test_roc_and_its_area():
    clean, perturbed = np.array([0.0, 1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])
    pairs = (perturbed[:, None] > clean).mean() + 0.5 * (perturbed[:, None] == clean).mean()
    curve = thresholds.roc(clean, perturbed)
    assert thresholds.auroc(clean, perturbed) == pytest.approx(pairs)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(pairs)
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0.0, 0.0, 1.0, 1.0)


def test_calibrated_decisions_stay():
    detector, x = detectors()["max softmax"], jnp.asarray(digits()[2][:50])
    _, score = detector(x)
    _, moved = thresholds.calibrated(detector, -3.0, scale=2.5)(x)
    np.testing.assert_array_equal(moved > 0, score > -3.0)
    np.testing.assert_allclose(thresholds.classifier_of(detector)(x), detector(x)[0])
    assert losses.is_wrong(thresholds.classifier_of(detector)(x), jnp.asarray(digits()[3][:50])).mean() < 0.3
