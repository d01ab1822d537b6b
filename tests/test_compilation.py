"""What the compiler makes of functions with `rdx.compilation`."""

import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdx import compilation


def test_materialised_values_are_the_same_and_so_are_gradients():
    x = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(3.0)}

    def total(x):
        x = compilation.materialised(x)
        return (jnp.sin(x["a"]) * x["b"]).sum()

    value, gradient = jax.value_and_grad(total)(x)
    np.testing.assert_array_equal(value, (jnp.sin(x["a"]) * x["b"]).sum())
    np.testing.assert_array_equal(gradient["a"], jnp.cos(x["a"]) * x["b"])
    np.testing.assert_array_equal(gradient["b"], jnp.sin(x["a"]).sum())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a matter of the CPU backend")
def test_options_keep_materialised_arrays_from_fusion():
    # Without the barrier XLA computes the exponentials within the sum, without the option it drops the barrier.
    def total(x):
        return compilation.materialised(jnp.exp(x) + x).T.sum(axis=1)

    compiled = jax.jit(total, compiler_options=compilation.cpu_options()).lower(jnp.ones((300, 200))).compile()
    assert "opt-barrier" in compiled.as_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc")
def test_memory_is_kept():
    program = """
import resource, threading
from rdx import compilation
assert compilation.keep_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fill():
    size, start = 2**26, faults()
    for _ in range(8):
        b"x" * size
    print((faults() - start) * resource.getpagesize() / size)
for _ in range(2):
    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = (float(line) for line in done.stdout.split())  # 8 each, if every array took new pages
    assert first < 2.0
    assert second < 1.0


def test_programs_are_forgotten_before_there_are_too_many(monkeypatch):
    calls = []

    @jax.jit
    def counted(x):
        calls.append(1)
        return x + 1.0

    counted(jnp.ones(3))
    monkeypatch.setattr(compilation, "_MOST_MAPS", 10**9)
    assert not compilation.spare_maps()
    counted(jnp.ones(3))
    assert len(calls) == 1
    monkeypatch.setattr(compilation, "_MOST_MAPS", 1)
    forgets = compilation.spare_maps()
    counted(jnp.ones(3))
    assert forgets == pathlib.Path("/proc/self/maps").exists()
    assert len(calls) == 1 + forgets
