"""An auditor of robustness claims: what a detector's claim says about classifiers, beside the best known.

By Theorem 4 a detector that is robust at `eps` is, up to computation, a classifier as robust at `eps / 2`; by Theorem
5 a classifier robust at `eps` is a detector robust at `2 eps`. A claim that implies a classifier far better than any
known one is a breakthrough that its authors did not mean to announce, or, more often, an evaluation that missed an
attack.

Source: Tramer (2022, arXiv:2107.11630, Sec. 3).
"""

import dataclasses
from typing import Literal, get_args

from rdx import metrics, norms
from rdx.analyse.transport import TransportBound, lower_bound_of_pairs
from rdx.detect.best_known import Reference, best_known, radius, rows
from rdx.types import ArrayLike, Norm

Evidence = Literal["fixed", "adaptive", "certified"]
Kind = Literal["detector", "classifier"]
Verdict = Literal["consistent", "implies-breakthrough", "vacuous", "no-reference"]
# Sums of rates such as 0.05 + 0.19 + 0.2 are rounded.
_ROUNDING = 1e-9
# Exit codes of the command line; 1 and 2 mean errors and bad usage.
EXIT_CODES: dict[str, int] = {"consistent": 0, "implies-breakthrough": 10, "vacuous": 11, "no-reference": 12}
IMPOSSIBLE = 13


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published robustness figure: the accuracy itself, or the rates that Equation 4 makes one of.

    Attributes:
        dataset: "mnist", "cifar10", "cifar100", "imagenet", or another one, for which there is no reference.
        norm: of the ball.
        eps: its radius in units of [0, 1].
        accuracy: robust accuracy, for detectors with detection, `1 - R_adv-det^eps`; None to have it from the rates.
        fpr: share of clean inputs that are rejected.
        fnr: share of adversarial inputs that are accepted.
        clean_error: share of clean inputs that are misclassified.
        evidence: what it rests on. Only a worst-case attack makes the FNR a bound: under "fixed" attacks the figure is
            what is claimed, not what holds (footnote 3 of the paper); "certified" figures hold.
        kind: "detector" or "classifier".
        name: whose.
        num_images: how many images were evaluated, for the claim's statistical error.
    """

    dataset: str
    norm: Norm
    eps: float
    accuracy: float | None = None
    fpr: float | None = None
    fnr: float | None = None
    clean_error: float | None = None
    evidence: Evidence = "fixed"
    kind: Kind = "detector"
    name: str = ""
    num_images: int | None = None

    def check(self) -> None:
        """Raises where the claim is incomplete or contradicts itself.

        Raises:
            ValueError: naming what to give.
        """
        norms.check(self.norm)
        rates = (self.fpr, self.fnr, self.clean_error)
        if self.evidence not in get_args(Evidence):
            raise ValueError(f"Unknown evidence {self.evidence!r}: say one of {', '.join(get_args(Evidence))}.")
        if self.kind not in get_args(Kind):
            raise ValueError(f"Unknown kind {self.kind!r}: say detector or classifier.")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}: give a radius in units of [0, 1], such as 8/255.")
        if (self.accuracy is None) == any(rate is None for rate in rates):
            raise ValueError("Give the robust accuracy, or all three of FPR, FNR and clean error, and not both.")
        if self.kind == "classifier" and self.accuracy is None:
            raise ValueError("A classifier rejects nothing: give its robust accuracy.")
        if any(rate is not None and not 0 <= rate <= 1 for rate in (self.accuracy, *rates)):
            raise ValueError("Rates are shares in [0, 1]: 90 % is 0.9.")


@dataclasses.dataclass(frozen=True)
class Implied:
    """The other kind of defence that a claim implies.

    Attributes:
        kind: "classifier" or "detector".
        eps: its radius.
        accuracy: its robust accuracy, with detection for a detector.
    """

    kind: str
    eps: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Audit:
    """What there is to say about a claim.

    Attributes:
        claim: the claim.
        accuracy: the robust accuracy claimed, by Equation 4 where rates were given: the pessimistic one.
        optimistic: the greatest one that the rates allow; the same where the accuracy was given.
        implied: the defence of the other kind that it implies.
        classifier_eps: radius at which the claim is one about classifiers: `eps / 2` for detectors, `eps` otherwise.
        reference: best known robust accuracy of classifiers there.
        as_of: year of that knowledge.
        verdict: "consistent", "implies-breakthrough", "vacuous" (the errors add up to everything), or "no-reference".
        is_settled: whether the verdict is the same wherever interpolation may err; False rests on an estimate.
        is_significant: for a breakthrough, whether the claim exceeds the reference by more than the 95 % interval of so
            many images; None without their number.
        certified: best known certified accuracy there, for certified claims.
        is_impossible: whether the data themselves exclude it; None where no data were given.
        limit: robust accuracy that no classifier exceeds on these data.
        sentence: all of it in words.
    """

    claim: Claim
    accuracy: float
    optimistic: float
    implied: Implied
    classifier_eps: float
    reference: Reference
    as_of: int
    verdict: Verdict
    is_settled: bool
    is_significant: bool | None
    certified: Reference | None
    is_impossible: bool | None
    limit: float | None
    sentence: str

    @property
    def exit_code(self) -> int:
        """The code with which a command line ends."""
        return IMPOSSIBLE if self.is_impossible else EXIT_CODES[self.verdict]


def robust_accuracy(*, fpr: float, fnr: float, clean_error: float) -> tuple[float, float]:
    """Computes the robust accuracy with detection that rates imply, pessimistic and optimistic.

    `max(0, 1 - FPR - FNR - R) <= 1 - R_adv-det <= 1 - max(FPR, FNR, R)`: the errors may all hit different inputs, or
    the same ones. It is a bound if the FNR is that of a worst-case attack on all inputs.

    Source: Tramer (2022, arXiv:2107.11630, Eq. 4); the optimistic end is ours.

    Args:
        fpr: share of clean inputs that are rejected.
        fnr: share of adversarial inputs that are accepted.
        clean_error: share of clean inputs that are misclassified.

    Returns:
        The two accuracies; the exact one, between them, is `metrics.robust_risk_with_detection` of the examples.
    """
    return max(0.0, 1.0 - fpr - fnr - clean_error), 1.0 - max(fpr, fnr, clean_error)


def audit(claim: Claim, *, as_of: int = 2025, margin: float = 0.0, bound: TransportBound | None = None) -> Audit:
    """Audits a claim.

    Certified figures are measured against the same empirical reference: to exceed known certificates is no surprise,
    since inefficiency helps there (Sec. 3.3), to exceed every known attack's remainder is a breakthrough.

    Source: Tramer (2022, arXiv:2107.11630, Sec. 3).

    Args:
        claim: what is claimed.
        as_of: year of the knowledge that it is compared with; the paper's is 2021.
        margin: how far a claim may exceed the best known and still be consistent; 0 as in the paper.
        bound: of the data, at `classifier_eps`, from `transport_limit`.

    Returns:
        The audit.

    Raises:
        ValueError: on an incomplete claim.
    """
    claim.check()
    accuracy, optimistic = _accuracies(claim)
    implied, eps = _implied(claim, accuracy)
    reference = best_known(claim.dataset, claim.norm, eps, as_of=as_of)
    verdict, is_settled = _judge(accuracy, reference, margin)
    certified = None
    if claim.evidence == "certified":
        certified = best_known(claim.dataset, claim.norm, eps, as_of=as_of, is_certified=True)
    limit = None if bound is None else 1.0 - bound.robust_error
    is_impossible = None if limit is None else accuracy > limit + _ROUNDING
    found = Audit(
        claim, accuracy, optimistic, implied, eps, reference, as_of, verdict, is_settled,
        _significance(claim, accuracy, reference, verdict), certified, is_impossible, limit, "",
    )
    return dataclasses.replace(found, sentence=_sentence(found))


def transport_limit(claim: Claim, x: ArrayLike, labels: ArrayLike) -> TransportBound:
    """Bounds what any classifier reaches on the data at the radius of the claim's classifier.

    Args:
        claim: what is claimed.
        x: images of the data set, shape `[N, ...]`, in [0, 1]; those of the claim, or the bound is of other ones.
        labels: shape `[N]`, int.

    Returns:
        The bound, for `audit`.
    """
    eps = claim.eps / 2 if claim.kind == "detector" else claim.eps
    return lower_bound_of_pairs(x, labels, eps=eps, norm=claim.norm)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of Table 1 of Tramer (2022).

    Attributes:
        claim: with the accuracy that the paper derives.
        reference: robust accuracy of classifiers at `eps / 2`, as printed.
        is_red: whether the paper prints the claim in red.
        rates: FPR, FNR and clean error as far as the paper states them.
        provenance: where each of the cells is from.
        broken_by: who broke the detector, as the paper or its references say.
    """

    claim: Claim
    reference: float
    is_red: bool
    rates: dict[str, float]
    provenance: dict[str, str]
    broken_by: str


