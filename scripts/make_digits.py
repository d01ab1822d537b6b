"""Makes rdx/data/digits.npz from scikit-learn's copy of the UCI optical digits.

scikit-learn is no dependency of rdx. Run this in an environment of its own:

    pip install numpy scikit-learn
    python scripts/make_digits.py rdx/data/digits.npz
"""

import sys

import numpy as np
from sklearn.datasets import load_digits

TRAIN = 1437


def main(out):
    images, labels = load_digits(return_X_y=True)
    # Grey levels 0..16 become 0..255; the map is one to one, so nothing is lost.
    images = np.rint(255 / 16 * images).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    arrays = {"name": np.array("digits")}
    for split, rows in {"train": order[:TRAIN], "test": order[TRAIN:]}.items():
        arrays[f"{split}_images"] = images[rows]
        arrays[f"{split}_labels"] = labels[rows]
    np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
