"""The image sets that `rdx.data.load` knows: names, image shapes and class names."""

from typing import NamedTuple


class Entry(NamedTuple):
    """What is fixed about a data set.

    Attributes:
        shape: height, width and channels of an image.
        class_names: one name per label, in label order.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]


_DIGITS = tuple("0123456789")

CATALOGUE = {
    "digits": Entry((8, 8, 1), _DIGITS),
    "mnist": Entry((28, 28, 1), _DIGITS),
    "fashion_mnist": Entry(
        (28, 28, 1),
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "cifar10": Entry(
        (32, 32, 3),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
}


def entry(name: str) -> Entry:
    """Looks up a data set.

    Raises:
        ValueError: naming the known sets.
    """
    if name not in CATALOGUE:
        raise ValueError(f"Unknown data set {name!r}: use one of {sorted(CATALOGUE)}.")
    return CATALOGUE[name]
