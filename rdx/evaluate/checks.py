"""Is a model what attacks take it for? Checks of its outputs and gradients, and what to try where one fails.

Source: Carlini et al. (2019, arXiv:1902.06705), Athalye et al. (2018, arXiv:1802.00420), Pintor et al. (2022,
arXiv:2106.09947), the flags of AutoAttack (Croce & Hein 2020, arXiv:2003.01690).
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx import losses, norms
from rdx.attacks import adaptive
from rdx.balls import Ball
from rdx.evaluate.inspection import Inspection
from rdx.goals import Goal
from rdx.types import Array, Key

Status: TypeAlias = Literal["ok", "warn", "fail"]
_ORDER: tuple[Status, ...] = ("ok", "warn", "fail")

# What cures what, in the words of the library.
BPDA = (
    "attacks.adaptive.straight_through around the transformation, or attacks.adaptive.bpda(model, undefended net); "
    "then attacks.square and attacks.transfer, which need no gradient of the defence"
)
OPTIMISED = (
    "attacks.adaptive.unrolled with soft_sign and soft_clip through the model's optimisation; attacks.transfer from "
    f"the model without it, here diagnose(..., static=it); {BPDA}"
)
LOSS = "goals.misclassify(losses.dlr) or goals.misclassify(losses.margin), attacks.apgd_targeted"
EOT = (
    "attacks.adaptive.eot with goals.expected, judged by attacks.adaptive.stochastic_success; here diagnose(..., "
    "is_random=True)"
)
_NUM_PASSES, _NUM_DIRECTIONS, _NUM_DRAWS, _NUM_POINTS = 5, 8, 16, 100
_QUANTILES = (0.05, 0.5, 0.95)
# Passes of one model on one input may differ by rounding, relative to the largest logit; AutoAttack's tolerance.
_ROUNDING = 1e-4
# Derivatives and differences over a kink differ; those of an unrelated function differ by about 1.
_AGREES, _DISAGREES = 0.25, 0.6
# Mean relative change of the margin in the ball. A net of digits has 0.12 and 0.26 at linf radii 0.1 and 0.2, and 0.95
# with noise on its logits that is drawn afresh at every point.
_WAVES, _SHATTERS = 0.5, 0.8


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        status: "ok"; "warn": look yourself; "fail": a robust accuracy measured like this is not to be believed.
        evidence: one sentence.
        numbers: what was measured.
        try_next: the attack or the change to try; empty where all is well.
    """

    name: str
    status: Status
    evidence: str
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    try_next: str = ""


def grade(value: float, warn: float, fail: float) -> Status:
    """Grades a number of which more is worse: "warn" and "fail" above their thresholds."""
    return "fail" if value > fail else "warn" if value > warn else "ok"


def worst(statuses: Iterable[Status]) -> Status:
    """Picks the worst status, "ok" if there is none."""
    return _ORDER[max(map(_ORDER.index, statuses), default=0)]


def check(name: str, status: Status, evidence: str, try_next: str, **numbers: float) -> Check:
    """Builds a check, whose advice is only kept where it is needed."""
    return Check(name, status, evidence, {key: float(value) for key, value in numbers.items()},
                 "" if status == "ok" else try_next)


def code(found: Inspection) -> Check:
    """Judges what the jaxpr shows; see `inspection.inspect`."""
    cures = {"random": EOT, "blocked": BPDA, "host": BPDA, "custom": BPDA, "dynamic": OPTIMISED,
             "search": OPTIMISED}
    seen = {kind: getattr(found, kind) for kind in cures if getattr(found, kind)}
    status = "fail" if not found.has_path else "warn" if seen else "ok"
    shown = "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in seen.items())
    evidence = "no derivative can reach the input" if not found.has_path else "derivatives may be masked"
    evidence = "nothing masks derivatives" if status == "ok" else f"{evidence} ({shown or 'integers or comparisons'})"
    cure = "; ".join(dict.fromkeys(cures[kind] for kind in seen)) or BPDA
    return check("code", status, evidence, cure, **{kind: len(names) for kind, names in seen.items()})


