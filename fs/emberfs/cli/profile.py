"""`emberline profile`: where the time of requests goes, on the servers and on the way to them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

from ..client.sync import Client
from ..meter import STAGES
from .attribution import Span, span
from .output import json_option, note, print_columns, print_json
from .scratch import scratch_directory
from .servers import Look, between, by_role, look
from .stats import human_seconds
from .store import open_store, store_argument

SMALL_BYTES, LARGE_BYTES = 4 << 10, 1 << 20
FILE_BYTES = 16 << 20
"""What is read lies in a file of this size, so that it is in no CPU's cache."""


@click.command(
    epilog="\b\nExamples:\n"
    "  emberline profile --seconds 10 ember://db1:7301,db2:7301\n"
    "  emberline profile --json | jq 'select(.probe) | {probe, network_s, disk_s}'"
)
@store_argument
@click.option("--seconds", type=click.FloatRange(0.1, 3600), default=5.0, show_default=True, help="How long to look.")
@json_option
def profile(store: str | None, seconds: float, as_json: bool) -> None:
    """Show where the time goes: of all requests on the servers, and of calls that this command makes as a probe.

    \b
    On a server a request is in one of four stages at any time:
      queue    it has arrived, and its handler has not started: the process is busy
      disk     files are read (and what was read is checked), written, or a flush is waited for
      servers  another server is waited for: the next one of the chain, the kv server
      work     the rest: computing, and waiting for locks or for the process
    Of the probe, beside those of all servers that it went through:
      client   in this process
      network  the rest: the way there and back, and the queues of sockets and event loops on both sides

    The probe works in a directory of its own, which is removed. Its split among the servers' stages is exact on a store
    that nobody else uses; else that of everybody's requests of the same kinds. On an embedded store that nobody else
    has open there are no servers: only the probe is shown.
    """
    with open_store(store) as client:
        before = look(client)
        note(f"looking at {client.url} for {seconds:g} s")
        probes = list(_probe(client, seconds))
        looks = by_role(between(before, look(client)))
    rows = list(rows_of(looks))
    if as_json:
        for row in [*rows, *(probe.as_object() for probe in probes)]:
            print_json(row)
        return
    if rows:
        print_columns(_table(rows), right=range(2, 8))
        click.echo()
    print_columns(_probe_table(probes), right=range(1, 8))


def rows_of(looks: Sequence[Look]) -> Iterator[dict[str, Any]]:
    """One object per role and kind, those that took the most time first; seconds are sums."""
    for each in looks:
        if each.trouble:
            yield {"role": each.role, "server": each.server, "trouble": each.trouble}
        for kind, stats in sorted(each.kinds.items(), key=lambda item: -item[1].whole.total_s):
            stages = {f"{name}_s": stats.stage(name).total_s for name in STAGES}
            yield {
                "role": each.role,
                "server": each.server,
                "request": kind,
                "count": stats.whole.count,
                "total_s": stats.whole.total_s,
                **stages,
            }


def _table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("server", "request", "count", "mean", *STAGES)]
    for row in rows:
        if "trouble" in row:
            table.append((row["server"], row["trouble"], *[""] * (2 + len(STAGES))))
            continue
        total_s = row["total_s"] or 1.0
        shares = [f"{row[f'{name}_s'] / total_s:.0%}" for name in STAGES]
        mean = human_seconds(row["total_s"] / row["count"])
        table.append((row["server"], row["request"], str(row["count"]), mean, *shares))
    return table


# ---- the probe


@dataclass(frozen=True, slots=True)
class Probe:
    """Calls of one kind that the command made."""

    name: str
    span: Span

    def as_object(self) -> dict[str, Any]:
        shares = self.span.shares
        seconds = {f"{name}_s": value for name, value in asdict(shares).items()}
        return {"probe": self.name, "count": self.span.calls, "total_s": shares.total, **seconds}


def _probe(client: Client, seconds: float) -> Iterator[Probe]:
    with scratch_directory(client, "profile") as scratch:
        client.put(f"{scratch}/read", os.urandom(FILE_BYTES))
        buffer = client.buffer(LARGE_BYTES)
        large = os.urandom(LARGE_BYTES)

        def read(turn: int, size: int) -> None:
            client.get_into(f"{scratch}/read", buffer[:size], offset=turn * 7919 * size % (FILE_BYTES - size))

        calls: dict[str, Callable[[int], object]] = {
            "stat": lambda _: client.stat(f"{scratch}/read"),
            "read 4 KiB": lambda turn: read(turn, SMALL_BYTES),
            "read 1 MiB": lambda turn: read(turn, LARGE_BYTES),
            "put 4 KiB": lambda _: client.put(f"{scratch}/small", large[:SMALL_BYTES]),
            "put 1 MiB": lambda _: client.put(f"{scratch}/large", large),
        }
        for name, call in calls.items():
            call(0)  # The first one connects.
            end_s = time.monotonic() + seconds / len(calls)
            with span(client) as found:
                for turn in itertools.count():
                    call(turn)
                    if time.monotonic() >= end_s:
                        break
            yield Probe(name, found)


def _probe_table(probes: Sequence[Probe]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("probe", "count", "mean", "client", "network", "queue", "disk", "work")]
    for probe in probes:
        mean = human_seconds(probe.span.shares.total / probe.span.calls)
        shares = [f"{part:.0%}" for part in probe.span.shares.fractions().values()]
        table.append((probe.name, str(probe.span.calls), mean, *shares))
    return table
