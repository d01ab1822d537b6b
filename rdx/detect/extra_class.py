"""The detector as one more class of the classifier, for Carlini & Wagner's attack (2017, arXiv:1705.07263)."""

import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import attacks, losses
from rdx.attacks import driver
from rdx.balls import Ball
from rdx.compilation import as_partial
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Detector, Key

# Least gap of the shifted logits: a positive factor of the score, however flat the logits are.
_LEAST = 1e-3


def extra_class(detector: Detector, *, threshold: ArrayLike = 0.0) -> Partial:
    """Builds the classifier with one class more, which is predicted exactly where the detector rejects.

        G_k = Z_k,    G_K = (1 + score - threshold) * max_k Z_k

    for logits `Z` that are shifted so that the least is 0. Source: Carlini & Wagner (2017, arXiv:1705.07263, Sec. 3.2).
    Difference: the shift, without which negative logits would turn the detector around.

    Args:
        detector: `x [B, ...] -> (logits [B, K], score [B])`, which rejects where `score > threshold`.
        threshold: the detector's.

    Returns:
        A `LogitsFn` `x [B, ...] -> [B, K + 1]`.
    """
    return Partial(_extended, as_partial(detector), threshold)


def evade_extra_class() -> Goal:
    """Builds the goal that `extra_class` predicts neither the label nor the class of rejected inputs.

    Returns:
        The goal, with the loss `max_{j not in {y, K}} G_j - max(G_y, G_K)`, positive where it is reached.
    """
    return Goal(Partial(_loss), Partial(_success))


def carlini_wagner(
    key: Key, detector: Detector, x: ArrayLike, labels: ArrayLike, *, ball: Ball, threshold: ArrayLike = 0.0,
    index: ArrayLike | None = None, num_steps: int = 500, num_search_steps: int = 5, step_size: ArrayLike = 0.01,
    loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Runs `attacks.cw` (l2) or `attacks.cw_linf` against classifier and detector as one.

    Source: Carlini & Wagner (2017, arXiv:1705.07263, Sec. 3.2).

    Args:
        key: not drawn from: the attacks are deterministic. It is there so that all attacks on detectors are called
            alike.
        detector: as for `extra_class`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: l2 or linf; the greatest radius that counts.
        threshold: the detector's.
        index: not used.
        num_steps: steps for each constant.
        num_search_steps: number of constants; linf takes `num_steps * num_search_steps` steps in all.
        step_size: Adam's learning rate.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: `x` itself where no success within `ball.eps` was found.

    Raises:
        ValueError: on another norm or unusable inputs.
    """
    del key, index
    model, goal = extra_class(detector, threshold=threshold), evade_extra_class()
    if ball.norm == "linf":
        return attacks.cw_linf(
            model, x, labels, ball=ball, goal=goal, num_steps=num_steps * num_search_steps, step_size=step_size,
            patience=max(num_steps // 5, 1), loop=loop,
        )
    return attacks.cw(
        model, x, labels, ball=ball, goal=goal, num_steps=num_steps, num_search_steps=num_search_steps,
        step_size=step_size, loop=loop,
    )


def _extended(detector: Partial, threshold: ArrayLike, x: Array) -> Array:
    logits, score = detector(x)
    logits = logits - logits.min(axis=1, keepdims=True)
    greatest = jnp.maximum(logits.max(axis=1), _LEAST)
    # Beside the greatest logit rather than a multiple of it: one that rounds to it would tie.
    return jnp.concatenate([logits, (greatest + (score - threshold) * greatest)[:, None]], axis=1)


def _loss(logits: Array, labels: Array) -> Array:
    is_label = jnp.arange(logits.shape[1] - 1, dtype=jnp.int32)[None] == labels.astype(jnp.int32)[:, None]
    others = jnp.where(is_label, -jnp.inf, logits[:, :-1]).max(axis=1)
    return others - jnp.maximum(jnp.where(is_label, logits[:, :-1], -jnp.inf).max(axis=1), logits[:, -1])


def _success(logits: Array, labels: Array) -> Array:
    return losses.is_wrong(logits[:, :-1], labels) & ~(logits[:, -1] > logits[:, :-1].max(axis=1))
