"""Theorem 4 on codes is minimum-distance decoding, exactly."""

import jax.numpy as jnp
import numpy as np
import pytest

from rdx import detect
from rdx.detect import codes, exact, searches


def _errors(code, weight):
    """All words at a distance from each codeword, shape [codewords, patterns]."""
    patterns = np.arange(2**code.num_bits)
    patterns = patterns[np.bitwise_count(patterns) == weight]
    return code.codewords[:, None] ^ patterns[None]


def _decoder(key, code):
    return detect.classifier_from_detector(
        key, codes.detector(code), metric=code.space, eps=code.distance - 1, search=searches.exact
    )


def test_hamming_7_4_corrects_exactly_one_error(key):
    code = codes.hamming(3)
    assert (code.num_bits, len(code.codewords), code.distance) == (7, 16, 3)
    decode = _decoder(key, code)
    for weight, share in ((0, 1.0), (1, 1.0), (2, 0.0)):  # a perfect code: two errors always reach another codeword
        words = _errors(code, weight)
        given = np.asarray(decode(jnp.asarray(words.ravel())).argmax(axis=1)).reshape(words.shape)
        assert (given == np.arange(16)[:, None]).mean() == share


@pytest.mark.parametrize("code", [codes.repetition(n) for n in (1, 3, 4, 5, 8)] + [codes.hamming(2), codes.hamming(3)])
def test_what_is_detected_and_what_is_corrected(key, code):
    labels, table = np.maximum(code.labels, 0), exact.table(code.labels, len(code.codewords))
    distances, is_codeword = code.space.distances, code.labels >= 0
    for eps in range(code.distance + 1):
        reached = exact.reach(distances, float(eps), table)
        robust = exact.is_robust_with_detection(table, reached, labels)[is_codeword]
        assert robust.all() == (eps <= code.distance - 1)
        assert robust.any() == robust.all()  # codes are linear: one codeword is as any other
    corrected = (code.distance - 1) // 2
    classifier = exact.classify(table, exact.reach(distances, (code.distance - 1) / 2, table))
    for errors in (corrected, corrected + 1):
        # For every selector, and so for this one.
        robust = exact.is_robust(exact.reach(distances, float(errors), classifier), labels)[is_codeword]
        assert robust.all() == (errors == corrected)
    decode, words = _decoder(key, code), _errors(code, corrected)
    given = np.asarray(decode(jnp.asarray(words.ravel())).argmax(axis=1)).reshape(words.shape)
    assert (given == np.arange(len(words))[:, None]).all()


def test_codewords_satisfy_the_parity_checks():
    code = codes.hamming(3)
    bits = (code.codewords[:, None] >> np.arange(7)[::-1]) & 1
    xor = bits[:, None] ^ bits[None]
    closed = {tuple(word) for word in xor.reshape(-1, 7)}
    assert closed == {tuple(word) for word in bits}
