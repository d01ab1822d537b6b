"""The cells of A5's tables, and the table and pictures that are made from their records."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import a5_certificates, a5_paper, autoattack, runs
from experiments.a5_presets import Config
from rdx import models, plotting
from rdx.evaluate import Evaluation, records, report

RECIPES = {"offline": "A5/O", "online": "A5/R", "joint": "A5/RC"}
_PAPER_TABLES = {
    "mnist": {"base": 2, "offline": 3, "online": 4, "joint": 5}, "cifar10": {"offline": 6, "online": 7, "joint": 8},
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell: a recipe and the four radii of the paper's notation; `repeat` is added to the seed of its trainings."""

    recipe: str
    eps_attack: float
    eps_classifier: float
    eps_robustify: float
    eps_defense: float
    repeat: int = 0

    @property
    def name(self) -> str:
        """The record's name."""
        return f"{self.training}-A{self.eps_attack:.4g}"

    @property
    def training(self) -> str:
        """The name of what is trained, which does not depend on the attacker's radius."""
        name = f"{self.recipe}-C{self.eps_classifier:.4g}"
        defended = "" if self.recipe == "base" else f"-R{self.eps_robustify:.4g}-D{self.eps_defense:.4g}"
        return name + defended + nth(self.repeat)


def nth(repeat: int) -> str:
    """Names what is trained once more."""
    return f"-S{repeat}" if repeat else ""


def cells(config: Config) -> Iterator[Cell]:
    """Lists all cells, base classifiers first and A5/RC after the A5/R that it starts from; then other seeds."""
    for repeat in range(config.num_seeds):
        for cell in _once(config):
            yield dataclasses.replace(cell, repeat=repeat)


def _once(config: Config) -> Iterator[Cell]:
    pairs = [(attack, classifier) for attack in config.eps_attack for classifier in config.eps_classifier]
    for attack, classifier in pairs:
        yield Cell("base", attack, classifier, 0.0, 0.0)
    for recipe in RECIPES:
        for attack, classifier in pairs:
            for robustify in config.eps_robustify or (attack,):
                for defense in config.eps_defense:
                    if defense == 0.0 and recipe != "joint":
                        continue  # that is the base classifier
                    yield Cell(recipe, attack, classifier, robustify, defense)


def line(summary: Mapping[str, Any]) -> str:
    """Formats a cell's errors for the console."""
    return f"{report.cell(summary)} on {summary['clean']['total']} images, certified error on all " \
        f"{summary['certified_all']['total']}: {report.percent(summary['certified_all'])} %"


def write(directory: Path, config: Config) -> Path:
    """Writes `table.md` and the pictures from the records that exist; returns the directory."""
    read = {cell: records.read(directory / "records", cell.name) for cell in cells(config)}
    everything = {cell: pair[0] for cell, pair in read.items() if pair is not None}
    found = {cell: record for cell, record in everything.items() if not cell.repeat}
    results = {cell: pair[1] for cell, pair in read.items() if pair is not None and not cell.repeat}
    parts = [
        _heading(config, found), *_tables(config, found), *_over_seeds(everything), *_compared(found),
        *_paired(results), _notes(config),
    ]
    text = "\n\n".join(parts)
    runs.publish(directory, text, everything.values())
    if not runs.can_draw():
        return directory
    _draw_errors(directory, config, found)
    for cell in found:
        _draw_triplets(directory, cell)
    print(f"Pictures: {directory}/*.png", flush=True)
    return directory


def _heading(config: Config, found: Mapping[Cell, Mapping[str, Any]]) -> str:
    data = [record["data"] for record in found.values()]
    size = max((entry["size"] for entry in data), default=0)
    few = f"; of A5/O, on the first {config.num_offline}, which is all that it optimises" if config.num_offline else ""
    seeds = "one run" if config.num_seeds == 1 else f"the first of {config.num_seeds} but where it says otherwise"
    sizes = f"{data[0]['train_size']} training and {size} test images; seed {config.seed}, {seeds}. " if data else ""
    return (
        f"# A5 on {config.dataset}, preset `{config.preset}`\n\n"
        f"Errors in percent: clean [attacked, certified], all three counted on the first "
        f"{min(config.num_attacked, size) if data else config.num_attacked} test images; \"all\" is "
        f"the certified error on the whole test set, by CROWN-IBP and IBP together (in parentheses: by IBP "
        f"alone){few}. \"8 bits\" is the same by both after the defended images were rounded to 8 bits, inside the "
        f"defender's ball; PSNR and SSIM of the defended images are medians.\n"
        f"{sizes}Classifier: {describe(config.classifier)}. Robustifier: {describe(config.robustifier)}."
    )


