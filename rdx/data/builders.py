"""The project's own TFDS builders: MNIST, Fashion-MNIST, CIFAR-10, Tiny ImageNet from local files, without TensorFlow.

Importing this module registers them with tensorflow-datasets as `rdx_mnist` and so on, so they can also be prepared and
read with its own functions. Pixels are stored as bytes, since TFDS encodes images with TensorFlow, and every example
carries its place in the published files, since TFDS shuffles what it writes.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds

from rdx.data import raw
from rdx.data.catalogue import entry

_CHUNK = 2000


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Reads the published files in `manual_dir` and writes uint8 images, labels and indices."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Put the published files into manual_dir; rdx.data.raw names them."
    pkg_dir_path = tfds.core.Path(__file__).parent
    source: str
    homepage: str
    citation: str

    def _info(self) -> tfds.core.DatasetInfo:
        shape, class_names = entry(self.source)
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES),
            "label": tfds.features.ClassLabel(names=list(class_names)),
            "index": tfds.features.Scalar(dtype=np.int64),
        })
        return self.dataset_info_from_configs(
            description=f"The published files of {self.source}, pixel for pixel.", features=features,
            supervised_keys=("image", "label"), homepage=self.homepage, citation=self.citation,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        files = raw.find(self.source, Path(dl_manager.manual_dir))
        return {split: self._generate_examples(*files.read(files.paths, split)) for split in ("train", "test")}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": image, "label": int(label), "index": i}


class RdxMnist(_Builder):
    """MNIST."""

    name = "rdx_mnist"
    source = "mnist"
    homepage = "http://yann.lecun.com/exdb/mnist/"
    citation = "LeCun, Bottou, Bengio, Haffner (1998). Gradient-based learning applied to document recognition."


class RdxFashionMnist(_Builder):
    """Fashion-MNIST."""

    name = "rdx_fashion_mnist"
    source = "fashion_mnist"
    homepage = "https://github.com/zalandoresearch/fashion-mnist"
    citation = "Xiao, Rasul, Vollgraf (2017). Fashion-MNIST. arXiv:1708.07747."


class RdxCifar10(_Builder):
    """CIFAR-10."""

    name = "rdx_cifar10"
    source = "cifar10"
    homepage = "https://www.cs.toronto.edu/~kriz/cifar.html"
    citation = "Krizhevsky (2009). Learning multiple layers of features from tiny images."


class RdxTinyImagenet(_Builder):
    """Tiny ImageNet; "test" is the published validation set."""

    name = "rdx_tiny_imagenet"
    source = "tiny_imagenet"
    homepage = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    citation = "Le, Yang (2015). Tiny ImageNet visual recognition challenge."


class RdxTinyImagenet32(RdxTinyImagenet):
    """Tiny ImageNet at 32x32."""

    name = "rdx_tiny_imagenet32"
    source = "tiny_imagenet32"


def prepare(name: str, root: str | Path, data_dir: str | Path) -> tfds.core.DatasetBuilder:
    """Prepares a data set as array_record files, offline.

    Args:
        name: a data set of the catalogue, but for "digits".
        root: the directory that holds the published files.
        data_dir: where TFDS writes the prepared set.

    Returns:
        The builder, ready to be read.
    """
    builder = tfds.builder(f"rdx_{name}", data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(
        manual_dir=Path(root).expanduser(), extract_dir=Path(data_dir) / "extracted", try_download_gcs=False,
    )
    tfds.display_progress_bar(enable=False)
    try:
        # TFDS prints that it downloads, which it does not.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config)
    finally:
        tfds.display_progress_bar(enable=True)
    return builder


def read(builder: tfds.core.DatasetBuilder, split: str) -> raw.Arrays:
    """Reads a prepared split into memory, in the order of the published files.

    Returns:
        Images, uint8 `[N, H, W, C]`, and labels, int32 `[N]`.

    Raises:
        ValueError: if an example is missing or there twice.
    """
    source = cast(Any, builder).as_data_source(split)
    size = len(source)
    images = np.empty((size, *entry(builder.name.removeprefix("rdx_")).shape), np.uint8)
    labels = np.full(size, -1, np.int32)
    for start in range(0, size, _CHUNK):
        for example in source.__getitems__(range(start, min(start + _CHUNK, size))):
            images[example["index"]], labels[example["index"]] = example["image"], example["label"]
    if (labels < 0).any():
        raise ValueError(f"The prepared split {split!r} in {builder.data_dir} is damaged: delete it and load again.")
    return images, labels
