"""The gallery from end to end on the embedded digits with few attacks of each kind; all of them in the slow test."""

import dataclasses
import inspect
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.tree_util import Partial
from PIL import Image

from experiments import attack_gallery, gallery_attacks, gallery_presets, gallery_report
from experiments.gallery_attacks import ENTRIES, TRANSFER, WHITE, cases
from rdx import attacks
from rdx.balls import Ball
from rdx.evaluate import curves

ROOT = pathlib.Path(__file__).parents[2]
# One worker makes the run that all these tests look at.
pytestmark = pytest.mark.xdist_group("attack_gallery")
# One of each way to be run: without a key, searched for, minimal-norm, with a budget, with a prior, on a substitute.
CHOSEN = ("fgsm", "pgd", "apgd DLR", "fmn", "prgf", "square", "bim transferred")


def _settings(preset):
    settings = gallery_presets.config(preset)
    return dataclasses.replace(settings, radii=settings.radii[:1], num_queries=25, num_bisections=2, epochs=8)


def _run(directory, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attack_gallery, "config", _settings)
        patch.setattr(gallery_attacks, "ENTRIES", tuple(entry for entry in ENTRIES if entry.name in CHOSEN))
        return attack_gallery.main(attack_gallery.Arguments(**{"preset": "smoke", "out": str(directory), **changes}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run."""
    return _run(tmp_path_factory.mktemp("gallery") / "straight")


def _names(net):
    return {f"{net}-linf-{name.replace(' ', '-')}" for name in CHOSEN}


def _strength(directory, name):
    return curves.read(directory / "records", f"{name}-strength")


def test_every_public_attack_has_a_line():
    def is_attack(value):
        names = set(inspect.signature(value).parameters) if inspect.isfunction(value) else set()
        return {"logits_fn", "x", "labels", "ball"} <= names and "attacks" not in names

    public = {name for name in attacks.__all__ if is_attack(getattr(attacks, name))}
    assert {"fgsm", "pgd", "fmn", "square"} <= public
    assert {entry.attack for entry in ENTRIES} == public


def test_names_are_unique_and_presets_have_all_norms():
    for preset in ("smoke", "cpu", "paper"):
        settings = gallery_presets.config(preset)
        names = [case.name for case in cases(settings)]
        assert len(set(names)) == len(names)
        if preset != "paper":
            # Every branch runs: each line appears.
            assert {case.entry.name for case in cases(settings)} == {entry.name for entry in ENTRIES}
    with pytest.raises(ValueError, match="smoke, cpu or paper"):
        gallery_presets.config("fast")


def test_the_table_has_every_attack_and_the_worst_case(finished):
    text = (finished / "table.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Undefended", "Adversarially trained"]
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    for section, net in zip(sections, gallery_report.NETS, strict=True):
        rows = re.findall(r"^\| (.+?) +\| .* \| linf \| 0\.1 .*\| ([0-9.*]+) \[", section, re.MULTILINE)
        assert [name for name, _ in rows] == [*CHOSEN, "**worst case**"]
        robust = [float(value.strip("*")) for _, value in rows]
        assert robust[-1] <= min(robust[:-1])
        stands = np.all([np.isinf(_strength(finished, name)[1].threshold) for name in _names(net)], axis=0)
        assert robust[-1] == round(100 * stands.mean(), 1)
        (status,) = re.findall(r"^### Whether to believe it: (\w+)$", section, re.MULTILINE)
        checks = dict(re.findall(r"^\| (\w[\w ]*?) +\| (ok|warn|fail) +\| ", section, re.MULTILINE))
        assert {"gradients", "effort", "knowledge"} <= set(checks)
        assert status in checks.values()
    assert "nan" not in text
    assert "minutes" not in text


def test_records_agree_with_each_other(finished):
    for net in gallery_report.NETS:
        found = {name: _strength(finished, name) for name in _names(net)}
        correct = [curve.is_correct for _, curve in found.values()]
        assert all(np.array_equal(flags, correct[0]) for flags in correct)
        assert 10 < correct[0].sum() <= 24
        for name, (record, curve) in found.items():
            assert record["environment"]["versions"]
            assert record["data"]["size"] == len(curve.label) == 24
            assert record["config"]["num_queries"] == 25
            assert (np.isfinite(curve.threshold) >= ~curve.is_correct).all()
            spent = curve.details["forwards"] + curve.details["gradients"]
            falls = np.isfinite(curve.threshold)
            assert (curve.threshold[falls] <= spent[falls]).all(), name
        budget = found[f"{net}-linf-square"][1]
        assert (budget.details["forwards"] <= 25 + 1).all()
        # The gradient of another net is no query.
        assert (found[f"{net}-linf-prgf"][1].details["gradients"] == 0).all()
        transferred = found[f"{net}-linf-bim-transferred"][1]
        assert set(np.unique(transferred.threshold)) <= {0.0, 2.0, np.inf}


def test_only_fixed_radii_are_searched_for(finished):
    found = {path.stem for path in (finished / "records").glob("*-eps.json")}
    assert found == {f"{net}-linf-{name}-eps" for net in gallery_report.NETS for name in ("fgsm", "pgd", "apgd-DLR")}
    _, minimal = _strength(finished, "undefended-linf-fmn")
    beyond = np.isinf(minimal.threshold) & np.isfinite(minimal.details["distance"])
    assert (minimal.details["distance"][beyond] > 0.1).all()
    assert beyond.any()


def test_training_by_pgd_makes_robust(finished):
    standing = {net: _strength(finished, f"{net}-linf-pgd")[1].accuracy()[-1].count for net in gallery_report.NETS}
    assert standing["robust"] > standing["undefended"]


def test_pictures(finished):
    names = {f"{kind}-{net}-linf.png" for kind in ("eps", "strength") for net in gallery_report.NETS}
    assert {path.name for path in finished.glob("*.png")} == names
    for name in names:
        with Image.open(finished / name) as image:
            assert min(image.size) > 400


def test_a_second_call_recomputes_nothing(finished, monkeypatch):
    text = (finished / "table.md").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}

    def never(*args, **options):
        raise AssertionError("recomputed")

    monkeypatch.setattr(attack_gallery, "fit", never)
    for name in ("against_strength", "minimal_eps"):
        monkeypatch.setattr(curves, name, never)
    assert _run(finished) == finished
    assert (finished / "table.md").read_bytes() == text
    assert {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()} == stamps


def test_an_interrupted_run_ends_with_the_same_table(finished, tmp_path, monkeypatch):
    real, calls = curves.against_strength, []

    def dies(*args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(curves, "against_strength", dies)
        with pytest.raises(KeyboardInterrupt):
            _run(tmp_path / "killed")
    assert len(list((tmp_path / "killed" / "records").glob("*-strength.json"))) == 3
    assert not (tmp_path / "killed" / "table.md").exists()
    _run(tmp_path / "killed")
    assert (tmp_path / "killed" / "table.md").read_bytes() == (finished / "table.md").read_bytes()


def test_only_runs_what_is_named(finished, tmp_path):
    directory = _run(tmp_path / "part", only="undefended-linf-fgsm")
    assert {path.stem for path in (directory / "records").glob("*.json")} == {
        "undefended-linf-fgsm-strength", "undefended-linf-fgsm-eps"
    }
    text = (directory / "table.md").read_text()
    assert "Adversarially trained\n" not in text
    pattern = r"^\| fgsm .*$"
    part, whole = (re.findall(pattern, (path / "table.md").read_text(), re.MULTILINE) for path in (directory, finished))
    assert re.sub(" +", " ", part[0]) == re.sub(" +", " ", whole[0])


def test_a_directory_of_other_settings_is_refused(finished, monkeypatch):
    before = (finished / "config.json").read_text()
    with pytest.raises(ValueError, match="other settings"):
        attack_gallery.main(attack_gallery.Arguments(preset="smoke", out=str(finished)))
    assert (finished / "config.json").read_text() == before
    assert json.loads(before)["num_queries"] == 25


def test_the_papers_numbers_stand_beside_ours_on_its_data_only(finished):
    settings = dataclasses.replace(_settings("smoke"), dataset="cifar10", preset="paper")
    row = next(gallery_report._read(finished / "records", settings, "robust"))
    assert row.case.entry.name == "fgsm"
    assert gallery_report._row(row, "robust", quotes=True)[-1] == "0.039, 56.0"
    assert "paper" not in (finished / "table.md").read_text().split("Robust accuracy in percent")[0]


@pytest.mark.parametrize("is_useful", [True, False])
def test_the_guided_attack_spends_its_budget(is_useful):
    config = dataclasses.replace(gallery_presets.config("smoke"), num_queries=100, num_samples=10)
    (entry,) = (entry for entry in ENTRIES if entry.prior)
    net, other = (Partial(_affine, jax.random.normal(jax.random.key(i), (4, 3))) for i in range(2))
    x = jax.random.uniform(jax.random.key(2), (8, 4))
    attack = gallery_attacks.bind(entry, config, net if is_useful else other)
    found = attack(jax.random.key(3), net, x, net(x).argmax(axis=1), ball=Ball("linf", 0.001))
    assert not found.success.any()
    # No step is begun beyond the budget; the longest has 10 samples, 10 for the norm, the point and the prior.
    assert (found.forwards >= 100).all()
    assert (found.forwards < 100 + 22).all()


def _affine(weights, x):
    return (x - 0.5) @ weights


def test_substitutes_are_asked_for():
    for entry in ENTRIES:
        if entry.num_substitutes:
            with pytest.raises(ValueError, match=f"needs {entry.num_substitutes} substitutes, not 0"):
                gallery_attacks.bind(entry, gallery_presets.config("smoke"))
    assert {entry.kind for entry in ENTRIES if entry.num_substitutes} == {TRANSFER, "score"}
    assert {entry.kind for entry in ENTRIES} >= {WHITE, "minimal norm", "score", "suite"}


@pytest.mark.slow
def test_the_smoke_preset_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "experiments.attack_gallery", "--preset", "smoke", "--out", str(tmp_path / "s")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1800)
    settings = gallery_presets.config("smoke")
    for net in gallery_report.NETS:
        for case in cases(settings):
            record, curve = _strength(tmp_path / "s", f"{net}-{case.name}")
            assert record["seconds"] > 0
            assert len(curve.label) == 24
