"""The same in smallpond, by its own recipe for GraySort. Runs in an environment of its own, with DuckDB before 1.5."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import smallpond

SORT_PARTS = 8
LETTERS = "+/0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""In order: what keys are made of."""
SNAPPY = {"parquet_compression": "snappy", "parquet_compression_level": None}


def sort(*, inputs: list[str], output: str, data_root: str) -> dict[str, Any]:
    """Into a file for each range of first letters."""
    session = smallpond.init(data_root=data_root)
    bucket = f"CAST((instr('{LETTERS}', substr(key, 1, 1)) - 1) * {SORT_PARTS} // {len(LETTERS)} AS BIGINT) AS bucket"
    placed = session.read_parquet(inputs).map(f"key, payload, {bucket}")
    placed = placed.repartition(SORT_PARTS, by="bucket", **SNAPPY)
    placed.partial_sort("key", parquet_compression="snappy").write_parquet(output)
    return {}


def partition(*, inputs: list[str], parts: int, output: str, data_root: str) -> dict[str, Any]:
    """By its hash partition."""
    session = smallpond.init(data_root=data_root)
    session.read_parquet(inputs).repartition(parts, hash_by="key", **SNAPPY).write_parquet(output)
    return {}


def first_result(*, inputs: list[str], text: str, data_root: str) -> dict[str, Any]:
    """Of a small query over the table `rows`, in one partition."""
    begin_s = time.perf_counter()
    session = smallpond.init(data_root=data_root)
    frame = session.read_parquet(inputs).repartition(1)
    rows = session.partial_sql(text.replace("FROM rows", "FROM {0}"), frame).to_arrow().num_rows
    return {"init_to_result_s": time.perf_counter() - begin_s, "rows": rows}


if __name__ == "__main__":
    operations = {each.__name__: each for each in (sort, partition, first_result)}
    print(json.dumps(operations[sys.argv[1]](**json.loads(sys.argv[2]))))