def describe(module: Any) -> str:
    """Describes a network by its layers."""
    convs = "-".join(f"conv{c.channels}({c.kernel}x{c.kernel}, s{c.stride})" for c in module.convs)
    if isinstance(module, models.Robustifier):
        return convs
    return f"{convs}-" + "-".join(f"fc{width}" for width in (*module.dense, module.num_classes))


def _tables(config: Config, found: Mapping[Cell, Mapping[str, Any]]) -> Iterator[str]:
    for recipe, title in {"base": "Base classifiers", **RECIPES}.items():
        chosen = {cell: record for cell, record in found.items() if cell.recipe == recipe}
        if not chosen:
            continue
        number = _PAPER_TABLES.get(config.dataset, {}).get(recipe)
        header = [
            "eps_A", "eps_A^C", "eps_A^R", "eps_D", "clean [attacked, certified]", "paper", "all (IBP)", "8 bits",
            "PSNR, SSIM", "epochs",
        ]
        epochs = str(getattr(config, recipe).epochs)
        rows = [[*_radii(cell), *_results(config, cell, record), epochs] for cell, record in chosen.items()]
        layout = f" (layout of Table {number})" if number else ""
        yield f"## {title}{layout}\n\n{report.markdown(header, rows)}"


def _radii(cell: Cell) -> list[str]:
    shown = [_radius(cell.eps_attack), _radius(cell.eps_classifier)]
    if cell.recipe == "base":
        return [*shown, "-", "-"]
    return [*shown, _radius(cell.eps_robustify), _radius(cell.eps_defense)]


def _radius(eps: float) -> str:
    return f"{round(255 * eps)}/255" if abs(255 * eps - round(255 * eps)) < 1e-6 and eps < 0.13 else f"{eps:g}"


def _results(config: Config, cell: Cell, record: Mapping[str, Any]) -> list[str]:
    summary = record["summary"]
    radii = {name: value for name, value in dataclasses.asdict(cell).items() if name.startswith("eps")}
    quoted = a5_paper.quote(config.dataset, cell.recipe, **radii)
    paper = "-" if quoted is None else "{:.2f} [{:.2f}, {:.2f}]".format(*quoted)
    everything = f"{report.percent(summary['certified_all'])} ({100 * record['certified_all_by_ibp']:.2f})"
    if cell.recipe == "base":
        return [report.cell(summary), paper, everything, "-", "-"]
    similarity = f"{record['median_psnr']:.1f} dB, {record['median_ssim']:.2f}"
    return [report.cell(summary), paper, everything, report.percent(record["in_8_bits"]), similarity]


def _over_seeds(everything: Mapping[Cell, Mapping[str, Any]]) -> Iterator[str]:
    """Lays out mean and standard deviation of the errors of cells that were trained from several seeds."""
    groups: dict[Cell, list[Mapping[str, Any]]] = {}
    for cell, record in everything.items():
        groups.setdefault(dataclasses.replace(cell, repeat=0), []).append(record["summary"])
    rows = []
    for cell, summaries in groups.items():
        if len(summaries) > 1:
            errors = [[100 * s[name]["value"] for s in summaries] for name in ("clean", "attacked", "certified")]
            errors.append([100 * s["certified_all"]["value"] for s in summaries])
            spread = [f"{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}" for values in errors]
            rows.append([RECIPES.get(cell.recipe, "base"), *_radii(cell), str(len(summaries)), *spread])
    if rows:
        header = ["recipe", "eps_A", "eps_A^C", "eps_A^R", "eps_D", "seeds", "clean", "attacked", "certified", "all"]
        yield f"## Errors over seeds, mean and standard deviation\n\n{report.markdown(header, rows)}"


def _compared(found: Mapping[Cell, Mapping[str, Any]]) -> Iterator[str]:
    """Lays out the certified errors by method, all on the same images."""
    header = ["recipe", "eps_A", "eps_A^C", "eps_A^R", "eps_D", *a5_certificates.METHODS]
    rows = [
        [RECIPES.get(cell.recipe, "base"), *_radii(cell), *map(report.percent, record["compared"].values())]
        for cell, record in found.items()
    ]
    totals = {record["compared"]["IBP"]["total"] for record in found.values()}
    if rows:
        yield (
            f"## Certified error by method\n\nOn the first {max(totals)} test images of each cell; CROWN-IBP is "
            f"intersected with IBP, alpha-CROWN has CROWN's hidden bounds and {a5_certificates.ALPHA_STEPS} steps for "
            f"the slopes of the margins.\n\n{report.markdown(header, rows)}"
        )


