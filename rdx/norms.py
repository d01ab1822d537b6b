"""Per-example norms whose gradients are finite at 0, and the helpers that keep broadcasting explicit."""

import jax.numpy as jnp

from rdx.types import Array, Norm

_DUAL: dict[str, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}


def flatten(x: Array) -> Array:
    """Flattens every example: `[B, ...] -> [B, D]`."""
    return x.reshape(x.shape[0], -1)


def expand(value: Array, like: Array) -> Array:
    """Appends unit axes to `value [B]` until it broadcasts against `like [B, ...]`."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def l0(x: Array) -> Array:
    """Counts the non-zero elements of each example. Shape `[B, ...] -> [B]`, in the dtype of `x`."""
    return (flatten(x) != 0).sum(axis=1).astype(x.dtype)


def l1(x: Array) -> Array:
    """Sums absolute values: `sum_i |x_i|`. Shape `[B, ...] -> [B]`."""
    return jnp.abs(flatten(x)).sum(axis=1)


def l2(x: Array) -> Array:
    """Computes `sqrt(sum_i x_i^2)` with gradient 0 (not NaN) at 0. Shape `[B, ...] -> [B]`."""
    square = jnp.square(flatten(x)).sum(axis=1)
    is_zero = square == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def linf(x: Array) -> Array:
    """Takes the largest absolute value: `max_i |x_i|`. Shape `[B, ...] -> [B]`."""
    return jnp.abs(flatten(x)).max(axis=1)


_NORMS = {"l0": l0, "l1": l1, "l2": l2, "linf": linf}


def check(name: str) -> None:
    """Raises if `name` is not a norm that balls are made of.

    Raises:
        ValueError: naming the supported norms.
    """
    if name not in _DUAL:
        raise ValueError(f"Unknown norm {name!r}: use one of {sorted(_DUAL)}.")


def norm(x: Array, name: str) -> Array:
    """Computes the norm called `name` ("l0", "l1", "l2" or "linf") of each example. Shape `[B, ...] -> [B]`."""
    if name not in _NORMS:
        raise ValueError(f"Unknown norm {name!r}: use one of {sorted(_NORMS)}.")
    return _NORMS[name](x)


def dual(name: Norm) -> Norm:
    """Names the dual norm, `||a||_* = max_{||x|| <= 1} <a, x>`: linf and l1 are dual, l2 is its own dual."""
    check(name)
    return _DUAL[name]
