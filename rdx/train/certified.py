"""Certified training: interval bound propagation, CROWN-IBP with and without loss fusion, and A5's mixture of both.

`mixed` and `ibp` minimise `bounds.phased_objective`, whose formulas are in `rdx.bounds.worst_case`: while the radius
rises, CROWN-IBP gives way to intervals and the clean loss to the certified one. Source: Zhang et al. (2020, CROWN-IBP,
arXiv:1906.06316, Sec. 3.2), with the schedules of Frosio & Kautz (2023, A5). With BatchNorm, statistics come from the
clean batch and enter the bounds as differentiable constants. The bounds start from any initialisation; while `eps` is 0
they are exact, so flax's default one serves.
"""

from collections.abc import Callable

from jax.tree_util import Partial

from rdx import bounds
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.models import Forward
from rdx.train import phased, standard
from rdx.train.loop import Phase
from rdx.train.phased import Robust, Stage
from rdx.train.schedules import Ramp
from rdx.types import Array, ArrayLike, Key, PyTree


def mixed(forward: Forward, ball: Ball, *, eps: Ramp, kappa_end: ArrayLike = 0.0) -> Partial:
    """Builds the loss with both mixtures, of bounds and of objectives.

    Args:
        forward: the model, from `models.forward`.
        ball: the perturbations; its radius is replaced by the ramp's.
        eps: the radius at each step.
        kappa_end: weight of the clean loss at the final radius, in [0, 1].

    Returns:
        A loss for `train.fit` with the metrics `loss` and those of `bounds.phased_objective`, averaged over the batch.
    """
    return Partial(_certified, forward, Threat(ball, eps, kappa_end))


def ibp(forward: Forward, ball: Ball, *, eps: Ramp, kappa_end: ArrayLike = 0.0) -> Partial:
    """Builds the loss with interval bounds alone (Gowal et al. 2018, arXiv:1810.12715).

    At the final radius it equals `mixed` and is cheaper. Arguments and metrics are those of `mixed`.
    """
    return Partial(_certified, forward, Threat(ball, eps, kappa_end, has_crown=False))


def fused(forward: Forward, ball: Ball, *, eps: Ramp, kappa_end: ArrayLike = 0.0) -> Partial:
    """Builds the loss of `mixed` with CROWN-IBP's part bounded by loss fusion, one backward row instead of `K - 1`.

    With the share `f` of `bounds.worst_case`, the certified loss is `bounds.fused_cross_entropy(..., crown_share=f)`.

    Source: Xu et al. (2020, auto_LiRPA, arXiv:2002.12920). At the final radius it equals `mixed`. Arguments are
    those of `mixed`.

    Returns:
        A loss for `train.fit` with the metrics of `phased.objective` and `certified_error`, by intervals.
    """
    return phased.objective(forward, ball, _fused, eps=eps, kappa_start=1.0, kappa_end=kappa_end)


def phases(
    forward: Forward, ball: Ball, *, eps: Ramp, kappa_end: ArrayLike = 0.0, loss: Callable[..., Partial] = mixed
) -> tuple[Phase, ...]:
    """Builds the phases that train as `mixed` or `fused` does and compute no more than they must.

    No bounds while the radius is 0, both while it rises, intervals alone at the final radius. Arguments are those of
    `mixed`, and the builder of the loss, `mixed` or `fused`.

    Returns:
        Phases for `train.fit`.
    """
    rising = loss(forward, ball, eps=eps, kappa_end=kappa_end)
    return phased.phases(forward, rising, eps=eps, final=ibp(forward, ball, eps=eps, kappa_end=kappa_end))


def _fused(stage: Stage) -> Robust:
    region = stage.ball.region(stage.x)
    worst = bounds.fused_cross_entropy(stage.logits_fn, region, stage.labels, crown_share=stage.share)
    return Robust(worst.loss, {"certified_error": ~worst.is_certified})


def _certified(
    forward: Forward, threat: Threat, params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array,
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    del key
    x = batch["x"]
    logits, next_state = forward(params, model_state, x, train=True)
    logits_fn = forward.logits_fn(params, forward.statistics(params, model_state, x))
    per_example, metrics = bounds.phased_objective(threat, logits, logits_fn, x, batch["labels"], step)
    loss = standard.batch_mean(per_example, batch)
    return loss, (next_state, {"loss": loss, **phased.means(metrics, batch)})
