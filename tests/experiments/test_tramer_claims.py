"""The tables of Tramer (2022) from end to end, and the auditor's command line."""

import json
import subprocess
import sys

import pytest

from experiments import audit, tramer_claims
from rdx.detect import claims


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tramer_claims.main(tramer_claims.Arguments("smoke", str(tmp_path_factory.mktemp("claims"))))


def test_the_table_has_what_the_paper_has(output):
    text = (output / "table.md").read_text()
    for part in ("Verdicts as printed: 16 of 16", "12 of 14 defences", "same claim: yes", "Ma & Liu (2019), imagenet"):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert sum(" red " in row for row in rows) == 14
    assert any("Raghuram" in row and " 56 " in row and " 80 " in row for row in rows)
    assert any("Raghuram" in row and " 74 " in row and "inferred" in row for row in rows)
    assert "| digits" in text


def test_the_record_is_complete(output):
    record = json.loads((output / "record.json").read_text())
    assert len(record["audits"]["2021"]) == len(record["audits"]["2025"]) == len(record["provenance"]) == 16
    assert {bound["num_examples"] for bound in record["bounds"]} == {100}
    assert len(list(output.glob("*.png"))) == 6


def test_unknown_presets_are_refused():
    with pytest.raises(SystemExit, match="smoke, cpu, paper"):
        tramer_claims.main(tramer_claims.Arguments("fast"))


def test_the_auditor_prints_json_and_draws(tmp_path, capsys):
    found = audit.main(audit.Arguments(
        norm="l2", eps="4", fpr="0.2", fnr="0.19", clean_error="0.05", evidence="adaptive", num_images="10000",
        as_of="2021", picture=str(tmp_path / "claim.png"),
    ))
    printed = capsys.readouterr().out
    content, _ = json.JSONDecoder().raw_decode(printed)
    assert content["verdict"] == found.verdict == "implies-breakthrough"
    assert content["accuracy"] == pytest.approx(0.56)
    assert content["exit_code"] == 10
    assert found.sentence in printed
    assert (tmp_path / "claim.png").stat().st_size > 10_000


def test_the_auditor_asks_the_data(capsys):
    arguments = audit.Arguments(dataset="digits", eps="1", accuracy="0.99", data="digits", num_data="100")
    found = audit.main(arguments)
    assert found.is_impossible
    assert found.exit_code == claims.IMPOSSIBLE
    printed = json.loads(capsys.readouterr().out)
    assert "no classifier exceeds" in printed["sentence"]
    assert printed["reference"] == {"accuracy": None, "is_interpolated": False, "low": 0.0, "high": 1.0, "sources": []}


@pytest.mark.parametrize(("words", "code", "text"), [
    (["--eps", "8/255", "--accuracy", "0.5"], 0, "consistent"),
    (["--eps", "eight", "--accuracy", "0.5"], 1, "write 8/255"),
])
def test_the_command_line_ends_with_its_code(words, code, text):
    run = subprocess.run(
        [sys.executable, "-m", "experiments.audit", *words], capture_output=True, text=True, check=False
    )
    assert run.returncode == code
    assert text in run.stdout + run.stderr
