"""The state of an interrupted attack in one file."""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdx.types import Array, ArrayLike, PyTree


def digest(*given: Any) -> str:
    """Computes what identifies a run: everything that it was given.

    Every array counts with its values, wherever it lies in a pytree, in a `Partial` or among the keywords that
    `functools.partial` binds, and every number and word; so do the fields of dataclasses, such as the norm of a `Ball`.
    Functions and methods count by module and qualified name. What a plain closure or another object holds cannot be
    told: two models that one function builds as closures are the same. Bind parameters with `jax.tree_util.Partial`,
    and they are not.

    Args:
        *given: settings, pytrees, functions, attacks.

    Returns:
        The digest, the same in every process.
    """
    found = hashlib.sha256()
    for piece in _pieces(given):
        found.update(piece)
    return found.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    """Yields what identifies a value; no address of an object, which the next process would not have."""
    # A partial, or what stands for it in a `Partial` over it.
    if all(hasattr(value, name) for name in ("func", "args", "keywords")):
        value = ("partial", value.func, tuple(value.args), dict(value.keywords))
    children, structure = jax.tree.flatten(value, is_leaf=lambda part: part is not value)
    node = structure.node_data()
    if node is not None and value is not None:
        kind, static = node
        yield f"{kind.__qualname__}{len(children)}".encode()
        for part in ([*value.items()] if isinstance(value, Mapping) else [static, *children]):
            yield from _pieces(part)
    elif isinstance(value, str | Path | int | float | None):
        yield repr(value).encode()
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        values = _plain(value)
        yield f"{values.dtype}{values.shape}".encode() + values.tobytes()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        yield from _pieces((type(value), {name: getattr(value, name) for name in fields}))
    else:
        named = value if hasattr(value, "__qualname__") else type(value)
        yield f"{named.__module__}.{named.__qualname__}".encode()


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
        if str(saved.get("fingerprint")) != fingerprint:
            raise ValueError(
                f"{path} belongs to a run with other inputs or settings, or to another version of rdx: delete it or "
                "name another file."
            )
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
