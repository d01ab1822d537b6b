"""Pictures, made with matplotlib, which is imported only when one is drawn."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rdx.types import ArrayLike

_INK, _MUTED = "#222222", "#8a8a8a"
_COLOURS = ("#1b6ca8", "#d1495b", "#2a9d6f", "#8d6cab", "#c98b2b", "#5c6b73")


def triplets(
    path: str | os.PathLike[str], originals: ArrayLike, defended: ArrayLike, *, titles: Sequence[str], eps: float,
    heading: str, num_columns: int = 4,
) -> None:
    """Draws original, defended image and perturbation side by side, as in Fig. 3 of Frosio & Kautz (2023).

    Args:
        path: where the PNG goes.
        originals: shape `[N, H, W, C]` in [0, 1], C being 1 or 3.
        defended: the same shape.
        titles: one per example.
        eps: the defender's budget; the perturbation is shown on a scale from `-eps` (dark) to `eps` (bright).
        heading: title of the picture.
        num_columns: triplets in a row.
    """
    originals, defended = np.asarray(originals), np.asarray(defended)
    deltas = np.clip(0.5 + 0.5 * (defended - originals) / max(eps, 1e-12), 0.0, 1.0)
    num_rows = -(-len(originals) // num_columns)
    figure = _figure(0.85 * 3 * num_columns, 1.12 * num_rows + 0.5)
    axes = figure.subplots(num_rows, 3 * num_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, images in enumerate(zip(originals, defended, deltas, strict=True)):
        row, column = divmod(i, num_columns)
        for j, image in enumerate(images):
            axis = axes[row, 3 * column + j]
            axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0.0, vmax=1.0)
            if j == 1:
                axis.set_title(titles[i], fontsize=7, color=_INK, pad=2)
    figure.suptitle(heading, fontsize=9, color=_INK)
    figure.tight_layout(pad=0.3, w_pad=0.15, h_pad=0.5)
    _save(figure, path)


def curves(
    path: str | os.PathLike[str], series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str,
    y_label: str, heading: str, intervals: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    baseline: tuple[str, float] | None = None,
) -> None:
    """Draws one line per series.

    Args:
        path: where the PNG goes.
        series: name -> (x values, y values).
        x_label: what the horizontal axis measures.
        y_label: what the vertical axis measures.
        heading: title of the picture.
        intervals: name -> (lower ends, upper ends), drawn as bars.
        baseline: name and value of a horizontal reference.
    """
    figure = _figure(5.6, 3.6)
    axis = figure.subplots()
    for (name, (xs, ys)), colour in zip(series.items(), _COLOURS * 4, strict=False):
        axis.plot(xs, ys, marker="o", markersize=4, linewidth=1.6, color=colour, label=name)
        if intervals and name in intervals:
            lows, highs = intervals[name]
            axis.vlines(xs, lows, highs, color=colour, linewidth=1.0, alpha=0.6)
    if baseline is not None:
        axis.axhline(baseline[1], color=_MUTED, linestyle="--", linewidth=1.2, label=baseline[0])
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.set_ylim(bottom=0.0)
    axis.set_title(heading, fontsize=10, color=_INK)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    # Not pyplot: that would need a backend and keep the figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    temporary = f"{os.fspath(path)}.partial"
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)
