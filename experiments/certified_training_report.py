"""The tables of `experiments.certified_training`, made from its records."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import autoattack, runs
from experiments.certified_training_presets import Config, Method
from rdx.evaluate import ContradictionError, Evaluation, records, report

# Natural and certified accuracy in percent on MNIST at linf radius 0.1 and 0.3, with each source's own network. A star:
# quoted from memory, to be checked against the paper before anybody relies on it.
REFERENCES: dict[str, tuple[str, str, str]] = {
    "ibp": ("98.94 / 97.08", "98.34 / 91.79", "Gowal et al. 2018, their code"),
    "crown_ibp": ("98.83 / 97.76", "98.18 / 92.98", "Zhang et al. 2020"),
    "fused": ("-", "-", "Xu et al. 2020 have no MNIST row"),
    "fast_ibp": ("98.84 / 97.95 *", "97.67 / 93.10 *", "Shi et al. 2021"),
    "sabr": ("99.23 / 98.22 *", "98.75 / 93.40 *", "Mueller et al. 2023"),
    "taps": ("99.19 / 98.39 *", "97.94 / 93.62 *", "Mao et al. 2023"),
    "staps": ("99.15 / 98.37 *", "98.53 / 93.51 *", "Mao et al. 2023"),
    "mtl_ibp": ("99.25 / 98.38 *", "98.80 / 93.62 *", "De Palma et al. 2024"),
    "cc_ibp": ("-", "-", "De Palma et al. 2024"),
    "exp_ibp": ("-", "-", "De Palma et al. 2024"),
    "convex_outer": ("98.20 / 94.18 *", "-", "Wong & Kolter 2018"),
    "linf_distance": ("98.93 / 97.95", "98.56 / 93.20", "Zhang et al. 2022, their code"),
}


def slug(method: Method, weight: float | None = None) -> str:
    """Names a method's record."""
    name = method.name.lower().replace(",", "").replace(" ", "-")
    return name if weight is None else f"{name}-{weight:g}"


def line(summary: Mapping[str, Any]) -> str:
    """Formats a record's accuracies for the console."""
    _check(summary)
    natural, certified = (100 * (1 - summary[name]["value"]) for name in ("clean_all", "certified_all"))
    return f"natural {natural:.2f}, certified {certified:.2f} of {summary['clean_all']['total']}"


def write(directory: Path, config: Config) -> Path:
    """Writes `table.md` from the records that exist; returns the directory."""
    read = {method: records.read(directory / "records", slug(method)) for method in config.methods}
    found = {method: pair for method, pair in read.items() if pair is not None}
    parts = [_heading(config, found), _main(found, config), _paired(found), _references(found), _notes(config)]
    text = "\n\n".join(parts)
    runs.publish(directory, text, (record for record, _ in found.values()))
    return directory


def write_tuning(directory: Path, config: Config) -> Path:
    """Writes `table.md` of the candidates, on held-out images; returns the directory."""
    rows = []
    for method in config.methods:
        for weight in method.candidates:
            if (pair := records.read(directory / "records", slug(method, weight))) is not None:
                natural, certified = (
                    100 * (1 - pair[0]["summary"][name]["value"]) for name in ("clean_all", "certified_all")
                )
                is_chosen = "chosen" if weight == method.weight else ""
                rows.append([method.name, f"{weight:g}", f"{natural:.2f}", f"{certified:.2f}",
                             f"{natural + certified:.2f}", is_chosen])
    header = ["method", "weight", "natural", "certified", "sum", "in the presets"]
    text = f"# Hyper-parameters on held-out images of {config.dataset}, preset `{config.preset}`\n\n" \
        f"Accuracies in percent on {config.num_held_out} training images that nothing was trained on, after training " \
        f"on {config.num_train or 'all other'} images; seed {config.seed}.\n\n{report.markdown(header, rows)}"
    report.write_text(directory / "table.md", text)
    print(text, flush=True)
    return directory


def _check(summary: Mapping[str, Any]) -> None:
    counts = [summary[name]["count"] for name in ("clean", "attacked", "certified")]
    if counts != sorted(counts):
        raise ContradictionError(f"Errors must rise from clean to attacked to certified, got counts {counts}.")


