"""Accuracy of an undefended and an adversarially trained net under every attack, after RealSafe (Dong et al. 2020).

    python -m experiments.attack_gallery --preset smoke       (embedded digits, seconds)
    python -m experiments.attack_gallery --preset cpu         (MNIST; RDX_DATA_DIR names the data's directory)
    python -m experiments.attack_gallery --preset paper       (CIFAR-10 at the paper's radii; an accelerator)

Tables: the rows of Table 3 (median distance of minimal perturbations, accuracy at a fixed radius), for every public
attack of `rdx.attacks` instead of the paper's fifteen; pictures: accuracy against the radius and against the number of
queries (Figs. 3 and 4). The attacks stand in `experiments.gallery_attacks`, one line each, the presets in
`experiments.gallery_presets`.

Everything goes to `runs/attack_gallery/<preset>/`: one JSON and NPZ per net, attack and curve, `table.md` and pictures.
A run that is interrupted continues with the same command and ends with the same table.

Transfer attacks are made on a substitute, a third net that was trained adversarially from another seed, as the paper's
robust substitutes were; one on the mean logits of it and a fourth. Black-box attacks have the budget that the table
states. Below each table stands what `rdx.evaluate.diagnose` says of the net. The `paper` preset has its own nets (a
ResNet-56, and a wide one trained by PGD), not the weights that the paper downloaded, and has not been run yet.

`cpu`, 66 minutes: AutoAttack leaves the undefended net 0.0 % at linf 0.2, 16.8 at l2 1.5 and 20.7 at l1 8, the robust
one 89.1, 82.8 and 30.9; no single attack does better, and the worst case over all is 0.8 points lower in l2. With 1,000
queries Square comes within 3 points of it in linf; ZOO and the decision-based attacks have hardly begun by then.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from experiments import command_line, gallery_report, runs
from experiments.gallery_attacks import Case, bind, cases
from experiments.gallery_presets import Config, config
from rdx import attacks, compilation, data, models
from rdx.attacks import resumption
from rdx.balls import Ball
from rdx.evaluate import curves, diagnose, records, shared
from rdx.train import adversarial, fit, init_state, schedules, standard
from rdx.types import Array, Key, LogitsFn, PyTree


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
        preset: smoke, cpu or paper.
        out: output directory; runs/attack_gallery/<preset> if empty.
        root: directory of the published data files; RDX_DATA_DIR if empty.
        archive: a prepared .npz instead, from `python -m rdx.data.archive`.
        only: run only attacks whose record's name contains this text.
    """

    preset: str = "cpu"
    out: str = ""
    root: str = ""
    archive: str = ""
    only: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """What every stage of a run needs; `nets` keeps those that are trained."""

    config: Config
    train: data.Source
    test: data.Source
    directory: Path
    nets: dict[str, LogitsFn] = dataclasses.field(default_factory=dict)


def main(arguments: Arguments) -> Path:
    """Runs every attack that is not done yet, then writes table and pictures; returns the output directory."""
    run = _prepare(arguments)
    for net in gallery_report.NETS:
        for case in cases(run.config):
            if arguments.only in f"{net}-{case.name}":
                _attack(run, net, case)
        if arguments.only in (name := gallery_report.diagnosis_name(net)):
            _diagnose(run, net, name)
    return gallery_report.write(run.directory, run.config)


def _prepare(arguments: Arguments) -> Run:
    settings = config(arguments.preset)
    options = {"root": arguments.root or None, "archive": arguments.archive or None}
    train, test = (data.load(settings.dataset, split, **options) for split in ("train", "test"))
    test = test.take(settings.num_images)
    directory = Path(arguments.out or f"runs/attack_gallery/{settings.preset}")
    runs.claim(directory, settings, test)
    return Run(settings, train.take(settings.num_train or len(train)), test, directory)


def _attack(run: Run, net: str, case: Case) -> None:
    """Runs one attack on one net and writes its records, those that are not there yet."""
    name, directory = f"{net}-{case.name}", run.directory / "records"
    if curves.read(directory, f"{name}-strength") is None:
        _write(run, net, case, "strength", functools.partial(_follow, run, net, case))
    is_searched = case.entry.kind in run.config.searched and not case.entry.is_minimal
    if is_searched and curves.read(directory, f"{name}-eps") is None:
        _write(run, net, case, "eps", functools.partial(_search, run, net, case))


def _follow(run: Run, net: str, case: Case, **common: Any) -> curves.Curve:
    attack = bind(case.entry, run.config, *_substitutes(run, case.entry.num_substitutes))
    ball = Ball(case.norm, np.inf if case.entry.is_minimal else case.eps)
    return curves.against_strength(
        _key(run, case.name), _net(run, net), attack=attack, ball=ball, within=case.eps, **common
    )


def _search(run: Run, net: str, case: Case, **common: Any) -> curves.Curve:
    settings = dataclasses.replace(run.config, num_steps=run.config.search_steps)
    attack = bind(case.entry, settings, *_substitutes(run, case.entry.num_substitutes), trace=False)
    return curves.minimal_eps(
        _key(run, case.name), _net(run, net), attack=attack, ball=Ball(case.norm, case.eps / 2),
        num_bisections=run.config.num_bisections, grid=gallery_report.grid(case.eps), **common,
    )


