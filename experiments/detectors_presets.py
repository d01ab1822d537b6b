"""Settings of `experiments.tramer_detectors`: what each data set and preset trains, fits and attacks."""

import dataclasses

from experiments import command_line
from rdx import models


@dataclasses.dataclass(frozen=True)
class Config:
    """One table of detectors; radii are linf, in units of [0, 1].

    Attributes:
        dataset: name of the data set.
        preset: "smoke" (seconds, every branch) or "cpu" (two cores).
        eps: radius of the attacker on detectors; classifiers of the same strength face half of it.
        net: the network.
        epochs: passes over the training images.
        robust_epochs: of adversarial training, and of the detectors that are trained.
        train_steps: PGD steps of adversarial training.
        batch_size: examples per update.
        learning_rate: of Adam.
        num_fitted: training images that detectors are fitted on.
        num_held_out: images that thresholds are calibrated on.
        num_images: test images that are evaluated.
        num_steps: steps of the attacks.
        num_restarts: restarts of adaptive attacks.
        num_queries: queries of Square.
        num_guides: guides of each matching attack.
        num_draws: draws of detectors that use noise.
        search_steps: steps of the ball searches of the reductions.
        search_restarts: their restarts.
        num_reduced: images on which the reductions are run.
        num_train: training images used; None for all.
        fpr: share of clean inputs that detectors may reject.
        sigma: deviation of the noise of `odds` and of logit stability.
        bandwidths: candidates for the kernel density.
        num_components: last principal components.
        dropout: share of units dropped.
        seed: of everything random.
    """

    dataset: str
    preset: str
    eps: float
    net: models.ConvNet
    epochs: int
    robust_epochs: int
    train_steps: int
    batch_size: int
    learning_rate: float
    num_fitted: int
    num_held_out: int
    num_images: int
    num_steps: int
    num_restarts: int
    num_queries: int
    num_guides: int
    num_draws: int
    search_steps: int
    search_restarts: int
    num_reduced: int
    num_train: int | None = None
    fpr: float = 0.05
    sigma: float = 0.1
    bandwidths: tuple[float, ...] = (0.3, 0.6, 1.2, 2.5, 5.0)
    num_components: int = 15
    dropout: float = 0.5
    seed: int = 0


def config(dataset: str, preset: str) -> Config:
    """Looks up the settings of a data set and preset.

    Raises:
        ValueError: naming what there is.
    """
    build = command_line.of_dataset({"digits": _digits, "mnist": _mnist}, dataset)
    if preset not in {"smoke", "cpu"}:
        raise ValueError(f"Unknown preset {preset!r}: use smoke or cpu.")
    settings = build()
    return _smoke(settings) if preset == "smoke" else settings


def _smoke(settings: Config) -> Config:
    return dataclasses.replace(
        settings, preset="smoke", net=models.ConvNet((models.Conv(8, 3, 2),), (16,)), epochs=8, robust_epochs=3,
        train_steps=2, num_fitted=200, num_held_out=60, num_images=16, num_steps=5, num_restarts=1, num_queries=20,
        num_guides=1, num_draws=4, search_steps=3, search_restarts=1, num_reduced=8, num_train=600,
    )


def _digits() -> Config:
    return Config(
        dataset="digits", preset="cpu", eps=0.2, net=models.digits_cnn(), epochs=40, robust_epochs=40, train_steps=7,
        batch_size=64, learning_rate=2e-3, num_fitted=800, num_held_out=300, num_images=200, num_steps=50,
        num_restarts=2, num_queries=500, num_guides=2, num_draws=16, search_steps=20, search_restarts=3,
        num_reduced=100,
    )


def _mnist() -> Config:
    return Config(
        dataset="mnist", preset="cpu", eps=0.3, net=models.small_cnn(), epochs=3, robust_epochs=3, train_steps=5,
        batch_size=128, learning_rate=2e-3, num_fitted=1000, num_held_out=2000, num_images=150, num_steps=40,
        num_restarts=2, num_queries=500, num_guides=2, num_draws=8, search_steps=20, search_restarts=2,
        num_reduced=50, num_components=100,
    )