def outputs(logits_fn: Partial, x: Array, labels: Array, points: Array) -> tuple[Check, ...]:
    """Checks that the outputs are finite logits of a model that fits its data.

    Args:
        logits_fn: the model.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`.
        points: other inputs where the model must be finite, shape `[B, ...]`.

    Returns:
        The checks "logits", "finite" and "accuracy".
    """
    logits, others = np.asarray(call(logits_fn, x)), np.asarray(call(logits_fn, points))
    is_distribution = np.allclose(logits.sum(axis=1), 1.0, atol=1e-5) and logits.min() >= 0.0
    bad = 1.0 - float(np.isfinite(np.concatenate([logits, others])).all(axis=1).mean())
    accuracy, chance = float((logits.argmax(axis=1) == np.asarray(labels)).mean()), 1.0 / logits.shape[1]
    return (
        check(
            "logits", "fail" if is_distribution else "ok",
            "the outputs are probabilities" if is_distribution else "the outputs are not probabilities",
            "the logits that the softmax is applied to: losses take logits, and probabilities saturate",
            smallest=logits.min(), largest=logits.max(),
        ),
        check(
            "finite", "fail" if bad else "ok", f"{bad:.1%} of the outputs are not finite",
            "find the NaN or infinity, such as a logarithm of 0: NaN counts as success, and gradients vanish",
            share=bad,
        ),
        check(
            "accuracy", "warn" if accuracy <= 1.5 * chance else "ok", f"clean accuracy is {accuracy:.1%}",
            "labels, scaling of the inputs, the checkpoint: the model guesses", accuracy=accuracy,
        ),
    )


def repeats(logits_fn: Partial, x: Array) -> tuple[Check, ...]:
    """Checks that the same input has the same output, in every pass and in every company.

    Args:
        logits_fn: the model.
        x: shape `[B, ...]`.

    Returns:
        The checks "determinism" and "batch".
    """
    first = np.asarray(call(logits_fn, x))
    scale = np.abs(first).max() + np.finfo(first.dtype).tiny
    passes = max(np.abs(np.asarray(call(logits_fn, x)) - first).max() for _ in range(_NUM_PASSES - 1)) / scale
    backwards = np.asarray(call(logits_fn, x[::-1]))[::-1]
    alone = np.concatenate([np.asarray(call(logits_fn, x[i:i + 1])) for i in range(min(3, len(x)))])
    company = max(np.abs(backwards - first).max(), np.abs(alone - first[:len(alone)]).max()) / scale
    return (
        check(
            "determinism", grade(passes, _ROUNDING, _ROUNDING),
            f"{_NUM_PASSES} passes differ by {passes:.1e} of the largest logit", EOT, difference=passes,
        ),
        check(
            "batch", grade(company, _ROUNDING, 10 * _ROUNDING),
            f"alone or in another order, outputs differ by {company:.1e} of the largest logit",
            "inference mode (the statistics of the batch are in use), one key for each example; " + EOT,
            difference=company,
        ),
    )


