"""The table and the pictures of `experiments.tramer_detectors`, made from its records."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.detectors_presets import Config
from experiments.tramer_runs import percent
from rdx import plotting
from rdx.detect import thresholds
from rdx.evaluate import records, report


def write(directory: Path, config: Config, detectors: Mapping[str, str], reductions: Mapping[str, str]) -> Path:
    """Writes `table.md` and the pictures from the records that exist; returns the directory.

    Args:
        directory: of the run.
        config: its settings.
        detectors: names of detectors, with those of their records.
        reductions: names of reductions, likewise.
    """
    found = _read(directory, detectors)
    reduced = {name: record for name, (record, _) in _read(directory, reductions).items()}
    text = "\n\n".join([_heading(config, found), *_sections(config, found), *_reductions(reduced)])
    report.write_text(directory / "table.md", text)
    print(text)
    print(f"Table: {directory / 'table.md'}", flush=True)
    if found and importlib.util.find_spec("matplotlib") is not None:
        _draw(directory, config, found)
    return directory


def _read(directory: Path, names: Mapping[str, str]) -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]:
    read = {name: records.read_arrays(directory / "records", file) for name, file in names.items()}
    return {name: pair for name, pair in read.items() if pair is not None}


def _heading(config: Config, found: Mapping[str, Any]) -> str:
    first = next((record for record, _ in found.values()), None)
    sizes = "" if first is None else (
        f"{first['data']['train_size']} training, {first['data']['held_out_size']} held-out and "
        f"{first['summary']['num_images']} test images, clean error {percent(first['summary']['clean_error'])} %, "
    )
    return (
        f"# Detectors on {config.dataset}, preset `{config.preset}`\n\n{sizes}linf radius {config.eps:g}, thresholds "
        f"at {percent(config.fpr)} % false positives on held-out images, seed {config.seed}, one run. All percentages."
    )


def _sections(config: Config, found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    header = ["detector", "false positives", "PGD: fools", "detected", "AUROC", "FMN: detected",
              "adaptive: detected", "strongest attacks"]
    rows = [_row(name, record) for name, (record, _) in found.items()]
    audits = ["detector", "fixed: claimed >=", "verdict", "adaptive: left", "verdict", "transport limit"]
    judged = [_audit_row(name, record["audits"]) for name, (record, _) in found.items()]
    return [
        "## Detection at a fixed false-positive rate\n\n" + report.markdown(header, rows),
        "Fixed attacks know the classifier alone: detected is the share of the images that fool it. Adaptive attacks "
        "know the detector, and the worst of them counts for each image: detected is the share of correct, accepted "
        f"images that none of them brings past it at radius {config.eps:g}.",
        "## Audit\n\n" + report.markdown(audits, judged),
        "Claimed: by Equation 4 from the rates against fixed attacks, `1 - FPR - FNR - clean error`, with the worse of "
        "the two. Left: one minus the robust risk with detection under adaptive attacks. Both are claims about "
        f"classifiers at radius {config.eps / 2:g}; no classifier exceeds the transport limit on these images there.",
    ]


def _row(name: str, record: Mapping[str, Any]) -> list[str]:
    summary = record["summary"]
    broken = sorted(record["broken_by"].items(), key=lambda item: -item[1])
    strongest = ", ".join(f"{attack} {count}" for attack, count in broken[:3] if count)
    return [
        name, percent(summary["fpr"]), percent(summary["pgd"]["fooled"]), percent(summary["pgd"]["detection"]),
        percent(summary["pgd"]["auroc"]), percent(summary["fmn"]["detection"]),
        f"**{percent(summary['adaptive']['detection'])}**", strongest or "-",
    ]


def _audit_row(name: str, audits: Mapping[str, Any]) -> list[str]:
    fixed, adaptive = audits["fixed"], audits["adaptive"]
    verdicts = [
        "impossible" if audit["is_impossible"] else audit["verdict"] for audit in (fixed, adaptive)
    ]
    limit = "-" if fixed["limit"] is None else percent(fixed["limit"])
    return [name, percent(fixed["accuracy"]), verdicts[0], percent(adaptive["accuracy"]), verdicts[1], limit]


def _reductions(reduced: Mapping[str, Any]) -> list[str]:
    sections = []
    if "theorem 5" in reduced:
        record = reduced["theorem 5"]
        shares, eps = record["shares"], record["eps"]
        rows = [
            [f"classifier, robust risk at {eps / 2:g} (PGD)", percent(shares["robust"])],
            [f"classifier alone, PGD at {eps:g}", percent(shares["bare"])],
            ["detector, clean risk (the bound)", percent(shares["clean"])],
            [f"detector, evaded by PGD on the classifier at {eps:g}", percent(shares["transferred"])],
            [f"detector, evaded by PGD through its search at {eps:g}", percent(shares["adaptive"])],
            ["... because the search missed a witness", percent(shares["missed"])],
            [f"... because the classifier fails within {eps / 2:g}", percent(shares["failed"])],
            ["detector, risk with detection under both", f"**{percent(shares['lost'])}**"],
        ]
        sections.append(
            "## Theorem 5: a detector from an adversarially trained classifier\n\n"
            + report.markdown(["what", "share"], rows)
        )
    if "theorem 4" in reduced:
        record = reduced["theorem 4"]
        shares, eps = record["shares"], record["eps"]
        rows = [
            ["detector, clean risk", percent(shares["detector clean"])],
            ["classifier, clean risk", percent(shares["clean wrong"])],
            [f"detector, risk with detection at {eps:g} (adaptive suite)", percent(shares["detector lost"])],
            ["... with the failures that explanations add", percent(shares["detector lost or explained"])],
            [f"classifier, wrong under PGD through the search at {eps / 2:g}", percent(shares["attacked wrong"])],
            [f"classifier, wrong under the attack on the search at {eps / 2:g}", percent(shares["search wrong"])],
            ["classifier, wrong under any", f"**{percent(shares['wrong'])}**"],
            ["misses of the search", percent(shares["missed"])],
            ["explanations that are valid failures of the detector",
             f"{record['num_valid']} of {record['num_explained']}"],
        ]
        sections.append(
            "## Theorem 4: a classifier from maximum softmax on that classifier\n\n"
            + report.markdown(["what", "share"], rows)
        )
    return sections


def _draw(directory: Path, config: Config, found: Mapping[str, Any]) -> None:
    summaries = {name: record["summary"] for name, (record, _) in found.items()}
    series = {
        "PGD on the classifier": [100 * summary["pgd"]["detection"] for summary in summaries.values()],
        "FMN on the classifier": [100 * summary["fmn"]["detection"] for summary in summaries.values()],
        "adaptive, worst case": [100 * summary["adaptive"]["detection"] for summary in summaries.values()],
    }
    plotting.bars(
        directory / "detection.png", list(summaries), series, y_label="detected, %",
        heading=f"{config.dataset}, linf {config.eps:g}, {percent(config.fpr)} % false positives",
    )
    curves = {}
    for name, (_, arrays) in found.items():
        is_right = arrays["clean prediction"] == arrays["label"]
        is_fooled = is_right & (arrays["pgd prediction"] != arrays["label"])
        curve = thresholds.roc(arrays["clean score"][is_right], arrays["pgd score"][is_fooled])
        curves[name] = (100 * curve.fpr, 100 * curve.tpr)
    plotting.receiver(directory / "roc.png", curves, heading=f"{config.dataset}: PGD that does not know the detector")
    print(f"Pictures: {directory}/*.png", flush=True)
