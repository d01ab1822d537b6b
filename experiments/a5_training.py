"""What the cells of A5's tables train: classifiers, A5/O, A5/R and A5/RC, one after another or many at once.

Every training is a `Job` with checkpoints of its own. On accelerators the jobs of one kind are a single vectorised
program (`train_together`), which leaves each job's last checkpoint where `train` finds it.
"""

import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import augmentation, runs
from experiments.a5_presets import Config, Schedule
from experiments.a5_report import Cell, nth
from experiments.batches import in_batches
from rdx import bounds, data, models, robustify
from rdx.balls import Ball
from rdx.bounds import Threat
from rdx.checkpoints import Checkpoints
from rdx.train import certified, fit_together, schedules, standard
from rdx.train.loop import Phase, fit, init_state
from rdx.types import Array, Key, LogitsFn, Norm, PyTree


@dataclasses.dataclass(frozen=True)
class Run:
    """What every stage of a run needs.

    Attributes:
        config: settings.
        train: training images.
        test: images that are robustified and evaluated.
        directory: where records and checkpoints go.
        classifier: the network `C`.
        robustifier: the network `R`.
        legacy: a classifier that A5/O and A5/R take as it is; None for the one that `eps_classifier` names.
        norm: of the defender's and the attacker's ball, and of what classifiers are trained for; where it is not linf,
            A5/O descends the norm's steepest way.
        method: bounds that A5 prepares with.
    """

    config: Config
    train: data.Source
    test: data.Source
    directory: Path
    classifier: models.Forward
    robustifier: models.Forward
    legacy: LogitsFn | None = None
    norm: Norm = "linf"
    method: Callable[..., bounds.Interval] = bounds.ibp

    def path(self, name: str) -> Path:
        """Names the checkpoint directory of one training."""
        return self.directory / "checkpoints" / name

    def defense(self, cell: Cell) -> Ball:
        """Builds the defender's ball."""
        return Ball(self.norm, cell.eps_defense)

    def threat(self, schedule: Schedule, eps: float, num_examples: int, *, has_crown: bool) -> Threat:
        """Builds the attack that A5 prepares for, at the radius `eps` in the end."""
        rising = ramp(schedule, eps, num_examples)
        return Threat(Ball(self.norm, 0.0), rising, has_crown=has_crown, method=self.method)

    def evaluated(self, cell: Cell) -> data.Source:
        """Selects the test images of a cell: A5/O optimises, and so has, no more than the config says."""
        return self.test.take(self.config.num_offline or len(self.test)) if cell.recipe == "offline" else self.test


