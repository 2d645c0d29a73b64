"""What is measured of emberflow: `python ours.py OPERATION ARGUMENTS`, the arguments a JSON object of keywords.

`session` is what `emberflow.init` is given. A job may tell numbers of its own: it prints them as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import emberflow
import pyarrow.parquet as pq

Told = dict[str, float]


def sort(*, session: dict[str, Any], inputs: list[str], output: str) -> Told:
    """Of the records, by key, into Parquet."""
    with emberflow.init(**session) as opened:
        opened.read_parquet(inputs).sort("key").write_parquet(output, mode="overwrite", compression="snappy")
    return {}


def shuffle(*, session: dict[str, Any], inputs: list[str], parts: int) -> Told:
    """By the hash of the key, into exchange files."""
    with emberflow.init(**session) as opened:
        return {"records": opened.read_parquet(inputs).repartition(parts, hash_by="key").compute().count()}


def partition(*, session: dict[str, Any], inputs: list[str], parts: int, output: str) -> Told:
    """By the hash of the key, into Parquet."""
    with emberflow.init(**session) as opened:
        placed = opened.sql(f"SELECT *, hash(key) % {parts} AS part FROM records", records=opened.read_parquet(inputs))
        placed.write_parquet(output, partition_by="part", mode="overwrite", compression="snappy")
    return {}


def queries(*, session: dict[str, Any], tables: dict[str, list[str]], texts: dict[str, str], output: str) -> Told:
    """Each result into a file of its name; tells the seconds of each."""
    told = {}
    Path(output).mkdir()
    with emberflow.init(**session) as opened:
        frames = {name: opened.read_parquet(files) for name, files in tables.items()}
        for name, text in texts.items():
            begin_s = time.perf_counter()
            pq.write_table(opened.sql(text, **frames).to_arrow(), f"{output}/{name}.parquet")
            told[name] = time.perf_counter() - begin_s
    return told


def first_result(*, session: dict[str, Any], inputs: list[str], text: str) -> Told:
    """Of a small query over the table `rows`; tells the seconds from `init` on."""
    begin_s = time.perf_counter()
    with emberflow.init(**session) as opened:
        rows = opened.sql(text, rows=opened.read_parquet(inputs)).to_arrow().num_rows
        return {"init_to_result_s": time.perf_counter() - begin_s, "rows": rows}


if __name__ == "__main__":
    operations = {each.__name__: each for each in (sort, shuffle, partition, queries, first_result)}
    print(json.dumps(operations[sys.argv[1]](**json.loads(sys.argv[2]))))
