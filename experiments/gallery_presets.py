"""Settings of `experiments.attack_gallery`: what each preset trains and how hard it attacks."""

import dataclasses
from typing import Any

from rdx import models
from rdx.types import Norm


@dataclasses.dataclass(frozen=True)
class Config:
    """One gallery; radii are in units of [0, 1].

    Attributes:
        dataset: name of the data set.
        preset: "smoke" (seconds, every branch), "cpu" (two cores) or "paper" (the paper's settings, an accelerator).
        radii: the norms that are attacked in, each with the radius of the robust accuracy.
        every_norm: whether each attack is run in all of its norms that have a radius, not in its first alone.
        undefended: the network trained on clean images.
        robust: the network trained adversarially, and with another seed the substitute of transfer attacks.
        eps_train: linf radius of adversarial training.
        train_steps: PGD steps of adversarial training.
        ramp: epochs in which the radius of adversarial training rises to `eps_train`.
        epochs: passes over the training set.
        batch_size: examples per update.
        learning_rate: at the start; it falls to 0 along a cosine.
        optimizer: "adam", or "sgd" with momentum 0.9 and weight decay 5e-4.
        augments: whether images are shifted by up to 4 pixels and mirrored.
        num_images: how many test images are attacked.
        num_train: training images used; None for all.
        num_steps: steps of white-box attacks at the radius of the table.
        search_steps: steps of white-box attacks in the search for the minimal radius.
        penalty_steps: steps for each constant of Carlini & Wagner's and the elastic-net attack; for linf a tenth of it
            before the constant doubles, and five times as many in all.
        penalty_rate: their step size, for linf half of it.
        num_search_steps: their constants.
        num_queries: budget of score- and decision-based attacks.
        num_samples: queries that score-based attacks estimate a gradient with.
        suite_steps: steps of the gradient-based attacks in AutoAttack.
        suite_queries: queries of Square in AutoAttack.
        searched: kinds of fixed-radius attacks whose minimal radius is searched for.
        num_bisections: bisections of that search.
        batch_attacked: images attacked together.
        seed: of everything random.
    """

    dataset: str
    preset: str
    radii: tuple[tuple[Norm, float], ...]
    undefended: Any
    robust: Any
    eps_train: float
    train_steps: int
    ramp: int
    epochs: int
    batch_size: int
    learning_rate: float
    every_norm: bool = True
    optimizer: str = "adam"
    augments: bool = False
    num_images: int = 1000
    num_train: int | None = None
    num_steps: int = 100
    search_steps: int = 10
    penalty_steps: int = 1000
    penalty_rate: float = 0.01
    num_search_steps: int = 9
    num_queries: int = 20_000
    num_samples: int = 100
    suite_steps: int = 100
    suite_queries: int = 5000
    searched: tuple[str, ...] = ("white box",)
    num_bisections: int = 10
    batch_attacked: int = 256
    seed: int = 0


def config(preset: str) -> Config:
    """Looks up the settings of a preset.

    Raises:
        ValueError: naming what there is.
    """
    builders = {"smoke": _smoke, "cpu": _cpu, "paper": _paper}
    if preset not in builders:
        raise ValueError(f"Unknown preset {preset!r}: use smoke, cpu or paper.")
    return builders[preset]()


def _smoke() -> Config:
    net = models.ConvNet((models.Conv(8, 3, 2),), (16,))
    return Config(
        dataset="digits", preset="smoke", radii=(("linf", 0.1), ("l2", 0.5), ("l1", 2.0)), every_norm=False,
        undefended=net, robust=net, eps_train=0.1, train_steps=3, ramp=4, epochs=12, batch_size=64, learning_rate=5e-3,
        num_images=24, num_train=512, num_steps=6, search_steps=3, penalty_steps=10, penalty_rate=0.05,
        num_search_steps=3, num_queries=200, num_samples=20, suite_steps=4, suite_queries=20, num_bisections=4,
        batch_attacked=32,
    )


def _cpu() -> Config:
    net = models.small_cnn()
    return Config(
        dataset="mnist", preset="cpu", radii=(("linf", 0.2), ("l2", 1.5), ("l1", 8.0)), undefended=net, robust=net,
        eps_train=0.2, train_steps=7, ramp=2, epochs=5, batch_size=128, learning_rate=2e-3, num_images=256,
        num_steps=40, penalty_steps=100, penalty_rate=0.05, num_search_steps=6, num_queries=1000, num_samples=50,
        suite_steps=50, suite_queries=1000,
    )


def _paper() -> Config:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    return Config(
        dataset="cifar10", preset="paper", radii=(("linf", 8 / 255), ("l2", 1.0)),
        undefended=models.ResNet(blocks=(9, 9, 9), mean=mean, std=std),
        robust=models.ResNet((160, 320, 640), (5, 5, 5), mean=mean, std=std),
        eps_train=8 / 255, train_steps=7, ramp=0, epochs=100, batch_size=128, learning_rate=0.1, optimizer="sgd",
        augments=True, searched=("white box", "score"),
    )
