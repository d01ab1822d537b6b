"""Adversarial training (Madry et al. 2018, arXiv:1706.06083): training on what an attack makes of each batch."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import attacks, compilation, losses
from rdx.balls import Ball
from rdx.models import Forward
from rdx.train import standard
from rdx.train.schedules import Ramp
from rdx.types import Array, AttackResult, Key, PyTree

# The attack of the paper's CIFAR-10 nets; those for MNIST were trained with 40 steps.
PGD = functools.partial(attacks.pgd, num_steps=7)


def cross_entropy(
    forward: Forward, ball: Ball, *, eps: Ramp | None = None, attack: Callable[..., AttackResult] = PGD
) -> Partial:
    """Builds the loss `mean_i CE(f(A(x_i)), y_i)`, in which the attack `A` looks for `argmax_{z in B(x)} CE(f(z), y)`.

    The attack runs inside of the training step, under its `jit`, where iterations become a compiled loop. XLA's CPU
    backend is slow in such loops: there an attack with `loop=attacks.Loop(kind="host")`, which unrolls, is faster.

    Source: Madry et al. (2018, arXiv:1706.06083, Eq. 2.1). Differences: the attack gives the strongest input that it
    saw, where the paper's takes the last one. With BatchNorm it attacks the net normalised by the clean batch's
    statistics, in which examples are independent; the loss is that of the attacked batch with its own statistics.

    Args:
        forward: the model, from `models.forward`.
        ball: the threat model.
        eps: the radius at each step; that of `ball` throughout by default.
        attack: `(key, logits_fn, x, labels, *, ball, index) -> AttackResult`, its settings bound with
            `functools.partial`; one such object is compiled once.

    Returns:
        A loss for `train.fit` with the metrics `loss`, `adversarial_error` and `eps`.
    """
    return Partial(_adversarial, forward, compilation.as_partial(attack), ball, eps)


def _adversarial(
    forward: Forward, attack: Partial, ball: Ball, eps: Ramp | None, params: PyTree, model_state: PyTree, key: Key,
    batch: PyTree, step: Array,
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    x, labels = batch["x"], batch["labels"]
    ball = ball if eps is None else dataclasses.replace(ball, eps=eps(step))
    # Stopped before the attack and not after it: nothing of its course is differentiated by the parameters.
    fixed = jax.lax.stop_gradient(params)
    logits_fn = forward.logits_fn(fixed, forward.statistics(fixed, model_state, x))
    x_adv = attack(key, logits_fn, x, labels, ball=ball, index=batch.get("index")).x_adv
    logits, model_state = forward(params, model_state, x_adv, train=True)
    loss = standard.batch_mean(losses.cross_entropy(logits, labels), batch)
    error = standard.batch_mean(losses.is_wrong(logits, labels), batch)
    radius = jnp.asarray(ball.eps, jnp.float32).mean()
    return loss, (model_state, {"loss": loss, "adversarial_error": error, "eps": radius})
