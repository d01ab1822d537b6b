"""Settings of `experiments.a5_questions`: those of A5's tables, and what the questions add."""

import dataclasses

from experiments import a5_presets, command_line
from experiments.a5_report import Cell
from rdx import models
from rdx.balls import Ball
from rdx.types import Norm

# How the classifiers were trained that defences are made for, and that judge.
CERTIFIED, SEED, ARCHITECTURE, ADVERSARIAL, VANILLA = (
    "certified", "another seed", "another architecture", "adversarial", "vanilla",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run of the questions; radii are in units of [0, 1].

    Attributes:
        base: networks, schedules, data and attacks, as in A5's tables; one `eps_A`, `eps_A^C` and `eps_D`.
        makers: classifiers that A5/O and A5/R are made for, in `transfer`.
        judges: classifiers that judge, in `transfer`.
        other: another architecture.
        num_transferred: test images of `transfer`, whose matrix has many cells.
        adversarial_steps: steps of PGD in adversarial training.
        norms: the norms of both balls and the radius of both.
        why_radii: where the radii of l2 and l1 come from.
        steepest_rate: length of a step of A5/O in l2 and l1, in units of the radius.
        sweep: radii `eps_A^C` of initial classifiers.
        num_verified: undecided images that are verified completely.
        max_domains: subdomains that this may take for an image.
        timeout_s: seconds that it may take.
        distance_train: training images of the linf-distance net; None for all.
        unadversarial_steps: updates of Salman's unadversarial images.
        preemptive_steps: updates of Moon's preemptive robustification.
    """

    base: a5_presets.Config
    other: models.ConvNet
    norms: tuple[tuple[Norm, float], ...]
    why_radii: str
    sweep: tuple[float, ...]
    steepest_rate: float = 0.2
    makers: tuple[str, ...] = (CERTIFIED, SEED, ARCHITECTURE, ADVERSARIAL)
    judges: tuple[str, ...] = (CERTIFIED, SEED, ARCHITECTURE, ADVERSARIAL, VANILLA)
    num_transferred: int = 100
    adversarial_steps: int = 7
    num_verified: int = 10
    max_domains: int = 2000
    timeout_s: float = 120.0
    distance_train: int | None = None
    unadversarial_steps: int = 100
    preemptive_steps: int = 100

    @property
    def dataset(self) -> str:
        """Names the data set."""
        return self.base.dataset

    @property
    def preset(self) -> str:
        """Names the preset."""
        return self.base.preset

    @property
    def eps(self) -> float:
        """The attacker's radius in linf."""
        return self.base.eps_attack[0]

    @property
    def ball(self) -> Ball:
        """The attacker's ball in linf."""
        return Ball("linf", self.eps)

    def cell(self, recipe: str, *, eps_classifier: float | None = None, eps: float | None = None) -> Cell:
        """Builds a cell of A5's tables.

        Args:
            recipe: "base", "offline", "online" or "joint".
            eps_classifier: radius that the classifier was trained for; the preset's by default.
            eps: radius of attacker and defender, where they are not the preset's.
        """
        classifier = self.base.eps_classifier[0] if eps_classifier is None else eps_classifier
        attack, defense = (self.eps, self.base.eps_defense[0]) if eps is None else (eps, eps)
        if recipe == "base":
            return Cell("base", attack, classifier, 0.0, 0.0)
        return Cell(recipe, attack, classifier, attack, defense)


def config(dataset: str, preset: str) -> Config:
    """Looks up the settings of a data set and preset.

    Raises:
        ValueError: naming what there is.
    """
    build = command_line.of_dataset({"digits": _digits, "mnist": _mnist}, dataset)
    settings = build(a5_presets.config(dataset, preset))
    return _smoke(settings) if preset == "smoke" else settings


def _smoke(settings: Config) -> Config:
    """Cuts everything down; the nets and schedules learn enough in seconds that something is certified."""
    convs = (models.Conv(8, 3, 2),)
    base = dataclasses.replace(
        settings.base, eps_attack=(0.05,), eps_classifier=(0.05,), eps_defense=(0.1,), eps_robustify=(),
        classifier=models.ConvNet(convs, (16,)), robustifier=models.Robustifier((models.Conv(4, 3), models.Conv(1, 3))),
        base=a5_presets.Schedule(6, 2, 2, 3e-3, (), 30), offline=a5_presets.Schedule(10, 0, 0, 0.05, (), 12),
        online=a5_presets.Schedule(2, 0, 1, 2e-3, (), 30), joint=a5_presets.Schedule(2, 0, 1, 1e-3, (), 30),
        num_train=690, num_test=12, num_compared=8, cross_check=2, attack_queries=20,
    )
    return dataclasses.replace(
        settings, base=base, other=models.ConvNet(convs, (8,)), norms=tuple((norm, 0.1) for norm, _ in settings.norms),
        sweep=(0.0, 0.05), makers=(ADVERSARIAL,), judges=(SEED, ARCHITECTURE, VANILLA), num_transferred=4,
        adversarial_steps=2, num_verified=1, max_domains=8, distance_train=512, unadversarial_steps=5,
        preemptive_steps=5,
    )


def _digits(base: a5_presets.Config) -> Config:
    # Fewer steps and queries than AutoAttack's: most of the time goes to classifiers that nothing certifies, whose
    # images all have to be attacked.
    return Config(
        base=dataclasses.replace(
            base, eps_defense=(0.1,), cross_check=10, attack_steps=50, attack_queries=1000, num_compared=360
        ),
        other=models.ConvNet((models.Conv(32, 4, 2),), (100, 64)), num_transferred=60,
        norms=(("linf", 0.1), ("l2", 0.3), ("l1", 0.5)), sweep=(0.0, 0.025, 0.05, 0.075, 0.1),
        why_radii="APGD breaks about as many undefended validation images (linf 14 %, l2 11 %, l1 12 %)",
    )


def _mnist(base: a5_presets.Config) -> Config:
    norms: tuple[tuple[Norm, float], ...] = (("linf", 0.1), ("l2", 1.0), ("l1", 2.0))
    sweep = (0.0, 0.025, 0.05, 0.075, 0.1)
    why_radii = "they are those of digits times the ratio of the images' sides, rounded; nothing was measured here"
    if base.preset == "paper":
        base = dataclasses.replace(
            base, eps_attack=(0.1,), eps_classifier=(0.1,), eps_defense=(0.1,), num_attacked=1000, num_test=1000,
            cross_check=100,
        )
        return Config(
            base=base, other=models.bench_cnn(), norms=norms, why_radii=why_radii, sweep=sweep, num_transferred=1000,
            adversarial_steps=40, num_verified=100, max_domains=100_000, timeout_s=600.0,
        )
    # A third of the training images, for time: classifiers in l2 and l1 still take 20 minutes and more each.
    return Config(
        base=dataclasses.replace(
            base, eps_attack=(0.1,), eps_classifier=(0.1,), eps_defense=(0.1,), cross_check=10, attack_steps=50,
            attack_queries=1000, num_train=20_000, num_test=500, num_offline=None,
        ),
        other=models.ConvNet((models.Conv(16, 8, 4),), (100, 64)), num_transferred=200,
        norms=norms, why_radii=why_radii, sweep=sweep, distance_train=20_000,
    )
