"""How functions meet the compiler: parameters as arguments, and options that make bounds fast on CPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import Partial

# XLA's newer CPU kernels take over matrix products and, by default, reductions. Without the reductions a bound of a
# convolutional net takes 0.7 (IBP) to 0.75 (CROWN-IBP) of its time and a training step 0.6; dense nets gain up to a
# twentieth (jax 0.10.2, 2 cores).
_OPTIONS: dict[str, bool | str] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}


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
        jax.jit(lambda x: x, compiler_options=_OPTIONS).lower(0.0).compile()
    except Exception:  # noqa: BLE001 - an unknown option is reported by exceptions of several kinds
        return {}
    return dict(_OPTIONS)
