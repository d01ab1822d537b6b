"""Threat models: an lp ball inside a box, and the region around one input that bounds are computed over."""

import dataclasses
import itertools
import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rdx import norms
from rdx.types import Array, ArrayLike, Key, Norm

# Bisection on a multiplier halves the interval each time: 40 steps exhaust float32.
_NUM_BISECTIONS = 40
# Share of coordinates that an l1 step moves, as in SLIDE (Tramer & Boneh 2019, arXiv:1904.13000).
_L1_STEP_SHARE = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Region:
    """The set `{x : ||(x - center) / radius||_p <= 1, lower <= x <= upper}`, one for each example.

    Attributes:
        center: the clean input, shape `[B, ...]`.
        radius: the ball's radius per element, shape `[B, ...]`.
        lower: least value of each element over the set, shape `[B, ...]`.
        upper: greatest value of each element over the set, shape `[B, ...]`.
        norm: the ball's norm; for "linf" the set is just the box `[lower, upper]`.
        is_shared: whether there is no batch axis, because all examples see the same values; see `shared`.
    """

    center: Array
    radius: Array
    lower: Array
    upper: Array
    norm: Norm = dataclasses.field(metadata={"static": True})
    is_shared: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ball:
    """The lp ball of radius `eps` around an input, intersected with the box `[low, high]`.

    To perturb only a part of the input, let the radius be 0 elsewhere, with a mask of as many axes as `x`:

        Ball("linf", jnp.where(mask, 8 / 255, 0.0))

    Attributes:
        norm: "linf", "l2" or "l1".
        eps: radius in input units: a scalar, one per example `[B]`, or broadcastable to `x` for a radius per element
            (the ball is then `||delta / eps||_p <= 1`; elements of radius 0 stay as they are). Traced, so that sweeping
            it does not recompile.
        low: lower end of the box, a scalar or broadcastable to `x`; `-inf` for no box.
        high: upper end of the box; `inf` for no box.
    """

    norm: Norm = dataclasses.field(metadata={"static": True})
    eps: ArrayLike
    low: ArrayLike = 0.0
    high: ArrayLike = 1.0

    def check(self, x: ArrayLike) -> None:
        """Raises where the ball or the inputs are unusable; values are only looked at where they are concrete.

        Args:
            x: the inputs that the ball shall surround, shape `[B, ...]`.

        Raises:
            ValueError: on an unknown norm, a negative or NaN `eps`, an empty box, or inputs outside the box.
        """
        norms.check(self.norm)
        if any(isinstance(value, Tracer) for value in (x, self.eps, self.low, self.high)):
            return
        if not np.all(np.asarray(self.eps) >= 0):
            raise ValueError(f"eps must be at least 0, got {self.eps}: give a radius in input units, such as 8 / 255.")
        if not np.all(np.asarray(self.low) < np.asarray(self.high)):
            raise ValueError(f"The box [{self.low}, {self.high}] is empty: low must be below high.")
        values = np.asarray(x)
        if not np.all((values >= np.asarray(self.low)) & (values <= np.asarray(self.high))):
            raise ValueError(
                f"Inputs span [{values.min()}, {values.max()}], outside the box [{self.low}, {self.high}]: scale "
                "images to [0, 1] and normalise inside the model, or build the ball with low=-inf, high=inf."
            )

    def radius(self, x: Array) -> Array:
        """Broadcasts `eps` to the shape of `x`, `[B, ...]`."""
        eps = jnp.asarray(self.eps, dtype=x.dtype)
        if eps.ndim == 1 and x.ndim > 1:
            eps = norms.expand(eps, x)
        return jnp.broadcast_to(eps, x.shape)

    def limits(self, x: Array) -> tuple[Array, Array]:
        """Computes the least and the greatest value of each element over ball and box around `x`."""
        radius = self.radius(x)
        low, high = (jnp.asarray(end, dtype=x.dtype) for end in (self.low, self.high))
        return jnp.clip(x - radius, low, high), jnp.clip(x + radius, low, high)

    def region(self, x: Array) -> Region:
        """Describes the perturbed inputs around `x [B, ...]`, for `rdx.bounds`."""
        self.check(x)
        lower, upper = self.limits(x)
        return Region(x, self.radius(x), lower, upper, self.norm)

    def project(self, point: Array, center: Array) -> Array:
        """Finds the nearest point of ball and box: `argmin_v ||v - point||_2` over `v` in both.

        For linf that is clipping. For l2 and l1 the optimality conditions leave one multiplier `m >= 0` with
        `delta = clip(shrink(point - center, m), low - center, high - center)`, where `shrink` divides by `1 + m` (l2)
        or soft-thresholds by `m` (l1); the norm falls with `m`, which is found by bisection to float precision. The
        center must lie in the box; then 0 is always feasible.

        Args:
            point: shape `[B, ...]`.
            center: shape `[B, ...]`.

        Returns:
            The projection, shape `[B, ...]`.
        """
        if self.norm == "linf":
            lower, upper = self.limits(center)
            return jnp.clip(point, lower, upper)
        return _project_by_bisection(self, point, center)

    def sample(self, keys: Key, center: Array) -> Array:
        """Draws a random point of ball and box for each example.

        linf: uniform over the intersection. l2 and l1: uniform in the ball, then clipped to the box, which keeps it in
        the ball because the center lies in the box.

        Args:
            keys: one key per example, shape `[B]`.
            center: shape `[B, ...]`.

        Returns:
            Points, shape `[B, ...]`.
        """
        if self.norm == "linf":
            lower, upper = self.limits(center)
            draw = jax.vmap(lambda key: jax.random.uniform(key, center.shape[1:], center.dtype))(keys)
            return lower + draw * (upper - lower)
        unit = jax.vmap(lambda key: _uniform_in_unit_ball(key, center.shape[1:], center.dtype, self.norm))(keys)
        lower, upper = self.limits(center)
        return jnp.clip(center + self.radius(center) * unit, lower, upper)

    def ascent_direction(self, gradient: Array) -> Array:
        """Computes a step of unit norm along which a function with this gradient rises.

        linf: `sign(g)`. l2: `g / ||g||_2`. l1: the sign on the largest 1 % of the coordinates (at least one), divided
        by their number; the exact steepest direction moves a single coordinate and makes iterations needlessly long
        (SLIDE; Tramer & Boneh 2019, arXiv:1904.13000). A zero gradient gives a zero step.

        Args:
            gradient: shape `[B, ...]`.

        Returns:
            Direction, shape `[B, ...]`.
        """
        if self.norm == "linf":
            return jnp.sign(gradient)
        if self.norm == "l2":
            # Scaled first: the squares of a confident model's gradient (1e-20) would vanish in float32.
            largest = norms.linf(gradient)
            scaled = gradient / norms.expand(jnp.where(largest == 0, 1.0, largest), gradient)
            return scaled / norms.expand(jnp.maximum(norms.l2(scaled), 1.0), gradient)
        magnitude = jnp.abs(norms.flatten(gradient))
        threshold = exceeded_by(magnitude, max(1, round(_L1_STEP_SHARE * magnitude.shape[1])))
        moved = jnp.where(jnp.abs(gradient) > norms.expand(threshold, gradient), jnp.sign(gradient), 0.0)
        return moved / norms.expand(jnp.maximum(norms.l1(moved), 1.0), gradient)

    def distance(self, point: Array, center: Array) -> Array:
        """Computes `||point - center||_p`, shape `[B]`."""
        return norms.norm(point - center, self.norm)

    def contains(self, point: Array, center: Array, tolerance: float = 1e-6) -> Array:
        """Tells where `point` lies in ball and box, up to `tolerance` relative to the radius and absolute in the box.

        Args:
            point: shape `[B, ...]`.
            center: shape `[B, ...]`.
            tolerance: allowance for rounding.

        Returns:
            Shape `[B]`, bool; False where anything is NaN.
        """
        radius = self.radius(center)
        delta = point - center
        is_fixed = radius == 0
        scaled = jnp.where(is_fixed, 0.0, delta / jnp.where(is_fixed, 1.0, radius))
        in_ball = norms.norm(scaled, self.norm) <= 1.0 + tolerance * max(1.0, math.sqrt(math.prod(delta.shape[1:])))
        stays = jnp.where(is_fixed, jnp.abs(delta) <= tolerance, True)
        low, high = (jnp.asarray(end, dtype=point.dtype) for end in (self.low, self.high))
        in_box = (point >= low - tolerance) & (point <= high + tolerance)
        return in_ball & norms.flatten(stays & in_box).all(axis=1)


