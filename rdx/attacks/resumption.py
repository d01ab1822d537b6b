"""The state of an interrupted attack in one file."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdx.types import Array, ArrayLike, PyTree


def digest(settings: tuple[Any, ...], arrays: PyTree) -> str:
    """Computes what identifies a run: its settings and everything that it was given."""
    found = hashlib.sha256(repr(settings).encode())
    for leaf in jax.tree.leaves(arrays):
        values = _plain(leaf)
        found.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())
    return found.hexdigest()


def save(path: str | Path, fingerprint: str, tree: PyTree) -> None:
    """Writes the leaves of a tree by renaming, so that a reader finds the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".npz")
    with os.fdopen(handle, "wb") as file:
        leaves: dict[str, Any] = {f"leaf{i}": _plain(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
        np.savez(file, fingerprint=fingerprint, **leaves)
    os.replace(temporary, path)


def load(path: str | Path, fingerprint: str, like: PyTree) -> PyTree:
    """Reads what `save` wrote.

    Args:
        path: the file.
        fingerprint: of the run that wants to go on.
        like: a tree of the structure that was saved, whose leaves tell which are keys, and of what kind the others are.

    Returns:
        The tree.

    Raises:
        ValueError: if another run wrote the file, or a version of rdx that kept something else in its place.
    """
    leaves, structure = jax.tree.flatten(like)
    with np.load(path) as saved:
        if str(saved["fingerprint"]) != fingerprint:
            raise ValueError(f"{path} belongs to a run with other inputs or settings: delete it or name another file.")
        found = [saved[f"leaf{i}"] for i in range(len(saved.files) - 1)]
    # What was a flag may have become a place, where False would be read as the first.
    kinds = ["u" if _is_key(leaf) else np.dtype(leaf.dtype).kind for leaf in leaves]
    if kinds != [values.dtype.kind for values in found]:
        raise ValueError(f"{path} was written by another version of rdx: delete it or name another file.")
    return structure.unflatten(map(_revived, found, leaves))


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: ArrayLike) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _revived(values: np.ndarray, like: Any) -> Array | np.ndarray:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(values), impl=jax.random.key_impl(like))
    return values if isinstance(like, np.ndarray) else jnp.asarray(values)
