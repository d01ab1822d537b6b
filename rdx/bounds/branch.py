"""Complete verification by branch and bound: beta-CROWN (Wang et al. 2021, arXiv:2103.06624) and bisection of inputs.

The region is cut into subdomains until a lower bound settles each of them or a counterexample is found (Bunel et al.
2020, arXiv:1909.06588). The tree lives on the host; subdomains are bounded many at a time by compiled functions of
fixed shape, which are compiled once for all problems of the same `fn` and shapes.
"""

import enum
import functools
import heapq
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdx.bounds import exact, splits, subdomains
from rdx.bounds.certify import ROUNDING
from rdx.bounds.interval import Interval
from rdx.bounds.splits import Multipliers, Outcome
from rdx.bounds.subdomains import Problem, Relaxed, Split, Subdomains
from rdx.compilation import as_partial, cpu_options
from rdx.types import Array, PyTree

_TIMEOUT = "Time ran out."
# The largest multiplier that is kept, a float16.
_LARGEST = 6e4


class Verdict(enum.Enum):
    """What is known of a property."""

    CERTIFIED = "certified"
    FALSIFIED = "falsified"
    UNKNOWN = "unknown"


class Verification(NamedTuple):
    """The result of `verify`.

    Attributes:
        verdict: whether the property holds.
        reason: why the search ended, one sentence.
        is_timeout: whether time ran out.
        lower: a lower bound, before the allowance for rounding, of the largest output of any clause over the region.
        num_domains: subdomains that were bounded.
        counterexample: an input of the region that violates the property, with a batch of one; else None.
        outputs: what `fn` makes of it in float64, shape `[1, M]`; else None.
    """

    verdict: Verdict
    reason: str
    is_timeout: bool
    lower: float
    num_domains: int
    counterexample: PyTree | None
    outputs: np.ndarray | None


def verify(
    fn: Callable[..., Array], region: PyTree, *args: PyTree, clauses: Sequence[Sequence[int]] | None = None,
    split: Split = "relu", attack: Callable[..., PyTree] | None = None, timeout_s: float = 60.0,
    max_domains: int = 1_000_000, capacity: int = 32, num_steps: int = 10,
) -> Verification:
    """Decides whether in each clause, everywhere in the region, some output is positive.

    With `split="relu"` a subdomain fixes the signs of neurons of relu, leaky relu, abs, min, max with a constant and
    clipping. Slopes and multipliers are optimised for each (see `rdx.bounds.splits`), the neuron to split is the best
    of a few (kFSB; De Palma et al. 2021, arXiv:2104.06718), and where no neuron is left to split the piece is settled
    by a linear program. So the search is complete, up to the allowance for rounding, for functions whose nonlinear
    operations are all of that kind, over boxes. Others keep their relaxation, and the search may end undecided.

    With `split="input"` a subdomain is a box, whose layers CROWN bounds anew, and the axis with the largest
    `|coefficient| * width` is halved. That converges for every function with bounds; it is the way to go below about
    ten input dimensions, as in ACAS Xu.

    An output counts as positive where its bound exceeds `1e-5 * max |z|`, as in `certify`. A counterexample lies in the
    region exactly, and all outputs of some clause are at most 0 there in float64: inputs, arguments and, if `fn` is a
    `jax.tree_util.Partial`, its parameters are cast; constants of a closure are not, and what `fn` rounds itself stays
    rounded. NaN and infinity are never certified. Exceptions pass through.

    This is a driver for the host: it compiles and cannot be traced.

    Args:
        fn: `(x, *args) -> [1, M]`, any JAX function; margins, as `margins.of` builds them, for a classifier.
        region: the perturbed input, a batch of one: from `Ball.region(x[:1])` or built by hand.
        *args: further arguments, not perturbed, each with a batch axis of one.
        clauses: tuples of outputs; each output is its own clause by default.
        split: what is split, "relu" or "input"; the latter over boxes only.
        attack: `(fn, region, *args) -> candidates` with a leading axis of any length; runs first, and what it returns
            is checked before it is believed.
        timeout_s: seconds, compilation included; looked at between steps.
        max_domains: subdomains to bound at most.
        capacity: subdomains bounded at a time, at least 2.
        num_steps: steps of gradient ascent for each subdomain.

    Returns:
        The verdict, with a counterexample where it is falsified.

    Raises:
        UnsupportedPrimitiveError: if `fn` uses an operation without a rule.
        ValueError: on a batch other than one, an empty region, or clauses or options that do not fit.
    """
    problem = Problem(as_partial(fn), region, args)
    _check(problem, split, capacity)
    deadline = time.monotonic() + timeout_s
    with jax.default_matmul_precision("highest"):
        outputs = jax.eval_shape(exact.evaluate, problem, [r.center for r in subdomains.regions_of(problem)])
        refuter = exact.Refuter(problem, _clauses(clauses, outputs.shape))
        refuter.consider([region.center for region in subdomains.regions_of(problem)])
        if attack is not None and refuter.counterexample is None:
            refuter.consider(jax.tree.leaves(attack(fn, region, *args)))
        if refuter.counterexample is not None:
            return _result(refuter, Verdict.FALSIFIED, "A candidate is a counterexample.", -np.inf, 0)
        tree = _Tree(problem, refuter, split, capacity, num_steps)
        if not np.isfinite(tree.slack):
            return _result(refuter, Verdict.UNKNOWN, "Bounds of the region are not finite.", -np.inf, 0)
        verdict, reason = _search(tree, deadline, max_domains)
        return _result(refuter, verdict, reason, tree.lower, tree.num_domains)


