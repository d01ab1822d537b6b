"""Command lines from dataclasses, and what they name."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import TypeVar

from rdx import compilation

T = TypeVar("T")


def parse(kind: type[T]) -> T:
    """Parses `sys.argv` into a dataclass whose fields are text and have defaults.

    With `tyro` installed it prints help and names mistakes; without it, as on some accelerator machines, `--name value`
    pairs are understood. It is the first thing that a program does, so it also has the process keep its memory.

    Raises:
        SystemExit: on an unknown option.
    """
    compilation.keep_memory()
    try:
        import tyro
    except ImportError:
        return _parse_pairs(kind, sys.argv[1:])
    return tyro.cli(kind)


def of_dataset(builders: Mapping[str, T], dataset: str) -> T:
    """Looks up what builds the settings of a data set.

    Raises:
        ValueError: naming the data sets that there are.
    """
    if dataset not in builders:
        raise ValueError(f"No settings for data set {dataset!r}: use one of {', '.join(builders)}.")
    return builders[dataset]


def _parse_pairs(kind: type[T], words: list[str]) -> T:
    known = {field.name for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    names = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]) or not known.issuperset(names):
        raise SystemExit(f"Usage: --name value pairs, with names among {', '.join(sorted(known))}.")
    return kind(**dict(zip(names, words[1::2], strict=True)))
