"""Certified detectors two ways, in the layout of Table 2 of Tramer (2022): abstain classes beside Theorem 5.

    python -m experiments.tramer_certified --dataset digits --preset smoke     (seconds)
    python -m experiments.tramer_certified --dataset digits --preset cpu
    python -m experiments.tramer_certified --dataset mnist --preset cpu        (RDX_DATA_DIR names the data's directory)
    python -m experiments.tramer_certified --dataset cifar10 --preset paper    (an accelerator)

For each radius `eps` of classifiers three networks are trained: a classifier certified at `eps` (CROWN-IBP), of which
Theorem 5 makes a detector certified at `2 eps` without any more training; joint classifiers and detectors with one and
with two abstain classes, certified at `2 eps` (Sheikholeslami et al. 2021; Baharlouei et al. 2023); for comparison a
classifier certified at `2 eps`. Each is attacked where it is certified, and nothing certified may be broken. Of the
settings of joint training, the weight of the loss without detection is chosen on held-out images.

Everything goes to `runs/tramer_certified/<dataset>-<preset>/`: one JSON and NPZ per network, `table.md` and a picture.
A run that is interrupted continues with the same command and ends with the same table. The `paper` preset has the
network and the radii of Table 2 with a shorter schedule, and has not been run yet.

Obtained (experiments/results/tramer_certified), certified robust accuracy on digits `cpu`: Theorem 5 92.5 % at eps 0.1
and 79.4 % at 0.2, one abstain class 80.6 and 56.1, two 79.7 and 50.6, classifiers at these radii 79.4 and 48.9; 7
minutes on two cores. On MNIST `cpu` (20,000 training images) at 0.2: Theorem 5 90.1 %, one abstain class 82.0, two
81.5, a classifier 80.9; 28 minutes on two busy cores. Expected from Table 2: Theorem 5 ahead of joint training by 1 to
2 points.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import certified_report, command_line, runs, tramer_runs
from experiments.certified_presets import Config, config
from experiments.certified_report import Cell
from rdx import attacks, compilation, data, losses, metrics, models
from rdx.attacks import base
from rdx.balls import Ball
from rdx.detect import abstain, goals, reductions, searches, selective, thresholds
from rdx.detect.metric_spaces import Box
from rdx.evaluate import ContradictionError, evaluate, records, shared
from rdx.train import certified, detectors, schedules
from rdx.types import Array, Key, PyTree


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
        dataset: digits, mnist or cifar10.
        preset: smoke, cpu or paper.
        out: output directory; runs/tramer_certified/<dataset>-<preset> if empty.
        root: directory of the published data files; RDX_DATA_DIR if empty.
        archive: a prepared .npz instead, from `python -m rdx.data.archive`.
        only: fill only cells whose name contains this text.
    """

    dataset: str = "digits"
    preset: str = "cpu"
    out: str = ""
    root: str = ""
    archive: str = ""
    only: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """What every stage of a run needs."""

    config: Config
    parts: tramer_runs.Data
    directory: Path
    key: Key

    @property
    def test(self) -> data.Source:
        """The test images."""
        return self.parts.test


def main(arguments: Arguments) -> Path:
    """Trains and certifies every network that is not done yet, then writes the table; returns the output directory."""
    settings = config(arguments.dataset, arguments.preset)
    parts = tramer_runs.load(
        settings.dataset, num_train=settings.num_train, num_held_out=settings.num_held_out,
        num_test=settings.num_test, root=arguments.root, archive=arguments.archive,
    )
    directory = Path(arguments.out or f"runs/tramer_certified/{settings.dataset}-{settings.preset}")
    runs.claim(directory, settings, parts.test)
    run = Run(settings, parts, directory, jax.random.key(settings.seed))
    for cell in certified_report.cells(settings):
        if arguments.only in cell.name and records.read_arrays(directory / "records", cell.name) is None:
            _fill(run, cell)
    return certified_report.write(directory, settings)


