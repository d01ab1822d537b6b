"""Pictures are PNGs of a sensible size that show what they are given; matplotlib stays out until one is drawn."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rdx import plotting


def _open(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"), np.float32) / 255


@pytest.mark.parametrize(("channels", "num"), [(1, 5), (3, 1)])
def test_triplets(channels, num, tmp_path):
    path = tmp_path / "triplets.png"
    originals = np.random.default_rng(0).random((num, 6, 6, channels))
    defended = np.clip(originals + 0.1, 0.0, 1.0)
    plotting.triplets(path, originals, defended, titles=["a"] * num, eps=0.1, heading="heading", num_columns=2)
    pixels = _open(path)
    rows = -(-num // 2)
    assert 0.6 * 150 * rows < pixels.shape[0] < 2.0 * 150 * rows
    assert 600 < pixels.shape[1] < 1000
    assert pixels.std() > 0.1
    assert [entry.name for entry in tmp_path.iterdir()] == ["triplets.png"]


def test_a_perturbation_of_zero_is_grey_and_of_eps_is_white(tmp_path):
    originals = np.zeros((1, 4, 4, 1))
    shades = []
    for delta in (0.0, 0.2):
        plotting.triplets(tmp_path / "t.png", originals, originals + delta, titles=[""], eps=0.2, heading="",
                          num_columns=1)
        pixels = _open(tmp_path / "t.png")
        height, width, _ = pixels.shape
        shades.append(float(pixels[height // 2 + 10, int(width * 0.83)].mean()))
    np.testing.assert_allclose(shades, [0.5, 1.0], atol=0.02)


def test_every_example_needs_a_title_and_a_partner(tmp_path):
    images = np.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match="shorter"):
        plotting.triplets(tmp_path / "t.png", images, images[:1], titles=["a", "b"], eps=0.1, heading="")
    with pytest.raises(IndexError):
        plotting.triplets(tmp_path / "t.png", images, images, titles=["a"], eps=0.1, heading="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("num", "columns"), [(62, 31), (5, 8)])
def test_strips_show_every_row_of_every_block(num, columns, tmp_path):
    shades = np.linspace(0.2, 0.8, num)[:, None, None, None] * np.ones((1, 10, 10, 1))
    rows = {"dark": 0.5 * shades, "colour": np.concatenate([shades, 0 * shades, 0 * shades], axis=-1)}
    plotting.strips(tmp_path / "s.png", rows, heading="heading", num_columns=columns)
    pixels = _open(tmp_path / "s.png")
    assert pixels.shape[1] == 1500
    is_red = (pixels[..., 0] > 0.15) & (pixels[..., 1] < 0.05)
    # As many bands of red as there are blocks.
    bands = np.flatnonzero(np.diff(is_red.any(axis=1).astype(int)) == 1)
    assert len(bands) == -(-num // columns)
    brightest = pixels[..., 0][is_red].max()
    np.testing.assert_allclose(brightest, 0.8, atol=0.02)


def test_strips_of_unequal_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="equal ones"):
        plotting.strips(tmp_path / "s.png", {"a": np.zeros((2, 4, 4, 1)), "b": np.zeros((3, 4, 4, 1))}, heading="")
    assert list(tmp_path.iterdir()) == []


def test_curves(tmp_path):
    series = {f"series {i}": ([0.1, 0.2, 0.3], [30.0, 20.0, 10.0 + i]) for i in range(8)}
    intervals = {"series 0": ([25.0, 15.0, 5.0], [35.0, 25.0, 15.0])}
    sizes = []
    for name, options in {"plain": {}, "full": {"intervals": intervals, "baseline": ("base", 40.0)}}.items():
        plotting.curves(tmp_path / f"{name}.png", series, x_label="x", y_label="y", heading="heading", **options)
        pixels = _open(tmp_path / f"{name}.png")
        assert pixels.shape == (540, 840, 3)
        sizes.append((pixels < 0.5).any(axis=2).sum())
    assert sizes[1] > sizes[0] > 1000
    plotting.curves(tmp_path / "baseline.png", {}, x_label="x", y_label="y", heading="", baseline=("base", 40.0))


@pytest.mark.parametrize("draw", [plotting.accuracy_against_eps, plotting.accuracy_against_strength])
def test_accuracy_of_many_attacks(draw, tmp_path):
    xs = np.geomspace(1, 100, 20)
    series = {f"attack {i}": (xs, np.linspace(90, 4.0 * i, 20)) for i in range(20)}
    options = {"x_label": "x", "heading": "heading"}
    inked = []
    for name, more in {
        "plain": {}, "groups": {"groups": {name: f"kind {i % 4}" for i, name in enumerate(series)}},
        "worst": {"worst": (xs, np.zeros(20))},
    }.items():
        draw(tmp_path / f"{name}.png", series, **options, **more)
        pixels = _open(tmp_path / f"{name}.png")
        assert pixels.shape[1] == 1260
        # The legend of twenty has its place beside the curves, and fits.
        assert (pixels[:, 1000:] < 0.5).any(axis=2).any(axis=1).mean() > 0.2
        assert (pixels[-8:] > 0.9).all()
        inked.append((pixels < 0.5).any(axis=2).sum())
    # Dashes of the kinds take less ink, the black line more.
    assert inked[1] < inked[0] < inked[2]
    draw(tmp_path / "none.png", {}, **options)


def test_pictures_leave_the_users_matplotlib_alone(tmp_path):
    code = (
        "import sys, matplotlib; before = matplotlib.get_backend(auto_select=False);"
        "from rdx import plotting;"
        f"plotting.curves({str(tmp_path / 'c.png')!r}, {{'a': ([0, 1], [1, 2])}}, x_label='', y_label='', heading='');"
        "assert matplotlib.get_backend(auto_select=False) == before; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_pure_rooms_import_no_framework():
    code = (
        "import sys; import rdx, rdx.attacks, rdx.bounds, rdx.robustify, rdx.goals, rdx.metrics, rdx.plotting;"
        "loaded = {'matplotlib', 'flax', 'orbax', 'tensorflow_datasets', 'grain', 'tensorflow', 'torch'}"
        "& {name.split('.')[0] for name in sys.modules}; assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
