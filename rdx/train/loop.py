"""The training loop: one compiled step, phases, checkpoints and resumption."""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from rdx import compilation
from rdx.checkpoints import Checkpoints
from rdx.progress import bar
from rdx.types import Array, Key, PyTree

# params, model_state, key, batch, step -> (scalar, (model_state, metrics))
TrainLoss: TypeAlias = Callable[[PyTree, PyTree, Key, PyTree, Array], tuple[Array, tuple[PyTree, dict[str, Array]]]]


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
        step: number of updates made so far, int32.
        params: what the optimizer updates.
        model_state: what the loss updates, such as BatchNorm's statistics; `{}` for none.
        opt_state: the optimizer's state.
    """

    step: Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree


class Phase(NamedTuple):
    """A stretch of training with its own loss.

    Attributes:
        until_step: the first step after the phase; None in the last phase.
        loss: the loss.
    """

    until_step: int | None
    loss: TrainLoss


def init_state(params: PyTree, model_state: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Builds the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, optimizer.init(params))


def fit(
    loss: TrainLoss | Sequence[Phase], state: TrainState, optimizer: optax.GradientTransformation,
    batches: Callable[[int], PyTree], *, key: Key, num_steps: int,
    transform: Callable[[Key, PyTree], PyTree] | None = None, directory: str | os.PathLike[str] | None = None,
    save_every: int = 1000, keep: int = 2, log_every: int = 50,
    on_log: Callable[[dict[str, float]], None] | None = None, progress: bool = True, label: str = "train",
) -> tuple[TrainState, list[dict[str, float]]]:
    """Minimises a loss until `num_steps` updates are made.

    Step `s` sees `batches(s)` and keys folded from `s` alone, so a run that is interrupted and started again with the
    same arguments ends as an uninterrupted one does, bit for bit where the backend's kernels allow it. Where batches
    are sharded over a mesh, state and loss are replicated over it.

    Args:
        loss: `(params, model_state, key, batch, step) -> (scalar, (model_state, metrics))`, where the arrays that it
            holds are leaves of a `Partial`; or phases, in order of time, that share the state.
        state: where to start, from `init_state`; not consumed.
        optimizer: an optax transformation; pass the same object again to reuse the compiled step.
        batches: `step -> {"x" [B, ...], "labels" [B], "index" [B], ...}`, a pure function.
        key: the run's key.
        num_steps: updates in total, those of an earlier run included.
        transform: `(key, batch) -> batch`, inside the compiled step; by default integer images are scaled to [0, 1].
        directory: where checkpoints go; a run found there continues. None saves nothing.
        save_every: steps between checkpoints; the last step is saved in any case.
        keep: how many checkpoints remain.
        log_every: steps between fetches of the metrics from the device.
        on_log: called with every new row of the history.
        progress: whether to show a bar if standard error is a terminal.
        label: the bar's name.

    Returns:
        The final state, and the history of the steps made by this call: one row per `log_every` steps with the number
        of updates made and the mean of each metric since the row before. `gradient_norm` is among them.

    Raises:
        FloatingPointError: when a metric is NaN or infinite; no checkpoint of such a state is written.
        ValueError: where the phases do not cover the run, or the directory holds a longer run.
    """
    return run(
        Program(compiled(update), _replicate), loss, state, optimizer, batches, key=key, num_steps=num_steps,
        transform=transform, directory=directory, save_every=save_every, keep=keep, log_every=log_every, on_log=on_log,
        progress=progress, label=label,
    )


class Program(NamedTuple):
    """How the loop computes: what differs between training one network and many at once.

    Attributes:
        update: the compiled step, of the signature of `update`.
        place: commits `(losses, transform, state, key)` to the devices of the first batch, which is its last argument.
    """

    update: Callable[..., tuple[TrainState, dict[str, Array]]]
    place: Callable[..., tuple[PyTree, Partial, TrainState, Key]]


def run(
    program: Program, loss: TrainLoss | Sequence[Phase], state: TrainState, optimizer: optax.GradientTransformation,
    batches: Callable[[int], PyTree], *, key: Key, num_steps: int,
    transform: Callable[[Key, PyTree], PyTree] | None = None, directory: str | os.PathLike[str] | None = None,
    save_every: int = 1000, keep: int = 2, log_every: int = 50, on_log: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True, label: str = "train",
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Runs the loop of `fit`, whose arguments, results and errors it has, with the given program."""
    phases = as_phases(loss, num_steps)
    transform = compilation.as_partial(scale_integers if transform is None else transform)
    # The step donates its state: without a copy the caller's arrays would be gone.
    state = jax.tree.map(jnp.copy, state)
    history: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        saves = stack.enter_context(Checkpoints(directory, save_every=save_every, keep=keep)) if directory else None
        state = _resume(saves, state, num_steps)
        first = int(state.step)
        show = stack.enter_context(bar(label, num_steps, first=first, is_shown=progress))
        window = _Window(first, saves)
        losses: list[TrainLoss] = [phase.loss for phase in phases]
        for step in range(first, num_steps):
            batch = batches(step)
            if step == first:
                losses, transform, state, key = program.place(losses, transform, state, key, batch)
            current = losses[_phase_at(phases, step)]
            state, metrics = program.update(current, transform, optimizer, state, batch, key=key)
            if _shares_threads(state.step):
                jax.block_until_ready(state)
            window.metrics.append(metrics)
            done = step + 1
            is_last = done == num_steps
            if saves is not None and (done % save_every == 0 or is_last):
                window.fetch()
                saves.save(done, state, force=is_last)
            if done % log_every == 0 or is_last:
                history.append(window.close(done))
                if on_log is not None:
                    on_log(history[-1])
            show(done, _status(history))
    return state, history


