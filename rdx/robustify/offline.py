"""A5/O: the perturbation of every image is optimised on its own, its label known.

Paper: Frosio & Kautz (2023, A5, Sec. 3, "Offline robustification with ground truth", Eqs. 4-6). It answers what can be
reached; it needs the label, so it is no deployable defence.

In the authors' code all `z` are one tensor under RMSProp: rows outside the batch receive zero gradients, so their
mean square decays between visits and a visited pixel moves by about `lr / sqrt(1 - decay)` whatever its gradient.
Optimising `{"z": [N, ...]}` with `optax.rmsprop(lr, decay=0.99, eps_in_sqrt=False)` behaves the same way.
"""

import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import bounds
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.robustify.objective import LossOutput, check_budget, defend, summarize
from rdx.types import Array, Key, LogitsFn, PyTree


def init(num_examples: int, shape: tuple[int, ...]) -> PyTree:
    """Builds the parameters `{"z": zeros [N, ...]}`: at first nothing is moved."""
    return {"z": jnp.zeros((num_examples, *shape), jnp.float32)}


def offline(logits_fn: LogitsFn, *, defense: Ball, threat: Threat) -> Partial:
    """Builds the loss `sum_i E(x_i + delta_D(z_i))`, minimised over `z` with the classifier frozen.

    It is a sum, not a mean: every image is its own problem and shall not depend on the size of the batch.

    Args:
        logits_fn: the frozen classifier, a `Partial` so that its parameters are arguments.
        defense: the defender's ball.
        threat: the attack to prepare for.

    Returns:
        A loss for `train.fit` over the parameters of `init`; the batch's `row [B]` says which `z` an image owns.
    """
    check_budget(defense, threat)
    return Partial(_loss, logits_fn, defense, threat)


def apply(params: PyTree, x: Array, rows: Array, *, defense: Ball) -> Array:
    """Defends `x [B, ...]` with the optimised `z` of the given rows."""
    return defend(x, params["z"][rows], defense)


def _loss(
    logits_fn: LogitsFn, defense: Ball, threat: Threat,
    params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array,
) -> LossOutput:
    del key
    x_defended = apply(params, batch["x"], batch["row"], defense=defense)
    logits = logits_fn(x_defended)
    loss, metrics = bounds.phased_objective(threat, logits, logits_fn, x_defended, batch["labels"], step)
    return loss.sum(), (model_state, summarize(loss, metrics))
