"""Packs a data set into one file for machines without tensorflow-datasets.

Command line: `python -m rdx.data.archive NAME OUT.npz`.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np

from rdx.data import sources
from rdx.data.catalogue import CATALOGUE


def write(name: str, out: str | Path, *, root: str | Path | None = None) -> None:
    """Writes the splits of a data set to one compressed file, atomically.

    Args:
        name: the data set.
        out: the .npz file; `rdx.data.load(name, split, archive=out)` reads it.
        root: directory of the published files; `RDX_DATA_DIR` by default.
    """
    arrays = {"name": np.array(name)}
    for split, part in (("train", "train_all"), ("test", "test")):
        source = sources.load(name, part, root=root)
        arrays |= {f"{split}_images": source.images, f"{split}_labels": source.labels}
    out = Path(out).expanduser()
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        file = Path(temporary) / "archive.npz"
        np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(file, out)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m rdx.data.archive", description="Packs a data set into one file.")
    parser.add_argument("name", choices=sorted(CATALOGUE))
    parser.add_argument("out", type=Path, help="the .npz file to write")
    parser.add_argument("--root", type=Path, help="directory of the published files (default: RDX_DATA_DIR)")
    arguments = parser.parse_args()
    write(arguments.name, arguments.out, root=arguments.root)


if __name__ == "__main__":
    main()
