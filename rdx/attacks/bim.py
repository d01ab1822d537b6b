"""The basic iterative method (Kurakin et al. 2017, arXiv:1607.02533)."""

import jax
import jax.numpy as jnp

from rdx.attacks import driver
from rdx.attacks.pgd import pgd
from rdx.balls import Ball
from rdx.goals import Goal
from rdx.types import ArrayLike, AttackResult, LogitsFn


def bim(
    logits_fn: LogitsFn, x: ArrayLike, labels: ArrayLike, *, ball: Ball, goal: Goal | None = None,
    num_steps: int = 10, step_size: ArrayLike | None = None, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Climbs the loss from the clean input: `x_{k+1} = P(x_k + s * u(grad loss(x_k)))`, `x_0 = x`.

    It is projected gradient descent without a random start; see `rdx.attacks.pgd.pgd` for `P` and `u`.

    Source: Kurakin, Goodfellow & Bengio (2017, arXiv:1607.02533, Sec. 2.2). The default step is that of RealSafe (Dong
    et al. 2020, arXiv:1912.11852), since the paper's, 1 / 255 in `min(255 eps + 4, 1.25 * 255 eps)` steps, is tied to
    8-bit images. Difference: the strongest input seen is returned, where the paper returns the last.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        goal: what is maximised and what counts as success; `goals.misclassify()` by default.
        num_steps: number of steps.
        step_size: length of a step in the ball's norm, in input units, shaped as `Ball.eps` may be;
            `1.5 * eps / num_steps` by default.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result: 2 forward passes, `num_steps` gradients.

    Raises:
        ValueError: on unusable inputs or NaN logits.
    """
    unused = jax.random.key(0)
    size = 1.5 / num_steps * jnp.asarray(ball.eps) if step_size is None else step_size
    return pgd(
        unused, logits_fn, x, labels, ball=ball, goal=goal, num_steps=num_steps, step_size=size, random_start=False,
        loop=loop,
    )
