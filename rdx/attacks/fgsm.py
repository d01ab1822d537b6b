"""The fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572)."""

import jax

from rdx.attacks.pgd import pgd
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import ArrayLike, AttackResult, LogitsFn


def fgsm(
    logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
) -> AttackResult:
    """Takes one step of full length along the gradient: `x_adv = P(x + eps * u(grad loss(x)))`.

    `u` is the sign for linf, the method of the paper, and the steepest direction of the norm for l2 and l1. It is the
    first step of projected gradient descent from the clean input; where that step does not gain, the clean input is
    returned, because the strongest input seen is.

    Source: Goodfellow, Shlens & Szegedy (2015, arXiv:1412.6572, Sec. 4).

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        goal: what is maximised and what counts as success; `goals.misclassify()` by default.

    Returns:
        The attack's result: two forward passes (the clean input and the step), one gradient.

    Raises:
        ValueError: on unusable inputs or NaN logits.
    """
    unused = jax.random.key(0)
    return pgd(
        unused, logits_fn, x, labels, ball=ball, goal=goal, num_steps=1, step_size=ball.eps, random_start=False
    )
