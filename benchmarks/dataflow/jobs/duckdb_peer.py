"""The same in plain DuckDB, with its own settings but for `preserve_insertion_order`, which nobody here asks for,
and the threads where they are given.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

Told = dict[str, float]


def _open(threads: int | None = None) -> duckdb.DuckDBPyConnection:
    config = {} if threads is None else {"threads": threads}
    return duckdb.connect(config={"preserve_insertion_order": False, **config})


def sort(*, inputs: list[str], output: str, threads: int | None = None) -> Told:
    """Into one file."""
    _open(threads).execute(
        f"COPY (SELECT * FROM read_parquet({inputs!r}) ORDER BY key) TO '{output}' (FORMAT parquet, COMPRESSION snappy)"
    )
    return {}


def partition(*, inputs: list[str], parts: int, output: str, threads: int | None = None) -> Told:
    """By PARTITION_BY."""
    _open(threads).execute(
        f"COPY (SELECT *, hash(key) % {parts} AS part FROM read_parquet({inputs!r})) TO '{output}' "
        "(FORMAT parquet, COMPRESSION snappy, PARTITION_BY part)"
    )
    return {}


def queries(*, tables: dict[str, list[str]], texts: dict[str, str], output: str) -> Told:
    """Over views of the files."""
    told = {}
    Path(output).mkdir()
    connection = _open()
    for name, files in tables.items():
        connection.execute(f"CREATE VIEW {name} AS FROM read_parquet({files!r})")
    for name, text in texts.items():
        begin_s = time.perf_counter()
        pq.write_table(connection.sql(text).to_arrow_table(), f"{output}/{name}.parquet")
        told[name] = time.perf_counter() - begin_s
    return told


def first_result(*, inputs: list[str], text: str) -> Told:
    """Of a small query over the table `rows`."""
    begin_s = time.perf_counter()
    connection = _open()
    connection.execute(f"CREATE VIEW rows AS FROM read_parquet({inputs!r})")
    rows = connection.sql(text).to_arrow_table().num_rows
    return {"init_to_result_s": time.perf_counter() - begin_s, "rows": rows}


if __name__ == "__main__":
    operations = {each.__name__: each for each in (sort, partition, queries, first_result)}
    print(json.dumps(operations[sys.argv[1]](**json.loads(sys.argv[2]))))
