"""Unadversarial examples: the perturbation that makes the classifier surest of the true label.

Salman et al. (2021, "Unadversarial Examples: Designing Objects for Robust Vision", arXiv:2012.12235) turn the sign of
an attack: they minimise the loss over what is put on an object, with no attacker in mind. A baseline that the paper of
A5 names: it tells what is gained by looking at the worst case.

Differences from the paper: one perturbation for each image instead of one patch or texture for all images of a class;
projected steps of any norm instead of sign steps on the pixels of the patch; no random transformations of the object,
which are a matter of `logits_fn` (`attacks.eot`).
"""

import jax.numpy as jnp

from rdx import goals
from rdx.attacks.pgd import pgd
from rdx.balls import Ball
from rdx.types import Array, ArrayLike, Key, LogitsFn


def unadversarial(
    key: Key, logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, defense: Ball, num_steps: int = 40,
    step_size: ArrayLike | None = None, index: ArrayLike | None = None,
) -> Array:
    """Minimises the clean loss over the defender's ball, `x_D ~ argmin_{||x_D - x|| <= eps_D} CE(f(x_D), y)`.

    `x_{k+1} = P(x_k + s * u(-grad CE(x_k)))` from a random point of the ball: PGD with the true label as its target
    (`rdx.attacks.pgd`). The best input seen is returned: a right prediction first, then the lowest loss. A patch is a
    ball with radius 1 under the patch and 0 elsewhere, `Ball("linf", jnp.where(mask, 1.0, 0.0))`.

    Source: Salman et al. (2021, arXiv:2012.12235); see the module for the differences.

    Args:
        key: one key; example `i` uses it folded with `index[i]`.
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: inputs in the box, shape `[B, ...]`.
        labels: true labels, shape `[B]`, int.
        defense: the defender's ball, of any norm.
        num_steps: number of steps.
        step_size: length of a step in the ball's norm, in input units; `2.5 * eps_D / num_steps` by default.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.

    Returns:
        Defended inputs in ball and box, shape `[B, ...]`.

    Raises:
        ValueError: on unusable inputs, labels or balls, or NaN logits.
    """
    goal = goals.target(jnp.asarray(labels))
    return pgd(
        key, logits_fn, x, labels, ball=defense, goal=goal, index=index, num_steps=num_steps, step_size=step_size
    ).x_adv
