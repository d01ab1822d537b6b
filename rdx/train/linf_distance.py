"""Training of linf-distance nets (Zhang et al. 2022, arXiv:2110.06850): a rising norm, and hinge plus cross entropy.

The margin itself is the certificate, so the loss asks for a margin of `theta` and no more. A clipped hinge gives no
gradient where the net is wrong by far, which early in training is everywhere; a scaled cross entropy, whose weight
falls, leads to where the hinge takes over. Meanwhile `p` rises, and at the end the norm is linf.
"""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses
from rdx.models import Forward
from rdx.train import phased, standard
from rdx.train.loop import Phase
from rdx.train.schedules import GeometricRamp
from rdx.types import Array, ArrayLike, Key, PyTree


def hinge_and_cross_entropy(
    forward: Forward, *, theta: ArrayLike, p: GeometricRamp, weight: GeometricRamp, is_limit: bool = False
) -> Partial:
    """Builds the loss `min(relu(1 - m / theta), 1) + lambda CE(s z, y)` with the margin `m = z_y - max_{j != y} z_j`.

    Source: Zhang et al. (2022, arXiv:2110.06850), with the learned scale `s` and `lambda` falling with the
    progress of `p`, from 0.1 to 0.001, as in their code. Difference: there the scale has a learning rate of its own.

    Args:
        forward: a `LinfDistanceNet`, from `models.forward`.
        theta: the margin wanted, `2 eps` for a certificate at `eps`; the authors take 3 times that radius.
        p: the norm at each step; 8 to 1000 in the paper.
        weight: `lambda` at each step.
        is_limit: whether the norm is linf, whatever `p` says.

    Returns:
        A loss for `train.fit` with the metrics `loss`, `hinge`, `cross_entropy`, `error` and `p` (while it is finite).
    """
    return Partial(_loss, forward, _Settings(theta, p, weight, is_limit))


def phases(forward: Forward, *, theta: ArrayLike, p: GeometricRamp, weight: GeometricRamp) -> tuple[Phase, Phase]:
    """Builds the phases: `p` rises up to step `p.end`, then the norm is linf. Arguments are those of the loss."""
    rising, limit = (
        hinge_and_cross_entropy(forward, theta=theta, p=p, weight=weight, is_limit=is_limit)
        for is_limit in (False, True)
    )
    return Phase(int(p.end), rising), Phase(None, limit)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Settings:
    theta: ArrayLike
    p: GeometricRamp
    weight: GeometricRamp
    is_limit: bool = dataclasses.field(metadata={"static": True})


def _loss(
    forward: Forward, settings: _Settings, params: PyTree, model_state: PyTree, key: Key, batch: PyTree, step: Array
) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
    del key
    labels, p = batch["labels"], settings.p(step)
    output = forward.model.apply(
        {"params": params, **model_state}, batch["x"], train=True, p=None if settings.is_limit else p,
        mutable=list(model_state),
    )
    logits, model_state = cast(tuple[Array, PyTree], output)
    hinge = jnp.clip(1.0 + losses.margin(logits, labels) / settings.theta, 0.0, 1.0)
    cross_entropy = losses.cross_entropy(params["scale"] * logits, labels)
    loss = standard.batch_mean(hinge + settings.weight(step) * cross_entropy, batch)
    metrics = {"hinge": hinge, "cross_entropy": cross_entropy, "error": losses.is_wrong(logits, labels)}
    shown = metrics if settings.is_limit else {**metrics, "p": p}
    return loss, (model_state, {"loss": loss, **phased.means(shown, batch)})
