"""Cells and tables as text."""

import dataclasses

import numpy as np
import pytest

from rdx import metrics
from rdx.evaluate import ContradictionError, report


def _summary(clean, attacked, certified, total=200, largest_class=0.1):
    def rate(count):
        flags = [True] * count + [False] * (total - count)
        return dataclasses.asdict(metrics.rate(flags))

    return {"clean": rate(clean), "attacked": rate(attacked), "certified": rate(certified),
            "largest_class": largest_class}


def test_a_cell_in_the_papers_layout():
    assert report.cell(_summary(2, 5, 11)) == "1.00 [2.50, 5.50]"
    assert report.cell(_summary(0, 0, 200)) == "0.00 [0.00, 100.00]"
    assert report.cell(_summary(0, 0, 0, total=0)) == "- [-, -]"


@pytest.mark.parametrize("counts", [(3, 2, 5), (1, 5, 4), (5, 3, 1)])
def test_disorder_is_refused(counts):
    with pytest.raises(ContradictionError, match="must rise"):
        report.cell(_summary(*counts))


def test_collapsed_runs_are_named():
    assert report.cell(_summary(2, 5, 11, largest_class=0.9)).startswith("collapsed: 1.00")
    assert not report.is_collapsed(_summary(2, 5, 11, largest_class=0.89))


def test_columns_are_aligned():
    text = report.markdown(["a", "long header"], [["1", "x"], ["wide cell", "22"]])
    assert text.split("\n") == [
        "| a         | long header |", "|-----------|-------------|", "| 1         | x           |",
        "| wide cell | 22          |",
    ]
    assert report.markdown(["a"], []) == "| a   |\n|-----|"
    with pytest.raises(ValueError, match="2 cells"):
        report.markdown(["a", "b"], [["1"]])


def test_text_is_replaced_at_once(tmp_path):
    path = tmp_path / "table.md"
    for text in ("old", "new\n"):
        report.write_text(path, text)
        assert path.read_text() == text.strip() + "\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.md"]


def test_pairs_are_counted_and_tested():
    here = np.array([True] * 12 + [False] * 8)
    there = np.array([True] * 3 + [False] * 16 + [True])
    # 9 only here, 1 only there: 2 (C(10, 0) + C(10, 1)) / 2^10.
    assert report.paired(here, there) == ["9", "1", "3", "7", "0.021"]
    assert report.paired(here, here[:4]) == ["0", "0", "4", "0", "1"]
