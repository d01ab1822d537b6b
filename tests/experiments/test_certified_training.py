"""The comparison of certified training from end to end on the embedded digits."""

import jax
import jax.numpy as jnp
import pytest

from experiments import certified_training, certified_training_presets, certified_training_report
from experiments import certified_training_methods as methods
from rdx.data import catalogue
from rdx.evaluate import ContradictionError, records

# One worker makes the run that all these tests look at.
pytestmark = pytest.mark.xdist_group("certified_training")
SETTINGS = certified_training_presets.config("digits", "smoke")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return certified_training.main(certified_training.Arguments(
        preset="smoke", out=str(tmp_path_factory.mktemp("certified_training") / "straight")
    ))


@pytest.mark.slow
def test_every_method_has_a_row_and_a_reference(finished):
    text = (finished / "table.md").read_text()
    for method in SETTINGS.methods:
        # In the table, in the references, and beside IBP.
        assert text.count(f"| {method.name} ") == (2 if method.kind == "ibp" else 3)
    assert "98.93 / 97.95" in text  # a paper's, quoted


@pytest.mark.slow
def test_errors_rise_from_clean_to_attacked_to_certified(finished):
    certified = {}
    for method in SETTINGS.methods:
        record, result = records.read(finished / "records", certified_training_report.slug(method))
        counts = [record["summary"][name]["count"] for name in ("clean", "attacked", "certified")]
        assert counts == sorted(counts)
        verifiers = ("ibp",) if method.kind == "linf_distance" else ("ibp", "crown_ibp", "crown")
        assert tuple(record["certified_by"]) == verifiers
        assert sum(record["certified_by"].values()) == pytest.approx(result.certified.mean())
        certified[method.kind] = result.certified.mean()
    assert max(certified.values()) > 0.5  # or nothing would have been tested


@pytest.mark.slow
def test_a_second_run_ends_with_the_same_table(finished):
    text = (finished / "table.md").read_text()
    certified_training.main(certified_training.Arguments(preset="smoke", out=str(finished)))
    assert (finished / "table.md").read_text() == text


@pytest.mark.slow
def test_tuning_looks_at_held_out_images_only(tmp_path):
    directory = certified_training.main(certified_training.Arguments(
        preset="smoke", out=str(tmp_path / "tune"), tune="1", only="MTL"
    ))
    (method,) = [method for method in SETTINGS.methods if method.kind == "mtl_ibp"]
    for weight in method.candidates:
        record, result = records.read(directory / "records", certified_training_report.slug(method, weight))
        assert record["evaluated"] == "held out"
        assert len(result.label) == SETTINGS.num_held_out
    assert (directory / "table.md").read_text().count("| MTL-IBP") == len(method.candidates)


def test_contradictions_are_refused():
    rate = {"count": 2, "total": 10, "value": 0.2}
    good = dict.fromkeys(("clean", "attacked", "certified", "clean_all", "certified_all"), rate)
    assert certified_training_report.line(good) == "natural 80.00, certified 80.00 of 10"
    with pytest.raises(ContradictionError, match="must rise"):
        certified_training_report.line({**good, "attacked": {**rate, "count": 3}})


@pytest.mark.parametrize("dataset", ["mnist", "mnist-0.3", "cifar10"])
def test_networks_fit_the_images_of_every_set(dataset):
    for preset in ("smoke", "cpu", "paper"):
        settings = certified_training_presets.config(dataset, preset)
        assert settings.dataset == dataset.split("-")[0]
        shape = catalogue.entry(settings.dataset)[0]
        x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        kinds = {method.kind for method in settings.methods}
        assert kinds == set(certified_training_report.REFERENCES)
        for method in settings.methods:
            net = methods.network(settings, method).model
            assert jax.eval_shape(lambda x, net=net: net.init_with_output(jax.random.key(0), x)[0], x).shape == (2, 10)
            radius = method.radius * settings.eps
            assert settings.eps <= radius < 0.5


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="digits, mnist"):
        certified_training_presets.config("svhn", "cpu")
    with pytest.raises(ValueError, match="paper for all but digits"):
        certified_training_presets.config("digits", "paper")
