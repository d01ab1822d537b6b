"""Random shifts, rotations and flips of training batches, as transforms for `train.fit`."""

import functools

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rdx import data
from rdx.types import Key, PyTree


@functools.cache
def transform(*, shift: int, rotation: float = 0.0, flip: bool = False, is_alike: bool = False) -> Partial | None:
    """Builds the transform of a training; equal settings share one object, and so what is compiled with it.

    Args:
        shift: largest shift in pixels.
        rotation: largest rotation in degrees.
        flip: whether images are mirrored at random.
        is_alike: whether all images of a batch are treated alike, as by torchvision's transforms of a whole batch.

    Returns:
        `(key, batch) -> batch`; None if nothing is to be done.
    """
    if not (shift or rotation or flip):
        return None

    def augmented(key: Key, batch: PyTree) -> PyTree:
        shift_key, rotation_key, flip_key = jax.random.split(key, 3)
        x, index = data.to_float(batch["x"]), batch["index"]
        if is_alike:  # every image draws what the first of the batch draws
            index = jnp.broadcast_to(index[:1], index.shape)
        if shift:
            x = data.random_shift(shift_key, x, padding=shift, index=index)
        if rotation:
            x = data.random_rotation(rotation_key, x, degrees=rotation, index=index)
        if flip:
            x = data.random_flip(flip_key, x, index=index)
        return {**batch, "x": x}

    return Partial(augmented)
