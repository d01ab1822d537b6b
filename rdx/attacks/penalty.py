"""What attacks share that minimise distance plus a penalty for failure (Carlini & Wagner 2017, arXiv:1608.04644)."""

from typing import NamedTuple

import jax.numpy as jnp

from rdx import norms
from rdx.attacks import base, estimate, minimal
from rdx.types import Array, ArrayLike

# Inputs are moved off the ends of the box by this share, since tanh reaches them at infinity only.
_INSIDE = 0.999999
# Greater constants and slopes would help nobody: the distance is lost in rounding, and squares leave float's range.
LARGEST = 1e10


class Search(NamedTuple):
    """The search for the least constant between distance and penalty that succeeds, one for each example.

    Attributes:
        constant: the constant of this round. Shape `[B]`.
        lower: the greatest that failed. Shape `[B]`.
        upper: the least that succeeded, infinite until one has. Shape `[B]`.
        has_succeeded: whether this round has. Shape `[B]`, bool.
    """

    constant: Array
    lower: Array
    upper: Array
    has_succeeded: Array


def first_round(problem: base.Problem, initial_constant: Array) -> Search:
    """Begins the search at `initial_constant`, a scalar."""
    zero = norms.linf(problem.x - problem.x)  # by arithmetic, which keeps how an array is sharded
    return Search(zero + initial_constant, zero, zero + jnp.inf, zero > 0)


def next_round(search: Search) -> Search:
    """Halves the bracket; until a constant has succeeded, multiplies it by 10, as the code of C&W does."""
    lower = jnp.where(search.has_succeeded, search.lower, jnp.maximum(search.lower, search.constant))
    upper = jnp.where(search.has_succeeded, jnp.minimum(search.upper, search.constant), search.upper)
    greater = jnp.minimum(10.0 * search.constant, LARGEST)
    constant = jnp.where(jnp.isfinite(upper), 0.5 * (lower + upper), greater)
    return Search(constant, lower, upper, jnp.zeros_like(search.has_succeeded))


def confident(candidate: base.Candidate, confidence: ArrayLike) -> base.Candidate:
    """Counts as success only what succeeds with a loss of at least `confidence`, or one that is NaN."""
    return candidate._replace(success=candidate.success & ~(candidate.loss < confidence))


def slope(seen: base.Candidate, gradient: Array, constant: Array, confidence: ArrayLike) -> Array:
    """Computes the gradient of the penalty `constant * max(0, confidence - loss)`, shape `[B, ...]`."""
    weight = jnp.where(seen.loss < confidence, constant, 0.0)
    return jnp.clip(-norms.expand(weight, gradient) * gradient, -LARGEST, LARGEST)


class TanhSpace(NamedTuple):
    """The change of variables `x = middle + half * tanh(w)`, whose values lie in the box for every `w`.

    Elements whose box has no two finite ends stay as they are, `x = w`, but for clipping. All have the shape of `x`.
    """

    low: Array
    high: Array
    middle: Array
    half: Array
    is_bounded: Array

    def enter(self, x: Array) -> Array:
        """Finds `w` for inputs in the box, which are moved inside by a millionth where they lie at its ends."""
        share = (x - self.middle) / jnp.where(self.half == 0, 1.0, self.half)
        return jnp.where(self.is_bounded, jnp.arctanh(_INSIDE * jnp.where(self.is_bounded, share, 0.0)), x)

    def leave(self, w: Array) -> Array:
        """Computes `x`."""
        return jnp.clip(jnp.where(self.is_bounded, self.middle + self.half * jnp.tanh(w), w), self.low, self.high)

    def derivative(self, w: Array) -> Array:
        """Computes `dx / dw` of every element."""
        return jnp.where(self.is_bounded, self.half * (1.0 - jnp.square(jnp.tanh(w))), 1.0)


def tanh_space(problem: base.Problem) -> TanhSpace:
    """Builds the change of variables for the box in which the smallest perturbation is sought."""
    low, high = minimal.limits(problem)
    is_bounded = jnp.isfinite(low) & jnp.isfinite(high)
    ends = jnp.where(is_bounded, low, -1.0), jnp.where(is_bounded, high, 1.0)
    return TanhSpace(low, high, 0.5 * (ends[0] + ends[1]), 0.5 * (ends[1] - ends[0]), is_bounded)


class Descent(NamedTuple):
    """A descent by Adam in an unbounded space; everything has the shape of the point, `[B, ...]`."""

    point: Array
    moments: estimate.Moments


def begin_descent(point: Array) -> Descent:
    """Begins at `point` with empty moments."""
    return Descent(point, estimate.Moments(jnp.zeros_like(point), jnp.zeros_like(point)))


def descend(descent: Descent, gradient: Array, step_size: Array, i: Array) -> Descent:
    """Makes the step number `i`, from 0, along Adam's direction."""
    moments, direction = estimate.adam(descent.moments, gradient, i + 1)
    return Descent(descent.point - step_size * direction, moments)
