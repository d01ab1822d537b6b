"""Table 9 of A5 from end to end: records, table, pictures."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import a5_glyphs, a5_glyphs_presets, a5_glyphs_report
from rdx.evaluate import records

# One worker makes the run that all these tests look at.
pytestmark = pytest.mark.xdist_group("a5_glyphs")

RECIPES = tuple(a5_glyphs_report.RECIPES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("glyphs") / "straight"
    return a5_glyphs.main(a5_glyphs.Arguments(preset="smoke", out=str(directory)))


@pytest.mark.slow
def test_the_table_has_every_row_with_the_papers_numbers(finished):
    text = (finished / "table.md").read_text()
    rows = re.findall(r"^\| (.*?) +\| +\d.*\[.*$", text, re.MULTILINE)
    assert rows == list(a5_glyphs_report.RECIPES.values())
    for quoted in ("0.89 [100.00]", "3.85 [13.85]", "3.08 [11.84]", "0.73 [4.20]"):
        assert quoted in text
    assert "minutes" not in text
    assert {path.name for path in finished.glob("*.png")} == {"p.png", "pc.png", "prc.png"}
    for name in ("p", "pc", "prc"):
        with Image.open(finished / f"{name}.png") as image:
            assert min(image.size) > 200


@pytest.mark.slow
def test_every_record_is_complete_and_keeps_the_invariant(finished):
    attacked = 0
    for recipe in RECIPES:
        record, result = records.read(finished / "records", recipe)
        summary = record["summary"]
        assert summary == json.loads(json.dumps(records.summarize(result, ("apgd-ce", "apgd-t", "fab-t", "square"))))
        assert summary["clean"]["count"] <= summary["attacked"]["count"] <= summary["certified"]["count"]
        assert (summary["clean"]["total"], summary["certified_all"]["total"]) == (62, 124)
        assert summary["certified_all"]["value"] <= record["certified_all_by_ibp"] + 1e-9
        np.testing.assert_array_equal(result.label, np.arange(124) % 62)
        attacked += summary["num_attacked"]
    assert attacked > 60


@pytest.mark.slow
def test_prototypes_lie_in_their_ball_and_help(finished):
    errors, eps = {}, a5_glyphs_presets.config("smoke", "test").eps_defense
    for recipe in RECIPES:
        record, _ = records.read(finished / "records", recipe)
        errors[recipe] = record["summary"]["certified_all"]["count"]
        with np.load(finished / "records" / f"{recipe}-images.npz") as images:
            moved = np.abs(images["defended"].astype(np.float32) - images["original"] / np.float32(255)).max()
        assert moved <= eps + 1e-3  # stored in half precision
        assert (moved > 0.05) == (recipe in {"p", "pc", "prc"})
    assert errors["pc"] < errors["p"] < errors["base"] < errors["vanilla"]


def test_validation_has_other_pictures_and_every_row_the_same_draws(tmp_path):
    run = a5_glyphs._prepare(a5_glyphs.Arguments(preset="smoke", out=str(tmp_path)))
    params = a5_glyphs._with_plain_prototypes(run, {})
    validation = dataclasses.replace(run, config=a5_glyphs_presets.config("smoke", "validation"))
    test, others = (np.asarray(a5_glyphs._pictures(which, params)) for which in (run, validation))
    assert len({picture.tobytes() for picture in (*test, *others)}) == len(test) + len(others)
    # Prototypes of another row, moved by little, are seen in the same poses.
    nearly = {**params, "z": jnp.full_like(params["z"], 1e-3)}
    np.testing.assert_allclose(a5_glyphs._pictures(run, nearly), test, atol=1e-3)


@pytest.mark.slow
def test_a_second_call_recomputes_nothing(finished, monkeypatch):
    text = (finished / "table.md").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}

    def never(*args, **options):
        raise AssertionError("recomputed")

    for name in ("fit", "evaluate"):
        monkeypatch.setattr(a5_glyphs, name, never)
    a5_glyphs.main(a5_glyphs.Arguments(preset="smoke", out=str(finished)))
    assert (finished / "table.md").read_bytes() == text
    assert {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()} == stamps


@pytest.mark.slow
def test_a_lost_record_is_made_again_from_its_checkpoints(finished, monkeypatch):
    text = (finished / "table.md").read_bytes()
    seconds = [records.read(finished / "records", recipe)[0]["seconds_training"] for recipe in RECIPES]
    assert min(seconds) > 0
    (finished / "records" / "p.json").unlink()
    steps = []
    fit = a5_glyphs.fit

    def counting(*args, **options):
        state, history = fit(*args, **options)
        steps.append(len(history))
        return state, history

    monkeypatch.setattr(a5_glyphs, "fit", counting)
    a5_glyphs.main(a5_glyphs.Arguments(preset="smoke", out=str(finished), only="p"))
    assert steps == [0, 0]
    assert (finished / "table.md").read_bytes() == text
    # A resumed run still knows what training took.
    assert [records.read(finished / "records", recipe)[0]["seconds_training"] for recipe in RECIPES] == seconds


@pytest.mark.slow
def test_a_directory_of_other_settings_is_refused(finished):
    for changes in ({"preset": "cpu"}, {"split": "validation"}):
        with pytest.raises(ValueError, match="other settings"):
            a5_glyphs.main(a5_glyphs.Arguments(**{"preset": "smoke", "out": str(finished), **changes}))


def test_mistakes_are_named(tmp_path):
    for changes, message in (
        ({"preset": "fast"}, "smoke, cpu or paper"), ({"split": "train"}, "test or validation"),
        ({"only": "o"}, "vanilla, base, p, control, pc, prc"),
    ):
        with pytest.raises(ValueError, match=message):
            a5_glyphs.main(a5_glyphs.Arguments(**{"out": str(tmp_path / "x"), **changes}))
    assert list(tmp_path.iterdir()) == []


def test_the_papers_preset_is_the_released_camera_and_network():
    settings = a5_glyphs_presets.config("paper", "test")
    assert settings.size == 128
    assert settings.camera == a5_glyphs_presets.Camera()
    assert (settings.eps_attack, settings.base.epochs, settings.base.learning_rate) == (0.1, 100, 1e-3)
