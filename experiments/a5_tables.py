"""Fills Tables 2 to 8 and Fig. 3 of A5 (Frosio & Kautz 2023): base classifiers, A5/O, A5/R and A5/RC.

    python -m experiments.a5_tables --dataset digits --preset cpu
    python -m experiments.a5_tables --dataset mnist --preset cpu         (RDX_DATA_DIR names the data's directory)
    python -m experiments.a5_tables --dataset mnist --preset paper       (an accelerator)

Tables: 2 (base classifiers), 3 (A5/O), 4 (A5/R), 5 (A5/RC) on MNIST, 6 to 8 on CIFAR-10; the same layout for
Fashion-MNIST and the embedded digits. Presets: `smoke` takes seconds and runs every branch, `cpu` trains small nets on
real data on two cores, `paper` has the paper's networks and the released code's schedules.

Everything goes to `runs/a5_tables/<dataset>-<preset>/`: one JSON and NPZ per cell, `table.md` and pictures. A run that
is interrupted continues with the same command and ends with the same table.

Obtained (experiments/results/a5_tables), certified error on the whole test set, eps_A = eps_A^C = 0.1: MNIST `cpu`
base 5.72 %, A5/O 2.98 and 1.28, A5/R 4.36 and 3.22, A5/RC 4.25 and 2.91 at eps_D = 0.1 and 0.3, in 37 minutes on two
cores. Expected from the paper, with its larger nets: 5.41; 1.92 and 0.70; 2.54 and 1.54; 1.40 and 1.02. The `paper`
preset has not been run yet.

Attacked errors are the worst case of PGD with restarts and APGD with cross entropy (the paper: AutoAttack). Certified
errors are those of CROWN-IBP intersected with IBP (the paper: IBP).
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import a5_report, command_line, runs
from experiments.a5_presets import Config, Schedule, config
from rdx import attacks, bounds, data, models, robustify
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.evaluate import evaluate, records
from rdx.train import certified, schedules, standard
from rdx.train.loop import Phase, fit, init_state
from rdx.types import Array, Key, LogitsFn, PyTree


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
        dataset: digits, mnist, fashion_mnist or cifar10.
        preset: smoke, cpu or paper.
        out: output directory; runs/a5_tables/<dataset>-<preset> if empty.
        root: directory of the published data files; RDX_DATA_DIR if empty.
        archive: a prepared .npz instead, from `python -m rdx.data.archive`.
        split: what is robustified and evaluated: test, or validation to choose settings by.
        only: fill only cells whose name contains this text.
    """

    dataset: str = "digits"
    preset: str = "cpu"
    out: str = ""
    root: str = ""
    archive: str = ""
    split: str = "test"
    only: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """What every stage of a run needs."""

    config: Config
    train: data.Source
    test: data.Source
    directory: Path
    classifier: models.Forward
    robustifier: models.Forward

    def path(self, name: str) -> Path:
        """Names the checkpoint directory of one training."""
        return self.directory / "checkpoints" / name


def main(arguments: Arguments) -> Path:
    """Runs every cell that is not done yet, then writes the table and the pictures; returns the output directory."""
    run = _prepare(arguments)
    for cell in a5_report.cells(run.config):
        if arguments.only in cell.name and records.read(run.directory / "records", cell.name) is None:
            _fill(run, cell)
    return a5_report.write(run.directory, run.config)


def _prepare(arguments: Arguments) -> Run:
    settings = config(arguments.dataset, arguments.preset)
    options = {"root": arguments.root or None, "archive": arguments.archive or None}
    train = data.load(settings.dataset, "train", **options)
    test = data.load(settings.dataset, arguments.split, **options)
    suffix = "" if arguments.split == "test" else f"-{arguments.split}"
    directory = Path(arguments.out or f"runs/a5_tables/{settings.dataset}-{settings.preset}{suffix}")
    runs.claim(directory, settings, test)
    return Run(
        settings, train.take(settings.num_train or len(train)), test.take(settings.num_test or len(test)), directory,
        models.forward(settings.classifier), models.forward(settings.robustifier),
    )


