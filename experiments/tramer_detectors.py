"""Detectors, attacks that know them, the audit of their claims, and both reductions on trained nets (Tramer 2022).

    python -m experiments.tramer_detectors --dataset digits --preset smoke     (seconds)
    python -m experiments.tramer_detectors --dataset digits --preset cpu
    python -m experiments.tramer_detectors --dataset mnist --preset cpu        (RDX_DATA_DIR names the data's directory)

Eleven detectors of an undefended classifier are calibrated at 5 % false positives on held-out images and attacked in an
linf ball: by PGD and FMN, which know the classifier only, as the detectors' own papers did, and by the worst case over
the attacks of `rdx.detect.suite`, which know the detector. Both figures are audited (Sec. 3, Eq. 4). Then the
reductions of Theorems 4 and 5 are applied to an adversarially trained net: risk of what is constructed against the
theorem's bound, misses of the search, and an attack that is adaptive to the search.

Everything goes to `runs/tramer_detectors/<dataset>-<preset>/`: one JSON and NPZ per detector and reduction, `table.md`
and pictures. A run that is interrupted continues with the same command and ends with the same table.

Obtained (experiments/results/tramer_detectors), digits `cpu` at linf 0.2, 16 minutes on two shared cores: of what fixed
PGD makes Mahalanobis, outlier class, PCA and GAT detect 95 to 100 %, of adaptive attacks 5, 7, 22 and 63 %; all others
at most 6 %. Theorem 5: the detector's risk is the bound, 8 %, also through its search. Expected: adaptive attacks take
50 points and more off detection. MNIST `cpu` at linf 0.3, 29 minutes on two busy cores (12 of their time): against
adaptive attacks GAT detects 4 %, all others nothing, but for feature squeezing with 90 %: within 0.3 rounding to 1 bit
changes grey pixels only, so the squeezed image is hard to attack at all. Theorem 5: 4 %, the bound.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from experiments import command_line, detectors_report, runs, tramer_runs
from experiments.detectors_presets import config
from experiments.detectors_zoo import Calibrated, Zoo
from rdx import attacks, compilation, data, losses, metrics
from rdx.attacks import base
from rdx.balls import Ball
from rdx.detect import claims, goals, reductions, risks, suite, thresholds
from rdx.detect.metric_spaces import Box
from rdx.evaluate import records
from rdx.goals import Goal, misclassify
from rdx.types import Array, Detector

REDUCTIONS = ("theorem 5", "theorem 4")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
        dataset: digits or mnist.
        preset: smoke or cpu.
        out: output directory; runs/tramer_detectors/<dataset>-<preset> if empty.
        root: directory of the published data files; RDX_DATA_DIR if empty.
        archive: a prepared .npz instead, from `python -m rdx.data.archive`.
        only: run only what has this text in its name.
    """

    dataset: str = "digits"
    preset: str = "cpu"
    out: str = ""
    root: str = ""
    archive: str = ""
    only: str = ""


class Images:
    """The test images that are evaluated."""

    def __init__(self, source: data.Source, num: int) -> None:
        """Takes the first `num` of a source."""
        self.source = source.take(num)
        self.x, self.labels = data.to_float(self.source.images), jnp.asarray(self.source.labels)
        self.index = jnp.asarray(self.source.index)


def main(arguments: Arguments) -> Path:
    """Runs every detector and reduction that is not done yet, then writes table and pictures; returns the directory."""
    settings = config(arguments.dataset, arguments.preset)
    parts = tramer_runs.load(
        settings.dataset, num_train=settings.num_train, num_held_out=settings.num_held_out, num_test=None,
        root=arguments.root, archive=arguments.archive,
    )
    directory = Path(arguments.out or f"runs/tramer_detectors/{settings.dataset}-{settings.preset}")
    runs.claim(directory, settings, parts.test)
    zoo = Zoo(settings, parts, directory)
    stages = {name: functools.partial(_attack, zoo, name) for name in zoo.names}
    stages |= {"theorem 5": functools.partial(_theorem5, zoo), "theorem 4": functools.partial(_theorem4, zoo)}
    for name, stage in stages.items():
        if arguments.only in name and records.read_arrays(directory / "records", file_name(name)) is None:
            _write(zoo, name, stage)
    return detectors_report.write(directory, settings, {name: file_name(name) for name in zoo.names},
                                  {name: file_name(name) for name in REDUCTIONS})


