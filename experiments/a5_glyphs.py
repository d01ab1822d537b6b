"""Fills Table 9 and Fig. 4 of A5 (Frosio & Kautz 2023): characters that are certified after they are photographed.

    python -m experiments.a5_glyphs --preset cpu
    python -m experiments.a5_glyphs --preset paper       (an accelerator)

62 characters are printed and photographed by a random camera; classifiers see the pictures. Rows: a vanilla classifier,
a certified one, A5/P (the characters are changed), A5/PC (characters and classifier) and a control, a classifier that
is trained on from the certified one as long as A5/PC's, with characters as they were; also A5/PRC, which the paper only
names. Presets: `smoke` takes seconds and runs every branch, `cpu` has pictures of 32 x 32 pixels, a small network and
A5's recipes by intervals alone, `paper` has the paper's network, size and camera. All rows are evaluated on the same
draws of the camera, which no training has seen. The certified classifier and the control are trained by CROWN-IBP with
loss fusion (Xu et al. 2020, arXiv:2002.12920), where the paper has a backward row for each of 61 margins.

Everything goes to `runs/a5_glyphs/<preset>/`: one JSON and NPZ per row, `table.md` and pictures. A run that is
interrupted continues with the same command and ends with the same table.

Obtained (experiments/results/a5_glyphs), `cpu`, certified error of 992 pictures: vanilla 100 %, certified 10.08,
A5/P 5.65, control 4.33, A5/PC 1.01, A5/PRC 0.30; 76 minutes beside a training that went first, a pause of 17 among
them (27 minutes alone, when the attacks were PGD and APGD). The paper, with its own font, size and network:
vanilla 100, CROWN-IBP 13.85, A5/P 11.84, A5/PC 4.20. The `paper` preset has not been run yet.

Attacked errors are those of AutoAttack (the paper prints none). Certified errors are those of CROWN-IBP intersected
with IBP (the paper: IBP).
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

from experiments import a5_glyphs_report, a5_training, autoattack, command_line, runs
from experiments.a5_glyphs_presets import Config, config
from experiments.a5_presets import Schedule
from experiments.batches import certified_by_intervals, in_batches
from rdx import attacks, compilation, data, models
from rdx.attacks import resumption
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.evaluate import evaluate, records, shared
from rdx.robustify import acquisition, offline, online, physical
from rdx.train import certified, schedules, standard
from rdx.train.loop import Phase, fit, init_state
from rdx.types import Array, Key, PyTree


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line.

    Attributes:
        preset: smoke, cpu or paper.
        out: output directory; runs/a5_glyphs/<preset> if empty.
        split: which pictures are evaluated: test, or validation to choose settings by.
        only: fill only the row of this name.
    """

    preset: str = "cpu"
    out: str = ""
    split: str = "test"
    only: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """What every stage of a run needs."""

    config: Config
    glyphs: data.Source
    directory: Path
    classifier: models.Forward
    robustifier: models.Forward

    @property
    def key(self) -> Key:
        """The run's key."""
        return jax.random.key(self.config.seed)

    @property
    def defense(self) -> Ball:
        """The defender's ball around a prototype."""
        return Ball("linf", self.config.eps_defense)

    @property
    def defense_picture(self) -> Ball:
        """The defender's ball around a picture."""
        return Ball("linf", self.config.eps_picture)


def main(arguments: Arguments) -> Path:
    """Fills every row that is not done yet, then writes table and pictures; returns the output directory."""
    recipes = a5_glyphs_report.RECIPES
    if arguments.only and arguments.only not in recipes:
        raise ValueError(f"No row {arguments.only!r}: use one of {', '.join(recipes)}.")
    run = _prepare(arguments)
    for recipe in recipes:
        if arguments.only in {"", recipe} and records.read(run.directory / "records", recipe) is None:
            _fill(run, recipe)
    return a5_glyphs_report.write(run.directory, run.config)


def _prepare(arguments: Arguments) -> Run:
    settings = config(arguments.preset, arguments.split)
    glyphs = data.load_glyphs(size=settings.size, fonts=(settings.font,))
    suffix = "" if settings.split == "test" else f"-{settings.split}"
    directory = Path(arguments.out or f"runs/a5_glyphs/{settings.preset}{suffix}")
    runs.claim(directory, settings, glyphs)
    classifier, robustifier = (models.forward(net) for net in (settings.classifier, settings.robustifier))
    return Run(settings, glyphs, directory, classifier, robustifier)


