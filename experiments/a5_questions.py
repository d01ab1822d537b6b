"""Answers the questions that A5 (Frosio & Kautz 2023) leaves open, one table each.

    python -m experiments.a5_questions --question transfer --dataset digits --preset cpu
    python -m experiments.a5_questions --question all --dataset digits --preset cpu
    python -m experiments.a5_questions --question all --dataset mnist --preset cpu     (RDX_DATA_DIR: the data)
    python -m experiments.a5_questions --question all --dataset mnist --preset paper   (an accelerator)

    transfer             does a robustified image stay certified or robust for other classifiers?
    norms                l2 and l1 balls of defender and attacker, beside linf
    looseness            how much of the gain is looseness of IBP?
    first_mover          what if the attacker moves first?
    initial_classifier   how good must the classifier be that A5 starts from?
    linf_distance        A5 with a network that is certified by its Lipschitz constant
    baselines            the defences that the paper names: Salman et al. (2021), Moon et al. (2022)

Presets: `smoke` takes seconds and runs every branch, `cpu` trains small nets on real data on two cores, `paper` has the
paper's networks and the released code's schedules.

Everything goes to `runs/a5_questions/<dataset>-<preset>/`: one JSON and NPZ per cell and `table.md`, in which all
questions stand that have been asked so far. A run that is interrupted continues with the same command.

Obtained on digits with `cpu` (experiments/results/a5_questions), one seed, 360 test images; eps_A, eps_A^C and eps_D
are 0.1 in linf. All cells together took 45 minutes on two cores beside a training that went first. The MNIST presets
have not been run yet.

- transfer (60 images): it transfers. What A5/O made for one certified classifier has 8 to 10 % certified error with the
  others, as with its own (5 to 8), where undefended images have 15 to 22; a vanilla classifier is broken on 13 to 18 %
  instead of 50. A defence made for an adversarially trained classifier, which IBP cannot certify, is worth less.
- norms: the order none, A5/R, A5/RC, A5/O stands, certified 56.7, 53.3, 49.4 and 42.2 % in l2, 40.3, 37.5, 35.8 and
  25.8 % in l1. IBP makes poor classifiers there, 25 and 16 % clean error; A5/RC mends 4 points of that.
- looseness: the gain is real. Complete verification decides every image: the true error falls from 21.11 % to 7.50
  (A5/O), 17.22 (A5/R) and 11.11 (A5/RC). IBP overstates it by 5.8 points undefended and by 4.7, 3.3 and 1.7 defended.
  Preparing with CROWN-IBP throughout changes the true error by 1 image (A5/O), 4 (A5/R) and 12 (A5/RC: 7.78 %, and
  9.72 % that CROWN-IBP does not certify rather than 11.94, p = 0.08; IBP certifies next to nothing there).
- first_mover: the gain of A5/R needs the order. Attacked through A5/R, 20.56 % are broken rather than 17.22, undefended
  21.11; through A5/RC, whose classifier is another, 12.78 rather than 11.11. Certified error doubles at least, to 40.56
  and 42.50 % by CROWN; CROWN-IBP certifies nothing there.
- initial_classifier: A5/R is as good as its classifier, certified 100, 41, 24, 20 and 19 % as eps_A^C rises from 0 to
  eps_A. A5/RC needs a quarter of eps_A, 11 to 12 % from there on; from a vanilla classifier it fails.
- linf_distance: A5 helps it as well, certified 16.39 % undefended, 7.50 by A5/O, 12.22 by A5/R; attacks reach the
  certificates but for one image.
- baselines: Moon's, without certificates in mind and without labels, has 9.44 % certified error, A5/O with labels 9.72;
  Salman's 16.11. A5/R, the only one that needs no optimisation when an image comes and leaves the classifier as it is,
  19.17.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from experiments import a5_questions_report, a5_training, autoattack, command_line
from experiments.a5_questions_lab import Lab, Row
from experiments.a5_questions_presets import config
from experiments.a5_questions_rows import QUESTIONS
from rdx import attacks, compilation
from rdx.attacks import resumption
from rdx.evaluate import evaluate, records, report


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
        question: transfer, norms, looseness, first_mover, initial_classifier, linf_distance, baselines or all.
        dataset: digits or mnist.
        preset: smoke, cpu or paper.
        out: output directory; runs/a5_questions/<dataset>-<preset> if empty.
        root: directory of the published data files; RDX_DATA_DIR if empty.
        archive: a prepared .npz instead, from `python -m rdx.data.archive`.
    """

    question: str = "all"
    dataset: str = "digits"
    preset: str = "cpu"
    out: str = ""
    root: str = ""
    archive: str = ""


