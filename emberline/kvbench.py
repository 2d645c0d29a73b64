"""`emberline kv bench`: a quick load on a service from several processes: how fast it matches, stores and reads."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from emberfs.cli.output import human_bytes, json_option, note, print_columns, print_json
from emberfs.cli.stats import human_seconds

from .kvservice import operator_of, size_bytes_of, tls_option, token_option

if TYPE_CHECKING:
    from emberfs.histogram import Histogram
    from emberkv import KVCache

CHAIN_PAGES = 64
BATCH_PAGES = 16
CHAINS_A_REQUEST = 64
PAGE_TOKENS = 64
PHASES = ("put", "match", "get")
_START_S = 60.0
"""Within which all processes have to come to the start of a phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one process does."""

    address: str
    tenant: str
    token: str
    tls: Path | None
    page_bytes: int
    chains: int
    seconds: float
    salt: bytes


@dataclass(slots=True)
class Phase:
    """What came of it."""

    count: int
    """Pages, or matches."""
    moved_bytes: int
    seconds: float
    latency: Histogram
    """Of calls: a batch of pages, or a request with several matches."""


def run_load(load: Load, meet: Callable[[], object]) -> dict[str, Phase]:
    """Put, match and get, each when all have met; then what was put is taken out."""
    import emberkv

    namespace = emberkv.Namespace(
        model="emberline-bench", dtype="bytes", layout="none", page_tokens=PAGE_TOKENS,
        kinds=(emberkv.Kind("kv", payload_bytes=load.page_bytes),),
    )  # fmt: skip
    found: dict[str, Phase] = {}
    with emberkv.connect(
        load.address, namespace, tenant=load.tenant, token=load.token, tls=load.tls, salt=load.salt, timeout_s=30.0
    ) as cache:
        tokens = random.Random(load.salt)
        chains = [
            cache.keys([tokens.randrange(1 << 31) for _ in range(CHAIN_PAGES * PAGE_TOKENS)])
            for _ in range(load.chains)
        ]
        try:
            meet()
            found["put"] = _put(cache, chains, load)
            meet()
            found["match"] = _match(cache, chains, load)
            meet()
            found["get"] = _get(cache, chains, load)
        finally:
            cache.remove([chain[0] for chain in chains])
    return found


def _put(cache: KVCache, chains: Sequence[Sequence[bytes]], load: Load) -> Phase:
    from emberfs.histogram import Histogram

    payloads = [os.urandom(load.page_bytes) for _ in range(BATCH_PAGES)]
    latency, stored, began_s = Histogram(), 0, time.perf_counter()
    for chain in chains:
        for begin in range(0, CHAIN_PAGES, BATCH_PAGES):
            at_s = time.perf_counter()
            parent = chain[begin - 1] if begin else None
            stored += cache.put(chain[begin : begin + BATCH_PAGES], payloads, parent=parent).count("stored")
            latency.record(time.perf_counter() - at_s)
    cache.flush()
    return Phase(stored, stored * load.page_bytes, time.perf_counter() - began_s, latency)


def _match(cache: KVCache, chains: Sequence[Sequence[bytes]], load: Load) -> Phase:
    from emberfs.histogram import Histogram

    choose = random.Random(load.salt)
    latency, count, began_s = Histogram(), 0, time.perf_counter()
    while (at_s := time.perf_counter()) - began_s < load.seconds:
        asked = [choose.choice(chains)[: choose.randint(1, CHAIN_PAGES)] for _ in range(CHAINS_A_REQUEST)]
        cache.match_many(asked, lease_s=1.0)
        count += len(asked)
        latency.record(time.perf_counter() - at_s)
    return Phase(count, 0, time.perf_counter() - began_s, latency)


def _get(cache: KVCache, chains: Sequence[Sequence[bytes]], load: Load) -> Phase:
    from emberfs.histogram import Histogram

    memory = cache.buffer(BATCH_PAGES * load.page_bytes)
    buffers = [memory[i * load.page_bytes : (i + 1) * load.page_bytes] for i in range(BATCH_PAGES)]
    hits = [hit for hit in cache.match_many(chains[:1024], lease_s=load.seconds + 60) if hit.pages >= BATCH_PAGES]
    choose = random.Random(load.salt)
    latency, read, began_s = Histogram(), 0, time.perf_counter()
    while hits and (at_s := time.perf_counter()) - began_s < load.seconds:
        hit = choose.choice(hits)
        first = choose.randrange(hit.pages - BATCH_PAGES + 1)
        read += sum(cache.get_into(hit, buffers, first=first))
        latency.record(time.perf_counter() - at_s)
    cache.release(*hits)
    return Phase(read, read * load.page_bytes, time.perf_counter() - began_s, latency)


# ---- processes


def _work(load: Load, barrier: Any, results: Connection) -> None:
    """In a process of its own."""
    try:
        results.send(run_load(load, lambda: barrier.wait(_START_S + load.seconds)))
    except KeyboardInterrupt:  # It is told by the process that started us, which a terminal interrupts, too.
        barrier.abort()
    except Exception as error:
        barrier.abort()
        results.send(f"{type(error).__name__}: {error}")


def run_loads(loads: Sequence[Load]) -> list[dict[str, Phase]]:
    """Each in a process of its own, at once. Raises ClickException for the first that failed."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(loads))
    started = []
    for load in loads:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(load, barrier, theirs))
        process.start()
        theirs.close()
        started.append((process, ours))
    found: list[dict[str, Phase]] = []
    failures: list[str] = []
    try:
        for process, ours in started:
            try:
                said = ours.recv()
            except EOFError:
                said = f"a process ended with code {process.exitcode}"
                barrier.abort()
            found.append(said) if isinstance(said, dict) else failures.append(said)
            process.join()
            ours.close()
    except KeyboardInterrupt:
        barrier.abort()
        for process, _ in started:
            process.join()  # It takes out what it put.
        raise
    if failures:
        # Whoever waited for the one that failed says no more than that.
        raise click.ClickException(min(failures, key=lambda text: text.startswith("BrokenBarrierError")))
    return found


