"""Schedules `step -> value`, above all of the radius: jittable pytrees whose parameters are leaves.

Each is an `optax.Schedule`, and the other way round, optax's own schedules serve as learning rates beside them.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from rdx.types import Array, ArrayLike


class Ramp(Protocol):
    """A radius that is 0 up to step `start`, rises, and stays at `eps` from step `end` on."""

    @property
    def eps(self) -> ArrayLike:
        """The final radius."""
        ...

    @property
    def start(self) -> int | Array:
        """The last step with radius 0."""
        ...

    @property
    def end(self) -> int | Array:
        """The first step with the final radius."""
        ...

    def __call__(self, step: ArrayLike) -> Array:
        """Computes the radius at a step, a float32 scalar."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearRamp:
    """A `Ramp` along a straight line; `linear_ramp` builds it."""

    eps: ArrayLike
    start: int | Array
    end: int | Array

    def __call__(self, step: ArrayLike) -> Array:
        """Computes the radius at a step, a float32 scalar."""
        return _as_float(self.eps) * _share(step, self.start, self.end)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SmoothedRamp:
    """A `Ramp` that bends polynomially up to step `middle` and is straight after it; `smoothed` builds it."""

    eps: ArrayLike
    start: int | Array
    middle: int | Array
    end: int | Array
    beta: ArrayLike

    def __call__(self, step: ArrayLike) -> Array:
        """Computes the radius at a step, a float32 scalar."""
        eps, beta = _as_float(self.eps), _as_float(self.beta)
        start, middle, end = (_as_float(value) for value in (self.start, self.middle, self.end))
        bent, straight = middle - start, end - middle
        at_middle = eps * bent / jnp.maximum(beta * straight + bent, 1.0)
        curve = at_middle * _share(step, start, middle) ** beta
        line = (eps - at_middle) * _share(step, middle, end)
        # The sum may miss eps by a rounding; losses compare the radius with it.
        return jnp.where(_as_float(step) >= end, eps, curve + line)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeometricRamp:
    """The values `first (last / first)^t`, where `t` rises from 0 at step `start` to 1 at step `end`."""

    first: ArrayLike
    last: ArrayLike
    start: int | Array
    end: int | Array

    def __call__(self, step: ArrayLike) -> Array:
        """Computes the value at a step, a float32 scalar."""
        first, last = _as_float(self.first), _as_float(self.last)
        return first * (last / first) ** _share(step, self.start, self.end)


def linear_ramp(eps: ArrayLike, start: int, length: int) -> LinearRamp:
    """Builds `eps * clip((step - start) / length, 0, 1)`.

    Args:
        eps: the final radius.
        start: the last step with radius 0.
        length: how many steps the rise takes.

    Returns:
        The ramp.

    Raises:
        ValueError: where the length is not positive.
    """
    if length < 1:
        raise ValueError(f"The ramp lasts {length} steps: give at least 1.")
    return LinearRamp(eps, start, start + length)


def smoothed(
    eps: ArrayLike, start_epoch: int, length_epochs: int, mid: float, steps_per_epoch: int, *, beta: float = 4.0
) -> SmoothedRamp:
    """Builds the smooth ramp of certified training, with epochs counted from 1.

    With `E` steps per epoch, `start = (start_epoch - 1) E`, `end = (start_epoch + length_epochs - 1) E`, `middle =
    start + int(mid (end - start))`, `n = middle - start` and `m = end - middle`, the radius is

        0                                                     step <= start
        v ((step - start) / n)^beta                           start < step < middle
        v + (eps - v) (step - middle) / m                     middle <= step < end
        eps                                                   end <= step

    where `v = eps n / (beta m + n)` makes value and slope continuous. It is the smoothed schedule of auto_LiRPA (Xu et
    al. 2020, arXiv:2002.12920), written so that powers of thousands of steps do not overflow float32.

    Args:
        eps: the final radius.
        start_epoch: the epoch in which the rise begins, 1 for the first one.
        length_epochs: how many epochs the rise takes.
        mid: share of the rise that is bent, in [0, 1].
        steps_per_epoch: batches per epoch.
        beta: exponent of the bent part.

    Returns:
        The ramp.

    Raises:
        ValueError: on an empty rise, a start before the first epoch, or a share outside [0, 1].
    """
    if start_epoch < 1 or length_epochs < 1 or steps_per_epoch < 1:
        raise ValueError(
            f"start_epoch, length_epochs and steps_per_epoch are counted from 1, got {start_epoch}, {length_epochs}, "
            f"{steps_per_epoch}."
        )
    if not 0.0 <= mid <= 1.0:
        raise ValueError(f"mid is the share of the rise that is bent and lies in [0, 1], got {mid}.")
    start = (start_epoch - 1) * steps_per_epoch
    length = length_epochs * steps_per_epoch
    return SmoothedRamp(eps, start, start + int(length * mid), start + length, beta)


def _as_float(value: ArrayLike) -> Array:
    return jnp.asarray(value).astype(jnp.float32)


def _share(step: ArrayLike, start: ArrayLike, end: ArrayLike) -> Array:
    """Computes how much of `[start, end]` has passed, in [0, 1]."""
    step, start, end = _as_float(step), _as_float(start), _as_float(end)
    return jnp.clip((step - start) / jnp.maximum(end - start, 1.0), 0.0, 1.0)
