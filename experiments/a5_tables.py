"""Fills Tables 2 to 8 and Fig. 3 of A5 (Frosio & Kautz 2023): base classifiers, A5/O, A5/R and A5/RC.

    python -m experiments.a5_tables --dataset digits --preset cpu
    python -m experiments.a5_tables --dataset mnist --preset cpu         (RDX_DATA_DIR names the data's directory)
    python -m experiments.a5_tables --dataset mnist --preset paper       (an accelerator)

Tables: 2 (base classifiers), 3 (A5/O), 4 (A5/R), 5 (A5/RC) on MNIST, 6 to 8 on CIFAR-10; the same layout for
Fashion-MNIST, Tiny ImageNet and the embedded digits. Presets: `smoke` takes seconds and runs every branch, `cpu` trains
small nets on real data on two cores, `paper` has the paper's networks and the released code's schedules.

Everything goes to `runs/a5_tables/<dataset>-<preset>/`: one JSON and NPZ per cell, `table.md` and pictures. A run that
is interrupted continues with the same command and ends with the same table. On accelerators all trainings of a recipe
run together as one program, those of `--seeds N` among them, fewer where memory runs out, on CPUs one after another;
`--together N` says how many.

Obtained (experiments/results/a5_tables), certified error on digits at eps_A = eps_A^C = 0.1 and eps_D = 0.1, 0.2, 0.3:
base 23.06 %, A5/O 9.72, 3.33 and 1.39, A5/R 19.17, 15.00 and 13.33, A5/RC 11.94, 9.72 and 8.06. MNIST `cpu`, 129
minutes on two cores, eps_D = 0.1 and 0.3, in parentheses the paper with its larger nets:

    eps_A = eps_A^C = 0.1:   base  6.98 (5.41)  A5/O  4.80, 2.00 (1.92, 0.70)   A5/R  5.46, 4.43 (2.54, 1.54)
                                                A5/RC 5.29, 3.89 (1.40, 1.02)
    eps_A = eps_A^C = 0.3:   base 18.94 (9.98)  A5/O 15.30, 11.30 (5.19, 3.40)  A5/R 14.05, 10.16 (4.81, 1.99)
                                                A5/RC 12.80, 6.71 (8.07, 1.59)

From a classifier of too small a radius (eps_A = 0.3, eps_A^C = 0.1) A5/O and A5/R leave all images uncertified, as the
paper's do, and A5/RC 17.73 and 9.42 % (88.66 and 1.38). Fashion-MNIST `cpu`, the half with eps_A = 0.1, 65 minutes
beside other work, eps_D = 0.1 and 0.3:

    eps_A^C = 0.1:   base 29.34   A5/O 21.40, 17.00   A5/R 24.32, 21.82   A5/RC 27.41, 21.47
    eps_A^C = 0.3:   base 42.72   A5/O 39.20, 37.60   A5/R 39.23, 37.01   A5/RC 28.72, 25.59

There A5/RC from a classifier of radius 0.1 is behind A5/R where eps_D is small: it misclassifies more of the first 500
images before any attack, 23.6 against 18.2 %. The `paper` preset has not been run yet.

Attacked errors are those of AutoAttack, as in the paper. Certified errors are those of CROWN-IBP intersected with IBP
(the paper: IBP); the table has both, alpha-CROWN beside them on the first images, and the certified error of the
defended images after rounding to 8 bits.
"""

import dataclasses
import sys
import time
from pathlib import Path

import jax
import numpy as np

