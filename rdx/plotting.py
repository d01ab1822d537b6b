"""Pictures, made with matplotlib, which is imported only when one is drawn."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rdx.types import ArrayLike

_INK, _MUTED = "#222222", "#8a8a8a"
_COLOURS = (
    "#1b6ca8", "#d1495b", "#2a9d6f", "#8d6cab", "#c98b2b", "#5c6b73", "#17a2b8", "#7a4b2b", "#d96fae", "#86962b",
)
_LINES = (
    "solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5, 1.5, 1.5)), (0, (9, 3)),
)


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


def strips(
    path: str | os.PathLike[str], rows: Mapping[str, ArrayLike], *, heading: str, num_columns: int = 31,
) -> None:
    """Draws rows of pictures below each other, one column an example, as in Fig. 4 of Frosio & Kautz (2023).

    Args:
        path: where the PNG goes.
        rows: name -> pictures, shape `[N, H, W, C]` in [0, 1], C being 1 or 3; all rows have the same N, H and W.
        heading: title of the picture.
        num_columns: examples side by side; the others follow below, in the same rows again.

    Raises:
        ValueError: where the rows do not fit each other.
    """
    images = {name: np.asarray(row) for name, row in rows.items()}
    shapes = {row.shape[:3] for row in images.values()}
    if len(shapes) != 1:
        raise ValueError(f"The rows have pictures of shapes {[row.shape for row in images.values()]}: give equal ones.")
    (num, height, width), = shapes
    gap = max(1, width // 16)
    starts = range(0, num, num_columns)
    figure = _figure(10.0, 0.5 + len(starts) * (len(rows) * height + 2 * gap) / (width * num_columns) * 9.0)
    for axis, start in zip(figure.subplots(len(starts), 1, squeeze=False).flat, starts, strict=True):
        lines = [_line(row[start : start + num_columns], num_columns, gap) for row in images.values()]
        axis.imshow(np.concatenate(lines), vmin=0.0, vmax=1.0, interpolation="nearest")
        axis.set_yticks([(i + 0.5) * (height + gap) for i in range(len(lines))], list(images), fontsize=7, color=_INK)
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.suptitle(heading, fontsize=9, color=_INK)
    figure.tight_layout(pad=0.4, h_pad=0.6)
    _save(figure, path)


def _line(images: np.ndarray, num_columns: int, gap: int) -> np.ndarray:
    """Puts pictures side by side in colour on white."""
    images = np.pad(images, ((0, num_columns - len(images)), (0, gap), (0, gap), (0, 0)), constant_values=1.0)
    line = np.concatenate(list(images), axis=1)
    return np.broadcast_to(line, (*line.shape[:2], 3)).clip(0.0, 1.0)


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
    axis.set(xlabel=x_label, ylabel=y_label, xticks=sorted({float(x) for xs, _ in series.values() for x in xs}))
    axis.set_ylim(bottom=0.0)
    figure.suptitle(heading, fontsize=10, color=_INK, wrap=True)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def accuracy_against_eps(
    path: str | os.PathLike[str], series: Mapping[str, tuple[ArrayLike, ArrayLike]], *, x_label: str, heading: str,
    groups: Mapping[str, str] | None = None, worst: tuple[ArrayLike, ArrayLike] | None = None,
    marked: float | None = None,
) -> None:
    """Draws the accuracy that each of several attacks leaves against its radius, as in Fig. 3 of Dong et al. (2020).

    Args:
        path: where the PNG goes.
        series: attack -> (values, accuracy in percent at each value), drawn as steps.
        x_label: what the horizontal axis measures.
        heading: title of the picture.
        groups: attack -> kind; each kind has a line style.
        worst: values and accuracy under the worst of all attacks, drawn in black.
        marked: a value of the horizontal axis to point out.
    """
    _accuracy(path, series, x_label, heading, groups, worst, marked, is_logarithmic=False)


def accuracy_against_strength(
    path: str | os.PathLike[str], series: Mapping[str, tuple[ArrayLike, ArrayLike]], *, x_label: str, heading: str,
    groups: Mapping[str, str] | None = None, worst: tuple[ArrayLike, ArrayLike] | None = None,
) -> None:
    """Draws the accuracy that each of several attacks leaves against queries or steps, on a logarithmic axis.

    As in Fig. 4 of Dong et al. (2020). Arguments are those of `accuracy_against_eps`.
    """
    _accuracy(path, series, x_label, heading, groups, worst, None, is_logarithmic=True)


def bars(
    path: str | os.PathLike[str], names: Sequence[str], series: Mapping[str, Sequence[float]], *, y_label: str,
    heading: str,
) -> None:
    """Draws groups of bars, one group a name and one bar a series.

    Args:
        path: where the PNG goes.
        names: what stands below each group.
        series: name -> one value per group.
        y_label: what the vertical axis measures.
        heading: title of the picture.
    """
    figure = _figure(max(5.6, 0.75 * len(names) + 1.5), 3.8)
    axis = figure.subplots()
    width, places = 0.8 / max(len(series), 1), np.arange(len(names))
    for i, ((name, values), colour) in enumerate(zip(series.items(), _COLOURS * 4, strict=False)):
        axis.bar(places + (i - 0.5 * (len(series) - 1)) * width, values, width, color=colour, label=name)
    axis.set_xticks(places, names, rotation=35, ha="right", fontsize=8)
    axis.set_ylabel(y_label)
    axis.set_title(heading, fontsize=10, color=_INK)
    axis.grid(alpha=0.25, axis="y")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    _save(figure, path)


def receiver(
    path: str | os.PathLike[str], series: Mapping[str, tuple[ArrayLike, ArrayLike]], *, heading: str
) -> None:
    """Draws receiver operating characteristics, with the false-positive rate on a logarithmic axis.

    Args:
        path: where the PNG goes.
        series: name -> (false-positive rates, true-positive rates), in percent.
        heading: title of the picture.
    """
    figure = _figure(6.8, 4.2)
    axis = figure.subplots()
    for i, (name, (fpr, tpr)) in enumerate(series.items()):
        style = _LINES[i // len(_COLOURS) % len(_LINES)]
        axis.plot(np.maximum(np.asarray(fpr), 0.1), tpr, drawstyle="steps-post", linewidth=1.5, linestyle=style,
                  color=_COLOURS[i % len(_COLOURS)], label=name)
    axis.set(xlabel="clean inputs rejected, %", ylabel="perturbed inputs rejected, %", xscale="log", ylim=(-2.0, 102.0))
    axis.set_title(heading, fontsize=10, color=_INK)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    _save(figure, path)


def claims(
    path: str | os.PathLike[str], curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    points: Mapping[str, tuple[float, float]], *, reports: Sequence[tuple[float, float]], marked: Sequence[str],
    x_label: str, heading: str,
) -> None:
    """Draws robustness claims beside curves of the best known robust accuracy, as Tramer (2022) compares them.

    Args:
        path: where the PNG goes.
        curves: name -> (radii, robust accuracies in [0, 1]).
        points: name of a claim -> (radius, accuracy) of the classifier that it implies.
        reports: (radius, accuracy) of the figures that the curves rest on, drawn as dots.
        marked: the claims that exceed what is known, drawn in red.
        x_label: what the horizontal axis measures.
        heading: title of the picture.
    """
    figure = _figure(6.4, 4.2)
    axis = figure.subplots()
    for i, (name, (radii, accuracies)) in enumerate(curves.items()):
        percent = [100 * value for value in accuracies]
        axis.plot(radii, percent, color=_INK, alpha=0.85, linestyle=_LINES[i % len(_LINES)], label=name)
    axis.plot(*zip(*((x, 100 * y) for x, y in reports), strict=True), "o", markersize=4, color=_INK, label="reported")
    for i, (name, (radius, accuracy)) in enumerate(sorted(points.items(), key=lambda item: item[1])):
        colour = _COLOURS[1] if name in marked else _COLOURS[2]
        axis.plot([radius], [100 * accuracy], marker="s", markersize=6, linestyle="none", color=colour)
        # Above and below in turn, so that neighbours do not write over each other.
        axis.annotate(
            name, (radius, 100 * accuracy), xytext=(0, (6, -12)[i % 2]), textcoords="offset points", ha="center",
            fontsize=7, color=colour,
        )
    axis.set(xlabel=x_label, ylabel="robust accuracy, %", ylim=(-3.0, 105.0))
    axis.margins(x=0.16)
    axis.set_title(heading, fontsize=10, color=_INK)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    figure.tight_layout()
    _save(figure, path)


def _accuracy(
    path: str | os.PathLike[str], series: Mapping[str, tuple[ArrayLike, ArrayLike]], x_label: str, heading: str,
    groups: Mapping[str, str] | None, worst: tuple[ArrayLike, ArrayLike] | None, marked: float | None, *,
    is_logarithmic: bool,
) -> None:
    groups = groups or dict.fromkeys(series, "")
    kinds = list(dict.fromkeys(groups.values()))
    figure = _figure(8.4, max(4.2, 0.19 * len(series) + 1.6))
    axis = figure.subplots()
    # The legend lists the attacks in the order of their curves, the weakest on top.
    ordered = sorted(series, key=lambda name: -float(np.mean(np.asarray(series[name][1]))))
    for name in ordered:
        style = _LINES[kinds.index(groups[name]) % len(_LINES)]
        # Counted among its kind, so that no two of one line style share a colour, in whichever picture.
        place = [other for other in groups if groups[other] == groups[name]].index(name)
        colour = _COLOURS[place % len(_COLOURS)]
        label = f"{name} ({groups[name]})" if groups[name] else name
        axis.plot(*series[name], drawstyle="steps-post", linestyle=style, linewidth=1.5, color=colour, label=label)
    if worst is not None:
        axis.plot(*worst, drawstyle="steps-post", linewidth=2.4, color=_INK, alpha=0.8, label="worst case")
    if marked is not None:
        axis.axvline(marked, color=_MUTED, linestyle="--", linewidth=1.0)
    axis.set(xlabel=x_label, ylabel="accuracy under attack, %", ylim=(-2.0, 102.0))
    if is_logarithmic:
        axis.set_xscale("log")
    axis.set_title(heading, fontsize=10, color=_INK)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if series or worst is not None:
        axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0), handlelength=3.2)
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
