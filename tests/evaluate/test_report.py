"""Cells and tables as text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from rdx import attacks, metrics
from rdx.balls import Ball
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


def test_the_table_of_a_cascade_tells_what_each_attack_broke(key):
    # Class 1 where the first element exceeds 0.5; the second attack alone goes far enough for the last example.
    model = Partial(_threshold, 0.5)
    x, labels = jnp.array([[0.6, 0.0], [0.45, 0.0], [0.45, 0.0], [0.3, 0.0]]), jnp.zeros(4, jnp.int32)
    suite = {"fgsm": attacks.fgsm, "further": functools.partial(_from_afar, attack=attacks.fgsm)}
    found = attacks.cascade(key, suite, model, x, labels, ball=Ball("linf", 0.1))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.cascade_table(found).splitlines()]
    assert lines[0] == ["attack", "robust after, %", "broken", "seconds"]
    assert [line[:3] for line in lines[2:]] == [
        ["clean", "75.00", "1"], ["fgsm", "25.00", "2"], ["further", "0.00", "1"],
    ]
    assert lines[2][3] == "-"
    assert all(float(line[3]) >= 0.0 for line in lines[3:])
    traced = jax.jit(lambda x: attacks.cascade(key, suite, model, x, labels, ball=Ball("linf", 0.1)))(x)
    assert list(traced.seconds) == list(suite)
    assert np.isnan(list(traced.seconds.values())).all()
    np.testing.assert_array_equal(traced.broken_by, found.broken_by)


def _threshold(value, x):
    return jnp.stack([value - x[:, 0], x[:, 0] - value], axis=1)


def _from_afar(logits_fn, x, labels, *, ball, attack):
    return attack(logits_fn, x, labels, ball=dataclasses.replace(ball, eps=3.0 * ball.eps))
