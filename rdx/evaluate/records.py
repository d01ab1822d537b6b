"""Records: what tables and plots are made of. One JSON and one NPZ per evaluation, written atomically."""

import dataclasses
import datetime as dt
import importlib.metadata
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rdx import metrics
from rdx.evaluate.benchmark import Evaluation

_SCHEMA_VERSION = 1
_PACKAGES = ("rdx", "jax", "jaxlib", "flax", "optax", "numpy")


def summarize(result: Evaluation, attacks: tuple[str, ...] = ()) -> dict[str, Any]:
    """Counts the errors of an evaluation.

    `clean`, `attacked` and `certified` are counted on the same subset, so `clean <= attacked <= certified` holds;
    `clean_all` and `certified_all` are counted on all examples.

    Args:
        result: the evaluation.
        attacks: names of the attacks in the order in which they ran.

    Returns:
        Rates with Wilson intervals, as dictionaries; `broken_by` counts the examples that each attack broke first.
    """
    is_wrong = result.prediction != result.label
    shown = {
        "clean": metrics.rate(is_wrong, result.counted),
        "attacked": metrics.rate(result.broken, result.counted),
        "certified": metrics.rate(~result.certified, result.counted),
        "clean_all": metrics.rate(is_wrong),
        "certified_all": metrics.rate(~result.certified),
    }
    largest_class = np.unique(result.prediction, return_counts=True)[1].max() / len(result.prediction)
    return {
        **{name: dataclasses.asdict(rate) for name, rate in shown.items()},
        "num_attacked": int(result.attacked.sum()),
        "num_certified_attacked": int((result.attacked & result.certified).sum()),
        "broken_by": {name: int((result.broken_by == i).sum()) for i, name in enumerate(attacks)},
        "forwards": int(result.forwards.sum()),
        "gradients": int(result.gradients.sum()),
        "largest_class": float(largest_class),
    }


def environment() -> dict[str, Any]:
    """Describes what the numbers were computed with: versions, devices, precision, commit and time."""
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "matmul_precision": str(jax.config.jax_default_matmul_precision),  # pyright: ignore[reportAttributeAccessIssue]
        "commit": _commit(),
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def write(directory: str | os.PathLike[str], name: str, record: Mapping[str, Any], result: Evaluation) -> None:
    """Writes `name.npz` with the per-example results, then `name.json` with everything else, as `write_arrays` does.

    Args:
        directory: where to; made if absent.
        name: the record's name.
        record: configuration, data fingerprint, seed, wall time and the like; dataclasses are resolved.
        result: the evaluation.
    """
    arrays = {field: value for field, value in dataclasses.asdict(result).items() if value is not None}
    write_arrays(directory, name, {**record, "diagnosis": arrays.pop("diagnosis", None)}, arrays)


def read(directory: str | os.PathLike[str], name: str) -> tuple[dict[str, Any], Evaluation] | None:
    """Reads a record, or None where none is complete."""
    found = read_arrays(directory, name)
    return None if found is None else (found[0], Evaluation(**found[1], diagnosis=found[0].get("diagnosis")))


def write_arrays(
    directory: str | os.PathLike[str], name: str, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes `name.npz` with the arrays, then `name.json` with everything else.

    The JSON appears last and by renaming, so a record that can be read is complete. An older record of the same name
    disappears first.

    Args:
        directory: where to; made if absent.
        name: the record's name.
        record: configuration, data fingerprint, seed, wall time and the like; dataclasses are resolved.
        arrays: by name, one row per example first.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").unlink(missing_ok=True)
    with _replacing(directory / f"{name}.npz") as path, open(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType] - taken for allow_pickle
    content = {"schema_version": _SCHEMA_VERSION, "name": name, **record, "environment": environment()}
    with _replacing(directory / f"{name}.json") as path:
        Path(path).write_text(json.dumps(_plain(content), indent=2) + "\n")


def read_arrays(directory: str | os.PathLike[str], name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Reads what `write_arrays` wrote, or None where nothing is complete."""
    directory = Path(directory)
    if not (directory / f"{name}.json").exists():
        return None
    with np.load(directory / f"{name}.npz") as file:
        arrays = {field: file[field] for field in file.files}
    return json.loads((directory / f"{name}.json").read_text()), arrays


class _replacing:  # noqa: N801 - reads as a statement
    """Gives a temporary path beside `path`, and moves it there when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> str:
        handle, self.temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".", suffix=self.path.suffix)
        os.close(handle)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.chmod(self.temporary, 0o644)
            os.replace(self.temporary, self.path)
        else:
            os.unlink(self.temporary)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON knows neither NaN nor infinity
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True,
            check=True, timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()
