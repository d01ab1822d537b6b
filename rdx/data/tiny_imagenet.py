"""Finds and reads Tiny ImageNet (Le & Yang 2015): 200 classes of ImageNet, labelled in the order of `wnids.txt`.

`tiny_imagenet` has the published 64x64 images, in the layout of the published archive, in which images lie by class:

    tiny-imagenet-200/train/<wnid>/images/<wnid>_<i>.JPEG
    tiny-imagenet-200/val/images/val_<i>.JPEG, tiny-imagenet-200/val/val_annotations.txt

`tiny_imagenet32` has 32x32 images, a hundred a class for training, in two archives `train_100_per_class.tar.xz` and
`val.tar.xz` whose members are `<wnid>/<name>.JPEG`. The test images are published without labels, so the split "test"
is the published validation set, as everywhere in the literature.
"""

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from rdx.data.catalogue import entry

# paths, split -> images uint8 [N, H, W, 3], labels int32 [N]
Reader = Callable[[dict[str, Path], str], tuple[np.ndarray, np.ndarray]]

FOLDER = "tiny-imagenet-200"
_ARCHIVES = {"train": "train_100_per_class.tar.xz", "test": "val.tar.xz"}
_ANNOTATIONS = "val/val_annotations.txt"
WANTED = {"tiny_imagenet": (f"{FOLDER}/train", f"{FOLDER}/{_ANNOTATIONS}"), "tiny_imagenet32": (*_ARCHIVES.values(),)}


def find(name: str, directories: Iterable[Path]) -> tuple[dict[str, Path], Reader] | None:
    """Finds the files of a version.

    Args:
        name: "tiny_imagenet" or "tiny_imagenet32".
        directories: where to look, the first that has everything counts.

    Returns:
        The files, by their names in the layout, and what reads them; None where nothing is complete.
    """
    for directory in directories:
        if name == "tiny_imagenet32":
            paths = {file: directory / file for file in _ARCHIVES.values()}
            if all(path.is_file() for path in paths.values()):
                return paths, _read_archives
        for home in (directory / FOLDER, directory):
            if name == "tiny_imagenet" and (home / _ANNOTATIONS).is_file() and (home / "train").is_dir():
                files = [home / _ANNOTATIONS, *home.glob("train/*/images/*.JPEG"), *home.glob("val/images/*.JPEG")]
                return {path.relative_to(home).as_posix(): path for path in files}, _read_folders
    return None


def _read_folders(paths: dict[str, Path], split: str) -> tuple[np.ndarray, np.ndarray]:
    if split == "train":
        wnids = {name: name.split("/")[1] for name in paths if name.startswith("train/")}
    else:
        lines = paths[_ANNOTATIONS].read_text().splitlines()
        wnids = {f"val/images/{file}": wnid for file, wnid, *_ in (line.split("\t") for line in lines if line)}
        if absent := wnids.keys() - paths.keys():
            raise ValueError(f"{paths[_ANNOTATIONS]} names {len(absent)} images that are not there: unpack them again.")
    names = sorted(wnids, key=_order)
    return _arrays("tiny_imagenet", ((wnids[name], paths[name].open("rb")) for name in names), len(names))


def _read_archives(paths: dict[str, Path], split: str) -> tuple[np.ndarray, np.ndarray]:
    path = paths[_ARCHIVES[split]]
    with tarfile.open(path) as archive:
        num = sum(member.isfile() for member in archive)
    # A second pass in the order of the stream: random access would decompress the archive for every image.
    with tarfile.open(path, "r|xz") as archive:
        return _arrays("tiny_imagenet32", _members(archive), num)


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for member in archive:
        file = archive.extractfile(member)
        if file is not None:
            yield member.name.split("/")[-2], file


def _arrays(name: str, files: Iterable[tuple[str, IO[bytes]]], num: int) -> tuple[np.ndarray, np.ndarray]:
    """Decodes JPEG files; a few are grey."""
    shape, wnids = entry(name)
    places = {wnid: label for label, wnid in enumerate(wnids)}
    images, labels = np.empty((num, *shape), np.uint8), np.empty(num, np.int32)
    for i, (wnid, file) in enumerate(files):
        with file, Image.open(file) as image:
            if image.size != (shape[1], shape[0]) or wnid not in places:
                raise ValueError(f"An image of class {wnid} and size {image.size} is none of {name}: fetch it again.")
            images[i], labels[i] = np.asarray(image.convert("RGB")), places[wnid]
    return images, labels


def _order(name: str) -> list[str | int]:
    """Sorts `val_10` after `val_9`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
