"""The objective that certified training and A5 share: the worst-case cross entropy of certified margins, phased in.

While the radius `eps` of the attack rises to `eps_max`, the share `f = (eps_max - eps) / eps_max` falls from 1 to 0:

    m    = f * CROWN-IBP + (1 - f) * IBP                      lower bounds of the margins z_y - z_j
    E    = log(1 + sum_{j != y} exp(-m_j))                    Frosio & Kautz (2023, A5, Eqs. 2-3)
    loss = kappa CE(z, y) + (1 - kappa) E,                    kappa = kappa_start f + kappa_end (1 - f)

Source: Zhang et al. (2020, CROWN-IBP, arXiv:1906.06316, Sec. 3.2); that one share drives both mixtures is what A5's
released code does.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rdx import losses, margins
from rdx.balls import Ball, Region
from rdx.bounds import relaxations
from rdx.bounds.crown import crown_ibp
from rdx.bounds.ibp import ibp
from rdx.bounds.interval import Interval
from rdx.types import Array, ArrayLike, LogitsFn, PyTree


class WorstCase(NamedTuple):
    """What bounds say of a batch while training.

    Attributes:
        loss: the worst-case cross entropy, shape `[B]`.
        is_certified: every margin is positive by `method`'s bounds, without allowance for rounding. Shape `[B]`, bool.
    """

    loss: Array
    is_certified: Array


class Moment(NamedTuple):
    """The attack at one step of training.

    Attributes:
        ball: the attacker's ball at this step's radius.
        share: `f = (eps_max - eps) / eps_max`, a scalar.
        kappa: weight of the clean loss, a scalar.
    """

    ball: Ball
    share: Array
    kappa: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threat:
    """The attack that training prepares for.

    Attributes:
        ball: the attacker's ball; its radius is replaced by the ramp's.
        eps: a ramp `step -> radius` with its final value in the field `eps`, from `train.schedules`.
        kappa_end: weight of the clean loss at the final radius, in [0, 1].
        has_crown: whether bounds mix CROWN-IBP in; at the final radius its share is 0 and it can be left out.
        kappa_start: weight of the clean loss at radius 0.
        method: `(fn, region, *args) -> Interval`, the bounds that stand where the formulas say IBP: another method of
            `rdx.bounds`, or those of a Lipschitz constant; one function object, since it is compiled with.
    """

    ball: Ball
    eps: PyTree
    kappa_end: ArrayLike = 0.0
    has_crown: bool = dataclasses.field(default=True, metadata={"static": True})
    kappa_start: ArrayLike = 1.0
    method: Callable[..., Interval] = dataclasses.field(default=ibp, metadata={"static": True})

    def at(self, step: Array) -> Moment:
        """Computes radius and weights after `step` updates."""
        eps = self.eps(step)
        share = 1.0 - eps / jnp.maximum(jnp.asarray(self.eps.eps, jnp.float32), jnp.finfo(jnp.float32).tiny)
        start, end = (jnp.asarray(kappa, jnp.float32) for kappa in (self.kappa_start, self.kappa_end))
        return Moment(dataclasses.replace(self.ball, eps=eps), share, start * share + end * (1.0 - share))


def worst_case(
    logits_fn: LogitsFn, region: Region, labels: Array, *, crown_share: Array | None = None,
    method: Callable[..., Interval] = ibp,
) -> WorstCase:
    """Computes `E(x) = log(1 + sum_{j != y} exp(-m_j))` for lower bounds `m_j` of the margins over a region.

    The bounds are `crown_share * CROWN-IBP + (1 - crown_share) * IBP`. CROWN-IBP takes the upper line's slope for the
    lower line of relu, as A5 does, and is not intersected with IBP, so that the mixture is linear in both.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        region: the perturbed inputs.
        labels: shape `[B]`, int.
        crown_share: weight of CROWN-IBP in [0, 1]; None for intervals alone (Gowal et al. 2018, arXiv:1810.12715).
        method: what bounds by in place of IBP.

    Returns:
        Loss and certificates.
    """
    margins_fn = margins.of(logits_fn)
    method_lower = method(margins_fn, region, labels).lower
    lower = method_lower
    if crown_share is not None:
        slope = relaxations.same_slope
        linear_lower = crown_ibp(margins_fn, region, labels, relu_lower=slope, intersect=False).lower
        lower = crown_share * linear_lower + (1.0 - crown_share) * method_lower
    return WorstCase(losses.worst_case_cross_entropy(lower), (method_lower > 0.0).all(axis=1))


def phased_objective(
    threat: Threat, logits: Array, logits_fn: LogitsFn, x: Array, labels: Array, step: Array
) -> tuple[Array, dict[str, Array]]:
    """Computes `kappa CE(z, y) + (1 - kappa) E` at the radius of this step; see the formulas above.

    Args:
        threat: the attack and its schedule.
        logits: the clean logits, shape `[B, K]`.
        logits_fn: the same classifier as a function, for the bounds.
        x: where the attacker starts, shape `[B, ...]`; for A5 that is the defended input.
        labels: shape `[B]`, int.
        step: number of updates so far.

    Returns:
        Loss `[B]` and metrics: `clean_loss`, `certified_loss`, `error`, `certified_error` (by the threat's
        method), each `[B]`, and the scalars `eps` and `kappa`.
    """
    ball, share, kappa = threat.at(step)
    crown_share = share if threat.has_crown else None
    worst = worst_case(logits_fn, ball.region(x), labels, crown_share=crown_share, method=threat.method)
    clean_loss = losses.cross_entropy(logits, labels)
    loss = kappa * clean_loss + (1.0 - kappa) * worst.loss
    return loss, {
        "clean_loss": clean_loss, "certified_loss": worst.loss, "error": losses.is_wrong(logits, labels),
        "certified_error": ~worst.is_certified, "eps": jnp.asarray(ball.eps), "kappa": kappa,
    }
