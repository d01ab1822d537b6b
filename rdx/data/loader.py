"""Batches as global arrays, sharded over the one-axis device mesh `data`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rdx.data.sampler import Sampler
from rdx.data.sources import Source
from rdx.types import Array

AXIS = "data"


def data_mesh(num_devices: int | None = None) -> Mesh:
    """Makes the mesh that batches are sharded over: one axis called `data`.

    Args:
        num_devices: how many of the devices to use; all by default.

    Returns:
        The mesh, with automatic axis type.

    Raises:
        ValueError: if there are not that many devices.
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    if not 1 <= count <= len(devices):
        raise ValueError(
            f"Impossible mesh: {count} devices asked for, {len(devices)} exist. Use 1 to {len(devices)}; on CPUs "
            f"jax.config.update('jax_num_cpu_devices', n) before the first computation makes more."
        )
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


@dataclass(frozen=True)
class Loader:
    """Loads the global batch of any step.

    Attributes:
        source: the data set.
        sampler: chooses the examples of each step; made for `len(source)` examples.
        mesh: what `data_mesh` returns; without one, batches lie on the default device.

    Raises:
        ValueError: if the batch does not divide over the mesh or the sampler is for another number of examples.
    """

    source: Source
    sampler: Sampler
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        _check(self.sampler.batch_size, self.mesh)
        if self.sampler.num_examples != len(self.source):
            raise ValueError(
                f"The sampler is for {self.sampler.num_examples} examples, the source has {len(self.source)}: "
                f"make it with num_examples=len(source)."
            )

    def __call__(self, step: int) -> dict[str, Array]:
        """Loads the batch of `step`: `x` uint8 `[B, H, W, C]`, `labels` int32 `[B]`, `index` int32 `[B]`."""
        return _batch(self.source, self.sampler.indices(step), self.mesh)


def evaluation_batches(source: Source, batch_size: int, mesh: Mesh | None = None) -> Iterator[dict[str, Array]]:
    """Walks through a data set once, in order, dropping nothing.

    Args:
        source: the data set.
        batch_size: size `B` of every batch; the last one is filled up with example 0.
        mesh: what `data_mesh` returns; without one, batches lie on the default device.

    Returns:
        An iterator over batches `x` uint8 `[B, H, W, C]`, `labels` int32 `[B]`, `index` int32 `[B]` and `mask` bool
        `[B]`, false in the rows that fill up.

    Raises:
        ValueError: at once, if the batch does not divide over the mesh.
    """
    _check(batch_size, mesh)
    return _walk(source, batch_size, mesh)


def _walk(source: Source, batch_size: int, mesh: Mesh | None) -> Iterator[dict[str, Array]]:
    for start in range(0, len(source), batch_size):
        rows = start + np.arange(batch_size)
        mask = rows < len(source)
        yield _batch(source, np.where(mask, rows, 0), mesh) | {"mask": _place(mask, np.arange(batch_size), mesh)}


def _check(batch_size: int, mesh: Mesh | None) -> None:
    if batch_size < 1:
        raise ValueError(f"Batch size {batch_size} is too small: use at least 1.")
    if mesh is None:
        return
    if mesh.axis_names != (AXIS,):
        raise ValueError(f"Impossible mesh: axes {mesh.axis_names} where ({AXIS!r},) is needed; use data_mesh().")
    if batch_size % mesh.size:
        multiple = mesh.size * math.ceil(batch_size / mesh.size)
        raise ValueError(
            f"Impossible mesh: a batch of {batch_size} does not divide over {mesh.size} devices. Use a multiple of "
            f"{mesh.size}, such as {multiple}, or data_mesh({math.gcd(batch_size, mesh.size)})."
        )


def _batch(source: Source, rows: np.ndarray, mesh: Mesh | None) -> dict[str, Array]:
    fields = {"x": source.images, "labels": source.labels, "index": source.index}
    return {name: _place(array, rows, mesh) for name, array in fields.items()}


def _place(array: np.ndarray, rows: np.ndarray, mesh: Mesh | None) -> Array:
    if mesh is None:
        return jnp.asarray(array[rows])
    # The callback is asked for the shards of this process's devices only.
    def shard(place: Any) -> np.ndarray:
        return array[rows[place[0]]]

    return jax.make_array_from_callback((len(rows), *array.shape[1:]), NamedSharding(mesh, PartitionSpec(AXIS)), shard)
