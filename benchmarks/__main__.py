"""The command line: `python -m benchmarks NAME`. Each benchmark is a module with FULL, QUICK and `run`."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from . import (
    checkpoint,
    dataflow,
    datapath,
    decode,
    embedded_io,
    failover,
    graysort,
    kvcache,
    lmcache_l2,
    loader,
    memory,
    metadata,
    moe,
    peers,
    placement,
    prefix,
    rebuild,
    ucx,
)
from .dataflow.sides import DATA_ENVIRONMENT, SMALLPOND_ENVIRONMENT
from .mooncake import MOONCAKE
from .runner import Row, print_table, summary

BENCHMARKS = {
    "embedded_io": embedded_io,
    "metadata": metadata,
    "memory": memory,
    "datapath": datapath,
    "ucx": ucx,
    "failover": failover,
    "rebuild": rebuild,
    "placement": placement,
    "dataflow": dataflow,
    "graysort": graysort,
    "kvcache": kvcache,
    "lmcache_l2": lmcache_l2,
    "decode": decode,
    "moe": moe,
    "checkpoint": checkpoint,
    "loader": loader,
    "prefix": prefix,
}
WORK = Path(__file__).resolve().parent.parent / ".bench"


@contextmanager
def work_directory(name: str, *, keep: bool) -> Iterator[Path]:
    """A fresh directory for one benchmark, removed afterwards."""
    WORK.mkdir(exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=WORK))
    try:
        yield directory
    finally:
        if not keep:
            shutil.rmtree(directory)


def run_one(name: str, *, quick: bool, keep: bool, data_bytes: int | None) -> list[Row]:
    """All rows of one benchmark."""
    module = BENCHMARKS[name]
    size = module.QUICK if quick else module.FULL
    if data_bytes is not None:
        if not hasattr(size, "data_bytes"):
            raise click.UsageError(f"{name} has no one size")
        size = replace(size, data_bytes=data_bytes)
    with work_directory(name, keep=keep) as directory:
        rows: list[Row] = module.run(directory, size)
        return rows


class Bytes(click.ParamType[int]):
    """1GB, 64MiB, 4096."""

    name = "bytes"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", value)
        if found is None:
            self.fail(f"{value!r} is no number of bytes: 1GB, 64MiB", param, ctx)
        number, unit, binary = found.groups()
        factor: int = (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")
        return round(float(number) * factor)


@click.command()
@click.argument("name", required=False, type=click.Choice([*BENCHMARKS, "all"]))
@click.option("--quick", is_flag=True, help="Less data, at most 50 s; rows that mean nothing then have no goal.")
@click.option("--json", "as_json", is_flag=True, help="Print one array of rows; the summary goes to stderr.")
@click.option("--keep", is_flag=True, help="Leave the data under .bench/.")
@click.option("--setup", is_flag=True, help="Say which peers are installed, and how to get those that are not.")
@click.option("--size", type=Bytes(), help="How much data, of a benchmark that has one such number: 1GB, 64MiB.")
def main(name: str | None, quick: bool, as_json: bool, keep: bool, setup: bool, size: int | None) -> None:
    """Measure emberline beside its peers.

    \b
    python -m benchmarks --setup
    python -m benchmarks embedded_io --quick
    python -m benchmarks graysort --size 1GB
    python -m benchmarks all --json > rows.json
    """
    if setup:
        missing = peers.describe(click.echo)
        for environment in (MOONCAKE, SMALLPOND_ENVIRONMENT, DATA_ENVIRONMENT, loader.ENVIRONMENT):
            environment.set_up(click.echo)
        raise SystemExit(1 if missing else 0)
    if name is None:
        raise click.UsageError("which benchmark? one of: " + ", ".join([*BENCHMARKS, "all"]))
    every: list[dict[str, object]] = []
    for chosen in BENCHMARKS if name == "all" else [name]:
        rows = run_one(chosen, quick=quick, keep=keep, data_bytes=size)
        every += [{"benchmark": chosen} | row.as_object() for row in rows]
        if not as_json:
            print_table(Console(), chosen, rows)
        click.echo(summary(chosen, rows), err=as_json)
    if as_json:
        click.echo("[\n" + ",\n".join(json.dumps(row) for row in every) + "\n]")


if __name__ == "__main__":
    main()
