"""Compares rdx's AutoAttack with the original, attack by attack, on the same trained nets and test images.

    python scripts/compare_autoattack.py train              # two small nets, adversarially trained in linf
    python scripts/compare_autoattack.py ours
    PEER_PYTHON scripts/compare_autoattack.py theirs        # torch and autoattack (github.com/fra31/auto-attack)
    python scripts/compare_autoattack.py table

`train` and `ours` need RDX_DATA_DIR with the published files of MNIST and CIFAR-10, `theirs` only what `train` wrote.
Both sides run the standard version: APGD-CE, APGD-T and FAB-T with 100 steps, nine targets, Square with 5,000 queries
(in l1 five restarts and five targets of APGD, from larger radii); each attack meets the images that still stand. With
`--each` every one of `--attacks`, each with one restart, meets all images that are classified right. Every batch is
kept in `--work` after each of its attacks, so a run that was interrupted goes on. `table` writes table.md and
record.json to experiments/results/autoattack/.

Our squares reach the last row and column, as in the paper, the original's code never does: `--spare-last` runs ours so.

The nets: two convolutions of 4 x 4 with stride 2 and a hidden layer of 100, trained for a few minutes by adversarial
training (Madry et al. 2018). They are meant to have robust accuracies far from 0 and 100 %, no more.
"""

# ruff: noqa: TID251
import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import _bench
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
ATTACKS = (*STANDARD, "apgd-dlr", "fab")


class Task(NamedTuple):
    """A net and its data.

    Attributes:
        net: the layers.
        data: name of the data set.
        num_steps: steps of training with batches of 128.
        attack_steps: steps of the attack in training.
        trained_eps: radius in training, linf.
        eps: radius of the comparison, by norm.
    """

    net: _bench.Net
    data: str
    num_steps: int
    attack_steps: int
    trained_eps: float
    eps: dict[str, float]


def _layers(*channels):
    return (*(_bench.Conv(number, 4, 2, 1) for number in channels), _bench.Dense(100), _bench.Dense(10))


TASKS = {
    "mnist": Task(_bench.Net("mnist", _layers(16, 32)), "mnist", 2500, 7, 0.2, {"linf": 0.25, "l2": 1.5, "l1": 5.0}),
    "cifar": Task(
        _bench.Net("cifar", _layers(32, 32), (32, 32, 3)), "cifar10", 600, 3, 8 / 255,
        {"linf": 8 / 255, "l2": 0.5, "l1": 4.0},
    ),
}


