"""A5/P, A5/PC and A5/PRC: the object itself is changed, so that its pictures cannot be attacked.

Paper: Frosio & Kautz (2023, A5, Sec. 3, "Offline physical robustification with (A5/PC) and without (A5/P) retraining
C", Eqs. 10-11). The defender moves a prototype `w` to `w_D = clip(w + delta_D(z))` once, before it is printed. The
attacker moves the picture `A(w_D)` of it, so boxes of bounds surround pictures; `A` is `rdx.robustify.acquisition`, a
new draw for every picture, and gradients reach `z` through it.

    A5/P     z is optimised, the classifier stays as it is           `prototypes`
    A5/PC    z and the classifier are                                `with_classifier`
    A5/PRC   z, the classifier and a robustifier are                 `with_robustifier`

The paper only names A5/PRC. Here it is A5/RC behind the camera: the robustifier sees the picture, not the prototype and
no label, and moves it within a ball of its own before the attacker does,

    x_D = clip(x + delta_D(R(x))),    x = A(w_D).

Batches hold prototypes `x [B, H, W, C]`, `labels [B]`, `row [B]`, the `z` that a prototype owns, and `index [B]`, the
number of the picture; a prototype may occur many times in a batch, each time in another picture.
"""

from jax.tree_util import Partial

from rdx import bounds
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.robustify import offline, online
from rdx.robustify.acquisition import Camera, acquire
from rdx.robustify.objective import Forward, LossOutput, check_budget, retrained, summarize
from rdx.types import Array, ArrayLike, Key, LogitsFn, PyTree


def init(
    num_prototypes: int, shape: tuple[int, ...], *, classifier: PyTree | None = None, robustifier: PyTree | None = None
) -> PyTree:
    """Builds the parameters `{"z": zeros [N, ...]}`, with `"classifier"` and `"robustifier"` where they are given.

    Args:
        num_prototypes: how many there are.
        shape: of one.
        classifier: parameters to start from, for A5/PC and A5/PRC.
        robustifier: parameters to start from, for A5/PRC.

    Returns:
        The parameters; at first no prototype is moved.
    """
    networks = {"classifier": classifier, "robustifier": robustifier}
    given = {name: params for name, params in networks.items() if params is not None}
    return {**offline.init(num_prototypes, shape), **given}


def prototypes(logits_fn: LogitsFn, camera: Camera, *, defense: Ball, threat: Threat) -> Partial:
    """Builds the loss of A5/P, `(1/N) sum_x E(A(w + delta_D(z)))`, minimised over `z` with the classifier frozen.

    Args:
        logits_fn: the frozen classifier of pictures, a `Partial` so that its parameters are arguments.
        camera: takes the pictures.
        defense: the defender's ball around a prototype.
        threat: the attack on pictures to prepare for.

    Returns:
        A loss for `train.fit` over the parameters of `init`.

    Raises:
        ValueError: where the balls have different boxes.
    """
    check_budget(defense, threat.ball)
    return Partial(_prototypes, logits_fn, camera, defense, threat)


def with_classifier(classifier: Forward, camera: Camera, *, defense: Ball, threat: Threat) -> Partial:
    """Builds the loss of A5/PC, `(1/N) sum_x E(A(w + delta_D(z)))`, minimised over `z` and the classifier (Eq. 11).

    The loop's `model_state` is the classifier's. Its BatchNorm, if any, takes the statistics of the batch of pictures.

    Args:
        classifier: the network `picture -> logits`.
        camera: takes the pictures.
        defense: the defender's ball around a prototype.
        threat: the attack on pictures to prepare for.

    Returns:
        A loss for `train.fit` over the parameters of `init` with a classifier.

    Raises:
        ValueError: where the balls have different boxes.
    """
    check_budget(defense, threat.ball)
    return Partial(_with_classifier, classifier, camera, defense, threat)


def with_robustifier(
    classifier: Forward, robustifier: Forward, camera: Camera, *, defense: Ball, defense_picture: Ball, threat: Threat
) -> Partial:
    """Builds the loss of A5/PRC, minimised over `z`, the robustifier of pictures and the classifier.

    The loop's `model_state` is the classifier's, as in `with_classifier`.

    Args:
        classifier: the network `picture -> logits`.
        robustifier: the network `picture -> z`.
        camera: takes the pictures.
        defense: the defender's ball around a prototype.
        defense_picture: the defender's ball around a picture.
        threat: the attack on defended pictures to prepare for.

    Returns:
        A loss for `train.fit` over the parameters of `init` with a classifier and a robustifier.

    Raises:
        ValueError: where the balls have different boxes.
    """
    check_budget(defense, threat.ball)
    check_budget(defense_picture, threat.ball)
    return Partial(_with_robustifier, classifier, robustifier, camera, defense, defense_picture, threat)


def apply(
    key: Key, params: PyTree, w: Array, rows: Array, camera: Camera, *, defense: Ball, index: ArrayLike | None = None
) -> Array:
    """Takes pictures of robustified prototypes, `A(clip(w + delta_D(z)))`.

    Args:
        key: a random key.
        params: with the optimised `"z"`.
        w: prototypes, shape `[B, H, W, C]`.
        rows: the `z` that each owns, shape `[B]`, int.
        camera: takes the pictures.
        defense: the defender's ball around a prototype.
        index: numbers of the pictures, shape `[B]`, int; `0..B-1` by default.

    Returns:
        Pictures, shape `[B, H, W, camera.num_channels]`.
    """
    return acquire(key, offline.apply(params, w, rows, defense=defense), camera, index=index)


def _pictures(key: Key, params: PyTree, batch: PyTree, camera: Camera, defense: Ball) -> Array:
    return apply(key, params, batch["x"], batch["row"], camera, defense=defense, index=batch["index"])


def _prototypes(
    logits_fn: LogitsFn, camera: Camera, defense: Ball, threat: Threat,
    params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array,
) -> LossOutput:
    x = _pictures(key, params, batch, camera, defense)
    loss, metrics = bounds.phased_objective(threat, logits_fn(x), logits_fn, x, batch["labels"], step)
    return loss.mean(), (model_state, summarize(loss, metrics))


def _with_classifier(
    classifier: Forward, camera: Camera, defense: Ball, threat: Threat,
    params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array,
) -> LossOutput:
    x = _pictures(key, params, batch, camera, defense)
    return retrained(classifier, params["classifier"], model_state, x, batch["labels"], threat, step)


def _with_robustifier(
    classifier: Forward, robustifier: Forward, camera: Camera, defense: Ball, defense_picture: Ball, threat: Threat,
    params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array,
) -> LossOutput:
    x = _pictures(key, params, batch, camera, defense)
    x_defended = online.apply(robustifier, params["robustifier"], x, defense=defense_picture)
    return retrained(classifier, params["classifier"], model_state, x_defended, batch["labels"], threat, step)
