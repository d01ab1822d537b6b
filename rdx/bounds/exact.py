"""The float64 side of complete verification: counterexamples, and linear pieces as linear programs (Ehlers 2017).

Where every neuron has a known sign the function is affine, and the least value of `max_i f_i` over the piece is a
linear program over the input alone (Ehlers 2017, arXiv:1705.01320, without its relaxation).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from rdx.bounds import subdomains
from rdx.bounds.graph import PIECEWISE_LINEAR
from rdx.bounds.rounding import double_precision, doubled
from rdx.bounds.subdomains import Problem
from rdx.types import Array, ArrayLike, PyTree

# Candidates of one batch that are evaluated in float64.
_NUM_CHECKED = 8
# Rows of a linear piece are computed in blocks of this many, so that few programs are compiled.
_BLOCK = 16
# Brings a point that rounding has left outside of a ball back into it.
_INWARDS = 1.0 - 1e-6


class Minimum(NamedTuple):
    """The least value over a linear piece.

    Attributes:
        lower: a lower bound of it; infinity where the piece is empty, minus infinity where nothing is known.
        points: where it is reached, for each input, float64; None where there is no such point.
    """

    lower: float
    points: list[np.ndarray] | None


class Refuter:
    """Looks for a counterexample among candidates; keeps the first, and what `fn` makes of it in float64."""

    def __init__(self, problem: Problem, clauses: list[list[int]]) -> None:
        self.problem, self.clauses = problem, clauses
        self.counterexample: PyTree | None = None
        self.outputs: np.ndarray | None = None

    def consider(self, points: Sequence[ArrayLike]) -> None:
        """Checks the most promising of several candidates, each input of shape `[N, ...]`."""
        values = np.asarray(_evaluate(self.problem, points))
        worst = np.stack([values[:, clause].max(axis=1) for clause in self.clauses]).min(axis=0)
        for i in np.argsort(worst)[:_NUM_CHECKED]:
            if worst[i] <= 0.0:
                self.check([np.asarray(x)[i : i + 1] for x in points])

    def check(self, points: Sequence[np.ndarray]) -> None:
        """Believes a candidate if it lies in the region and violates a clause in float64."""
        points = inside(self.problem, points)
        with double_precision():
            problem = doubled(self.problem)
            outputs = np.asarray(_evaluate(problem, [jnp.asarray(x, jnp.float64) for x in points]))
        is_violated = any((outputs[0, clause] <= 0.0).all() for clause in self.clauses)
        if is_violated and self.counterexample is None and contains(self.problem, points):
            treedef = jax.tree.structure(self.problem.region, is_leaf=subdomains.is_region)
            self.counterexample, self.outputs = jax.tree.unflatten(treedef, points), outputs


def evaluate(problem: Problem, points: Sequence[Array]) -> Array:
    """Computes the outputs `[N, M]` at several points, each as a batch of one."""
    treedef = jax.tree.structure(problem.region, is_leaf=subdomains.is_region)
    one = lambda x: problem.fn(jax.tree.map(lambda leaf: leaf[None], x), *problem.args)[0]
    return jax.vmap(one)(jax.tree.unflatten(treedef, points))


def inside(problem: Problem, points: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Moves a point into the region: to the box, then towards the center of a ball."""
    moved = []
    for point, region in zip(points, subdomains.regions_of(problem), strict=True):
        lower, upper, center, radius = (
            np.asarray(part, np.float64) for part in (region.lower, region.upper, region.center, region.radius)
        )
        point = np.clip(point, np.asarray(region.lower), np.asarray(region.upper)).astype(point.dtype)
        if region.norm != "linf":
            distance = _distance(point, center, radius, region.norm)
            share = _INWARDS / distance if distance > 1.0 else 1.0
            point = np.clip(center + share * (point - center), lower, upper).astype(point.dtype)
        moved.append(point)
    return moved


def contains(problem: Problem, points: Sequence[np.ndarray]) -> bool:
    """Tells whether a point lies in the region, without any tolerance."""
    for point, region in zip(points, subdomains.regions_of(problem), strict=True):
        lower, upper, center, radius = (
            np.asarray(part, np.float64) for part in (region.lower, region.upper, region.center, region.radius)
        )
        if point.shape != lower.shape or not ((point >= lower) & (point <= upper)).all():
            return False
        if region.norm != "linf" and not _distance(point, center, radius, region.norm) <= 1.0:
            return False
    return True


