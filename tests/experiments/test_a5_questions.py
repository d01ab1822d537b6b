"""The questions on A5 from end to end on the embedded digits: every table, its records, and what they are made of."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import a5_questions, a5_questions_presets, a5_training
from experiments.a5_questions_lab import Lab, defended, in_norm
from experiments.a5_questions_rows import QUESTIONS
from rdx import data, norms
from rdx.evaluate import records

# One worker makes the run that all these tests look at; that alone takes minutes to compile.
pytestmark = [pytest.mark.xdist_group("a5_questions"), pytest.mark.slow]
ASKED = ("initial_classifier", "looseness", "first_mover")


def _ask(directory, **changes):
    return a5_questions.main(a5_questions.Arguments(**{"preset": "smoke", "out": str(directory), **changes}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("a5_questions") / "straight"
    for question in ASKED:
        _ask(directory, question=question)
    return directory


@pytest.fixture(scope="module")
def lab(finished):
    """The same trainings, taken from their checkpoints."""
    settings = a5_questions_presets.config("digits", "smoke")
    return Lab(settings, a5_training.prepare(settings.base, finished, claimed=settings))


def _records(directory, lab, questions=ASKED):
    for question in questions:
        for row in QUESTIONS[question].rows(lab):
            found = records.read_arrays(directory / "records", row.name)
            assert found is not None, row.name
            yield row, *found


def _check_table(directory, lab, questions):
    """Every question that was asked has its table, and every cell its record."""
    text = (directory / "table.md").read_text()
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    asked = [QUESTIONS[name] for name in QUESTIONS if name in questions]
    assert list(sections) == [question.title for question in asked]
    for question in asked:
        rows = list(question.rows(lab))
        assert len({row.name for row in rows}) == len(rows)
        main, pairs = sections[question.title].split("### ")
        lines = re.findall(r"^\| .*", main, re.MULTILINE)
        assert len(lines) == 1 + len({row.labels for row in rows})
        found = {(row.labels, row.column): records.read_arrays(directory / "records", row.name)[1] for row in rows}
        compared = [(found[row.labels, row.column], found[row.against]) for row in rows if row.against is not None]
        shown = [here for here, there in compared if (here["certified"].any() or there["certified"].any())]
        assert len(re.findall(r"^\| .*", pairs, re.MULTILINE)) == 1 + len(shown)
        if not question.headings:
            numbers = re.findall(r"\d\d?\.\d\d \[\d+\.\d\d, \d+\.\d\d\]", "".join(lines))
            assert len(numbers) == len(rows)
    assert "minutes" not in text
    assert len(list((directory / "records").glob("*.json"))) == len(list(_records(directory, lab, questions)))


def _check_order(directory, lab, questions):
    """Errors rise from clean to attacked to certified, and something was attacked and certified."""
    num_attacked, num_certified = 0, 0
    for row, record, arrays in _records(directory, lab, questions):
        counts = [record["summary"][name]["count"] for name in ("clean", "attacked", "certified")]
        assert counts == sorted(counts), row.name
        assert not (arrays["certified"] & arrays["broken"]).any()
        assert len(arrays["label"]) == record["summary"]["certified"]["total"] == record["data"]["evaluated"]
        assert record["ball"] == {"norm": row.ball.norm, "eps": row.ball.eps}
        num_attacked += record["summary"]["num_attacked"]
        num_certified += int(arrays["certified"].sum())
    assert min(num_attacked, num_certified) > 10


def test_what_was_asked_has_a_table_and_records_in_order(finished, lab):
    _check_table(finished, lab, ASKED)
    _check_order(finished, lab, ASKED)


def test_all_questions(finished, lab):
    _ask(finished)
    _check_table(finished, lab, tuple(QUESTIONS))
    _check_order(finished, lab, tuple(QUESTIONS))


def test_pairs_count_images_that_one_case_certifies_and_the_other_does_not(finished, lab):
    found = {row.column: arrays["certified"] for row, _, arrays in _records(finished, lab) if row.labels == ("0.05",)}
    base, defended = found["none"], found["A5/RC"]
    counts = [(defended & ~base).sum(), (base & ~defended).sum(), (base & defended).sum(), (~base & ~defended).sum()]
    pattern = r"^\| 0\.05 +\| A5/RC +\| 0\.05, none +\|(.*)\|$"
    line = re.search(pattern, (finished / "table.md").read_text(), re.MULTILINE)
    assert line is not None
    assert [int(cell) for cell in line[1].split("|")[:4]] == counts
    assert counts[0] > 0


def test_complete_verification_narrows_the_true_error(finished, lab):
    for row, record, arrays in _records(finished, lab, ("looseness",)):
        least, most = record["at_least"]["count"], record["at_most"]["count"]
        loosest = min(rate["count"] for rate in record["compared"].values())
        assert record["summary"]["attacked"]["count"] <= least <= most <= loosest, row.name
        asked = arrays["verdict"] != "not asked"
        assert asked.sum() == sum(record["verified"].values()) <= lab.config.num_verified
        assert not (asked & (arrays["broken"] | arrays["compared"].any(axis=0))).any()
        attacked, uncertified = record["summary"]["attacked"]["count"], (~arrays["compared"].any(axis=0)).sum()
        assert least - attacked == record["verified"]["falsified"]
        assert uncertified - most == record["verified"]["certified"]


@pytest.mark.parametrize("recipe", ["offline", "online"])
def test_in_every_norm_images_move_within_their_ball(lab, recipe):
    x = data.to_float(lab.run.test.images)
    for norm, eps in (("linf", 0.1), ("l1", 0.5)):
        cell = lab.config.cell(recipe, eps_classifier=eps, eps=eps)
        moved = norms.norm(defended(in_norm(lab, norm), cell)[1] - x, norm)
        assert float(moved.max()) <= 1.0001 * eps
        assert float(moved.mean()) > 0.01 * eps


def test_who_moves_second_meets_the_defence_and_the_classifier_as_one(lab):
    rows = {(row.labels[0], row.column): row for row in QUESTIONS["first_mover"].rows(lab)}
    logits_fn, x_defended = rows["A5/R", "defender first"].make()
    both, x = rows["A5/R", "attacker first"].make()
    assert jnp.abs(x_defended - x).max() > 0.01
    np.testing.assert_allclose(both(x), logits_fn(x_defended), atol=1e-4)  # summed in another order


def test_a_second_call_recomputes_nothing(finished, monkeypatch):
    text = (finished / "table.md").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}

    def never(*args, **options):
        raise AssertionError("recomputed")

    monkeypatch.setattr(a5_questions, "evaluate", never)
    monkeypatch.setattr(a5_training, "fit", never)
    for question in ASKED:
        _ask(finished, question=question)
    assert (finished / "table.md").read_bytes() == text
    assert {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()} == stamps


def test_mistakes_are_named(tmp_path, finished):
    for changes, message in (
        ({"question": "why"}, "ask one of transfer"), ({"dataset": "cifar10"}, "use one of digits, mnist"),
        ({"preset": "fast"}, "smoke, cpu or paper"),
    ):
        with pytest.raises(ValueError, match=message):
            _ask(tmp_path / "x", **changes)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="other settings"):
        _ask(finished, preset="cpu")
