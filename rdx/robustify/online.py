"""A5/R: a robustifier network computes the perturbation from the image alone; the classifier stays as it is.

Paper: Frosio & Kautz (2023, A5, Sec. 3, "Online robustification with robustifier R, legacy C", Eq. 7). The robustifier
sees no label and runs before the classifier does.

`through` is for the other order of events, that the attacker moves first: then robustifier and classifier are one
function of the attacked image, which can be attacked and certified like any other.
"""

from collections.abc import Callable

import numpy as np
from jax.tree_util import Partial

from rdx import bounds
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.compilation import as_partial
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

    Raises:
        ValueError: where a ball is unusable or the balls have different boxes; their norms may differ.
    """
    check_budget(defense, threat.ball)
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


def through(robustifier_fn: Callable[[Array], Array], logits_fn: LogitsFn, *, defense: Ball) -> Partial:
    """Builds the classifier behind a robustifier, `x -> f(clip(x + delta_D(R(x))))`.

    An attacker who moves first, and knows the defence, attacks this function: the robustifier is then an input
    transformation like any other. It is differentiable, and bounds propagate through all of it, so that

        attacks.pgd(key, online.through(...), x, labels, ball=ball)
        bounds.certify(online.through(...), x, labels, ball=ball)

    evaluate the whole. Inputs must lie in the defender's box.

    Source: the order of moves in Frosio & Kautz (2023, A5, Sec. 2) turned around; that one has to attack through a
    defence is Carlini & Wagner (2017, arXiv:1705.07263) and Tramer et al. (2020, arXiv:2002.08347).

    Args:
        robustifier_fn: the trained robustifier `x -> z`, such as `forward.logits_fn(params, {})`.
        logits_fn: the classifier of defended images.
        defense: the defender's ball, its radius and box without a batch axis of their own.

    Returns:
        A `LogitsFn` that carries the parameters of both.

    Raises:
        ValueError: where the defender's ball belongs to the examples of one batch.
    """
    if any(np.ndim(value) == 1 or (np.ndim(value) > 1 and np.shape(value)[0] != 1)
           for value in (defense.eps, defense.low, defense.high)):
        raise ValueError("The defender's ball has a batch axis, but a classifier takes any batch: give one for all.")
    return Partial(_through, as_partial(robustifier_fn), as_partial(logits_fn), defense)


def _through(robustifier_fn: Partial, logits_fn: Partial, defense: Ball, x: Array) -> Array:
    return logits_fn(defend(x, robustifier_fn(x), defense))


def _loss(
    logits_fn: LogitsFn, robustifier: Forward, defense: Ball, threat: Threat,
    params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array,
) -> LossOutput:
    del key
    x_defended = apply(robustifier, params, batch["x"], defense=defense)
    logits = logits_fn(x_defended)
    loss, metrics = bounds.phased_objective(threat, logits, logits_fn, x_defended, batch["labels"], step)
    return loss.mean(), (model_state, summarize(loss, metrics))