def _search(tree: "_Tree", deadline: float, max_domains: int) -> tuple[Verdict, str]:
    """Bounds and splits until everything is settled or a limit is reached."""
    while tree.waiting or tree.open:
        if time.monotonic() > deadline:
            return Verdict.UNKNOWN, _TIMEOUT
        if tree.num_domains >= max_domains:
            return Verdict.UNKNOWN, "The limit of subdomains is reached."
        tree.step()
        if tree.refuter.counterexample is not None:
            return Verdict.FALSIFIED, "The search found a counterexample."
    if tree.num_stuck:
        return Verdict.UNKNOWN, "Subdomains that cannot be split further are not settled."
    return Verdict.CERTIFIED, "Every subdomain is settled."


def _result(refuter: exact.Refuter, verdict: Verdict, reason: str, lower: float, num_domains: int) -> Verification:
    return Verification(
        verdict, reason, reason == _TIMEOUT, lower, num_domains, refuter.counterexample, refuter.outputs
    )


class _Domain(NamedTuple):
    """A subdomain on the host.

    Attributes:
        clause: which clause is to hold there.
        boxes: for each input the box it ranges over.
        signs: see `Subdomains`.
        lower: lower bounds of the clause's outputs, inherited from the whole until its own are known.
        start: the multipliers of these bounds, None before any.
        choice: what to split.
    """

    clause: int
    boxes: list[Any]
    signs: np.ndarray
    lower: np.ndarray
    start: Multipliers | None = None
    choice: int = 0


