"""The camera of A5's physical recipes: a random, differentiable picture `A(w)` of an object `w`.

Frosio & Kautz (2023, A5, Eq. 10 and Sec. 4) print characters and photograph them:

    y = 1 - warp(w) + noise,    A(w) = clip(jitter(blur(y)))

where `w` has bright strokes and prints dark on white. Ranges are those of the authors' code; what differs from it:

- Every image has its own draw. The authors' code draws one shift, angle, perspective, blur and jitter for a whole
  batch, so that all its images are taken in one pose.
- Shift, rotation and perspective are composed and the image is interpolated once, bilinearly. The authors' code
  interpolates twice, and takes the nearest pixel when it rotates.
- Shifts and displacements of corners are real numbers, not whole pixels.
- Colours are jittered in one order: brightness, contrast, saturation, hue. Hue is `images.adjust_hue`'s.
"""

import dataclasses
import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rdx import images
from rdx.attacks.base import example_keys
from rdx.types import Array, ArrayLike, Key

# Which way each corner moves inwards, (rows, columns): top left, top right, bottom left, bottom right.
_INWARDS = ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))
_Number: TypeAlias = float | Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Camera:
    """Ranges of the random picture; by default those of A5's released code, for images of 128 x 128 pixels.

    All numbers are traced, so that sweeping them does not recompile.

    Attributes:
        shift: largest shift each way, in pixels.
        degrees: largest rotation each way.
        distortion: how far corners may move inwards, as a share of half the side.
        distortion_probability: of a perspective at all.
        noise: least and greatest standard deviation of Gaussian noise.
        sigma: least and greatest standard deviation of the blur, in pixels.
        jitter: largest changes of brightness, contrast and saturation, whose factors lie in `1 -+ jitter`, and of hue,
            in turns.
        is_inverted: whether the picture is of `1 - w`: ink on paper.
        num_channels: of the picture, 1 or 3; a gray object gives equal channels, each of which can be attacked alone.
        num_taps: side of the blur's kernel, odd.
    """

    shift: _Number = 5.0
    degrees: _Number = 5.0
    distortion: _Number = 0.25
    distortion_probability: _Number = 0.99
    noise: tuple[_Number, _Number] = (0.001, 0.1)
    sigma: tuple[_Number, _Number] = (0.01, 1.0)
    jitter: tuple[_Number, _Number, _Number, _Number] = (0.1, 0.1, 0.1, 0.1)
    is_inverted: bool = dataclasses.field(default=True, metadata={"static": True})
    num_channels: int = dataclasses.field(default=3, metadata={"static": True})
    num_taps: int = dataclasses.field(default=9, metadata={"static": True})

    def check(self, w: Array) -> None:
        """Raises where ranges or objects are unusable; numbers are only looked at where they are concrete.

        Raises:
            ValueError: naming what is wrong.
        """
        if w.ndim != 4 or w.shape[-1] not in {1, self.num_channels} or self.num_channels not in {1, 3}:
            raise ValueError(
                f"A camera of {self.num_channels} channels does not picture objects {w.shape}: give [B, H, W, C] with "
                "1 channel, or as many as num_channels, which is 1 or 3."
            )
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self)):
            return
        if not all(np.asarray(leaf) >= 0 for leaf in jax.tree.leaves(self)):
            raise ValueError(f"{self} has a negative number: ranges start at 0.")
        if self.noise[0] > self.noise[1] or self.sigma[0] > self.sigma[1]:
            raise ValueError(f"noise={self.noise} and sigma={self.sigma} are (least, greatest): give them in order.")
        if self.distortion >= 1 or self.distortion_probability > 1:
            raise ValueError(
                f"distortion={self.distortion} must be below 1, where corners meet, and distortion_probability="
                f"{self.distortion_probability} at most 1."
            )


# The camera that changes nothing, bit for bit.
IDENTITY = Camera(0.0, 0.0, 0.0, 0.0, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0, 0.0, 0.0), is_inverted=False, num_channels=1)


