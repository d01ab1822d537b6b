"""Does an attack do what an attack must? Short attacks that are compared with each other.

Auto-PGD climbs, in one batch, cross entropy at half the radius, the radius, twice the radius and everywhere, and at the
radius the rescaled cross entropy and the margin, with two restarts; beside it stand PGD, one step, random points and
Square.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx import losses, norms
from rdx.attacks import Loop, apgd, base, pgd, square
from rdx.balls import Ball
from rdx.evaluate.checks import BPDA, LOSS, Check, Status, call, check, grade, gradient, is_wrong
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, Key, Trace

EFFORT = "attacks.autoattack: more steps and restarts, and several losses"
SQUARE = f"attacks.square with 5,000 queries; {BPDA}"
# What one batch holds: name, radius in units of eps, and how the loss is made of the logits.
_RADII = {"half": 0.5, "cross_entropy": 1.0, "double": 2.0, "unbounded": np.inf, "rescaled": 1.0, "margin": 1.0}
_NUM_POINTS = 16
# Shares of examples, and in small samples their numbers, above which a difference is no chance.
_FEW, _MANY = (0.005, 1.5), (0.05, 3.5)
# No chance explains that a black box is stronger than gradients (AutoAttack's flag).
GAIN = (0.002, 0.05)
# Share of the last quarter of the steps in the rise of the loss; Pintor et al. take 0.05 of the last 10 steps.
_RISING = 0.1
_GREY_LEVELS = 255
# Square knows images and vectors; other inputs meet random points only.
_MOST_AXES = 4


class Runs(NamedTuple):
    """What the attacks did to `n` examples.

    Attributes:
        is_right: which examples are classified correctly and so count, shape `[n]`, bool.
        broken: by name of the attack, shape `[n]`, bool.
        first: by name, what the first restart broke, shape `[n]`, bool.
        early: by name, what three quarters of the first restart's steps broke, shape `[n]`, bool.
        rising: by name, the last quarter's share in the rise of the loss, shape `[n]`.
        x_adv: by name, shape `[n, ...]`.
    """

    is_right: np.ndarray
    broken: dict[str, np.ndarray]
    first: dict[str, np.ndarray]
    early: dict[str, np.ndarray]
    rising: dict[str, np.ndarray]
    x_adv: dict[str, Array]

    @property
    def white(self) -> np.ndarray:
        """Which examples Auto-PGD broke at the radius with any loss, shape `[n]`."""
        return self.broken["cross_entropy"] | self.broken["rescaled"] | self.broken["margin"]

    def graded(self, share: float) -> Status:
        """Grades a share of examples."""
        num = max(int(self.is_right.sum()), 1)
        return grade(share, *(max(least, number / num) for least, number in (_FEW, _MANY)))

    def share(self, flags: np.ndarray) -> float:
        """Counts flags among the examples that are classified correctly."""
        return float(flags[self.is_right].mean()) if self.is_right.any() else 0.0


def run(
    key: Key, logits_fn: Partial, x: Array, labels: Array, ball: Ball, *, num_steps: int, num_queries: int
) -> Runs:
    """Runs the attacks.

    Args:
        key: one key.
        logits_fn: the model.
        x: shape `[n, ...]`.
        labels: shape `[n]`.
        ball: the threat model, one radius for all examples.
        num_steps: steps of Auto-PGD, and of PGD.
        num_queries: queries of Square.

    Returns:
        What they did.
    """
    climb_key, square_key, noise_key, fixed_key = jax.random.split(key, 4)
    num, names = len(x), list(_RADII)
    logits = call(logits_fn, x)
    wide, tiled = _balls(ball, x), jnp.tile(x, (len(names), *(1,) * (x.ndim - 1)))
    goal = _goal(names, losses.margin(logits, labels))
    found = apgd(
        climb_key, logits_fn, tiled, jnp.tile(labels, len(names)), ball=wide, goal=goal, num_steps=num_steps,
        num_restarts=2, loop=Loop(trace=True),
    )
    assert found.trace is not None
    x_adv, broken = _split(names, num, found.x_adv), _on_host(names, num, found.success)
    first, early, rising = (_on_host(names, num, part) for part in _course(found.trace, num_steps))
    fixed = pgd(fixed_key, logits_fn, x, labels, ball=ball, num_steps=num_steps)
    slope = gradient(Partial(losses.cross_entropy), logits_fn, x, labels)
    step = base.ascend(ball, x, x, jnp.where(jnp.isfinite(slope), slope, 0.0), ball.eps)
    noise = [ball.sample(keys, x) for keys in jax.random.split(noise_key, (_NUM_POINTS, num))]
    broken |= {"pgd": np.asarray(fixed.success), "one_step": is_wrong(logits_fn, step, labels),
               "noise": np.any([is_wrong(logits_fn, point, labels) for point in noise], axis=0)}
    x_adv |= {"pgd": fixed.x_adv, "square": x}
    broken["square"] = is_wrong(logits_fn, x, labels)
    if x.ndim <= _MOST_AXES:
        black = square(square_key, logits_fn, x, labels, ball=ball, num_steps=num_queries)
        x_adv["square"], broken["square"] = black.x_adv, np.asarray(black.success)
    return Runs(np.asarray(logits.argmax(axis=1) == labels), broken, first, early, rising, x_adv)


def judge(runs: Runs) -> tuple[Check, ...]:
    """Compares the attacks.

    Args:
        runs: what they did.

    Returns:
        The checks "loss", "optimisation", "fixed steps", "one step", "radius", "black box" and "unbounded".
    """
    broken, share = runs.broken, runs.share
    shares = {name: share(flags) for name, flags in broken.items()}
    plain, white, black = broken["cross_entropy"], runs.white, broken["square"] | broken["noise"]
    gain = share(white & ~plain)
    late = share(plain & ~runs.early["cross_entropy"])
    standing = runs.is_right & ~runs.first["cross_entropy"]
    rising = float(np.median(runs.rising["cross_entropy"][standing])) if standing.any() else 0.0
    fixed, step, ahead = (share(flags & ~white) for flags in (broken["pgd"], broken["one_step"], black))
    lost = share((broken["half"] & ~plain) | (plain & ~broken["double"]))
    standing_far = 1.0 - shares["unbounded"]
    return (
        check("loss", runs.graded(gain), f"margin or rescaled logits break {gain:.1%} more than cross entropy",
              LOSS, gain=gain, **{name: shares[name] for name in ("cross_entropy", "rescaled", "margin")}),
        check("optimisation", "warn" if runs.graded(late) != "ok" or rising > _RISING else "ok",
              f"the last quarter of the steps and a restart break {late:.1%} more; where the attack fails, the last "
              f"quarter makes {rising:.0%} of the rise of the loss", EFFORT, late=late, rising=rising),
        check("fixed steps", runs.graded(fixed), f"PGD breaks {fixed:.1%} that Auto-PGD does not", f"{EFFORT}; {BPDA}",
              gain=fixed, pgd=shares["pgd"]),
        check("one step", runs.graded(step), f"one step breaks {step:.1%} that many steps do not",
              f"{EFFORT}; {BPDA}", gain=step, one_step=shares["one_step"]),
        check("radius", runs.graded(lost), f"{lost:.1%} are broken in a ball but not in the one twice as large",
              f"{EFFORT}; {BPDA}", lost=lost, half=shares["half"], double=shares["double"]),
        check("black box", grade(ahead, *GAIN), f"Square or random points break {ahead:.1%} more than gradients",
              SQUARE, gain=ahead, square=shares["square"], noise=shares["noise"]),
        check("unbounded", runs.graded(standing_far), f"{standing_far:.1%} stand where everything is allowed",
              f"{BPDA}; {LOSS}", standing=standing_far),
    )


def validity(
    logits_fn: Partial, x: Array, labels: Array, x_adv: Array, success: ArrayLike, ball: Ball
) -> Check:
    """Checks adversarial examples: in ball and box, finite, wrong in a fresh pass, and still so as 8-bit images.

    Args:
        logits_fn: the model.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`.
        x_adv: shape `[B, ...]`.
        success: what the attack claims, shape `[B]`.
        ball: the threat model.

    Returns:
        The check "validity". It fails on what is not in the ball or not adversarial, and warns where rounding to 8 bits
        undoes more than a tenth.
    """
    claimed = np.asarray(success)
    # Room for the rounding of x + delta, and no more.
    roomy = Ball(ball.norm, 1.000001 * jnp.asarray(ball.eps) + 1e-6, ball.low, ball.high)
    inside = np.asarray(roomy.contains(x_adv, x)) & np.isfinite(np.asarray(norms.flatten(x_adv))).all(axis=1)
    survives = is_wrong(logits_fn, jnp.round(x_adv * _GREY_LEVELS) / _GREY_LEVELS, labels)
    outside, false = 1.0 - float(inside.mean()), float((claimed & ~is_wrong(logits_fn, x_adv, labels)).mean())
    undone = float((~survives)[claimed].mean()) if claimed.any() else 0.0
    status = "fail" if outside or false else grade(undone, 0.1, np.inf)
    return check(
        "validity", status,
        f"{outside:.1%} lie outside of ball or box, {false:.1%} are not adversarial in a fresh pass, {undone:.1%} "
        "of the adversarial ones are not after rounding to 8 bits",
        "project onto ball and box, judge by a fresh pass; for images attack the rounded model by "
        "attacks.adaptive.straight_through", outside=outside, false=false, undone=undone,
    )


def certified_versus_attacked(certified: Array, broken: np.ndarray) -> Check:
    """Checks that nothing is both certified and broken.

    Args:
        certified: verdicts at the same radius, shape `[B]`, bool.
        broken: what attacks broke, shape `[B]`, bool.

    Returns:
        The check "certificates".
    """
    both = np.asarray(certified) & broken
    return check(
        "certificates", "fail" if both.any() else "ok", f"{both.sum()} examples are both certified and broken",
        "bounds, attack or labels are wrong: find out which before anything else", both=both.sum(),
        certified=np.asarray(certified).mean(), broken=broken.mean(),
    )


def _balls(ball: Ball, x: Array) -> Ball:
    """Gives every example of the batch the radius of its part."""
    eps, width = base.per_example(ball.eps, x[:1]), float(np.max(np.asarray(ball.high) - np.asarray(ball.low)))
    # Across the box; without a box, far. What a mask holds still stays still.
    width = width if np.isfinite(width) else 1000.0 * float(eps.max())
    across = width * norms.norm(jnp.ones_like(x[:1]), ball.norm)[0]
    unbounded = jnp.where((eps > 0) | (eps.max() == 0), across, 0.0)
    radii = [jnp.repeat(unbounded if np.isinf(f) else f * eps, len(x), axis=0) for f in _RADII.values()]
    radii = jnp.concatenate(radii)
    return Ball(ball.norm, radii, ball.low, ball.high)


def _goal(names: list[str], margins: Array) -> Goal:
    """Builds the losses: cross entropy, of logits rescaled so that clean margins are about 1, and the margin."""
    typical = jnp.median(jnp.abs(margins))
    scales = {"rescaled": 1.0 / jnp.maximum(typical, jnp.finfo(margins.dtype).tiny), "margin": jnp.zeros_like(typical)}
    scale = jnp.stack([scales.get(name, jnp.ones_like(typical)) for name in names])
    return Goal(Partial(_loss), Partial(_is_wrong), (jnp.repeat(scale, len(margins)),))


def _loss(logits: Array, labels: Array, scale: Array) -> Array:
    return jnp.where(scale == 0, losses.margin(logits, labels), losses.cross_entropy(scale[:, None] * logits, labels))


def _is_wrong(logits: Array, labels: Array, scale: Array) -> Array:
    del scale
    return losses.is_wrong(logits, labels)


def _split(names: list[str], num: int, values: Array) -> dict[str, Array]:
    return {name: values[i * num:(i + 1) * num] for i, name in enumerate(names)}


def _on_host(names: list[str], num: int, values: Array) -> dict[str, np.ndarray]:
    return {name: np.asarray(part) for name, part in _split(names, num, values).items()}


def _course(trace: Trace, num_steps: int) -> tuple[Array, Array, Array]:
    """Reads from the first restart's course what it broke, what its first three quarters broke, and the late rise."""
    three_quarters = max(3 * num_steps // 4, 1) - 1
    begin, late, end = (trace.loss[i] for i in (0, three_quarters, num_steps - 1))
    rise = end - begin
    return trace.success[num_steps - 1], trace.success[three_quarters], jnp.where(rise > 0, (end - late) / rise, 0.0)
