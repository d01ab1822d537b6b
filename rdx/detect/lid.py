"""Local intrinsic dimensionality of every layer (Ma et al. 2018, arXiv:1801.02613)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx import norms
from rdx.compilation import as_partial
from rdx.detect import thresholds
from rdx.types import Array, ArrayLike

# Distances below this share of the farthest neighbour's count as that share: the logarithm of 0 is no distance.
_LEAST = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Clean inputs among which neighbours are sought, layer by layer.

    Attributes:
        layers: each `[R, D]`.
        num: how many neighbours count.
    """

    layers: tuple[np.ndarray, ...]
    num: int = dataclasses.field(metadata={"static": True})


def fit(
    features_fn: Callable[[Array], tuple[Array, tuple[Array, ...]]], x: ArrayLike, *, num_neighbours: int = 20
) -> Neighbours:
    """Keeps what clean inputs give in every layer, the logits included.

    Source: Ma et al. (2018, arXiv:1801.02613, Sec. 4), with 20 neighbours in minibatches of 100. Difference: the
    reference is kept, where the paper takes the clean half of each minibatch, so that examples are independent.

    Args:
        features_fn: `x [B, ...] -> (logits, hidden layers)`, from `models.features_fn`.
        x: clean inputs, shape `[R, ...]`; 100 as the paper's minibatch.
        num_neighbours: how many count.

    Returns:
        The reference.

    Raises:
        ValueError: for fewer inputs than neighbours.
    """
    if not 1 < num_neighbours <= len(np.asarray(x)):
        raise ValueError(f"num_neighbours={num_neighbours} must be at least 2 and at most the {len(np.asarray(x))} x.")
    logits, layers = thresholds.collect(features_fn, x)
    flat = tuple(layer.reshape(len(layer), -1) for layer in (*layers, logits))
    return Neighbours(flat, num_neighbours)


def scores(features_fn: Callable[[Array], tuple[Array, tuple[Array, ...]]], neighbours: Neighbours) -> Partial:
    """Builds `x -> (logits, LID [B, L])` with `LID = -(1/k sum_i log(r_i / r_k))^-1` in each of `L` layers.

    `r_1 <= ... <= r_k` are the distances to the nearest inputs of the reference; one at distance 0, the input itself,
    does not count. `logistic.fit` and `logistic.combined` make a detector of it.

    Source: Ma et al. (2018, arXiv:1801.02613, Eq. 4).

    Args:
        features_fn: as for `fit`.
        neighbours: from `fit`.

    Returns:
        The scores of every layer and of the logits; higher is more suspicious.
    """
    return Partial(_scores, as_partial(features_fn), neighbours)


def _scores(features_fn: Partial, neighbours: Neighbours, x: Array) -> tuple[Array, Array]:
    logits, layers = features_fn(x)
    dimensions = [
        _dimension(norms.flatten(z), jnp.asarray(known), neighbours.num)
        for z, known in zip((*layers, logits), neighbours.layers, strict=True)
    ]
    return logits, jnp.stack(dimensions, axis=1)


def _dimension(z: Array, known: Array, num: int) -> Array:
    square = jnp.square(z[:, None] - known[None]).sum(axis=2)
    # Squares: the root has no gradient at 0, and log r = log(r^2) / 2.
    nearest = jnp.sort(jnp.where(square == 0, jnp.inf, square), axis=1)[:, :num]
    farthest = nearest[:, -1:]
    ratio = jnp.maximum(nearest / jnp.where(farthest > 0, farthest, 1.0), _LEAST**2)
    return -num / jnp.minimum(0.5 * jnp.log(ratio).sum(axis=1), -_LEAST)
