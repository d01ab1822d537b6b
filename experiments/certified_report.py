"""The table and the picture of `experiments.tramer_certified`, made from its records."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.certified_presets import Config
from rdx import plotting
from rdx.detect import claims
from rdx.evaluate import ContradictionError, records, report


@dataclasses.dataclass(frozen=True)
class Cell:
    """One network.

    Attributes:
        eps: radius at which it is certified.
        num_abstain: its abstain classes; 0 for a classifier.
    """

    eps: float
    num_abstain: int

    @property
    def name(self) -> str:
        """Names the record."""
        return f"abstain-{self.num_abstain}-{self.eps:.4g}" if self.num_abstain else f"classifier-{self.eps:.4g}"


def cells(config: Config) -> list[Cell]:
    """Lists the networks: classifiers at each radius and at twice that, joint ones at twice that."""
    radii = sorted({eps * factor for eps in config.eps for factor in (1, 2)})
    return [Cell(eps, 0) for eps in radii] + [Cell(2 * eps, num) for eps in config.eps for num in config.abstain]


def write(directory: Path, config: Config) -> Path:
    """Writes `table.md` and the picture from the records that exist; returns the directory."""
    read = {cell: records.read_arrays(directory / "records", cell.name) for cell in cells(config)}
    found = {cell: pair[0] for cell, pair in read.items() if pair is not None}
    for cell, record in found.items():
        _check(cell, record["summary"])
    text = "\n\n".join([_heading(config, found), *_table2(config, found), _details(found), _notes(config)])
    report.write_text(directory / "table.md", text)
    print(text)
    print(f"Table: {directory / 'table.md'}", flush=True)
    if importlib.util.find_spec("matplotlib") is not None and all(cell in found for cell in cells(config)):
        _draw(directory, config, found)
    return directory


def _check(cell: Cell, summary: Mapping[str, Any]) -> None:
    if not summary["clean"]["count"] <= summary["attacked"]["count"]:
        raise ContradictionError(f"{cell.name}: fewer errors under attack than without: {summary}.")


def _heading(config: Config, found: Mapping[Cell, Any]) -> str:
    first = next(iter(found.values()), None)
    sizes = "" if first is None else (
        f"{first['data']['train_size']} training, {first['data']['held_out_size']} held-out, {first['data']['size']} "
        "test images; "
    )
    return (
        f"# Certified classifiers and detectors on {config.dataset}, preset `{config.preset}`\n\n{sizes}"
        f"{config.epochs} epochs, seed {config.seed}, one run. All percentages; accuracies of all test images."
    )


def _table2(config: Config, found: Mapping[Cell, Any]) -> list[str]:
    header = ["eps of the detector", *(f"1 - R_adv-det^eps: joint, {num} abstain" for num in config.abstain),
              "1 - R_adv^{eps/2}: Theorem 5", "classifier at eps, without detection"]
    rows = [
        [_radius(2 * eps), *(_accuracy(found, Cell(2 * eps, num)) for num in config.abstain),
         _accuracy(found, Cell(eps, 0)), _accuracy(found, Cell(2 * eps, 0))]
        for eps in config.eps
    ]
    quoted = [
        [_radius(detector.eps), f"{100 * (detector.accuracy or 0):.0f}", f"{100 * (classifier.accuracy or 0):.0f}"]
        for detector, classifier, _ in claims.table2()
    ]
    header2 = ["eps", "1 - R_adv-det^eps", "1 - R_adv^{eps/2}"]
    return [
        "## Certified robust accuracy\n\n" + report.markdown(header, rows),
        "Table 2 of the paper (CIFAR-10; Sheikholeslami et al. 2021 beside Zhang et al. 2020), for comparison:\n\n"
        + report.markdown(header2, quoted),
    ]


def _accuracy(found: Mapping[Cell, Any], cell: Cell) -> str:
    if cell not in found:
        return "-"
    rate = found[cell]["summary"]["certified"]
    return f"{100 * (1 - rate['value']):.2f} [{100 * (1 - rate['high']):.1f}, {100 * (1 - rate['low']):.1f}]"


def _details(found: Mapping[Cell, Any]) -> str:
    header = ["network", "certified at", "clean error", "attacked", "certified error", "chosen on held-out images",
              "Theorem 5: attack on the classifier at twice the radius, alone", "... past the detector"]
    rows = []
    for cell, record in found.items():
        summary, chosen = record["summary"], record.get("chosen")
        picked = "-" if chosen is None else ", ".join(
            f"weight {weight}: {100 * error:.1f}" for weight, error in chosen["held_out"].items()
        )
        rows.append([
            f"{cell.num_abstain} abstain" if cell.num_abstain else "classifier", _radius(cell.eps),
            *(report.percent(summary[name]) for name in ("clean", "attacked", "certified")), picked,
            *(report.percent(summary[name]) if name in summary else "-" for name in ("bare", "evaded")),
        ])
    return "## Errors\n\n" + report.markdown(header, rows)


def _notes(config: Config) -> str:
    return (
        "Clean and attacked errors are of the first "
        f"{config.num_attacked} test images. For a detector, a clean input that is rejected is an error, and a "
        "perturbed one that is accepted and wrong. Certificates of detectors and classifiers are confirmed in float64 "
        "with a proved allowance for rounding; all images attacked were attacked whether certified or not (of "
        f"classifiers up to {config.cross_check}), and none that is certified was broken. Classifiers are certified by "
        "CROWN-IBP intersected with IBP, joint networks by IBP with the exact weight."
    )


def _radius(eps: float) -> str:
    return f"{round(255 * eps)}/255" if abs(255 * eps - round(255 * eps)) < 1e-6 and eps < 0.13 else f"{eps:g}"


def _draw(directory: Path, config: Config, found: Mapping[Cell, Any]) -> None:
    names = [_radius(2 * eps) for eps in config.eps]
    accuracy = lambda cell: 100 * (1 - found[cell]["summary"]["certified"]["value"])
    series = {
        "Theorem 5 on a classifier at eps / 2": [accuracy(Cell(eps, 0)) for eps in config.eps],
        **{f"joint, {num} abstain": [accuracy(Cell(2 * eps, num)) for eps in config.eps] for num in config.abstain},
        "classifier at eps, no detection": [accuracy(Cell(2 * eps, 0)) for eps in config.eps],
    }
    plotting.bars(
        directory / "certified.png", names, series, y_label="certified robust accuracy, %",
        heading=f"{config.dataset}: detectors at linf radius eps",
    )
    print(f"Picture: {directory}/certified.png", flush=True)
