"""The defensive perturbation, and what all A5 recipes share.

Frosio & Kautz (2023, "The Best Defense is a Good Offense: Adversarial Augmentation against Adversarial Attacks", A5)
move an input, before anybody attacks it, to where no attack of size `eps_A` can change its class:

    x_D = x + delta_D(z),    ||delta_D|| <= eps_D        Eqs. (4)-(5)
    min_z E(x_D)                                         Eq. (6)

where `E` is the worst-case cross entropy over the ball of radius `eps_A` around `x_D` (Eqs. 2-3, in
`rdx.bounds.worst_case`). The recipes differ in what is optimised: `z` itself (offline), a network that computes `z`
from `x` (online), or that network together with the classifier (joint). As in the authors' code the defended image is
clipped to the box, and bounds start at the defended image: the defender moves in the clear, before the attacker.
"""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rdx import bounds, norms
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.types import Array, LogitsFn, Norm, PyTree

# What a loss builder's Partial returns: (loss, (model_state, metrics)).
LossOutput: TypeAlias = tuple[Array, tuple[PyTree, dict[str, Array]]]


class Forward(Protocol):
    """A network as a function of its parameters, such as `rdx.models.forward(module)`."""

    def __call__(self, params: PyTree, model_state: PyTree, x: Array, *, train: bool) -> tuple[Array, PyTree]:
        """Computes the output and the next state."""
        ...

    def statistics(self, params: PyTree, model_state: PyTree, x: Array) -> PyTree:
        """Computes the state whose inference uses the statistics of the batch `x`."""
        ...

    @property
    def logits_fn(self) -> Callable[[PyTree, PyTree], LogitsFn]:
        """Binds parameters and state into a `LogitsFn` in inference mode."""
        ...


def defend(x: Array, z: Array, ball: Ball) -> Array:
    """Computes the defended input `x_D = clip(x + delta_D(z))`, in ball and box for every `z`.

    linf: `delta_D(z) = 2 eps_D (1 / (1 + e^{-z}) - 1/2)` elementwise (Frosio & Kautz 2023, Eq. 5). l2 and l1:
    `delta_D(z) = eps_D z / (1 + ||z||_p)`, which is 0 at `z = 0` too and reaches every point inside the ball. Clipping
    to the box never leaves the ball, since `x` lies in the box.

    Args:
        x: inputs in the box, shape `[B, ...]`.
        z: unconstrained, shape `[B, ...]`.
        ball: the defender's ball.

    Returns:
        Defended inputs, shape `[B, ...]`.
    """
    lower, upper = ball.limits(x)
    return jnp.clip(x + ball.radius(x) * into_unit_ball(z, ball.norm), lower, upper)


def into_unit_ball(z: Array, norm: Norm) -> Array:
    """Computes `delta_D(z) / eps_D`, which lies inside the unit ball for every `z`; see `defend`."""
    if norm == "linf":
        return jnp.tanh(0.5 * z)  # = 2 (sigmoid(z) - 1/2), and exact at both ends in floating point
    return z / norms.expand(1.0 + norms.norm(z, norm), z)


def out_of_unit_ball(v: Array, norm: Norm) -> Array:
    """Computes the `z` with `into_unit_ball(z) = v`, for `v [B, ...]` with `||v||_p < 1`."""
    if norm == "linf":
        return 2.0 * jnp.arctanh(v)
    return v / norms.expand(1.0 - norms.norm(v, norm), v)


def retrained(
    classifier: Forward, params: PyTree, model_state: PyTree, x_defended: Array, labels: Array, threat: Threat,
    step: Array,
) -> LossOutput:
    """Computes the mean objective of a classifier that is trained on defended inputs.

    BatchNorm, if any, takes the statistics of the defended batch, which enter the bounds as differentiable constants.

    Args:
        classifier: the network `x -> logits`.
        params: its parameters.
        model_state: its state.
        x_defended: where the attacker starts, shape `[B, ...]`.
        labels: shape `[B]`, int.
        threat: the attack to prepare for.
        step: number of updates so far.

    Returns:
        What a loss for `train.fit` returns.
    """
    logits, next_state = classifier(params, model_state, x_defended, train=True)
    logits_fn = classifier.logits_fn(params, classifier.statistics(params, model_state, x_defended))
    loss, metrics = bounds.phased_objective(threat, logits, logits_fn, x_defended, labels, step)
    return loss.mean(), (next_state, summarize(loss, metrics))


def summarize(loss: Array, metrics: dict[str, Array]) -> dict[str, Array]:
    """Averages a per-example loss and its metrics over the batch, for a loop to log."""
    return jax.tree.map(lambda value: value.astype(jnp.float32).mean(), {"loss": loss, **metrics})


def check_budget(defense: Ball, attack: Ball) -> None:
    """Raises where a ball is unusable or attacker and defender do not share a box; their norms may differ.

    Raises:
        ValueError: on an unknown norm, a negative or NaN radius, an empty box, or different boxes, naming both.
    """
    for ball in (defense, attack):
        ball.check(ball.low)  # inputs come later, and the end of the box lies in it
    boxes = (defense.low, defense.high), (attack.low, attack.high)
    if not all(np.array_equal(*ends) for ends in zip(*boxes, strict=True)):
        raise ValueError(f"Defender and attacker have different boxes, {boxes[0]} and {boxes[1]}: give both the same.")