def file_name(name: str) -> str:
    """Names the record of a detector or reduction."""
    return name.replace(" ", "-").lower()


def _write(zoo: Zoo, name: str, stage: Any) -> None:
    compilation.spare_maps()
    start = time.monotonic()
    record, arrays = stage()
    records.write_arrays(zoo.directory / "records", file_name(name), {
        "experiment": "tramer_detectors", "what": name, "config": zoo.config, "data": zoo.parts.record(), **record,
        "seconds": time.monotonic() - start,
    }, arrays)
    print(f"  {name}: {record['line']}  ({time.monotonic() - start:.0f} s)", flush=True)


def _attack(zoo: Zoo, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Runs fixed and adaptive attacks on one detector."""
    settings, images, found = zoo.config, Images(zoo.parts.test, zoo.config.num_images), zoo.calibrated(name)
    fixed = suite.fixed(num_steps=settings.num_steps)
    adaptive = suite.adaptive(
        matched=found.matched, num_steps=settings.num_steps, num_restarts=settings.num_restarts,
        num_guides=settings.num_guides, num_queries=settings.num_queries,
    )
    ball, key = Ball("linf", settings.eps), zoo.key_of("attack")
    outputs = {"clean": _output(found.detector, images.x)}
    for attack, run in fixed.items():
        result = run(
            key, found.detector, images.x, images.labels, ball=ball, index=images.index, loop=attacks.Loop()
        )
        outputs[attack] = _output(found.detector, result.x_adv)
    worst = suite.worst_case(
        key, found.detector, images.x, images.labels, ball=ball, attacks_on=adaptive, index=images.index
    )
    outputs["adaptive"] = _output(found.detector, worst.result.x_adv)
    arrays = {"index": np.asarray(images.index), "label": np.asarray(images.labels),
              "broken_by": np.asarray(worst.broken_by), "distance": np.asarray(worst.result.distance)}
    for what, (prediction, score) in outputs.items():
        arrays |= {f"{what} prediction": prediction, f"{what} score": score}
    summary = summarize(arrays, tuple(fixed))
    broken = {attack: int((arrays["broken_by"] == place).sum()) for place, attack in enumerate(adaptive)}
    audits = _audit(zoo, name, summary, images)
    line = (
        f"detection {summary['pgd']['detection']:.3f} of PGD, {summary['adaptive']['detection']:.3f} of adaptive "
        f"attacks; claim {audits['fixed'].verdict} becomes {audits['adaptive'].verdict}"
    )
    record = {"threshold": found.threshold, "summary": summary, "broken_by": broken, "audits": audits, "line": line}
    return record, arrays


def _output(detector: Detector, x: Array) -> tuple[np.ndarray, np.ndarray]:
    logits, score = thresholds.collect(detector, x)
    return logits.argmax(axis=1), score


def summarize(arrays: dict[str, np.ndarray], fixed: tuple[str, ...]) -> dict[str, Any]:
    """Counts what became of the images.

    Args:
        arrays: of a record: predictions and scores by name, labels.
        fixed: names of the fixed attacks.

    Returns:
        Clean error, false-positive rate on correct test images, and for every attack: how often it fools the
        classifier, the share of these that is detected (of the adaptive ones: of all images that are correct and
        accepted when clean), AUROC, `evaded`, wrong and accepted among all images, and the robust risk with detection.
    """
    label, clean, score = arrays["label"], arrays["clean prediction"], arrays["clean score"]
    is_right, is_rejected = clean == label, score > 0
    summary: dict[str, Any] = {
        "clean_error": float((~is_right).mean()), "fpr": float(is_rejected[is_right].mean()),
        "num_images": len(label),
    }
    for what in (*fixed, "adaptive"):
        prediction, attacked = arrays[f"{what} prediction"], arrays[f"{what} score"]
        is_fooled, is_caught = prediction != label, attacked > 0
        evaded = is_fooled & ~is_caught
        among = is_right & ~is_rejected if what == "adaptive" else is_fooled & is_right
        risk = metrics.robust_risk_with_detection(clean, is_rejected, prediction, is_caught, label)
        summary[what] = {
            "fooled": float(is_fooled.mean()), "detection": float(1 - evaded[among].mean()) if among.any() else 1.0,
            "auroc": thresholds.auroc(score[is_right], attacked[is_fooled & is_right]),
            "evaded": float(evaded.mean()), "risk": dataclasses.asdict(risk),
        }
    return summary


def _audit(zoo: Zoo, name: str, summary: dict[str, Any], images: Images) -> dict[str, claims.Audit]:
    """Audits what the fixed attacks claim, by Equation 4 and their worst rate, and what adaptive ones leave."""
    common = {"dataset": zoo.config.dataset, "norm": "linf", "eps": zoo.config.eps, "name": name,
              "num_images": summary["num_images"]}
    missed = max(1.0 - summary[attack]["detection"] for attack in ("pgd", "fmn"))
    fixed = claims.Claim(
        **common, fpr=summary["fpr"], fnr=missed, clean_error=summary["clean_error"], evidence="fixed"
    )
    adaptive = claims.Claim(**common, accuracy=1.0 - summary["adaptive"]["risk"]["value"], evidence="adaptive")
    bound = claims.transport_limit(fixed, np.asarray(images.x), np.asarray(images.labels))
    return {"fixed": claims.audit(fixed, bound=bound), "adaptive": claims.audit(adaptive, bound=bound)}


def _theorem5(zoo: Zoo) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Builds the detector of Theorem 5 from the robust classifier, and attacks it, also through its search."""
    settings, images = zoo.config, Images(zoo.parts.test, zoo.config.num_reduced)
    metric, eps, key = Box("linf"), settings.eps, zoo.key_of("theorem 5")
    search = _search(zoo)
    detector = reductions.detector_from_classifier(key, zoo.robust, metric=metric, eps=eps, search=search)
    robust = risks.robust_errors(
        zoo.key_of("robust"), zoo.robust, images.x, images.labels, ball=metric.ball(eps / 2), index=images.index,
        search=functools.partial(attacks.pgd, num_steps=settings.num_steps, num_restarts=settings.search_restarts),
    )
    clean = base.call(_errors, detector, images.x, images.labels)
    run = functools.partial(
        attacks.pgd, zoo.key_of("attack"), x=images.x, labels=images.labels, ball=Ball("linf", eps), index=images.index,
        num_steps=settings.num_steps,
    )
    points = {
        "transferred": run(zoo.robust, goal=misclassify(losses.margin)).x_adv,
        "adaptive": run(detector, goal=goals.evade(0.0)).x_adv,
    }
    evaded = {what: base.call(_evades, detector, x, images.labels) for what, x in points.items()}
    bare = losses.is_wrong(zoo.robust(points["transferred"]), images.labels)
    # Where x_adv evades, the midpoint settles whose fault it is: it is a failure of the classifier at eps / 2, or a
    # witness that the search at x_adv has missed.
    middle = 0.5 * (images.x + points["adaptive"])
    is_failure = losses.is_wrong(zoo.robust(middle), images.labels)
    lost = clean | evaded["transferred"] | evaded["adaptive"]
    arrays = {
        "index": images.index, "label": images.labels, "clean": clean, "robust": robust, "bare": bare, "lost": lost,
        "missed": evaded["adaptive"] & ~is_failure, "failed": evaded["adaptive"] & is_failure, **evaded,
    }
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    shares = _shares(arrays)
    line = (
        f"clean risk of the detector {shares['clean']:.3f}, of the classifier at eps / 2 {shares['robust']:.3f}, with "
        f"attacks {shares['lost']:.3f}, {shares['missed']:.3f} by misses"
    )
    return {"shares": shares, "line": line, "eps": eps}, arrays


def _theorem4(zoo: Zoo) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Builds the classifier of Theorem 4 from a detector, attacks it at half the radius, and explains its failures."""
    settings, images, found = zoo.config, Images(zoo.parts.test, zoo.config.num_reduced), zoo.robust_max_softmax()
    metric, eps = Box("linf"), settings.eps
    built = {"metric": metric, "eps": eps, "search": _search(zoo)}
    key = zoo.key_of("theorem 4")
    classifier = reductions.classifier_from_detector(key, found.detector, **built)
    decode = jax.jit(lambda x: reductions.decode(key, found.detector, x, **built))
    run = functools.partial(
        attacks.pgd, zoo.key_of("attack"), x=images.x, labels=images.labels, index=images.index,
        ball=Ball("linf", eps / 2), num_steps=settings.num_steps,
    )
    points = {
        "clean": images.x,
        "attacked": run(classifier, goal=misclassify(losses.margin)).x_adv,
        # Against the search: as deep in the rejected region as can be, so that nothing accepted is found.
        "search": run(found.detector, goal=Goal(Partial(_rejection), Partial(_never))).x_adv,
    }
    arrays: dict[str, Any] = {"index": images.index, "label": images.labels}
    is_wrong = jnp.zeros(len(images.labels), bool)
    for what, x in points.items():
        decoding = decode(x)
        told = reductions.explain_failure(
            found.detector, images.x, images.labels, x, decoding, metric=metric, eps=eps
        )
        arrays |= {f"{what} kind": told.kind, f"{what} valid": told.is_valid, f"{what} rejected": decoding.is_rejected,
                   f"{what} wrong": losses.is_wrong(decoding.logits, images.labels)}
        is_wrong |= arrays[f"{what} wrong"]
    arrays |= {"wrong": is_wrong, "detector clean": _errors(found.detector, images.x, images.labels),
               "detector lost": _detector_lost(zoo, found, images)}
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    kinds = np.stack([arrays[f"{what} kind"] for what in points])
    valid = np.stack([arrays[f"{what} valid"] for what in points])
    is_explained = (kinds != reductions.NO_FAILURE) & (kinds != reductions.MISSED)
    arrays["missed"] = (kinds == reductions.MISSED).any(axis=0)
    # What explanations add to the attack on the detector: failures that it had not found.
    arrays["detector lost or explained"] = arrays["detector lost"] | (is_explained & valid).any(axis=0)
    shares = _shares(arrays)
    record = {
        "shares": shares, "eps": eps, "num_explained": int(is_explained.sum()),
        "num_valid": int((is_explained & valid).sum()),
        "kinds": {what: np.bincount(row, minlength=5).tolist() for what, row in zip(points, kinds, strict=True)},
        "line": f"risk {shares['clean wrong']:.3f} clean, {shares['wrong']:.3f} attacked; the detector's "
                f"{shares['detector clean']:.3f}, {shares['detector lost']:.3f}; {shares['missed']:.3f} misses",
    }
    return record, arrays


def _detector_lost(zoo: Zoo, found: Calibrated, images: Images) -> Array:
    """Estimates the robust risk with detection at eps, by the adaptive suite."""
    settings = zoo.config
    adaptive = suite.adaptive(
        matched=found.matched, num_steps=settings.num_steps, num_restarts=settings.num_restarts,
        num_guides=settings.num_guides, num_queries=settings.num_queries,
    )
    worst = suite.worst_case(
        zoo.key_of("attack"), found.detector, images.x, images.labels, ball=Ball("linf", settings.eps),
        attacks_on=adaptive, index=images.index,
    )
    return worst.result.success | _errors(found.detector, images.x, images.labels)


def _search(zoo: Zoo) -> Any:
    return functools.partial(
        attacks.pgd, num_steps=zoo.config.search_steps, num_restarts=zoo.config.search_restarts
    )


def _shares(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(flags.mean()) for name, flags in arrays.items() if flags.dtype == bool}


def _errors(fn: Any, x: Array, labels: Array) -> Array:
    return risks.errors(fn, x, labels)


def _evades(detector: Any, x: Array, labels: Array) -> Array:
    return goals.evade(0.0).success(detector(x), labels)


def _rejection(output: tuple[Array, Array], labels: Array) -> Array:
    del labels
    return output[1]


def _never(output: tuple[Array, Array], labels: Array) -> Array:
    return jnp.zeros_like(labels, dtype=bool) & (output[1] > 0)


if __name__ == "__main__":
    main(command_line.parse(Arguments))
