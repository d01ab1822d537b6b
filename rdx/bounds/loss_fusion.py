"""Loss fusion (Xu et al. 2020, auto_LiRPA, arXiv:2002.12920): the cross entropy bounded as one function.

CROWN-IBP bounds the `K - 1` margins one by one, with a row of coefficients for each that goes back through the whole
network. But training needs only one number, and the cross entropy is one as well:

    CE(x) = log(1 + sum_{j != y} exp(d_j(x))),        d_j = z_j - z_y

With bounds `l_j <= d_j <= u_j` by intervals, every exponential lies below its chord `s_j d_j + t_j`, so that

    max_x CE(x) <= log(1 + sum_j t_j + max_x sum_j s_j d_j(x))

and a single row `sum_j s_j (e_j - e_y)`, put together before the last layer, goes back.
"""

import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from rdx import margins
from rdx.balls import Region
from rdx.bounds import relaxations
from rdx.bounds.crown import crown_ibp
from rdx.bounds.ibp import ibp
from rdx.bounds.relaxations import SlopeFn
from rdx.bounds.worst_case import WorstCase
from rdx.types import Array, ArrayLike, LogitsFn

# Below this width of an interval the slope of a chord is that of the tangent, up to rounding.
_NARROW = 1e-4


def fused_cross_entropy(
    logits_fn: LogitsFn, region: Region, labels: Array, *, crown_share: ArrayLike = 1.0,
    relu_lower: SlopeFn = relaxations.same_slope,
) -> WorstCase:
    """Bounds the cross entropy over a region from above by CROWN-IBP with loss fusion.

    With `E = sum_j exp(d_j)`, the bound is `log(1 + crown_share * CROWN-IBP(E) + (1 - crown_share) * IBP(E))`. Both are
    upper bounds of `E`, so every mixture is. With `crown_share = 0` it is the loss of interval bounds, exactly. Where
    substitution bounds every margin at least as tightly as intervals do, the fused bound is at most theirs: chords meet
    the exponentials at the ends, and one sum has no larger relaxation error than the sum of its terms. It is not
    compared with `worst_case` by CROWN-IBP, which puts its margins into the exponentials instead of into the chords;
    neither dominates.

    Difference from Xu et al.: the ends of the chords are interval bounds with the margin fused into the last layer;
    theirs subtract bounds of the logits.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        region: the perturbed inputs.
        labels: shape `[B]`, int.
        crown_share: weight of CROWN-IBP in [0, 1].
        relu_lower: choice of the lower slope of unstable relus.

    Returns:
        The bound `[B]`, and certificates by intervals as `worst_case` gives them.
    """
    margins_fn = margins.of(logits_fn)
    bounds = ibp(margins_fn, region, labels)
    lower, upper = -bounds.upper, -bounds.lower
    # Exponentials are divided by that of the largest: the bound is the same and nothing overflows.
    shift = lax.stop_gradient(jnp.maximum(upper.max(axis=1, keepdims=True), 0.0))
    slopes, offsets = _chords(lower - shift, upper - shift)
    fused = Partial(_weighted_sum, margins_fn)
    linear = crown_ibp(fused, region, labels, slopes, relu_lower=relu_lower, intersect=False).upper
    # The chords take the shifted differences.
    by_chords = linear[:, 0] + (offsets - slopes * shift).sum(axis=1)
    by_intervals = jnp.exp(upper - shift).sum(axis=1)
    total = crown_share * jnp.maximum(by_chords, 0.0) + (1.0 - crown_share) * by_intervals
    loss = shift[:, 0] + jnp.log(jnp.exp(-shift[:, 0]) + total)
    return WorstCase(loss, (bounds.lower > 0.0).all(axis=1))


def _chords(lower: Array, upper: Array) -> tuple[Array, Array]:
    """Computes slope and offset of the chords of `exp` over intervals."""
    width = upper - lower
    is_narrow = width < _NARROW
    share = jnp.where(is_narrow, 1.0 - 0.5 * width, -jnp.expm1(-width) / jnp.where(is_narrow, 1.0, width))
    slopes = jnp.exp(upper) * share
    return slopes, jnp.exp(upper) - slopes * upper


def _weighted_sum(margins_fn: Partial, x: Array, labels: Array, weights: Array) -> Array:
    return -jnp.einsum("bj,bj->b", weights, margins_fn(x, labels))[:, None]
