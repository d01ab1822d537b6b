"""What experiments do with their output directories."""

import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rdx import data
from rdx.evaluate import report


def claim(directory: Path, settings: Any, test: data.Source) -> None:
    """Notes settings and data in the directory, so that a run never continues another one's.

    Args:
        directory: where the run writes; it is made if absent.
        settings: a dataclass.
        test: what is evaluated.

    Raises:
        ValueError: if the directory holds a run with other settings or data.
    """
    directory.mkdir(parents=True, exist_ok=True)
    noted = {**dataclasses.asdict(settings), "evaluated": test.fingerprint}
    path, text = directory / "config.json", json.dumps(noted, indent=2, default=str)
    if path.exists() and path.read_text().rstrip() != text:
        raise ValueError(f"{directory} holds a run with other settings: give another --out, or delete it.")
    report.write_text(path, text)


def publish(directory: Path, text: str, found: Iterable[Mapping[str, Any]]) -> None:
    """Writes `table.md`, prints it, and tells the time that its records took.

    The table holds no times, so that an interrupted run ends with the same one; the records and the console do.
    """
    report.write_text(directory / "table.md", text)
    print(text)
    minutes = sum(record["seconds_total"] for record in found) / 60
    print(f"\nTable: {directory / 'table.md'}\n{minutes:.0f} minutes in all", flush=True)


def stopwatch(path: Path) -> Callable[[object], None]:
    """Starts to time a stage that may be interrupted; for `fit(on_log=...)`.

    Args:
        path: a file with the seconds that the stage has taken, those of earlier runs included.

    Returns:
        A function that brings the file up to date, whatever it is called with.
    """
    before, start = seconds(path), time.monotonic()

    def note(row: object) -> None:
        del row
        path.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(path, f"{before + time.monotonic() - start:.1f}")

    return note


def seconds(path: Path) -> float:
    """Reads what a `stopwatch` noted; 0 if it never did."""
    return float(path.read_text()) if path.exists() else 0.0


def can_draw() -> bool:
    """Tells whether there is matplotlib, and says so where there is none."""
    is_there = importlib.util.find_spec("matplotlib") is not None
    if not is_there:
        print("No pictures: matplotlib is not installed. They can be made from the records elsewhere.")
    return is_there