@dataclasses.dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        name: of its checkpoints.
        schedule: how long and how fast.
        loss: a loss of `fit`, or its phases.
        params: where it starts.
        source: what it sees.
        stream: which of the run's keys it draws from.
        repeat: what is added to the run's seed.
        optimizer: the rule of its updates; the paper's by default.
        transform: augmentation, if any.
    """

    name: str
    schedule: Schedule
    loss: Any
    params: PyTree
    source: data.Source
    stream: int
    repeat: int = 0
    optimizer: optax.GradientTransformation | None = None
    transform: Callable[..., PyTree] | None = None

    @property
    def rule(self) -> optax.GradientTransformation:
        """The optimizer; one object for equal jobs."""
        return rmsprop(self.schedule, len(self.source)) if self.optimizer is None else self.optimizer

    @property
    def num_steps(self) -> int:
        """Counts the updates."""
        return self.schedule.epochs * steps_per_epoch(len(self.source), self.schedule)

    @property
    def options(self) -> dict[str, Any]:
        """Gives `fit` all but the loss, the state, the batches and the key."""
        per_epoch = steps_per_epoch(len(self.source), self.schedule)
        return {
            "num_steps": self.num_steps, "transform": self.transform, "save_every": max(per_epoch, 100), "keep": 1,
            "log_every": per_epoch, "label": self.name,
        }


def prepare(
    settings: Config, directory: Path, *, claimed: Any, split: str = "test", root: str = "", archive: str = ""
) -> Run:
    """Loads the data and claims the directory.

    Args:
        settings: networks, schedules and data.
        directory: where the run writes.
        claimed: all settings of the run, see `runs.claim`.
        split: what is robustified and evaluated.
        root: directory of the published data files; RDX_DATA_DIR if empty.
        archive: a prepared .npz instead.
    """
    options = {"root": root or None, "archive": archive or None}
    train, test = (data.load(settings.dataset, name, **options) for name in ("train", split))
    runs.claim(directory, claimed, test)
    return Run(
        settings, train.take(settings.num_train or len(train)), test.take(settings.num_test or len(test)), directory,
        models.forward(settings.classifier), models.forward(settings.robustifier),
    )


def defended(run: Run, cell: Cell) -> tuple[LogitsFn, Array]:
    """Trains what a cell needs, where that is not done, and defends its test images.

    Returns:
        The classifier, and the images of `run.evaluated(cell)`, as floats.
    """
    x, defense = data.to_float(run.evaluated(cell).images), run.defense(cell)
    if cell.recipe == "base":
        return _legacy(run, cell), x
    if cell.recipe == "offline":
        params = train(run, offline_job(run, cell))
        return _legacy(run, cell), robustify.offline.apply(params, x, jnp.arange(len(x)), defense=defense)
    logits_fn, robustifier = networks(run, cell)
    return logits_fn, in_batches(lambda part: _apply_online(run.robustifier, robustifier, part, defense), x)


def networks(run: Run, cell: Cell) -> tuple[LogitsFn, PyTree]:
    """Trains the networks of a cell of A5/R or A5/RC, where that is not done: the classifier, and R's parameters."""
    if cell.recipe == "online":
        return _legacy(run, cell), train(run, online_job(run, cell))
    both = train(run, joint_job(run, cell))
    return run.classifier.logits_fn(both["classifier"], {}), both["robustifier"]


def train(run: Run, job: Job) -> PyTree:
    """Trains, or goes on, or takes the finished parameters from the checkpoint."""
    batch_size = min(job.schedule.batch_size, len(job.source))
    mesh = data.data_mesh() if batch_size % jax.device_count() == 0 else None
    optimizer = job.rule
    state, history = fit(
        job.loss, init_state(job.params, {}, optimizer), optimizer, _batches(run, job, mesh),
        key=_key(run, job.stream, job.repeat), directory=run.path(job.name), **job.options,
    )
    _show(job, history)
    # Training leaves them on every device of the mesh, evaluation happens on one.
    return jax.device_put(state.params, jax.local_devices()[0])


def train_together(run: Run, cells: Iterable[Cell], at_once: int) -> None:
    """Trains what cells need, up to `at_once` jobs of a kind as one program, and leaves their checkpoints.

    Args:
        run: the run.
        cells: which cells.
        at_once: the largest number of jobs in one program; where the device's memory runs out, half as many are tried.
    """
    cells = list(cells)
    stages = (
        (lambda cell: classifier_job(run, cell.eps_classifier, cell.repeat), {"base", "offline", "online", "joint"}),
        (lambda cell: offline_job(run, cell), {"offline"}), (lambda cell: online_job(run, cell), {"online", "joint"}),
        (lambda cell: joint_job(run, cell), {"joint"}),
    )
    for build, recipes in stages:
        jobs = {job.name: job for job in (build(cell) for cell in cells if cell.recipe in recipes)}
        kinds: dict[Any, list[Job]] = {}
        for job in jobs.values():
            kinds.setdefault(jax.tree.structure(job.loss), []).append(job)
        for alike in kinds.values():
            for start in range(0, len(alike), at_once):
                _train_group(run, alike[start : start + at_once])


def _train_group(run: Run, jobs: list[Job]) -> None:
    if all((run.path(job.name) / str(job.num_steps)).exists() for job in jobs):
        return
    try:
        _train_at_once(run, jobs)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or len(jobs) == 1:
            raise
        half = len(jobs) // 2
        print(f"{len(jobs)} at once do not fit into memory: {half} instead", flush=True)
        for part in (jobs[:half], jobs[half:]):
            _train_group(run, part)


