"""Checks that are asked for, since they need more budget or another model: effort, knowledge, defence at test time."""

import time
from typing import NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from rdx.attacks import adaptive, apgd
from rdx.balls import Ball
from rdx.evaluate.attack_checks import EFFORT, GAIN, SQUARE, Runs
from rdx.evaluate.checks import BPDA, OPTIMISED, Check, call, check, grade, is_wrong, worst
from rdx.types import Array, Key

_NUM_RESTARTS, _NUM_TIMED = 5, 5


class Asked(NamedTuple):
    """What was asked for, and all that is needed to attack.

    Attributes:
        is_thorough: whether twice the steps and five restarts are tried.
        substitute: a model whose adversarial examples are transferred, or None.
        static: the model without what it does at test time, or None.
    """

    is_thorough: bool
    substitute: Partial | None
    static: Partial | None


class Beside(NamedTuple):
    """How the static model fares.

    Attributes:
        broken: which examples the attack breaks in it, shape `[n]`, bool.
        cost: seconds of a forward pass of the model, relative to one of the static model.
    """

    broken: np.ndarray
    cost: float


def run(
    key: Key, logits_fn: Partial, x: Array, labels: Array, ball: Ball, asked: Asked, *, num_steps: int
) -> tuple[dict[str, np.ndarray], Beside | None]:
    """Attacks with more effort and through other models; every attack is Auto-PGD on cross entropy.

    Args:
        key: one key.
        logits_fn: the model.
        x: shape `[n, ...]`.
        labels: shape `[n]`.
        ball: the threat model.
        asked: what to do.
        num_steps: steps of each attack.

    Returns:
        What was broken, shape `[n]`, bool: by "effort", by "transfer" from the substitute, by "static_transfer" from
        the static model, by "static_gradient", the model attacked with the gradients of the static one; and how the
        static model fares.
    """
    broken, beside, keys = {}, None, jax.random.split(key, 4)

    def climb(key: Key, target: Partial, num_steps: int = num_steps, num_restarts: int = 2) -> Array:
        return apgd(key, target, x, labels, ball=ball, num_steps=num_steps, num_restarts=num_restarts).x_adv

    if asked.is_thorough:
        broken["effort"] = is_wrong(logits_fn, climb(keys[0], logits_fn, 2 * num_steps, _NUM_RESTARTS), labels)
    if asked.substitute is not None:
        broken["transfer"] = is_wrong(logits_fn, climb(keys[1], asked.substitute), labels)
    if asked.static is not None:
        crafted = climb(keys[2], asked.static)
        broken["static_transfer"] = is_wrong(logits_fn, crafted, labels)
        through = adaptive.bpda(logits_fn, asked.static)
        broken["static_gradient"] = is_wrong(logits_fn, climb(keys[3], through), labels)
        cost = _seconds(logits_fn, x) / _seconds(asked.static, x)
        beside = Beside(is_wrong(asked.static, crafted, labels), cost)
    return broken, beside


def judge(runs: Runs, beside: Beside | None, *, is_masked: bool) -> tuple[Check, ...]:
    """Judges what was asked for.

    Args:
        runs: what the attacks did, those of `run` among them.
        beside: how the static model fares.
        is_masked: whether the code shows that gradients may be masked.

    Returns:
        Of the checks "effort", "knowledge" and "static" those that were asked for.
    """
    checks = ()
    if "effort" in runs.broken:
        checks += (_effort(runs),)
    if "transfer" in runs.broken:
        checks += (_knowledge(runs),)
    if beside is not None:
        checks += (_static(runs, beside, is_masked=is_masked),)
    return checks


def _effort(runs: Runs) -> Check:
    more = runs.share(runs.broken["effort"] & ~runs.broken["cross_entropy"])
    return check(
        "effort", runs.graded(more), f"twice the steps and {_NUM_RESTARTS} restarts break {more:.1%} more", EFFORT,
        gain=more, effort=runs.share(runs.broken["effort"]),
    )


def _knowledge(runs: Runs) -> Check:
    """Who knows more breaks more: gradients, or else scores, or else only a substitute (Carlini et al. 2019)."""
    ahead = runs.share(runs.broken["transfer"] & ~runs.white)
    standing = {
        name: 1.0 - runs.share(flags) for name, flags in
        {"white": runs.white, "score": runs.broken["square"], "transfer": runs.broken["transfer"]}.items()
    }
    # A few queries know less than a good substitute, which says nothing of the model.
    is_poor = runs.graded(standing["score"] - standing["transfer"]) != "ok"
    masks = grade(ahead, *GAIN)
    return check(
        "knowledge", "warn" if masks == "ok" and is_poor else masks,
        f"{standing['white']:.1%} stand gradients, {standing['score']:.1%} stand Square and {standing['transfer']:.1%} "
        f"transfer, which breaks {ahead:.1%} that gradients do not", SQUARE if masks == "ok" else BPDA,
        gain=ahead, **standing,
    )


def _static(runs: Runs, beside: Beside, *, is_masked: bool) -> Check:
    """Judges a defence that works at test time as Croce et al. (2022, arXiv:2202.13711) do, beside its static model."""
    through = runs.broken["static_transfer"] | runs.broken["static_gradient"]
    ahead = runs.share(through & ~runs.white)
    alone, standing = 1.0 - float(beside.broken.mean()), 1.0 - float((runs.white | through).mean())
    # What a defence gains while no gradient is known to pass through it may be the blindness of the attacks.
    gain = runs.graded(standing - alone)
    doubt = gain if is_masked or gain == "ok" else "warn"
    return check(
        "static", worst((grade(ahead, *GAIN), doubt)),
        f"{standing:.1%} stand, in the static model {alone:.1%} under the same attack, at {beside.cost:.1f} times the "
        f"cost; through the static model {ahead:.1%} break that gradients do not", OPTIMISED,
        gain=ahead, standing=standing, static=alone, cost=beside.cost,
        **{name: runs.share(runs.broken[name]) for name in ("static_transfer", "static_gradient")},
    )


def _seconds(logits_fn: Partial, x: Array) -> float:
    """Times a forward pass: the median, compilation apart."""
    times = []
    for _ in range(_NUM_TIMED + 1):
        begin = time.perf_counter()
        jax.block_until_ready(call(logits_fn, x))
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))