def box(lower: Array, upper: Array, *, center: Array | None = None) -> Region:
    """Describes the box `lower <= x <= upper`, for `rdx.bounds`, such as the input set of a VNN-LIB property.

    Args:
        lower: least value of each element, shape `[B, ...]`.
        upper: greatest value of each element, the same shape.
        center: a clean input inside the box; the middle by default.

    Returns:
        The region; its radius reaches from the center to the farther end.

    Raises:
        ValueError: on different shapes, ends that are not finite, or ends and center in the wrong order; values are
            only looked at where they are concrete.
    """
    given = (lower, upper) if center is None else (lower, center, upper)
    if len({np.shape(value) for value in given}) > 1:
        raise ValueError(f"The box is given by arrays of shapes {[np.shape(value) for value in given]}: one for all.")
    if not any(isinstance(value, Tracer) for value in given):
        if not all(np.isfinite(value).all() for value in given):
            raise ValueError("The box has an entry that is NaN or infinite: bounds are of bounded sets.")
        if not all((np.asarray(a) <= np.asarray(b)).all() for a, b in itertools.pairwise(given)):
            raise ValueError("The box is empty or its center outside: every element needs lower <= center <= upper.")
    lower, upper = jnp.asarray(lower), jnp.asarray(upper)
    middle = 0.5 * (lower + upper) if center is None else jnp.asarray(center)
    return Region(middle, jnp.maximum(upper - middle, middle - lower), lower, upper, "linf")