def minimum(problem: Problem, signs: np.ndarray, is_active: np.ndarray, outputs: np.ndarray) -> Minimum:
    """Minimises the largest of some outputs over a subdomain on which every neuron has a known sign.

    The bound does not rely on the solver: it is the value of the dual at the solver's multipliers, which any weights
    `w >= 0` with sum 1 and `y >= 0` make a lower bound (Neumaier & Shcherbina 2004). Over an l2 or l1 ball the program
    is solved over the box around it, so the bound may be lower than the least value.

    Args:
        problem: what is verified; its function has no nonlinear operations but those that can be split.
        signs: -1, 0, +1 for each neuron, shape `[N]`; those that are not 0 are constraints.
        is_active: whether a neuron is never negative, shape `[N]`, bool.
        outputs: which outputs, shape `[M]`.

    Returns:
        The bound and the minimiser.
    """
    (split,) = np.nonzero(signs)
    rows, offsets = _affine_piece(problem, is_active, np.concatenate([split, len(signs) + outputs]))
    sign = signs[split].astype(np.float64)
    walls, heights = -sign[:, None] * rows[: len(split)], -sign * offsets[: len(split)]  # at most 0 on the piece
    box = [
        np.concatenate([np.asarray(end, np.float64).ravel() for end in ends])
        for ends in zip(*((region.lower, region.upper) for region in subdomains.regions_of(problem)), strict=True)
    ]
    found = _minimax(rows[len(split) :], offsets[len(split) :], walls, heights, box)
    if found is None and len(split):
        # No input fulfils the signs, if there is a multiple of the constraints that is positive on the whole box.
        violation = _minimax(walls, heights, walls[:0], heights[:0], box)
        return Minimum(np.inf if violation is not None and violation[0] > 0.0 else -np.inf, None)
    if found is None:
        return Minimum(-np.inf, None)
    lower, x = found
    sizes = np.cumsum([region.center.size for region in subdomains.regions_of(problem)])[:-1]
    shapes = [region.center.shape for region in subdomains.regions_of(problem)]
    return Minimum(lower, [p.reshape(shape) for p, shape in zip(np.split(x, sizes), shapes, strict=True)])


def _minimax(
    rows: np.ndarray, offsets: np.ndarray, walls: np.ndarray, heights: np.ndarray, box: Sequence[np.ndarray]
) -> tuple[float, np.ndarray] | None:
    """Solves `min_x max_i (rows_i x + offsets_i)` with `walls x + heights <= 0` in a box; None without a solution."""
    size = rows.shape[1]
    matrix = np.block([[rows, -np.ones((len(rows), 1))], [walls, np.zeros((len(walls), 1))]])
    limits = [*zip(*box, strict=True), (None, None)]
    cost = np.r_[np.zeros(size), 1.0]
    solution = scipy.optimize.linprog(cost, matrix, -np.r_[offsets, heights], bounds=limits, method="highs")
    if not solution.success:
        return None
    weights = np.maximum(-solution.ineqlin.marginals, 0.0)
    weights, multipliers = weights[: len(rows)], weights[len(rows) :]
    weights = weights / weights.sum()
    slope, offset = weights @ rows + multipliers @ walls, weights @ offsets + multipliers @ heights
    return float(offset + np.where(slope > 0, slope * box[0], slope * box[1]).sum()), solution.x[:size]


def _affine_piece(problem: Problem, is_active: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes neurons, and outputs numbered after them, as affine functions of the input: rows and offsets."""
    padded = np.pad(indices, (0, -len(indices) % _BLOCK), mode="edge").reshape(-1, _BLOCK)
    with double_precision():
        blocks = [_rows(doubled(problem), jnp.asarray(is_active), jnp.asarray(block)) for block in padded]
    rows, offsets = (np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*blocks, strict=True))
    return rows[: len(indices)], offsets[: len(indices)]


@jax.jit
def _rows(problem: Problem, is_active: Array, indices: Array) -> tuple[Array, Array]:
    graph = subdomains.traced(problem)
    pattern = subdomains.by_layer(graph, is_active)

    def values_at(inputs: list[Array]) -> Array:
        values, bent = dict(zip(graph.inputs, inputs, strict=True)), []
        for op in graph.ops:
            given = [values[node] for node in op.nodes]
            if op.name == PIECEWISE_LINEAR:
                slope = jnp.where(pattern[len(bent)], op.params["above"], op.params["below"])
                bent.append(given[0])
                values[op.outputs[0]] = slope * given[0]
            else:
                values.update(zip(op.outputs, op.apply(*given), strict=True))
        return jnp.concatenate([v.reshape(-1) for v in [*bent, values[subdomains.output(graph)]]])[indices]

    centers = [region.center for region in subdomains.regions_of(problem)]
    values, transpose = jax.vjp(values_at, centers)
    (slopes,) = jax.vmap(transpose)(jnp.eye(len(indices), dtype=values.dtype))
    rows = jnp.concatenate([slope.reshape(len(indices), -1) for slope in slopes], axis=1)
    return rows, values - rows @ jnp.concatenate([center.reshape(-1) for center in centers])


_evaluate = jax.jit(evaluate)


def _distance(point: np.ndarray, center: np.ndarray, radius: np.ndarray, norm: str) -> float:
    moves = radius > 0
    scaled = np.abs((point.astype(np.float64) - center)[moves] / radius[moves])
    return float(np.sqrt(np.square(scaled).sum()) if norm == "l2" else scaled.sum())
