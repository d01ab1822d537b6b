"""Feature and logit matching: an input that looks to the network like a clean one of another class.

A detector that reads features accepts what has the features of an accepted input. Sabour et al. (2016,
arXiv:1511.05122) match features; Tramer et al. (2020, arXiv:2002.08347, Secs. 5 and 9) broke detectors by it, matching
logits, under noise in expectation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx import attacks, norms
from rdx.attacks import base, driver
from rdx.balls import Ball
from rdx.compilation import as_partial
from rdx.detect import thresholds
from rdx.detect.goals import evade
from rdx.goals import Goal
from rdx.types import Array, ArrayLike, AttackResult, Detector, Key


class Guides(NamedTuple):
    """Clean inputs that a detector accepts and classifies correctly, as the attacked function sees them.

    Attributes:
        embeddings: shape `[G, D]`.
        labels: their classes. Shape `[G]`, int32.
        scale: mean squared distance between two of them.
    """

    embeddings: np.ndarray
    labels: np.ndarray
    scale: ArrayLike


def guides(
    detector: Detector, embed: Callable[[Array], Array], x: ArrayLike, labels: ArrayLike, *, threshold: ArrayLike = 0.0
) -> Guides:
    """Chooses the guides among clean inputs: those that are accepted and classified correctly.

    Args:
        detector: `x [B, ...] -> (logits [B, K], score [B])`, which rejects where `score > threshold`.
        embed: what is matched, `x [B, ...] -> [B, ...]`: features, logits, or logits under noise (`attacks.eot`).
        x: clean inputs that an attacker would have, shape `[N, ...]`.
        labels: shape `[N]`, int.
        threshold: the detector's.

    Returns:
        The guides.

    Raises:
        ValueError: where fewer than two classes have a guide.
    """
    (logits, score), z = thresholds.collect(Partial(_output, as_partial(detector), as_partial(embed)), x)
    labels = np.asarray(labels, np.int32)
    kept = (logits.argmax(axis=1) == labels) & ~(score > threshold)
    if len(np.unique(labels[kept])) < 2:
        raise ValueError("Fewer than two classes have an accepted, correctly classified input: give more clean inputs.")
    z = z[kept]
    return Guides(z, labels[kept], np.float32(2.0 * z.var(axis=0).sum() + 1e-12))


def match(
    key: Key, detector: Detector, x: ArrayLike, labels: ArrayLike, *, ball: Ball, embed: Callable[[Array], Array],
    guides: Guides, threshold: ArrayLike = 0.0, index: ArrayLike | None = None, rank: int = 0, num_steps: int = 100,
    step_size: ArrayLike | None = None, num_restarts: int = 1, loop: driver.Loop = driver.AUTO,
) -> AttackResult:
    """Minimises `||e(x') - e(x_t)||_2^2` to a guide `x_t` of another class by projected gradient descent.

    The guide is, among those of other classes, the `rank`-th nearest to the clean input as `e` sees it. Source: Sabour
    et al. (2016, arXiv:1511.05122, Eq. 1), Tramer et al. (2020, arXiv:2002.08347). With a random `e`, the draws of
    `attacks.eot` are matched all together. Differences: PGD for L-BFGS; the point kept is the strongest against the
    detector, not the nearest to the guide.

    Args:
        key: one key; example `i` uses it folded with `index[i]`, restart `r` folds that with `r`.
        detector: `x [B, ...] -> (logits [B, K], score [B])`, which rejects where `score > threshold`.
        x: clean inputs, shape `[B, ...]`.
        labels: shape `[B]`, int.
        ball: the threat model, of any norm.
        embed: what is matched, as for `guides`.
        guides: from `guides`, with the same `embed`.
        threshold: the detector's.
        index: places in the data set, shape `[B]`, int; `0..B-1` by default.
        rank: which guide, 0 for the nearest; the last one where there are fewer.
        num_steps: steps of each restart.
        step_size: length of a step, in input units; `2.5 * eps / num_steps` by default.
        num_restarts: number of random starts.
        loop: see `rdx.attacks.driver.Loop`.

    Returns:
        The attack's result; success is to be misclassified and not rejected. Passes as `attacks.pgd`, and one to
        choose the guide.

    Raises:
        ValueError: on unusable inputs or NaN outputs.
    """
    both = Partial(_output, as_partial(detector), as_partial(embed))
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    wanted = _nearest(guides, base.call(as_embedding, as_partial(embed), x), labels, rank)
    plain = evade(threshold)
    goal = Goal(Partial(_nearness), Partial(_evades, plain), (wanted, jnp.broadcast_to(guides.scale, labels.shape)))
    result = attacks.pgd(
        key, both, x, labels, ball=ball, goal=goal, index=index, num_steps=num_steps, step_size=step_size,
        num_restarts=num_restarts, loop=loop,
    )
    return result._replace(forwards=result.forwards + 1)


def as_embedding(embed: Partial, x: Array) -> Array:
    """Flattens what a function makes of inputs, `[B, D]`."""
    return norms.flatten(embed(x))


def _output(detector: Partial, embed: Partial, x: Array) -> tuple[tuple[Array, Array], Array]:
    return detector(x), as_embedding(embed, x)


def _nearest(guides: Guides, z: Array, labels: Array, rank: int) -> Array:
    known = jnp.asarray(guides.embeddings)
    square = jnp.square(z).sum(axis=1)[:, None] + jnp.square(known).sum(axis=1)[None] - 2.0 * z @ known.T
    is_other = jnp.asarray(guides.labels)[None] != labels[:, None].astype(jnp.int32)
    order = jnp.argsort(jnp.where(is_other, square, jnp.inf), axis=1)
    place = jnp.minimum(rank, is_other.sum(axis=1) - 1)
    return known[jnp.take_along_axis(order, place[:, None], axis=1)[:, 0]]


def _nearness(output: tuple, labels: Array, wanted: Array, scale: Array) -> Array:
    del labels
    return -jnp.square(output[1] - wanted).sum(axis=1) / scale


def _evades(plain: Goal, output: tuple, labels: Array, wanted: Array, scale: Array) -> Array:
    del wanted, scale
    return plain.success(output[0], labels)
