"""CROWN (Zhang et al. 2018, arXiv:1811.00866) and CROWN-IBP (Zhang et al. 2020, arXiv:1906.06316)."""

from collections.abc import Callable, Sequence

from rdx.balls import Region
from rdx.bounds import propagation, relaxations
from rdx.bounds.chunks import Chunks, two_sided
from rdx.bounds.graph import PIECEWISE_LINEAR, Graph, Node, Op
from rdx.bounds.interval import Interval
from rdx.bounds.relaxations import Lines, SlopeFn
from rdx.types import Array, PyTree

# What the coefficients of hidden layers may take by default. More would not be faster on CPUs, whose caches it leaves.
MAX_BYTES = 2.0**28


def crown_ibp(
    fn: Callable[..., Array], region: PyTree, *args: PyTree, relu_lower: SlopeFn = relaxations.adaptive,
    intersect: bool = True,
) -> Interval:
    """Bounds `fn` by one backward substitution over hidden bounds that come from IBP.

    Nonlinear operations are replaced by lines over their IBP intervals, and the linear function that results is
    minimised over the region. The cost is that of IBP and one backward pass with a row per output.

    Source: Zhang et al. (2020, CROWN-IBP, arXiv:1906.06316, Sec. 3.2).

    Args:
        fn: any JAX function `(x, *args) -> [B, ...]` whose examples are independent.
        region: the perturbed inputs, from `Ball.region`; a pytree of regions where `x` is a pytree.
        *args: further arguments, not perturbed; every leaf has a leading batch axis.
        relu_lower: choice of the lower slope of unstable relus, such as `relaxations.adaptive` or `same_slope`.
        intersect: keep the tighter of this and the IBP bound; neither dominates the other.

    Returns:
        Bounds of the output, each end of shape `[B, ...]`.

    Raises:
        UnsupportedPrimitiveError: if `fn` uses an operation without a rule.
    """

    def bound(graph: Graph, regions: Sequence[Region]) -> Interval:
        enter, lines = _record(propagation.interval_entry(graph, regions), relu_lower)
        return _substitute(graph, propagation.propagate(graph, regions, enter), regions, lines, intersect=intersect)

    return propagation.per_example(bound, fn, region, *args)


def crown(
    fn: Callable[..., Array], region: PyTree, *args: PyTree, relu_lower: SlopeFn = relaxations.adaptive,
    intersect: bool = True, max_bytes: float = MAX_BYTES,
) -> Interval:
    """Bounds `fn` by backward substitution, with hidden bounds that come from backward substitution as well.

    The tightest of the three methods and the most expensive: every nonlinear layer costs a backward pass with one row
    per neuron, whose coefficients are dense. Bounds of an example never depend on who shares its batch.

    Source: Zhang et al. (2018, CROWN, arXiv:1811.00866, Sec. 3.2).

    Args:
        fn: any JAX function `(x, *args) -> [B, ...]` whose examples are independent.
        region: the perturbed inputs, from `Ball.region`; a pytree of regions where `x` is a pytree.
        *args: further arguments, not perturbed; every leaf has a leading batch axis.
        relu_lower: choice of the lower slope of unstable relus, such as `relaxations.adaptive` or `same_slope`.
        intersect: intersect the bounds of every layer with intervals, and bound only those relus by substitution that
            intervals leave undecided; without it this is CROWN to the letter.
        max_bytes: about how much memory the coefficients of hidden layers may take; they are computed in chunks.

    Returns:
        Bounds of the output, each end of shape `[B, ...]`.

    Raises:
        UnsupportedPrimitiveError: if `fn` uses an operation without a rule.
    """
    batch = propagation.batch_size(region)

    def bound(graph: Graph, regions: Sequence[Region]) -> Interval:
        sets = dict(zip(graph.inputs, regions, strict=True))

        def substitute(op: Op, node: Node, known: propagation.Known) -> Interval:
            suffix, ends = propagation.affine_suffix(graph, node)
            interval, is_box = known.intervals[node], all(sets[n].norm == "linf" for n in ends if n in sets)
            if is_box and ends <= sets.keys() and sum(op.is_mixing for op in suffix) <= 1:
                return interval  # one layer over a box: that is exact already
            chunks = Chunks(max_bytes / batch)
            if intersect:
                # Of an l2 or l1 ball the interval knows no more than a box around it.
                chunks = chunks._replace(known=interval, is_needed=_is_needed(op, interval) if is_box else None)
            return two_sided(graph, node, lines, sets, known.centers, chunks)

        enter, lines = _record(lambda op, known: [substitute(op, node, known) for node in op.nodes], relu_lower)
        return _substitute(graph, propagation.propagate(graph, regions, enter), regions, lines, intersect=intersect)

    return propagation.per_example(bound, fn, region, *args)


def _is_needed(op: Op, interval: Interval) -> Array | None:
    """Tells where lines depend on the bounds: a stable relu is linear whatever they are."""
    return (interval.lower < 0) & (interval.upper > 0) if op.name == PIECEWISE_LINEAR else None


def _record(
    enter: Callable[[Op, propagation.Known], list[Interval]], relu_lower: SlopeFn
) -> tuple[Callable[[Op, propagation.Known], list[Interval]], dict[Op, Lines]]:
    """Wraps `enter` so that every nonlinear operation leaves its lines behind."""
    lines: dict[Op, Lines] = {}

    def entered(op: Op, known: propagation.Known) -> list[Interval]:
        bounds = enter(op, known)
        lines[op] = relaxations.relax(op, bounds, relu_lower)
        return bounds

    return entered, lines


def _substitute(
    graph: Graph, known: propagation.Known, regions: Sequence[Region], lines: dict[Op, Lines], *, intersect: bool
) -> Interval:
    assert isinstance(graph.output, Node)
    sets = dict(zip(graph.inputs, regions, strict=True))
    bounds = two_sided(graph, graph.output, lines, sets, known.centers)
    return bounds.intersect(propagation.fused(graph, known, regions)) if intersect else bounds