def scale_integers(key: Key, batch: PyTree) -> PyTree:
    """Scales integer images to [0, 1] by the largest value of their type; leaves float images alone.

    Args:
        key: not used.
        batch: a batch with images `x [B, ...]`.

    Returns:
        The batch with float32 images.
    """
    del key
    x = batch["x"]
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return batch
    return {**batch, "x": x.astype(jnp.float32) / jnp.iinfo(x.dtype).max}


def update(
    loss: Partial, transform: Partial, optimizer: optax.GradientTransformation, state: TrainState, batch: PyTree, *,
    key: Key,
) -> tuple[TrainState, dict[str, Array]]:
    """Makes one step of training.

    Args:
        loss: see `fit`.
        transform: `(key, batch) -> batch`.
        optimizer: an optax transformation.
        state: before the step.
        batch: what the step sees.
        key: the run's key; the step's are folded from it.

    Returns:
        The state after the step, and the loss's metrics with `gradient_norm`.
    """
    transform_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
    batch = transform(transform_key, batch)
    gradient_fn = jax.grad(loss, has_aux=True)
    gradients, (model_state, metrics) = gradient_fn(state.params, state.model_state, loss_key, batch, state.step)
    # Optax's Adam raises a float to an integer power, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {**metrics, "gradient_norm": optax.tree.norm(gradients)}
    return TrainState(state.step + 1, params, model_state, opt_state), metrics


@functools.cache
def compiled(update: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a step like `update`, whose state it consumes; once for each function."""
    return jax.jit(
        update, static_argnames="optimizer", donate_argnames="state", compiler_options=compilation.cpu_options()
    )


class _Window:
    """The metrics since the last row of the history, on the device until they are fetched."""

    def __init__(self, first: int, saves: Checkpoints | None) -> None:
        self.first = first
        self.metrics: list[dict[str, Any]] = []
        self._saves = saves

    def fetch(self) -> None:
        """Brings the metrics to the host and raises where one is not finite."""
        self.metrics = jax.device_get(self.metrics)
        for step, metrics in enumerate(self.metrics, self.first):
            for name, value in metrics.items():
                if not np.isfinite(value).all():
                    raise FloatingPointError(self._explain(name, value, step))

    def close(self, done: int) -> dict[str, Any]:
        """Averages the metrics and starts the next window."""
        self.fetch()
        names = dict.fromkeys(name for metrics in self.metrics for name in metrics)
        rows = {name: [metrics[name] for metrics in self.metrics if name in metrics] for name in names}
        self.first, self.metrics = done, []
        return {"step": done, **{name: np.mean(values, axis=0).tolist() for name, values in rows.items()}}

    def _explain(self, name: str, value: Any, step: int) -> str:
        last = self.first + len(self.metrics) - 1
        saved = None if self._saves is None else self._saves.latest_step
        good = "No checkpoint was written" if saved is None else f"The last good checkpoint is that of step {saved}"
        where = ""
        if value.ndim:  # of runs that train together
            worst = int(np.flatnonzero(~np.isfinite(value))[0])
            value, where = value[worst], f" in run {worst}"
        return (
            f"{name} is {value} at step {step}{where} (steps {self.first} to {last} were looked at). {good}. Lower the "
            "learning rate, clip the gradients, or look for a division by 0 or a logarithm of 0 in the loss."
        )


def as_phases(loss: TrainLoss | Sequence[Phase], num_steps: int) -> tuple[Phase, ...]:
    """Makes phases of a loss, whose arrays are leaves of a `Partial` in each.

    Raises:
        ValueError: where the phases do not cover the run.
    """
    phases = (Phase(None, loss),) if callable(loss) else tuple(loss)
    ends = [num_steps if phase.until_step is None else phase.until_step for phase in phases]
    if not ends or ends[-1] < num_steps or any(phase.until_step is None for phase in phases[:-1]):
        raise ValueError(f"The phases end at steps {ends}, the run at {num_steps}: let the last one alone end at None.")
    return tuple(Phase(phase.until_step, compilation.as_partial(phase.loss)) for phase in phases)


def _phase_at(phases: Sequence[Phase], step: int) -> int:
    return next(i for i, phase in enumerate(phases) if phase.until_step is None or step < phase.until_step)


def _resume(saves: Checkpoints | None, state: TrainState, num_steps: int) -> TrainState:
    found = None if saves is None else saves.restore_latest(state)
    if found is None:
        return state
    step, state = found
    if step > num_steps:
        raise ValueError(f"The checkpoint is at step {step}, past num_steps={num_steps}: give another directory.")
    return state


def _replicate(losses: PyTree, transform: Partial, state: TrainState, key: Key, batch: PyTree) -> Any:
    """Commits everything to the devices of the batch: what is committed elsewhere, or nowhere, is compiled anew."""
    sharding = getattr(jax.tree.leaves(batch)[0], "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.device_put((losses, transform, state, key), sharding)


def _shares_threads(array: Array) -> bool:
    # XLA's virtual CPU devices share one thread pool, where steps in flight together deadlock in their all-reduces.
    devices = array.devices()
    return len(devices) > 1 and next(iter(devices)).platform == "cpu"


def _status(history: list[dict[str, Any]]) -> str:
    return f"loss {np.mean(history[-1]['loss']):.4f}  " if history and "loss" in history[-1] else ""