def _fill(run: Run, cell: Cell) -> None:
    start = time.monotonic()
    record, arrays = _classifier(run, cell) if cell.num_abstain == 0 else _joint(run, cell)
    records.write_arrays(run.directory / "records", cell.name, {
        "experiment": "tramer_certified", "cell": cell, "config": run.config, "data": run.parts.record(), **record,
        "seconds": time.monotonic() - start,
    }, arrays)
    shown = {name: f"{100 * rate['value']:.2f}" for name, rate in record["summary"].items()}
    print(f"  {cell.name}: errors {shown}  ({time.monotonic() - start:.0f} s)", flush=True)


def _classifier(run: Run, cell: Cell) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Trains and certifies a classifier at its radius, and attacks Theorem 5's detector at twice that."""
    compilation.spare_maps()
    settings = run.config
    forward = models.forward(settings.net)
    loss = certified.phases(forward, Ball("linf", 0.0), eps=_ramp(run, cell.eps))
    params = _train(run, forward, loss, f"classifier-{cell.eps:g}")
    logits_fn = models.logits_fn(settings.net, {"params": params})
    x, labels = data.to_float(run.test.images), jnp.asarray(run.test.labels)
    result = evaluate(
        run.key, logits_fn, x, run.test.labels, index=run.test.index, ball=Ball("linf", cell.eps),
        attacks={"pgd": functools.partial(attacks.pgd, num_steps=settings.num_steps, num_restarts=2)},
        num_attacked=settings.num_attacked, cross_check=settings.cross_check,
    )
    detector = reductions.detector_from_classifier(
        run.key, logits_fn, metric=Box("linf"), eps=2 * cell.eps, search=searches.constant_prediction,
        requires_proof=True,
    )
    found = _attack_bare(run, logits_fn, 2 * cell.eps)
    _, score = thresholds.collect(detector, found)
    _, clean_score = thresholds.collect(detector, x[: settings.num_attacked])
    is_wrong = np.asarray(base.call(_is_wrong, logits_fn, found, labels[: settings.num_attacked]))
    evaded = is_wrong & ~(score > 0)
    _refuse(evaded & result.certified[: settings.num_attacked], cell)
    summary = records.summarize(result, ("pgd",))
    rates = {"clean": summary["clean"], "attacked": summary["attacked"], "certified": summary["certified_all"],
             "detector_clean": _rate((result.prediction != result.label)[: len(score)] | (clean_score > 0)),
             "bare": _rate(is_wrong), "evaded": _rate(evaded)}
    arrays = {name: value for name, value in dataclasses.asdict(result).items() if isinstance(value, np.ndarray)}
    return {"summary": rates}, {**arrays, "evaded": evaded}


def _attack_bare(run: Run, logits_fn: Any, eps: float) -> Array:
    """Attacks the classifier alone at the detector's radius: the transfer to Theorem 5's detector."""
    num = run.config.num_attacked
    return attacks.pgd(
        shared.key_of(run.key, "transfer"), logits_fn, data.to_float(run.test.images[:num]), run.test.labels[:num],
        ball=Ball("linf", eps), index=run.test.index[:num], num_steps=run.config.num_steps,
    ).x_adv


