"""The table and the pictures of `experiments.attack_gallery`, made from its records."""

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.gallery_attacks import Case, cases
from experiments.gallery_presets import Config
from rdx import metrics, plotting
from rdx.evaluate import curves, records, report
from rdx.evaluate.curves import Curve

NETS = ("undefended", "robust")
_TITLES = {"undefended": "Undefended", "robust": "Adversarially trained"}
# Dong et al. (2020, Table 3), CIFAR-10, linf, untargeted: median minimal distance and accuracy in percent at 8/255, of
# their Res-56 and PGD-AT. Quoted as printed; `pgd` here has the random start that BIM lacks.
_PAPER = {
    "fgsm": ((0.005, 21.6), (0.039, 56.0)), "bim": ((0.002, 0.0), (0.030, 48.3)),
    "mim": ((0.003, 0.0), (0.032, 50.9)), "deepfool": ((0.003, 0.0), (0.040, 56.5)),
    "nes": ((0.004, 0.0), (0.048, 65.5)), "spsa": ((0.003, 0.0), (0.042, 61.1)),
    "nattack": ((0.002, 0.0), (0.030, 48.6)),
}


class Found(NamedTuple):
    """What the records say of one attack on one net; `eps` is None where no minimal distance is defined."""

    case: Case
    record: Mapping[str, Any]
    strength: Curve
    eps: Curve | None


def grid(eps: float) -> tuple[float, ...]:
    """Lists the radii at which attacks are run besides the search: quarters of `eps`, up to twice as much."""
    return tuple(eps * quarters / 4 for quarters in range(1, 9))


def write(directory: Path, config: Config) -> Path:
    """Writes `table.md` and the pictures from the records that exist; returns the directory.

    The table holds no times, so that an interrupted run ends with the same one; the records and the console do.
    """
    found = {net: list(_read(directory / "records", config, net)) for net in NETS}
    sections = [part for net in NETS for part in (*_section(config, net, found[net]), *_diagnosis(directory, net))]
    report.write_text(directory / "table.md", "\n\n".join([_heading(config, found), *sections, _notes(config)]))
    print((directory / "table.md").read_text())
    seconds = sum(row.record["seconds"] for rows in found.values() for row in rows)
    print(f"Table: {directory / 'table.md'}\n{seconds / 60:.0f} minutes of attacks", flush=True)
    if importlib.util.find_spec("matplotlib") is None:
        print("No pictures: matplotlib is not installed. They can be made from the records elsewhere.")
        return directory
    for net in NETS:
        for norm, eps in config.radii:
            rows = [row for row in found[net] if row.case.norm == norm]
            if rows:
                _draw(directory, config, net, norm, eps, rows)
    print(f"Pictures: {directory}/*.png", flush=True)
    return directory


def _read(directory: Path, config: Config, net: str) -> Iterator[Found]:
    for case in cases(config):
        read = curves.read(directory, f"{net}-{case.name}-strength")
        if read is None:
            continue
        searched = curves.read(directory, f"{net}-{case.name}-eps")
        if case.entry.is_minimal:
            yield Found(case, *read, curves.against_eps(read[1]))
        else:
            yield Found(case, *read, None if searched is None else searched[1])


def _heading(config: Config, found: Mapping[str, Sequence[Found]]) -> str:
    first = next((row.record["data"] for rows in found.values() for row in rows), None)
    sizes = "" if first is None else f"{first['train_size']} training and {first['size']} test images, "
    return (
        f"# Attacks on {config.dataset}, preset `{config.preset}`\n\n"
        f"{sizes}seed {config.seed}, one run. Both nets are attacked on the same images. The robust one was trained by "
        f"PGD with {config.train_steps} steps at linf radius {_radius(config.eps_train)}, {config.epochs} epochs."
    )


def diagnosis_name(net: str) -> str:
    """Names the record of what was found out about a net."""
    return f"{net}-diagnosis"


def _diagnosis(directory: Path, net: str) -> Iterator[str]:
    read = records.read_arrays(directory / "records", diagnosis_name(net))
    if read is not None:
        told, ball = read[0]["diagnosis"], f"{read[0]['norm']} {_radius(read[0]['eps'])}"
        rows = [[one["name"], one["status"], one["evidence"]] for one in told["checks"]]
        yield (
            f"### Whether to believe it: {told['status']}\n\n`rdx.evaluate.diagnose` at {ball}, on the first "
            f"{told['num_examples']} images.\n\n{report.markdown(['check', 'status', 'evidence'], rows)}"
        )


def _section(config: Config, net: str, rows: Sequence[Found]) -> Iterator[str]:
    quotes = config.dataset == "cifar10"
    header = [
        "attack", "kind", "norm", "eps", "clean", "robust accuracy", "median distance (search, grid)", "not monotone",
        "queries", *(["paper: median, accuracy"] if quotes else []),
    ]
    lines = []
    for norm, eps in config.radii:
        chosen = [row for row in rows if row.case.norm == norm]
        lines += [_row(row, net, quotes=quotes) for row in chosen]
        if chosen:
            lines.append(_worst_row(norm, eps, chosen, quotes=quotes))
    if rows:
        yield f"## {_TITLES[net]}\n\n{report.markdown(header, lines)}"


