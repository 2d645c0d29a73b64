"""`emberline bench`: what a store does from here, beside what this machine could do at most, and what limits it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..client.sync import Client
from ..embedded import EmbeddedStore
from ..urls import SCHEME, cluster_addresses
from .attribution import Shares, span
from .bench_work import Job, Work
from .ceilings import Ceilings, Pace, measure_ceilings
from .find import size_bytes
from .limits import limit_of, parts_of
from .location import STORE_VARIABLE
from .output import human_bytes, json_option, note, print_columns, print_json, safe
from .scratch import scratch_directory, uninterrupted
from .store import open_store, url_of

ROUNDS = 3
"""Turns each side gets; the best counts, because what disturbs a run only ever slows it."""
QUICK_BYTES, QUICK_S, QUICK_ROUNDS = 8 << 20, 0.1, 1
SIZE_MIN = 2 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a job. Rates are per second, of all threads together, in its unit."""

    name: str
    unit: str
    plain_name: str
    store: float
    plain: float
    crc: float | None
    copy: float | None
    socket: float
    parts: dict[str, float]
    """Seconds of one operation."""

    @property
    def limit(self) -> str:
        return limit_of(self.parts)

    @property
    def share(self) -> float:
        """Of the limit in the whole."""
        return self.parts[self.limit] / (sum(self.parts.values()) or 1.0)


@click.command(
    epilog="\b\nExamples:\n"
    "  emberline bench                                  # a temporary store in this directory\n"
    "  emberline bench ember:///srv/store --threads 4\n"
    "  emberline bench ember://db1:7301,db2:7301 --size 1g\n"
    "  emberline bench --quick --json | jq '{name, limit, ratio}'"
)
@click.argument("store", required=False)
@click.option("--size", type=size_bytes, metavar="SIZE", default="64m", show_default=True,
              help="What each side reads and writes within.")  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, 64), default=1, show_default=True, help="Of this process, on each side."
)
@click.option("--seconds", type=click.FloatRange(0.01, 60), default=0.3, show_default=True, help="Per measurement.")
@click.option("--quick", is_flag=True, help="A first impression: small, short, and each side once.")
@json_option
def bench(store: str | None, size: float, threads: int, seconds: float, quick: bool, as_json: bool) -> None:
    """Measure a store beside the ceilings of this machine, and name what limits each operation.

    STORE is a URL like ember:///store/dir or ember://host:port; without it, the one of EMBERLINE_URL, or else a
    temporary store in this directory. It works in a directory of its own there. It takes about four times --size in the
    store, as much on the local disk (the store's, or that of this directory if it is a cluster), and twice --size of
    memory. All is removed again, also after Ctrl-C; on a store that others use the space comes back when garbage is
    next collected. Bytes are compared with what was written. Reads are warm on both sides: from memory, if they fit.

    \b
    Beside each rate is what this machine did in the same run, by as many threads, for the same bytes:
      plain    the system calls on the local disk, with the same durability, in turns with the store
      crc      CRC32C of them
      copy     a copy in memory
      socket   a small request over loopback TCP, answered by as many bytes

    \b
    The limit is the part of an operation that takes the most of its time:
      disk     reading what is not in memory, writing, waiting for flushes: on whichever machine
      crc      checksums; a part of reading on the disk's side, of writing on the processor's
      copy     moving bytes in memory. A warm read is a copy out of the page cache: that is taken for its limit, and
               not the disk, if the plain calls take no longer than a few copies
      cpu      the rest of what client and servers compute, and what waits for them to get to it
      network  bytes on the way between processes
      latency  the same, for so few bytes that a socket carries them in less than half of that time: round trips count
    Client and servers measure their shares (see `emberline profile`); crc and copy are taken out of them by the bytes
    that there were and what the machine took for as many. On a store that others use meanwhile the servers' shares are
    those of everybody's requests.
    """
    if quick:
        size, seconds = min(size, QUICK_BYTES), min(seconds, QUICK_S)
    if size < SIZE_MIN:
        raise click.UsageError(f"--size is at least {human_bytes(SIZE_MIN)}")
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with _workplace(store) as (client, scratch, directory):
        note(f"measuring {client.url}")
        rows = []
        work = Work(client, scratch, directory, size=int(size), threads=threads)
        for row in _measure(client, work, Pace(seconds=seconds, threads=threads), rounds):
            rows.append(row)
            if as_json:
                print_json(_as_object(row))
    if not as_json:
        print_columns(_table(rows), right=range(1, 7))


