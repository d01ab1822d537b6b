"""Characters rendered from fonts that come with matplotlib: the prototypes of A5's physical recipes.

Frosio & Kautz (2023, A5, Sec. 4) robustify the 62 characters A-Z, a-z, 0-9. Their images were rendered once in Comic
Sans, which is not free. DejaVu Sans Mono takes its place: there too no two of the characters look alike, not even `I`,
`l` and `1`, or `O` and `0`.
"""

import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rdx.data.sources import Source

CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits

# Size of the font and place of the baseline, as shares of the image's side: the tallest letters and the deepest
# descenders of the fonts of matplotlib stay inside, with room for a camera that shifts.
_EM, _BASELINE = 0.8, 0.7


def load_glyphs(*, size: int = 128, fonts: Sequence[str] = ("DejaVuSansMono",)) -> Source:
    """Renders the 62 characters `CHARACTERS` in each font, strokes bright on black.

    Args:
        size: side of the images in pixels.
        fonts: names of fonts of matplotlib, such as "DejaVuSansMono", "DejaVuSerif" or "STIXGeneral".

    Returns:
        Images `[62 F, size, size, 1]`, font after font. Labels number the characters. There is one split: objects are
        the same in training and test, their pictures differ.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: for an unknown font, no font, or images below 8 pixels.
    """
    if size < 8 or not fonts:
        raise ValueError(f"size={size} and fonts={fonts}: give at least 8 pixels and one font.")
    directory = _directory()
    known = sorted(path.stem for path in directory.glob("*.ttf"))
    for name in fonts:
        if name not in known:
            raise ValueError(f"Unknown font {name!r}: use one of {', '.join(known)}.")
    images = np.stack([
        image for name in fonts for image in _render(directory / f"{name}.ttf", size)
    ])
    labels = np.tile(np.arange(len(CHARACTERS), dtype=np.int32), len(fonts))
    return Source(images, labels, "glyphs", "train_all", tuple(CHARACTERS), np.arange(len(labels), dtype=np.int32))


def _directory() -> Path:
    import matplotlib as mpl

    return Path(mpl.get_data_path()) / "fonts" / "ttf"


def _render(path: Path, size: int) -> list[np.ndarray]:
    font = ImageFont.truetype(str(path), round(_EM * size))
    images = []
    for character in CHARACTERS:
        canvas = Image.new("L", (size, size), 0)
        # Centred as ink, on one baseline, so that letters of one shape differ by their height.
        left, _, right, _ = font.getbbox(character, anchor="ls")
        place = ((size - right - left) / 2, _BASELINE * size)
        ImageDraw.Draw(canvas).text(place, character, fill=255, font=font, anchor="ls")
        images.append(np.asarray(canvas)[:, :, None])
    return images
