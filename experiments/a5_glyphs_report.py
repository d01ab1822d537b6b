"""The table and the pictures of `experiments.a5_glyphs`, made from its records."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import a5_paper, a5_report, autoattack, runs
from experiments.a5_glyphs_presets import Config
from rdx import plotting
from rdx.evaluate import Evaluation, records, report

RECIPES = {
    "vanilla": "vanilla", "base": "certified (CROWN-IBP)", "p": "A5/P", "control": "certified, trained on as A5/PC",
    "pc": "A5/PC", "prc": "A5/PRC",
}
_EPOCHS = {
    "vanilla": ("vanilla",), "base": ("base",), "p": ("base", "prototypes"), "control": ("base", "retrained"),
    "pc": ("base", "retrained"), "prc": ("base", "retrained", "robustified"),
}
# Which rows are compared picture by picture.
_PAIRS = (("base", "vanilla"), ("p", "base"), ("pc", "p"), ("pc", "control"), ("prc", "pc"))


def line(summary: Mapping[str, Any]) -> str:
    """Formats a row's errors for the console."""
    return f"{report.cell(summary)} on {summary['clean']['total']} pictures, certified error on all " \
        f"{summary['certified_all']['total']}: {report.percent(summary['certified_all'])} %"


def write(directory: Path, config: Config) -> Path:
    """Writes `table.md` and the pictures from the records that exist; returns the directory."""
    read = {recipe: records.read(directory / "records", recipe) for recipe in RECIPES}
    found = {recipe: pair for recipe, pair in read.items() if pair is not None}
    summaries = {recipe: record for recipe, (record, _) in found.items()}
    parts = (_heading(config), _table(config, summaries), _paired(found), _notes(config))
    text = "\n\n".join(part for part in parts if part)
    runs.publish(directory, text, summaries.values())
    if not runs.can_draw():
        return directory
    for recipe in found:
        if recipe in {"p", "pc", "prc"}:
            _draw(directory, config, recipe)
            print(f"Picture: {directory / recipe}.png", flush=True)
    return directory


def _heading(config: Config) -> str:
    return (
        f"# A5 for physical objects, preset `{config.preset}`\n\n"
        f"62 characters in {config.font}, {config.size} x {config.size} pixels, each photographed {config.num_test} "
        f"times ({config.split} pictures; no training saw them). eps_A = eps_A^C = {config.eps_attack:g}, eps_D = "
        f"{config.eps_defense:g}, of A5/PRC's robustifier {config.eps_picture:g}. Seed {config.seed}, one run. "
        f"Classifier: {a5_report.describe(config.classifier)}."
    )


def _table(config: Config, found: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["", "clean [attacked, certified]", "paper: clean [certified]", "all: clean [certified (IBP)]", "epochs"]
    rows = []
    for recipe, record in found.items():
        summary, quoted = record["summary"], a5_paper.GLYPHS.get(recipe)
        rows.append([
            RECIPES[recipe], report.cell(summary), "-" if quoted is None else "{:.2f} [{:.2f}]".format(*quoted),
            f"{report.percent(summary['clean_all'])} [{report.percent(summary['certified_all'])} "
            f"({100 * record['certified_all_by_ibp']:.2f})]",
            " + ".join(str(getattr(config, name).epochs) for name in _EPOCHS[recipe]),
        ])
    return (
        f"## Errors in percent (layout of Table 9)\n\n{report.markdown(header, rows)}\n\n"
        f"The first column counts the first {config.num_attacked} pictures, \"all\" counts every one."
    )


def _paired(found: Mapping[str, tuple[Mapping[str, Any], Evaluation]]) -> str:
    header = ["", "compared with", *report.PAIRED]
    rows = []
    for here, there in _PAIRS:
        if here in found and there in found:
            counts = report.paired(found[here][1].certified, found[there][1].certified)
            rows.append([RECIPES[here], RECIPES[there], *counts])
    return f"## The same pictures, certified pair by pair\n\n{report.markdown(header, rows)}" if rows else ""


def _notes(config: Config) -> str:
    return (
        f"An epoch is {config.num_train} new pictures of each character. Attacked: "
        f"{autoattack.described(config.attack_steps, config.attack_queries)} on every correct picture that is not "
        f"certified; {config.cross_check} certified ones are attacked as well, and none was broken, or there would be "
        "no table. "
        "Certified by CROWN-IBP and IBP together, in parentheses by IBP alone.\n\n"
        "The paper's column is quoted as printed: its characters are Comic Sans at 128 x 128 pixels, its network is "
        "larger, and its certified error is that of IBP. It trains its certified classifier without loss fusion."
        + ("" if config.has_crown else " A5/PC and A5/PRC are trained by intervals alone, without CROWN-IBP.")
        + ("" if config.preset == "paper" else " Nothing here is a reproduction of it; the ordering is what compares.")
    )


def _draw(directory: Path, config: Config, recipe: str) -> None:
    with np.load(directory / "records" / f"{recipe}-images.npz") as images:
        original, defended = images["original"] / np.float32(255), images["defended"].astype(np.float32)
        picture = images["picture"].astype(np.float32)
    plotting.strips(
        directory / f"{recipe}.png", {
            "robustified": 1.0 - defended, "prototype": 1.0 - original,
            "difference": 0.5 - 0.5 * (defended - original) / config.eps_defense, "photographed": picture,
        }, heading=f"{RECIPES[recipe]}: ink on paper; differences from -{config.eps_defense:g} to "
        f"{config.eps_defense:g}, dark where ink is added",
    )
