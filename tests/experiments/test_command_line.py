"""Command lines with tyro and without it."""

import builtins
import dataclasses

import pytest

from experiments import command_line


@dataclasses.dataclass(frozen=True)
class _Options:
    """Options.

    Attributes:
        preset: a name.
        out_dir: a place.
    """

    preset: str = "cpu"
    out_dir: str = ""


def _parse(monkeypatch, *words, has_tyro=False):
    real = builtins.__import__

    def without_tyro(name, *args, **options):
        if name == "tyro" and not has_tyro:
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_tyro)
    monkeypatch.setattr("sys.argv", ["program", *words])
    return command_line.parse(_Options)


@pytest.mark.parametrize("has_tyro", [False, True])
def test_pairs(has_tyro, monkeypatch):
    assert _parse(monkeypatch, has_tyro=has_tyro) == _Options()
    found = _parse(monkeypatch, "--out-dir", "/tmp/x", "--preset", "smoke", has_tyro=has_tyro)
    assert found == _Options("smoke", "/tmp/x")


@pytest.mark.parametrize("has_tyro", [False, True])
@pytest.mark.parametrize("words", [("--colour", "red"), ("smoke",), ("--preset",), ("preset", "smoke")])
def test_mistakes_end_the_program(words, has_tyro, monkeypatch, capsys):
    with pytest.raises(SystemExit) as raised:
        _parse(monkeypatch, *words, has_tyro=has_tyro)
    assert raised.value.code not in (0, None)
    if not has_tyro:
        assert "out_dir, preset" in str(raised.value.code)
