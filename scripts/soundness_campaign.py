"""Holds random points, corners and attacked points against the bounds of random functions, every method, all norms.

    python scripts/soundness_campaign.py --functions 630 --points 20000 --report experiments/results/soundness

A run appends one line for each function to `<out>/functions.jsonl` and goes on from there when it is started again; the
report counts what that file holds. Every function follows from its seed: to see one again, `--first-seed <seed>
--functions 1 --out <another folder>`. The functions are those of tests/bounds/random_functions.py, drawn from the table
of covered functions as it is in this commit; a small part of them runs in the tests. Exits with 1 on a violation or a
crash.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bounds"))

import random_functions as rf  # noqa: E402

from rdx import compilation  # noqa: E402
from rdx.bounds import UnsupportedPrimitiveError  # noqa: E402
from rdx.evaluate import records  # noqa: E402


def main():
    options = parse_arguments()
    path, start = options.out / "functions.jsonl", time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    done = {entry["seed"] for entry in read(path)}
    seeds = range(options.first_seed, options.first_seed + options.functions)
    for seed in (seed for seed in seeds if seed not in done):
        if options.seconds is not None and time.monotonic() - start > options.seconds:
            break
        compilation.spare_maps()
        entry = study(seed, options.points)
        append(path, entry)
        print(seed, entry["function"], f"{entry['seconds']:.1f} s", *violations(entry), flush=True)
    entries = [entry for entry in read(path) if entry["seed"] in seeds]
    if options.report is not None:
        options.report.mkdir(parents=True, exist_ok=True)
        result = summarize(entries)
        (options.report / "report.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.report / "report.md").write_text(table(result))
    return int(any(violations(entry) for entry in entries))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", type=int, default=630, help="number of seeds")
    parser.add_argument("--points", type=int, default=20_000, help="points for each function")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after the function that ends beyond this time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "soundness", help="where functions.jsonl lies")
    parser.add_argument("--report", type=Path, help="folder for report.md and report.json")
    return parser.parse_args()


def study(seed, num_points):
    """Makes the entry of one function: studied, refused for want of a rule (no violation), or crashed."""
    start = time.monotonic()
    try:
        problem, count, verdicts = rf.study(seed, num_points)
        entry = {"function": problem.description, "norm": problem.structure.norm, "points": count, "methods": verdicts}
    except Exception as error:  # noqa: BLE001 - a crash is a finding, and the other functions are to be studied
        kind = "refused" if isinstance(error, UnsupportedPrimitiveError) else "crashed"
        told = f"{type(error).__name__}: {error}"[:300]
        entry = {"function": rf.structure(seed // rf.VARIANTS).description, kind: told}
    return {"seed": seed, **entry, "seconds": round(time.monotonic() - start, 2)}


def append(path, entry):
    """Appends a line by a single write, so that an interruption leaves whole lines or a last one that is cut short."""
    line = (json.dumps(entry) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read(path):
    """Reads the entries; a last line that was cut short is removed, and its function studied again."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def violations(entry):
    """Names what contradicts the bounds of a function, by method."""
    found = [f"CRASH: {entry['crashed']}"] if "crashed" in entry else []
    for method, verdict in entry.get("methods", {}).items():
        if verdict["excess"] > rf.ROUNDING:
            found.append(f"VIOLATION of {method} by {verdict['excess']:.1e}")
        if verdict["is_finite"] and not verdict["is_ordered"]:
            found.append(f"VIOLATION: {method} is outside of IBP")
    return found


def summarize(entries):
    """Counts, for each method and in all."""
    studied = [entry for entry in entries if "methods" in entry]
    methods = {}
    for method in sorted({method for entry in studied for method in entry["methods"]}):
        verdicts = [(entry, entry["methods"][method]) for entry in studied if method in entry["methods"]]
        finite = [verdict for _, verdict in verdicts if verdict["is_finite"]]
        methods[method] = {
            "functions": len(verdicts),
            "points": sum(entry["points"] for entry, _ in verdicts),
            "not_finite": len(verdicts) - len(finite),
            "violations": sum(verdict["excess"] > rf.ROUNDING for _, verdict in verdicts),
            "outside_ibp": sum(not verdict["is_ordered"] for verdict in finite),
            "largest_excess": max(verdict["excess"] for _, verdict in verdicts),
            "median_width": statistics.median(verdict["width"] for verdict in finite),
        }
    return {
        "environment": records.environment(),
        "functions": len(studied),
        "structures": len({entry["seed"] // rf.VARIANTS for entry in studied}),
        "cases": len({entry["function"].split(" > ")[0] for entry in studied}),
        "cases_in_table": len(rf.CASES),
        "points": sum(entry["points"] for entry in studied),
        "norms": dict(Counter(entry["norm"] for entry in studied)),
        "seconds": round(sum(entry["seconds"] for entry in entries)),
        "rounding": rf.ROUNDING,
        "methods": methods,
        "violations": {e["seed"]: [e["function"], *violations(e)] for e in entries if violations(e)},
        "not_finite": {
            entry["seed"]: [entry["function"], *bad] for entry in studied
            if (bad := [method for method, verdict in entry["methods"].items() if not verdict["is_finite"]])
        },
        "refused": {entry["seed"]: [entry["function"], entry["refused"]] for entry in entries if "refused" in entry},
    }


def table(result):
    """Writes the report."""
    rows = "\n".join(
        f"| {method} | {row['functions']} | {row['points']:,} | {row['violations']} | {row['outside_ibp']} "
        f"| {row['largest_excess']:.1e} | {row['median_width']:.2f} | {row['not_finite']} |"
        for method, row in result["methods"].items()
    )
    listed = "\n".join(
        f"- {title}, seed {seed}: {'; '.join(entry)}"
        for title in ("violations", "refused", "not_finite") for seed, entry in result[title].items()
    )
    norms = ", ".join(f"{norm} {count}" for norm, count in sorted(result["norms"].items()))
    environment = ", ".join(f"{name} {version}" for name, version in result["environment"]["versions"].items())
    text = f"""# Soundness campaign

Made by `scripts/soundness_campaign.py`; `report.json` holds the same numbers. {environment}, commit
{result['environment']['commit']}, to which the seeds belong.

{result['functions']} random functions of {result['structures']} structures, {rf.VARIANTS} draws of weights, inputs,
radii and box for each; their first parts are {result['cases']} of the {result['cases_in_table']} cases of the table of
covered functions.
Norms: {norms}. {result['points']:,} points, each held against the bounds of every method that its function was bounded
with: a third random, a third of the border (corners, vertices, spheres), a third on the way uphill along gradients.

A violation is a point outside by more than {result['rounding']:.0e} of the scale `1 + max |f|`, which is what
`bounds.certify` allows for rounding; such points are evaluated again in float64 before they count. Excess is in units
of that scale, width in those of the range of values seen. Bounds that are not finite certify nothing and contradict
nothing; they are counted, and listed below. No method may be outside of IBP.

| method | functions | points | violations | outside of IBP | largest excess | median width | not finite |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""
    return f"{text}\n{listed}\n" if listed else text


if __name__ == "__main__":
    sys.exit(main())
