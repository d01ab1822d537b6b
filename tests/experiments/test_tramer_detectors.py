"""The experiment on detectors from end to end: two detectors and both reductions; all detectors in the slow test."""

import json
import pathlib

import numpy as np
import pytest

from experiments import detectors_presets, detectors_zoo, tramer_detectors
from rdx.detect import reductions
from rdx.evaluate import records

# One worker makes the run that all these tests look at.
pytestmark = pytest.mark.xdist_group("tramer_detectors")

CHOSEN = ("max softmax", "odds")


def _run(directory, **changes):
    with pytest.MonkeyPatch.context() as patch:
        builders = {name: detectors_zoo._BUILDERS[name] for name in CHOSEN}
        patch.setattr(detectors_zoo, "_BUILDERS", builders)
        return tramer_detectors.main(
            tramer_detectors.Arguments(**{"preset": "smoke", "out": str(directory), **changes})
        )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("detectors") / "straight")


def test_table_and_pictures(finished):
    text = (finished / "table.md").read_text()
    for words in (*CHOSEN, "Theorem 5", "Theorem 4", "transport limit"):
        assert words in text
    assert {path.name for path in finished.glob("*.png")} == {"detection.png", "roc.png"}


def test_records_agree_with_themselves(finished):
    for name in CHOSEN:
        record, arrays = records.read_arrays(finished / "records", tramer_detectors.file_name(name))
        again = tramer_detectors.summarize(arrays, ("pgd", "fmn"))
        assert json.loads(json.dumps(again)) == record["summary"]
        adaptive = record["summary"]["adaptive"]
        assert sum(record["broken_by"].values()) <= record["summary"]["num_images"]
        assert adaptive["risk"]["value"] >= adaptive["evaded"]
        # What an attack that knows the detector evades is at least what the one that does not know it does.
        assert adaptive["evaded"] + 1e-9 >= record["summary"]["pgd"]["evaded"] - 0.1
        assert record["audits"]["fixed"]["claim"]["evidence"] == "fixed"
        assert record["audits"]["adaptive"]["accuracy"] == pytest.approx(1 - adaptive["risk"]["value"])


def test_theorems_hold_on_the_records(finished):
    record, arrays = records.read_arrays(finished / "records", "theorem-5")
    # An evasion is a failure of the classifier or a miss of the search, nothing else.
    np.testing.assert_array_equal(arrays["adaptive"], arrays["missed"] | arrays["failed"])
    record, arrays = records.read_arrays(finished / "records", "theorem-4")
    assert record["num_valid"] == record["num_explained"]
    for what in ("clean", "attacked", "search"):
        is_failure = arrays[f"{what} kind"] != reductions.NO_FAILURE
        np.testing.assert_array_equal(arrays[f"{what} wrong"], is_failure)
    # Theorem 4: each failure is one of the detector, or a miss.
    assert not (arrays["wrong"] & ~arrays["detector lost or explained"] & ~arrays["missed"]).any()


def test_a_second_run_repeats_nothing_and_ends_with_the_same_table(finished):
    before = {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}
    text = (finished / "table.md").read_text()
    _run(finished)
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}
    assert (finished / "table.md").read_text() == text


def test_another_runs_directory_is_refused(finished):
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps({**config, "eps": 9.0}))
    with pytest.raises(ValueError, match="other settings"):
        _run(finished)
    (finished / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="digits, mnist"):
        detectors_presets.config("cifar10", "cpu")
    with pytest.raises(ValueError, match="smoke or cpu"):
        detectors_presets.config("digits", "paper")


@pytest.mark.slow
def test_every_detector_runs(tmp_path):
    directory = tramer_detectors.main(tramer_detectors.Arguments(preset="smoke", out=str(tmp_path / "all")))
    text = pathlib.Path(directory / "table.md").read_text()
    assert all(name in text for name in detectors_zoo._BUILDERS)
    assert len(detectors_zoo._BUILDERS) >= 7
