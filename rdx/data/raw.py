"""Finds and reads the files that the data sets are published as: idx (MNIST, Fashion-MNIST) and CIFAR-10's batches.

Tiny ImageNet's are in `rdx.data.tiny_imagenet`.

CIFAR-10 (Krizhevsky 2009) is accepted as the published archive, as the directory of pickles in it, and as lossless WebP
grids: one image per batch of tiles in row-major order, with a `labels.npz` that has one array per batch.
"""

import gzip
import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rdx.data import tiny_imagenet
from rdx.data.catalogue import CATALOGUE

Arrays = tuple[np.ndarray, np.ndarray]

_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_ALL_BATCHES = (*_BATCHES["train"], *_BATCHES["test"])
_PICKLES, _TAR, _TILE = "cifar-10-batches-py", "cifar-10-python.tar.gz", 32


class Files(NamedTuple):
    """The files of one data set in one layout.

    Attributes:
        paths: the files, by the name that the layout gives them.
        read: `(paths, split) -> (images uint8 [N, H, W, C], labels int32 [N])`, split "train" or "test".
    """

    paths: dict[str, Path]
    read: Callable[[dict[str, Path], str], Arrays]


def find(name: str, root: str | Path) -> Files:
    """Finds the files of the data set `name` under `root`.

    Args:
        name: "mnist", "fashion_mnist", "cifar10", "tiny_imagenet" or "tiny_imagenet32".
        root: the directory that holds them, directly or in a subdirectory called `name`.

    Returns:
        The first complete layout.

    Raises:
        FileNotFoundError: naming the missing files, the directories searched and where to put them.
    """
    root = Path(root).expanduser().resolve()
    # A directory called after another set is not searched: the file names of MNIST and Fashion-MNIST are the same.
    is_other = root.name in CATALOGUE and root.name != name
    directories = [root / name] if is_other else [root / name, root]
    if name in tiny_imagenet.WANTED:
        found = tiny_imagenet.find(name, directories)
        files = None if found is None else Files(*found)
    else:
        files = _find_cifar(root, directories) if name == "cifar10" else _find_idx(directories)
    if files is None:
        raise FileNotFoundError(_missing(name, root, directories))
    return files


def digest(files: Files) -> str:
    """Computes the sha256 of the files' names and contents, as hex."""
    total = hashlib.sha256()
    for name, path in sorted(files.paths.items()):
        with path.open("rb") as file:
            total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _find_idx(directories: Iterable[Path]) -> Files | None:
    names = _IDX["train"] + _IDX["test"]
    for directory in directories:
        paths = {name: _gzipped(directory / name) for name in names}
        if all(path.is_file() for path in paths.values()):
            return Files(paths, _read_idx)
    return None


def _find_cifar(root: Path, directories: Iterable[Path]) -> Files | None:
    grids = [(directory, (*(f"{batch}.webp" for batch in _ALL_BATCHES), "labels.npz")) for directory in directories]
    places = [
        (root, _ALL_BATCHES, _read_pickles),
        *((path, _ALL_BATCHES, _read_pickles) for path in sorted(root.rglob(_PICKLES))),
        *((path.parent, (_TAR,), _read_tar) for path in sorted(root.rglob(_TAR))),
        *((directory, names, _read_grids) for directory, names in grids),
    ]
    for directory, names, read in places:
        if all((directory / name).is_file() for name in names):
            return Files({name: directory / name for name in names}, read)
    return None


def _missing(name: str, root: Path, directories: list[Path]) -> str:
    if name == "cifar10":
        wanted, folder, also = _ALL_BATCHES, directories[0] / _PICKLES, f"or {_TAR}"
        searched = [*directories, *sorted(root.rglob(_PICKLES))]
    elif name in tiny_imagenet.WANTED:
        wanted, folder, also, searched = tiny_imagenet.WANTED[name], directories[0], "unpacked", directories
    else:
        wanted, folder, also = _IDX["train"] + _IDX["test"], directories[0], "each may end in .gz"
        searched = directories
    absent = [file for file in wanted if not any(_gzipped(place / file).exists() for place in searched)]
    return (
        f"{name}: missing {', '.join(absent or wanted)} ({also}); searched {', '.join(map(str, searched))}. "
        f"Put all of them into {folder}, or name the directory that holds {name}/ with root=... or RDX_DATA_DIR."
    )


def _gzipped(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def _read_idx(paths: dict[str, Path], split: str) -> Arrays:
    images, labels = (_idx(paths[name]) for name in _IDX[split])
    return images[..., None], labels.astype(np.int32)


def _idx(path: Path) -> np.ndarray:
    """Reads an idx file of bytes: magic (0, 0, 8, rank), big-endian sizes, then the elements."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of bytes: fetch it again.")
    shape = tuple(np.frombuffer(data, ">i4", data[3], 4).tolist())
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _read_pickles(paths: dict[str, Path], split: str) -> Arrays:
    return _join(_unpickle(paths[name].read_bytes()) for name in _BATCHES[split])


def _read_tar(paths: dict[str, Path], split: str) -> Arrays:
    with tarfile.open(paths[_TAR]) as archive:
        members = [archive.extractfile(f"{_PICKLES}/{name}") for name in _BATCHES[split]]
        return _join(_unpickle(member.read()) for member in members if member is not None)


def _read_grids(paths: dict[str, Path], split: str) -> Arrays:
    with np.load(paths["labels.npz"]) as labels:
        return _join((_tiles(paths[f"{name}.webp"]), labels[name]) for name in _BATCHES[split])


def _tiles(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        grid = np.asarray(image.convert("RGB"))
    rows, columns = grid.shape[0] // _TILE, grid.shape[1] // _TILE
    tiles = grid.reshape(rows, _TILE, columns, _TILE, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, _TILE, _TILE, 3)


def _join(batches: Iterable[Arrays]) -> Arrays:
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels).astype(np.int32)


def _unpickle(data: bytes) -> Arrays:
    batch = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    images = batch[b"data"].reshape(-1, 3, _TILE, _TILE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.asarray(batch[b"labels"])


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays and nothing else: a pickle may otherwise run any code.

    The published pickles name a module that numpy 2 has moved, so the names are resolved here and not imported.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Resolves the few names that a pickled array consists of."""
        if module in {"numpy", "numpy.core.multiarray", "numpy._core.multiarray"}:
            known = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": _reconstruct}
            if name in known:
                return known[name]
        if (module, name) == ("_codecs", "encode"):
            return str.encode
        raise pickle.UnpicklingError(f"A CIFAR-10 batch holds arrays only, not {module}.{name}: fetch it again.")


def _reconstruct(cls: type[np.ndarray], shape: tuple[int, ...], dtype: bytes | str) -> np.ndarray:
    return np.ndarray.__new__(cls, shape, dtype.decode() if isinstance(dtype, bytes) else dtype)
