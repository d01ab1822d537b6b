"""How functions meet the compiler: parameters as arguments, and options that make bounds fast on CPUs."""

import ctypes
import functools
import gc
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax import lax
from jax.tree_util import Partial

_T = TypeVar("_T")

# XLA's newer CPU kernels take over matrix products and, by default, reductions. Without the reductions a bound of a
# convolutional net takes 0.7 (IBP) to 0.75 (CROWN-IBP) of its time and a training step 0.6; dense nets gain up to a
# twentieth (jax 0.10.2, 2 cores).
_OPTIONS: dict[str, bool | str] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    # Barriers last until operations are fused, see `materialised`.
    "xla_disable_hlo_passes": "cse_barrier_expander",
}


def materialised(arrays: _T) -> _T:
    """Has arrays, and their cotangents, computed once on CPUs and not again by everything that they enter.

    XLA fuses the arithmetic that leads to an array into all its consumers there, also into those that read elements in
    another order, or more than once: the transposed copy that the weight gradient of a convolution makes, the sum that
    is a bias's gradient. That took half of a certified training step. It needs `cpu_options`, without which XLA removes
    the barrier before it fuses.

    Args:
        arrays: a pytree.

    Returns:
        The same arrays.
    """
    return lax.optimization_barrier(arrays) if jax.default_backend() == "cpu" else arrays


def as_partial(fn: Callable[..., Any]) -> Partial:
    """Wraps a plain callable as a `jax.tree_util.Partial`, which is a pytree; a `Partial` is returned as it is.

    A `Partial` over a module-level function carries its parameters as leaves: compiled code takes them as arguments and
    is reused when they change. A plain closure has them baked in and is compiled once per closure object.
    """
    return fn if isinstance(fn, Partial) else Partial(fn)


@functools.cache
def cpu_options() -> dict[str, bool | str]:
    """Gives `jax.jit` the options under which CROWN bounds and certified training are fast on CPUs.

    Returns:
        For `jax.jit(..., compiler_options=...)`; empty on accelerators, and where the installed XLA does not know them.
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lax.optimization_barrier, compiler_options=_OPTIONS).lower(0.0).compile()
    except Exception:  # noqa: BLE001 - an unknown option is reported by exceptions of several kinds
        return {}
    return dict(_OPTIONS)


# From glibc's malloc.h: M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD, of which -1 is the largest.
_KEEPING = {-8: 1, -4: 0, -1: -1}


def keep_memory() -> bool:
    """Has the C library keep the memory of arrays for the arrays to come, instead of giving it back to the system.

    glibc gives every large array back when it is freed, and the system clears its pages again for the next one: tens of
    thousands of page faults in each step of certified training on a CPU. The process then stays as large as it once
    was. That is for a program to decide, at its beginning, before anything computes: no function here does.

    Returns:
        Whether the C library was told; False where it is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) for parameter, value in _KEEPING.items())


# Linux allows a process 65,530.
_MOST_MAPS = 40_000


def spare_maps() -> bool:
    """Forgets what was compiled before a process on Linux has too many memory maps, at which XLA ends it.

    Every compiled program takes some, so that hundreds of evaluations in one process reach the limit ("Unable to
    allocate section memory", with memory to spare). Programs that work on many models one after the other call it
    between two of them; what is needed again is compiled again, or read from the persistent cache.

    Returns:
        Whether everything was forgotten.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") <= _MOST_MAPS:
        return False
    jax.clear_caches()
    gc.collect()
    return True
