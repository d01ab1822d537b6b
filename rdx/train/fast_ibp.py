"""Fast certified training with IBP (Shi et al. 2021, arXiv:2103.17268): initialisation, BatchNorm, two regularisers.

Interval bounds of a net with the usual initialisation widen from layer to layer, so that training has to start from
tiny radii and needs hundreds of epochs. Here weights are drawn such that they keep their width, BatchNorm balances the
units (its statistics are those of the clean batch, as everywhere in `train`), and while the radius rises two penalties
keep both so. A ramp of a few dozen epochs is enough then.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import bounds, losses, margins
from rdx.balls import Ball
from rdx.bounds import Interval
from rdx.models import Forward
from rdx.train import phased
from rdx.train.phased import Robust, Stage
from rdx.train.schedules import Ramp
from rdx.types import Array, ArrayLike, Key, PyTree

# Divisors are at least this.
_TINY = 1e-12


def init(key: Key, params: PyTree) -> PyTree:
    """Draws all kernels from `N(0, sqrt(2 pi) / fan_in)`, the second number the standard deviation.

    The interval of a pre-activation is then as wide, on average, as those of the units before it: `E |w| = sigma
    sqrt(2 / pi)`, so a sum of `fan_in` terms multiplies widths by `2`, and relu halves them.

    Source: Shi et al. (2021, arXiv:2103.17268). Differences: their code leaves the last layer as it was and
    halves the weights that follow a residual connection; here all kernels are drawn, none halved.

    Args:
        key: for the draws.
        params: parameters of a flax module; leaves called `kernel` are replaced, the others are kept.

    Returns:
        Parameters of the same structure.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([_draw(*pair) for pair in zip(keys, leaves, strict=True)])


def fast_ibp(
    forward: Forward, ball: Ball, *, eps: Ramp, kappa_end: ArrayLike = 0.0, tolerance: ArrayLike = 0.5,
    strength: ArrayLike = 0.5,
) -> Partial:
    """Builds the loss `E + strength (1 - eps / eps_max) (L_tightness + L_relu)` with interval bounds.

    `E` is the worst-case cross entropy of `bounds.worst_case`; see `tightness` and `relu_balance` for the penalties.
    Start it from `init`. For the phase at radius 0, where their code trains with all of this, `phased.phases` puts the
    clean loss.

    Source: Shi et al. (2021, arXiv:2103.17268).

    Args:
        forward: the model, from `models.forward`; the authors put BatchNorm before every ReLU.
        ball: the perturbations; its radius is replaced by the ramp's.
        eps: the radius at each step.
        kappa_end: weight of the clean loss at the final radius; at radius 0 it is 0.
        tolerance: `tau` of both penalties.
        strength: `lambda_0`, weight of both penalties at radius 0.

    Returns:
        A loss for `train.fit` with the metrics of `phased.objective` and `certified_error`, `tightness`,
        `relu_balance`.
    """
    robust = Partial(_fast_ibp, _Settings(tolerance, strength))
    return phased.objective(forward, ball, robust, eps=eps, kappa_end=kappa_end)


def tightness(width: Array, layers: list[Interval], *, tolerance: ArrayLike = 0.5) -> Array:
    """Computes `L_tightness = mean_i relu(tau - w_0 / w_i) / tau`, 0 where no layer widens the bounds by `1 / tau`.

    Args:
        width: `w_0`, the mean width of the input's intervals, a scalar.
        layers: bounds before each ReLU, ends of shape `[B, ...]`; `w_i` are their mean widths.
        tolerance: `tau`.

    Returns:
        A scalar (Shi et al. 2021).
    """
    tau = jnp.asarray(tolerance, jnp.float32)
    ratios = [width / jnp.maximum((layer.upper - layer.lower).mean(), _TINY) for layer in layers]
    return jnp.stack([jax.nn.relu(tau - ratio) / tau for ratio in ratios]).mean()


def relu_balance(layers: list[Interval], *, tolerance: ArrayLike = 0.5) -> Array:
    """Computes `L_relu = mean_i (relu(tau - r_i) + relu(tau - s_i)) / tau`, 0 where on and off units are in balance.

    With the interval centers `c` before a ReLU, `r = min(a, b) / max(a, b)` for `a = sum_{on} c` and `b = -sum_{off}
    c`, over units that are on (lower end above 0) and off (upper end below 0); `s` is the same ratio for the sums of
    `(c - mean c)^2`. Layers without such units do not count.

    Args:
        layers: bounds before each ReLU, ends of shape `[B, ...]`.
        tolerance: `tau`.

    Returns:
        A scalar (Shi et al. 2021; who counts as on or off is as in their code).
    """
    tau = jnp.asarray(tolerance, jnp.float32)
    terms = []
    for layer in layers:
        center, is_on, is_off = layer.center, layer.lower > 0, layer.upper < 0
        spread = jnp.square(center - center.mean())
        for values in ((center, -center), (spread, spread)):
            pairs = zip((is_on, is_off), values, strict=True)
            on, off = (jnp.where(flags, value, 0.0).mean() for flags, value in pairs)
            largest = jnp.maximum(on, off)
            ratio = jnp.minimum(on, off) / jnp.maximum(largest, _TINY)
            terms.append(jnp.where(largest > 0, jax.nn.relu(tau - ratio) / tau, 0.0))
    return jnp.stack(terms).sum() / len(layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Settings:
    tolerance: ArrayLike
    strength: ArrayLike


def _fast_ibp(settings: _Settings, stage: Stage) -> Robust:
    region = stage.ball.region(stage.x)
    found = bounds.details(bounds.ibp, margins.of(stage.logits_fn), region, stage.labels)
    lower = found.output.lower
    layers = [layer for name, layer in found.layers.items() if "-> relu" in name]
    tight = tightness((region.upper - region.lower).mean(), layers, tolerance=settings.tolerance)
    balance = relu_balance(layers, tolerance=settings.tolerance)
    metrics = {"certified_error": ~(lower > 0).all(axis=1), "tightness": tight, "relu_balance": balance}
    penalty = jnp.asarray(settings.strength, jnp.float32) * stage.share * (tight + balance)
    return Robust(losses.worst_case_cross_entropy(lower), metrics, penalty)


def _draw(key: Key, named: tuple[tuple, Array]) -> Array:
    path, leaf = named
    if path[-1].key != "kernel":
        return leaf
    return jax.random.normal(key, leaf.shape, leaf.dtype) * (math.sqrt(2.0 * math.pi) / math.prod(leaf.shape[:-1]))