def _heading(config: Config, found: Mapping[Method, tuple[dict[str, Any], Evaluation]]) -> str:
    first = next(iter(found.values()), None)
    sizes = "" if first is None else (
        f"{first[0]['data']['train_size']} training, {first[0]['data']['held_out_size']} held-out, "
        f"{first[0]['data']['size']} test images; "
    )
    return (
        f"# Certified training on {config.dataset} at linf radius {config.eps:g}, preset `{config.preset}`\n\n{sizes}"
        f"{config.epochs} epochs unless the row says otherwise, seed {config.seed}, one run. Accuracies in percent."
    )


def _main(found: Mapping[Method, tuple[dict[str, Any], Evaluation]], config: Config) -> str:
    subset = [f"{name}, first {config.num_attacked}" for name in ("natural", "attacked", "certified")]
    header = ["method", "weight", "trained at", "network", "epochs", "natural", "certified", "by intervals alone",
              "more by CROWN-IBP", "more by CROWN", *subset]
    rows = []
    for method, (record, _) in found.items():
        summary, settings = record["summary"], record["config"]
        _check(summary)
        name = f"{method.name} (collapsed)" if report.is_collapsed(summary) else method.name
        rows.append([
            name, "-" if method.weight is None else f"{method.weight:g}", f"{method.radius * config.eps:g}",
            _network(record, method), _effort(method, settings), *_accuracies(summary, "clean_all", "certified_all"),
            *_by_verifier(record["certified_by"]), *_accuracies(summary, "clean", "attacked", "certified"),
        ])
    return report.markdown(header, rows)


def _by_verifier(shares: Mapping[str, float]) -> list[str]:
    return [f"{100 * shares[name]:.2f}" if name in shares else "-" for name in ("ibp", "crown_ibp", "crown")]


def _effort(method: Method, settings: Mapping[str, Any]) -> str:
    epochs = str(method.epochs or settings["epochs"])
    return epochs if method.num_train is None else f"{epochs} of {method.num_train} images"


def _network(record: Mapping[str, Any], method: Method) -> str:
    if method.kind == "linf_distance":
        return "distances"
    is_plain = "BatchNorm" not in record["network"]
    return ("own" if method.net is not None else "conv") + ("" if is_plain else " + BatchNorm")


def _accuracies(summary: Mapping[str, Any], *names: str) -> list[str]:
    return [f"{100 * (1 - summary[name]['value']):.2f}" for name in names]


def _paired(found: Mapping[Method, tuple[dict[str, Any], Evaluation]]) -> str:
    base = next((pair[1] for method, pair in found.items() if method.kind == "ibp"), None)
    if base is None:
        return ""
    header = ["method", *report.PAIRED]
    rows = [
        [method.name, *report.paired(result.certified, base.certified)]
        for method, (_, result) in found.items() if method.kind != "ibp"
    ]
    return "## The same test images, certified by this net and by that of IBP\n\n" + report.markdown(header, rows)


def _references(found: Mapping[Method, Any]) -> str:
    header = ["method", "paper, MNIST 0.1", "paper, MNIST 0.3", "source"]
    rows = [[method.name, *REFERENCES[method.kind]] for method in found]
    return "## Natural / certified accuracy in the papers\n\n" + report.markdown(header, rows)


def _notes(config: Config) -> str:
    return (
        "Natural and certified accuracy are those of all test images; the last three columns count the first "
        f"{config.num_attacked}. Attacked: {autoattack.described(config.num_steps, config.num_queries)} on every "
        f"correct image that is not "
        f"certified; {config.cross_check} certified images are attacked as well, and none was broken, or there would "
        "be no table. "
        "Certified: confirmed in float64 with a proved allowance for rounding. Networks with BatchNorm start from "
        "Fast-IBP's initialisation, those without from flax's: what they gain is in every row that says so. SABR, "
        "TAPS, STAPS and the expressive losses have Fast-IBP's penalties while the radius rises and, but for TAPS, an "
        "L1 penalty throughout; as in the authors' commands for MNIST at 0.1, all of these but SABR train at twice the "
        "radius that is certified.\n\n"
        "The papers' networks are larger (CNN7 with BatchNorm; 5 layers of 5120 distances) and trained for 70 epochs "
        "and more, their certificates come from tighter verifiers for SABR, TAPS and the expressive losses, and they "
        "count the whole test set. Numbers with a star are quoted from memory."
        + ("" if config.preset == "paper" else " Nothing here is a reproduction.")
    )
