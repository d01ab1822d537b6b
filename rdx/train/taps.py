"""TAPS and STAPS (Mao et al. 2023, arXiv:2305.04574): interval bounds through the first part, an attack in the second.

The first part of the network maps the box of perturbations to a box of latent values by intervals. In that box an
attack looks for the point where the second part's margin against each class is least, which tells more about the second
part than intervals do. So that the loss trains the first part too, gradients at that point are handed on to the ends of
the latent box (the gradient connector).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from rdx import attacks, bounds, losses, margins
from rdx.balls import Ball, Region
from rdx.bounds import Interval
from rdx.compilation import as_partial
from rdx.goals import Goal
from rdx.models import Forward
from rdx.train import phased, sabr, standard
from rdx.train.phased import Penalty, Robust, Stage
from rdx.train.schedules import Ramp
from rdx.types import Array, ArrayLike, AttackResult

LATENT_PGD = functools.partial(attacks.pgd, num_steps=10)
# A latent interval narrower than this is a point, whose gradient both ends share.
_NARROW = 1e-6


def taps(
    forward: Forward, ball: Ball, *, eps: Ramp, cut: int, latent_attack: Callable[..., AttackResult] = LATENT_PGD,
    connector: ArrayLike = 0.5, gradient_scale: ArrayLike = 5.0, kappa_end: ArrayLike = 0.0,
    penalties: Sequence[Penalty] = (),
) -> Partial:
    """Builds the loss `E_TAPS E_IBP`, in which the gradient of `E_TAPS` counts `gradient_scale` times.

    `E_TAPS` is the worst-case cross entropy of the margins at the latent points that were found, one point for each
    class (the paper's multi-estimator); `E_IBP` is that of intervals all the way. Both are means over the batch, as in
    their code: multiplied example by example, intervals would count for little where the attack finds little.

    Source: Mao et al. (2023, arXiv:2305.04574, Sec. 3), the product and its gradient as in their code, which trains by
    intervals while the radius rises: `phased.phases(forward, fast_ibp.fast_ibp(...), eps=..., final=taps.taps(...))`.
    Difference: latent points are found by sign steps of `2.5 / num_steps` of each interval's radius, without decay.

    Args:
        forward: a `ConvNet` or any model whose module takes `start` and `stop`, from `models.forward`.
        ball: the perturbations; its radius is replaced by the ramp's.
        eps: the radius at each step.
        cut: layers in the first part, with their ReLU; 1 at least, and one must be left over.
        latent_attack: `(key, fn, z, labels, *, ball, goal, index) -> AttackResult`, its settings bound.
        connector: `c` of the rectified linear connector, in (0, 1]: an end of an interval of width `w` gets the share
            `1 - d / (c w)` of the gradient at a point at distance `d < c w` from it, else none. 1 is linear.
        gradient_scale: `w_TAPS`.
        kappa_end: weight of the clean loss at the final radius; at radius 0 it is 0.
        penalties: what is added to the mean loss, such as `penalties.l1`.

    Returns:
        A loss for `train.fit` with the metrics of `phased.objective` and `taps_loss`, `ibp_loss`.

    Raises:
        ValueError: on an impossible cut or connector.
    """
    settings = _Settings(cut, connector, gradient_scale)
    return _build(_whole_box, forward, ball, eps, settings, latent_attack, kappa_end, penalties)


def staps(
    forward: Forward, ball: Ball, *, eps: Ramp, cut: int, latent_attack: Callable[..., AttackResult] = LATENT_PGD,
    connector: ArrayLike = 0.5, gradient_scale: ArrayLike = 5.0, subselection: ArrayLike = 0.4,
    attack: Callable[..., AttackResult] = phased.PGD, kappa_end: ArrayLike = 0.0, penalties: Sequence[Penalty] = (),
) -> Partial:
    """Builds the loss of `taps` over the small box of `sabr`; the arguments are those of both."""
    sabr.check_box(ball, subselection)
    box = Partial(sabr.small_box, as_partial(attack), subselection)
    settings = _Settings(cut, connector, gradient_scale)
    return _build(box, forward, ball, eps, settings, latent_attack, kappa_end, penalties)


def connect(box: Interval, point: Array, *, share: ArrayLike = 0.5) -> Array:
    """Gives a point in a box, held constant, the gradient of the rectified linear connector.

    Args:
        box: ends of shape `[B, ...]`.
        point: shape `[B, ...]`.
        share: `c`; see `taps`.

    Returns:
        The same point; its derivatives by the ends of the box are the shares.
    """
    box_, point = lax.stop_gradient((box, point))
    width = box_.upper - box_.lower
    reach = jnp.where(width < _NARROW, 1.0, share * width)
    to_lower = jnp.clip(1.0 - (point - box_.lower) / reach, 0.0, 1.0)
    to_upper = jnp.clip(1.0 - (box_.upper - point) / reach, 0.0, 1.0)
    to_lower, to_upper = (jnp.where(width < _NARROW, 0.5, part) for part in (to_lower, to_upper))
    return point + to_lower * (box.lower - box_.lower) + to_upper * (box.upper - box_.upper)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Settings:
    cut: int = dataclasses.field(metadata={"static": True})
    connector: ArrayLike
    gradient_scale: ArrayLike


def _build(
    box: Callable[[Stage], Region], forward: Forward, ball: Ball, eps: Ramp, settings: _Settings,
    latent_attack: Callable[..., AttackResult], kappa_end: ArrayLike, penalties: Sequence[Penalty],
) -> Partial:
    phased.check_share("connector", settings.connector)
    if settings.cut < 1 or settings.connector == 0.0:
        raise ValueError(f"cut={settings.cut} and connector={settings.connector} must be positive.")
    robust = Partial(_taps, as_partial(box), as_partial(latent_attack), settings)
    return phased.objective(forward, ball, robust, eps=eps, kappa_end=kappa_end, penalties=penalties)


def _whole_box(stage: Stage) -> Region:
    return stage.ball.region(stage.x)


def _taps(box: Partial, latent_attack: Partial, settings: _Settings, stage: Stage) -> Robust:
    first, second = stage.part(stop=settings.cut), stage.part(start=settings.cut)
    box_key, latent_key = jax.random.split(stage.key)
    bounded = box(dataclasses.replace(stage, key=box_key))
    latent = bounds.ibp(first, bounded)
    region = Region(latent.center, latent.radius, latent.lower, latent.upper, "linf")
    by_intervals = bounds.worst_case(second, region, stage.labels).loss
    at_points = _least_margins(latent_key, latent_attack, second, latent, settings.connector, stage)
    by_attack = losses.worst_case_cross_entropy(at_points)
    attacked, certified = (standard.batch_mean(loss, stage.batch) for loss in (by_attack, by_intervals))
    scaled = attacked + (settings.gradient_scale - 1.0) * (attacked - lax.stop_gradient(attacked))
    loss = jnp.broadcast_to(scaled * certified, by_attack.shape)
    return Robust(loss, {"taps_loss": by_attack, "ibp_loss": by_intervals}, stage.within(bounded))


def _least_margins(
    key: Array, attack: Partial, second: Partial, latent: Interval, connector: ArrayLike, stage: Stage
) -> Array:
    """Attacks every margin in the latent box; returns them `[B, K - 1]` at the points that were found."""
    labels = stage.labels.astype(jnp.int32)
    num = jax.eval_shape(second, latent.lower).shape[1] - 1
    others = jnp.arange(num, dtype=jnp.int32)[None]
    others = (others + (others >= labels[:, None]).astype(jnp.int32)).reshape(-1)
    index = jnp.asarray(stage.batch.get("index", jnp.arange(len(labels))), jnp.int32)
    index = (index[:, None] * num + jnp.arange(num, dtype=jnp.int32)[None]).reshape(-1)
    box, labels = jax.tree.map(lambda leaf: jnp.repeat(leaf, num, axis=0), (latent, labels))
    center, radius, fixed = lax.stop_gradient((box.center, box.radius, second))
    goal = Goal(Partial(_minus_margin), Partial(_is_beaten), (others,))
    ball = Ball("linf", radius, low=-jnp.inf, high=jnp.inf)
    found = attack(key, fixed, center, labels, ball=ball, goal=goal, index=index).x_adv
    points = connect(box, found, share=connector)
    return margins.targeted(second)(points, labels, others).reshape(-1, num)


def _minus_margin(logits: Array, labels: Array, others: Array) -> Array:
    both = jnp.take_along_axis(logits, jnp.stack([others, labels], axis=1), axis=1)
    return both[:, 0] - both[:, 1]


def _is_beaten(logits: Array, labels: Array, others: Array) -> Array:
    return _minus_margin(logits, labels, others) > 0
