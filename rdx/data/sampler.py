"""A sampler without state: the indices of a batch are a pure function of the step."""

import functools
from dataclasses import KW_ONLY, dataclass

import numpy as np


@dataclass(frozen=True)
class Sampler:
    """Orders the examples of a data set for training.

    Every epoch is a permutation of all examples drawn from (seed, epoch), and the epochs follow each other without a
    seam: a batch may straddle two, and nothing is dropped. Nothing depends on the number of processes or devices, so a
    resumed run needs only its step.

    Attributes:
        num_examples: size of the data set.
        batch_size: size of the global batch.
        seed: at least 0.
        shuffle: False keeps the order of the data set.

    Raises:
        ValueError: if a size is not positive or the seed is negative.
    """

    num_examples: int
    batch_size: int
    seed: int
    _: KW_ONLY
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_examples < 1 or self.batch_size < 1 or self.seed < 0:
            raise ValueError(f"{self}: num_examples and batch_size must be at least 1 and seed at least 0.")

    def indices(self, step: int) -> np.ndarray:
        """Names the examples of the batch at `step`, counted from 0. Shape `[batch_size]`, int64."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        epochs, offsets = np.divmod(positions, self.num_examples)
        if not self.shuffle:
            return offsets
        return np.concatenate([
            _permutation(self.num_examples, self.seed, int(epoch))[offsets[epochs == epoch]]
            for epoch in np.unique(epochs)
        ])


@functools.lru_cache(maxsize=8)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    order.setflags(write=False)
    return order
