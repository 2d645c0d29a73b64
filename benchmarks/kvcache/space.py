"""What pages take on disk, and what is written for them.

Both are looked at from outside: the blocks of the storage server's files, and what the kernel says that the servers
wrote, against the bytes of the payloads. Headers, indexes, logs and what the store keeps for itself are in it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import emberkv
from emberfs.errors import DeadlineExceeded

from ..runner import Row, verify
from .pages import page_name
from .serving import Serving, settle

if TYPE_CHECKING:
    from .rows import Size

KIB = 1 << 10
DISK_GOAL = 1.15
WRITE_GOAL = 1.5
BATCH = 16
CHURN_PAGE_BYTES = 56 * KIB
CHAIN_PAGES_MAX = 32
TOUCHES = 2
"""Matches of pages that are there for each chain that is put: the liked ones stay, so segments die in parts."""
LEASE_S = 0.1
REFUSED_PAUSE_S = 0.05


def disk_row(serving: Serving, size: Size, page_bytes: int) -> Row:
    """Bytes on disk for each byte of pages that are there, in a store with nothing else in it."""
    count = max(size.space_bytes // page_bytes, 4)
    with serving.connect(page_bytes) as cache:
        settle()
        before = serving.disk_bytes()
        for chain in _chains(cache, [min(BATCH, count - at) for at in range(0, count, BATCH)]):
            verify(set(_put(cache, chain, page_bytes)) == {"stored"}, "ours: a page was refused")
        cache.flush()
        settle()
        taken = serving.disk_bytes() - before
    goal = DISK_GOAL if size.has_goals else None
    title = f"disk bytes a live byte, {page_name(page_bytes)}"
    return Row(row=title, ours=taken / (count * page_bytes), goal=goal, at_most=True)


def churn_rows(serving: Serving, size: Size) -> list[Row]:
    """Bytes written for each byte put, once the service is as full as it gets and evicts what was used least recently.

    Chains of 1 to 32 pages come and go; those that are there are matched with a preference for few of them.
    """
    with serving.connect(CHURN_PAGE_BYTES) as cache:
        churn = _Churn(cache)
        while not _counts(cache)["evicted_pages"]:
            churn.put(size.churn_capacity_bytes // 16, ends_s=math.inf)
        settle()
        written, counted, before = serving.written_bytes(), _counts(cache), churn.put_bytes
        churn.waits = churn.puts = 0
        churn.put(size.churn_capacity_bytes // 2, ends_s=time.monotonic() + size.churn_s)
        cache.flush()
        settle()
        written, told, put = serving.written_bytes() - written, _counts(cache), churn.put_bytes - before
    moved = 1 + (told["moved_bytes"] - counted["moved_bytes"]) / put
    goal = WRITE_GOAL if size.has_goals else None
    return [
        Row(row="bytes written a byte put, 90 % full", ours=written / put, goal=goal, at_most=True),
        Row(row="the same by what the service moved", ours=moved),
        Row(row="live bytes / capacity meanwhile", ours=told["live_bytes"] / size.churn_capacity_bytes),
        Row(row="puts that found no room in time, %", ours=100 * churn.waits / churn.puts),
    ]


class _Churn:
    """Puts chains and looks others up."""

    def __init__(self, cache: emberkv.KVCache) -> None:
        self._cache, self._rng = cache, random.Random(90)
        self._chains = _chains(cache, iter(lambda: self._rng.randint(1, CHAIN_PAGES_MAX), 0))
        self._there: list[list[bytes]] = []
        self.put_bytes = self.puts = self.waits = 0

    def put(self, amount_bytes: int, *, ends_s: float) -> None:
        """Put so much, or as much as can be until `ends_s`."""
        amount_bytes += self.put_bytes
        while self.put_bytes < amount_bytes and time.monotonic() < ends_s:
            chain = next(self._chains)
            self.puts += 1
            try:
                states = _put(self._cache, chain, CHURN_PAGE_BYTES)
            except DeadlineExceeded:
                states = ["refused"]
            if "refused" in states:
                self.waits += 1
                time.sleep(REFUSED_PAUSE_S)
            self.put_bytes += states.count("stored") * CHURN_PAGE_BYTES
            self._there.append(chain)
            for _ in range(TOUCHES):
                # Of those that were put last, and of few of them more than of most.
                at = len(self._there) - 1 - int(len(self._there) * self._rng.random() ** 4)
                self._cache.match(self._there[at], lease_s=LEASE_S)


def _chains(cache: emberkv.KVCache, lengths: Iterator[int] | list[int]) -> Iterator[list[bytes]]:
    tokens, first = cache.namespace.page_tokens, 0
    for length in lengths:
        yield cache.keys(range(first, first + length * tokens))
        first += length * tokens


def _put(cache: emberkv.KVCache, chain: list[bytes], page_bytes: int) -> list[str]:
    return cache.put(chain, [memoryview(_NOISE)[:page_bytes]] * len(chain))


def _counts(cache: emberkv.KVCache) -> dict[str, int]:
    (found,) = cache.stat()["namespaces"].values()
    counts: dict[str, int] = found["counts"] | {"live_bytes": found["live_bytes"]}
    return counts


_NOISE = random.Random(4).randbytes(64 << 20)
"""Nothing that a store could leave out or compress. The beginning of it is every page."""
