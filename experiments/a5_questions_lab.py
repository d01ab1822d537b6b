"""What the questions on A5 are asked of: classifiers, trained in several ways, and images that were defended for them.

Everything is trained once: a variant is a `Run` of A5's tables with a directory, and so checkpoints, of its own.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import a5_questions_presets as presets
from experiments import a5_training, certified_training, certified_training_methods, tramer_runs
from experiments import certified_training_presets as distance_presets
from experiments.a5_questions_presets import Config
from experiments.a5_report import Cell
from experiments.a5_training import Run
from rdx import bounds, models
from rdx.balls import Ball
from rdx.bounds import Interval
from rdx.evaluate import Evaluation
from rdx.train import adversarial
from rdx.types import Array, LogitsFn, Norm


@dataclasses.dataclass(frozen=True)
class Lab:
    """A run, and the settings of its questions."""

    config: Config
    run: Run


@dataclasses.dataclass(frozen=True)
class Row:
    """One evaluation: a row of a question's table, or one of several cells in a row.

    Attributes:
        question: whose.
        labels: what is shown in front of the row.
        column: which cell of the row; the same for all rows where they have one.
        make: trains what is needed; returns the classifier that judges, and the defended images, shape `[N, ...]`.
        ball: the attacker's.
        methods: how to certify, the cheapest first.
        num_images: how many of the images are evaluated; None for all.
        measure: what else is measured: `(logits_fn, x_defended, labels, result) -> (for the record, arrays)`.
        against: labels and column of what this is compared with, image by image.
    """

    question: str
    labels: tuple[str, ...]
    column: str
    make: Callable[[], tuple[LogitsFn, Array]]
    ball: Ball
    methods: tuple[Callable[..., Interval], ...] = (bounds.crown_ibp,)
    num_images: int | None = None
    measure: Callable[[LogitsFn, Array, np.ndarray, Evaluation], tuple[dict[str, Any], dict[str, Any]]] | None = None
    against: tuple[tuple[str, ...], str] | None = None

    @property
    def name(self) -> str:
        """The record's name."""
        words = " ".join((self.question, *self.labels, self.column)).lower()
        return re.sub(r"[^a-z0-9._]+", "-", words).strip("-")


def certified_by_margin(fn: Callable[..., Array], region: Any, *args: Any) -> Interval:
    """Bounds margins of a network whose logits are 1-Lipschitz in linf: they change by `2 eps` at most."""
    return bounds.lipschitz(fn, region, *args, constant=2.0)


@functools.cache
def defended(run: Run, cell: Cell) -> tuple[LogitsFn, Array]:
    """Trains what a cell of A5's tables needs, once; returns the classifier and the defended images."""
    return a5_training.defended(run, cell)


def made_for(lab: Lab, maker: str, recipe: str) -> tuple[LogitsFn, Array]:
    """Defends the images for a classifier; with the recipe "base" it only trains the classifier."""
    eps = 0.0 if maker == presets.VANILLA else None
    return defended(_variant(lab, maker), lab.config.cell(recipe, eps_classifier=eps))


def in_norm(lab: Lab, norm: Norm) -> Run:
    """Describes a run in which attacker, defender and the classifier's training have balls of another norm."""
    if norm == "linf":
        return lab.run
    offline = dataclasses.replace(lab.run.config.offline, learning_rate=lab.config.steepest_rate)
    settings = dataclasses.replace(lab.run.config, offline=offline)
    return dataclasses.replace(lab.run, norm=norm, config=settings, directory=lab.run.directory / norm)


def bounded_by(lab: Lab, method: Callable[..., Interval]) -> Run:
    """Describes a run in which A5 prepares with other bounds throughout, and the first classifier stays."""
    if method is bounds.ibp:
        # Without the share that CROWN-IBP has while the radius rises.
        plain = dataclasses.replace(lab.run.config, has_crown=False)
        return dataclasses.replace(_frozen(lab), config=plain, directory=lab.run.directory / "ibp")
    return dataclasses.replace(_frozen(lab), method=method, directory=lab.run.directory / method.__name__)


@functools.cache
def distance(lab: Lab) -> Run:
    """Trains a linf-distance net as `experiments.certified_training` does, and describes a run in which it is `C`."""
    run, dataset = lab.run, lab.config.dataset
    has_paper = dataset != "digits" or lab.config.preset == "smoke"
    settings = distance_presets.config(dataset, lab.config.preset if has_paper else "cpu")
    method = next(method for method in settings.methods if method.kind == "linf_distance")
    if lab.config.distance_train is not None:
        method = dataclasses.replace(method, num_train=lab.config.distance_train)
    training = certified_training.Run(
        settings, tramer_runs.Data(run.train, run.train.take(0), run.test), run.directory, jax.random.key(settings.seed)
    )
    logits_fn, _ = certified_training.train(training, method, method.weight, "linf-distance")
    return dataclasses.replace(
        run, legacy=logits_fn, method=certified_by_margin, config=dataclasses.replace(run.config, has_crown=False),
        directory=run.directory / "distance",
    )


def _frozen(lab: Lab) -> Run:
    """Describes a run whose classifier is that of the lab, trained already."""
    return dataclasses.replace(lab.run, legacy=made_for(lab, presets.CERTIFIED, "base")[0])


@functools.cache
def _variant(lab: Lab, classifier: str) -> Run:
    run, settings = lab.run, lab.run.config
    if classifier == presets.SEED:
        other = dataclasses.replace(settings, seed=settings.seed + 1)
        return dataclasses.replace(run, config=other, directory=run.directory / "seed")
    if classifier == presets.ARCHITECTURE:
        other = dataclasses.replace(settings, classifier=lab.config.other)
        return dataclasses.replace(
            run, config=other, classifier=models.forward(lab.config.other), directory=run.directory / "architecture"
        )
    if classifier == presets.ADVERSARIAL:
        return dataclasses.replace(run, legacy=_adversarial(lab), directory=run.directory / "adversarial")
    return run


def _adversarial(lab: Lab) -> LogitsFn:
    """Trains the classifier on PGD's examples, with the schedule of the certified one."""
    run, eps = lab.run, lab.run.config.eps_classifier[0]
    usual = a5_training.classifier_job(run, eps)
    loss = adversarial.cross_entropy(
        run.classifier, Ball("linf", 0.0), eps=a5_training.ramp(run.config.base, eps, len(run.train)),
        attack=certified_training_methods.pgd(lab.config.adversarial_steps),
    )
    params = a5_training.train(run, dataclasses.replace(usual, name="classifier-adversarial", loss=loss))
    return run.classifier.logits_fn(params, {})