def shared(region: Region) -> Region:
    """Marks a region without batch axis as one that all examples share, such as that of a network's weights.

    Where the input of a bounded function is a pytree, its leaves may be of both kinds, and the function sees them as
    they are: a batch of inputs and one set of weights,

        weights = jax.tree.map(lambda leaf: balls.shared(Ball("linf", 1e-3, -jnp.inf, jnp.inf).region(leaf)), params)
        bounds.ibp(lambda pair: net(pair[1], pair[0]), (ball.region(x), weights))

    The bounds of an example hold for all weights in the region: it is not said that a single choice of them attains
    those of several examples.

    Args:
        region: of an array without batch axis; `eps` is a scalar or has an entry for each element.

    Returns:
        The same region, marked.
    """
    return dataclasses.replace(region, is_shared=True)


def _project_by_bisection(ball: Ball, point: Array, center: Array) -> Array:
    # Everything is flattened to [B, D]: XLA's CPU backend reduces over many small axes thirty times more slowly.
    radius = norms.flatten(ball.radius(center))
    low, high = (
        norms.flatten(jnp.broadcast_to(jnp.asarray(end, point.dtype), point.shape) - center)
        for end in (ball.low, ball.high)
    )
    is_fixed = radius == 0
    unit = jnp.where(is_fixed, 1.0, radius)
    delta = jnp.where(is_fixed, 0.0, norms.flatten(point - center))
    # How much harder than the widest axis an axis resists; not a full array where all resist alike.
    alike = jnp.ndim(ball.eps) <= 1
    resistance = jnp.ones((1, 1), point.dtype) if alike else jnp.square(norms.linf(unit)[:, None] / unit)

    # The search runs on sizes in units of the radius; signs and units return at the end.
    sizes, room = jnp.abs(delta) / unit, jnp.where(delta > 0, high, -low) / unit

    def is_inside(multiplier: Array) -> Array:
        m = multiplier[:, None] * resistance
        shrunk = sizes * (1.0 / (1.0 + m)) if ball.norm == "l2" else jnp.maximum(sizes - m, 0.0)
        kept = jnp.minimum(shrunk, room)
        return (jnp.square(kept) if ball.norm == "l2" else kept).sum(axis=1) <= 1.0

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = bracket
        middle = 0.5 * (below + above)
        enough = is_inside(middle)
        return jnp.where(enough, below, middle), jnp.where(enough, middle, above)

    # At these multipliers everything is shrunk into the ball: l2 by the factor 1 / size, l1 to zero.
    largest = norms.l2(sizes) if ball.norm == "l2" else norms.linf(sizes)
    zeros = jnp.zeros_like(largest)
    _, multiplier = jax.lax.fori_loop(0, _NUM_BISECTIONS, halve, (zeros, largest))
    m = jax.lax.stop_gradient(jnp.where(is_inside(zeros), 0.0, multiplier))[:, None] * resistance
    if ball.norm == "l2":
        moved = delta * (1.0 / (1.0 + m))
    else:
        moved = jnp.where(m > 0, jnp.sign(delta) * jnp.maximum(jnp.abs(delta) - m * unit, 0.0), delta)
    return center + jnp.clip(moved, low, high).reshape(point.shape)


