"""Fast certified training with IBP (Shi et al. 2021, arXiv:2103.17268): initialisation, BatchNorm, two penalties.

Interval bounds of a net with the usual initialisation widen from layer to layer, so that training has to start from
tiny radii and needs hundreds of epochs. Here weights are drawn such that they keep their width, BatchNorm balances the
units (its statistics are those of the clean batch, as everywhere in `train`), and while the radius rises two penalties
keep both so (`train.penalties`). A ramp of a few dozen epochs is enough then.
"""

import math
from collections.abc import Sequence

import jax
from jax.tree_util import Partial

from rdx import losses
from rdx.balls import Ball
from rdx.models import Forward
from rdx.train import phased
from rdx.train.penalties import of_bounds
from rdx.train.phased import Penalty, Robust, Stage
from rdx.train.schedules import Ramp
from rdx.types import Array, ArrayLike, Key, PyTree

PENALTIES: tuple[Penalty, ...] = (of_bounds(),)


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
    forward: Forward, ball: Ball, *, eps: Ramp, kappa_end: ArrayLike = 0.0, penalties: Sequence[Penalty] = PENALTIES
) -> Partial:
    """Builds the loss `E + lambda_0 (1 - eps / eps_max) (L_tightness + L_relu)` with interval bounds.

    `E` is the worst-case cross entropy of `bounds.worst_case`; the rest is `penalties.of_bounds`. Start it from `init`.
    For the phase at radius 0, where their code trains with all of this, `phased.phases` puts the clean loss.

    Source: Shi et al. (2021, arXiv:2103.17268).

    Args:
        forward: the model, from `models.forward`; the authors put BatchNorm before every ReLU.
        ball: the perturbations; its radius is replaced by the ramp's.
        eps: the radius at each step.
        kappa_end: weight of the clean loss at the final radius; at radius 0 it is 0.
        penalties: what is added to the mean loss; theirs, at weight 1/2 and tolerance 1/2, by default.

    Returns:
        A loss for `train.fit` with the metrics of `phased.objective` and `certified_error`.
    """
    return phased.objective(forward, ball, _by_intervals, eps=eps, kappa_end=kappa_end, penalties=penalties)


def _by_intervals(stage: Stage) -> Robust:
    lower = stage.intervals.output.lower
    return Robust(losses.worst_case_cross_entropy(lower), {"certified_error": ~(lower > 0).all(axis=1)})


def _draw(key: Key, named: tuple[tuple, Array]) -> Array:
    path, leaf = named
    if path[-1].key != "kernel":
        return leaf
    return jax.random.normal(key, leaf.shape, leaf.dtype) * (math.sqrt(2.0 * math.pi) / math.prod(leaf.shape[:-1]))