class _Tree:
    """Which subdomains are still to be bounded, which are open, and what came of the others."""

    def __init__(
        self, problem: Problem, refuter: exact.Refuter, split: Split, capacity: int, num_steps: int
    ) -> None:
        self.problem, self.refuter, self.split = problem, refuter, split
        self.capacity, self.num_steps = capacity, num_steps
        self.is_linear, num_neurons = subdomains.survey(problem)
        self.whole = _compiled(subdomains.root)(problem)
        self.slack = ROUNDING * float(self.whole.scale)
        self.width = max(map(len, refuter.clauses))
        boxes = [jax.tree.map(np.asarray, Interval(r.lower, r.upper)) for r in subdomains.regions_of(problem)]
        signs, lower = np.zeros(num_neurons, np.int8), np.full(self.width, -np.inf)
        self.waiting = [_Domain(clause, boxes, signs, lower) for clause in range(len(refuter.clauses))]
        self.open: list[tuple[float, int, _Domain]] = []
        self.closed_lower, self.num_domains, self.num_pushed, self.num_stuck = np.inf, 0, 0, 0

    @property
    def lower(self) -> float:
        """The least of the bounds of all subdomains."""
        return -np.inf if self.waiting else min([self.closed_lower, *(bound for bound, _, _ in self.open)])

    def step(self) -> None:
        """Bounds a batch of subdomains and files each as settled, stuck or open."""
        domains, self.waiting = self.waiting[: self.capacity], self.waiting[self.capacity :]
        if not domains:
            parents = [heapq.heappop(self.open)[2] for _ in range(min(self.capacity // 2, len(self.open)))]
            domains = [half for parent in parents for half in self.halves(parent)]
        relaxed, outcome = self.bound(domains)
        self.num_domains += len(domains)
        self.refuter.consider([at[:, 0] for at in outcome.points])
        for i, domain in enumerate(domains):
            if not relaxed.is_empty[i]:
                # Any multipliers will do to begin with: half of the memory, and a copy that lets go of the batch.
                start = jax.tree.map(lambda v, i=i: np.minimum(v[i], _LARGEST).astype(np.float16), outcome.best)
                # Halves inherit the bound of the whole; NaN and infinity are no bounds.
                own = np.where(np.isfinite(outcome.lower[i]), outcome.lower[i], -np.inf)
                lower = np.maximum(domain.lower, own)
                known = domain._replace(lower=lower, start=start, choice=int(outcome.choice[i]))
                self.file(known, np.asarray(relaxed.is_unstable[i]), np.asarray(relaxed.is_active[i]))

    def file(self, domain: _Domain, is_unstable: np.ndarray, is_active: np.ndarray) -> None:
        """Decides what becomes of a subdomain whose bounds are known."""
        bound = float(domain.lower.max())
        can_split = bool(is_unstable.any()) if self.split == "relu" else _can_halve(domain.boxes, domain.choice)
        if not bound > self.slack and not can_split and self.split == "relu" and self.is_linear:
            bound = max(bound, self.solve(domain, is_active))
        if bound > self.slack or not can_split:
            self.num_stuck += not bound > self.slack
            self.closed_lower = min(self.closed_lower, bound)
        else:
            self.num_pushed += 1  # unique, so that the heap never compares subdomains
            heapq.heappush(self.open, (bound, self.num_pushed, domain))

    def solve(self, domain: _Domain, is_active: np.ndarray) -> float:
        """Bounds the clause on a linear piece by a linear program."""
        outputs = np.asarray(self.refuter.clauses[domain.clause])
        found = exact.minimum(self.problem, domain.signs, is_active, outputs)
        if found.points is not None:
            for dtype in (np.float32, np.float64):
                self.refuter.check([point.astype(dtype) for point in found.points])
        return found.lower

    def halves(self, parent: _Domain) -> list[_Domain]:
        """Splits a subdomain in two at what was chosen for it."""
        if self.split == "input":
            return [parent._replace(boxes=boxes) for boxes in _halve(parent.boxes, parent.choice)]
        both = [parent._replace(signs=parent.signs.copy()) for _ in range(2)]
        for half, sign in zip(both, (-1, 1), strict=True):
            half.signs[parent.choice] = sign
        return both

    def bound(self, domains: list[_Domain]) -> tuple[Relaxed, Outcome]:
        """Bounds at most `capacity` subdomains on the device; copies of the first fill up."""
        filled = domains + domains[:1] * (self.capacity - len(domains))
        clauses = [self.refuter.clauses[d.clause] for d in filled]
        boxes = jax.tree.map(lambda *ends: np.stack(ends), *(d.boxes for d in filled))
        batch = jax.tree.map(jnp.asarray, Subdomains(
            boxes if self.split == "input" else filled[0].boxes,
            jnp.asarray(np.stack([d.signs for d in filled])),
            jnp.asarray([(clause + clause[:1] * self.width)[: self.width] for clause in clauses]),
        ))
        relaxed = _compiled(subdomains.relax)(self.problem, self.whole, batch, split=self.split)
        state = _compiled(splits.begin)(batch, self.start(filled, relaxed))
        for _ in range(self.num_steps):
            state = _compiled(splits.ascend)(self.problem, batch, relaxed, state, split=self.split)
            if (np.asarray(relaxed.is_empty) | (np.asarray(state.lower).max(axis=1) > self.slack)).all():
                break
        outcome = _compiled(splits.finish)(self.problem, self.whole, batch, relaxed, state, split=self.split)
        return jax.tree.map(np.asarray, (relaxed, outcome))

    def start(self, domains: list[_Domain], relaxed: Relaxed) -> Multipliers:
        """Begins where the parents ended, with the slopes of plain CROWN where there is nothing to begin with."""
        if self.split == "input" or domains[0].start is None:
            alpha = jnp.repeat(relaxed.alpha[:, None], self.width, axis=1)
            return Multipliers(alpha, jnp.zeros_like(alpha))
        dtype = relaxed.alpha.dtype
        return jax.tree.map(lambda *values: jnp.asarray(np.stack(values), dtype), *(d.start for d in domains))


def _can_halve(boxes: list[Any], axis: int) -> bool:
    """Tells whether a floating-point number lies inside."""
    lower, upper = (np.concatenate([end.ravel() for end in ends])[axis] for ends in zip(*boxes, strict=True))
    return bool(lower < _middle(lower, upper) < upper)


def _halve(boxes: list[Any], axis: int) -> tuple[list[Any], list[Any]]:
    """Bisects boxes along one element of all inputs together; the halves share the middle."""
    below, above = (jax.tree.map(np.copy, boxes) for _ in range(2))
    for i, box in enumerate(boxes):
        if axis < box.lower.size:
            middle = _middle(box.lower.flat[axis], box.upper.flat[axis])
            below[i].upper.flat[axis] = above[i].lower.flat[axis] = middle
            break
        axis -= box.lower.size
    return below, above


def _middle(lower: np.floating, upper: np.floating) -> Any:
    return lower + (upper - lower) / 2


@functools.cache
def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    static = ["split"] if fn in {subdomains.relax, splits.ascend, splits.finish} else []
    return jax.jit(fn, static_argnames=static, compiler_options=cpu_options())


def _clauses(clauses: Sequence[Sequence[int]] | None, shape: tuple[int, ...]) -> list[list[int]]:
    """Gives the clauses as lists of outputs.

    Raises:
        ValueError: if `fn` does not return `[1, M]`, or a clause is empty or names an output that is not there.
    """
    if len(shape) != 2:
        raise ValueError(f"verify is of functions that return [1, M], this one returns {[1, *shape[1:]]}.")
    found = [[i] for i in range(shape[1])] if clauses is None else [list(clause) for clause in clauses]
    if not found or not all(clause and all(0 <= i < shape[1] for i in clause) for clause in found):
        raise ValueError(f"Clauses are tuples of at least one output in 0..{shape[1] - 1}, got {clauses}.")
    return found


def _check(problem: Problem, split: Split, capacity: int) -> None:
    regions = subdomains.regions_of(problem)
    if split not in {"relu", "input"}:
        raise ValueError(f"split is 'relu' or 'input', got {split!r}.")
    if capacity < 2:
        raise ValueError(f"capacity is {capacity}: a subdomain has two halves, so at least 2.")
    if any(leaf.shape[0] != 1 for leaf in jax.tree.leaves((problem.region, problem.args))):
        raise ValueError("verify takes one example: a region and arguments with a batch of one, such as x[:1].")
    if split == "input" and any(region.norm != "linf" for region in regions):
        raise ValueError("split='input' cuts boxes: use the linf norm, or split='relu' for l2 and l1.")
    for region in regions:
        if not np.all(np.asarray(region.lower) <= np.asarray(region.upper)):
            raise ValueError("The region is empty or not a number: lower must be at most upper everywhere.")