def gradients(logits_fn: Partial, x: Array, labels: Array) -> Check:
    """Checks that cross entropy and margin have gradients, finite and not zero, where the model is right.

    After the zero-gradient flag of AutoAttack and indicator I1 of Pintor et al. Quantiles of the l2 norms stand beside.

    Args:
        logits_fn: the model.
        x: shape `[B, ...]`.
        labels: shape `[B]`.

    Returns:
        The check "gradients".
    """
    is_right = ~is_wrong(logits_fn, x, labels)
    numbers = {}
    for name, loss in (("cross_entropy", losses.cross_entropy), ("margin", losses.margin)):
        flat = norms.flatten(gradient(Partial(loss), logits_fn, x, labels))
        largest, finite = np.asarray(jnp.abs(flat).max(axis=1)), np.asarray(jnp.isfinite(flat).all(axis=1))
        length = np.quantile(np.where(finite, np.asarray(norms.l2(flat)), 0.0), _QUANTILES)
        numbers |= {f"zero_{name}": _share(largest == 0, is_right), f"nan_{name}": 1.0 - float(finite.mean())}
        numbers |= {f"q{round(100 * q):02}_{name}": value for q, value in zip(_QUANTILES, length, strict=True)}
    lost = max(numbers["zero_cross_entropy"], numbers["nan_cross_entropy"])
    margin_lost = max(numbers["zero_margin"], numbers["nan_margin"])
    evidence = (
        f"{lost:.1%} of cross entropy's gradients and {margin_lost:.1%} of the margin's are zero or NaN; nine tenths "
        f"of cross entropy's norms lie in {numbers['q05_cross_entropy']:.1e} to {numbers['q95_cross_entropy']:.1e}"
    )
    status = grade(max(lost, margin_lost), 0.0, 0.1)
    return check("gradients", status, evidence, LOSS if margin_lost < min(lost, 0.1) else BPDA, **numbers)


def differences(key: Key, logits_fn: Partial, x: Array, labels: Array, ball: Ball) -> Check:
    """Compares the margin's derivatives along random directions with central differences: shattered gradients.

    `|d - (f(x + h v) - f(x - h v)) / 2h| / max(|d|, |difference|)` over 8 sign vectors `v`, for the better of `h = 0.1`
    and `0.01` times the radius per element, at random points of the ball: its median over the examples.

    Args:
        key: one key.
        logits_fn: the model.
        x: shape `[B, ...]`.
        labels: shape `[B]`.
        ball: the threat model.

    Returns:
        The check "differences".
    """
    point_key, sign_key = jax.random.split(key)
    points = ball.sample(jax.random.split(point_key, len(x)), x)
    signs = jax.random.rademacher(sign_key, (_NUM_DIRECTIONS, *x.shape), x.dtype)
    # A step that moves all elements, as far as the ball lets them together.
    reach = ball.radius(x) / norms.expand(norms.norm(jnp.ones_like(x), ball.norm), x)
    coarse, fine = (_disagreement(logits_fn, points, labels, share * signs * reach[None]) for share in (0.1, 0.01))
    error = float(np.median(np.minimum(coarse, fine)))
    status = grade(error, _AGREES, _DISAGREES)
    return check(
        "differences", status, f"derivatives and differences of the margin differ by {error:.0%} of their size",
        BPDA, error=error,
    )


def landscape(key: Key, logits_fn: Partial, x: Array, labels: Array, ball: Ball) -> Check:
    """Measures how far the margin changes in the ball: a loss that jumps everywhere misleads every gradient.

    `min(1, mean_v |m(v) - m(x)| / |m(x)|)` over 100 random points `v`, and its mean over the examples. After indicator
    I2 of Pintor et al., who take the loss of the attack. Cross entropy is so small at inputs that are far from the
    boundary that it changes by all of its size in honest nets, too; its change is only noted.

    Args:
        key: one key.
        logits_fn: the model.
        x: shape `[B, ...]`.
        labels: shape `[B]`.
        ball: the threat model.

    Returns:
        The check "landscape".
    """
    def both(logits: Array) -> np.ndarray:
        found = (loss(logits, labels) for loss in (losses.margin, losses.cross_entropy))
        return np.stack([np.asarray(values, np.float64) for values in found])

    start, total = both(call(logits_fn, x)), 0.0
    for keys in jax.random.split(key, (_NUM_POINTS, len(x))):
        total += np.abs(both(call(logits_fn, _sample(ball, keys, x))) - start)
    change = total / _NUM_POINTS / np.where(start == 0, 1.0, np.abs(start))
    margin, cross_entropy = np.where(change < 1.0, change, 1.0).mean(axis=1)  # NaN counts as a change, too
    return check(
        "landscape", grade(margin, _WAVES, _SHATTERS),
        f"at {_NUM_POINTS} random points of the ball the margin changes by {margin:.0%} of its size",
        f"attacks.square with 5,000 queries; {EOT}", margin=margin, cross_entropy=cross_entropy,
    )


