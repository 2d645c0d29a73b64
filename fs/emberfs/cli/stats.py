"""`emberline stats`: what the servers of a store serve, interval by interval."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click

from ..client.sync import Client
from .output import human_bytes, json_option, note, print_columns, print_json, safe
from .servers import Look, between, by_role, look
from .store import open_store, store_argument

NOBODY = "no other process has this store open: its calls end where they are made, and client.stats() tells of them"


@click.command(
    epilog="\b\nExamples:\n"
    "  emberline stats ember://db1:7301,db2:7301\n"
    "  emberline stats --each --interval 5\n"
    "  emberline stats --count 1 --json | jq 'select(.request == \"ReadChunks\") | .p99_s'"
)
@store_argument
@click.option("--interval", "interval_s", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True,
              help="Seconds.")  # fmt: skip
@click.option("--count", type=click.IntRange(1), help="End after so many intervals.  [default: go on until Ctrl-C]")
@click.option("--each", is_flag=True, help="Every server by itself, instead of all of a role together.")
@json_option
def stats(store: str | None, interval_s: float, count: int | None, each: bool, as_json: bool) -> None:
    """Show what is served: requests, bytes and errors per second, and how long requests take.

    Of a cluster, by role of the servers; of an embedded store that several processes have open, what the server between
    them serves. Opening it makes this one of them: a store that one process had for itself goes to a server meanwhile.

    Times are those of the server, from the arrival of a request until its answer goes out: half of the requests take up
    to p50, all but one in a hundred up to p99. `emberline profile` says where the time goes. Requests that wait for
    news on purpose are left out.
    """
    with open_store(store) as client:
        intervals = _intervals(client, interval_s, count, each=each)
        if as_json:
            for looks in intervals:
                for row in rows_of(looks):
                    print_json({"time_s": time.time(), **row})
                sys.stdout.flush()
        elif sys.stdout.isatty():
            _show_live(intervals)
        else:
            for looks in intervals:
                print_columns(_table(looks), right=range(2, 9))
                click.echo()
                sys.stdout.flush()


def _intervals(client: Client, interval_s: float, count: int | None, *, each: bool) -> Iterator[list[Look]]:
    before = look(client)
    if not before:
        note(NOBODY)
    for number in itertools.count(1):
        time.sleep(interval_s)
        now = look(client)
        found = between(before, now)
        yield found if each else by_role(found)
        before = now
        if number == count:
            return


def rows_of(looks: Sequence[Look]) -> Iterator[dict[str, Any]]:
    """One object per server, or role, and kind of request; one for a server that has trouble."""
    for each in looks:
        if each.trouble:
            yield {"role": each.role, "server": each.server, "trouble": each.trouble}
        for kind, stats in each.kinds.items():
            yield {
                "role": each.role,
                "server": each.server,
                "request": kind,
                "interval_s": each.up_s,
                "requests_per_s": stats.whole.count / each.up_s,
                "bytes_per_s": stats.payload_bytes / each.up_s,
                "errors_per_s": sum(stats.errors.values()) / each.up_s,
                "errors": stats.errors,
                "p50_s": stats.whole.quantile_s(0.5),
                "p99_s": stats.whole.quantile_s(0.99),
                "max_s": stats.whole.max_s,
            }


def _table(looks: Sequence[Look]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("server", "request", "per s", "bytes/s", "p50", "p99", "max", "errors/s", "of")]
    for row in rows_of(looks):
        if "trouble" in row:
            table.append((row["server"], row["trouble"], *[""] * 7))
            continue
        table.append((
            row["server"], row["request"], f"{row['requests_per_s']:.1f}", f"{human_bytes(row['bytes_per_s'])}",
            human_seconds(row["p50_s"]), human_seconds(row["p99_s"]), human_seconds(row["max_s"]),
            f"{row['errors_per_s']:.1f}" if row["errors"] else "", ", ".join(row["errors"]),
        ))  # fmt: skip
    return table


def _show_live(intervals: Iterator[list[Look]]) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    with Live(Text("looking ...")) as live:
        for looks in intervals:
            header, *rows = _table(looks)
            table = Table(box=None, pad_edge=False)
            for number, title in enumerate(header):
                table.add_column(title, justify="left" if number in (0, 1, 8) else "right", no_wrap=True)
            for row in rows:
                table.add_row(*(Text(safe(cell, terminal=True)) for cell in row))
            live.update(table if rows else Text("nothing was asked"), refresh=True)


def human_seconds(seconds: float) -> str:
    """0.00123 -> "1.23 ms"."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