from experiments import a5_certificates, a5_report, a5_training, autoattack, batches, command_line
from experiments.a5_presets import config
from experiments.a5_training import Run
from rdx import analyse, attacks, compilation, data, metrics
from rdx.attacks import resumption
from rdx.balls import Ball
from rdx.evaluate import Evaluation, evaluate, records
from rdx.types import Array, LogitsFn


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
        dataset: digits, mnist, fashion_mnist, cifar10, tiny_imagenet32 or tiny_imagenet.
        preset: smoke, cpu or paper.
        out: output directory; runs/a5_tables/<dataset>-<preset> if empty.
        root: directory of the published data files; RDX_DATA_DIR if empty.
        archive: a prepared .npz instead, from `python -m rdx.data.archive`.
        split: what is robustified and evaluated: test, or validation to choose settings by.
        only: fill only cells whose name contains this text.
        together: how many trainings of a recipe run as one program at most; if empty, all on accelerators, 1 on CPUs.
        seeds: from how many seeds each cell is trained; the table then has mean and standard deviation too.
    """

    dataset: str = "digits"
    preset: str = "cpu"
    out: str = ""
    root: str = ""
    archive: str = ""
    split: str = "test"
    only: str = ""
    together: str = ""
    seeds: str = "1"


def main(arguments: Arguments) -> Path:
    """Runs every cell that is not done yet, then writes the table and the pictures; returns the output directory."""
    default = 1 if jax.default_backend() == "cpu" else sys.maxsize
    at_once = _count("--together", arguments.together) if arguments.together else default
    run = _prepare(arguments)
    wanted = [cell for cell in a5_report.cells(run.config) if arguments.only in cell.name]
    missing = [cell for cell in wanted if records.read(run.directory / "records", cell.name) is None]
    if at_once > 1:
        a5_training.train_together(run, missing, at_once)
    for cell in missing:
        _fill(run, cell)
    return a5_report.write(run.directory, run.config)


def _count(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{option} is {text!r}: say how many, 1 or more.")
    return int(text)


def _prepare(arguments: Arguments) -> Run:
    num_seeds = _count("--seeds", arguments.seeds)
    settings = dataclasses.replace(config(arguments.dataset, arguments.preset), num_seeds=num_seeds)
    options = {"root": arguments.root, "archive": arguments.archive}
    suffix = "" if arguments.split == "test" else f"-{arguments.split}"
    directory = Path(arguments.out or f"runs/a5_tables/{settings.dataset}-{settings.preset}{suffix}")
    return a5_training.prepare(settings, directory, claimed=settings, split=arguments.split, **options)


def _fill(run: Run, cell: a5_report.Cell) -> None:
    """Trains what the cell needs, defends the test set, evaluates it and writes the record."""
    compilation.spare_maps()
    print(f"{cell.name}", flush=True)
    start = time.monotonic()
    logits_fn, x_defended = a5_training.defended(run, cell)
    seconds_training = time.monotonic() - start
    settings, test = run.config, run.evaluated(cell)
    attack_set = attacks.suite("linf", num_steps=settings.attack_steps, num_queries=settings.attack_queries)
    result = evaluate(
        jax.random.key(settings.seed), logits_fn, x_defended, test.labels, index=test.index,
        ball=Ball("linf", cell.eps_attack), attacks=attack_set, num_attacked=settings.num_attacked,
        cross_check=settings.cross_check, on_progress=_show,
    )
    seconds_attacks = time.monotonic() - start - seconds_training
    more = _measure(run, cell, logits_fn, x_defended, result)
    summary = records.summarize(result, tuple(attack_set))
    records.write(run.directory / "records", cell.name, {
        "experiment": "a5_tables", "cell": cell, "config": settings, "summary": summary, **more,
        "attacks": autoattack.recorded(attack_set),
        "certified_by": "crown_ibp intersected with ibp",
        "data": {"name": test.name, "split": test.split, "size": len(test), "fingerprint": test.fingerprint,
                 "train_size": len(run.train)},
        "weights": resumption.digest(logits_fn),
        "seconds_training": seconds_training, "seconds_evaluation": seconds_attacks,
        "seconds_total": time.monotonic() - start,
    }, result)
    print(f"  {a5_report.line(summary)}  ({seconds_training:.0f} s training, {seconds_attacks:.0f} s attacks, "
          f"{time.monotonic() - start:.0f} s in all)", flush=True)


def _measure(
    run: Run, cell: a5_report.Cell, logits_fn: LogitsFn, x_defended: Array, result: Evaluation
) -> dict[str, object]:
    """Measures what the table says beside errors under attack, and keeps it by example beside the record."""
    test, ball = run.evaluated(cell), Ball("linf", cell.eps_attack)
    x, num = data.to_float(test.images), min(run.config.num_compared, len(test))
    interval = batches.certified_by_intervals(logits_fn, ball, x_defended, test.labels)
    compared = a5_certificates.compare(
        logits_fn, x_defended[:num], test.labels[:num], ball=ball, by_crown_ibp=result.certified[:num]
    )
    # What nobody defended has 8 bits already.
    in_8_bits = result.certified if cell.recipe == "base" else a5_certificates.in_8_bits(
        logits_fn, x_defended, x, test.labels, defense=Ball("linf", cell.eps_defense), ball=ball
    )
    psnr, ssim = (np.asarray(batches.in_batches(jax.jit(f), x, x_defended)) for f in (analyse.psnr, analyse.ssim))
    rows = np.concatenate([np.flatnonzero(result.certified)[:8], np.flatnonzero(~result.certified)[:4]])
    path = run.directory / "records" / f"{cell.name}-images.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path, original=test.images[rows], defended=np.asarray(x_defended[rows], np.float16), row=rows,
        certified=result.certified[rows], label=test.labels[rows], certified_in_8_bits=in_8_bits, psnr=psnr,
        ssim=ssim, compared=np.stack(list(compared.values())), methods=list(compared),
    )
    return {
        "certified_all_by_ibp": 1.0 - float(interval.mean()), "compared": a5_certificates.errors(compared),
        "in_8_bits": metrics.rate(~in_8_bits),
        "median_psnr": float(np.median(psnr)), "median_ssim": float(np.median(ssim)),
    }


def _show(stage: str, done: int, total: int) -> None:
    if done >= total:
        print(f"  {stage}: {total} images", flush=True)


if __name__ == "__main__":
    main(command_line.parse(Arguments))
