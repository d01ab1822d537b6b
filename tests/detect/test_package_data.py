"""The published figures travel with the package."""

import importlib.resources

import pytest

from rdx.detect import best_known


@pytest.mark.parametrize(("table", "num_rows"), [("table1", 16), ("table2", 2), ("best_known", 30)])
def test_tables_are_in_the_package(table, num_rows):
    assert (importlib.resources.files("rdx.detect") / "published" / f"{table}.csv").is_file()
    rows = best_known.rows(table)
    assert len(rows) == num_rows
    assert all(value is not None for row in rows for value in row.values())
    assert all(None not in row for row in rows)  # no row has more cells than the header
