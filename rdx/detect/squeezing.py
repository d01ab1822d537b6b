"""Feature squeezing: the network's answer must survive coarser inputs (Xu et al. 2018, arXiv:1704.01155)."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from rdx.attacks import adaptive
from rdx.compilation import as_partial
from rdx.types import Array, ArrayLike, LogitsFn


def feature_squeezing(logits_fn: LogitsFn, squeezers: Sequence[Callable[[Array], Array]]) -> Partial:
    """Builds the detector with the score `max_s ||p(x) - p(s(x))||_1` over squeezers `s`, of softmax outputs `p`.

    Source: Xu et al. (2018, arXiv:1704.01155, Sec. V-A). The paper joins `bit_depth(1)` and `median_filter(2)` on
    MNIST, `bit_depth(5)`, `median_filter(2)` and `non_local_means` on CIFAR-10 and ImageNet.

    Args:
        logits_fn: `x [B, ...] -> logits [B, K]`.
        squeezers: `x [B, ...] -> x [B, ...]`, one or more.

    Returns:
        A `Detector` whose scores lie in [0, 2].

    Raises:
        ValueError: without squeezers.
    """
    if not squeezers:
        raise ValueError("Feature squeezing needs at least one squeezer, such as squeezing.bit_depth(1).")
    return Partial(_score, as_partial(logits_fn), tuple(as_partial(squeezer) for squeezer in squeezers))


def bit_depth(bits: int) -> Partial:
    """Builds the rounding of inputs in [0, 1] to `2^bits` levels, differentiated as the identity (straight through)."""
    return adaptive.straight_through(Partial(_round, float(2**bits - 1)))


def median_filter(size: int) -> Partial:
    """Builds the median over windows of `size x size` pixels of images `[B, H, W, C]`.

    As `scipy.ndimage.median_filter`: images are mirrored at their edges, an even window reaches further to the top and
    left, and of an even number of values the greater middle one is taken.

    Args:
        size: side of the window.

    Returns:
        `x [B, H, W, C] -> x [B, H, W, C]`.
    """
    return Partial(_median(size))


def non_local_means(*, search: int = 13, patch: int = 3, strength: ArrayLike = 4 / 255) -> Partial:
    """Builds the mean over a search window with the weights `exp(-mean_patch |difference|^2 / strength^2)`.

    Source: Buades et al. (2005), as Xu et al. use it. Difference: they filter brightness and colour apart, with
    OpenCV's fast approximation; here channels are taken together.

    Args:
        search: side of the search window, odd.
        patch: side of the patches that are compared, odd.
        strength: in input units; the paper's 4 of 255.

    Returns:
        `x [B, H, W, C] -> x [B, H, W, C]`.

    Raises:
        ValueError: on even windows.
    """
    if not (search % 2 and patch % 2):
        raise ValueError(f"Windows have a center: search={search} and patch={patch} must be odd.")
    return Partial(_non_local(search, patch), strength)


def _score(logits_fn: Partial, squeezers: tuple[Partial, ...], x: Array) -> tuple[Array, Array]:
    logits = logits_fn(x)
    probs = jax.nn.softmax(logits, axis=1)
    moved = [jnp.abs(jax.nn.softmax(logits_fn(squeeze(x)), axis=1) - probs).sum(axis=1) for squeeze in squeezers]
    return logits, jnp.stack(moved).max(axis=0)


def _round(levels: ArrayLike, x: Array) -> Array:
    return jnp.round(x * levels) / levels


@functools.cache  # one function for each window, so that equal squeezers share their compilations
def _median(size: int) -> Callable[[Array], Array]:
    before, after = size // 2, size - 1 - size // 2

    def median(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)), mode="symmetric")
        height, width = x.shape[1:3]
        windows = [padded[:, i:i + height, j:j + width] for i in range(size) for j in range(size)]
        return jnp.sort(jnp.stack(windows), axis=0)[size * size // 2]

    return median


@functools.cache
def _non_local(search: int, patch: int) -> Callable[[ArrayLike, Array], Array]:
    reach = search // 2

    def mean(strength: ArrayLike, x: Array) -> Array:
        wide = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="symmetric")
        window = (1, patch, patch, 1)

        def add(sums: tuple[Array, Array], offset: Array) -> tuple[tuple[Array, Array], None]:
            moved = lax.dynamic_slice(wide, (0, offset[0], offset[1], 0), x.shape)
            distance = jnp.square(moved - x).mean(axis=3, keepdims=True)
            distance = lax.reduce_window(distance, 0.0, lax.add, window, (1, 1, 1, 1), "SAME") / patch**2
            weight = jnp.exp(-distance / jnp.square(jnp.asarray(strength, x.dtype)))
            return (sums[0] + weight * moved, sums[1] + weight), None

        offsets = jnp.stack(jnp.meshgrid(jnp.arange(search), jnp.arange(search), indexing="ij"), -1).reshape(-1, 2)
        (total, weights), _ = lax.scan(add, (jnp.zeros_like(x), jnp.zeros_like(x[..., :1])), offsets)
        return total / weights

    return mean