def exceeded_by(values: Array, count: ArrayLike) -> Array:
    """Finds the highest level that at least `count` of the values exceed, 0 if fewer are positive.

    Bisection, because `top_k` costs far more than a small network's gradient on CPUs.

    Args:
        values: shape `[B, D]`.
        count: a number, or one for each example, shape `[B]`, int.

    Returns:
        Level, shape `[B]`.
    """

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = bracket
        middle = 0.5 * (below + above)
        enough = (values > middle[:, None]).sum(axis=1, dtype=jnp.int32) >= count
        return jnp.where(enough, middle, below), jnp.where(enough, above, middle)

    largest = values.max(axis=1)
    return jax.lax.fori_loop(0, _NUM_BISECTIONS, halve, (jnp.zeros_like(largest), largest))[0]


def _uniform_in_unit_ball(key: Key, shape: tuple[int, ...], dtype: jnp.dtype, norm: Norm) -> Array:
    direction_key, radius_key = jax.random.split(key)
    if norm == "l2":
        normal = jax.random.normal(direction_key, shape, dtype)
        share = jax.random.uniform(radius_key, (), dtype) ** (1.0 / normal.size)
        return share * normal / jnp.sqrt(jnp.square(normal).sum())
    # |Laplace| are exponentials; with one more exponential they are spacings, uniform in the simplex (Devroye 1986).
    laplace = jax.random.laplace(direction_key, shape, dtype)
    rest = jax.random.exponential(radius_key, (), dtype)
    return laplace / (jnp.abs(laplace).sum() + rest)


def check_labels(labels: ArrayLike, x: ArrayLike, num_classes: int | None = None) -> None:
    """Raises where labels do not fit the inputs; values are only looked at where they are concrete.

    Args:
        labels: shape `[B]`, int.
        x: shape `[B, ...]`.
        num_classes: number of classes, if known.

    Raises:
        ValueError: on a wrong shape or dtype, or a label outside `0..num_classes - 1`.
    """
    shape, batch = np.shape(labels), np.shape(cast(Array, x))[0]
    if shape != (batch,):
        raise ValueError(f"Labels of shape {shape} do not fit {batch} inputs: give one integer per example, [{batch}].")
    if not jnp.issubdtype(jnp.asarray(labels).dtype, jnp.integer):
        raise ValueError(f"Labels must be integers, got {jnp.asarray(labels).dtype}: pass class indices, not one-hot.")
    if num_classes is None or isinstance(labels, Tracer):
        return
    values = np.asarray(labels)
    if values.size and not (values.min() >= 0 and values.max() < num_classes):
        raise ValueError(
            f"Labels span [{values.min()}, {values.max()}] but the model has {num_classes} classes: labels must lie in "
            f"0..{num_classes - 1}."
        )
