"""A5's tables from end to end on the embedded digits: records, table, pictures; and two kills on the way."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import killed_run
import numpy as np
import pytest
from PIL import Image

from experiments import a5_presets, a5_report, a5_tables, a5_training
from rdx.data import catalogue
from rdx.evaluate import ContradictionError, records, report

_ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
ROOT = pathlib.Path(__file__).parents[2]
# One worker makes the run that all these tests look at.
pytestmark = pytest.mark.xdist_group("a5_tables")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a5_tables, "config", killed_run.settings)
        return killed_run.run(tmp_path_factory.mktemp("a5") / "straight")


def _cells():
    return list(a5_report.cells(killed_run.settings("digits", "smoke")))


def _again(directory, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a5_tables, "config", killed_run.settings)
        return a5_tables.main(a5_tables.Arguments(**{"preset": "smoke", "out": str(directory), **changes}))


def test_the_table_has_every_recipe(finished):
    text = (finished / "table.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "Base classifiers", "A5/O", "A5/R", "A5/RC", "Certified error by method",
        "The same test images, certified with one recipe and another",
    ]
    rows = re.findall(r"^\| 0\.05 .*$", text, re.MULTILINE)
    assert len(rows) == len(_cells()) == 4
    assert all(re.search(r"\d\d?\.\d\d \[\d\d?\.\d\d, \d+\.\d\d\]", row) for row in rows)
    assert [len(re.findall(r" dB, 0\.\d\d ", row)) for row in rows] == [0, 1, 1, 1]
    compared = re.findall(r"^\| (?:base|A5/\w+) .*$", text, re.MULTILINE)
    assert len(compared) == 4 + 4  # by method, then A5/O, A5/R and A5/RC beside the base classifier, A5/RC beside A5/R
    assert "AutoAttack, version standard (APGD-CE, APGD-T and FAB-T with 5 steps, Square with 20 queries)" in text
    assert "on the first 32, which is all that it optimises" in text
    assert "collapsed" not in text
    assert "minutes" not in text


def test_every_record_is_complete_and_keeps_the_invariant(finished):
    attacked = 0
    for cell in _cells():
        record, result = records.read(finished / "records", cell.name)
        summary = record["summary"]
        assert summary == json.loads(json.dumps(records.summarize(result, _ATTACKS)))
        assert summary["clean"]["count"] <= summary["attacked"]["count"] <= summary["certified"]["count"]
        assert summary["clean"]["total"] == 24
        assert summary["certified_all"]["total"] == record["data"]["size"] == (32 if cell.recipe == "offline" else 48)
        assert summary["certified_all"]["value"] <= record["certified_all_by_ibp"] + 1e-9
        assert not (result.certified & result.broken).any()
        assert record["cell"]["recipe"] == cell.recipe
        assert record["config"]["classifier"]["convs"] == [[8, 3, 2]]
        assert record["config"]["base"]["epochs"] == 6
        assert len(record["data"]["fingerprint"]) == 64
        assert record["attacks"] == {name: {"num_steps": 20 if name == "square" else 5} for name in _ATTACKS}
        assert 0 < record["seconds_training"] < record["seconds_total"]
        attacked += summary["num_attacked"]
    assert attacked > 10


def test_robustified_images_lie_in_the_ball_and_help(finished):
    errors = {}
    for cell in _cells():
        record, _ = records.read(finished / "records", cell.name)
        errors[cell.recipe] = record["summary"]["certified_all"]["count"]
        with np.load(finished / "records" / f"{cell.name}-images.npz") as images:
            moved = np.abs(images["defended"].astype(np.float32) - images["original"] / np.float32(255)).max()
        # The pictures are stored in half precision.
        assert moved <= cell.eps_defense + 1e-3
        assert (moved > 0.05) == (cell.recipe != "base")
    assert errors["offline"] < errors["joint"] < errors["online"] < errors["base"]


def test_what_stands_beside_the_errors_is_measured_on_the_defended_images(finished):
    for cell in _cells():
        record, result = records.read(finished / "records", cell.name)
        rates = record["compared"]
        assert list(rates) == ["IBP", "CROWN-IBP", "alpha-CROWN"]
        assert {rate["total"] for rate in rates.values()} == {8}
        # CROWN-IBP is intersected with intervals, and the same images were certified by it already.
        assert rates["IBP"]["count"] >= rates["CROWN-IBP"]["count"] == int((~result.certified[:8]).sum())
        with np.load(finished / "records" / f"{cell.name}-images.npz") as images:
            rounded, psnr, ssim = (images[name] for name in ("certified_in_8_bits", "psnr", "ssim"))
            assert images["compared"].shape == (3, 8)
        assert rounded.shape == psnr.shape == result.certified.shape
        assert record["in_8_bits"]["count"] == int((~rounded).sum())
        if cell.recipe == "base":
            np.testing.assert_array_equal(rounded, result.certified)
            assert np.isinf(psnr).all()
        else:
            # Half a level moves next to no margin over 0; noise at the radius has 20 log10(1 / eps_D) dB.
            assert (rounded != result.certified).mean() < 0.1
            assert psnr.min() > -20 * np.log10(cell.eps_defense)
            assert 0.0 < np.median(ssim) < 0.999
            np.testing.assert_allclose(record["median_psnr"], np.median(psnr), rtol=1e-5)


def test_trained_together_a_recipe_ends_as_it_does_alone(tmp_path, monkeypatch):
    """Two budgets from two seeds, as one program or one after another; the table asks for no more training."""
    def two_budgets(dataset, preset):
        settings = killed_run.settings(dataset, preset)
        return dataclasses.replace(settings, eps_defense=(0.2, 0.3), num_train=64, num_offline=16, num_compared=2)

    parameters = []
    for together in ("1", "4"):
        arguments = {"preset": "smoke", "out": str(tmp_path / together), "together": together, "seeds": "2"}
        monkeypatch.setattr(a5_tables, "config", two_budgets)
        run = a5_tables._prepare(a5_tables.Arguments(**arguments))
        cells = [cell for cell in a5_report.cells(run.config) if cell.recipe in {"online", "offline"}]
        assert len(cells) == 8
        if together == "4":
            a5_training.train_together(run, cells, 4)
            assert not list((tmp_path / "4" / "checkpoints").glob("together-*"))
            monkeypatch.setattr(a5_training, "fit_together", None)
            a5_training.train_together(run, cells, 4)
            monkeypatch.setattr(a5_training.data.Loader, "__call__", None)
        jobs = [a5_training.online_job(run, cell) for cell in cells if cell.recipe == "online"]
        jobs += [a5_training.offline_job(run, cell) for cell in cells if cell.recipe == "offline"]
        parameters.append([a5_training.train(run, job) for job in jobs])
    for first in (0, 2, 4, 6):  # the robustifiers of each seed, then A5/O
        cells_apart = _distance(parameters[0][first], parameters[0][first + 1])
        for place in (first, first + 1):
            # RMSProp divides gradients by themselves at first, so that roundings of near-zero ones move a few numbers.
            assert _distance(parameters[0][place], parameters[1][place]) < 0.05 * cells_apart


def _distance(a, b):
    return np.sqrt(sum(np.square(x - y).sum() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))


def test_pictures(finished):
    names = {f"{cell.name}.png" for cell in _cells() if cell.recipe != "base"} | {"certified-C0.05-R0.05-A0.05.png"}
    assert {path.name for path in finished.glob("*.png")} == names
    for name in names:
        with Image.open(finished / name) as image:
            assert min(image.size) > 200


def test_a_second_call_recomputes_nothing(finished, monkeypatch):
    text = (finished / "table.md").read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()}

    def never(*args, **options):
        raise AssertionError("recomputed")

    for module, name in ((a5_training, "fit"), (a5_tables, "evaluate")):
        monkeypatch.setattr(module, name, never)
    start = time.monotonic()
    assert _again(finished) == finished
    assert time.monotonic() - start < 10.0
    assert (finished / "table.md").read_bytes() == text
    assert {path: path.stat().st_mtime_ns for path in (finished / "records").iterdir()} == stamps


def test_a_directory_of_other_settings_is_refused(finished):
    before = (finished / "config.json").read_text()
    for changes in ({"preset": "cpu"}, {"split": "validation"}):
        with pytest.raises(ValueError, match="other settings"):
            _again(finished, **changes)
    assert (finished / "config.json").read_text() == before


def test_trainings_that_do_not_fit_into_memory_together_are_halved(tmp_path, monkeypatch):
    settings = killed_run.settings("digits", "smoke")
    run = a5_training.prepare(settings, tmp_path, claimed=settings)
    sizes = []

    def too_many(losses, states, *args, **options):
        sizes.append(len(losses))
        if len(losses) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.")
        return states, [[]] * len(losses)

    monkeypatch.setattr(a5_training, "fit_together", too_many)
    monkeypatch.setattr(a5_training.shutil, "rmtree", lambda path: None)
    cells = [dataclasses.replace(_cells()[0], eps_classifier=0.01 * (i + 1)) for i in range(5)]
    a5_training.train_together(run, cells, 10)
    assert sizes == [5, 2, 3, 1, 2]
    assert len(list((tmp_path / "checkpoints").glob("classifier-*"))) == 5


@pytest.mark.parametrize("is_alike", [False, True])
def test_augmentation_draws_for_each_image_or_for_the_batch(is_alike, tmp_path):
    settings = dataclasses.replace(
        killed_run.settings("digits", "smoke"), shift=2, is_alike=is_alike, base_augmented=True, base_scale=1.5
    )
    run = a5_training.prepare(settings, tmp_path, claimed=settings)
    job = a5_training.classifier_job(run, 0.05)
    assert float(job.loss[-1].loss.args[1].eps.eps) == pytest.approx(0.075)
    x = np.broadcast_to(run.train.images[:1], (8, *run.train.images.shape[1:]))
    moved = np.asarray(job.transform(jax.random.key(3), {"x": x, "index": np.arange(8, dtype=np.int32)})["x"])
    assert not np.array_equal(moved[0], x[0] / np.float32(255))
    assert np.array_equal(moved, np.broadcast_to(moved[:1], moved.shape)) == is_alike


def test_mistakes_are_named(tmp_path):
    for changes, message in (
        ({"dataset": "imagenet"}, "use one of digits"), ({"preset": "fast"}, "smoke, cpu or paper"),
        ({"preset": "paper"}, "no digits"),
        ({"split": "all"}, "Unknown split"), ({"together": "all"}, "--together is 'all'"),
        ({"seeds": "0"}, "--seeds is '0'"),
    ):
        with pytest.raises(ValueError, match=message):
            a5_tables.main(a5_tables.Arguments(**{"out": str(tmp_path / "x"), **changes}))
    assert list(tmp_path.iterdir()) == []


def test_a_record_out_of_order_makes_no_table(finished, tmp_path):
    name = _cells()[0].name
    record, result = records.read(finished / "records", name)
    record["summary"]["attacked"]["count"] = record["summary"]["certified"]["count"] + 1
    del record["environment"]
    records.write(tmp_path / "records", name, record, result)
    with pytest.raises(ContradictionError):
        a5_report.write(tmp_path, killed_run.settings("digits", "smoke"))
    assert not (tmp_path / "table.md").exists()


def test_only_fills_the_cells_that_are_named(tmp_path, finished):
    directory = _again(tmp_path / "part", only="base")
    assert {path.name for path in (directory / "records").glob("*.json")} == {"base-C0.05-A0.05.json"}
    part, whole = ((path / "table.md").read_text() for path in (directory, finished))
    assert "## A5/O" not in part
    assert re.findall(r"^\| 0\.05 .*$", part, re.MULTILINE) == re.findall(r"^\| 0\.05 .*$", whole, re.MULTILINE)[:1]


def _live_until_killed(directory, where, **options):
    script = str(pathlib.Path(killed_run.__file__))
    cache = jax.config.jax_compilation_cache_dir
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}
    words = [f"{name}={value}" for name, value in options.items()]
    process = subprocess.run([sys.executable, script, str(directory), where, *words], cwd=ROOT, env=environment,
                             timeout=300, capture_output=True, text=True)
    assert process.returncode == -9, process.stderr[-2000:]


def test_a_run_killed_twice_ends_with_the_same_table(finished, tmp_path):
    directory = tmp_path / "killed"
    _live_until_killed(directory, killed_run.TRAINING)
    checkpoints = (directory / "checkpoints" / "classifier-0.05").iterdir()
    saved = {int(path.name) for path in checkpoints if path.name.isdigit()}
    assert saved == {100}
    assert not list(directory.glob("records/*.json"))
    _live_until_killed(directory, killed_run.EVALUATION)
    assert [path.name for path in directory.glob("records/*.json")] == ["base-C0.05-A0.05.json"]
    assert not (directory / "table.md").exists()
    _again(directory)
    assert (directory / "table.md").read_bytes() == (finished / "table.md").read_bytes()
    for cell in _cells():
        (_, straight), (_, resumed) = (records.read(path / "records", cell.name) for path in (finished, directory))
        for name in ("prediction", "certified", "broken", "attacked", "margin_lower", "adversarial_prediction"):
            np.testing.assert_array_equal(getattr(resumed, name), getattr(straight, name), err_msg=name)


def test_two_seeds_that_train_together_are_killed_twice_and_end_with_the_same_table(tmp_path):
    options = {"only": "base", "seeds": "2", "together": "2"}
    straight, directory = _again(tmp_path / "straight", **options), tmp_path / "killed"
    _live_until_killed(directory, killed_run.TOGETHER, **options)
    assert [path.name[:9] for path in (directory / "checkpoints").iterdir()] == ["together-"]
    _live_until_killed(directory, killed_run.EVALUATION, **options)
    assert [path.name for path in directory.glob("records/*.json")] == ["base-C0.05-A0.05.json"]
    _again(directory, **options)
    text = (straight / "table.md").read_text()
    assert (directory / "table.md").read_text() == text
    found = [records.read(straight / "records", f"base-C0.05{seed}-A0.05")[0] for seed in ("", "-S1")]
    assert len({record["weights"] for record in found}) == 2
    errors = [100 * record["summary"]["certified_all"]["value"] for record in found]
    assert f"{np.mean(errors):.2f} +- {abs(errors[0] - errors[1]) / np.sqrt(2):.2f} |" in text
    assert len(re.findall(r"^\| 0\.05 .*$", text, re.MULTILINE)) == 1  # the tables of the paper show the first seed


@pytest.mark.slow
def test_the_smoke_preset_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "experiments.a5_tables", "--preset", "smoke", "--out", str(tmp_path / "smoke")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    settings = a5_presets.config("digits", "smoke")
    for cell in a5_report.cells(settings):
        record, _ = records.read(tmp_path / "smoke" / "records", cell.name)
        assert report.cell(record["summary"])
    assert (tmp_path / "smoke" / "table.md").exists()


def test_cells_are_in_the_order_in_which_they_depend_on_each_other():
    for dataset in ("mnist", "cifar10"):
        settings = a5_presets.config(dataset, "paper")
        cells = list(a5_report.cells(settings))
        assert len({cell.name for cell in cells}) == len(cells)
        num_classifiers = len(settings.eps_attack) * len(settings.eps_classifier)
        num_robustify = len(settings.eps_robustify) or 1
        positive = [eps for eps in settings.eps_defense if eps > 0]
        num_defended = 2 * len(positive) + len(settings.eps_defense)  # without a budget only A5/RC trains anything
        assert len(cells) == num_classifiers * (1 + num_robustify * num_defended)
        assert [cell.recipe for cell in cells[:num_classifiers]] == ["base"] * num_classifiers
        kinds = [cell.recipe for cell in cells]
        assert kinds.index("offline") < kinds.index("online") < kinds.index("joint")


def test_the_grids_that_two_cores_fill():
    full, half = (list(a5_report.cells(a5_presets.config(name, "cpu"))) for name in ("mnist", "fashion_mnist"))
    assert len(full) == 6 + 3 * 12
    assert half == [cell for cell in full if cell.eps_attack == 0.1]
    radii = {(attack, classifier) for attack in (0.1, 0.3) for classifier in (0.1, 0.2, 0.3)}
    assert {(cell.eps_attack, cell.eps_classifier) for cell in full} == radii
    assert {cell.eps_defense for cell in full if cell.recipe != "base"} == {0.1, 0.3}


@pytest.mark.parametrize("dataset", ["tiny_imagenet32", "tiny_imagenet", "cifar10", "fashion_mnist"])
def test_networks_fit_the_images_of_every_set(dataset):
    shape, class_names = catalogue.entry(dataset)
    for preset in ("smoke", "cpu", "paper"):
        settings = a5_presets.config(dataset, preset)
        assert (settings.dataset, settings.preset) == (dataset, preset)
        x = jax.ShapeDtypeStruct((2, *shape), np.float32)
        for net, expected in ((settings.classifier, (2, len(class_names))), (settings.robustifier, (2, *shape))):
            assert jax.eval_shape(lambda x, net=net: net.init_with_output(jax.random.key(0), x)[0], x).shape == expected
