"""The README's example runs as it stands, and its two commands exist."""

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]


def test_the_examples_run_and_their_assertions_hold():
    names, broken = {}, []
    for code in re.findall(r"```python\n(.*?)```", (_ROOT / "README.md").read_text(), re.DOTALL):
        exec(code, names)
        broken.append(bool(names["found"].success.any()))
    assert names["lower"].shape == (64, 9)
    assert broken[:2] == [True, True]    # the other examples attack nothing
    assert names["history"][-1]["error"] < 0.5    # 0.9 by chance
    # An untrained net changes its mind near most inputs, which the detector of the last example rejects.
    assert names["score"].shape == (64,)
    assert (names["score"] > 0).mean() > 0.5


@pytest.mark.parametrize("script", ["scripts/quickstart.sh", "scripts/test.sh"])
def test_the_commands_exist(script):
    assert f"bash {script}" in (_ROOT / "README.md").read_text()
    assert (_ROOT / script).exists()


def test_ci_calls_the_readmes_test_command():
    assert "bash scripts/test.sh" in (_ROOT / ".ci" / "run").read_text()
