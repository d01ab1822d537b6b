"""Embedded digits, sources, and archives: no files of the user, no TFDS."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx import data
from rdx.data import archive, sources


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("RDX_DATA_DIR", raising=False)
    monkeypatch.delenv("RDX_DATA_ARCHIVE", raising=False)


def _digits(split):
    return data.load("digits", split)


def test_digits_are_the_published_images():
    train, test = _digits("train_all"), _digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 8, 8, 1)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32
    # The published images have 17 grey levels, and these counts per class.
    assert np.array_equal(np.unique(train.images), np.rint(255 / 16 * np.arange(17)))
    counts = np.bincount(train.labels) + np.bincount(test.labels)
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(test.labels).min() >= 25
    assert train.num_classes == 10
    assert train.class_names == tuple("0123456789")


def test_digits_never_change():
    assert _digits("train_all").fingerprint == "4bed4da927c1ff675da46fc16b047633f3d5d6d7a36ec219e6bafd6567625c2a"
    assert _digits("test").fingerprint == "a59898b51814d53218491488139c983f2829b2adaa0c0d0398eb64c5a4a3f7fb"


def test_splits_partition_the_training_images():
    everything, train, validation = (_digits(split) for split in ("train_all", "train", "validation"))
    assert (len(train), len(validation)) == (1365, 72)
    assert np.array_equal(np.sort(np.concatenate([train.index, validation.index])), np.arange(1437))
    assert np.array_equal(train.images, everything.images[train.index])
    assert np.array_equal(validation.labels, everything.labels[validation.index])


def test_digits_share_no_image_between_train_and_test():
    seen = {image.tobytes() for image in _digits("train_all").images}
    assert not any(image.tobytes() in seen for image in _digits("test").images)


def test_gather_subset_and_take_keep_the_index():
    source = _digits("test")
    part = source.subset([5, 300, 7]).take(2)
    assert part.index.tolist() == [5, 300]
    batch = part.gather([1, 0, 1])
    assert batch["index"].tolist() == [300, 5, 300]
    assert batch["index"].dtype == batch["labels"].dtype == np.int32
    assert np.array_equal(batch["x"], source.images[[300, 5, 300]])
    assert np.array_equal(batch["labels"], source.labels[[300, 5, 300]])
    assert len(source.take(1000)) == 360


def test_fingerprint_sees_every_label_and_pixel():
    source = _digits("test").take(3)
    labels, images = source.labels.copy(), source.images.copy()
    labels[2] += 1
    images[0, 0, 0, 0] += 1
    build = lambda x, y: data.Source(x, y, "digits", "test", source.class_names, source.index)
    prints = {source.fingerprint, build(source.images, labels).fingerprint, build(images, source.labels).fingerprint}
    assert len(prints) == 3


def test_sources_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        _digits("test").images[0] = 0


def test_to_float_divides_by_255():
    x = np.arange(256, dtype=np.uint8)
    expected = x.astype(np.float32) / np.float32(255)
    for convert in (data.to_float, jax.jit(data.to_float)):
        assert convert(x).dtype == jnp.float32
        np.testing.assert_allclose(convert(x), expected, rtol=1e-7)
        assert (convert(x)[0], convert(x)[255]) == (0, 1)


def test_archive_round_trip(tmp_path, monkeypatch):
    archive.write("digits", tmp_path / "digits.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["digits.npz"]
    for split in data.SPLITS:
        for place in (tmp_path / "digits.npz", tmp_path):
            copy = data.load("digits", split, archive=place)
            assert copy.fingerprint == _digits(split).fingerprint
            assert np.array_equal(copy.index, _digits(split).index)
    with pytest.raises(ValueError, match="holds 'digits', not 'mnist'"):
        data.load("mnist", "test", archive=tmp_path / "digits.npz")
    monkeypatch.setenv("RDX_DATA_ARCHIVE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"python -m rdx\.data\.archive mnist .*mnist\.npz"):
        data.load("mnist", "test")
    (tmp_path / "digits.npz").rename(tmp_path / "mnist.npz")
    np.savez(tmp_path / "mnist.npz", test_images=np.zeros((2, 28, 28, 1), np.uint8), test_labels=np.array([3, 4]))
    assert data.load("mnist", "test").labels.tolist() == [3, 4]


def test_archive_command_needs_no_tfds(tmp_path):
    code = (
        "import sys; sys.modules['tensorflow_datasets'] = None; import runpy; "
        f"sys.argv = ['archive', 'digits', {str(tmp_path / 'out.npz')!r}]; "
        "runpy.run_module('rdx.data.archive', run_name='__main__'); "
        f"from rdx import data; print(len(data.load('digits', 'test', archive={str(tmp_path / 'out.npz')!r})))"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "360\n"


def test_errors_name_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"use one of .*cifar10"):
        data.load("imagenet", "test")
    with pytest.raises(ValueError, match=r"use one of .*validation"):
        data.load("digits", "valid")
    with pytest.raises(ValueError, match="not both"):
        data.load("mnist", "test", root=tmp_path, archive=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"RDX_DATA_DIR.*RDX_DATA_ARCHIVE"):
        data.load("mnist", "test")


def test_validation_is_never_empty():
    for n in (1, 19, 20, 21):
        parts = [sources._part(n, split) for split in ("train", "validation")]
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
        assert len(parts[1]) == np.ceil(n / 20)
