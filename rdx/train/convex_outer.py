"""The convex outer adversarial polytope (Wong & Kolter 2018, arXiv:1711.00851): training on the dual network's bound.

Every unstable ReLU is replaced by its convex hull, and the dual of the linear program that results has a feasible point
that one backward pass computes. That point is CROWN's with the upper line's slope `u / (u - l)` for the lower line too,
where `l` and `u` come from the same bound of the layer: what `bounds.crown` computes with `relaxations.same_slope`.
"""

from jax.tree_util import Partial

from rdx import bounds, losses, margins
from rdx.balls import Ball
from rdx.models import Forward
from rdx.train import phased
from rdx.train.phased import Robust, Stage
from rdx.train.schedules import Ramp
from rdx.types import ArrayLike


def convex_outer(forward: Forward, ball: Ball, *, eps: Ramp, kappa_end: ArrayLike = 0.0) -> Partial:
    """Builds the loss `E = log(1 + sum_{j != y} exp(-J_j))` of the dual objectives `J_j <= min z_y - z_j`.

    Source: Wong & Kolter (2018, arXiv:1711.00851, Theorem 1, with the feasible point of Algorithm 1). For a ball
    without a box the bounds are exactly theirs, of hidden layers and of the margins. Difference: `ball` is intersected
    with its box, such as the images' range, which is tighter; `low=-inf, high=inf` is theirs. Neither is intersected
    with interval bounds. The cost is that of `bounds.crown`, a row of coefficients per hidden unit; the random
    projections of their later work (arXiv:1805.12514) are not used.

    Args:
        forward: the model, from `models.forward`.
        ball: the perturbations; its radius is replaced by the ramp's.
        eps: the radius at each step.
        kappa_end: weight of the clean loss at the final radius; at radius 0 it is 0.

    Returns:
        A loss for `train.fit` with the metrics of `phased.objective` and `certified_error`, by this bound.
    """
    return phased.objective(forward, ball, _convex_outer, eps=eps, kappa_end=kappa_end)


def _convex_outer(stage: Stage) -> Robust:
    lower = bounds.crown(
        margins.of(stage.logits_fn), stage.ball.region(stage.x), stage.labels,
        relu_lower=bounds.relaxations.same_slope, intersect=False,
    ).lower
    return Robust(losses.worst_case_cross_entropy(lower), {"certified_error": ~(lower > 0).all(axis=1)})
