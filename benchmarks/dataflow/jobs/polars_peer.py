"""The same in Polars' streaming engine. Runs in an environment of its own."""

from __future__ import annotations

import json
import sys

import polars as pl


def sort(*, inputs: list[str], output: str) -> None:
    """Into one file."""
    pl.scan_parquet(inputs).sort("key").sink_parquet(output, compression="snappy", engine="streaming")


def partition(*, inputs: list[str], parts: int, output: str) -> None:
    """By its partitioning sink."""
    placed = pl.scan_parquet(inputs).with_columns(part=pl.col("key").hash() % parts)
    by_part = pl.PartitionBy(output, key="part", include_key=False)
    placed.sink_parquet(by_part, compression="snappy", maintain_order=False, mkdir=True, engine="streaming")


if __name__ == "__main__":
    {"sort": sort, "partition": partition}[sys.argv[1]](**json.loads(sys.argv[2]))
