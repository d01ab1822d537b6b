"""Prepares a data set once, and afterwards reads it in milliseconds.

A prepared set is the directory `<cache>/data/<name>/<digest of the published files>`: TFDS's array_record files and,
beside them, the same arrays as .npy files. It is made in a temporary directory and renamed when it is complete; a
killed preparation leaves at most a directory `incomplete-*`, which is never read and may be deleted.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from rdx.data import raw

_ARRAYS = "arrays"


def cache_dir() -> Path:
    """Names the directory of prepared sets: `data` in `RDX_CACHE_DIR` or, without it, in `~/.cache/rdx`."""
    return Path(os.environ.get("RDX_CACHE_DIR") or Path.home() / ".cache" / "rdx") / "data"


def arrays(name: str, split: str, root: str | Path) -> raw.Arrays:
    """Reads a split of the data set under `root`, preparing the set first if that has not been done.

    Args:
        name: a data set of the catalogue, but for "digits".
        split: "train" or "test".
        root: the directory that holds the published files.

    Returns:
        Images, uint8 `[N, H, W, C]`, and labels, int32 `[N]`, in the order of the published files.

    Raises:
        FileNotFoundError: if the published files are not there.
        ModuleNotFoundError: if the set must be prepared and tensorflow-datasets is not installed.
    """
    home = cache_dir() / name / raw.digest(raw.find(name, root))[:16]
    if not home.exists():
        _prepare(name, root, home)
    images, labels = (np.load(home / _ARRAYS / f"{split}_{part}.npy") for part in ("images", "labels"))
    return images, labels


def _prepare(name: str, root: str | Path, home: Path) -> None:
    try:
        # TFDS takes half a second to import and is not needed again.
        from rdx.data import builders
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Preparing {name} needs tensorflow-datasets. Install it, or make an archive where it is installed (python "
            f"-m rdx.data.archive {name} {name}.npz) and load that with archive=... or RDX_DATA_ARCHIVE."
        ) from error
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incomplete-", dir=home.parent) as temporary:
        complete = Path(temporary) / home.name
        builder = builders.prepare(name, root, complete)
        (complete / _ARRAYS).mkdir()
        for split in ("train", "test"):
            for part, array in zip(("images", "labels"), builders.read(builder, split), strict=True):
                np.save(complete / _ARRAYS / f"{split}_{part}.npy", array)
        try:
            complete.rename(home)
        except OSError:
            # Another process was faster; its set is the same.
            if not home.exists():
                raise