def _fill(run: Run, recipe: str) -> None:
    """Trains what the row needs, takes the pictures, evaluates them and writes the record."""
    compilation.spare_maps()
    print(recipe, flush=True)
    settings, params = run.config, _TRAINED[recipe](run)
    start = time.monotonic()
    logits_fn, ball = run.classifier.logits_fn(params["classifier"], {}), Ball("linf", settings.eps_attack)
    shown, x = _photographs(run, settings.num_test), _pictures(run, params)
    attack_set = attacks.suite("linf", num_steps=settings.attack_steps, num_queries=settings.attack_queries)
    result = evaluate(
        run.key, logits_fn, x, shown.labels, index=shown.index, ball=ball, attacks=attack_set,
        num_attacked=settings.num_attacked, cross_check=settings.cross_check, on_progress=_show,
    )
    by_ibp = certified_by_intervals(logits_fn, ball, x, shown.labels)
    _save_images(run, recipe, params, x)
    summary = records.summarize(result, tuple(attack_set))
    seconds_training, seconds_evaluation = runs.seconds(run.directory / "seconds" / recipe), time.monotonic() - start
    records.write(run.directory / "records", recipe, {
        "experiment": "a5_glyphs", "recipe": recipe, "config": settings, "summary": summary,
        "certified_all_by_ibp": 1.0 - float(by_ibp.mean()),
        "attacks": autoattack.recorded(attack_set),
        "certified_by": "crown_ibp intersected with ibp",
        "data": {"name": run.glyphs.name, "split": settings.split, "size": len(shown), "font": settings.font,
                 "fingerprint": run.glyphs.fingerprint},
        "weights": resumption.digest(logits_fn),
        "seconds_training": seconds_training, "seconds_evaluation": seconds_evaluation,
        "seconds_total": seconds_training + seconds_evaluation,
    }, result)
    print(f"  {a5_glyphs_report.line(summary)}  ({seconds_training:.0f} s training of this row's own stage, "
          f"{seconds_evaluation:.0f} s evaluation)", flush=True)


def _train_vanilla(run: Run) -> PyTree:
    loss, params = standard.cross_entropy(run.classifier), _fresh(run, run.classifier, "classifier")
    params = _fit(run, run.config.vanilla, loss, params, "vanilla", transform=_camera(run))
    return _with_plain_prototypes(run, params)


def _train_base(run: Run) -> PyTree:
    schedule = run.config.base
    params = _fresh(run, run.classifier, "classifier")
    params = _fit(run, schedule, _certified(run, schedule), params, "base", transform=_camera(run))
    return _with_plain_prototypes(run, params)


def _train_control(run: Run) -> PyTree:
    schedule = run.config.retrained
    params = _fit(run, schedule, _certified(run, schedule), _train_base(run)["classifier"], "control",
                  transform=_camera(run))
    return _with_plain_prototypes(run, params)


def _train_prototypes(run: Run) -> PyTree:
    schedule, classifier = run.config.prototypes, _train_base(run)["classifier"]
    legacy = run.classifier.logits_fn(classifier, {})
    builder = functools.partial(physical.prototypes, legacy, run.config.camera, defense=run.defense)
    params = physical.init(len(run.glyphs), run.glyphs.images.shape[1:])
    return {**_fit(run, schedule, _phases(run, schedule, builder), params, "p"), "classifier": classifier}


def _train_retrained(run: Run) -> PyTree:
    schedule = run.config.retrained
    builder = functools.partial(physical.with_classifier, run.classifier, run.config.camera, defense=run.defense)
    return _fit(run, schedule, _phases(run, schedule, builder), _train_base(run), "pc")


def _train_robustified(run: Run) -> PyTree:
    schedule = run.config.robustified
    builder = functools.partial(
        physical.with_robustifier, run.classifier, run.robustifier, run.config.camera, defense=run.defense,
        defense_picture=run.defense_picture,
    )
    params = {**_train_retrained(run), "robustifier": _fresh(run, run.robustifier, "robustifier")}
    return _fit(run, schedule, _phases(run, schedule, builder), params, "prc")


# Each gives prototypes `z` and a classifier, and a robustifier where there is one. The last stage has the row's name.
_TRAINED: dict[str, Callable[[Run], PyTree]] = {
    "vanilla": _train_vanilla, "base": _train_base, "p": _train_prototypes, "control": _train_control,
    "pc": _train_retrained, "prc": _train_robustified,
}


def _fresh(run: Run, network: models.Forward, name: str) -> PyTree:
    picture = jnp.zeros((1, run.config.size, run.config.size, run.config.camera.num_channels))
    return network.model.init(shared.key_of(run.key, name), picture)["params"]


def _with_plain_prototypes(run: Run, classifier: PyTree) -> PyTree:
    return physical.init(len(run.glyphs), run.glyphs.images.shape[1:], classifier=classifier)


def _certified(run: Run, schedule: Schedule) -> tuple[Phase, ...]:
    """Trains a classifier alone."""
    return certified.phases(run.classifier, Ball("linf", 0.0), eps=_ramp(run, schedule), loss=certified.fused)


