"""Glyphs: all characters, all different, inside the frame, and the same every time."""

import numpy as np
import pytest

from rdx import data
from rdx.data import glyphs


@pytest.mark.parametrize("size", [32, 128])
def test_62_characters_that_differ_and_stay_inside(size):
    source = data.load_glyphs(size=size)
    assert source.images.shape == (62, size, size, 1)
    assert source.images.dtype == np.uint8
    assert "".join(source.class_names) == glyphs.CHARACTERS
    np.testing.assert_array_equal(source.labels, np.arange(62))
    assert len({image.tobytes() for image in source.images}) == 62
    for edge in (source.images[:, 0], source.images[:, -1], source.images[:, :, 0], source.images[:, :, -1]):
        assert edge.max() == 0
    # Strokes are bright and thin, and reach full brightness.
    assert (source.images.max(axis=(1, 2, 3)) > 200).all()
    assert 0.02 < (source.images > 127).mean() < 0.25
    assert source.fingerprint == data.load_glyphs(size=size).fingerprint


def test_no_two_characters_are_nearly_the_same():
    images = data.load_glyphs(size=64).images.astype(np.float32) / 255
    distance = np.abs(images[:, None] - images[None]).sum(axis=(2, 3, 4)) + 1e9 * np.eye(62)
    ink = images.sum(axis=(1, 2, 3))
    share = dict(np.ndenumerate(distance / (ink[:, None] + ink[None])))
    place = glyphs.CHARACTERS.index
    # The nearest are O and Q, whose tail is 4 % of the ink of both; what other fonts draw alike is far apart.
    assert min(share.values()) == share[place("O"), place("Q")] > 0.03
    for first, second in ("I1", "Il", "l1", "O0"):
        assert share[place(first), place(second)] > 0.09


def test_letters_of_one_shape_differ_in_height():
    source = data.load_glyphs(size=64)
    image = dict(zip(source.class_names, source.images, strict=True))
    for capital, small in ("Oo", "Cc", "Ss", "Xx"):
        heights = [np.flatnonzero(image[letter].any(axis=(1, 2))).size for letter in (capital, small)]
        assert heights[0] > 1.2 * heights[1]
    # One baseline: both end in the same row, but for the overshoot of round letters.
    bottoms = [np.flatnonzero((image[letter] > 127).any(axis=(1, 2)))[-1] for letter in "EHxzAl1"]
    assert max(bottoms) - min(bottoms) <= 1


def test_several_fonts_follow_each_other():
    fonts = ("DejaVuSansMono", "DejaVuSerif")
    both = data.load_glyphs(size=32, fonts=fonts)
    assert len(both) == 124
    for number, font in enumerate(fonts):
        alone, part = data.load_glyphs(size=32, fonts=(font,)), both.subset(np.arange(62) + 62 * number)
        np.testing.assert_array_equal(part.images, alone.images)
        np.testing.assert_array_equal(part.labels, alone.labels)
    np.testing.assert_array_equal(both.index, np.arange(124))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"use one of .*DejaVuSansMono"):
        data.load_glyphs(fonts=("ComicSans",))
    for options in ({"size": 4}, {"fonts": ()}):
        with pytest.raises(ValueError, match="8 pixels and one font"):
            data.load_glyphs(**options)
