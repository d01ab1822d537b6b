"""SABR (Mueller et al. 2023, arXiv:2210.04871): interval bounds over a small box at an adversarial point.

Bounds over the whole box regularise more than robustness needs. SABR bounds only a box of radius `tau = lambda eps`
around a point that an attack found, inside of the whole box: less than a proof, more than an attack.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses
from rdx.balls import Ball, Region
from rdx.compilation import as_partial
from rdx.models import Forward
from rdx.train import phased
from rdx.train.phased import Penalty, Robust, Stage
from rdx.train.schedules import Ramp
from rdx.types import ArrayLike, AttackResult


def sabr(
    forward: Forward, ball: Ball, *, eps: Ramp, subselection: ArrayLike = 0.4,
    attack: Callable[..., AttackResult] = phased.PGD, kappa_end: ArrayLike = 0.0, penalties: Sequence[Penalty] = (),
) -> Partial:
    """Builds the loss `E` of interval bounds over the `small_box` of radius `lambda eps` at an adversarial point.

    With `lambda = 1` it is IBP, with `lambda = 0` adversarial training. Source: Mueller et al. (2023, arXiv:2210.04871,
    Sec. 3).

    Args:
        forward: the model, from `models.forward`.
        ball: the perturbations, of norm linf; its radius is replaced by the ramp's.
        eps: the radius at each step.
        subselection: `lambda` in [0, 1]; 0.4 for MNIST at 0.1 and 0.6 at 0.3, 0.1 for CIFAR-10 at 2/255 in the paper.
        attack: `(key, logits_fn, x, labels, *, ball, index) -> AttackResult`, its settings bound.
        kappa_end: weight of the clean loss at the final radius; at radius 0 it is 0.
        penalties: what is added to the mean loss; the paper has `penalties.of_bounds` while the radius rises, and
            `penalties.l1` throughout, 1e-5 for MNIST at 0.1.

    Returns:
        A loss for `train.fit` with the metrics of `phased.objective` and `box_error`: the share of examples that
        intervals do not certify in their small boxes.

    Raises:
        ValueError: where `subselection` is not a share, or the norm is not linf.
    """
    check_box(ball, subselection)
    robust = Partial(_sabr, as_partial(attack), subselection)
    return phased.objective(forward, ball, robust, eps=eps, kappa_end=kappa_end, penalties=penalties)


def small_box(attack: Callable[..., AttackResult], subselection: ArrayLike, stage: Stage) -> Region:
    """Finds the small box of each example: `x' = clip(attacked, l + tau, u - tau)` in the whole box `[l, u]`.

    `tau` is `lambda eps`, or half of the whole box where the image's range leaves no more, as in the authors' code with
    `dimwise_scaling`: every small box lies in the whole one and is as wide as asked.

    Args:
        attack: as in `sabr`; it has the whole ball.
        subselection: `lambda`.
        stage: the step of training.

    Returns:
        The region `[x' - tau, x' + tau]`.
    """
    whole = stage.ball.region(stage.x)
    tau = jnp.minimum(subselection * jnp.asarray(stage.ball.eps), 0.5 * (whole.upper - whole.lower))
    center = jnp.clip(stage.attacked(attack), whole.lower + tau, whole.upper - tau)
    return Region(center, tau, center - tau, center + tau, "linf")


def check_box(ball: Ball, subselection: ArrayLike) -> None:
    """Raises where there is no small box inside of the ball.

    Raises:
        ValueError: naming what to give instead.
    """
    phased.check_share("subselection", subselection)
    if ball.norm != "linf":
        raise ValueError(f"Small boxes lie in balls of norm linf, not {ball.norm}: give Ball('linf', ...).")


def _sabr(attack: Partial, subselection: ArrayLike, stage: Stage) -> Robust:
    small = stage.within(small_box(attack, subselection, stage))
    lower = small.intervals.output.lower
    return Robust(losses.worst_case_cross_entropy(lower), {"box_error": ~(lower > 0).all(axis=1)}, small)
