"""The detectors of `experiments.tramer_detectors`, fitted, each a line of its table."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from experiments import tramer_runs
from experiments.detectors_presets import Config
from rdx import attacks, data, models
from rdx.attacks import adaptive
from rdx.balls import Ball
from rdx.detect import (
    class_conditional,
    density,
    lid,
    logistic,
    mahalanobis,
    matching,
    odds,
    outlier,
    pca,
    softmax,
    squeezing,
    stability,
    thresholds,
)
from rdx.evaluate import shared
from rdx.train import adversarial, detectors
from rdx.types import Array, Detector, Key, LogitsFn


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """A detector with the threshold 0 and scores of unit deviation.

    Attributes:
        detector: the detector.
        threshold: what it was calibrated to, in units of its own scores.
        matched: what `matching.match` matches against it, with its guides.
    """

    detector: Partial
    threshold: float
    matched: dict[str, tuple[Callable[[Array], Array], matching.Guides]]


class Zoo:
    """Networks and detectors of one run; everything is trained and fitted when first asked for."""

    def __init__(self, settings: Config, parts: tramer_runs.Data, directory: Any) -> None:
        """Takes the settings, the data, and the directory of checkpoints."""
        self.config, self.parts, self.directory = settings, parts, directory
        self.key = jax.random.key(settings.seed)
        self.x = np.asarray(data.to_float(parts.train.images[: settings.num_fitted]))
        self.labels = parts.train.labels[: settings.num_fitted]

    @property
    def names(self) -> tuple[str, ...]:
        """The detectors, in the table's order."""
        return tuple(_BUILDERS)

    def calibrated(self, name: str) -> Calibrated:
        """Fits a detector and calibrates it on held-out images."""
        return self.calibrate(_BUILDERS[name](self), self._embeddings(name))

    def calibrate(self, detector: Detector, embeddings: dict[str, Callable[[Array], Array]]) -> Calibrated:
        """Calibrates a detector at the false-positive rate of the settings, on held-out images."""
        x, labels = data.to_float(self.parts.held_out.images), self.parts.held_out.labels
        logits, scores = thresholds.collect(detector, x)
        is_correct = logits.argmax(axis=1) == labels
        threshold = thresholds.calibrate(scores, is_correct, fpr=self.config.fpr)
        found = thresholds.calibrated(detector, threshold, scale=max(float(scores.std()), 1e-6))
        matched = {
            what: (embed, matching.guides(found, embed, x[:500], labels[:500])) for what, embed in embeddings.items()
        }
        return Calibrated(found, threshold, matched)

    def key_of(self, name: str) -> Key:
        """Folds a name into the run's key."""
        return shared.key_of(self.key, name)

    @functools.cached_property
    def classifier(self) -> models.Forward:
        """The network of classifiers."""
        return models.forward(self.config.net)

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        """The undefended classifier, trained with dropout."""
        loss = detectors.with_dropout(self.classifier, rate=self.config.dropout)
        return {"params": self._train("undefended", self.classifier, loss, self.config.epochs)}

    @functools.cached_property
    def logits_fn(self) -> LogitsFn:
        """The undefended classifier."""
        return models.logits_fn(self.config.net, self.variables)

    @functools.cached_property
    def layers_fn(self) -> Partial:
        """Its layers."""
        return models.features_fn(self.config.net, self.variables)

    @functools.cached_property
    def robust(self) -> LogitsFn:
        """A classifier that was trained adversarially at half the detectors' radius."""
        loss = adversarial.cross_entropy(self.classifier, Ball("linf", self.config.eps / 2), attack=self._attack())
        params = self._train("robust", self.classifier, loss, self.config.robust_epochs)
        return models.logits_fn(self.config.net, {"params": params})

    @functools.cached_property
    def perturbed(self) -> np.ndarray:
        """What PGD makes of the images that detectors are fitted on: the attack that their authors knew."""
        attack = functools.partial(attacks.pgd, num_steps=self.config.num_steps)
        parts = [
            attack(
                self.key_of("fit"), self.logits_fn, self.x[rows], self.labels[rows], ball=Ball("linf", self.config.eps),
                index=rows,
            ).x_adv
            for rows in np.array_split(np.arange(len(self.x)), max(len(self.x) // 200, 1))
        ]
        return np.concatenate([np.asarray(part) for part in parts])

    def _attack(self) -> Callable[..., Any]:
        # XLA's CPU backend is slow in compiled loops; a few steps may as well be unrolled.
        loop = attacks.Loop(kind="host" if jax.default_backend() == "cpu" else "compiled")
        return functools.partial(attacks.pgd, num_steps=self.config.train_steps, loop=loop)

    def _train(self, name: str, forward: models.Forward, loss: Any, epochs: int) -> Any:
        settings = self.config
        return tramer_runs.train(
            self.key, forward, loss, self.parts.train, directory=self.directory, name=name,
            num_steps=epochs * max(len(self.parts.train) // settings.batch_size, 1), batch_size=settings.batch_size,
            learning_rate=settings.learning_rate, seed=settings.seed,
        )

    def _regressed(self, scores_fn: Partial) -> Partial:
        """Combines scores by a regression between clean and perturbed images, half of each."""
        clean, perturbed = (thresholds.collect(scores_fn, x)[1] for x in (self.x[1::2], self.perturbed[1::2]))
        return logistic.combined(scores_fn, logistic.fit(clean, perturbed))

    def _max_softmax(self) -> Partial:
        return softmax.max_softmax(self.logits_fn)

    def _entropy(self) -> Partial:
        return softmax.entropy(self.logits_fn)

    def _squeezing(self) -> Partial:
        bits = 1 if self.config.dataset == "mnist" else 2
        return squeezing.feature_squeezing(self.logits_fn, [squeezing.bit_depth(bits), squeezing.median_filter(2)])

    def _density(self) -> Partial:
        fitted = density.fit(self.layers_fn, self.x, self.labels, bandwidths=self.config.bandwidths)
        random_fn = models.dropout_fn(self.config.net, self.variables, rate=self.config.dropout)
        dropped = density.dropout_uncertainty(
            self.key_of("dropout"), self.logits_fn, random_fn, num_draws=self.config.num_draws
        )
        return self._regressed(logistic.joined(density.kernel_density(self.layers_fn, fitted), dropped))

    def _lid(self) -> Partial:
        return self._regressed(lid.scores(self.layers_fn, lid.fit(self.layers_fn, self.x[::2][:100])))

    def _mahalanobis(self) -> Partial:
        return self._regressed(
            mahalanobis.scores(self.layers_fn, mahalanobis.fit(self.layers_fn, self.x[::2], self.labels[::2]))
        )

    def _odds(self) -> Partial:
        key, noise = self.key_of("odds"), {"sigma": self.config.sigma, "num_draws": self.config.num_draws}
        return odds.odds(key, self.logits_fn, odds.fit(key, self.logits_fn, self.x, **noise), **noise)

    @functools.cached_property
    def outlier_fn(self) -> LogitsFn:
        """The network with a class for perturbed inputs."""
        forward = models.forward(self.config.net.clone(num_classes=self.config.net.num_classes + 1))
        ball = Ball("linf", self.config.eps)
        loss = detectors.outlier_class(forward, ball, source=self.logits_fn, attack=self._attack())
        params = self._train("outlier", forward, loss, self.config.robust_epochs)
        return models.logits_fn(forward.model, {"params": params})

    def _outlier(self) -> Partial:
        return outlier.outlier_class(self.outlier_fn)

    def _pca(self) -> Partial:
        num = min(self.config.num_components, self.x[0].size // 4)
        return pca.pca_coefficients(self.logits_fn, pca.fit(self.x, num_last=num))

    def _gat(self) -> Partial:
        loss = detectors.gat(self.classifier, Ball("linf", self.config.eps), attack=self._attack())
        params = self._train("gat", self.classifier, loss, self.config.robust_epochs)
        detectors_fn = models.logits_fn(self.config.net, {"params": params})
        return class_conditional.class_conditional(self.logits_fn, detectors_fn)

    def _stability(self) -> Partial:
        noise = {"sigma": self.config.sigma, "num_draws": self.config.num_draws}
        return stability.logit_stability(self.key_of("stability"), self.logits_fn, **noise)

    def robust_max_softmax(self) -> Calibrated:
        """The detector of the reductions: doubt of the adversarially trained classifier."""
        return self.calibrate(softmax.max_softmax(self.robust), {"logits": self.robust})

    def _embeddings(self, name: str) -> dict[str, Callable[[Array], Array]]:
        """Names what to match: features, and logits, under noise where the detector draws it."""
        if name == "outlier class":
            return {"logits": self.outlier_fn}
        hidden = models.hidden_fn(self.config.net, self.variables)
        if name in {"odds", "logit stability"}:
            random_fn = Partial(odds.noisy_logits, logits_fn=self.logits_fn, sigma=self.config.sigma)
            return {"features": hidden, "logits": adaptive.eot(self.key_of("match"), random_fn, self.config.num_draws)}
        return {"features": hidden, "logits": self.logits_fn}


_BUILDERS: dict[str, Callable[[Zoo], Partial]] = {
    "max softmax": Zoo._max_softmax,
    "entropy": Zoo._entropy,
    "feature squeezing": Zoo._squeezing,
    "density and dropout": Zoo._density,
    "LID": Zoo._lid,
    "Mahalanobis": Zoo._mahalanobis,
    "odds": Zoo._odds,
    "outlier class": Zoo._outlier,
    "PCA": Zoo._pca,
    "GAT": Zoo._gat,
    "logit stability": Zoo._stability,
}
