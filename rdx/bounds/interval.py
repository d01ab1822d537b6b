"""Intervals: the boxes that bounds are given as and propagate through."""

from typing import NamedTuple

import jax.numpy as jnp

from rdx.types import Array


class Interval(NamedTuple):
    """Elementwise bounds `lower <= value <= upper` of an array.

    Attributes:
        lower: shape of the bounded array.
        upper: the same shape.
    """

    lower: Array
    upper: Array

    @property
    def center(self) -> Array:
        """The midpoint `(lower + upper) / 2`."""
        # Not half the sum, which is infinite where a mask has put the least number that there is.
        return self.lower + 0.5 * (self.upper - self.lower)

    @property
    def radius(self) -> Array:
        """Half the width, `(upper - lower) / 2`."""
        return 0.5 * (self.upper - self.lower)

    def intersect(self, other: "Interval") -> "Interval":
        """Keeps the tighter of two valid bounds on each side."""
        return Interval(jnp.maximum(self.lower, other.lower), jnp.minimum(self.upper, other.upper))
