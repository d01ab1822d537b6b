"""What an attack wants: a loss to maximise and a predicate that says when the goal is reached.

A goal is a pytree whose callables are `jax.tree_util.Partial`s, so that compiled loops are cached. Any output of a
model can be attacked: `Goal(Partial(my_loss), Partial(my_success))`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses
from rdx.types import Array, LossFn, PyTree


class Goal(NamedTuple):
    """An attack's goal over the model's output.

    Attributes:
        loss_fn: `(output, labels [B], *data) -> [B]`, maximised by the attack.
        success_fn: `(output, labels [B], *data) -> bool [B]`.
        data: what else differs from example to example, such as targets; every leaf has the batch axis first. Leaves of
            the callables themselves belong to all examples.
    """

    loss_fn: Partial
    success_fn: Partial
    data: tuple[PyTree, ...] = ()

    def loss(self, output: PyTree, labels: Array) -> Array:
        """Computes each example's loss, shape `[B]`, from the model's output, such as logits `[B, K]`."""
        return self.loss_fn(output, labels, *self.data)

    def success(self, output: PyTree, labels: Array) -> Array:
        """Tells where the goal is reached, shape `[B]`, bool."""
        return self.success_fn(output, labels, *self.data)

    def check(self, num: int) -> None:
        """Raises where the data are not those of `num` examples.

        Raises:
            ValueError: naming the shapes.
        """
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(self.data)]
        if any(shape[:1] != (num,) for shape in shapes):
            raise ValueError(f"The goal's data have shapes {shapes}: give each of the {num} examples its own.")


def misclassify(loss: LossFn = losses.cross_entropy) -> Goal:
    """Builds the untargeted goal: any label but the true one.

    Args:
        loss: the per-example loss to climb, `(logits, labels) -> [B]`.

    Returns:
        The goal; NaN logits count as success.
    """
    return Goal(Partial(loss), Partial(losses.is_wrong))


def target(targets: Array, loss: LossFn = losses.targeted_cross_entropy) -> Goal:
    """Builds the targeted goal: the model predicts `targets`.

    Args:
        targets: the wanted labels, shape `[B]`, int.
        loss: `(logits, targets) -> [B]`, rising towards the target.

    Returns:
        The goal.
    """
    return Goal(Partial(_towards, Partial(loss)), Partial(_hits), (jnp.asarray(targets),))


def majority(flags: Array, axis: int) -> Array:
    """Tells whether more than half of the flags along an axis are true."""
    return 2 * flags.sum(axis=axis) > flags.shape[axis]


def expected(goal: Goal, reduction: Callable[..., Array] = majority) -> Goal:
    """Lifts a goal to models that answer several times: `loss = mean_s loss(output[:, s])`.

    The answers are the draws of a random model (`attacks.eot`, whose gradient is then that of the expected loss) or
    those of the members of an ensemble (`attacks.ensemble`).

    Source: Athalye et al. (2018, arXiv:1802.00420, Sec. 4.2); Liu et al. (2017, arXiv:1611.02770) for ensembles.

    Args:
        goal: the goal for one answer.
        reduction: `(flags [B, S], axis=1) -> [B]`, when the goal counts as reached; more than half of the answers
            (`majority`) by default, `jnp.all` for every one, `jnp.any` for one at least.

    Returns:
        The goal for outputs that have the axis of answers second, such as logits `[B, S, K]`.
    """
    answers = (Partial(_mean_over_answers, goal.loss_fn), Partial(_over_answers, goal.success_fn, Partial(reduction)))
    return Goal(*answers, goal.data)


def _each_answer(fn: Partial, output: PyTree, labels: Array, *data: PyTree) -> Array:
    return jax.vmap(lambda answer: fn(answer, labels, *data), in_axes=1, out_axes=1)(output)


def _mean_over_answers(loss: Partial, output: PyTree, labels: Array, *data: PyTree) -> Array:
    return _each_answer(loss, output, labels, *data).mean(axis=1)


def _over_answers(success: Partial, reduction: Partial, output: PyTree, labels: Array, *data: PyTree) -> Array:
    return reduction(_each_answer(success, output, labels, *data), axis=1)


def _towards(loss: Partial, logits: Array, labels: Array, targets: Array) -> Array:
    del labels
    return loss(logits, targets)


def _hits(logits: Array, labels: Array, targets: Array) -> Array:
    del labels
    return (logits.argmax(axis=1) == targets) & ~jnp.isnan(logits).any(axis=1)
