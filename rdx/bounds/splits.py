"""Bounds of subdomains in which some neurons keep their sign: beta-CROWN (Wang et al. 2021, arXiv:2103.06624).

A subdomain of the region `C` is `{x in C : s_k z_k(x) >= 0}` for split neurons `z_k` with signs `s_k` in {-1, +1}. For
every `beta >= 0`

    min {f(x) : x in C, s_k z_k(x) >= 0}  >=  min {f(x) - sum_k beta_k s_k z_k(x) : x in C},

because the sum is not negative on the subdomain. The right side is bounded by backward substitution: `-beta_k s_k` is
one more coefficient on the node `z_k` (Wang et al. 2021, Theorem 3.1). A split neuron is affine and needs no lines; the
free ones have lower lines through the kink with slopes `alpha` in [0, 1] (Xu et al. 2021, alpha-CROWN,
arXiv:2011.13824). Every `alpha` and `beta` bounds from below, and gradient ascent looks for the best.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rdx.balls import Region
from rdx.bounds import linear, relaxations, subdomains
from rdx.bounds.graph import Graph, Node, Op
from rdx.bounds.interval import Interval
from rdx.bounds.relaxations import Lines
from rdx.bounds.subdomains import Problem, Relaxed, Root, Split, Subdomains
from rdx.types import Array

# Step sizes of Adam: for slopes, and for multipliers in units of the largest coefficient of their layer.
_ALPHA_STEP, _BETA_STEP = 0.1, 0.1
# Neurons whose halves are bounded before one of them is split (De Palma et al. 2021, arXiv:2104.06718, Sec. 4). On
# random nets with 40 and 48 neurons the tree is no smaller with 8 or 12 of them.
_NUM_CANDIDATES = 4


class Multipliers(NamedTuple):
    """What is optimised for every subdomain and output: each of shape `[D, M, N]`.

    Attributes:
        alpha: slopes in [0, 1].
        beta: multipliers of the signs, at least 0.
    """

    alpha: Array
    beta: Array


class Ascent(NamedTuple):
    """The state of the optimisation: where it is, the best seen, bounds `[D, M]` there, and what Adam remembers."""

    current: Multipliers
    best: Multipliers
    lower: Array
    moments: optax.OptState


class Outcome(NamedTuple):
    """What is known of subdomains in the end.

    Attributes:
        lower: lower bounds of their outputs, shape `[D, M]`.
        best: the multipliers that give them.
        choice: the neuron or the element of the input to split.
        points: where the linear bound of the best output is least, for each input `[D, 1, ...]`.
    """

    lower: Array
    best: Multipliers
    choice: Array
    points: list[Array]


class _Probe(NamedTuple):
    """Zeros that a bound is differentiated by, to read off what it is made of; see `_bound`."""

    shift: Array
    pull: list[Array]
    widen: list[Array]


def begin(domains: Subdomains, start: Multipliers) -> Ascent:
    """Begins the optimisation at given multipliers."""
    lower = jnp.full(domains.outputs.shape, -jnp.inf, start.alpha.dtype)
    return Ascent(start, start, lower, optax.scale_by_adam().init(start))


def ascend(problem: Problem, domains: Subdomains, relaxed: Relaxed, state: Ascent, *, split: Split) -> Ascent:
    """Bounds every output where the multipliers are, keeps the best, and moves them one step of Adam upwards."""
    evaluate = _evaluator(problem, domains, relaxed, split=split)
    probe = _zero_probe(problem, domains)

    def total(multipliers: Multipliers, probe: _Probe) -> tuple[Array, Array]:
        lower = evaluate(multipliers, probe)
        return lower.sum(), lower

    (_, lower), (gradient, slopes) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(state.current, probe)
    best, lower = _keep_better(state, state.current, lower)
    # Adam minimises. A bound that is not finite stays where it is.
    ascent = jax.tree.map(lambda g: -jnp.nan_to_num(g, posinf=0.0, neginf=0.0), gradient)
    updates: Any
    with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
        updates, moments = optax.scale_by_adam().update(ascent, state.moments)
    unit = _largest_of_layer(subdomains.traced(problem), jnp.abs(slopes.shift))
    current = Multipliers(
        jnp.clip(state.current.alpha - _ALPHA_STEP * updates.alpha, 0.0, 1.0),
        jnp.maximum(state.current.beta - _BETA_STEP * unit * updates.beta, 0.0),
    )
    return Ascent(current, best, lower, moments)


def finish(
    problem: Problem, whole: Root, domains: Subdomains, relaxed: Relaxed, state: Ascent, *, split: Split
) -> Outcome:
    """Bounds every output a last time, and finds where to look for a counterexample and what to split."""
    evaluate = _evaluator(problem, domains, relaxed, split=split)
    probe = _zero_probe(problem, domains)
    best, lower = _keep_better(state, state.current, evaluate(state.current, probe))
    slopes = jax.grad(lambda probe: evaluate(best, probe).sum())(probe)
    row = jnp.argmax(lower, axis=1)
    pick = lambda values: jax.vmap(lambda rows, i: rows[i])(values, row)
    boxes = _repeat(domains.boxes, len(row), split=split)
    points = [jnp.clip(pick(at), *box) for at, box in zip(slopes.pull, boxes, strict=True)]
    if split == "input":
        choice = _choose_axis(problem, domains, relaxed, row)
    else:
        choice = _choose_neuron(problem, whole, domains, relaxed, jax.tree.map(pick, best), row, pick(slopes.shift))
    return Outcome(lower, best, choice, points)


def _choose_axis(problem: Problem, domains: Subdomains, relaxed: Relaxed, row: Array) -> Array:
    """Chooses the element of the input with the largest `|coefficient| * width`, for the slopes of plain CROWN.

    Slopes that are optimised balance the coefficients about 0, where they no longer tell which axis matters.
    """
    alpha = jnp.repeat(relaxed.alpha[:, None], domains.outputs.shape[1], axis=1)
    evaluate = _evaluator(problem, domains, relaxed, split="input")
    total = lambda probe: evaluate(Multipliers(alpha, jnp.zeros_like(alpha)), probe).sum()
    losses = jax.grad(total)(_zero_probe(problem, domains)).widen
    scores = [
        (-jax.vmap(lambda rows, i: rows[i])(loss, row) * (box.upper - box.lower)).reshape(len(row), -1)
        for loss, box in zip(losses, domains.boxes, strict=True)
    ]
    return jnp.argmax(jnp.concatenate(scores, axis=1), axis=1)


def _choose_neuron(
    problem: Problem, whole: Root, domains: Subdomains, relaxed: Relaxed, best: Multipliers, row: Array,
    coefficients: Array,
) -> Array:
    """Chooses the neuron whose halves have the highest bounds, among the few of the highest score.

    The score is what the intercept of the chord costs, a tenth of that where the coefficient is such that the bound
    does not use the chord (Bunel et al. 2020, BaBSR, arXiv:1909.06588, without the biases of layers). The halves are
    bounded with the multipliers of the whole (De Palma et al. 2021, kFSB), and count up to 0, where they are settled:
    that one is far above 0 is worth nothing.
    """
    costs = -coefficients * _intercepts(subdomains.traced(problem), relaxed)
    scores = jnp.where(relaxed.is_unstable, jnp.maximum(costs, -0.1 * costs), -1.0)
    num_domains, num_neurons = scores.shape
    if not num_neurons:
        return jnp.zeros(num_domains, int)
    _, candidates = jax.lax.top_k(scores, min(_NUM_CANDIDATES, num_neurons))
    outputs = jnp.take_along_axis(domains.outputs, row[:, None], axis=1)

    def lower_of_half(candidate: Array, sign: Array) -> Array:
        signs = domains.signs.at[jnp.arange(num_domains), candidate].set(sign)
        half = Subdomains(domains.boxes, signs, outputs)
        tight = subdomains.relax(problem, whole, half, split="relu")
        evaluate = _evaluator(problem, half, tight, split="relu")
        lower = evaluate(jax.tree.map(lambda values: values[:, None], best), _zero_probe(problem, half))[:, 0]
        return jnp.minimum(jnp.where(tight.is_empty, 0.0, lower), 0.0)

    halves = jax.vmap(jax.vmap(lower_of_half, in_axes=(None, 0)), in_axes=(1, None), out_axes=2)
    sums = halves(candidates, jnp.array([-1, 1], jnp.int8)).sum(axis=0)
    is_possible = jnp.take_along_axis(relaxed.is_unstable, candidates, axis=1)
    first = jnp.argmax(jnp.where(is_possible, sums, -jnp.inf), axis=1)
    return jnp.take_along_axis(candidates, first[:, None], axis=1)[:, 0]


def _evaluator(
    problem: Problem, domains: Subdomains, relaxed: Relaxed, *, split: Split
) -> Callable[[Multipliers, _Probe], Array]:
    """Makes the function that bounds every output of every subdomain, `[D, M]`, for given multipliers."""
    graph, regions = subdomains.traced(problem), subdomains.regions_of(problem)
    per_output = jax.vmap(functools.partial(_bound, graph, regions), in_axes=(None, None, None, 0, 0, 0))
    per_domain = jax.vmap(per_output, in_axes=(subdomains.box_axis(split), 0, 0, 0, 0, 0))
    return lambda multipliers, probe: per_domain(
        domains.boxes, domains.signs, relaxed.entries, domains.outputs, multipliers, probe
    )


def _bound(
    graph: Graph, regions: Sequence[Region], boxes: list[Interval], signs: Array, entries: Sequence[Interval | Lines],
    output: Array, multipliers: Multipliers, probe: _Probe,
) -> Array:
    """Bounds one output on one subdomain from below.

    Derivatives by the probe, which is zero, are what the bound is made of: by `shift`, added to both lines of a neuron,
    the coefficient on it; by `pull`, coefficients on the inputs, the inputs where the linear bound is least (envelope
    theorem); by `widen`, added to both sides of the boxes, minus the magnitude of the coefficients on the inputs.
    """
    neurons = subdomains.splittable(graph)
    regions = subdomains.over(regions, boxes)
    references = dict(zip(graph.inputs, (region.center for region in regions), strict=True))
    for op in graph.ops:  # the function itself: any number will do at nonlinear operations, affine ones map exactly
        references.update(zip(op.outputs, op.apply(*(references[node] for node in op.nodes)), strict=True))
    sets = {
        node: Region(r.center, r.radius, r.lower - wide, r.upper + wide, r.norm) if r.norm == "linf" else r
        for node, r, wide in zip(graph.inputs, regions, probe.widen, strict=True)
    }
    target = subdomains.output(graph)
    row = jax.nn.one_hot(output, math.prod(target.shape), dtype=target.dtype).reshape(target.shape)
    force = subdomains.by_layer(graph, -multipliers.beta * signs.astype(multipliers.beta.dtype))
    terms = [(target, row), *zip(graph.inputs, probe.pull, strict=True)]
    objective: dict[Node, Array] = {}
    for node, term in terms + [(op.nodes[0], push) for op, push in zip(neurons, force, strict=True)]:
        objective[node] = objective[node] + term[None] if node in objective else term[None]
    slopes, shifts = (
        dict(zip(neurons, subdomains.by_layer(graph, values), strict=True))
        for values in (multipliers.alpha, probe.shift)
    )
    lines: dict[Op, Lines] = {}
    for op, entry in zip((op for op in graph.ops if not op.is_affine), entries, strict=True):
        if isinstance(entry, Lines):
            lines[op] = entry
            continue
        exact = relaxations.relax(op, [entry], lambda *_, slope=slopes[op]: slope)
        shift = shifts[op]
        lines[op] = exact._replace(lower_bias=exact.lower_bias + shift, upper_bias=exact.upper_bias + shift)
    return linear.lower_bound(graph, objective, lines, sets, references)[0]


def _intercepts(graph: Graph, relaxed: Relaxed) -> Array:
    """Computes the intercepts of the chords, `-(above - below) l u / (u - l)`, 0 if stable; shape `[D, N]`."""
    ops = [op for op in graph.ops if not op.is_affine]
    found = [jnp.zeros((len(relaxed.alpha), 0), relaxed.alpha.dtype)]
    for op, entry in zip(ops, relaxed.entries, strict=True):
        if not isinstance(entry, Lines):
            lines = relaxations.relax(op, [entry], relaxations.adaptive)
            # One of the lines goes through the kink, the other is the chord.
            found.append((lines.lower_bias + lines.upper_bias).reshape(len(relaxed.alpha), -1))
    return jnp.concatenate(found, axis=1)


def _keep_better(state: Ascent, current: Multipliers, lower: Array) -> tuple[Multipliers, Array]:
    is_better = lower > state.lower
    best = jax.tree.map(lambda new, old: jnp.where(is_better[..., None], new, old), current, state.best)
    return best, jnp.where(is_better, lower, state.lower)


def _zero_probe(problem: Problem, domains: Subdomains) -> _Probe:
    shape, neurons = domains.outputs.shape, domains.signs.shape[-1]
    centers = [region.center for region in subdomains.regions_of(problem)]
    inputs = [jnp.zeros((*shape, *center.shape), center.dtype) for center in centers]
    return _Probe(jnp.zeros((*shape, neurons), centers[0].dtype), inputs, inputs)


def _repeat(boxes: list[Interval], num: int, *, split: Split) -> list[Interval]:
    if split == "input":
        return boxes
    return jax.tree.map(lambda end: jnp.broadcast_to(end[None], (num, *end.shape)), boxes)


def _largest_of_layer(graph: Graph, values: Array) -> Array:
    """Replaces every element of `[..., N]` by the largest of its layer."""
    sizes = [math.prod(op.nodes[0].shape) for op in subdomains.splittable(graph)]
    layers = jnp.split(values, np.cumsum(sizes)[:-1].tolist(), axis=-1) if sizes else [values]
    return jnp.concatenate([
        jnp.broadcast_to(layer.max(axis=-1, keepdims=True, initial=0.0), layer.shape) for layer in layers
    ], axis=-1)
