"""Every detector on one small trained-like network, for the common battery."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rdx import data, models
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
)
from rdx.train import fit, init_state, standard

# No gradient passes through a count of steps.
FLAT = {"attack length"}


@functools.cache
def digits():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    return np.asarray(data.to_float(train.images)), train.labels, np.asarray(data.to_float(test.images)), test.labels


@functools.cache
def trained(num_steps=150, num_classes=10):
    """A small net that is right on most digits, in a second."""
    forward = models.forward(models.ConvNet((models.Conv(8, 3, 2),), (16,), num_classes))
    x, labels, _, _ = digits()
    params = forward.model.init(jax.random.key(0), x[:1])["params"]
    rows = lambda step: np.arange(64) + step * 64 % 1024
    batches = lambda step: {"x": jnp.asarray(x[rows(step)]), "labels": jnp.asarray(labels[rows(step)])}
    optimizer = optax.adam(1e-2)
    state, _ = fit(
        standard.cross_entropy(forward), init_state(params, {}, optimizer), optimizer, batches, key=jax.random.key(1),
        num_steps=num_steps, progress=False,
    )
    return forward, {"params": state.params}


@functools.cache
def detectors():
    forward, variables = trained()
    x, labels, _, _ = digits()
    x, labels, key = x[:200], labels[:200], jax.random.key(3)
    logits_fn = models.logits_fn(forward.model, variables)
    layers_fn = models.features_fn(forward.model, variables)
    wide, wide_variables = trained(num_steps=20, num_classes=11)
    wide_fn = models.logits_fn(wide.model, wide_variables)
    noisy = np.clip(x + 0.2 * np.sign(np.random.default_rng(0).normal(size=x.shape)), 0, 1).astype(np.float32)

    def regressed(scores_fn):
        clean, other = (np.asarray(jax.jit(lambda fn, x: fn(x))(scores_fn, jnp.asarray(v))[1]) for v in (x, noisy))
        return logistic.combined(scores_fn, logistic.fit(clean, other))

    kde = density.kernel_density(layers_fn, density.fit(layers_fn, x, labels, bandwidths=(1.0,)))
    dropped = density.dropout_uncertainty(key, logits_fn, models.dropout_fn(forward.model, variables), num_draws=4)
    return {
        "max softmax": softmax.max_softmax(logits_fn),
        "entropy": softmax.entropy(logits_fn),
        "feature squeezing": squeezing.feature_squeezing(
            logits_fn, [squeezing.bit_depth(1), squeezing.median_filter(2), squeezing.non_local_means(search=3)]
        ),
        "kernel density": kde,
        "dropout": dropped,
        "density and dropout": regressed(logistic.joined(kde, dropped)),
        "lid": regressed(lid.scores(layers_fn, lid.fit(layers_fn, x[:60], num_neighbours=10))),
        "mahalanobis": regressed(mahalanobis.scores(layers_fn, mahalanobis.fit(layers_fn, x, labels), magnitude=0.01)),
        "odds": odds.odds(key, logits_fn, odds.fit(key, logits_fn, x, sigma=0.1, num_draws=8), sigma=0.1, num_draws=8),
        "outlier class": outlier.outlier_class(wide_fn),
        "pca": pca.pca_coefficients(logits_fn, pca.fit(x, num_last=10)),
        "class conditional": class_conditional.class_conditional(logits_fn, logits_fn),
        "generative": class_conditional.generative(logits_fn),
        "logit stability": stability.logit_stability(key, logits_fn, sigma=0.1, num_draws=4),
        "attack length": stability.attack_length(key, logits_fn, ball=Ball("linf", 0.3), num_steps=5),
    }