def _row(row: Found, net: str, *, quotes: bool) -> list[str]:
    case, stands = row.case, row.strength.is_correct & np.isinf(row.strength.details["queries"])
    falls = row.strength.is_correct & ~stands
    queries = f"{row.strength.details['queries'][falls].mean():.0f}" if falls.any() else "-"
    details = {} if row.eps is None else row.eps.details
    not_monotone = str(int((~details["is_monotone"]).sum())) if "is_monotone" in details else "-"
    quoted = _PAPER.get(case.entry.name) if case.norm == "linf" else None
    paper = "{:.3f}, {:.1f}".format(*quoted[NETS.index(net)]) if quoted else "-"
    return [
        case.entry.name, case.entry.kind, case.norm, _radius(case.eps), _percent(row.strength.is_correct),
        _percent(stands, with_interval=True), _distances(row.eps), not_monotone, queries, *([paper] if quotes else []),
    ]


def _worst_row(norm: str, eps: float, rows: Sequence[Found], *, quotes: bool) -> list[str]:
    is_correct = rows[0].strength.is_correct
    stands = is_correct & np.all([np.isinf(row.strength.details["queries"]) for row in rows], axis=0)
    known = [row.eps for row in rows if row.eps is not None]
    median = _distances(curves.worst_case(known)) if known else "-"
    robust = f"**{_percent(stands, with_interval=True)}**"
    return ["**worst case**", "", norm, _radius(eps), _percent(is_correct), robust, median, "", "",
            *([""] if quotes else [])]


def _distances(curve: Curve | None) -> str:
    if curve is None:
        return "-"
    found = [curve.threshold, *(curve.details[name] for name in ("searched", "on_grid") if name in curve.details)]
    text, *both = (f"{dataclasses.replace(curve, threshold=threshold).median():.3g}" for threshold in found)
    return f"{text} ({', '.join(both)})" if both else text


def _percent(flags: np.ndarray, *, with_interval: bool = False) -> str:
    rate = metrics.rate(flags)
    return f"{100 * rate.value:.1f}" + (f" [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" if with_interval else "")


def _radius(eps: float) -> str:
    return f"{round(255 * eps)}/255" if abs(255 * eps - round(255 * eps)) < 1e-6 and eps < 0.13 else f"{eps:g}"


def _notes(config: Config) -> str:
    return (
        "Robust accuracy in percent, with its 95 % Wilson interval: correct images that the attack leaves standing at "
        f"`eps`; white-box attacks take {config.num_steps} steps, score- and decision-based ones have "
        f"{config.num_queries} queries, AutoAttack has {config.suite_steps} steps and {config.suite_queries} queries "
        f"of Square; C&W and EAD take {config.penalty_steps} steps for a constant and {config.num_search_steps} "
        "constants, where their authors take 1,000 and 9, and are the weaker for it. Worst case: over all attacks "
        "above in that norm. Median distance: of the smallest perturbation "
        "known of each image, 0 for images that are wrong already; attacks of a fixed radius are run with "
        f"{config.search_steps} steps at radii found by doubling and {config.num_bisections} bisections (search) and "
        "at eight radii up to twice `eps` (grid), and \"not monotone\" counts the images that fall at one of the eight "
        "and stand at the next. Queries: forward passes and gradients until an image falls, mean over those that do. "
        "Minimal-norm and decision-based attacks run without a radius, and what they find within `eps` counts. "
        "Transfer attacks are made on a third net, trained as the robust one from another seed, or on the mean logits "
        "of it and a fourth. Success is judged by a fresh forward pass at full precision.\n\n"
        + ("The paper's column (Dong et al. 2020, Table 3) is of other weights: downloaded nets, 10,000 images."
           if config.dataset == "cifar10" else "The paper has no such data set: nothing here is a reproduction of it.")
    )


def _draw(directory: Path, config: Config, net: str, norm: str, eps: float, rows: Sequence[Found]) -> None:
    groups = {row.case.entry.name: row.case.entry.kind for row in rows}
    heading = f"{config.dataset}, {_TITLES[net].lower()} net, {norm}, {len(rows[0].strength.label)} images"
    radii = np.linspace(0.0, 3.0 * eps, 200)
    by_eps = {row.case.entry.name: row.eps for row in rows if row.eps is not None}
    if by_eps:
        plotting.accuracy_against_eps(
            directory / f"eps-{net}-{norm}.png", {name: (radii, _accuracy(c, radii)) for name, c in by_eps.items()},
            x_label=f"{norm} radius", heading=heading, groups=groups, marked=eps,
            worst=(radii, _accuracy(curves.worst_case(list(by_eps.values())), radii)),
        )
    most = max(int((row.strength.details["forwards"] + row.strength.details["gradients"]).max()) for row in rows)
    queries = np.unique(np.geomspace(1, max(most, 2), 200).round())
    plotting.accuracy_against_strength(
        directory / f"strength-{net}-{norm}.png",
        {row.case.entry.name: (queries, _accuracy(row.strength, queries)) for row in rows},
        x_label="queries (forward passes and gradients)", heading=f"{heading}, eps = {_radius(eps)}", groups=groups,
    )


def _accuracy(curve: Curve, values: np.ndarray) -> np.ndarray:
    """Computes the percentage that stands at each value."""
    stands = curve.is_correct[:, None] & (curve.threshold[:, None] > values[None])
    return 100.0 * stands.mean(axis=0)
