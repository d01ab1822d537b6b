"""Records: complete or absent, and their summary against counting by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rdx import metrics
from rdx.evaluate import Evaluation, records

RATES = ("clean", "attacked", "certified", "clean_all", "certified_all")


@dataclasses.dataclass(frozen=True)
class _Settings:
    eps: float = 0.1
    layers: tuple[int, ...] = (4, 3)
    missing: float = float("nan")


def _result(num=8, **changes):
    """Six of eight are counted: one wrong, two broken, three that stand, of which two are certified."""
    label = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    fields = {
        "index": np.arange(8, dtype=np.int32), "label": label,
        "prediction": np.array([1, 1, 2, 0, 1, 2, 2, 1]),
        "certified": np.array([0, 0, 0, 0, 1, 1, 0, 1], bool),
        "margin_lower": np.linspace(-1.0, 1.0, 8, dtype=np.float32),
        "attacked": np.array([0, 1, 1, 1, 1, 0, 0, 0], bool),
        "broken": np.array([1, 1, 1, 0, 0, 0, 1, 0], bool),
        "adversarial_prediction": np.array([1, 0, 0, 0, 1, 2, 2, 1]),
        "distance": np.full(8, 0.1, np.float32), "forwards": np.array([0, 5, 5, 9, 9, 0, 0, 0]),
        "gradients": np.array([0, 4, 8, 8, 8, 0, 0, 0]), "counted": np.arange(8) < 6,
        "broken_by": np.array([-1, 0, 1, -1, -1, -1, -1, -1]),
        "certified_by": np.array([-1, -1, -1, -1, 0, 1, -1, 0]),
    }
    return Evaluation(**{name: np.asarray(value)[:num] for name, value in (fields | changes).items()})


def _record(**extra):
    return {"config": _Settings(), "seed": 3, "data": {"fingerprint": "abc"}, "seconds_total": 1.5, **extra}


def test_summary_counts_by_hand():
    summary = records.summarize(_result(), ("pgd", "apgd"))
    counts = {name: (summary[name]["count"], summary[name]["total"]) for name in RATES}
    assert counts == {
        "clean": (1, 6), "attacked": (3, 6), "certified": (4, 6), "clean_all": (2, 8), "certified_all": (5, 8),
    }
    for name in RATES:
        assert summary[name]["value"] == counts[name][0] / counts[name][1]
        assert (summary[name]["low"], summary[name]["high"]) == metrics.wilson(*counts[name])
    assert summary["broken_by"] == {"pgd": 1, "apgd": 1}
    assert (summary["num_attacked"], summary["num_certified_attacked"]) == (4, 1)
    assert (summary["forwards"], summary["gradients"]) == (28, 28)
    assert summary["largest_class"] == 0.5


def test_summary_of_nan_predictions_and_of_nothing_counted():
    summary = records.summarize(_result(prediction=np.full(8, -1), counted=np.zeros(8, bool)))
    assert summary["largest_class"] == 1.0
    assert summary["clean_all"]["value"] == 1.0
    assert np.isnan(summary["clean"]["value"])
    assert (summary["clean"]["low"], summary["clean"]["high"]) == (0.0, 1.0)


def test_what_is_written_is_read(tmp_path):
    result = _result()
    records.write(tmp_path / "new" / "folder", "cell", _record(summary=records.summarize(result)), result)
    record, again = records.read(tmp_path / "new" / "folder", "cell")
    assert again.diagnosis is None
    for field in dataclasses.fields(Evaluation)[:-1]:  # without the diagnosis
        written, found = getattr(result, field.name), getattr(again, field.name)
        np.testing.assert_array_equal(found, written)
        assert found.dtype == written.dtype
    assert record["name"] == "cell"
    assert record["config"] == {"eps": 0.1, "layers": [4, 3], "missing": "nan"}
    assert (record["seed"], record["data"], record["seconds_total"]) == (3, {"fingerprint": "abc"}, 1.5)
    assert record["summary"]["attacked"]["count"] == 3
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"cell.json", "cell.npz"}


def test_a_record_from_before_methods_were_told_apart_is_read(tmp_path):
    records.write(tmp_path, "cell", _record(), dataclasses.replace(_result(), certified_by=None))
    _, again = records.read(tmp_path, "cell")
    assert again.certified_by is None
    np.testing.assert_array_equal(again.certified, _result().certified)


def test_the_environment_is_recorded(tmp_path):
    records.write(tmp_path, "cell", _record(), _result())
    environment = json.loads((tmp_path / "cell.json").read_text())["environment"]
    assert environment["versions"]["jax"] == jax.__version__
    assert {"rdx", "jaxlib", "flax", "optax", "numpy"} <= set(environment["versions"])
    assert environment["backend"] == "cpu"
    assert environment["num_devices"] == jax.device_count()
    assert environment["device"]
    assert environment["commit"]
    assert environment["time"].endswith("+00:00")


@pytest.mark.parametrize("is_there_before", [False, True])
def test_killed_between_the_two_files_nothing_is_read(is_there_before, tmp_path, monkeypatch):
    if is_there_before:
        records.write(tmp_path, "cell", _record(seed=1), _result(5))

    def die(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records.json, "dumps", die)
        with pytest.raises(KeyboardInterrupt):
            records.write(tmp_path, "cell", _record(seed=2), _result())
    # An old JSON beside the new NPZ would be a record that never was.
    assert (tmp_path / "cell.npz").exists()
    assert records.read(tmp_path, "cell") is None
    assert {path.name for path in tmp_path.iterdir()} == {"cell.npz"}
    records.write(tmp_path, "cell", _record(seed=2), _result())
    record, result = records.read(tmp_path, "cell")
    assert record["seed"] == 2
    assert len(result.label) == 8


def test_killed_while_the_arrays_are_written_nothing_remains(tmp_path, monkeypatch):
    def die(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records.np, "savez_compressed", die)
        with pytest.raises(KeyboardInterrupt):
            records.write(tmp_path, "cell", _record(), _result())
    assert list(tmp_path.iterdir()) == []
    assert records.read(tmp_path, "cell") is None


def test_values_that_json_does_not_know(tmp_path):
    values = {
        "infinite": float("-inf"), "array": np.array([1.0, np.nan]), "jax": jax.numpy.arange(2),
        "scalar": np.float32(0.5), "flag": np.bool_(True), "nested": [(_Settings(eps=0.2),)], 3: {"key": None},
    }
    records.write(tmp_path, "cell", _record(values=values), _result())
    text = (tmp_path / "cell.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["values"]
    assert found == {
        "infinite": "-inf", "array": [1.0, "nan"], "jax": [0, 1], "scalar": 0.5, "flag": True,
        "nested": [[{"eps": 0.2, "layers": [4, 3], "missing": "nan"}]], "3": {"key": None},
    }
