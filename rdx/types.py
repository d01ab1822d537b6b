"""Names that every room shares; no logic.

In shape descriptions `B` is the batch axis and `K` the number of classes. Images lie in [0, 1] and any normalisation
belongs inside the model.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.typing.ArrayLike
Key: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Norm: TypeAlias = Literal["linf", "l2", "l1"]

# x [B, ...] -> logits [B, K]; pure, in inference mode, examples independent.
LogitsFn: TypeAlias = Callable[[Array], Array]
# keys [B], x [B, ...] -> logits [B, K]
RandomLogitsFn: TypeAlias = Callable[[Key, Array], Array]
# x [B, ...] -> (logits [B, K], score [B]); an input is rejected where its score exceeds a threshold.
Detector: TypeAlias = Callable[[Array], tuple[Array, Array]]
# logits [B, K], labels [B] -> loss [B]; higher is worse for the model.
LossFn: TypeAlias = Callable[[Array, Array], Array]


class Trace(NamedTuple):
    """The strongest input so far after each step of an attack, `T` steps in all, restart after restart.

    Attributes:
        success: whether the goal is reached. Shape `[T, B]`, bool.
        loss: the goal's loss. Shape `[T, B]`.
        distance: norm of the perturbation in the ball's norm. Shape `[T, B]`.
        forwards: forward passes spent until then. Shape `[T, B]`, int32.
        gradients: gradient evaluations spent until then. Shape `[T, B]`, int32.
    """

    success: Array
    loss: Array
    distance: Array
    forwards: Array
    gradients: Array


class AttackResult(NamedTuple):
    """What an attack found, example by example.

    Attributes:
        x_adv: the strongest input seen, always in the ball and the box. Shape `[B, ...]`.
        success: whether the goal is reached at `x_adv`. Shape `[B]`, bool.
        distance: norm of `x_adv - x` in the ball's norm. Shape `[B]`.
        loss: the goal's loss at `x_adv`. Shape `[B]`.
        forwards: forward passes spent. Shape `[B]`, int32.
        gradients: gradient evaluations spent (each one forward and one backward pass, not counted in `forwards`).
            Shape `[B]`, int32.
        trace: the course of the attack, where it was asked for.
    """

    x_adv: Array
    success: Array
    distance: Array
    loss: Array
    forwards: Array
    gradients: Array
    trace: Trace | None = None