def table1() -> tuple[Row, ...]:
    """Reads Table 1 of Tramer (2022, arXiv:2107.11630): 16 rows, 14 defences."""
    return tuple(
        Row(
            Claim(
                row["dataset"], row["norm"], radius(row["eps"]), float(row["claim"]),  # pyright: ignore
                evidence=row["evidence"], name=f"{row['detector']} ({row['year']})",  # pyright: ignore
            ),
            float(row["reference"]), row["is_red"] == "1",
            {name: float(row[name]) for name in ("fpr", "fnr", "clean_error") if row[name]},
            {name: row[f"{name}_source"] for name in ("inputs", "evidence", "claim", "reference")}, row["broken_by"],
        )
        for row in rows("table1")
    )


def table2() -> tuple[tuple[Claim, Claim, float], ...]:
    """Reads Table 2 of Tramer (2022): certified detectors, certified classifiers at half the radius.

    Returns:
        Detector, classifier, and the accuracy that the detector's own paper reports, which Table 2 rounds.
    """
    return tuple(
        (
            Claim(
                row["dataset"], row["norm"], radius(row["eps"]), float(row["detector_accuracy"]),  # pyright: ignore
                evidence="certified", name="Sheikholeslami et al. (2021)",
            ),
            Claim(
                row["dataset"], row["norm"], radius(row["eps"]) / 2, float(row["classifier_accuracy"]),  # pyright: ignore
                evidence="certified", kind="classifier", name="Zhang et al. (2020)",
            ),
            float(row["detector_published"]),
        )
        for row in rows("table2")
    )