@click.command()
@click.argument("address", envvar="EMBERLINE_KV")
@click.option("--processes", type=click.IntRange(1, 256), default=2, show_default=True, metavar="N")
@click.option("--page", "page_size", default="64KiB", show_default=True, metavar="SIZE", help="Of a page's payload.")
@click.option("--data", "data_size", default="128MiB", show_default=True, metavar="SIZE", help="Put by each process.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=3.0, show_default=True,
              help="Of matching, and of reading.")  # fmt: skip
@click.option("--tenant", default="default", show_default=True, metavar="NAME", help="Whose pages they are.")
@token_option
@tls_option
@json_option
def bench(
    address: str, processes: int, page_size: str, data_size: str, seconds: float, tenant: str, token: str,
    tls: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Put, match and read pages of the service at ADDRESS from several processes at once, and tell how fast it was.

    The pages are in a namespace of their own, emberline-bench, and are taken out at the end. Each call puts or reads
    16 pages, and each request matches 64 chains of up to 64 pages; every page that is read is compared with its
    checksum. Puts return when the pages are copied; their rate is that of pages that are durable. The service must have
    room for what all processes put.

    \b
    Examples:
      emberline kv bench 127.0.0.1:7400
      emberline kv bench 127.0.0.1:7400 --processes 8 --page 1MiB --data 1GiB --json
    """
    with operator_of(address, token, tls) as operator:
        operator.stat(tenant=tenant)  # Who is not there, or lets nobody in, is told now and not by each process.
    page_bytes, data_bytes = size_bytes_of(page_size), size_bytes_of(data_size)
    chains = max(1, data_bytes // (page_bytes * CHAIN_PAGES))
    note(f"{processes} processes put {human_bytes(chains * CHAIN_PAGES * page_bytes)} each")
    loads = [
        Load(address=address, tenant=tenant, token=token, tls=tls, page_bytes=page_bytes, chains=chains,
             seconds=seconds, salt=os.urandom(8))
        for _ in range(processes)
    ]  # fmt: skip
    found = run_loads(loads)
    rows = [["", "per s", "bytes/s", "call p50", "p99", "max"]]
    wanted = processes * chains * CHAIN_PAGES
    for name in PHASES:
        told = total([each[name] for each in found])
        if as_json:
            print_json({"phase": name, "processes": processes, "page_bytes": page_bytes, **told})
        what = "matches" if name == "match" else "pages"
        rate = human_bytes(told["bytes_per_s"]) if told["bytes_per_s"] else ""
        times = [human_seconds(told[key]) for key in ("p50_s", "p99_s", "max_s")]
        rows.append([f"{name} {what}", f"{told['per_s']:,.0f}", rate, *times])
        if name == "put" and told["count"] < wanted:
            note(f"{wanted - told['count']:,} of {wanted:,} pages were not stored: is there room for them?")
    if not as_json:
        print_columns(rows, right=range(1, 6))


def total(phases: Sequence[Phase]) -> dict[str, Any]:
    """Of all processes together: they ran at the same time."""
    from emberfs.histogram import Histogram

    latency = Histogram()
    for phase in phases:
        latency.merge(phase.latency)
    return {
        "count": sum(phase.count for phase in phases),
        "per_s": sum(phase.count / phase.seconds for phase in phases),
        "bytes_per_s": sum(phase.moved_bytes / phase.seconds for phase in phases),
        "calls": latency.count,
        "p50_s": latency.quantile_s(0.5),
        "p99_s": latency.quantile_s(0.99),
        "max_s": latency.max_s,
    }
