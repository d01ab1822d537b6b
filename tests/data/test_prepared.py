"""Preparation through the TFDS builders, from small files of the published formats."""

import gzip
import io
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rdx import data
from rdx.data import builders, prepared, raw

REAL = os.environ.get("RDX_DATA_DIR", "")
needs_real = pytest.mark.skipif(not REAL, reason="set RDX_DATA_DIR to the directory of the published files")

# sha256 of images and labels of the published files, which were checked against their published md5s.
REAL_PRINTS = {
    ("mnist", "train_all"): "6a364e333ea1f8ab86e4d641d64a8cf8d8644433f54b0a78e32c2b9e143672d0",
    ("mnist", "test"): "45a60edfded3b2bb860a7fd195c83431011e7f04318268b4f2de30030af9444e",
    ("fashion_mnist", "train_all"): "c7d8cfe8172756709eda8bbe8b201cb44f70785b4cd9974a82408b36cc1f72e4",
    ("fashion_mnist", "test"): "2589de149ea70a51076dfb7116c581fbd9b4c7b39b8e9c9f19ec089d65d659b8",
    ("cifar10", "train_all"): "72c15e60c081b70e34054cb162580e0d24094d4efdce45b6c8c1fe5acc39221e",
    ("cifar10", "test"): "8353b1fbf11acba6dc8b5e9d2fb108294de95b6e979d31428bf914289e4189c5",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("RDX_DATA_DIR", raising=False)
    monkeypatch.delenv("RDX_DATA_ARCHIVE", raising=False)
    monkeypatch.setenv("RDX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def _write_idx(directory, rng, *, zipped=True, train=40, test=7):
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for split, prefix, n in (("train", "train", train), ("test", "t10k", test)):
        x, y = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", x), (f"{prefix}-labels-idx1-ubyte", y)):
            if zipped:
                (directory / f"{name}.gz").write_bytes(gzip.compress(_idx_bytes(array)))
            else:
                (directory / name).write_bytes(_idx_bytes(array))
        arrays[split] = (x[..., None], y)
    return arrays


def _cifar(rng, n=4):
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {name: (rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)) for name in names}


def _write_pickles(directory, batches):
    directory.mkdir(parents=True)
    for name, (x, y) in batches.items():
        rows = np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(len(x), -1)
        content = {b"data": rows, b"labels": y.tolist(), b"batch_label": b"batch", b"filenames": []}
        (directory / name).write_bytes(pickle.dumps(content, protocol=2))


def _write_grids(directory, batches):
    directory.mkdir(parents=True)
    for name, (x, _) in batches.items():
        grid = np.concatenate([np.concatenate(list(row), axis=1) for row in x.reshape(2, -1, 32, 32, 3)])
        Image.fromarray(grid).save(directory / f"{name}.webp", lossless=True, exact=True)
    np.savez(directory / "labels.npz", **{name: y for name, (_, y) in batches.items()})


def _write_tar(directory, batches, scratch):
    _write_pickles(scratch / "cifar-10-batches-py", batches)
    directory.mkdir(parents=True)
    with tarfile.open(directory / "cifar-10-python.tar.gz", "w:gz") as file:
        file.add(scratch / "cifar-10-batches-py", "cifar-10-batches-py")


def _joined(batches, split):
    names = [name for name in batches if name.startswith("data") == (split == "train")]
    return tuple(np.concatenate([batches[name][part] for name in names]) for part in (0, 1))


def _same(arrays, expected):
    assert np.array_equal(arrays[0], expected[0])
    assert np.array_equal(arrays[1], expected[1])
    assert arrays[0].dtype == np.uint8
    assert arrays[1].dtype == np.int32


def test_mnist_end_to_end_in_file_order_then_from_the_cache(tmp_path, cache, monkeypatch, capfd):
    arrays = _write_idx(tmp_path / "root" / "mnist", np.random.default_rng(0))
    monkeypatch.setenv("RDX_DATA_DIR", str(tmp_path / "root"))
    environment = dict(os.environ)
    source = data.load("mnist", "train_all")
    assert dict(os.environ) == environment
    assert capfd.readouterr().out == ""
    _same((source.images, source.labels), arrays["train"])
    (home,) = (cache / "data" / "mnist").iterdir()
    assert list((home / "rdx_mnist" / "1.0.0").glob("*.array_record*"))
    # The second load must not prepare again.
    monkeypatch.setattr(prepared, "_prepare", None)
    test = data.load("mnist", "test")
    _same((test.images, test.labels), arrays["test"])
    train, validation = data.load("mnist", "train"), data.load("mnist", "validation")
    assert (len(train), len(validation)) == (38, 2)
    assert np.array_equal(train.images, source.images[train.index])


def test_a_prepared_set_is_a_tfds_data_set(tmp_path, cache):
    arrays = _write_idx(tmp_path / "mnist", np.random.default_rng(1))
    data.load("mnist", "test", root=tmp_path)
    (home,) = (cache / "data" / "mnist").iterdir()
    builder = tfds.builder_from_directory(home / "rdx_mnist" / "1.0.0")
    examples = list(builder.as_data_source("train"))
    order = [int(example["index"]) for example in examples]
    # TFDS shuffles what it writes: without the index the published order would be lost.
    assert order != sorted(order)
    assert sorted(order) == list(range(40))
    assert all(np.array_equal(example["image"], arrays["train"][0][example["index"]]) for example in examples)


def test_changed_files_are_prepared_anew(tmp_path):
    _write_idx(tmp_path / "mnist", np.random.default_rng(2))
    first = data.load("mnist", "test", root=tmp_path)
    arrays = _write_idx(tmp_path / "mnist", np.random.default_rng(3))
    second = data.load("mnist", "test", root=tmp_path)
    assert first.fingerprint != second.fingerprint
    _same((second.images, second.labels), arrays["test"])


def test_cifar10_end_to_end(tmp_path):
    batches = _cifar(np.random.default_rng(4))
    _write_pickles(tmp_path / "somewhere" / "cifar-10-batches-py", batches)
    for split, part in (("train_all", "train"), ("test", "test")):
        source = data.load("cifar10", split, root=tmp_path)
        _same((source.images, source.labels), _joined(batches, part))
    assert source.class_names[3] == "cat"


@pytest.mark.parametrize("layout", ["pickles", "direct", "tar", "grids"])
def test_cifar10_layouts_agree(tmp_path, layout):
    batches, root = _cifar(np.random.default_rng(5)), tmp_path / "root"
    if layout == "pickles":
        _write_pickles(root / "cifar10" / "cifar-10-batches-py", batches)
    elif layout == "direct":
        _write_pickles(root, batches)
    elif layout == "tar":
        _write_tar(root / "cifar10", batches, tmp_path / "scratch")
    else:
        _write_grids(root / "cifar10", batches)
    files = raw.find("cifar10", root)
    for split in ("train", "test"):
        _same(files.read(files.paths, split), _joined(batches, split))


@pytest.mark.parametrize("folder", ["", "fashion_mnist"])
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_layouts_agree(tmp_path, folder, zipped):
    arrays = _write_idx(tmp_path / folder, np.random.default_rng(6), zipped=zipped)
    files = raw.find("fashion_mnist", tmp_path)
    for split in ("train", "test"):
        _same(files.read(files.paths, split), arrays[split])


def test_the_directory_of_another_set_is_not_taken(tmp_path):
    _write_idx(tmp_path / "mnist", np.random.default_rng(7))
    with pytest.raises(FileNotFoundError, match="fashion_mnist: missing"):
        raw.find("fashion_mnist", tmp_path / "mnist")


def test_missing_files_are_named(tmp_path):
    _write_idx(tmp_path / "mnist", np.random.default_rng(8))
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist", "train", root=tmp_path)
    text = str(error.value)
    assert "missing t10k-labels-idx1-ubyte " in text
    assert "train-images" not in text
    assert f"searched {tmp_path / 'mnist'}, {tmp_path}." in text
    assert f"Put all of them into {tmp_path / 'mnist'}" in text
    assert "RDX_DATA_DIR" in text


def test_missing_cifar_files_are_named(tmp_path):
    batches = _cifar(np.random.default_rng(9))
    _write_pickles(tmp_path / "cifar10" / "cifar-10-batches-py", batches)
    (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar10", "train", root=tmp_path)
    text = str(error.value)
    assert "missing data_batch_3 (" in text
    assert "cifar-10-python.tar.gz" in text
    assert f"into {tmp_path / 'cifar10' / 'cifar-10-batches-py'}" in text


def test_damaged_and_dangerous_files_are_refused(tmp_path):
    _write_idx(tmp_path, np.random.default_rng(10), zipped=False)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"<html>")
    files = raw.find("mnist", tmp_path)
    with pytest.raises(ValueError, match="no idx file of bytes"):
        files.read(files.paths, "test")
    with pytest.raises(pickle.UnpicklingError, match=r"not builtins\.eval"):
        raw._ArrayUnpickler(io.BytesIO(pickle.dumps(eval))).load()


@pytest.mark.parametrize(
    ("target", "name"), [(builders._Builder, "_generate_examples"), (builders, "read"), (np, "save")],
)
def test_an_interrupted_preparation_leaves_nothing(tmp_path, cache, monkeypatch, target, name):
    arrays = _write_idx(tmp_path / "mnist", np.random.default_rng(11))

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.load("mnist", "test", root=tmp_path)
    assert list((cache / "data" / "mnist").iterdir()) == []
    source = data.load("mnist", "test", root=tmp_path)
    _same((source.images, source.labels), arrays["test"])


def test_two_processes_may_prepare_at_once(tmp_path, cache):
    arrays = _write_idx(tmp_path / "mnist", np.random.default_rng(12))
    first = data.load("mnist", "test", root=tmp_path)
    (home,) = (cache / "data" / "mnist").iterdir()
    # The slower process finds the finished set when it renames its own.
    prepared._prepare("mnist", tmp_path, home)
    assert [path.name for path in (cache / "data" / "mnist").iterdir()] == [home.name]
    assert data.load("mnist", "test", root=tmp_path).fingerprint == first.fingerprint
    _same((first.images, first.labels), arrays["test"])


def test_without_tfds_the_error_names_the_archive(tmp_path, monkeypatch):
    _write_idx(tmp_path / "mnist", np.random.default_rng(13))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(sys.modules, "rdx.data.builders", raising=False)
    monkeypatch.delattr("rdx.data.builders", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"python -m rdx\.data\.archive mnist mnist\.npz"):
        data.load("mnist", "test", root=tmp_path)


@needs_real
def test_real_mnist_test_images():
    files = raw.find("mnist", REAL)
    images, labels = files.read(files.paths, "test")
    source = data.Source(images, labels, "mnist", "test", (), np.arange(len(labels), dtype=np.int32))
    assert images.shape == (10000, 28, 28, 1)
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images[0].sum() == 18454
    assert source.fingerprint == REAL_PRINTS["mnist", "test"]


@needs_real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_real_sets_come_out_byte_for_byte(name):
    for split in ("train_all", "test"):
        source = data.load(name, split, root=REAL)
        assert source.fingerprint == REAL_PRINTS[name, split]
