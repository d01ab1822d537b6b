"""Compiler options for programs that differentiate through bounds."""

import functools

import jax

# XLA's newer CPU kernels take over matrix products, single and fused, and reductions. That slows weight gradients of
# convolutions; restricted to fused matrix products, a CROWN-IBP training step takes 0.75 (convolutional net) to 0.95
# (dense net) of its time, and nothing measured got slower (jax 0.10.2, 2 cores).
_OPTIONS: dict[str, bool | str] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


@functools.cache
def cpu_options() -> dict[str, bool | str]:
    """Gives `jax.jit` the options under which certified training is fast on CPUs.

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
