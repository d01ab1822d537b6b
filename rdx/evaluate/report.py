"""Tables in the layout of papers, made from records only, and of what a cascade of attacks found."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from rdx.attacks.autoattack import Cascade
from rdx.evaluate.benchmark import ContradictionError
from rdx.types import ArrayLike

# A run whose predictions fall into one class this often has collapsed: its errors say nothing about the method.
_COLLAPSED = 0.9

# What `paired` returns.
PAIRED = ("only here", "only there", "both", "neither", "p (McNemar)")


def is_collapsed(summary: Mapping[str, Any]) -> bool:
    """Tells whether nearly all inputs are put into one class."""
    return summary["largest_class"] >= _COLLAPSED


def percent(rate: Mapping[str, Any]) -> str:
    """Formats a rate as a percentage with two digits; a dash where nothing was counted."""
    return f"{100 * rate['value']:.2f}" if rate["total"] else "-"


def cell(summary: Mapping[str, Any]) -> str:
    """Formats `clean [attacked, certified]` errors in percent, counted on the same examples.

    Args:
        summary: from `records.summarize`.

    Returns:
        The cell; collapsed runs are named so.

    Raises:
        ContradictionError: where not clean <= attacked <= certified.
    """
    counts = [summary[name]["count"] for name in ("clean", "attacked", "certified")]
    if counts != sorted(counts):
        raise ContradictionError(f"Errors must rise from clean to attacked to certified, got counts {counts}.")
    text = f"{percent(summary['clean'])} [{percent(summary['attacked'])}, {percent(summary['certified'])}]"
    return f"collapsed: {text}" if is_collapsed(summary) else text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a markdown table with aligned columns.

    Raises:
        ValueError: where a row has another length than the header.
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"Every row needs {len(header)} cells, as the header has.")
    widths = [max(3, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def cascade_table(found: Cascade) -> str:
    """Formats what a cascade found, such as AutoAttack, attack by attack.

    Args:
        found: from `attacks.cascade` or `attacks.cascade_rand`.

    Returns:
        A markdown table of each attack's name, the share of all examples that stand after it, how many it broke, and
        how long it ran; the first row is that of the clean inputs.
    """
    broken_by = np.asarray(found.broken_by)
    rows = [
        [name, f"{100 * (broken_by > place).mean():.2f}", str((broken_by == place).sum()), time]
        for place, (name, time) in enumerate(
            [("clean", "-"), *((name, f"{spent:.1f}") for name, spent in found.seconds.items())], start=-1
        )
    ]
    return markdown(["attack", "robust after, %", "broken", "seconds"], rows)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file by renaming, so that a reader sees the old text or the new one."""
    temporary = Path(path).with_suffix(".partial")
    temporary.write_text(text if text.endswith("\n") else text + "\n")
    temporary.replace(path)


def paired(here: ArrayLike, there: ArrayLike) -> list[str]:
    """Compares two methods example by example: a row for the columns `PAIRED`.

    The last number is the exact two-sided p-value of McNemar's test: how often a fair coin would split the examples on
    which the two differ at least as unevenly. Where there are more examples of one, its first ones are compared.

    Args:
        here: outcome of each example with one method, bool, shape `[N]`.
        there: outcome with the other, bool, shape `[M]`.

    Returns:
        Counts of the four outcomes and the p-value.
    """
    a, b = np.asarray(here), np.asarray(there)
    num = min(len(a), len(b))
    a, b = a[:num], b[:num]
    counts = [int(both.sum()) for both in (a & ~b, ~a & b, a & b, ~a & ~b)]
    differing = counts[0] + counts[1]
    p = scipy.stats.binomtest(counts[0], differing).pvalue if differing else 1.0
    return [*map(str, counts), f"{p:.2g}"]
