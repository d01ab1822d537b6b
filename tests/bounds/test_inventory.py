"""The table of covered functions is complete: what flax and jax.nn offer is in it, or left out for a reason."""

import inspect
import types

import flax.linen as nn
import jax
import pytest
from bounds_helpers import inputs
from coverage_layers import EXCLUDED, TABLES, public
from flax import nnx


def uncovered(library):
    """Lists the public names without a case; another name of what has one needs none."""
    module, table = TABLES[library]
    offered = public(module)
    covered = {id(offered[name]) for name in table if name in offered}
    return [name for name, value in offered.items() if id(value) not in covered and f"{library}.{name}" not in EXCLUDED]


@pytest.mark.parametrize("library", TABLES)
def test_everything_public_is_covered(library):
    missing = uncovered(library)
    assert not missing, (
        f"{library} offers {', '.join(missing)}, which no test of bounds covers: add cases of these names to the table "
        "in tests/bounds/coverage_layers.py, or to its EXCLUDED with the reason why they have no bounds."
    )


def test_a_new_layer_is_noticed(monkeypatch):
    for library, (module, _) in TABLES.items():
        new = types.new_class("Newcomer", (getattr(module, "Module", object),))
        monkeypatch.setattr(module, "Newcomer", new, raising=False)
        assert uncovered(library) == ["Newcomer"]


def test_nothing_is_listed_in_vain():
    for library, (module, table) in TABLES.items():
        excluded = {name for name in EXCLUDED if name.startswith(f"{library}.")}
        assert table.keys() | {name.removeprefix(f"{library}.") for name in excluded} <= public(module).keys()
        assert not excluded & {f"{library}.{name}" for name in table}
    assert all(EXCLUDED.values())


@pytest.mark.parametrize(
    ("library", "name"), [(library, name) for library in ("linen", "nnx") for name in TABLES[library][1]]
)
def test_a_case_runs_the_layer_that_it_is_named_after(library, name, monkeypatch):
    module, table = TABLES[library]
    layer, called = getattr(module, name), []
    for method in {"__call__", "attend"} & set(dir(layer)):
        original = inspect.getattr_static(layer, method)

        def spy(self, *args, original=original, **kwargs):
            called.append(type(self))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(layer, method, spy)
    fn = table[name].build()
    jax.eval_shape(fn, inputs(table[name].shape))
    assert layer in called
    assert issubclass(layer, {"linen": nn.Module, "nnx": nnx.Module}[library])