def main(arguments: Arguments) -> Path:
    """Fills every cell of the questions that is not done yet, then writes the tables; returns the output directory."""
    if arguments.question not in {"all", *QUESTIONS}:
        raise ValueError(f"No question {arguments.question!r}: ask one of {', '.join(QUESTIONS)}, or all.")
    settings = config(arguments.dataset, arguments.preset)
    directory = Path(arguments.out or f"runs/a5_questions/{settings.dataset}-{settings.preset}")
    run = a5_training.prepare(
        settings.base, directory, claimed=settings, root=arguments.root, archive=arguments.archive
    )
    lab = Lab(settings, run)
    for name, question in QUESTIONS.items():
        if arguments.question in {"all", name}:
            for row in question.rows(lab):
                if records.read_arrays(directory / "records", row.name) is None:
                    _fill(lab, row)
    return a5_questions_report.write(lab)


def _fill(lab: Lab, row: Row) -> None:
    """Trains what the cell needs, evaluates the defended images and writes the record."""
    compilation.spare_maps()
    start = time.monotonic()
    logits_fn, x_defended = row.make()
    seconds_training = time.monotonic() - start
    base, test = lab.config.base, lab.run.test
    if row.num_images is not None:
        x_defended, test = x_defended[: row.num_images], test.take(row.num_images)
    attack_set = attacks.suite(row.ball.norm, num_steps=base.attack_steps, num_queries=base.attack_queries)
    result = evaluate(
        jax.random.key(base.seed), logits_fn, x_defended, test.labels, index=test.index, ball=row.ball,
        attacks=attack_set, method=row.methods, cross_check=base.cross_check, diagnose=None,
    )
    seconds_evaluation = time.monotonic() - start - seconds_training
    more, arrays = ({}, {}) if row.measure is None else row.measure(logits_fn, x_defended, test.labels, result)
    summary = records.summarize(result, tuple(attack_set))
    records.write_arrays(lab.run.directory / "records", row.name, {
        "experiment": "a5_questions", "question": row.question, "labels": row.labels, "column": row.column,
        "config": lab.config, "ball": {"norm": row.ball.norm, "eps": row.ball.eps}, "summary": summary, **more,
        "certified_by": " or ".join(method.__name__ for method in row.methods),
        "attacks": autoattack.recorded(attack_set),
        "data": {"name": test.name, "split": test.split, "size": len(lab.run.test), "evaluated": len(test),
                 "fingerprint": test.fingerprint, "train_size": len(lab.run.train)},
        "weights": resumption.digest(logits_fn),
        "seconds_training": seconds_training, "seconds_evaluation": seconds_evaluation,
        "seconds_total": time.monotonic() - start,
    }, {name: np.asarray(value) for name, value in {**dataclasses.asdict(result), **arrays}.items()
        if name != "diagnosis"})
    print(f"{row.name}: {report.cell(summary)}  ({seconds_training:.0f} s training, {seconds_evaluation:.0f} s "
          f"evaluation, {time.monotonic() - start:.0f} s in all)", flush=True)


if __name__ == "__main__":
    main(command_line.parse(Arguments))
