"""The Lipschitz certificate (Tsuzuku et al. 2018, arXiv:1802.04034; Zhang et al. 2021, arXiv:2102.05363).

A function whose outputs change by at most `L` times the distance of its inputs stays within `L eps` of its value. For a
network whose logits are 1-Lipschitz in linf, such as `models.LinfDistanceNet`, margins `z_y - z_j` are 2-Lipschitz: an
input is certified where its least margin exceeds `2 eps`, that is, where half of it exceeds the radius.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rdx import norms
from rdx.balls import Region
from rdx.bounds.interval import Interval
from rdx.types import Array, ArrayLike, PyTree


def lipschitz(fn: Callable[..., Array], region: Region, *args: PyTree, constant: ArrayLike) -> Interval:
    """Bounds a function of known Lipschitz constant: `f(x) - L eps <= f(x') <= f(x) + L eps`.

    Nothing about the function is checked: the bounds are as true as the constant. The box that a region is cut to is
    not used, so that `bounds.ibp` may be tighter where it knows the function.

    Source: Tsuzuku et al. (2018, arXiv:1802.04034, Prop. 1): for logits that are jointly `L`-Lipschitz in l2 margins
    have the constant `sqrt(2) L`; Zhang et al. (2021, arXiv:2102.05363): for logits that are each
    `L`-Lipschitz, in any norm, they have `2 L`.

    Args:
        fn: `(x, *args) -> [B, ...]`, such as `margins.of(logits_fn)`, whose examples are independent.
        region: the perturbed inputs, from `Ball.region`; its norm is the one that the constant is for.
        *args: further arguments, not perturbed.
        constant: `L`, of every output of `fn`, a scalar or one per example `[B]`.

    Returns:
        Bounds of the output, each end of shape `[B, ...]`.
    """
    value = fn(region.center, *args)
    radius = region.radius.reshape(region.radius.shape[0], -1).max(axis=1)
    spread = norms.expand(jnp.asarray(constant, value.dtype) * radius, value)
    return Interval(value - spread, value + spread)