def _train_at_once(run: Run, jobs: list[Job]) -> None:
    name = f"together-{hashlib.sha256(' '.join(job.name for job in jobs).encode()).hexdigest()[:12]}"
    first, optimizer = jobs[0], jobs[0].rule
    print(f"{len(jobs)} at once: {', '.join(job.name for job in jobs)}", flush=True)
    is_one_order = len({job.repeat for job in jobs}) == 1
    states, histories = fit_together(
        [job.loss for job in jobs], [init_state(job.params, {}, optimizer) for job in jobs], optimizer,
        _batches(run, first, None) if is_one_order else [_batches(run, job, None) for job in jobs],
        keys=jnp.stack([_key(run, job.stream, job.repeat) for job in jobs]), directory=run.path(name),
        **{**first.options, "label": name},
    )
    for job, state, history in zip(jobs, states, histories, strict=True):
        with Checkpoints(run.path(job.name), save_every=job.num_steps, keep=1) as saves:
            saves.save(job.num_steps, state, force=True)
        _show(job, history)
    shutil.rmtree(run.path(name))


def classifier_job(run: Run, eps: float, repeat: int = 0) -> Job:
    """Describes the training of a classifier for the radius `eps`, from the run's seed plus `repeat`."""
    settings, schedule = run.config, run.config.base
    params = run.classifier.model.init(_key(run, 0, repeat), data.to_float(run.train.images[:1]))["params"]
    loss = standard.cross_entropy(run.classifier)
    if eps > 0:
        rising = ramp(schedule, settings.base_scale * eps, len(run.train))
        loss = certified.phases(run.classifier, Ball(run.norm, 0.0), eps=rising)
    transform = _augment(settings) if settings.base_augmented else None
    return Job(f"classifier-{eps:.4g}{nth(repeat)}", schedule, loss, params, run.train, 1, repeat, transform=transform)


def offline_job(run: Run, cell: Cell) -> Job:
    """Describes A5/O on the cell's test images."""
    schedule, source = run.config.offline, run.evaluated(cell)
    threat = run.threat(schedule, cell.eps_robustify, len(source), has_crown=False)
    loss = robustify.offline.offline(_legacy(run, cell), defense=run.defense(cell), threat=threat)
    start = robustify.offline.init(len(source), source.images.shape[1:])
    decay = _decay(schedule, len(source))
    optimizer = None if run.norm == "linf" else _steepest(run.norm, schedule.learning_rate, decay)
    return Job(cell.training, schedule, loss, start, source, 2, cell.repeat, optimizer)


def online_job(run: Run, cell: Cell) -> Job:
    """Describes A5/R, also that which A5/RC starts from."""
    params = run.robustifier.model.init(_key(run, 3, cell.repeat), data.to_float(run.train.images[:1]))["params"]
    builder = functools.partial(
        robustify.online.online, _legacy(run, cell), run.robustifier, defense=run.defense(cell)
    )
    schedule, name = run.config.online, cell.training.replace("joint", "online")
    loss = _phases(run, schedule, cell.eps_robustify, builder)
    return Job(name, schedule, loss, params, run.train, 4, cell.repeat)


def joint_job(run: Run, cell: Cell) -> Job:
    """Describes A5/RC."""
    base = train(run, classifier_job(run, cell.eps_classifier, cell.repeat))
    robustifier = train(run, online_job(run, cell))
    builder = functools.partial(robustify.joint.joint, run.classifier, run.robustifier, defense=run.defense(cell))
    loss, params = _phases(run, run.config.joint, cell.eps_robustify, builder), robustify.joint.init(robustifier, base)
    transform = _augment(run.config)
    return Job(cell.training, run.config.joint, loss, params, run.train, 5, cell.repeat, transform=transform)