def _phases(run: Run, schedule: Schedule, builder: Callable[..., Any]) -> tuple[Phase, ...]:
    threat = Threat(Ball("linf", 0.0), _ramp(run, schedule), has_crown=run.config.has_crown)
    return a5_training.phases(threat, builder)


def _ramp(run: Run, schedule: Schedule) -> schedules.Ramp:
    return a5_training.ramp(schedule, run.config.eps_attack, len(_photographs(run, run.config.num_train)))


def _fit(run: Run, schedule: Schedule, loss: Any, params: PyTree, name: str, transform: Any = None) -> PyTree:
    pictures = _photographs(run, run.config.num_train)
    per_epoch = a5_training.steps_per_epoch(len(pictures), schedule)
    optimizer = _hurried(a5_training.rmsprop(schedule, len(pictures)), run.config.prototype_speed)
    sampler = data.Sampler(len(pictures), schedule.batch_size, run.config.seed)
    loader = data.Loader(pictures, sampler, data.data_mesh() if schedule.batch_size % jax.device_count() == 0 else None)
    state, history = fit(
        loss, init_state(params, {}, optimizer), optimizer,
        lambda step: {**loader(step), "row": jnp.asarray(sampler.indices(step) % len(run.glyphs))},
        key=shared.key_of(run.key, f"train {name}"), num_steps=schedule.epochs * per_epoch, transform=transform,
        directory=run.directory / "checkpoints" / name, save_every=max(per_epoch, 100), keep=1, log_every=per_epoch,
        on_log=runs.stopwatch(run.directory / "seconds" / name), label=name,
    )
    if history:
        last = {key: f"{value:.4g}" for key, value in history[-1].items()}
        print(f"  {name}: {last}", flush=True)
    # Training leaves them on every device of the mesh, evaluation happens on one.
    return jax.device_put(state.params, jax.local_devices()[0])


@functools.cache
def _hurried(optimizer: optax.GradientTransformation, prototype_speed: float) -> optax.GradientTransformation:
    def hurry(updates: PyTree, params: PyTree) -> PyTree:
        del params
        return {**updates, "z": prototype_speed * updates["z"]} if "z" in updates else updates

    return optax.chain(optimizer, optax.stateless(hurry))


def _photographs(run: Run, num_each: int) -> data.Source:
    """Lists pictures to be taken, in turn one of each character; `index` numbers the pictures."""
    number = np.arange(num_each * len(run.glyphs), dtype=np.int32)
    return dataclasses.replace(run.glyphs.subset(number % len(run.glyphs)), index=number)


def _camera(run: Run) -> jax.tree_util.Partial:
    """Photographs the prototypes of a batch."""
    return jax.tree_util.Partial(_photograph, run.config.camera)


def _photograph(camera: acquisition.Camera, key: Key, batch: PyTree) -> PyTree:
    return {**batch, "x": acquisition.acquire(key, data.to_float(batch["x"]), camera, index=batch["index"])}


def _pictures(run: Run, params: PyTree) -> Array:
    """Takes the pictures that are evaluated: the same draws for every row, of a key that no training uses."""
    shown = _photographs(run, run.config.num_test)
    key = shared.key_of(run.key, f"{run.config.split} pictures")
    return in_batches(
        functools.partial(_take, run.robustifier, run.config.camera, run.defense, run.defense_picture, key, params),
        jnp.asarray(shown.images), jnp.asarray(shown.index),
    )


@functools.partial(jax.jit, static_argnames="robustifier")
def _take(
    robustifier: models.Forward, camera: acquisition.Camera, defense: Ball, defense_picture: Ball, key: Key,
    params: PyTree, images: Array, index: Array,
) -> Array:
    rows = index % len(params["z"])
    x = physical.apply(key, params, data.to_float(images), rows, camera, defense=defense, index=index)
    if "robustifier" in params:
        x = online.apply(robustifier, params["robustifier"], x, defense=defense_picture)
    return x


def _save_images(run: Run, recipe: str, params: PyTree, x: Array) -> None:
    """Keeps prototypes and one picture of each for Fig. 4."""
    w, num = data.to_float(run.glyphs.images), len(run.glyphs)
    w_defended = offline.apply(params, w, jnp.arange(num), defense=run.defense)
    path = run.directory / "records" / f"{recipe}-images.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path, original=run.glyphs.images, defended=np.asarray(w_defended, np.float16),
        picture=np.asarray(x[:num], np.float16),
    )


def _show(stage: str, done: int, total: int) -> None:
    if done >= total:
        print(f"  {stage}: {total} pictures", flush=True)


if __name__ == "__main__":
    main(command_line.parse(Arguments))
