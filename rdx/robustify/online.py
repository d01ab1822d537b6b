"""A5/R: a robustifier network computes the perturbation from the image alone; the classifier stays as it is.

Paper: Frosio & Kautz (2023, A5, Sec. 3, "Online robustification with robustifier R, legacy C", Eq. 7). The robustifier
sees no label and runs before the classifier does.
"""

from jax.tree_util import Partial

from rdx import bounds
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.robustify.objective import Forward, LossOutput, check_budget, defend, summarize
from rdx.types import Array, Key, LogitsFn, PyTree


def online(logits_fn: LogitsFn, robustifier: Forward, *, defense: Ball, threat: Threat) -> Partial:
    """Builds the loss `(1/N) sum_x E(x + delta_D(R(x)))`, minimised over the robustifier's parameters.

    Args:
        logits_fn: the frozen classifier, a `Partial` so that its parameters are arguments.
        robustifier: the network `x -> z`.
        defense: the defender's ball.
        threat: the attack to prepare for.

    Returns:
        A loss for `train.fit`.
    """
    check_budget(defense, threat)
    return Partial(_loss, logits_fn, robustifier, defense, threat)


def apply(robustifier: Forward, params: PyTree, x: Array, *, defense: Ball) -> Array:
    """Defends images with a trained robustifier.

    Args:
        robustifier: the network `x -> z`.
        params: its parameters.
        x: shape `[B, ...]`.
        defense: the defender's ball.

    Returns:
        Defended images, shape `[B, ...]`.
    """
    z, _ = robustifier(params, {}, x, train=False)
    return defend(x, z, defense)


def _loss(
    logits_fn: LogitsFn, robustifier: Forward, defense: Ball, threat: Threat,
    params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array,
) -> LossOutput:
    del key
    x_defended = apply(robustifier, params, batch["x"], defense=defense)
    logits = logits_fn(x_defended)
    loss, metrics = bounds.phased_objective(threat, logits, logits_fn, x_defended, batch["labels"], step)
    return loss.mean(), (model_state, summarize(loss, metrics))