def _joint(run: Run, cell: Cell) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Trains joint classifiers and detectors, chooses one on held-out images, certifies and attacks it."""
    settings = run.config
    forward = models.forward(settings.net.clone(num_classes=settings.net.num_classes + cell.num_abstain))
    ball = Ball("linf", cell.eps)
    networks = {
        weight: detectors.network(
            forward, _train_joint(run, cell, forward, weight), num_classes=settings.net.num_classes
        ) for weight in settings.weights
    }
    held_out = {
        weight: 1.0 - float(_certify(run, network, run.parts.held_out, ball, is_proof=False).mean())
        for weight, network in networks.items()
    }
    best = min(held_out, key=lambda weight: held_out[weight])
    network = networks[best]
    certified_ = _certify(run, network, run.test, ball, is_proof=True)
    detector = abstain.detector(network)
    logits, score = thresholds.collect(detector, data.to_float(run.test.images))
    prediction = logits.argmax(axis=1)
    evaded, broken_by = _attack_joint(run, detector, ball)
    num = len(evaded)
    _refuse(evaded & certified_[:num], cell)
    lost = (prediction != run.test.labels) | (score > 0)
    used = np.bincount(np.asarray(base.call(_abstained, network, data.to_float(run.test.images))),
                       minlength=cell.num_abstain)
    rates = {"clean": _rate(lost[:num]), "attacked": _rate(lost[:num] | evaded), "certified": _rate(~certified_),
             "rejected": _rate((score > 0)[:num])}
    arrays = {"index": run.test.index, "label": run.test.labels, "prediction": prediction, "score": score,
              "certified": certified_, "evaded": evaded, "broken_by": broken_by}
    chosen = {"weight": best, "held_out": held_out, "greatest_abstain_class": used.tolist()}
    return {"summary": rates, "chosen": chosen}, arrays


def _train_joint(run: Run, cell: Cell, forward: models.Forward, weight: float) -> PyTree:
    settings = run.config
    loss = detectors.joint_abstain(
        forward, Ball("linf", 0.0), eps=_ramp(run, settings.overshoot * cell.eps),
        num_classes=settings.net.num_classes, kappa_end=settings.kappa_end,
        settings=abstain.Objective(classification=weight, natural=settings.natural),
        gamma=settings.gamma if cell.num_abstain > 1 else 0.0,
    )
    return _train(run, forward, loss, f"{cell.name}-weight-{weight:g}")


def _certify(run: Run, network: abstain.Network, source: data.Source, ball: Ball, *, is_proof: bool) -> np.ndarray:
    """Certifies all images, the test set with the allowance for rounding that is proved."""
    x, labels = data.to_float(source.images), jnp.asarray(source.labels)
    parts = []
    for rows in np.array_split(np.arange(len(x)), -(-len(x) // run.config.batch_certified)):
        certify = abstain.certify_in_float64 if is_proof else _compiled_certify
        parts.append(np.asarray(certify(network, x[rows], labels[rows], ball=ball).certified))
    return np.concatenate(parts)


_compiled_certify = jax.jit(abstain.certify)


def _attack_joint(run: Run, detector: Any, ball: Ball) -> tuple[np.ndarray, np.ndarray]:
    """Attacks classifier and detector together; returns where they are evaded, and by which attack."""
    num, steps = run.config.num_attacked, run.config.num_steps
    found = attacks.cascade(
        shared.key_of(run.key, "attack"), {
            "worst of both": functools.partial(attacks.pgd, goal=goals.evade(0.0), num_steps=steps, num_restarts=2),
            "selective": functools.partial(selective.selective_pgd, num_steps=steps),
            "orthogonal": functools.partial(selective.orthogonal_pgd, num_steps=steps),
        }, detector, data.to_float(run.test.images[:num]), run.test.labels[:num], ball=ball, goal=goals.evade(0.0),
        index=run.test.index[:num],
    )
    return np.asarray(found.result.success), np.asarray(found.broken_by)


def _train(run: Run, forward: models.Forward, loss: Any, name: str) -> PyTree:
    settings = run.config
    return tramer_runs.train(
        run.key, forward, loss, run.parts.train, directory=run.directory, name=name,
        num_steps=settings.epochs * _per_epoch(run), batch_size=settings.batch_size,
        learning_rate=settings.learning_rate, seed=settings.seed,
    )


def _ramp(run: Run, eps: float) -> schedules.Ramp:
    settings, per_epoch = run.config, _per_epoch(run)
    return schedules.linear_ramp(eps, settings.warmup * per_epoch, settings.ramp * per_epoch)


def _per_epoch(run: Run) -> int:
    return max(len(run.parts.train) // run.config.batch_size, 1)


def _refuse(contradicted: np.ndarray, cell: Cell) -> None:
    """Raises where something certified was broken: then no record is written."""
    if contradicted.any():
        raise ContradictionError(
            f"{cell.name}: {int(contradicted.sum())} examples are certified and evade the detector, the first in row "
            f"{np.flatnonzero(contradicted)[:5].tolist()}: bounds, attack or labels are wrong."
        )


def _rate(flags: np.ndarray) -> dict[str, Any]:
    return dataclasses.asdict(metrics.rate(flags))


def _is_wrong(logits_fn: Any, x: Array, labels: Array) -> Array:
    return losses.is_wrong(logits_fn(x), labels)


def _abstained(network: abstain.Network, x: Array) -> Array:
    return network(x)[:, network.num_classes:].argmax(axis=1)


if __name__ == "__main__":
    main(command_line.parse(Arguments))
