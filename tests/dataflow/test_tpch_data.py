"""TPC-H as the tests and benchmarks get it: needs the package index the first time, and says so if it is not there.

Run: pytest tests/dataflow/test_tpch_data.py.
"""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from benchmarks import tpch

ROWS = {
    "customer": 15_000,
    "lineitem": 600_572,
    "nation": 25,
    "orders": 150_000,
    "part": 20_000,
    "partsupp": 80_000,
    "region": 5,
    "supplier": 1_000,
}
"""At scale factor 0.1, by the specification."""
REVENUE = Decimal("11803420.2534")
"""The answer of query 6 there."""


def test_the_tables_have_their_rows_in_eight_parts(tpch_tables: dict[str, list[str]]) -> None:
    rows = {name: sum(pq.read_metadata(path).num_rows for path in files) for name, files in tpch_tables.items()}
    assert rows == ROWS
    assert {len(files) for name, files in tpch_tables.items() if name not in ("nation", "region")} == {tpch.PARTS}


def test_the_queries_are_the_22_and_answer_what_they_should(
    tpch_tables: dict[str, list[str]], tpch_queries: dict[int, str]
) -> None:
    assert list(tpch_queries) == list(range(1, 23))
    connection = duckdb.connect()
    for name, files in tpch_tables.items():
        connection.execute(f"CREATE VIEW {name} AS FROM read_parquet({files!r})")
    assert connection.execute(tpch_queries[6]).fetchall() == [(REVENUE,)]


def test_without_the_package_index_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpch, "CACHE", tmp_path)
    monkeypatch.setattr(tpch, "PACKAGES", ("no-such-package-as-this==1.0",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(tpch.CannotFetch, match=r"needs no-such-package-as-this==1\.0 from the package index"):
        tpch.queries()
    assert not list(tmp_path.iterdir()), "nothing half made is left"
