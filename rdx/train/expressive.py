"""Expressive losses (De Palma et al. 2024, arXiv:2305.13991): between an attacked loss and that of interval bounds.

With the adversarial input `x'`, margins `m(x') = z_y - z_j` and their lower bounds `l` by intervals, the weight `alpha`
leads from the attacked loss (0, a lower bound of the worst case) to the certified one (1, an upper bound):

    MTL-IBP   (1 - alpha) CE(x') + alpha E(l)
    CC-IBP    E((1 - alpha) m(x') + alpha l)
    Exp-IBP   CE(x')^(1 - alpha) E(l)^alpha

where `E(m) = log(1 + sum_{j != y} exp(-m_j))`, so that `CE(x') = E(m(x'))`. The product of Exp-IBP is one of means over
the batch, as in their code: multiplied example by example, bounds would count for little where the attack finds little.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import losses, margins
from rdx.balls import Ball
from rdx.compilation import as_partial
from rdx.models import Forward
from rdx.train import phased, standard
from rdx.train.phased import Penalty, Robust, Stage
from rdx.train.schedules import Ramp
from rdx.types import Array, ArrayLike, AttackResult, PyTree

# Logarithms are taken of losses of at least this much.
_LEAST = 1e-12


def mtl_ibp(
    forward: Forward, ball: Ball, *, eps: Ramp, alpha: ArrayLike = 0.5,
    attack: Callable[..., AttackResult] = phased.PGD, attack_scale: ArrayLike = 1.0, kappa_end: ArrayLike = 0.0,
    penalties: Sequence[Penalty] = (),
) -> Partial:
    """Builds the loss of MTL-IBP, `(1 - alpha) CE(x') + alpha E(l)`.

    Source: De Palma et al. (2024, arXiv:2305.13991).

    Args:
        forward: the model, from `models.forward`.
        ball: the perturbations; its radius is replaced by the ramp's.
        eps: the radius at each step.
        alpha: weight of the interval bounds, in [0, 1].
        attack: `(key, logits_fn, x, labels, *, ball, index) -> AttackResult`, its settings bound.
        attack_scale: how much farther the attack goes than the bounds, 2.1 times in their training for CIFAR-10 at
            2/255.
        kappa_end: weight of the clean loss at the final radius; at radius 0 it is 0.
        penalties: what is added to the mean loss; the paper has `penalties.of_bounds` while the radius rises, and
            `penalties.l1` throughout, 1e-6 to 1e-5 for MNIST.

    Returns:
        A loss for `train.fit` with the metrics of `phased.objective` and `adversarial_loss`, `certified_loss`,
        `certified_error`.

    Raises:
        ValueError: where `alpha` is not in [0, 1].
    """
    return _build(_mtl, forward, ball, eps, _Settings(alpha, attack_scale), attack, kappa_end, penalties)


def cc_ibp(
    forward: Forward, ball: Ball, *, eps: Ramp, alpha: ArrayLike = 0.5,
    attack: Callable[..., AttackResult] = phased.PGD, attack_scale: ArrayLike = 1.0, kappa_end: ArrayLike = 0.0,
    penalties: Sequence[Penalty] = (),
) -> Partial:
    """Builds the loss of CC-IBP, `E((1 - alpha) m(x') + alpha l)`, with the arguments and metrics of `mtl_ibp`."""
    return _build(_cc, forward, ball, eps, _Settings(alpha, attack_scale), attack, kappa_end, penalties)


def exp_ibp(
    forward: Forward, ball: Ball, *, eps: Ramp, alpha: ArrayLike = 0.5,
    attack: Callable[..., AttackResult] = phased.PGD, attack_scale: ArrayLike = 1.0, kappa_end: ArrayLike = 0.0,
    penalties: Sequence[Penalty] = (),
) -> Partial:
    """Builds the loss of Exp-IBP, `CE(x')^(1 - alpha) E(l)^alpha`, with the arguments and metrics of `mtl_ibp`."""
    return _build(_exp, forward, ball, eps, _Settings(alpha, attack_scale), attack, kappa_end, penalties)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Settings:
    alpha: ArrayLike
    attack_scale: ArrayLike


def _build(
    combine: Callable[..., Array], forward: Forward, ball: Ball, eps: Ramp, settings: _Settings,
    attack: Callable[..., AttackResult], kappa_end: ArrayLike, penalties: Sequence[Penalty],
) -> Partial:
    phased.check_share("alpha", settings.alpha)
    robust = Partial(_expressive, Partial(combine), as_partial(attack), settings)
    return phased.objective(forward, ball, robust, eps=eps, kappa_end=kappa_end, penalties=penalties)


def _expressive(combine: Partial, attack: Partial, settings: _Settings, stage: Stage) -> Robust:
    margins_fn = margins.of(stage.logits_fn)
    farther = dataclasses.replace(stage.ball, eps=settings.attack_scale * jnp.asarray(stage.ball.eps))
    at_attack = margins_fn(stage.attacked(attack, ball=farther), stage.labels)
    lower = stage.intervals.output.lower
    attacked, certified = _ends(at_attack, lower)
    loss = combine(jnp.asarray(settings.alpha, lower.dtype), at_attack, lower, stage.batch)
    return Robust(loss, {
        "adversarial_loss": attacked, "certified_loss": certified, "certified_error": ~(lower > 0).all(axis=1),
    })


def _ends(at_attack: Array, lower: Array) -> tuple[Array, Array]:
    """Computes the attacked and the certified loss."""
    return losses.worst_case_cross_entropy(at_attack), losses.worst_case_cross_entropy(lower)


def _mtl(alpha: Array, at_attack: Array, lower: Array, _: PyTree) -> Array:
    attacked, certified = _ends(at_attack, lower)
    return (1.0 - alpha) * attacked + alpha * certified


def _cc(alpha: Array, at_attack: Array, lower: Array, _: PyTree) -> Array:
    return losses.worst_case_cross_entropy((1.0 - alpha) * at_attack + alpha * lower)


def _exp(alpha: Array, at_attack: Array, lower: Array, batch: PyTree) -> Array:
    attacked, certified = (
        jnp.log(jnp.maximum(standard.batch_mean(loss, batch), _LEAST)) for loss in _ends(at_attack, lower)
    )
    return jnp.broadcast_to(jnp.exp((1.0 - alpha) * attacked + alpha * certified), lower.shape[:1])
