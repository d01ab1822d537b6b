"""Interval bound propagation (Gowal et al. 2018, arXiv:1810.12715)."""

from collections.abc import Callable, Sequence

from rdx.balls import Region
from rdx.bounds import propagation
from rdx.bounds.graph import Graph
from rdx.bounds.interval import Interval
from rdx.types import Array, PyTree


def ibp(fn: Callable[..., Array], region: PyTree, *args: PyTree) -> Interval:
    """Bounds `fn` over a region by propagating intervals.

    An affine layer maps center `c` and radius `r` to `W c + b` and `|W| r`, a monotone one maps both ends. Affine
    operations after the last nonlinear one are fused first, so a margin `z_y - z_j` is bounded as one row of weights
    (the elision of Gowal et al. 2018, Sec. 3). An l2 or l1 ball enters the first affine layers by its dual norm.

    Args:
        fn: any JAX function `(x, *args) -> [B, ...]` whose examples are independent.
        region: the perturbed inputs, from `Ball.region`; a pytree of regions where `x` is a pytree.
        *args: further arguments, not perturbed; every leaf has a leading batch axis.

    Returns:
        Bounds of the output, each end of shape `[B, ...]`.

    Raises:
        UnsupportedPrimitiveError: if `fn` uses an operation without a rule.
    """

    def bound(graph: Graph, regions: Sequence[Region]) -> Interval:
        enter = propagation.interval_entry(graph, regions)
        return propagation.fused(graph, propagation.propagate(graph, regions, enter), regions)

    return propagation.per_example(bound, fn, region, *args)