@contextmanager
def _workplace(store: str | None) -> Iterator[tuple[Client, str, Path]]:
    """(client, its directory in the store, one on the local disk); all of it is gone afterwards."""
    url = url_of(store) if store or os.environ.get(STORE_VARIABLE) else None
    parent = Path.cwd() if url is None or cluster_addresses(url) else Path(url.removeprefix(SCHEME))
    if url is not None and not cluster_addresses(url):
        with open_store(url):
            pass  # Is it one? Nothing is made beside it before.
    plain = Path(tempfile.mkdtemp(prefix=".emberline-bench-", dir=parent))
    try:
        with Client(url or f"{SCHEME}{plain}/store") as client, scratch_directory(client, "bench") as scratch:
            yield client, scratch, plain
    finally:
        with uninterrupted():
            shutil.rmtree(plain, ignore_errors=True)


def _measure(client: Client, work: Work, pace: Pace, rounds: int) -> Iterator[Row]:
    ceilings: dict[tuple[int, int], Ceilings] = {}
    with work.jobs() as jobs, _progress(len(jobs)) as begin:
        for prepare in jobs:
            job = prepare()
            begin(job.name)
            shape = (job.size, job.pieces)
            if shape not in ceilings:
                ceilings[shape] = measure_ceilings(pace, *shape)
            yield _row(client, job, ceilings[shape], pace, rounds)


def _row(client: Client, job: Job, ceilings: Ceilings, pace: Pace, rounds: int) -> Row:
    """Both sides in turns; the first call of each warms up."""
    job.store(0, 0)
    job.plain(0, 0)
    store = plain = 0.0
    shares, calls = Shares(), 0
    for _ in range(rounds):
        with span(client) as found:
            store = max(store, pace.rate(job.store))
        shares, calls = shares + found.shares, calls + found.calls
        plain = max(plain, pace.rate(job.plain))
    job.verify()
    at_store = client.store
    parts = parts_of(
        shares.per(calls or 1),
        ceilings,
        plain_s=pace.threads / plain if plain else 0.0,
        pieces=job.pieces,
        reads=job.reads,
        has_servers=not isinstance(at_store, EmbeddedStore) or at_store.services is None,
    )
    moves = job.size > 0

    def rate(seconds: float) -> float:
        return pace.threads / seconds * job.amount

    return Row(
        name=job.name,
        unit=job.unit,
        plain_name=job.plain_name,
        store=store * job.amount,
        plain=plain * job.amount,
        crc=rate(ceilings.crc_s) if moves else None,
        copy=rate(ceilings.copy_s) if moves else None,
        socket=rate(ceilings.socket_s),
        parts=parts,
    )


def _as_object(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "unit": row.unit,
        "store": row.store,
        "ceiling": row.plain,
        "ceiling_name": row.plain_name,
        "ratio": round(row.store / row.plain, 4),
        "crc": row.crc,
        "copy": row.copy,
        "socket": row.socket,
        "limit": row.limit,
        "limit_share": round(row.share, 4),
        "parts_s": row.parts,
    }


def _table(rows: list[Row]) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [("", "store", "plain", "ratio", "crc", "copy", "socket", "limit", "plain is")]
    for row in rows:
        rates = [_rate(rate, row.unit) for rate in (row.store, row.plain, row.crc, row.copy, row.socket)]
        limit = f"{row.limit} {row.share:.0%}"
        table.append((row.name, *rates[:2], f"{row.store / row.plain:.2f}", *rates[2:], limit, row.plain_name))
    return table


def _rate(rate: float | None, unit: str) -> str:
    if rate is None:
        return ""
    return f"{human_bytes(rate)}/s" if unit == "B/s" else f"{rate:,.0f}/s"


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Says on a terminal what is measured. Yields a function that takes the name of what comes next."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("preparing") as status:
        numbers = iter(range(1, total + 1))
        yield lambda name: status.update(safe(f"{next(numbers)} of {total}: {name}", terminal=True))
