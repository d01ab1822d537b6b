"""The experiments on a machine that has JAX and its libraries only: no data loaders, no command line, one archive."""

import subprocess
import sys

import pytest

from rdx.data import archive

MISSING = ("tensorflow_datasets", "grain", "tyro")
EXPERIMENTS = (
    "a5_glyphs", "a5_questions", "a5_tables", "attack_gallery", "certified_training", "tramer_certified",
    "tramer_claims", "tramer_detectors",
)
PROGRAM = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {missing!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
"""


def _run(lines, *arguments):
    program = PROGRAM.format(missing=MISSING) + lines
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_everything_is_imported():
    modules = ", ".join(f"experiments.{name}" for name in EXPERIMENTS)
    assert _run(f"import {modules}\nprint('done')") == "done\n"


@pytest.mark.slow
def test_cells_are_filled_from_an_archive(tmp_path):
    archive.write("digits", tmp_path / "digits.npz")
    _run(
        "runpy.run_module('experiments.a5_tables', run_name='__main__')", "--dataset", "digits", "--preset", "smoke",
        "--archive", str(tmp_path / "digits.npz"), "--out", str(tmp_path / "out"), "--only", "base",
    )
    assert (tmp_path / "out" / "table.md").exists()
    assert len(list((tmp_path / "out" / "records").glob("base*.json"))) == 1
