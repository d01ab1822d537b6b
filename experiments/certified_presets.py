"""Settings of `experiments.tramer_certified`: what each data set and preset trains, certifies and attacks."""

import dataclasses

from experiments import command_line
from experiments.a5_presets import CIFAR_STATISTICS
from rdx import models


@dataclasses.dataclass(frozen=True)
class Config:
    """One Table 2; radii are linf, in units of [0, 1].

    Attributes:
        dataset: name of the data set.
        preset: "smoke" (seconds, every branch), "cpu" (two cores) or "paper" (Table 2's radii; an accelerator).
        eps: radii of the classifiers; detectors are certified at twice as much.
        abstain: numbers of abstain classes.
        net: the network, without abstain classes.
        epochs: passes over the training images.
        warmup: epochs at radius 0.
        ramp: epochs in which the radius rises.
        batch_size: examples per update.
        learning_rate: of Adam; a tenth of it in the last quarter.
        weights: candidates for the weight of the joint loss without detection; one is chosen on held-out images.
        overshoot: joint training prepares for this multiple of the radius.
        kappa_end: weight of the clean loss at the final radius.
        natural: `lambda_2` of the joint loss.
        gamma: weight of the penalty for uneven use of several abstain classes.
        num_held_out: training images held out to choose by.
        num_attacked: test images attacked.
        cross_check: certified ones among them that are attacked nevertheless, of classifiers; of detectors all are.
        num_steps: steps of the attacks.
        batch_certified: images certified together.
        num_train: training images used; None for all.
        num_test: test images used; None for all.
        seed: of everything random.
    """

    dataset: str
    preset: str
    eps: tuple[float, ...]
    net: models.ConvNet
    epochs: int
    warmup: int
    ramp: int
    batch_size: int
    learning_rate: float
    abstain: tuple[int, ...] = (1, 2)
    weights: tuple[float, ...] = (0.0, 1.0)
    overshoot: float = 1.1
    kappa_end: float = 0.5
    natural: float = 1.0
    gamma: float = 0.1
    num_held_out: int = 300
    num_attacked: int = 500
    cross_check: int = 500
    num_steps: int = 50
    batch_certified: int = 500
    num_train: int | None = None
    num_test: int | None = None
    seed: int = 0


def config(dataset: str, preset: str) -> Config:
    """Looks up the settings of a data set and preset.

    Raises:
        ValueError: naming what there is.
    """
    build = command_line.of_dataset({"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}, dataset)
    if preset not in {"smoke", "cpu", "paper"} or (dataset == "cifar10") != (preset == "paper"):
        raise ValueError(f"No preset {preset!r} for {dataset}: use smoke or cpu, and paper for cifar10.")
    settings = build()
    return _smoke(settings) if preset == "smoke" else settings


def _smoke(settings: Config) -> Config:
    return dataclasses.replace(
        settings, preset="smoke", eps=(0.02,), abstain=(1,), net=models.ConvNet((models.Conv(8, 3, 2),), (16,)),
        epochs=12, warmup=2, ramp=6, learning_rate=5e-3, num_held_out=60, num_attacked=24, cross_check=24, num_steps=5,
        num_train=512, num_test=48,
    )


def _digits() -> Config:
    return Config(
        dataset="digits", preset="cpu", eps=(0.05, 0.1), net=models.digits_cnn(), epochs=80, warmup=5, ramp=40,
        batch_size=64, learning_rate=1e-3, num_attacked=360,
    )


def _mnist() -> Config:
    return Config(
        dataset="mnist", preset="cpu", eps=(0.1,), net=models.small_cnn(), epochs=12, warmup=1, ramp=6,
        batch_size=128, learning_rate=1e-3, num_held_out=3000, num_train=20_000,
    )


def _cifar10() -> Config:
    return Config(
        dataset="cifar10", preset="paper", eps=(4 / 255, 8 / 255), abstain=(1, 2),
        net=models.a5_classifier().clone(**CIFAR_STATISTICS), epochs=400,
        warmup=40, ramp=200, batch_size=256, learning_rate=5e-4, natural=2.9, num_held_out=2500, num_attacked=1000,
        cross_check=1000, num_steps=100, batch_certified=250,
    )
