"""The tables of `experiments.a5_questions`, made from its records."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import autoattack, runs
from experiments.a5_questions_lab import Lab, Row
from experiments.a5_questions_presets import Config
from experiments.a5_questions_rows import QUESTIONS, Question
from experiments.a5_report import describe
from rdx.evaluate import records, report


def write(lab: Lab) -> Path:
    """Writes `table.md` from the records that exist; returns the directory."""
    directory, found, sections = lab.run.directory, [], []
    for question in QUESTIONS.values():
        done = {}
        for row in question.rows(lab):
            record = records.read_arrays(directory / "records", row.name)
            if record is not None:
                done[row] = record
        if done:
            records_of = {row: record for row, (record, _) in done.items()}
            parts = [f"## {question.title}", question.note(lab.config), report.markdown(*_table(question, records_of))]
            sections += [*parts, *_pairs(question, {row: arrays["certified"] for row, (_, arrays) in done.items()})]
            found += records_of.values()
    runs.publish(directory, "\n\n".join([_heading(lab.config, found), *sections]), found)
    return directory


def _table(question: Question, done: Mapping[Row, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Lays out a question's records: those of the same labels stand in a row."""
    columns = list(dict.fromkeys(row.column for row in done))
    cells = {(row.labels, row.column): question.show(record) for row, record in done.items()}
    rows = []
    for labels in dict.fromkeys(row.labels for row in done):
        shown = [cells.get((labels, column), ("-",)) for column in columns]
        rows.append([*labels, *(text for texts in shown for text in texts)])
    return [*question.labels, *(question.headings or columns)], rows


def _pairs(question: Question, certified: Mapping[Row, np.ndarray]) -> Iterator[str]:
    """Compares rows, image by image, with those that they name, where both are done and either certifies anything."""
    places = {(row.labels, row.column): row for row in certified}
    column = ["case"] if any(row.column for row in certified) else []
    header, rows = [*question.labels, *column, "compared with", *report.PAIRED], []
    for row, here in certified.items():
        if row.against in places and (here.any() or certified[places[row.against]].any()):
            there = places[row.against]
            name = ", ".join(word for word in (*there.labels, there.column) if word not in {"", "-"})
            case = [row.column] if column else []
            rows.append([*row.labels, *case, name, *report.paired(here, certified[there])])
    if rows:
        yield f"### The same images, certified in one case and another\n\n{report.markdown(header, rows)}"


def _heading(config: Config, found: list[Mapping[str, Any]]) -> str:
    base = config.base
    data = found[0]["data"] if found else None
    sizes = (
        f"{data['train_size']} training and {data['size']} test images; seed {base.seed}, one run. " if data else ""
    )
    return (
        f"# Questions that A5 leaves open, on {config.dataset}, preset `{config.preset}`\n\n"
        f"{sizes}Errors in percent: clean [attacked, certified], all three counted on the same images. Certified by "
        f"CROWN-IBP and IBP together, where nothing else is said, and confirmed in float64. Attacked: "
        f"{autoattack.described(base.attack_steps, base.attack_queries)}, on every correct image that is not "
        f"certified; {base.cross_check} certified images a cell are attacked as well, and none was broken, or there "
        f"would be no table. The attacker sees the "
        f"defended image and the classifier. Classifier: {describe(base.classifier)}; another architecture: "
        f"{describe(config.other)}. Robustifier: {describe(base.robustifier)}."
    )
