"""Batches of pages from the service's storage server, beside every other way to keep them on this host."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..mooncake import MOONCAKE, MooncakeValues
from ..peers import FileValues, LmdbValues, RedisPyValues, RedisValues
from ..runner import Row, compare
from .pages import ROTATION_BYTES, Pages
from .serving import Serving

if TYPE_CHECKING:
    from .rows import Size

KIB, MIB = 1 << 10, 1 << 20
OVER_TCP = ("redis tcp", "redis-py", "mooncake")
TCP_PEERS = ("redis-py", "mooncake")
"""Of those the ones that ours over TCP is judged by."""

LMDB_GOALS = {56 * KIB: 0.35, 256 * KIB: 0.5, MIB: 0.5, 4 * MIB: 0.5}
"""Page bytes -> ours / LMDB."""
UNIX_GOALS = {56 * KIB: 1.3}
"""-> ours / a bare client of redis on a unix socket."""
BEST_TCP_GOAL = 2.0
"""Ours / the quickest peer over TCP."""
TCP_GOAL = 1.3
"""Ours over TCP / redis-py, Mooncake."""


def get_rows(directory: Path, serving: Serving, corpus: memoryview, size: Size, page_bytes: int) -> list[Row]:
    """All sides in the same rounds; one row for each that is a goal."""
    pages = Pages(corpus, page_bytes, size)
    plain = memoryview(bytearray(ROTATION_BYTES))
    with ExitStack() as stack:
        lmdb = stack.enter_context(closing(LmdbValues(directory / "lmdb")))
        files = stack.enter_context(closing(FileValues(directory / "files")))
        unix = stack.enter_context(closing(RedisValues(directory / "redis-unix")))
        tcp = stack.enter_context(closing(RedisPyValues(directory / "redis-tcp")))
        for values in (lmdb, files, unix, tcp):
            values.load(pages.values())
        cache = stack.enter_context(serving.connect(page_bytes))
        pages.store(cache)
        far = stack.enter_context(serving.connect_by_tcp(page_bytes))
        shared = cache.buffer(ROTATION_BYTES)
        shared[:] = bytes(ROTATION_BYTES)
        peers = {
            "match + get": pages.matched_each(cache, shared),
            "any memory": pages.matched_once(cache, plain, "any memory"),
            "lmdb": pages.of(lmdb, plain, "lmdb"),
            "files": pages.of(files, plain, "files"),
            "redis": pages.of(unix, plain, "redis"),
            "ours tcp": pages.matched_once(far, plain, "ours tcp"),
            "redis tcp": pages.of(tcp.bare, plain, "redis tcp"),
            "redis-py": pages.of(tcp, plain, "redis-py"),
        }
        servers = dict.fromkeys(("ours", "match + get", "any memory", "ours tcp"), serving.pids)
        servers |= {"redis": [unix.pid], "redis tcp": [tcp.pid], "redis-py": [tcp.pid]}
        if size.has_goals and MOONCAKE.is_there():
            mooncake = stack.enter_context(closing(MooncakeValues(directory / "mooncake")))
            mooncake.load(directory / "raw", page_bytes, items=len(pages.values()))
            calls = [pages.numbers(sequence) for sequence in pages.calls]
            peers["mooncake"] = mooncake.subject(calls, pages.amount_mib)
            servers["mooncake"] = mooncake.pids
        found = compare(
            f"get {pages.name}, MiB/s",
            pages.matched_once(cache, shared),
            peers=peers,
            baseline="lmdb",
            goal=LMDB_GOALS[page_bytes] if size.has_goals else None,
            rounds=size.rounds,
            servers=servers,
        )
    return _judged(found, pages.name, page_bytes, has_goals=size.has_goals)


def _judged(found: Row, name: str, page_bytes: int, *, has_goals: bool) -> list[Row]:
    """The comparison as rows: who is near, and who is behind TCP."""
    near = {peer: rate for peer, rate in found.peers.items() if peer not in (*OVER_TCP, "ours tcp")}
    behind = {peer: rate for peer, rate in found.peers.items() if peer in OVER_TCP}
    best = max(behind, key=lambda peer: behind[peer])
    rows = [replace(found, peers=near)]
    for peer, goal in (("redis", UNIX_GOALS.get(page_bytes)), (best, BEST_TCP_GOAL)):
        rows.append(_beside(found, f"get {name}", peer, goal if has_goals else None))
    names = {"ours": "ours tcp", **{peer: peer for peer in behind}}
    far = Row(
        row=f"tcp get {name}, MiB/s",
        ours=found.peers["ours tcp"],
        peers=behind,
        seconds={shown: found.seconds[peer] for shown, peer in names.items()},
        rounds={shown: found.rounds[peer] for shown, peer in names.items()},
    )
    goal = TCP_GOAL if has_goals else None
    return [*rows, far, *(_beside(far, f"tcp get {name}", peer, goal) for peer in TCP_PEERS if peer in behind)]


def _beside(found: Row, title: str, peer: str, goal: float | None) -> Row:
    """What was measured, judged by one peer."""
    return Row(
        row=f"{title}, beside {peer}",
        ours=found.ours,
        peers={peer: found.peers[peer]},
        ratio=found.against(peer),
        baseline=peer,
        goal=goal,
    )