def _accuracies(claim: Claim) -> tuple[float, float]:
    if claim.accuracy is not None:
        return claim.accuracy, claim.accuracy
    assert claim.fpr is not None
    assert claim.fnr is not None
    assert claim.clean_error is not None
    return robust_accuracy(fpr=claim.fpr, fnr=claim.fnr, clean_error=claim.clean_error)


def _implied(claim: Claim, accuracy: float) -> tuple[Implied, float]:
    if claim.kind == "detector":
        return Implied("classifier", claim.eps / 2, accuracy), claim.eps / 2
    return Implied("detector", 2 * claim.eps, accuracy), claim.eps


def _judge(accuracy: float, reference: Reference, margin: float) -> tuple[Verdict, bool]:
    if accuracy <= _ROUNDING:
        return "vacuous", True
    exceeds_low, exceeds_high = (accuracy > end + margin + _ROUNDING for end in (reference.low, reference.high))
    is_settled = exceeds_low == exceeds_high
    if reference.accuracy is None:
        if not is_settled:
            return "no-reference", True
        return ("implies-breakthrough" if exceeds_high else "consistent"), True
    exceeds = accuracy > reference.accuracy + margin + _ROUNDING
    return ("implies-breakthrough" if exceeds else "consistent"), is_settled


def _significance(claim: Claim, accuracy: float, reference: Reference, verdict: Verdict) -> bool | None:
    if claim.num_images is None or verdict != "implies-breakthrough":
        return None
    known = reference.high if reference.accuracy is None else reference.accuracy
    return metrics.wilson(round(accuracy * claim.num_images), claim.num_images)[0] > known


def _sentence(found: Audit) -> str:
    claim, reference, size = found.claim, found.reference, f"{100 * found.accuracy:.4g} %"
    other = f"{found.implied.kind} with {size} at {found.implied.eps:.4g}"
    text = f"{claim.name or 'The claim'} is, up to computation, a {other} ({claim.norm}, {claim.dataset}). "
    if found.verdict == "vacuous":
        text += "It claims nothing: the errors add up to everything. "
    elif reference.accuracy is not None:
        how = "interpolated" if reference.is_interpolated else "reported"
        text += (
            f"Best known of classifiers at {found.classifier_eps:.4g} as of {found.as_of}: "
            f"{100 * reference.accuracy:.4g} % ({how}; {'; '.join(reference.sources)}). "
        )
    elif reference.sources:
        text += f"Known is {100 * reference.low:.4g} to {100 * reference.high:.4g} % ({'; '.join(reference.sources)}). "
    else:
        text += "No reference is known for it. "
    if claim.evidence == "fixed" and found.verdict != "vacuous":
        text += "The figure rests on fixed attacks: it is a claim, not a bound. "
    if found.is_impossible:
        text += f"On these data no classifier exceeds {100 * (found.limit or 0.0):.4g} %. "
    verdict = found.verdict if found.is_settled else f"{found.verdict} (rests on interpolation)"
    return f"{text}Verdict: {verdict}."
