"""Searches of a ball for a witness: exact, on a grid, at random, by any attack, or by bounds that exclude one.

A search is called as an attack is, and every attack of `rdx.attacks` is one:

    search(key, fn, x, labels, *, ball, goal, index) -> Witness or AttackResult

`functools.partial(attacks.pgd, num_restarts=10)` searches by gradients of the goal's loss, here the rejection score,
`attacks.square` without gradients, `attacks.fmn` for a near witness. An attack finds a witness or does not know.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx import bounds, norms
from rdx.attacks import base
from rdx.balls import Ball
from rdx.compilation import as_partial
from rdx.detect.metric_spaces import FiniteBall
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Key, PyTree

# More points than this are not enumerated.
_MOST_POINTS = 200_000


class Witness(NamedTuple):
    """What a search found, example by example.

    Attributes:
        x: the witness, the strongest input seen where none is known. Shape `[B, ...]`.
        is_found: whether `x` reaches the goal. Shape `[B]`, bool.
        is_settled: whether that answers the question: it is found, or proved that there is none. Shape `[B]`, bool.
        loss: the goal's loss at `x`, or where bounds searched an upper bound of it over the ball. Shape `[B]`.
    """

    x: Array
    is_found: Array
    is_settled: Array
    loss: Array


# (key, fn, x, labels, *, ball, goal, index) -> Witness | AttackResult
Search = Callable[..., Witness | AttackResult]


def run(
    key: Key, search: Search, fn: Callable[[Array], PyTree], x: Array, labels: Array, *, ball: Any, goal: Goal,
    index: Array | None = None,
) -> Witness:
    """Runs a search, or an attack as one.

    Args:
        key: one key.
        search: see above.
        fn: `x [B, ...] -> output`, what the goal reads.
        x: centers of the balls, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: of the space's kind.
        goal: what a witness is.
        index: folded into the key for each example, shape `[B]`, int.

    Returns:
        The witnesses.
    """
    found = search(key, fn, x, labels, ball=ball, goal=goal, index=index)
    if isinstance(found, Witness):
        return found
    return Witness(found.x_adv, found.success, found.success, found.loss)


def exact(
    key: Key, fn: Callable[[Array], PyTree], x: Array, labels: Array, *, ball: FiniteBall, goal: Goal,
    index: Array | None = None, nearest: bool = True,
) -> Witness:
    """Searches all points of a finite space.

    Args:
        key: not used.
        fn: `numbers of points [B] -> output`.
        x: numbers of the centers, shape `[B]`, int.
        labels: shape `[B]`, int.
        ball: of the finite space.
        goal: what a witness is; it may not carry data of its own.
        index: not used.
        nearest: whether the nearest witness is taken, as in minimum-distance decoding, or the one of the greatest loss;
            of equals the first.

    Returns:
        Witnesses, all settled.
    """
    del key, index
    points = jnp.arange(ball.distances.shape[0])
    output = fn(points)
    within = ball.distances[x] <= ball.radius

    def judge(label: Array) -> tuple[Array, Array]:
        repeated = jnp.full(points.shape, label)
        return goal.success(output, repeated), goal.loss(output, repeated)

    success, loss = jax.vmap(judge)(labels)
    is_witness = success & within
    rank = -ball.distances[x] if nearest else loss
    # Where there is no witness, the point of the greatest loss in the ball.
    best = jnp.where(
        is_witness.any(axis=1), jnp.where(is_witness, rank, -jnp.inf).argmax(axis=1),
        jnp.where(within, loss, -jnp.inf).argmax(axis=1),
    ).astype(x.dtype)
    loss = jnp.take_along_axis(loss, best[:, None], axis=1)[:, 0]
    return Witness(best, is_witness.any(axis=1), jnp.ones_like(within[:, 0]), loss)


def random(
    key: Key, fn: Callable[[Array], PyTree], x: Array, labels: Array, *, ball: Ball, goal: Goal,
    index: Array | None = None, num_samples: int = 1000,
) -> AttackResult:
    """Searches random points, uniform in the ball and clipped to the box; the baseline of every other search.

    Args:
        key: one key.
        fn: `x [B, ...] -> output`.
        x: centers, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: an lp ball.
        goal: what a witness is.
        index: folded into the key, shape `[B]`, int.
        num_samples: points for each example.

    Returns:
        The strongest of them and the center.
    """
    problem, found = base.begin(fn, x, labels, ball, goal)
    keys = base.example_keys(key, problem.x, index)

    def draw(found: base.Found, i: Array) -> tuple[base.Found, None]:
        seen = base.evaluate(problem, problem.ball.sample(base.fold(keys, i), problem.x))
        return base.spend(found, seen, forwards=1), None

    return base.report(problem, jax.lax.scan(draw, found, jnp.arange(num_samples))[0])


def grid(
    key: Key, fn: Callable[[Array], PyTree], x: Array, labels: Array, *, ball: Ball, goal: Goal,
    index: Array | None = None, num_each_side: int = 10, is_exhaustive: bool = False,
) -> Witness:
    """Searches the points `x + r k / n` of the ball, `k` in `{-n, ..., n}^D`, and takes the nearest witness.

    Args:
        key: not used.
        fn: `x [B, ...] -> output`.
        x: centers, shape `[B, ...]` with few elements: `(2 n + 1)^D` points are tried.
        labels: shape `[B]`, int.
        ball: an lp ball of one radius.
        goal: what a witness is.
        index: not used.
        num_each_side: `n`.
        is_exhaustive: whether these are all points of the space, as on a lattice of which the radius is `n` levels.

    Returns:
        The nearest witness, of equals the first; settled everywhere if the grid is exhaustive.

    Raises:
        ValueError: on too many points.
    """
    del key, index
    size = int(np.prod(x.shape[1:]))
    if (2 * num_each_side + 1) ** size > _MOST_POINTS:
        raise ValueError(
            f"A grid of {2 * num_each_side + 1} points along each of {size} axes is too fine: search by an attack, or "
            "a plane of the inputs."
        )
    problem, found = base.begin(fn, x, labels, ball, goal)
    offsets = np.array(list(itertools.product(range(-num_each_side, num_each_side + 1), repeat=size)))
    length = np.linalg.norm(offsets, ord={"linf": np.inf, "l2": 2, "l1": 1}[ball.norm], axis=1)
    offsets = offsets[np.argsort(length, kind="stable")] / num_each_side
    radius = problem.ball.radius(problem.x)

    def visit(found: base.Found, offset: Array) -> tuple[base.Found, None]:
        point = problem.x + radius * offset.reshape(1, *x.shape[1:])
        # Points outside are replaced by the center, which has been seen.
        point = jnp.where(norms.expand(problem.ball.contains(point, problem.x), point), point, problem.x)
        point = jnp.clip(point, problem.ball.low, problem.ball.high)
        return base.spend(found, base.evaluate(problem, point), forwards=1, keep=_first), None

    best = jax.lax.scan(visit, found, jnp.asarray(offsets, problem.x.dtype))[0].best
    return Witness(best.x, best.success, best.success | is_exhaustive, best.loss)


def constant_prediction(
    key: Key, fn: Callable[[Array], Array], x: Array, labels: Array, *, ball: Ball, goal: Goal | None = None,
    index: Array | None = None, method: Callable[..., bounds.Interval] = bounds.crown_ibp,
) -> Witness:
    """Excludes another prediction than `labels` in the ball, by certified bounds of all margins.

    Args:
        key: not used.
        fn: `x [B, ...] -> logits [B, K]`.
        x: centers, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: an lp ball.
        goal: not used: the question is the one of `goals.misclassify`.
        index: not used.
        method: `bounds.ibp`, `bounds.crown_ibp`, `bounds.crown` ...

    Returns:
        No witness, settled where the prediction is certified to be constant.
    """
    del key, goal, index
    certificate = bounds.certify(fn, x, labels, ball=ball, method=method)
    loss = certificate.slack - certificate.margins_lower.min(axis=1)
    return Witness(x, jnp.zeros_like(certificate.certified), certificate.certified, loss)


def rejected_everywhere(
    key: Key, fn: Callable[[Array], tuple[Array, Array]], x: Array, labels: Array, *, ball: Ball, goal: Goal,
    index: Array | None = None, method: Callable[..., bounds.Interval] = bounds.crown_ibp,
) -> Witness:
    """Excludes an accepted input in the ball, by a certified lower bound of the rejection score.

    Args:
        key: not used.
        fn: a detector, `x [B, ...] -> (logits [B, K], score [B])`.
        x: centers, shape `[B, ...]`.
        labels: not used.
        ball: an lp ball.
        goal: from `detect.goals.accept`, which knows the threshold.
        index: not used.
        method: how to bound.

    Returns:
        No witness, settled where `score > threshold` is certified in the whole ball.
    """
    del key, index, labels
    zeros = jnp.zeros(x.shape[0], jnp.int32)
    # A certificate for class 0 of these two logits says that -loss = score - threshold is positive.
    two_classes = Partial(_reject_or_not, as_partial(fn), goal)
    certificate = bounds.certify(two_classes, x, zeros, ball=ball, method=method)
    loss = certificate.slack - certificate.margins_lower[:, 0]
    return Witness(x, jnp.zeros_like(certificate.certified), certificate.certified, loss)


def in_turn(first: Search, second: Search) -> Search:
    """Builds the search that takes the first one's answer where it is settled and else the second one's.

    `in_turn(searches.constant_prediction, functools.partial(attacks.pgd, num_restarts=5))` brackets: it proves that
    there is no witness, or finds one, or says that it does not know.
    """
    return functools.partial(_in_turn, first, second)


def nearest(search: Search, *, num_steps: int = 20) -> Search:
    """Builds the search that moves a witness towards the center while it stays one, by bisection of the segment.

    The minimum-distance variant of Theorem 4 for continuous spaces. A segment may leave and enter the accepted region
    several times, so what is found is a boundary, not always the nearest.

    Args:
        search: finds the witness.
        num_steps: bisections.

    Returns:
        The search.
    """
    return functools.partial(_nearest, search, num_steps)


def on_lattice(search: Search, *, num_levels: int = 255, low: float = 0.0, high: float = 1.0) -> Search:
    """Builds the search that rounds a witness to a lattice, such as images of 8 bits, and judges it there.

    Rounding stays in an linf ball whose radius is a number of levels and whose center is on the lattice; where it
    leaves another ball, no witness is found.
    """
    return functools.partial(_on_lattice, search, (high - low) / num_levels, low)


def _first(best: base.Candidate, new: base.Candidate) -> base.Candidate:
    return base.choose(~best.success & (new.success | (new.loss > best.loss)), new, best)


def _reject_or_not(fn: Partial, goal: Goal, x: Array) -> Array:
    output = fn(x)
    score = -goal.loss(output, jnp.zeros(x.shape[0], jnp.int32))
    return jnp.stack([score, jnp.zeros_like(score)], axis=1)


def _in_turn(
    first: Search, second: Search, key: Key, fn: Callable[[Array], PyTree], x: Array, labels: Array, *, ball: Any,
    goal: Goal, index: Array | None = None,
) -> Witness:
    one, other = (run(key, search, fn, x, labels, ball=ball, goal=goal, index=index) for search in (first, second))
    return base.choose(one.is_settled, one, other)


def _nearest(
    search: Search, num_steps: int, key: Key, fn: Callable[[Array], PyTree], x: Array, labels: Array, *, ball: Any,
    goal: Goal, index: Array | None = None,
) -> Witness:
    found = run(key, search, fn, x, labels, ball=ball, goal=goal, index=index)
    span = found.x - x

    def halve(_: ArrayLike, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = bracket
        middle = 0.5 * (below + above)
        is_witness = goal.success(fn(x + norms.expand(middle, x) * span), labels)
        return jnp.where(is_witness, below, middle), jnp.where(is_witness, middle, above)

    ends = (jnp.zeros(x.shape[0], x.dtype), jnp.ones(x.shape[0], x.dtype))
    _, share = jax.lax.fori_loop(0, num_steps, halve, ends)
    point = x + norms.expand(share, x) * span
    output = fn(point)
    is_nearer = found.is_found & goal.success(output, labels)
    loss = jnp.where(is_nearer, goal.loss(output, labels), found.loss)
    return found._replace(x=jnp.where(norms.expand(is_nearer, x), point, found.x), loss=loss)


def _on_lattice(
    search: Search, step: float, low: float, key: Key, fn: Callable[[Array], PyTree], x: Array, labels: Array, *,
    ball: Ball, goal: Goal, index: Array | None = None,
) -> Witness:
    found = run(key, search, fn, x, labels, ball=ball, goal=goal, index=index)
    point = jnp.clip(low + step * jnp.round((found.x - low) / step), ball.low, ball.high)
    output = fn(point)
    is_found = goal.success(output, labels) & ball.contains(point, x)
    return Witness(point, is_found, is_found | (found.is_settled & ~found.is_found), goal.loss(output, labels))
