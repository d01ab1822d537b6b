"""What experiments do with their output directories."""

import time

from experiments import runs


def test_a_stopwatch_goes_on_where_an_interrupted_run_stopped(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    path = tmp_path / "seconds" / "base"
    assert runs.seconds(path) == 0
    note = runs.stopwatch(path)
    assert runs.seconds(path) == 0
    for now[0] in (107.0, 110.5):
        note({"step": 1})
    assert runs.seconds(path) == 10.5
    now[0] = 1000.0
    again = runs.stopwatch(path)
    now[0] = 1002.0
    again({"step": 2})
    assert runs.seconds(path) == 12.5
