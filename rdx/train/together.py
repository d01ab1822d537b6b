"""Many trainings at once: runs that differ in values alone are one compiled, vectorised and sharded program.

The cells of a table, such as A5's (Frosio & Kautz 2023, Tables 2 to 8), train networks of one shape with other radii,
seeds or frozen classifiers. A small network leaves an accelerator idle; stacked, all of them fill it. Each run sees the
batches and keys that it would see alone, so it ends where it would end alone, up to the rounding of batched kernels.
On CPUs a convolution whose weights are batched takes about six times its time: there the runs go one after another.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from rdx.train.loop import Phase, Program, TrainLoss, TrainState, as_phases, compiled, run, update
from rdx.types import Array, Key, PyTree

# What the runs share of a state, and what each has of its own along the first axis.
_AXES = TrainState(None, 0, 0, 0)  # pyright: ignore[reportArgumentType] - axes in the place of arrays


def fit_together(
    losses: Sequence[TrainLoss | Sequence[Phase]], states: Sequence[TrainState],
    optimizer: optax.GradientTransformation, batches: Callable[[int], PyTree] | Sequence[Callable[[int], PyTree]], *,
    keys: Key, num_steps: int, **options: Any,
) -> tuple[list[TrainState], list[list[dict[str, float]]]]:
    """Minimises many losses at once, each as `fit` does, through the same loop: one program, one checkpoint.

    The runs are spread over the largest number of devices that divides theirs; no device waits for another within a
    step. Memory is that of all runs together.

    Args:
        losses: one loss, or one sequence of phases, for each run: equal functions over arrays of equal shapes, and
            phases that change at the same steps.
        states: where each run starts, from `init_state`; all at the same step.
        optimizer: one for all; each run has its own state of it.
        batches: `step -> batch`, seen by all runs and held once, or one such function for each run.
        keys: one key for each run, shape `[C]`.
        num_steps: updates in total, those of an earlier run included.
        **options: `transform`, `directory`, `save_every`, `keep`, `log_every`, `on_log`, `progress` and `label` of
            `fit`. `on_log` sees lists of `C` values.

    Returns:
        The final states and the histories, in the order of the runs.

    Raises:
        FloatingPointError: when a metric of any run is NaN or infinite.
        ValueError: where the runs do not fit each other, and as `fit`.
    """
    stacked, state = _stack_phases(losses, num_steps), _stack_states(states)
    num_runs = len(states)
    if len(losses) != num_runs or keys.shape != (num_runs,) or not (callable(batches) or len(batches) == num_runs):
        raise ValueError(f"{len(losses)} losses, {num_runs} states and keys of shape {keys.shape}: one of each a run.")
    num_devices = math.gcd(num_runs, jax.device_count())
    mesh = jax.make_mesh((num_devices,), ("runs",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices])
    over_runs, everywhere = NamedSharding(mesh, PartitionSpec("runs")), NamedSharding(mesh, PartitionSpec())

    def load(step: int) -> PyTree:
        if callable(batches):
            return jax.device_put(batches(step), everywhere)
        return jax.device_put(_stack([own(step) for own in batches]), over_runs)

    program = Program(_update_all(None if callable(batches) else 0), functools.partial(_place, over_runs, everywhere))
    state, history = run(program, stacked, state, optimizer, load, key=keys, num_steps=num_steps, **options)
    return _split(state, history, num_runs)


@functools.cache
def _update_all(batch_axis: int | None) -> Callable[..., Any]:
    """Compiles one step of all runs, which share a batch or have one each along an axis."""
    def update_all(
        loss: Partial, transform: Partial, optimizer: optax.GradientTransformation, state: TrainState, batch: PyTree,
        *, key: Key,
    ) -> tuple[TrainState, dict[str, Array]]:
        def one(loss: Partial, state: TrainState, batch: PyTree, key: Key) -> tuple[TrainState, dict[str, Array]]:
            return update(loss, transform, optimizer, state, batch, key=key)

        return jax.vmap(one, in_axes=(0, _AXES, batch_axis, 0), out_axes=(_AXES, 0))(loss, state, batch, key)

    return compiled(update_all)


def _place(
    over_runs: NamedSharding, everywhere: NamedSharding, losses: PyTree, transform: Partial, state: TrainState,
    keys: Key, batch: PyTree,
) -> tuple[PyTree, Partial, TrainState, Key]:
    del batch  # it is where it belongs
    losses, own, keys = jax.device_put((losses, state._replace(step=()), keys), over_runs)
    transform, step = jax.device_put((transform, state.step), everywhere)
    return losses, transform, own._replace(step=step), keys


def _stack_phases(losses: Sequence[TrainLoss | Sequence[Phase]], num_steps: int) -> tuple[Phase, ...]:
    runs = [as_phases(loss, num_steps) for loss in losses]
    ends = {tuple(phase.until_step for phase in phases) for phases in runs}
    structures = {jax.tree.structure([phase.loss for phase in phases]) for phases in runs}
    if len(ends) != 1 or len(structures) != 1:
        raise ValueError(
            f"The runs have phases that end at {sorted(ends, key=str)} and {len(structures)} kinds of losses: train "
            "those together that differ in values alone."
        )
    return tuple(Phase(same[0].until_step, _stack([phase.loss for phase in same])) for same in zip(*runs, strict=True))


def _stack_states(states: Sequence[TrainState]) -> TrainState:
    if not states or len({int(state.step) for state in states}) != 1:
        raise ValueError("Runs that train together start at one step: give at least one state, all from init_state.")
    return _stack([state._replace(step=()) for state in states])._replace(step=states[0].step)


def _stack(trees: Sequence[PyTree]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


def _split(
    state: TrainState, history: list[dict[str, Any]], num_runs: int
) -> tuple[list[TrainState], list[list[dict[str, float]]]]:
    here = jax.device_put(state, jax.local_devices()[0])
    own = [jax.tree.map(operator.itemgetter(i), here._replace(step=())) for i in range(num_runs)]
    rows = [
        [{name: value if name == "step" else value[i] for name, value in row.items()} for row in history]
        for i in range(num_runs)
    ]
    return [one._replace(step=here.step) for one in own], rows
