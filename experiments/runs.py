"""What every experiment does with its output directory."""

import dataclasses
import json
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