def steps_per_epoch(num_examples: int, schedule: Schedule) -> int:
    """Counts the updates in one pass over the examples."""
    return max(1, num_examples // schedule.batch_size)


def ramp(schedule: Schedule, eps: float, num_examples: int) -> schedules.Ramp:
    """Builds the radius at each step, which rises to `eps`."""
    if schedule.ramp == 0:
        return schedules.linear_ramp(eps, start=-1, length=1)
    return schedules.smoothed(
        eps, start_epoch=schedule.warmup + 1, length_epochs=schedule.ramp, mid=0.3,
        steps_per_epoch=steps_per_epoch(num_examples, schedule), beta=4.0,
    )


def phases(threat: Threat, builder: Callable[..., Any]) -> tuple[Phase, ...]:
    """Builds the phases of a robustifying loss.

    CROWN-IBP takes part, if at all, while the radius rises; after that its share is 0 and it is left out.

    Args:
        threat: the attack to prepare for; it says whether CROWN-IBP takes part.
        builder: `(threat=...) -> loss`.
    """
    rising = (Phase(max(int(threat.eps.end), 0), builder(threat=threat)),) if threat.has_crown else ()
    return *rising, Phase(None, builder(threat=dataclasses.replace(threat, has_crown=False)))


def rmsprop(schedule: Schedule, num_examples: int) -> optax.GradientTransformation:
    """Builds the paper's optimizer; equal schedules share one object, and so what is compiled with it."""
    return _rmsprop(schedule.learning_rate, _decay(schedule, num_examples))


def _decay(schedule: Schedule, num_examples: int) -> tuple[int, ...]:
    """Counts the updates after which the learning rate falls."""
    per_epoch = steps_per_epoch(num_examples, schedule)
    return tuple(epoch * per_epoch for epoch in schedule.decay)


def _legacy(run: Run, cell: Cell) -> LogitsFn:
    if run.legacy is not None:
        return run.legacy
    return run.classifier.logits_fn(train(run, classifier_job(run, cell.eps_classifier, cell.repeat)), {})


def _phases(run: Run, schedule: Schedule, eps: float, builder: Callable[..., Any]) -> tuple[Phase, ...]:
    return phases(run.threat(schedule, eps, len(run.train), has_crown=run.config.has_crown), builder)


def _batches(run: Run, job: Job, mesh: jax.sharding.Mesh | None) -> Callable[[int], PyTree]:
    batch_size = min(job.schedule.batch_size, len(job.source))
    sampler = data.Sampler(len(job.source), batch_size, run.config.seed + job.repeat)
    loader = data.Loader(job.source, sampler, mesh)
    return lambda step: {**loader(step), "row": jnp.asarray(sampler.indices(step))}


@functools.cache
def _rmsprop(learning_rate: float, boundaries: tuple[int, ...]) -> optax.GradientTransformation:
    # torch's RMSProp, which the paper uses, adds its epsilon outside the root.
    return optax.rmsprop(_falling(learning_rate, boundaries), decay=0.99, eps_in_sqrt=False)


@functools.cache
def _steepest(norm: Norm, learning_rate: float, boundaries: tuple[int, ...]) -> optax.GradientTransformation:
    return robustify.offline.steepest(Ball(norm, 1.0), _falling(learning_rate, boundaries))


def _falling(learning_rate: float, boundaries: tuple[int, ...]) -> optax.Schedule:
    return optax.piecewise_constant_schedule(learning_rate, dict.fromkeys(boundaries, 0.1))


def _augment(settings: Config) -> Callable[..., PyTree] | None:
    return augmentation.transform(
        shift=settings.shift, rotation=settings.rotation, flip=settings.flip, is_alike=settings.is_alike
    )


@functools.partial(jax.jit, static_argnames="robustifier")
def _apply_online(robustifier: models.Forward, params: PyTree, x: Array, defense: Ball) -> Array:
    return robustify.online.apply(robustifier, params, x, defense=defense)


def _key(run: Run, stream: int, repeat: int) -> Key:
    return jax.random.fold_in(jax.random.key(run.config.seed + repeat), stream)


def _show(job: Job, history: list[dict[str, float]]) -> None:
    if history:
        print(f"  {job.name}: {({name: f'{value:.4g}' for name, value in history[-1].items()})}", flush=True)
