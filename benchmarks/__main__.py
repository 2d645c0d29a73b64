"""The command line: `python -m benchmarks NAME`. Each benchmark is a module with FULL, QUICK and `run`."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console

from . import datapath, embedded_io, failover, memory, metadata, mooncake, peers, placement, rebuild, ucx
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


def run_one(name: str, *, quick: bool, keep: bool) -> list[Row]:
    """All rows of one benchmark."""
    module = BENCHMARKS[name]
    with work_directory(name, keep=keep) as directory:
        rows: list[Row] = module.run(directory, module.QUICK if quick else module.FULL)
        return rows


@click.command()
@click.argument("name", required=False, type=click.Choice([*BENCHMARKS, "all"]))
@click.option("--quick", is_flag=True, help="Less data, at most 50 s; rows that mean nothing then have no goal.")
@click.option("--json", "as_json", is_flag=True, help="Print one array of rows; the summary goes to stderr.")
@click.option("--keep", is_flag=True, help="Leave the data under .bench/.")
@click.option("--setup", is_flag=True, help="Say which peers are installed, and how to get those that are not.")
def main(name: str | None, quick: bool, as_json: bool, keep: bool, setup: bool) -> None:
    """Measure emberline beside its peers.

    \b
    python -m benchmarks --setup
    python -m benchmarks embedded_io --quick
    python -m benchmarks all --json > rows.json
    """
    if setup:
        missing = peers.describe(click.echo)
        mooncake.set_up_mooncake(click.echo)
        raise SystemExit(1 if missing else 0)
    if name is None:
        raise click.UsageError("which benchmark? one of: " + ", ".join([*BENCHMARKS, "all"]))
    every: list[dict[str, object]] = []
    for chosen in BENCHMARKS if name == "all" else [name]:
        rows = run_one(chosen, quick=quick, keep=keep)
        every += [{"benchmark": chosen} | row.as_object() for row in rows]
        if not as_json:
            print_table(Console(), chosen, rows)
        click.echo(summary(chosen, rows), err=as_json)
    if as_json:
        click.echo("[\n" + ",\n".join(json.dumps(row) for row in every) + "\n]")


if __name__ == "__main__":
    main()