class Shot(NamedTuple):
    """How each of `B` pictures is taken.

    Attributes:
        shift: rows and columns, in pixels, shape `[B, 2]`.
        angle: in radians, shape `[B]`.
        displacement: of the corners, inwards, as `images.perspective` takes it, shape `[B, 4, 2]`.
        noise: what is added, shape `[B, H, W, C]`.
        sigma: of the blur, in pixels, shape `[B]`.
        brightness: factor, shape `[B]`.
        contrast: factor, shape `[B]`.
        saturation: factor, shape `[B]`.
        hue: turns, shape `[B]`.
    """

    shift: Array
    angle: Array
    displacement: Array
    noise: Array
    sigma: Array
    brightness: Array
    contrast: Array
    saturation: Array
    hue: Array


def acquire(key: Key, w: Array, camera: Camera, *, index: ArrayLike | None = None) -> Array:
    """Takes a random picture `A(w)` of each object (Frosio & Kautz 2023, A5, Eq. 10).

    It is differentiable in `w`. Pictures are independent: what becomes of one depends on `key` and its `index`, not on
    who shares the batch.

    Args:
        key: a random key.
        w: objects in [0, 1], shape `[B, H, W, C]`.
        camera: the ranges.
        index: numbers of the pictures, shape `[B]`, int; `0..B-1` by default.

    Returns:
        Pictures in [0, 1], shape `[B, H, W, camera.num_channels]`.

    Raises:
        ValueError: where camera, objects or index do not fit.
    """
    camera.check(w)
    keys = example_keys(key, w, index)
    shots = jax.vmap(lambda key: draw(key, camera, w.shape[1:], w.dtype))(keys)
    return take(w, shots, camera)


def draw(key: Key, camera: Camera, shape: tuple[int, ...], dtype: jnp.dtype) -> Shot:
    """Draws how one picture is taken, uniformly from the camera's ranges.

    Args:
        key: the picture's key.
        camera: the ranges.
        shape: of the object, `[H, W, C]`.
        dtype: of the object.

    Returns:
        The shot, without batch axis.
    """
    number_key, noise_key = jax.random.split(key)
    # All numbers at once and the noise flat: each call and each axis of a random draw costs XLA time to compile.
    numbers = jax.random.uniform(number_key, (18,), dtype)
    noise = jax.random.normal(noise_key, (math.prod(shape),), dtype).reshape(shape)
    signed = 2 * numbers - 1
    half = jnp.array([shape[0] // 2, shape[1] // 2], dtype)
    inwards = jnp.array(_INWARDS, dtype) * half[None] * camera.distortion * numbers[3:11].reshape(4, 2)
    factors = 1 + signed[14:17] * jnp.stack([jnp.asarray(size, dtype) for size in camera.jitter[:3]])
    return Shot(
        shift=camera.shift * signed[:2], angle=jnp.deg2rad(camera.degrees * signed[2]),
        displacement=jnp.where(numbers[11] < camera.distortion_probability, inwards, 0.0),
        noise=_between(camera.noise, numbers[12]) * noise, sigma=_between(camera.sigma, numbers[13]),
        brightness=factors[0], contrast=factors[1], saturation=factors[2], hue=camera.jitter[3] * signed[17],
    )


def _between(ends: tuple[_Number, _Number], share: Array) -> Array:
    return ends[0] + share * (ends[1] - ends[0])


def take(w: Array, shot: Shot, camera: Camera) -> Array:
    """Takes the pictures of `w [B, H, W, C]` that are described; see `acquire`."""
    height, width = w.shape[1:3]
    # The picture is shifted first, then rotated, then seen at an angle; what lies outside of `w` is blank paper.
    matrix = images.compose(
        images.translation(shot.shift), images.rotation(shot.angle, height=height, width=width),
        images.perspective(shot.displacement, height=height, width=width),
    )
    x = images.warp(w, matrix)
    x = images.gaussian_blur((1.0 - x if camera.is_inverted else x) + shot.noise, shot.sigma, num_taps=camera.num_taps)
    x = images.adjust_contrast(images.adjust_brightness(x, shot.brightness), shot.contrast)
    # Both leave gray as it is.
    if x.shape[-1] == 3:
        x = images.adjust_hue(images.adjust_saturation(x, shot.saturation), shot.hue)
    return jnp.broadcast_to(x, (*x.shape[:3], camera.num_channels)).clip(0.0, 1.0)
