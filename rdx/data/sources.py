"""Loads image classification sets into memory.

`digits`, the 1,797 images 8x8 of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, UCI Machine
Learning Repository, CC BY 4.0; see DIGITS_LICENSE.md), comes with the package: grey levels 0..16 are stored as
`round(255 / 16 * v)`, and a fixed permutation splits them into 1,437 for training and 360 for testing. The other sets
are read from files that the user has.
"""

import functools
import hashlib
import importlib.resources
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rdx.data import prepared
from rdx.data.catalogue import entry
from rdx.data.raw import Arrays
from rdx.types import Array, ArrayLike

SPLITS = ("train", "validation", "train_all", "test")


@dataclass(frozen=True, eq=False)
class Source:
    """Images and labels in memory; never changed once made.

    Attributes:
        images: shape `[N, H, W, C]`, uint8.
        labels: shape `[N]`, int32.
        name: the data set's name.
        split: "train", "validation", "train_all" or "test".
        class_names: one name per label.
        index: each example's place in the published split (for "train" and "validation": in "train_all"), shape `[N]`,
            int32; it stays with the example through `take` and `subset`.
    """

    images: np.ndarray
    labels: np.ndarray
    name: str
    split: str
    class_names: tuple[str, ...]
    index: np.ndarray = field(repr=False)

    def __post_init__(self) -> None:
        for array in (self.images, self.labels, self.index):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Source({self.name!r}, {self.split!r}, {len(self)} images {self.images.shape[1:]})"

    @property
    def num_classes(self) -> int:
        """Counts the classes."""
        return len(self.class_names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Computes the sha256 of the images' bytes followed by the labels' (little-endian int32), as hex."""
        total = hashlib.sha256(np.ascontiguousarray(self.images).data)
        total.update(np.ascontiguousarray(self.labels, "<i4").data)
        return total.hexdigest()

    def gather(self, indices: ArrayLike) -> dict[str, np.ndarray]:
        """Collects a batch.

        Args:
            indices: positions in this source, shape `[B]`.

        Returns:
            `x` uint8 `[B, H, W, C]`, `labels` int32 `[B]` and `index` int32 `[B]`.
        """
        rows = np.asarray(indices)
        return {"x": self.images[rows], "labels": self.labels[rows], "index": self.index[rows]}

    def subset(self, indices: ArrayLike) -> "Source":
        """Selects the examples at the positions `indices`."""
        batch = self.gather(indices)
        return replace(self, images=batch["x"], labels=batch["labels"], index=batch["index"])

    def take(self, n: int) -> "Source":
        """Selects the first `n` examples, or all if there are fewer."""
        return self.subset(np.arange(min(n, len(self))))


def load(
    name: str, split: str, *, root: str | Path | None = None, archive: str | Path | None = None,
) -> Source:
    """Loads a split of a data set into memory.

    The images come from the first of: `archive`, `root`, the package itself (`digits`), the environment variable
    RDX_DATA_ARCHIVE, the environment variable RDX_DATA_DIR. From a directory the set is prepared once with TFDS and
    cached in `RDX_CACHE_DIR` (`~/.cache/rdx`); an archive (`python -m rdx.data.archive`) needs numpy only.

    Args:
        name: "digits", "mnist", "fashion_mnist", "cifar10", "tiny_imagenet" or "tiny_imagenet32".
        split: "train_all" (all training images), "validation" (5 % of them, the end of a fixed permutation), "train"
            (the others) or "test".
        root: directory of the published files; see `rdx.data.raw.find`.
        archive: an .npz file, or a directory that holds `<name>.npz`.

    Returns:
        The split in the order of the published files.

    Raises:
        ValueError: for an unknown name or split, both `root` and `archive`, or an archive of another set.
        FileNotFoundError: if the files are not there, saying where they were looked for.
    """
    class_names = entry(name).class_names
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: use one of {SPLITS}.")
    images, labels = _reader(name, root, archive)("test" if split == "test" else "train")
    everything = Source(images, labels, name, split, class_names, np.arange(len(labels), dtype=np.int32))
    if split in {"train", "validation"}:
        return everything.subset(_part(len(labels), split))
    return everything


def to_float(x: ArrayLike) -> Array:
    """Converts bytes to floats in [0, 1]: `x / 255`, uint8 to float32; works inside `jit`."""
    return jnp.asarray(x).astype(jnp.float32) / 255.0


def read_archive(path: str | Path, name: str, split: str) -> Arrays:
    """Reads "train" or "test" of an archive made by `rdx.data.archive`.

    Args:
        path: an .npz file with the arrays `<split>_images` and `<split>_labels`, or a directory of files `<name>.npz`.
        name: the data set that the archive must hold.
        split: "train" or "test".

    Returns:
        Images, uint8 `[N, H, W, C]`, and labels, int32 `[N]`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the archive holds another data set.
    """
    path = Path(path).expanduser()
    path = path / f"{name}.npz" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"No archive {path}: make it with `python -m rdx.data.archive {name} {path}`.")
    with np.load(path) as file:
        if "name" in file and str(file["name"]) != name:
            raise ValueError(f"{path} holds {str(file['name'])!r}, not {name!r}: name the archive of {name}.")
        return file[f"{split}_images"], file[f"{split}_labels"].astype(np.int32)


def _reader(name: str, root: str | Path | None, archive: str | Path | None) -> Callable[[str], Arrays]:
    if root is not None and archive is not None:
        raise ValueError("Give root or archive, not both.")
    if root is None and archive is None:
        if name == "digits":
            return _embedded
        archive = os.environ.get("RDX_DATA_ARCHIVE") or None
        root = os.environ.get("RDX_DATA_DIR") or None
    if archive is not None:
        return functools.partial(read_archive, archive, name)
    if root is not None:
        return lambda split: prepared.arrays(name, split, root)
    raise FileNotFoundError(
        f"{name} does not come with the package: set RDX_DATA_DIR (or root=...) to the directory that holds the "
        f"published files in {name}/, or RDX_DATA_ARCHIVE (or archive=...) to an archive of it."
    )


def _embedded(split: str) -> Arrays:
    with importlib.resources.as_file(importlib.resources.files("rdx.data") / "digits.npz") as path:
        return read_archive(path, "digits", split)


def _part(num_examples: int, split: str) -> np.ndarray:
    """Positions of "train" or "validation" in "train_all", ascending."""
    order = np.random.default_rng(0).permutation(num_examples)
    held_out = -(-num_examples // 20)
    return np.sort(order[-held_out:] if split == "validation" else order[:-held_out])