def randomness(key: Key, random_fn: Partial, x: Array, labels: Array, goal: Goal) -> Check:
    """Measures how much a random model's answers vary, and how many draws its gradient needs.

    Args:
        key: one key.
        random_fn: `(keys [B], x [B, ...]) -> logits [B, K]`.
        x: shape `[B, ...]`.
        labels: shape `[B]`.
        goal: whose loss is differentiated.

    Returns:
        The check "randomness"; a model that is as random as it is said to be is warned of.
    """
    draws = np.asarray(call(adaptive.eot(key, random_fn, _NUM_PASSES), x))
    spread = float(np.abs(draws - draws[:, :1]).max() / (np.abs(draws).max() + np.finfo(draws.dtype).tiny))
    answers = draws.argmax(axis=2)
    unsteady = float((answers != answers[:, :1]).any(axis=1).mean())
    numbers = (1, 2, 4, 8, _NUM_DRAWS)
    report = adaptive.eot_report(key, random_fn, x, labels, goal=goal, num_samples=numbers)
    cosine = np.median(np.asarray(report.cosine), axis=1)
    enough = next((n for n, value in zip(numbers, cosine, strict=True) if value > 0.95), 0)
    wanted = f"num_samples={enough}" if enough else f"num_samples above {_NUM_DRAWS}"
    return check(
        "randomness", "warn" if spread > _ROUNDING else "ok",
        f"draws differ by {spread:.1e} of the largest logit and {unsteady:.0%} of the predictions change; gradients of "
        f"1 and 2 draws have cosine {cosine[0]:.2f}, of {_NUM_DRAWS} and {2 * _NUM_DRAWS} {cosine[-1]:.2f}",
        f"{EOT}, {wanted}", spread=spread, unsteady=unsteady, sufficient=enough,
        **{f"cosine_{n}": value for n, value in zip(numbers, cosine, strict=True)},
    )


def is_wrong(logits_fn: Partial, x: Array, labels: Array) -> np.ndarray:
    """Judges `x [B, ...]` by a fresh forward pass, shape `[B]`, bool."""
    return np.asarray(losses.is_wrong(call(logits_fn, x), labels))


def _share(flags: np.ndarray, among: np.ndarray) -> float:
    return float(flags[among].mean()) if among.any() else 0.0


def _total(loss: Partial, logits_fn: Partial, x: Array, labels: Array) -> Array:
    return loss(logits_fn(x), labels).sum()


def _compare(logits_fn: Partial, points: Array, labels: Array, steps: Array) -> Array:
    """Computes how far the margin's derivatives and differences along steps `[M, B, ...]` disagree, shape `[B]`."""
    slope = gradient(Partial(losses.margin), logits_fn, points, labels)
    expected = 2.0 * (steps * slope[None]).reshape(*steps.shape[:2], -1).sum(axis=2).T
    # One large batch, not vmap: functions outside of JAX may not know how to be mapped.
    ahead, behind = (
        losses.margin(logits_fn((points[None] + way).reshape(-1, *points.shape[1:])), jnp.tile(labels, len(steps)))
        for way in (steps, -steps)
    )
    seen = (ahead - behind).reshape(steps.shape[:2]).T
    scale = jnp.maximum(norms.l2(expected), norms.l2(seen))
    return norms.l2(seen - expected) / jnp.where(scale == 0, 1.0, scale)


call = jax.jit(lambda logits_fn, x: logits_fn(x))
_sample = jax.jit(lambda ball, keys, x: ball.sample(keys, x))
gradient = jax.jit(jax.grad(_total, argnums=2))
_disagreement = jax.jit(_compare)
