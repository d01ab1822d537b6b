"""Tiny ImageNet from small directories in its two layouts, and the real 32-pixel version."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from rdx import data
from rdx.data import raw, tiny_imagenet
from rdx.data.catalogue import entry

REAL = os.environ.get("RDX_DATA_DIR", "")
_WNIDS = entry("tiny_imagenet").class_names
# Labels 2, 0 and 199: the order of the catalogue is not that of the names.
_CLASSES = (_WNIDS[2], _WNIDS[0], _WNIDS[199])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("RDX_DATA_DIR", raising=False)
    monkeypatch.delenv("RDX_DATA_ARCHIVE", raising=False)
    monkeypatch.setenv("RDX_CACHE_DIR", str(tmp_path / "cache"))


def _jpeg(value, side, mode="RGB"):
    """An image of one colour, which JPEG keeps to a level."""
    file = io.BytesIO()
    Image.new(mode, (side, side), value if mode == "L" else (value, 0, 255 - value)).save(file, "JPEG", quality=100)
    return file.getvalue()


def _write_folders(home):
    for place, wnid in enumerate(_CLASSES):
        images = home / "train" / wnid / "images"
        images.mkdir(parents=True)
        for i in (0, 2, 10):
            mode = "L" if (place, i) == (1, 2) else "RGB"
            (images / f"{wnid}_{i}.JPEG").write_bytes(_jpeg(20 * i + place, 64, mode))
    (home / "val" / "images").mkdir(parents=True)
    lines = []
    for i in (10, 9, 0):
        (home / "val" / "images" / f"val_{i}.JPEG").write_bytes(_jpeg(20 * i, 64))
        lines.append(f"val_{i}.JPEG\t{_CLASSES[i % 3]}\t0\t0\t62\t62\n")
    (home / "val" / "val_annotations.txt").write_text("".join(lines))


def _write_archive(path, members):
    with tarfile.open(path, "w:xz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _assert_values(source, values, labels):
    assert source.labels.tolist() == labels
    np.testing.assert_allclose(source.images[..., 0].mean(axis=(1, 2)), values, atol=1.5)


def test_the_published_layout_end_to_end(tmp_path):
    _write_folders(tmp_path / "root" / "tiny_imagenet" / "tiny-imagenet-200")
    train = data.load("tiny_imagenet", "train_all", root=tmp_path / "root")
    assert train.images.shape == (9, 64, 64, 3)
    assert train.num_classes == 200
    # Classes in the order of their folders, numbers in the order of numbers.
    order = sorted(range(3), key=lambda place: _CLASSES[place])
    label = {0: 2, 1: 0, 2: 199}
    expected = [20 * i + place for place in order for i in (0, 2, 10)]
    _assert_values(train, expected, [label[place] for place in order for _ in range(3)])
    grey = train.images[3 * order.index(1) + 1]
    assert np.array_equal(grey[..., 0], grey[..., 2])
    test = data.load("tiny_imagenet", "test", root=tmp_path / "root")
    _assert_values(test, [0, 180, 200], [label[0], label[0], label[1]])


def test_the_archives_of_32_pixels_end_to_end(tmp_path):
    home = tmp_path / "tiny_imagenet32"
    home.mkdir()
    members = {f"{wnid}/{wnid}_{j}.JPEG": _jpeg(10 * i + j, 32) for i, wnid in enumerate(_CLASSES) for j in range(2)}
    _write_archive(home / "train_100_per_class.tar.xz", members)
    _write_archive(home / "val.tar.xz", {f"{_CLASSES[1]}/val_1.JPEG": _jpeg(99, 32)})
    train, test = (data.load("tiny_imagenet32", split, root=tmp_path) for split in ("train_all", "test"))
    assert train.images.shape == (6, 32, 32, 3)
    _assert_values(train, [0, 1, 10, 11, 20, 21], [2, 2, 0, 0, 199, 199])
    _assert_values(test, [99], [0])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing tiny-imagenet-200/train, tiny-imagenet-200/val/val_anno"):
        data.load("tiny_imagenet", "test", root=tmp_path)
    (tmp_path / "val.tar.xz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"missing train_100_per_class\.tar\.xz \("):
        data.load("tiny_imagenet32", "test", root=tmp_path)


def test_what_does_not_fit_is_refused(tmp_path):
    home = tmp_path / "tiny-imagenet-200"
    _write_folders(home)
    (home / "val" / "images" / "val_9.JPEG").unlink()
    files = raw.find("tiny_imagenet", tmp_path)
    with pytest.raises(ValueError, match="names 1 images that are not there"):
        files.read(files.paths, "test")
    (home / "train" / _CLASSES[0] / "images" / f"{_CLASSES[0]}_0.JPEG").write_bytes(_jpeg(0, 32))
    with pytest.raises(ValueError, match=r"size \(32, 32\) is none of tiny_imagenet"):
        files.read(files.paths, "train")


@pytest.mark.skipif(not REAL, reason="set RDX_DATA_DIR to the directory of the published files")
@pytest.mark.slow
def test_the_real_version_of_32_pixels():
    found = tiny_imagenet.find("tiny_imagenet32", [raw.Path(REAL) / "tiny_imagenet32"])
    if found is None:
        pytest.skip("no tiny_imagenet32 there")
    paths, read = found
    for split, per_class in (("train", 100), ("test", 50)):
        images, labels = read(paths, split)
        assert images.shape == (200 * per_class, 32, 32, 3)
        assert (np.bincount(labels, minlength=200) == per_class).all()
