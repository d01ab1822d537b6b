"""Strict settings for every test: 8 virtual devices, no silent broadcasting or promotion, a persistent cache."""

import hashlib
import os
import time
from pathlib import Path

import jax
import jax.monitoring
import pytest

from rdx import compilation

_ROOT = Path(__file__).resolve().parents[1]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


_STARTED = time.monotonic()
# Slow like tests that are marked so: those that took longest when everything was timed.
_SLOW = frozenset((_ROOT / "tests" / "slow.txt").read_text().splitlines())


def pytest_collection_modifyitems(config, items):
    """Puts slow tests last, and leaves them out unless RDX_SLOW=1 or a marker expression is given."""
    for item in items:
        if _name(item) in _SLOW:
            item.add_marker(pytest.mark.slow)
    items.sort(key=_place)
    if os.environ.get("RDX_SLOW") == "1" or config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="slow: set RDX_SLOW=1")
    for item in filter(_is_slow, items):
        item.add_marker(skip)


def _name(item):
    return item.nodeid.split("@")[0]


def _place(item):
    """Sorts slow tests last, their files by lot for each RDX_SLOW_SEED: no file is always beyond a limit of time."""
    seed = os.environ.get("RDX_SLOW_SEED", "")
    lot = hashlib.sha256((seed + item.path.name).encode()).hexdigest() if seed else ""
    return (True, lot) if _is_slow(item) else (False, "")


def pytest_runtest_setup(item):
    """Leaves out slow tests that would begin later than RDX_SLOW_MINUTES after the start; the summary names them."""
    limit = float(os.environ.get("RDX_SLOW_MINUTES", "inf"))
    if _is_slow(item) and time.monotonic() - _STARTED > 60.0 * limit:
        pytest.skip(f"slow, and {limit:g} minutes are over (RDX_SLOW_MINUTES)")


def _is_slow(item):
    return "slow" in item.keywords


def pytest_runtest_teardown(item):
    """Forgets compiled programs before there are too many of them for one process."""
    del item
    compilation.spare_maps()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def compilations():
    """Names of the functions, as `jit(name)`, that XLA compiles while the test runs."""
    names = []

    def note(event, duration, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)
