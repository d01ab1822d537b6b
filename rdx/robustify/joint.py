"""A5/RC: robustifier and classifier are trained together, from the robustifier of A5/R.

Paper: Frosio & Kautz (2023, A5, Sec. 3, "Online robustification with robustifier R, retrained C", Eqs. 8-9). Starting
both from scratch is unstable, so the start is A5/R's robustifier and the classifier that it was trained for. Random
augmentation of the input (shift and rotation, Sec. 4) belongs to the loop's `transform`. The authors' code draws one
crop and one rotation for a whole batch; `rdx.data` draws them for every image.
"""

from jax.tree_util import Partial

from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.robustify import online
from rdx.robustify.objective import Forward, LossOutput, check_budget, retrained
from rdx.types import Array, Key, PyTree


def init(robustifier_params: PyTree, classifier_params: PyTree) -> PyTree:
    """Builds the parameters `{"robustifier": ..., "classifier": ...}` from those of A5/R and its classifier."""
    return {"robustifier": robustifier_params, "classifier": classifier_params}


def joint(classifier: Forward, robustifier: Forward, *, defense: Ball, threat: Threat) -> Partial:
    """Builds the loss `(1/N) sum_x E(x + delta_D(R(x)))`, minimised over both networks' parameters.

    The loop's `model_state` is the classifier's. Its BatchNorm, if any, takes the statistics of the defended batch,
    which enter the bounds as differentiable constants.

    Args:
        classifier: the network `x -> logits`.
        robustifier: the network `x -> z`.
        defense: the defender's ball.
        threat: the attack to prepare for.

    Returns:
        A loss for `train.fit` over the parameters of `init`.

    Raises:
        ValueError: where a ball is unusable or the balls have different boxes; their norms may differ.
    """
    check_budget(defense, threat.ball)
    return Partial(_loss, classifier, robustifier, defense, threat)


def _loss(
    classifier: Forward, robustifier: Forward, defense: Ball, threat: Threat,
    params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array,
) -> LossOutput:
    del key
    x_defended = online.apply(robustifier, params["robustifier"], batch["x"], defense=defense)
    return retrained(classifier, params["classifier"], model_state, x_defended, batch["labels"], threat, step)
