"""The experiment on certified detectors from end to end on the embedded digits."""

import numpy as np
import pytest

from experiments import certified_presets, certified_report, tramer_certified
from experiments.certified_report import Cell
from rdx.evaluate import ContradictionError, records

# One worker makes the run that all these tests look at.
pytestmark = pytest.mark.xdist_group("tramer_certified")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tramer_certified.main(tramer_certified.Arguments(
        preset="smoke", out=str(tmp_path_factory.mktemp("certified") / "straight")
    ))


def test_table_and_picture(finished):
    text = (finished / "table.md").read_text()
    assert "| 16/255 | 32                | 33                |" in text  # the paper's, quoted
    for words in ("1 - R_adv-det^eps: joint, 1 abstain", "Theorem 5", "| 0.04 "):
        assert words in text
    assert (finished / "certified.png").exists()


def test_nothing_certified_is_lost(finished):
    settings = certified_presets.config("digits", "smoke")
    assert len(certified_report.cells(settings)) == 3
    rates = []
    for cell in certified_report.cells(settings):
        record, arrays = records.read_arrays(finished / "records", cell.name)
        num = len(arrays["evaded"])
        rates.append(arrays["certified"].mean())
        assert num == settings.num_attacked
        assert not (arrays["certified"][:num] & arrays["evaded"]).any()
        assert not (arrays["certified"] & (arrays["prediction"] != arrays["label"])).any()
        if cell.num_abstain:
            assert not (arrays["certified"] & (arrays["score"] > 0)).any()
            held_out = record["chosen"]["held_out"]
            assert record["chosen"]["weight"] == float(min(held_out, key=held_out.get))
        else:
            # The clean risk of Theorem 5's detector is one minus the certified accuracy, up to float64's confirmation.
            assert abs(record["summary"]["detector_clean"]["value"] - np.mean(~arrays["certified"][:num])) <= 2 / num
    assert min(rates) > 0.2  # or nothing would have been tested


def test_a_broken_certificate_is_refused():
    with pytest.raises(ContradictionError, match=r"abstain-1-0\.1: 1 examples"):
        tramer_certified._refuse(np.array([False, True]), Cell(0.1, 1))


def test_a_second_run_ends_with_the_same_table(finished):
    text = (finished / "table.md").read_text()
    tramer_certified.main(tramer_certified.Arguments(preset="smoke", out=str(finished)))
    assert (finished / "table.md").read_text() == text


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="digits, mnist, cifar10"):
        certified_presets.config("svhn", "cpu")
    with pytest.raises(ValueError, match="paper for cifar10"):
        certified_presets.config("mnist", "paper")
