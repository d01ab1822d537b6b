"""Settings of `experiments.a5_tables`: what each data set and preset trains, attacks and certifies."""

import dataclasses
import functools
from typing import Any

from experiments import command_line
from rdx import models


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How one network (or one set of perturbations) is optimised, in epochs.

    Attributes:
        epochs: passes over the training set (for A5/O: updates of every image).
        warmup: epochs at radius 0, that is on clean inputs.
        ramp: epochs in which the radius rises to its final value; 0 to start there.
        learning_rate: of RMSProp with decay 0.99, as in A5's code.
        decay: epochs after which the learning rate falls by 10.
        batch_size: examples per update.
    """

    epochs: int
    warmup: int
    ramp: int
    learning_rate: float
    decay: tuple[int, ...]
    batch_size: int = 100


@dataclasses.dataclass(frozen=True)
class Config:
    """One table's worth of runs; radii are in units of [0, 1].

    Attributes:
        dataset: name of the data set.
        preset: "smoke" (seconds, every branch), "cpu" (two cores) or "paper" (the paper's networks and schedules).
        eps_attack: radii `eps_A` of the attacker.
        eps_classifier: radii `eps_A^C` that classifiers are trained for.
        eps_defense: radii `eps_D` of the defender.
        eps_robustify: radii `eps_A^R` that robustification prepares for; empty for `eps_A^R = eps_A`.
        classifier: the network `C`.
        robustifier: the network `R`.
        base: schedule of the classifiers.
        offline: schedule of A5/O.
        online: schedule of A5/R.
        joint: schedule of A5/RC, which starts where A5/R ended.
        has_crown: whether CROWN-IBP takes part while the radius of A5/R and A5/RC rises, as in A5's code.
        shift: augmentation of A5/RC: largest shift in pixels.
        rotation: augmentation of A5/RC: largest rotation in degrees.
        flip: augmentation of A5/RC: whether images are mirrored at random.
        is_alike: whether all images of a batch are shifted, rotated and mirrored alike, as in A5's code, where
            torchvision's transforms meet the whole batch.
        base_augmented: whether classifiers are trained with that augmentation too.
        base_scale: classifiers are trained for this many times `eps_A^C`.
        num_attacked: how many test images are counted and, unless certified, attacked by AutoAttack.
        cross_check: how many certified images are attacked nevertheless.
        attack_steps: steps of APGD-CE, APGD-T and FAB-T in AutoAttack.
        attack_queries: queries of Square in AutoAttack.
        num_compared: how many test images IBP, CROWN-IBP and alpha-CROWN certify side by side.
        num_train: training images used; None for all.
        num_test: test images used; None for all.
        num_offline: test images that A5/O optimises, and is evaluated on; None for all.
        seed: of everything random.
        num_seeds: how often everything is trained anew, from `seed`, `seed + 1` and so on.
    """

    dataset: str
    preset: str
    eps_attack: tuple[float, ...]
    eps_classifier: tuple[float, ...]
    eps_defense: tuple[float, ...]
    classifier: models.ConvNet
    robustifier: models.Robustifier
    base: Schedule
    offline: Schedule
    online: Schedule
    joint: Schedule
    eps_robustify: tuple[float, ...] = ()
    has_crown: bool = True
    shift: int = 4
    rotation: float = 10.0
    flip: bool = False
    is_alike: bool = False
    base_augmented: bool = False
    base_scale: float = 1.0
    num_attacked: int = 500
    cross_check: int = 50
    attack_steps: int = 100
    attack_queries: int = 5000
    num_compared: int = 100
    num_train: int | None = None
    num_test: int | None = None
    num_offline: int | None = None
    seed: int = 0
    num_seeds: int = 1


def config(dataset: str, preset: str) -> Config:
    """Looks up the settings of a data set and preset.

    Raises:
        ValueError: naming what there is.
    """
    builders = {
        "digits": _digits, "mnist": _mnist, "fashion_mnist": _fashion_mnist, "cifar10": _cifar10,
        "tiny_imagenet32": functools.partial(_tiny_imagenet, "tiny_imagenet32"),
        "tiny_imagenet": functools.partial(_tiny_imagenet, "tiny_imagenet"),
    }
    build = command_line.of_dataset(builders, dataset)
    if preset not in {"smoke", "cpu", "paper"}:
        raise ValueError(f"Unknown preset {preset!r}: use smoke, cpu or paper.")
    settings = build(preset)
    return _smoke(settings) if preset == "smoke" else settings


# Means and deviations by which nets for CIFAR-10 normalise, as in the code of A5 and of CROWN-IBP.
CIFAR_STATISTICS: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}

# The defaults of A5's code; the values of each table are in a supplement. With these rates the steps of A5/O add up to
# a tenth of a large radius, so it has faster ones.
_RELEASED, _PAPER_OFFLINE = Schedule(100, 2, 18, 1e-3, (25, 42)), Schedule(100, 0, 0, 0.05, (75,))


def _smoke(settings: Config) -> Config:
    def once(schedule: Schedule) -> Schedule:
        ramp, warmup = min(schedule.ramp, 1), min(schedule.warmup, 1)
        return dataclasses.replace(schedule, epochs=3, warmup=warmup, ramp=ramp, decay=(), batch_size=32)

    return dataclasses.replace(
        settings, preset="smoke", eps_classifier=settings.eps_classifier[:1], eps_attack=settings.eps_attack[:1],
        eps_defense=settings.eps_defense[-1:], eps_robustify=settings.eps_robustify[:1],
        base=once(settings.base), offline=once(settings.offline), online=once(settings.online),
        joint=once(settings.joint), num_attacked=24, cross_check=4, attack_steps=5, attack_queries=20,
        num_compared=8, num_train=128, num_test=48, num_offline=None,
    )


def _digits(preset: str) -> Config:
    if preset == "paper":
        raise ValueError("The paper has no digits: use preset smoke or cpu.")
    return Config(
        dataset="digits", preset="cpu", eps_attack=(0.1,), eps_classifier=(0.1,), eps_defense=(0.1, 0.2, 0.3),
        classifier=models.digits_cnn(), robustifier=models.mnist_robustifier(),
        base=Schedule(60, 5, 30, 1e-3, (45, 55), 64), offline=Schedule(60, 0, 0, 0.05, (40,), 360),
        online=Schedule(30, 0, 3, 2e-3, (22,), 64), joint=Schedule(40, 0, 3, 1e-3, (25, 35), 64),
        shift=0, rotation=0.0, num_attacked=360,  # a shift by 1 of 8 pixels costs more than overfitting does
    )


def _mnist(preset: str) -> Config:
    if preset == "paper":
        return _paper_mnist("mnist", models.a5_classifier())
    # Cut to 150 minutes on two cores for all 42 cells: a small net, nine epochs for a classifier, three for A5/R and
    # four for A5/RC, both by intervals alone because an update with CROWN-IBP takes three times as long or more, A5/O
    # on 1000 images.
    return Config(
        dataset="mnist", preset="cpu", eps_attack=(0.1, 0.3), eps_classifier=(0.1, 0.2, 0.3), eps_defense=(0.1, 0.3),
        classifier=models.small_cnn(), robustifier=models.mnist_robustifier(),
        base=Schedule(9, 1, 4, 1e-3, (7,), 128), offline=Schedule(40, 0, 0, 0.05, (30,), 100),
        online=Schedule(3, 0, 1, 2e-3, (2,), 128),
        joint=Schedule(4, 0, 1, 1e-3, (3,), 128), has_crown=False, shift=2, rotation=10.0, num_offline=1000,
    )


def _fashion_mnist(preset: str) -> Config:
    if preset == "paper":
        # As released: the standard deviation is 2, not 0.5.
        return _paper_mnist("fashion_mnist", models.a5_classifier().clone(mean=(0.5,), std=(2.0,)))
    return dataclasses.replace(_mnist(preset), dataset="fashion_mnist", eps_attack=(0.1,))  # half of MNIST's grid


def _paper_mnist(dataset: str, classifier: models.ConvNet) -> Config:
    return Config(
        dataset=dataset, preset="paper", eps_attack=(0.1, 0.3), eps_classifier=(0.0, 0.1, 0.2, 0.3, 0.4),
        eps_defense=(0.05, 0.1, 0.2, 0.3, 0.4), classifier=classifier,
        robustifier=models.mnist_robustifier().clone(mean=classifier.mean, std=classifier.std),
        base=_RELEASED, offline=_PAPER_OFFLINE, online=_RELEASED, joint=_RELEASED, num_attacked=10_000,
        cross_check=1000, num_compared=1000,
    )


def _cifar10(preset: str) -> Config:
    pixel = 1 / 255
    if preset == "paper":
        # Without a defender A5/RC trains the classifier alone, which is a row of Table 8. The classifier is trained
        # for 8.8/255, with flips and crops, as in the code of CROWN-IBP that it comes from.
        return Config(
            dataset="cifar10", preset="paper", eps_attack=(8 * pixel,), eps_classifier=(8 * pixel,), base_scale=1.1,
            base_augmented=True, eps_defense=tuple(n * pixel for n in (0, 4, 8, 16, 32)),
            eps_robustify=tuple(n * pixel for n in (4, 8, 16)),
            classifier=models.a5_classifier().clone(**CIFAR_STATISTICS),
            robustifier=models.cifar_robustifier().clone(**CIFAR_STATISTICS),
            base=Schedule(200, 10, 120, 5e-4, (160, 180)), offline=_PAPER_OFFLINE, online=_RELEASED, joint=_RELEASED,
            flip=True, rotation=0.0, num_attacked=10_000, cross_check=1000, num_compared=1000,
        )
    return Config(
        dataset="cifar10", preset="cpu", eps_attack=(2 * pixel,), eps_classifier=(2 * pixel,),
        eps_defense=(4 * pixel, 16 * pixel), classifier=models.small_cnn().clone(**CIFAR_STATISTICS),
        robustifier=models.cifar_robustifier().clone(**CIFAR_STATISTICS),
        base=Schedule(16, 1, 8, 1e-3, (12, 15), 128), offline=Schedule(40, 0, 0, 0.05, (30,), 100),
        online=Schedule(3, 0, 1, 1e-3, (2,), 128), joint=Schedule(6, 0, 1, 5e-4, (4,), 128), flip=True, rotation=0.0,
        num_test=2000, num_offline=1000,
    )


def _tiny_imagenet(dataset: str, preset: str) -> Config:
    """Has radii and statistics that are usual for certified training on this set; A5's are in its supplement."""
    pixel = 1 / 255
    mean, std = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)
    small = Config(
        dataset=dataset, preset="cpu", eps_attack=(pixel,), eps_classifier=(pixel,), eps_defense=(4 * pixel,),
        classifier=models.small_cnn(200).clone(mean=mean, std=std),
        robustifier=models.cifar_robustifier().clone(mean=mean, std=std),
        base=Schedule(8, 1, 4, 5e-4, (7,), 128), offline=Schedule(40, 0, 0, 0.05, (30,), 100),
        online=Schedule(1, 0, 0, 1e-3, (), 128), joint=Schedule(2, 0, 0, 5e-4, (), 128), shift=4, rotation=0.0,
        flip=True, num_attacked=200, num_compared=10, num_test=1000, num_offline=200,
    )
    if preset != "paper":
        return small
    return dataclasses.replace(
        small, preset="paper", base_augmented=True, eps_defense=tuple(n * pixel for n in (1, 2, 4, 8)),
        classifier=models.a5_classifier(200).clone(mean=mean, std=std), base=Schedule(200, 10, 120, 5e-4, (160, 180)),
        offline=_PAPER_OFFLINE, online=_RELEASED, joint=_RELEASED, num_attacked=10_000, cross_check=1000,
        num_compared=1000, num_test=None, num_offline=None,
    )
