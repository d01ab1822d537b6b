"""All adaptive attacks on a detector, and the worst of them for each example (Tramer et al. 2020, arXiv:2002.08347)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rdx import attacks
from rdx.attacks.autoattack import Cascade
from rdx.attacks.signatures import Attack
from rdx.balls import Ball
from rdx.compilation import as_partial
from rdx.detect import extra_class, joint_loss, matching, selective, thresholds
from rdx.detect.goals import evade
from rdx.detect.matching import Guides
from rdx.types import Array, ArrayLike, AttackResult, Detector, Key


def fixed(*, num_steps: int = 100, num_restarts: int = 1) -> dict[str, Attack]:
    """Lists attacks that know the classifier but not the detector: PGD, which goes far, and FMN, which stops near.

    Source: the evaluations that Tramer (2022, arXiv:2107.11630, Sec. 3) reports of; what they reach is no bound.

    Args:
        num_steps: steps of each attack.
        num_restarts: random starts of PGD.

    Returns:
        Attacks by name, each `(key, detector, x, labels, *, ball, index, loop) -> AttackResult`, whose success is that
        the classifier is wrong.
    """
    pgd = partial(attacks.pgd, num_steps=num_steps, num_restarts=num_restarts)
    return {"pgd": partial(_against_classifier, attack=pgd), "fmn": partial(_minimal, num_steps=num_steps)}


def adaptive(
    *, threshold: ArrayLike = 0.0, matched: Mapping[str, tuple[Callable[[Array], Array], Guides]] | None = None,
    num_steps: int = 100, num_restarts: int = 2, num_guides: int = 3, num_queries: int = 1000,
) -> dict[str, Attack]:
    """Lists attacks that know the detector, weakest first.

    They are to be run by `worst_case`. Scores should be calibrated (`thresholds.calibrated`), so that margin and score
    are of one size.

    Source: Tramer et al. (2020, arXiv:2002.08347), Bryniarski et al. (2021, arXiv:2106.15023), Carlini & Wagner (2017,
    arXiv:1705.07263), Andriushchenko et al. (2020, arXiv:1912.00049).

    Args:
        threshold: the detector's.
        matched: by name, what `matching.match` matches, with its guides; for instance features and logits.
        num_steps: steps of white-box attacks.
        num_restarts: their random starts.
        num_guides: guides for each kind of matching.
        num_queries: queries of Square.

    Returns:
        Attacks by name, each `(key, detector, x, labels, *, ball, index, loop) -> AttackResult`.
    """
    steps = {"threshold": threshold, "num_steps": num_steps, "num_restarts": num_restarts}
    goal = evade(threshold)
    rounds = {"threshold": threshold, "num_steps": max(num_steps // 2, 1)}
    matches = {
        f"match {name} {rank}": partial(
            matching.match, embed=embed, guides=guides, rank=rank, threshold=threshold, num_steps=num_steps
        )
        for name, (embed, guides) in (matched or {}).items() for rank in range(num_guides)
    }
    return {
        "worst of both": partial(attacks.pgd, goal=goal, num_steps=num_steps, num_restarts=num_restarts),
        "selective": partial(selective.selective_pgd, **steps),
        "orthogonal": partial(selective.orthogonal_pgd, **steps),
        "joint": partial(joint_loss.joint_pgd, **rounds),
        **matches,
        "extra class": partial(extra_class.carlini_wagner, **rounds, step_size=0.05),
        "square": partial(attacks.square, goal=goal, num_steps=num_queries),
    }


def worst_case(
    key: Key, detector: Detector, x: ArrayLike, labels: ArrayLike, *, ball: Ball, attacks_on: Mapping[str, Attack],
    threshold: ArrayLike = 0.0, index: ArrayLike | None = None,
) -> Cascade:
    """Runs attacks one after the other, each on the inputs that no attack before has brought past the detector.

    Args:
        key: one key.
        detector: `x [B, ...] -> (logits [B, K], score [B])`, which rejects where `score > threshold`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model.
        attacks_on: by name, weakest first, from `adaptive`.
        threshold: the detector's.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.

    Returns:
        The strongest inputs, judged by a forward pass, and which attack broke what; see `attacks.cascade`.

    Raises:
        ValueError: as `attacks.cascade`.
    """
    return attacks.cascade(
        key, attacks_on, as_partial(detector), x, labels, ball=ball, goal=evade(threshold), index=index
    )


def _minimal(
    key: Key, detector: Detector, x: ArrayLike, labels: ArrayLike, *, index: ArrayLike | None = None, **options: Any
) -> AttackResult:
    del key, index
    return attacks.fmn(thresholds.classifier_of(detector), x, labels, **options)


def _against_classifier(
    key: Key, detector: Detector, x: ArrayLike, labels: ArrayLike, *, attack: Attack, **options: Any
) -> AttackResult:
    return attack(key, thresholds.classifier_of(detector), x, labels, **options)