def train(name, work):
    """Trains a net and writes its weights, in both layouts, with the first test images."""
    path, task = work / f"{name}.npz", TASKS[name]
    if path.exists():
        return
    import jax
    import optax

    from rdx import attacks, data, models
    from rdx import train as training
    from rdx.balls import Ball

    convs = tuple(models.Conv(layer.features, layer.size, layer.stride) for layer in task.net.layers[:2])
    forward, source = models.forward(models.ConvNet(convs, (100,), padding=1)), data.load(task.data, "train_all")
    variables = forward.model.init(jax.random.key(0), source.images[:1].astype(np.float32))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, task.num_steps))
    state = training.init_state(variables["params"], {}, optimizer)
    # On CPUs a loop that unrolls is faster than one that is compiled.
    attack = functools.partial(attacks.pgd, num_steps=task.attack_steps, loop=attacks.Loop(kind="host"))
    eps = training.schedules.linear_ramp(task.trained_eps, 0, task.num_steps // 3)
    loss = training.adversarial.cross_entropy(forward, Ball("linf", task.trained_eps), eps=eps, attack=attack)
    batches = data.Loader(source, data.Sampler(len(source), 128, seed=0))
    state, _ = training.fit(
        loss, state, optimizer, batches, key=jax.random.key(1), num_steps=task.num_steps, label=name,
        directory=work / f"{name}-training", save_every=500,
        on_log=lambda row: print(name, {key: round(value, 4) for key, value in row.items()}, flush=True),
    )
    test = data.load(task.data, "test")
    params = [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for layer in _in_order(state.params)]
    weights = {f"ours.{i}.{j}": value for i, pair in enumerate(params) for j, value in enumerate(pair)}
    weights |= {f"theirs.{key}": value for key, value in task.net.to_torch(params).items()}
    np.savez(path, x=test.images[:1000].astype(np.float32) / np.float32(255), labels=test.labels[:1000], **weights)


def _in_order(params):
    return [params[name] for name in ("Conv_0", "Conv_1", "Dense_0", "Dense_1")]


def our_side(task, arrays, norm, options):
    """Builds `(stage, x, labels, index) -> which images still stand`."""
    import jax
    from jax.tree_util import Partial

    from rdx import goals, losses
    from rdx.attacks import apgd, fab
    from rdx.attacks.autoattack import cascade, suite
    from rdx.balls import Ball

    params = [tuple(arrays[f"ours.{i}.{j}"] for j in range(2)) for i in range(len(task.net.layers))]
    logits_fn, attacks = Partial(task.net.logits, params), suite(norm, num_queries=options.queries)
    attacks |= {"apgd-dlr": functools.partial(apgd, goal=goals.misclassify(losses.dlr)), "fab": fab}
    attacks["square"] = functools.partial(attacks["square"], spare_last=options.spare_last)

    def run(name, x, labels, index):
        if name == "clean":
            return np.asarray(logits_fn(x)).argmax(axis=1) == labels
        found = cascade(
            jax.random.key(0), {name: attacks[name]}, logits_fn, x, labels, ball=Ball(norm, task.eps[norm]), index=index
        )
        return ~np.asarray(found.result.success)

    return run


def their_side(task, arrays, norm, options):
    """Builds the same from the original code."""
    try:
        import torch
        from autoattack import AutoAttack
    except ImportError as error:
        sys.exit(f"{error}: run this side in a Python environment with torch and autoattack installed.")

    weights = {key.removeprefix("theirs."): value for key, value in arrays.items() if key.startswith("theirs.")}
    net = task.net.torch_module(weights).requires_grad_(False)

    def run(name, x, labels, index):
        del index
        images, classes = torch.tensor(_bench.channels_first(x)), torch.tensor(labels).long()
        if name == "clean":
            return (net(images).argmax(dim=1) == classes).numpy()
        adversary = AutoAttack(net, norm.capitalize(), task.eps[norm], seed=0, verbose=False, device="cpu")
        adversary.attacks_to_run, adversary.square.n_queries = [name], options.queries
        _, predictions = adversary.run_standard_evaluation(images, classes, bs=len(x), return_labels=True)
        return (predictions == classes).numpy()

    return run


SIDES = {"ours": our_side, "theirs": their_side}


def evaluate(side, name, norm, options):
    """Runs one side's attacks on every batch, and keeps which images stand after each."""
    with np.load(options.work / f"{name}.npz") as file:
        arrays = dict(file)
    run = SIDES[side](TASKS[name], arrays, norm, options)
    for first in range(0, options.images, options.batch):
        path = _path(side, name, norm, first, options)
        record = json.loads(path.read_text()) if path.exists() else {"standing": {}, "seconds": {}}
        rows = np.arange(first, min(first + options.batch, options.images), dtype=np.int32)
        for stage in _stages(options):
            if stage not in record["standing"]:
                start = time.perf_counter()
                stands = run(stage, arrays["x"][rows], arrays["labels"][rows], rows) if len(rows) else []
                record["standing"][stage] = rows[np.asarray(stands, bool)].tolist()
                record["seconds"][stage] = time.perf_counter() - start
                path.write_text(json.dumps(record))
                left, taken = len(record["standing"][stage]), record["seconds"][stage]
                print(f"{side} {name} {norm} {first} {stage}: {left} of {len(rows)} stand, {taken:.0f} s", flush=True)
            if stage == "clean" or not options.each:
                rows = np.array(record["standing"][stage], np.int32)


def _stages(options):
    return ("clean", *options.attacks)


def _path(side, name, norm, first, options):
    # What differs from the standard setting has files of its own.
    marks = ("-each" if options.each else "") + (f"-{options.queries}" if options.queries != 5000 else "")
    marks += "-spared" if options.spare_last and side == "ours" else ""
    return options.work / f"{name}-{norm}-{side}{marks}-{first}.json"


def read(side, name, norm, options):
    """Reads `stage -> (places of the images that stand, seconds)`; None where something is missing."""
    found = {stage: (set(), 0.0) for stage in _stages(options)}
    for first in range(0, options.images, options.batch):
        path = _path(side, name, norm, first, options)
        record = json.loads(path.read_text()) if path.exists() else {"standing": {}}
        if not set(record["standing"]) >= set(found):
            return None
        for stage, (standing, seconds) in found.items():
            found[stage] = standing | set(record["standing"][stage]), seconds + record["seconds"][stage]
    return found


def rows_of(name, norm, options):
    """Compares the sides after each stage; no rows where one is not finished."""
    ours, theirs = (read(side, name, norm, options) for side in SIDES)
    if ours is None or theirs is None:
        print(f"{name} {norm}: not finished", file=sys.stderr)
        return []
    rows = []
    for stage in _stages(options):
        (our_rows, our_seconds), (their_rows, their_seconds) = ours[stage], theirs[stage]
        ours_percent, theirs_percent = (100.0 * len(standing) / options.images for standing in (our_rows, their_rows))
        rows.append({
            "net": name, "ball": f"{norm} {TASKS[name].eps[norm]:.4g}", ("attack" if options.each else "after"): stage,
            "rdx %": round(ours_percent, 2), "original %": round(theirs_percent, 2),
            "difference": round(ours_percent - theirs_percent, 2), "stand for rdx only": len(our_rows - their_rows),
            "stand for the original only": len(their_rows - our_rows), "rdx s": round(our_seconds, 1),
            "original s": round(their_seconds, 1),
        })
    return rows


def table(options):
    """Prints and writes what both sides have finished."""
    rows = [row for name in options.nets for norm in options.norms for row in rows_of(name, norm, options)]
    if not rows:
        return
    settings = {
        "images": f"the first {options.images} test images, batches of {options.batch}",
        "attacks": "one restart, each attack on all images" if options.each
        else "standard version of both, each attack on what still stands",
        "squares": f"{options.queries} queries, {'sparing' if options.spare_last else 'reaching'} the last row in rdx",
        "nets": ", ".join(
            f"{name}: {task.num_steps} steps of PGD-{task.attack_steps} training, linf {task.trained_eps:.4g}"
            for name, task in TASKS.items() if name in options.nets
        ),
        "seconds": "wall clock with compilation on a busy machine, unequal threads: no benchmark",
    }
    lines = ["# AutoAttack: rdx and the original", "", f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    lines += [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows]
    lines += ["", *(f"- {name}: {value}" for name, value in settings.items())]
    print("\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    (options.out / "record.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


def main():
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["train", *SIDES, "table"])
    parser.add_argument("--nets", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--norms", nargs="+", choices=["linf", "l2", "l1"], default=["linf"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(STANDARD))
    parser.add_argument("--each", action="store_true", help="run each attack on all images, not on what still stands")
    parser.add_argument("--queries", type=int, default=5000, help="of Square")
    parser.add_argument("--spare-last", action="store_true", help="our squares never reach the last row and column")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "autoattack")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "autoattack")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.part == "table":
        table(options)
        return
    for name in options.nets:
        if options.part == "train":
            train(name, options.work)
            continue
        for norm in options.norms:
            evaluate(options.part, name, norm, options)


if __name__ == "__main__":
    main()
