"""Certified training: interval bound propagation, CROWN-IBP, and the mixture that A5 trains with.

At radius `eps` of `eps_max`, `f = (eps_max - eps) / eps_max` falls from 1 to 0 and weighs both mixtures:

    lower = f * CROWN-IBP + (1 - f) * IBP                 lower bounds of the margins z_y - z_j
    loss  = kappa * CE(f(x), y) + (1 - kappa) * worst-case CE(lower),      kappa = f + kappa_end (1 - f)

Source: Zhang et al. (2020, CROWN-IBP, arXiv:1906.06316, Sec. 3.2), with the schedules of Frosio & Kautz (2023, A5).
With BatchNorm, statistics come from the clean batch and enter the bounds as differentiable constants. The bounds start
from any initialisation; while `eps` is 0 they are exact, so flax's default one serves.
"""

import dataclasses

import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import bounds, losses, margins
from rdx.balls import Ball, Region
from rdx.models import Forward
from rdx.train import standard
from rdx.train.loop import Phase
from rdx.train.schedules import Ramp
from rdx.types import Array, ArrayLike, Key, PyTree


def mixed(forward: Forward, ball: Ball, *, eps: Ramp, kappa_end: ArrayLike = 0.0) -> Partial:
    """Builds the loss with both mixtures, of bounds and of objectives.

    CROWN-IBP uses the lower relaxation of ReLU with the upper one's slope, as A5 does, and is not intersected with
    IBP, so that the mixture is linear in both.

    Args:
        forward: the model, from `models.forward`.
        ball: the perturbations; its radius is replaced by the ramp's.
        eps: the radius at each step.
        kappa_end: weight of the clean loss at the final radius, in [0, 1].

    Returns:
        A loss for `train.fit` with metrics `loss`, `clean_loss`, `certified_loss`, `error`, `certified_error` (by IBP),
        `eps` and `kappa`.
    """
    return Partial(_certified, Partial(_mixed_lower), forward, ball, eps, kappa_end)


def ibp(forward: Forward, ball: Ball, *, eps: Ramp, kappa_end: ArrayLike = 0.0) -> Partial:
    """Builds the loss with interval bounds alone (Gowal et al. 2018, arXiv:1810.12715); see `mixed`.

    At the final radius it equals `mixed` and is cheaper.

    Args:
        forward: the model, from `models.forward`.
        ball: the perturbations; its radius is replaced by the ramp's.
        eps: the radius at each step.
        kappa_end: weight of the clean loss at the final radius, in [0, 1].

    Returns:
        A loss for `train.fit` with the metrics of `mixed`.
    """
    return Partial(_certified, Partial(_ibp_lower), forward, ball, eps, kappa_end)


def phases(forward: Forward, ball: Ball, *, eps: Ramp, kappa_end: ArrayLike = 0.0) -> tuple[Phase, Phase, Phase]:
    """Builds the phases that train as `mixed` does and compute no more than they must.

    No bounds while the radius is 0, both while it rises, intervals alone at the final radius.

    Args:
        forward: the model, from `models.forward`.
        ball: the perturbations; its radius is replaced by the ramp's.
        eps: the radius at each step.
        kappa_end: weight of the clean loss at the final radius, in [0, 1].

    Returns:
        Phases for `train.fit`.
    """
    return (
        Phase(int(eps.start) + 1, standard.cross_entropy(forward)),
        Phase(int(eps.end), mixed(forward, ball, eps=eps, kappa_end=kappa_end)),
        Phase(None, ibp(forward, ball, eps=eps, kappa_end=kappa_end)),
    )


def _certified(
    mix: Partial, forward: Forward, ball: Ball, eps: Ramp, kappa_end: ArrayLike,
    params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array,
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    del key
    x, labels = batch["x"], batch["labels"]
    radius = eps(step)
    share = 1.0 - radius / jnp.maximum(jnp.asarray(eps.eps, jnp.float32), jnp.finfo(jnp.float32).tiny)
    kappa = share + jnp.asarray(kappa_end, jnp.float32) * (1.0 - share)
    logits, next_state = forward(params, model_state, x, train=True)
    margins_fn = margins.of(forward.logits_fn(params, forward.statistics(params, model_state, x)))
    region = dataclasses.replace(ball, eps=radius).region(x)
    interval_lower = bounds.ibp(margins_fn, region, labels).lower
    lower = mix(share, interval_lower, margins_fn, region, labels)
    clean_loss = standard.batch_mean(losses.cross_entropy(logits, labels), batch)
    certified_loss = standard.batch_mean(losses.worst_case_cross_entropy(lower), batch)
    loss = kappa * clean_loss + (1.0 - kappa) * certified_loss
    return loss, (next_state, {
        "loss": loss,
        "clean_loss": clean_loss,
        "certified_loss": certified_loss,
        "error": standard.batch_mean(losses.is_wrong(logits, labels), batch),
        "certified_error": standard.batch_mean((interval_lower <= 0.0).any(axis=1), batch),
        "eps": radius,
        "kappa": kappa,
    })


def _ibp_lower(share: Array, interval_lower: Array, margins_fn: Partial, region: Region, labels: Array) -> Array:
    del share, margins_fn, region, labels
    return interval_lower


def _mixed_lower(share: Array, interval_lower: Array, margins_fn: Partial, region: Region, labels: Array) -> Array:
    linear_lower = bounds.crown_ibp(
        margins_fn, region, labels, relu_lower=bounds.relaxations.same_slope, intersect=False
    ).lower
    return share * linear_lower + (1.0 - share) * interval_lower