def _write(run: Run, net: str, case: Case, what: str, measure: Any) -> None:
    compilation.spare_maps()
    x, start = data.to_float(run.test.images), time.monotonic()
    _net(run, net)
    seconds_training = time.monotonic() - start
    curve = measure(
        x=x, labels=run.test.labels, index=run.test.index, batch_size=run.config.batch_attacked
    )
    seconds = time.monotonic() - start - seconds_training
    curves.write(run.directory / "records", f"{net}-{case.name}-{what}", {
        "experiment": "attack_gallery", "net": net, "attack": case.entry.attack, "kind": case.entry.kind,
        "norm": case.norm, "eps": case.eps, "options": dict(case.entry.options(run.config)), "config": run.config,
        "data": {"name": run.test.name, "split": run.test.split, "size": len(run.test),
                 "fingerprint": run.test.fingerprint, "train_size": len(run.train)},
        "weights": resumption.digest(_net(run, net)), "seconds": seconds,
    }, curve)
    shown = curve.accuracy()[-1] if what == "strength" else None
    text = f"accuracy {100 * shown.value:.1f} %" if shown else f"median distance {curve.median():.4g}"
    print(f"  {net}-{case.name}: {text}  ({seconds:.1f} s)", flush=True)


def _diagnose(run: Run, net: str, name: str) -> None:
    """Asks whether the accuracies of a net can be trusted, in the first norm and at its radius."""
    directory, (norm, eps) = run.directory / "records", run.config.radii[0]
    if records.read_arrays(directory, name) is not None:
        return
    logits_fn, (substitute,) = _net(run, net), _substitutes(run, 1)
    start = time.monotonic()
    told = diagnose(
        _key(run, name), logits_fn, data.to_float(run.test.images), run.test.labels, ball=Ball(norm, eps),
        is_thorough=True, substitute=substitute,
    )
    records.write_arrays(directory, name, {
        "experiment": "attack_gallery", "net": net, "norm": norm, "eps": eps, "diagnosis": told.summary(),
        "config": run.config, "weights": resumption.digest(logits_fn), "seconds": time.monotonic() - start,
    }, {"index": run.test.index[: told.num_examples]})
    print(f"  {name}: {told.status}", flush=True)


def _substitutes(run: Run, number: int) -> list[LogitsFn]:
    return [_net(run, name) for name in ("substitute", "substitute 2")[:number]]


def _net(run: Run, name: str) -> LogitsFn:
    """Trains a net, or takes it from memory or its checkpoint."""
    if name not in run.nets:
        run.nets[name] = _trained(run, name)
    return run.nets[name]


def _trained(run: Run, name: str) -> LogitsFn:
    settings = run.config
    forward = models.forward(settings.undefended if name == "undefended" else settings.robust)
    variables = dict(forward.model.init(_key(run, f"init {name}"), data.to_float(run.train.images[:1])))
    params, per_epoch = variables.pop("params"), max(1, len(run.train) // settings.batch_size)
    num_steps = settings.epochs * per_epoch
    optimizer = _optimizer(settings.optimizer, settings.learning_rate, num_steps)
    sampler = data.Sampler(len(run.train), settings.batch_size, settings.seed)
    loader = data.Loader(run.train, sampler, None)
    state, history = fit(
        standard.cross_entropy(forward) if name == "undefended" else _adversarial(settings, forward, per_epoch),
        init_state(params, variables, optimizer), optimizer, loader, key=_key(run, f"train {name}"),
        num_steps=num_steps, transform=_augment if settings.augments else None,
        directory=run.directory / "checkpoints" / name, save_every=max(per_epoch, 100), keep=1, log_every=per_epoch,
        label=name,
    )
    if history:
        print(f"  {name}: { {key: f'{value:.4g}' for key, value in history[-1].items()} }", flush=True)
    return forward.logits_fn(state.params, state.model_state)


def _adversarial(settings: Config, forward: models.Forward, per_epoch: int) -> jax.tree_util.Partial:
    # XLA's CPU backend is slow in compiled loops; a few steps may as well be unrolled.
    loop = attacks.Loop(kind="host" if jax.default_backend() == "cpu" else "compiled")
    attack = functools.partial(attacks.pgd, num_steps=settings.train_steps, loop=loop)
    ramp = schedules.linear_ramp(settings.eps_train, 0, settings.ramp * per_epoch) if settings.ramp else None
    return adversarial.cross_entropy(forward, Ball("linf", settings.eps_train), eps=ramp, attack=attack)


@functools.cache
def _optimizer(name: str, learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(learning_rate, num_steps)
    if name == "adam":
        return optax.adam(rate)
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))


def _augment(key: Key, batch: PyTree) -> PyTree:
    shift_key, flip_key = jax.random.split(key)
    x: Array = data.random_shift(shift_key, data.to_float(batch["x"]), padding=4, index=batch["index"])
    return {**batch, "x": data.random_flip(flip_key, x, index=batch["index"])}


def _key(run: Run, name: str) -> Key:
    return shared.key_of(jax.random.key(run.config.seed), name)


if __name__ == "__main__":
    main(command_line.parse(Arguments))
