"""The same in Ray Data. Runs in an environment of its own."""

from __future__ import annotations

import json
import sys
import zlib

import pyarrow as pa
import ray


def sort(*, inputs: list[str], output: str) -> None:
    """Into a file for each of its blocks."""
    ray.data.read_parquet(inputs).sort("key").write_parquet(output)


def partition(*, inputs: list[str], parts: int, output: str) -> None:
    """By the columns that its Parquet writer partitions by, after its own shuffle to as many blocks."""
    placed = ray.data.read_parquet(inputs).map_batches(_placed, fn_kwargs={"parts": parts}, batch_format="pyarrow")
    placed.repartition(parts, keys=["part"]).write_parquet(output, partition_cols=["part"])


def _placed(batch: pa.Table, *, parts: int) -> pa.Table:
    numbers = [zlib.crc32(key) % parts for key in batch.column("key").cast(pa.binary()).to_pylist()]
    return batch.append_column("part", pa.array(numbers, pa.int32()))


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    {"sort": sort, "partition": partition}[sys.argv[1]](**json.loads(sys.argv[2]))