def _fill(run: Run, cell: a5_report.Cell) -> None:
    """Trains what the cell needs, defends the test set, evaluates it and writes the record."""
    print(f"{cell.name}", flush=True)
    start = time.monotonic()
    logits_fn, x_defended = _defended(run, cell)
    seconds_training = time.monotonic() - start
    attack_set = _attacks(run.config)
    result = evaluate(
        jax.random.key(run.config.seed), logits_fn, x_defended, run.test.labels, index=run.test.index,
        ball=Ball("linf", cell.eps_attack), attacks=attack_set, num_attacked=run.config.num_attacked,
        cross_check=run.config.cross_check, on_progress=_show,
    )
    certify = functools.partial(_certified_by_intervals, logits_fn, Ball("linf", cell.eps_attack))
    interval = np.asarray(_in_batches(certify, x_defended, jnp.asarray(run.test.labels)))
    _save_images(run, cell, x_defended, result.certified)
    summary = records.summarize(result, tuple(attack_set))
    records.write(run.directory / "records", cell.name, {
        "experiment": "a5_tables", "cell": cell, "config": run.config, "summary": summary,
        "certified_all_by_ibp": 1.0 - float(interval.mean()),
        "attacks": {name: attack.keywords for name, attack in attack_set.items()},
        "certified_by": "crown_ibp intersected with ibp",
        "data": {"name": run.test.name, "split": run.test.split, "size": len(run.test),
                 "fingerprint": run.test.fingerprint, "train_size": len(run.train)},
        "seconds_training": seconds_training, "seconds_total": time.monotonic() - start,
    }, result)
    print(f"  {a5_report.line(summary)}  ({time.monotonic() - start:.0f} s)", flush=True)


def _defended(run: Run, cell: a5_report.Cell) -> tuple[LogitsFn, Array]:
    """Builds the cell's classifier and its (defended) test images."""
    x = data.to_float(run.test.images)
    base = _train_classifier(run, cell.eps_classifier)
    legacy = run.classifier.logits_fn(base, {})
    if cell.recipe == "base":
        return legacy, x
    defense = Ball("linf", cell.eps_defense)
    if cell.recipe == "offline":
        params = _optimise_offline(run, cell, legacy, defense)
        return legacy, robustify.offline.apply(params, x, jnp.arange(len(x)), defense=defense)
    robustifier = _train_online(run, cell, legacy, defense)
    if cell.recipe == "joint":
        both = _train_joint(run, cell, base, robustifier, defense)
        legacy, robustifier = run.classifier.logits_fn(both["classifier"], {}), both["robustifier"]
    return legacy, _in_batches(lambda part: _apply_online(run.robustifier, robustifier, part, defense), x)


def _train_classifier(run: Run, eps: float) -> PyTree:
    schedule, ball = run.config.base, Ball("linf", 0.0)
    params = run.classifier.model.init(_key(run, 0), data.to_float(run.train.images[:1]))["params"]
    ramp = _ramp(run, schedule, eps)
    loss = certified.phases(run.classifier, ball, eps=ramp) if eps > 0 else standard.cross_entropy(run.classifier)
    return _fit(run, schedule, loss, params, run.train, f"classifier-{eps:.4g}", 1)


def _optimise_offline(run: Run, cell: a5_report.Cell, legacy: LogitsFn, defense: Ball) -> PyTree:
    schedule = run.config.offline
    threat = Threat(Ball("linf", 0.0), _ramp(run, schedule, cell.eps_robustify, len(run.test)), has_crown=False)
    loss = robustify.offline.offline(legacy, defense=defense, threat=threat)
    params = robustify.offline.init(len(run.test), run.test.images.shape[1:])
    return _fit(run, schedule, loss, params, run.test, cell.training, 2)


def _train_online(run: Run, cell: a5_report.Cell, legacy: LogitsFn, defense: Ball) -> PyTree:
    params = run.robustifier.model.init(_key(run, 3), data.to_float(run.train.images[:1]))["params"]
    builder = functools.partial(robustify.online.online, legacy, run.robustifier, defense=defense)
    loss = _phases(run, run.config.online, cell.eps_robustify, builder)
    return _fit(run, run.config.online, loss, params, run.train, cell.training.replace("joint", "online"), 4)


def _train_joint(run: Run, cell: a5_report.Cell, base: PyTree, robustifier: PyTree, defense: Ball) -> PyTree:
    builder = functools.partial(robustify.joint.joint, run.classifier, run.robustifier, defense=defense)
    loss = _phases(run, run.config.joint, cell.eps_robustify, builder)
    params = robustify.joint.init(robustifier, base)
    return _fit(run, run.config.joint, loss, params, run.train, cell.training, 5, transform=_augment(run.config))


def _phases(run: Run, schedule: Schedule, eps: float, builder: Callable[..., Any]) -> tuple[Phase, Phase]:
    """CROWN-IBP takes part while the radius rises; after that its share is 0 and it is left out."""
    ramp = _ramp(run, schedule, eps)
    mixed, plain = (builder(threat=Threat(Ball("linf", 0.0), ramp, has_crown=has_crown)) for has_crown in (True, False))
    return Phase(max(int(ramp.end), 0), mixed), Phase(None, plain)


