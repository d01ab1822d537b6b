"""Checkpoints that survive a kill, and single files of parameters small enough to commit."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy, save_decision_policy

from rdx.types import PyTree


class Checkpoints:
    """The numbered checkpoints of one run, written in the background and each complete or absent.

    Use it as a context manager; leaving it waits for the last write. A process killed while writing leaves a temporary
    directory that the next one removes.
    """

    def __init__(self, directory: str | os.PathLike[str], *, save_every: int, keep: int = 2) -> None:
        """Opens or creates the directory.

        Args:
            directory: where the checkpoints lie, one subdirectory a step.
            save_every: steps that are multiples of it are saved.
            keep: how many of the latest checkpoints remain.
        """
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=save_decision_policy.FixedIntervalPolicy(save_every),
            preservation_policy=preservation_policy.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, *, force: bool = False) -> None:
        """Saves the state if its step is due; a step that is there already stays as it is.

        The state is copied first, so that its buffers may be donated as soon as this returns.

        Args:
            step: the state's number.
            state: a pytree of arrays; typed keys are allowed.
            force: whether to save at any step.
        """
        if step in self._manager.all_steps() or not (force or self._manager.should_save(step)):
            return
        self._manager.save(step, args=ocp.args.StandardSave(jax.tree.map(jnp.copy, state)), force=force)

    def restore_latest(self, like: PyTree) -> tuple[int, Any] | None:
        """Restores the latest complete checkpoint.

        Args:
            like: the structure wanted: arrays, or `jax.ShapeDtypeStruct`s, with whose shardings arrays are restored.

        Returns:
            The step and the state, or None where nothing was saved.

        Raises:
            ValueError: where the checkpoint's structure or shapes differ from `like`.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        return step, self._manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(_abstract, like)))

    def wait(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written and closes the directory."""
        self._manager.close()


def save_tree(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes a pytree of arrays as one compressed `.npz`, completely or not at all; equal trees give equal bytes.

    Args:
        path: the file, replaced if it exists; its directory is created.
        tree: a pytree of arrays, such as a network's variables. Each array is named by its path in the tree.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **{name: np.asarray(leaf) for name, leaf in _named(tree)})
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_tree(path: str | os.PathLike[str], like: PyTree) -> Any:
    """Reads what `save_tree` wrote.

    Args:
        path: the file.
        like: the structure wanted, arrays or `jax.ShapeDtypeStruct`s, such as `jax.eval_shape(model.init, key, x)`.

    Returns:
        A pytree like `like`.

    Raises:
        ValueError: where the file's names, shapes or dtypes differ from `like`; it names them.
    """
    wanted = dict(_named(like))
    with np.load(path, allow_pickle=False) as file:
        stored = {name: file[name] for name in file.files}
    problems = [f"missing {name}" for name in wanted.keys() - stored.keys()]
    problems += [f"unexpected {name}" for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        # The npz format stores dtypes that numpy does not know, such as bfloat16, as raw bytes.
        if stored[name].dtype.kind == "V" and stored[name].itemsize == wanted[name].dtype.itemsize:
            stored[name] = stored[name].view(wanted[name].dtype)
        is_there, should_be = ((value.shape, str(value.dtype)) for value in (stored[name], wanted[name]))
        if is_there != should_be:
            problems.append(f"{name} is {is_there}, not {should_be}")
    if problems:
        raise ValueError(
            f"{path} does not fit: {'; '.join(sorted(problems))}. Build the network with the settings of the saved one."
        )
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(stored[name]) for name in wanted])


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