def _paired(results: Mapping[Cell, Evaluation]) -> Iterator[str]:
    """Compares each defended cell with the base classifier and with the recipe before it, image by image."""
    rows = []
    for cell, here in results.items():
        for recipe in {"base": (), "joint": ("base", "online")}.get(cell.recipe, ("base",)):
            radii = {"eps_robustify": 0.0, "eps_defense": 0.0} if recipe == "base" else {}
            there = results.get(dataclasses.replace(cell, recipe=recipe, **radii))
            if there is not None:
                counts = report.paired(here.certified, there.certified)
                rows.append([RECIPES[cell.recipe], *_radii(cell), RECIPES.get(recipe, "base"), *counts])
    if rows:
        header = ["recipe", "eps_A", "eps_A^C", "eps_A^R", "eps_D", "compared with", *report.PAIRED]
        yield f"## The same test images, certified with one recipe and another\n\n{report.markdown(header, rows)}"


def _notes(config: Config) -> str:
    return (
        f"Attacked: {autoattack.described(config.attack_steps, config.attack_queries)}, on every correct one of these "
        "images that is not certified; "
        f"{config.cross_check} certified images are attacked as well, and none was broken, or there would be no table. "
        "The attacker sees the defended image and the classifier, and does not run the defender again, as in the "
        f"paper. A5/O knows the label and optimises the test images themselves; \"epochs\" are its updates per image."
        f"{'' if config.has_crown else ' A5/R and A5/RC were trained by intervals alone, without CROWN-IBP.'}\n\n"
        "The paper's column is quoted as printed: its networks are larger and trained longer, its certified error is "
        "that of IBP, and all its columns are counted on the whole test set."
        + ("" if config.preset == "paper" else " Nothing here is a reproduction of it; the ordering is what compares.")
    )


def _draw_errors(directory: Path, config: Config, found: Mapping[Cell, Mapping[str, Any]]) -> None:
    """Draws certified error against eps_D, one picture for each attacker, classifier and eps_A^R."""
    counted = "whole test set" + (f" (A5/O: {config.num_offline} images)" if config.num_offline else "")
    for base, record in found.items():
        if base.recipe != "base":
            continue
        for robustify in config.eps_robustify or (base.eps_attack,):
            series, intervals = {}, {}
            for recipe, title in RECIPES.items():
                wanted = dataclasses.replace(base, recipe=recipe, eps_robustify=robustify)
                points = [c for c in found if dataclasses.replace(c, eps_defense=0.0) == wanted]
                if not points:
                    continue
                rates = [found[cell]["summary"]["certified_all"] for cell in points]
                series[title] = ([cell.eps_defense for cell in points], [100 * rate["value"] for rate in rates])
                intervals[title] = ([100 * rate["low"] for rate in rates], [100 * rate["high"] for rate in rates])
            plotting.curves(
                directory / f"certified-C{base.eps_classifier:.4g}-R{robustify:.4g}-A{base.eps_attack:.4g}.png", series,
                x_label="eps_D, budget of the defender", y_label="certified error, %", intervals=intervals,
                heading=f"{config.dataset}: eps_A = {_radius(base.eps_attack)}, "
                f"eps_A^C = {_radius(base.eps_classifier)}, {counted}",
                baseline=("base classifier", 100 * record["summary"]["certified_all"]["value"]),
            )


def _draw_triplets(directory: Path, cell: Cell) -> None:
    if cell.recipe == "base":
        return
    with np.load(directory / "records" / f"{cell.name}-images.npz") as images:
        original, defended = images["original"] / np.float32(255), images["defended"].astype(np.float32)
        titles = [
            f"{label} {'certified' if ok else 'not certified'}"
            for label, ok in zip(images["label"], images["certified"], strict=True)
        ]
    plotting.triplets(
        directory / f"{cell.name}.png", original, defended, titles=titles, eps=cell.eps_defense,
        heading=f"{RECIPES[cell.recipe]}, eps_D = {_radius(cell.eps_defense)}, eps_A = {_radius(cell.eps_attack)}: "
        "original, robustified, perturbation",
    )
