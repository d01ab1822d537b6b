"""Audits a robustness claim: what it implies, beside the best known, and whether data exclude it.

    python -m experiments.audit --dataset cifar10 --norm l2 --eps 4 --fpr 0.2 --fnr 0.19 --clean-error 0.05
    python -m experiments.audit --dataset cifar10 --eps 8/255 --accuracy 0.9 --picture claim.png
    python -m experiments.audit --dataset mnist --norm l2 --eps 8.9 --accuracy 0.74 --data mnist

A detector that is robust at eps is, up to computation, a classifier as robust at eps / 2, and a classifier robust at
eps a detector robust at 2 eps (Tramer 2022, arXiv:2107.11630). The audit is printed as JSON, its sentence to stderr as
well. Exit code 0: consistent with what is known; 10: implies a breakthrough; 11: vacuous; 12: no reference; 13: no
classifier can reach it on the data. With `--data` the bound is of that data set's test images, which `RDX_DATA_DIR` may
have to hold.
"""

import dataclasses
import json
import sys
from typing import cast

from experiments import command_line
from rdx import data, plotting
from rdx.detect import best_known, claims
from rdx.detect.claims import Audit, Claim, Evidence
from rdx.types import Norm


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
        dataset: mnist, cifar10, cifar100 or imagenet; of others nothing is known.
        norm: linf, l2 or l1.
        eps: radius in units of [0, 1], such as 8/255.
        accuracy: robust accuracy, with detection for a detector, in [0, 1]; or give the three rates.
        fpr: share of clean inputs that are rejected.
        fnr: share of adversarial inputs that are accepted.
        clean_error: share of clean inputs that are misclassified.
        evidence: fixed, adaptive or certified.
        kind: detector or classifier.
        name: whose claim it is.
        num_images: how many images it was measured on.
        as_of: year of the knowledge that it is compared with, 2021 or 2025.
        margin: how far it may exceed the best known and still be consistent.
        data: name of a data set to bound every classifier on.
        num_data: how many of its test images.
        picture: a PNG file that puts the claim on the curve of the best known.
    """

    dataset: str = "cifar10"
    norm: str = "linf"
    eps: str = "8/255"
    accuracy: str = ""
    fpr: str = ""
    fnr: str = ""
    clean_error: str = ""
    evidence: str = "fixed"
    kind: str = "detector"
    name: str = ""
    num_images: str = ""
    as_of: str = "2025"
    margin: str = "0"
    data: str = ""
    num_data: str = "2000"
    picture: str = ""


def main(arguments: Arguments) -> Audit:
    """Audits the claim, prints the audit and draws it; returns it."""
    claim = _claim(arguments)
    claim.check()
    bound = None
    if arguments.data:
        test = data.load(arguments.data, "test").take(int(arguments.num_data))
        bound = claims.transport_limit(claim, test.images / 255.0, test.labels)
    found = claims.audit(claim, as_of=int(arguments.as_of), margin=float(arguments.margin), bound=bound)
    print(json.dumps({**dataclasses.asdict(found), "exit_code": found.exit_code}, indent=2))
    print(found.sentence, file=sys.stderr)
    if arguments.picture:
        draw(arguments.picture, [found])
    return found


def draw(path: str, audits: list[Audit]) -> None:
    """Puts audits of one data set and norm on the curves of the best known, as of 2021 and as of the audits' year."""
    claim, years = audits[0].claim, sorted({2021, audits[0].as_of})
    known = {(r.eps, r.accuracy) for year in years for r in best_known.reports(claim.dataset, claim.norm, as_of=year)}
    if not known:
        raise ValueError(f"Nothing is known of classifiers of {claim.dataset} in {claim.norm}: leave out the picture.")
    curves = {f"best known as of {year}": _curve(claim, year, max(eps for eps, _ in known)) for year in years}
    points = {
        f"{found.claim.name or 'the claim'}, {100 * found.accuracy:.3g} %": (found.classifier_eps, found.accuracy)
        for found in audits
    }
    exceeds = [found.verdict == "implies-breakthrough" for found in audits]
    plotting.claims(
        path, {name: curve for name, curve in curves.items() if curve[0]}, points, reports=sorted(known),
        marked=[name for name, is_marked in zip(points, exceeds, strict=True) if is_marked],
        x_label=f"{claim.norm} radius of the classifier, half of a detector's",
        heading=f"{claim.dataset}: what detectors claim of classifiers",
    )


def _curve(claim: Claim, year: int, last: float) -> tuple[list[float], list[float]]:
    """Computes the best known accuracy at many radii, those left out that no year's curve reaches."""
    radii = [last * i / 400 for i in range(401)]
    found = [best_known.best_known(claim.dataset, claim.norm, eps, as_of=year).accuracy for eps in radii]
    known = [(eps, accuracy) for eps, accuracy in zip(radii, found, strict=True) if accuracy is not None]
    return [eps for eps, _ in known], [accuracy for _, accuracy in known]


def _claim(arguments: Arguments) -> Claim:
    shares = {
        name: float(getattr(arguments, name)) if getattr(arguments, name) else None
        for name in ("accuracy", "fpr", "fnr", "clean_error")
    }
    return Claim(
        arguments.dataset, cast(Norm, arguments.norm), best_known.radius(arguments.eps), **shares,
        evidence=cast(Evidence, arguments.evidence), kind=cast("claims.Kind", arguments.kind), name=arguments.name,
        num_images=int(arguments.num_images) if arguments.num_images else None,
    )


if __name__ == "__main__":
    try:
        sys.exit(main(command_line.parse(Arguments)).exit_code)
    except ValueError as error:
        sys.exit(f"error: {error}")
