"""The best known robust accuracy of classifiers, per data set, norm and radius, as of a year, with sources.

The table `published/best_known.csv` holds what was reported at some radii. `as_of=2021` are the classifiers and
attacks that Tramer (2022, arXiv:2107.11630, Sec. 3.2) compares with and the records of their time, `as_of=2025` those
of RobustBench (Croce et al. 2021, arXiv:2010.09670) on 31 March 2025 beside them. Most figures of 2021 are from PGD or
APGD alone, hence optimistic.

Between the radii of one year a curve is interpolated linearly: an estimate, marked as such. Known for sure is less: a
classifier that was reported at a larger radius is as good at a smaller one. Nothing is extrapolated.
"""

import csv
import dataclasses
import functools
import importlib.resources
from fractions import Fraction
from typing import NamedTuple

from rdx import norms
from rdx.types import Norm

# Radii read as fractions, such as 4/255, may differ from computed ones in the last digits.
_SAME = 1e-9


class Report(NamedTuple):
    """One published figure.

    Attributes:
        eps: radius in input units.
        accuracy: robust accuracy at that radius.
        as_of: year of the curve it belongs to.
        source: model, attack and where the figure stands.
    """

    eps: float
    accuracy: float
    as_of: int
    source: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """What is known at a radius.

    Attributes:
        accuracy: best known robust accuracy, reported or interpolated; None outside of the reported radii.
        is_interpolated: whether no report is at this radius, or a newer curve between its radii exceeds it.
        low: best accuracy that was reported at this radius or a larger one; 0 where there is none.
        high: the accuracy at the next smaller radius of the same curve, 1 where there is none; `accuracy` itself if it
            was reported.
        sources: reports that this rests on.
    """

    accuracy: float | None
    is_interpolated: bool
    low: float
    high: float
    sources: tuple[str, ...]


def radius(text: str) -> float:
    """Reads a radius such as `8/255` or `0.5`.

    Raises:
        ValueError: on anything else.
    """
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"Radius {text!r} is no number: write 8/255 or 0.031, in units of [0, 1].") from error


def rows(table: str) -> tuple[dict[str, str], ...]:
    """Reads a table of the package: "table1", "table2" or "best_known"."""
    path = importlib.resources.files("rdx.detect") / "published" / f"{table}.csv"
    return tuple(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@functools.cache
def reports(dataset: str, norm: Norm, *, as_of: int, is_certified: bool = False) -> tuple[Report, ...]:
    """Selects the published figures up to a year.

    Args:
        dataset: "mnist", "cifar10", "cifar100" or "imagenet".
        norm: of the ball.
        as_of: year.
        is_certified: whether certified accuracies are meant, not accuracies under attack.

    Returns:
        Reports by rising radius; none where the table has none.
    """
    norms.check(norm)
    found = [
        Report(
            radius(row["eps"]), float(row["accuracy"]), int(row["as_of"]),
            f"{row['model']}, {row['attack']}: {row['source']}" if row["attack"] != "none" else
            f"{row['model']}: {row['source']}",
        )
        for row in rows("best_known")
        if row["dataset"] == dataset and row["norm"] == norm and int(row["as_of"]) <= as_of
        and (row["evidence"] == "certified") == is_certified
    ]
    return tuple(sorted(found))


def best_known(dataset: str, norm: Norm, eps: float, *, as_of: int, is_certified: bool = False) -> Reference:
    """Looks up the best known robust accuracy at a radius.

    Each year's reports make a curve, monotone (a report at a larger radius counts at a smaller one) and interpolated
    linearly between its radii; the best of the curves up to `as_of` counts.

    Args:
        dataset: as in `reports`.
        norm: of the ball.
        eps: radius in input units.
        as_of: year.
        is_certified: as in `reports`.

    Returns:
        The accuracy, or bounds of it where no curve reaches.
    """
    known = reports(dataset, norm, as_of=as_of, is_certified=is_certified)
    beyond = [report for report in known if report.eps >= eps - _SAME]
    low = max((report.accuracy for report in beyond), default=0.0)
    years = sorted({report.as_of for report in known})
    estimates = [found for year in years if (found := _on_curve([r for r in known if r.as_of == year], eps))]
    if not estimates:
        # Left of all radii nothing limits the best known accuracy; right of them it is at most the last.
        last = max(known, key=lambda report: report.eps, default=None)
        if beyond or last is None:
            return Reference(None, False, low, 1.0, tuple(r.source for r in beyond if r.accuracy == low))
        return Reference(None, False, 0.0, last.accuracy, (last.source,))
    best = max(estimates, key=lambda found: found.accuracy or 0.0)
    high = max(found.high for found in estimates)
    return dataclasses.replace(best, low=low, high=high)


def _on_curve(curve: list[Report], eps: float) -> Reference | None:
    # Reports that a larger radius of the same year beats are superseded.
    kept = [r for r in curve if r.accuracy >= max(other.accuracy for other in curve if other.eps >= r.eps)]
    for report in kept:
        if abs(report.eps - eps) <= _SAME:
            return Reference(report.accuracy, False, report.accuracy, report.accuracy, (report.source,))
    left = max((r for r in kept if r.eps < eps), key=lambda r: r.eps, default=None)
    right = min((r for r in kept if r.eps > eps), key=lambda r: r.eps, default=None)
    if left is None or right is None:
        return None
    share = (eps - left.eps) / (right.eps - left.eps)
    accuracy = left.accuracy + share * (right.accuracy - left.accuracy)
    return Reference(accuracy, True, right.accuracy, left.accuracy, (left.source, right.source))