def _ramp(run: Run, schedule: Schedule, eps: float, num_examples: int | None = None) -> schedules.Ramp:
    per_epoch = _steps_per_epoch(num_examples or len(run.train), schedule)
    if schedule.ramp == 0:
        return schedules.linear_ramp(eps, start=-1, length=1)
    return schedules.smoothed(
        eps, start_epoch=schedule.warmup + 1, length_epochs=schedule.ramp, mid=0.3, steps_per_epoch=per_epoch, beta=4.0
    )


def _fit(
    run: Run, schedule: Schedule, loss: Any, params: PyTree, source: data.Source, name: str, stream: int,
    transform: Any = None,
) -> PyTree:
    per_epoch = _steps_per_epoch(len(source), schedule)
    batch_size = min(schedule.batch_size, len(source))
    optimizer = _optimizer(schedule.learning_rate, tuple(epoch * per_epoch for epoch in schedule.decay))
    sampler = data.Sampler(len(source), batch_size, run.config.seed)
    loader = data.Loader(source, sampler, data.data_mesh() if batch_size % jax.device_count() == 0 else None)
    state, history = fit(
        loss, init_state(params, {}, optimizer), optimizer,
        lambda step: {**loader(step), "row": jnp.asarray(sampler.indices(step))},
        key=_key(run, stream), num_steps=schedule.epochs * per_epoch, transform=transform, directory=run.path(name),
        save_every=max(per_epoch, 100), keep=1, log_every=per_epoch, label=name,
    )
    if history:
        last = {key: f"{value:.4g}" for key, value in history[-1].items()}
        print(f"  {name}: {last}", flush=True)
    # Training leaves them on every device of the mesh, evaluation happens on one.
    return jax.device_put(state.params, jax.local_devices()[0])


@functools.cache
def _optimizer(learning_rate: float, boundaries: tuple[int, ...]) -> optax.GradientTransformation:
    rate = optax.piecewise_constant_schedule(learning_rate, dict.fromkeys(boundaries, 0.1))
    # torch's RMSProp, which the paper uses, adds its epsilon outside the root.
    return optax.rmsprop(rate, decay=0.99, eps_in_sqrt=False)


@functools.cache
def _augment(settings: Config) -> jax.tree_util.Partial:
    def transform(key: Key, batch: PyTree) -> PyTree:
        shift_key, rotation_key, flip_key = jax.random.split(key, 3)
        x, index = data.to_float(batch["x"]), batch["index"]
        x = data.random_shift(shift_key, x, padding=settings.shift, index=index)
        if settings.rotation:
            x = data.random_rotation(rotation_key, x, degrees=settings.rotation, index=index)
        if settings.flip:
            x = data.random_flip(flip_key, x, index=index)
        return {**batch, "x": x}

    return jax.tree_util.Partial(transform)


def _attacks(settings: Config) -> dict[str, functools.partial]:
    return {
        "pgd": functools.partial(attacks.pgd, num_steps=settings.pgd_steps, num_restarts=settings.pgd_restarts),
        "apgd": functools.partial(attacks.apgd, num_steps=settings.apgd_steps),
    }


@functools.partial(jax.jit, static_argnames="robustifier")
def _apply_online(robustifier: models.Forward, params: PyTree, x: Array, defense: Ball) -> Array:
    return robustify.online.apply(robustifier, params, x, defense=defense)


@jax.jit
def _certified_by_intervals(logits_fn: LogitsFn, ball: Ball, x: Array, labels: Array) -> Array:
    return bounds.certify(logits_fn, x, labels, ball=ball, method=bounds.ibp).certified


def _in_batches(fn: Callable[..., Array], *arrays: Array, batch_size: int = 1000) -> Array:
    starts = range(0, len(arrays[0]), batch_size)
    return jnp.concatenate([fn(*(array[start : start + batch_size] for array in arrays)) for start in starts])


def _save_images(run: Run, cell: a5_report.Cell, x_defended: Array, certified: np.ndarray) -> None:
    """Keeps a few successes and failures for Fig. 3."""
    rows = np.concatenate([np.flatnonzero(certified)[:8], np.flatnonzero(~certified)[:4]])
    path = run.directory / "records" / f"{cell.name}-images.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path, original=run.test.images[rows], defended=np.asarray(x_defended[rows], np.float16), row=rows,
        certified=certified[rows], label=run.test.labels[rows],
    )


def _steps_per_epoch(num_examples: int, schedule: Schedule) -> int:
    return max(1, num_examples // schedule.batch_size)


def _key(run: Run, stream: int) -> Key:
    return jax.random.fold_in(jax.random.key(run.config.seed), stream)


def _show(stage: str, done: int, total: int) -> None:
    if done >= total:
        print(f"  {stage}: {total} images", flush=True)


if __name__ == "__main__":
    main(command_line.parse(Arguments))
