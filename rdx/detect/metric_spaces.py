"""Metric spaces: their balls, their distances, and whether they have the midpoints that Theorem 5 needs.

The reductions of Tramer (2022, arXiv:2107.11630) are stated for any metric. Theorem 4 uses the triangle inequality
alone. The proof of Theorem 5 takes a point within `eps / 2` of two given points at a distance of at most `eps`, which
not every metric space has: the theorem fails on two points at distance `eps`, and on images of 8 bits if `eps` is an
odd number of levels. So a space says whether it `has_midpoints(eps)`.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rdx import norms
from rdx.balls import Ball
from rdx.types import Array, ArrayLike, Norm

# Distances that were computed may break the triangle inequality by their own rounding.
_ROUNDING = 1e-6


class MetricSpace(Protocol):
    """What reductions ask of a space."""

    def ball(self, radius: float) -> Any:
        """Builds the balls of a radius, as searches take them."""
        ...

    def distance(self, point: Array, center: Array) -> Array:
        """Computes `d(point, center)`, shape `[B]`."""
        ...

    def has_midpoints(self, eps: float) -> bool:
        """Tells whether any two points at distance `<= eps` have a point within `eps / 2` of both."""
        ...


@dataclasses.dataclass(frozen=True)
class Box:
    """The continuous box `[low, high]^n` with an lp norm: convex, so the middle of two points is a midpoint.

    Attributes:
        norm: "linf", "l2" or "l1".
        low: lower end; `-inf` for no box.
        high: upper end; `inf` for no box.
    """

    norm: Norm
    low: float = 0.0
    high: float = 1.0

    def ball(self, radius: float) -> Ball:
        """Builds the ball of a radius."""
        return Ball(self.norm, radius, self.low, self.high)

    def distance(self, point: Array, center: Array) -> Array:
        """Computes `||point - center||_p`, shape `[B]`."""
        return norms.norm(point - center, self.norm)

    def has_midpoints(self, eps: float) -> bool:
        """Tells that there always are midpoints."""
        del eps
        return True


@dataclasses.dataclass(frozen=True)
class Lattice:
    """Multiples of `(high - low) / num_levels` in a box, such as images of 8 bits, with an lp norm.

    With `k = floor(eps)` in units of a level, linf and l1 have midpoints exactly where `k` is even: an odd distance can
    not be halved. In l2 many coordinates that differ by one level each can not be halved either, so beyond `k = 0`
    midpoints are denied, which is right in all dimensions from `eps^2` on.

    Attributes:
        norm: "linf", "l2" or "l1".
        num_levels: steps from `low` to `high`, 255 for 8 bits.
        low: least value.
        high: greatest value.
    """

    norm: Norm
    num_levels: int = 255
    low: float = 0.0
    high: float = 1.0

    def ball(self, radius: float) -> Ball:
        """Builds the ball of the box around the lattice; `searches.on_lattice` keeps searches on its points."""
        step = (self.high - self.low) / self.num_levels
        return Ball(self.norm, self._levels(radius) * step if self.norm == "linf" else radius, self.low, self.high)

    def distance(self, point: Array, center: Array) -> Array:
        """Computes `||point - center||_p`, shape `[B]`."""
        return norms.norm(point - center, self.norm)

    def has_midpoints(self, eps: float) -> bool:
        """Tells whether `eps` is less than a level or, for linf and l1, an even number of them, rounded down."""
        levels = self._levels(eps)
        return levels == 0 if self.norm == "l2" else levels % 2 == 0

    def _levels(self, eps: float) -> int:
        # 8 / 255 * 255 may come out just below 8.
        return math.floor(eps * self.num_levels / (self.high - self.low) + _ROUNDING)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FiniteBall:
    """All points of a finite space within a radius; a point is its number.

    Attributes:
        distances: between all points, shape `[N, N]`.
        radius: a number.
    """

    distances: Array
    radius: ArrayLike

    def distance(self, point: Array, center: Array) -> Array:
        """Looks distances up, shape `[B]`."""
        return self.distances[center, point]

    def contains(self, point: Array, center: Array) -> Array:
        """Tells where a point lies in the ball, shape `[B]`, bool."""
        return self.distance(point, center) <= self.radius


@dataclasses.dataclass(frozen=True)
class FiniteSpace:
    """Finitely many points, numbered from 0, and the distances between them; see `finite_space`.

    Attributes:
        distances: shape `[N, N]`.
    """

    distances: np.ndarray

    def ball(self, radius: float) -> FiniteBall:
        """Builds the ball of a radius."""
        return FiniteBall(jnp.asarray(self.distances), radius)

    def distance(self, point: Array, center: Array) -> Array:
        """Looks distances up, shape `[B]`."""
        return jnp.asarray(self.distances)[center, point]

    def has_midpoints(self, eps: float) -> bool:
        """Looks for a midpoint of every pair."""
        return bool(has_midpoints(self.distances, eps))


def has_midpoints(distances: np.ndarray, eps: ArrayLike) -> np.ndarray:
    """Tells which finite spaces have, for every pair with `d(a, b) <= eps`, a point within `eps / 2` of both.

    Args:
        distances: shape `[..., N, N]`.
        eps: shape `[...]`.

    Returns:
        Shape `[...]`, bool.
    """
    eps = np.asarray(eps)[..., None, None]
    near = (2.0 * distances <= eps).astype(np.float32)
    return np.asarray(((distances > eps) | (near @ near.swapaxes(-1, -2) > 0)).all(axis=(-1, -2)))


def finite_space(distances: np.ndarray) -> FiniteSpace:
    """Builds a finite metric space and checks that it is one.

    A "size" of perturbations need not be a metric: that of adversarial patches, the side of the smallest square around
    the pixels that differ, breaks the triangle inequality (Tramer 2022, Sec. 4), and Theorem 4 fails with it.

    Args:
        distances: between all points, shape `[N, N]`.

    Returns:
        The space.

    Raises:
        ValueError: where distances are not those of a metric, naming points.
    """
    distances = np.asarray(distances)
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"Distances have shape {distances.shape}: give one for every pair of points, [N, N].")
    if not (np.isfinite(distances).all() and (distances >= 0).all()):
        raise ValueError("Distances must be finite and at least 0.")
    if not (np.diag(distances) == 0).all() or not (distances == distances.T).all():
        raise ValueError("A metric is 0 from a point to itself and symmetric: d(a, a) = 0, d(a, b) = d(b, a).")
    if len(distances) == 0:
        raise ValueError("A space has a point at least.")
    for middle in range(len(distances)):
        around = distances[:, middle, None] + distances[None, middle, :]
        excess = distances - around - _ROUNDING * around
        if (excess > 0).any():
            a, b = np.unravel_index(excess.argmax(), excess.shape)
            raise ValueError(
                f"The triangle inequality fails: d({a}, {b}) = {distances[a, b]} > d({a}, {middle}) + d({middle}, {b}) "
                f"= {around[a, b]}. This is not a metric; the shortest paths over these distances would be one."
            )
    return FiniteSpace(distances)


def hamming_cube(num_bits: int) -> FiniteSpace:
    """Builds the words of some bits with the number of bits in which they differ, a word being a binary number.

    Args:
        num_bits: at most 12.

    Returns:
        The space of `2^num_bits` points.

    Raises:
        ValueError: on too many bits.
    """
    if not 1 <= num_bits <= 12:
        raise ValueError(f"The cube of {num_bits} bits has 4^{num_bits} distances: use 1 to 12 bits.")
    numbers = np.arange(2**num_bits)
    return FiniteSpace(np.bitwise_count(numbers[:, None] ^ numbers[None, :]).astype(np.float32))
