"""Error-correcting codes: the exact instances of Theorem 4 that its proof is modelled on.

A code of distance `d` detects `d - 1` errors, so it is a detector that is robust at `eps = d - 1` in Hamming distance:
it rejects every word that is no codeword. The classifier that Theorem 4 makes of it takes a codeword within `eps / 2`:
it corrects `floor((d - 1) / 2)` errors, which is minimum-distance decoding.

Source: Tramer (2022, arXiv:2107.11630, Sec. 2.2); Hamming (1950, Bell System Technical Journal 29).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rdx.detect.exact import table
from rdx.detect.metric_spaces import FiniteSpace, hamming_cube
from rdx.types import Array


@dataclasses.dataclass(frozen=True)
class Code:
    """A linear code over bits; words are binary numbers, points of `hamming_cube(num_bits)`.

    Attributes:
        generator: rows that span the code, shape `[k, n]` of 0 and 1.
    """

    generator: np.ndarray

    @property
    def num_bits(self) -> int:
        """Length `n` of a word."""
        return self.generator.shape[1]

    @property
    def codewords(self) -> np.ndarray:
        """All codewords as numbers, in the order of their messages, shape `[2^k]`."""
        size = len(self.generator)
        messages = (np.arange(2**size)[:, None] >> np.arange(size)[::-1]) & 1
        return (messages @ self.generator % 2) @ (1 << np.arange(self.num_bits)[::-1])

    @property
    def distance(self) -> int:
        """The least number of bits in which two codewords differ."""
        return int(np.bitwise_count(self.codewords[1:]).min())

    @property
    def space(self) -> FiniteSpace:
        """All words with Hamming distance."""
        return hamming_cube(self.num_bits)

    @property
    def labels(self) -> np.ndarray:
        """The message of each word, -1 for words that are no codewords, shape `[2^n]`."""
        labels = np.full(2**self.num_bits, -1)
        labels[self.codewords] = np.arange(len(self.codewords))
        return labels


def repetition(num_bits: int) -> Code:
    """Builds the code that repeats one bit: distance `n`.

    Args:
        num_bits: how often.

    Returns:
        The code.
    """
    return Code(np.ones((1, num_bits), int))


def hamming(num_checks: int) -> Code:
    """Builds the Hamming code of `2^r - 1` bits, of which `r` check the others: distance 3.

    Its parity checks are all non-zero columns of `r` bits. Source: Hamming (1950).

    Args:
        num_checks: `r`; 3 gives the [7, 4] code.

    Returns:
        The code.
    """
    columns = np.arange(1, 2**num_checks)
    # Columns of more than one bit carry the message, the others check it.
    order = np.concatenate([columns[np.bitwise_count(columns) > 1], 1 << np.arange(num_checks)])
    checks = (order[:, None] >> np.arange(num_checks)) & 1
    num_message = len(columns) - num_checks
    return Code(np.concatenate([np.eye(num_message, dtype=int), checks[:num_message]], axis=1))


def detector(code: Code) -> Partial:
    """Builds the detector that rejects every word but the codewords.

    Args:
        code: the code.

    Returns:
        A `Detector` on the words' numbers: one logit for each message, score 1 for what is no codeword, else -1. It
        is robust with detection at `distance - 1`, and no further.
    """
    logits = table(code.labels, len(code.codewords))[:, :-1].astype(np.float32)
    return Partial(_look_up, jnp.asarray(logits), jnp.where(jnp.asarray(code.labels) < 0, 1.0, -1.0))


def _look_up(logits: Array, score: Array, words: Array) -> tuple[Array, Array]:
    return logits[words], score[words]
