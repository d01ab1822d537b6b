"""Penalties beside certified losses: what keeps bounds narrow and units balanced, and what keeps weights few.

A penalty is a function `penalty(stage) -> (value, metrics)` of one step of training, for `phased.objective(penalties=)`
and the builders that hand it on. Values are scalars: they belong to the network or the batch, not to single examples.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx.bounds import Interval
from rdx.train.phased import Stage
from rdx.types import Array, ArrayLike

# Divisors are at least this.
_TINY = 1e-12


def of_bounds(*, tolerance: ArrayLike = 0.5, strength: ArrayLike = 0.5) -> Partial:
    """Builds the penalty `strength (1 - eps / eps_max) (L_tightness + L_relu)` of interval bounds.

    See `tightness` and `relu_balance`; the bounds are those of the ball, or of the small box for methods that have one,
    as in their authors' code. It is 0 at the final radius, where it need not be computed.

    Source: Shi et al. (2021, arXiv:2103.17268), of their Fast-IBP; SABR, TAPS and the expressive losses train with it
    as well.

    Args:
        tolerance: `tau` of both.
        strength: `lambda_0`, weight of both at radius 0.

    Returns:
        A penalty with the metrics `tightness` and `relu_balance`.
    """
    return Partial(_of_bounds, _Settings(tolerance, strength))


def l1(strength: ArrayLike) -> Partial:
    """Builds the penalty `strength sum |w|` over all kernels, as SABR, TAPS and the expressive losses have it.

    Args:
        strength: its weight; 1e-6 to 1e-5 in those papers.

    Returns:
        A penalty with the metric `l1`: the sum.
    """
    return Partial(_l1, strength)


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


def _of_bounds(settings: _Settings, stage: Stage) -> tuple[Array, dict[str, Array]]:
    region = stage.region
    layers = [layer for name, layer in stage.intervals.layers.items() if "-> relu" in name]
    tight = tightness((region.upper - region.lower).mean(), layers, tolerance=settings.tolerance)
    balance = relu_balance(layers, tolerance=settings.tolerance)
    value = jnp.asarray(settings.strength, jnp.float32) * stage.share * (tight + balance)
    return value, {"tightness": tight, "relu_balance": balance}


def _l1(strength: ArrayLike, stage: Stage) -> tuple[Array, dict[str, Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(stage.params)
    total = sum((jnp.abs(leaf).sum() for path, leaf in leaves if path[-1].key == "kernel"), jnp.float32(0.0))
    return jnp.asarray(strength, jnp.float32) * total, {"l1": total}
