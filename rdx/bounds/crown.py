"""CROWN (Zhang et al. 2018, arXiv:1811.00866) and CROWN-IBP (Zhang et al. 2020, arXiv:1906.06316)."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax

from rdx.balls import Region
from rdx.bounds import propagation, relaxations
from rdx.bounds.chunks import Chunks, Optimise, two_sided
from rdx.bounds.graph import PIECEWISE_LINEAR, Graph, Node, Op
from rdx.bounds.interval import Interval
from rdx.bounds.relaxations import SlopeFn
from rdx.types import Array, PyTree

# (slope choice -> lower bounds, bounds with which operations are entered) -> lower bounds of the best choice.
OptimiseOver: TypeAlias = Callable[[Callable[..., Array], Mapping[Op, Sequence[Interval]]], Array]


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
        relaxed = Relaxed(propagation.interval_entry(graph, regions), relu_lower)
        known = propagation.propagate(graph, regions, relaxed.enter)
        return _output(graph, known, regions, relaxed, intersect=intersect)

    return propagation.per_example(bound, fn, region, *args)


def crown(
    fn: Callable[..., Array], region: PyTree, *args: PyTree, relu_lower: SlopeFn = relaxations.adaptive,
    intersect: bool = True, max_bytes: float | None = None,
) -> Interval:
    """Bounds `fn` by backward substitution, with hidden bounds that come from backward substitution as well.

    The tightest of the three methods and the most expensive: every nonlinear layer costs a backward pass with one row
    per neuron, whose coefficients are dense. Bounds of an example never depend on who shares its batch.

    Source: Zhang et al. (2018, CROWN, arXiv:1811.00866, Sec. 3.2).

    Args:
        fn: any JAX function `(x, *args) -> [B, ...]` whose examples are independent.
        region: the perturbed inputs, from `Ball.region`; a pytree of regions where `x` is a pytree.
        *args: further arguments, not perturbed; every leaf has a leading batch axis.
        relu_lower: choice of the lower slope of unstable relus, such as `relaxations.adaptive` or `same_slope`. With
            the latter both sides of a net of relus have the same coefficients, and cost half as much.
        intersect: intersect the bounds of every layer with intervals, and bound only those relus by substitution that
            intervals leave undecided; without it this is CROWN to the letter.
        max_bytes: about how much memory the coefficients of hidden layers may take; they are computed in chunks. By
            default 16 MiB on CPUs, which fits into their caches, as more is slower there; 1 GiB elsewhere.

    Returns:
        Bounds of the output, each end of shape `[B, ...]`.

    Raises:
        UnsupportedPrimitiveError: if `fn` uses an operation without a rule.
    """
    return layer_by_layer(fn, region, *args, relu_lower=relu_lower, intersect=intersect, max_bytes=max_bytes)


def layer_by_layer(
    fn: Callable[..., Array], region: PyTree, *args: PyTree, relu_lower: SlopeFn = relaxations.adaptive,
    intersect: bool = True, max_bytes: float | None = None, optimise_hidden: OptimiseOver | None = None,
    optimise_output: OptimiseOver | None = None,
) -> Interval:
    """Bounds `fn` by substitution from every layer, with slopes that may be optimised; see `crown` and `alpha_crown`.

    Args:
        fn: as in `crown`, like all that is not named here.
        region: the perturbed inputs.
        *args: further arguments.
        relu_lower: choice of the lower slope of unstable relus.
        intersect: intersect the bounds of every layer with intervals.
        max_bytes: about how much memory the coefficients may take.
        optimise_hidden: `(value, entered) -> lower bounds`, finds the best slopes for some rows of hidden layers, where
            `value(choice of slopes)` computes their bounds and `entered` holds the inputs' bounds of all operations.
        optimise_output: the same for the output.

    Returns:
        Bounds of the output, each end of shape `[B, ...]`.
    """
    batch, budget = propagation.batch_size(region, *args), default_max_bytes() if max_bytes is None else max_bytes

    def bound(graph: Graph, regions: Sequence[Region]) -> Interval:
        relaxed, known = walk(
            graph, regions, relu_lower=relu_lower, intersect=intersect, max_bytes=budget / batch,
            optimise=optimise_hidden,
        )
        return _output(graph, known, regions, relaxed, intersect=intersect, optimise=relaxed.over(optimise_output))

    return propagation.per_example(bound, fn, region, *args)


def walk(
    graph: Graph, regions: Sequence[Region], *, relu_lower: SlopeFn = relaxations.adaptive, intersect: bool = True,
    max_bytes: float | None = None, optimise: OptimiseOver | None = None,
) -> tuple["Relaxed", propagation.Known]:
    """Bounds what enters every nonlinear operation by substitution; see `layer_by_layer`.

    Returns:
        The bounds and lines of nonlinear operations, and the intervals of all nodes.
    """
    sets = dict(zip(graph.inputs, regions, strict=True))

    def substitute(op: Op, node: Node, known: propagation.Known) -> Interval:
        suffix, ends = propagation.affine_suffix(graph, node)
        is_box, is_first = all(sets[n].norm == "linf" for n in ends if n in sets), ends <= sets.keys()
        if is_box and is_first and sum(op.is_mixing for op in suffix) <= 1:
            return known.intervals[node]  # one layer over a box: that is exact already
        chunks = Chunks(default_max_bytes() if max_bytes is None else max_bytes)
        if intersect and is_first:
            # Substitution is exact here. Of an l2 or l1 ball the interval knows no more than a box around it.
            interval = known.intervals[node]
            chunks = chunks._replace(known=interval, is_needed=_is_needed(op, interval) if is_box else None)
        elif intersect:
            interval = propagation.by_intervals(graph, node, known, regions)
            chunks = chunks._replace(known=interval, is_needed=_is_needed(op, interval))
        over = relaxed.over(optimise)
        return two_sided(graph, node, relaxed.lines, sets, known.centers, chunks=chunks, optimise=over)

    relaxed = Relaxed(lambda op, known: [substitute(op, node, known) for node in op.nodes], relu_lower)
    return relaxed, propagation.propagate(graph, regions, relaxed.enter)


def default_max_bytes() -> float:
    """Gives what the coefficients of hidden layers may take if nobody says otherwise."""
    return 2.0**24 if jax.default_backend() == "cpu" else 2.0**30


def _is_needed(op: Op, interval: Interval) -> Array | None:
    """Tells where lines depend on the bounds: a stable relu is linear whatever they are."""
    return relaxations.is_unstable(interval) if op.name == PIECEWISE_LINEAR else None


class Relaxed:
    """Remembers with which bounds nonlinear operations are entered, and their lines there.

    Attributes:
        entered: bounds of the inputs of each operation.
        lines: its relaxation there.
    """

    def __init__(self, enter: Callable[[Op, propagation.Known], list[Interval]], relu_lower: SlopeFn) -> None:
        self.entered: dict[Op, list[Interval]] = {}
        self.lines = propagation.record().lines
        self._enter, self._relu_lower = enter, relu_lower

    def over(self, optimise: OptimiseOver | None) -> Optimise | None:
        """Hands the bounds to whoever optimises slopes, which needs them when it runs."""
        return None if optimise is None else lambda value: optimise(value, self.entered)

    def enter(self, op: Op, known: propagation.Known) -> list[Interval]:
        """Bounds the inputs of an operation and relaxes it."""
        self.entered[op] = self._enter(op, known)
        self.lines[op] = relaxations.relax(op, self.entered[op], self._relu_lower)
        return self.entered[op]


def _output(
    graph: Graph, known: propagation.Known, regions: Sequence[Region], relaxed: Relaxed, *, intersect: bool,
    optimise: Optimise | None = None,
) -> Interval:
    assert isinstance(graph.output, Node)
    sets = dict(zip(graph.inputs, regions, strict=True))
    bounds = two_sided(graph, graph.output, relaxed.lines, sets, known.centers, optimise=optimise)
    return bounds.intersect(propagation.fused(graph, known, regions)) if intersect else bounds
