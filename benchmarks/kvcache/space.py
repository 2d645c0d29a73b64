"""What pages take on disk, and what is written for them.

Both are looked at from outside: the blocks of the storage server's files, and what the kernel says that the servers
wrote, against the bytes of the payloads. Headers, indexes, logs and what the store keeps for itself are in it.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import emberkv
from emberfs.errors import DeadlineExceeded

from ..runner import Row, verify
from .pages import page_name
from .serving import Serving, settle

if TYPE_CHECKING:
    from .rows import Size

KIB, MIB = 1 << 10, 1 << 20
DISK_GOAL = 1.15
WRITE_GOAL = 1.5
BATCH = 16
CHURN_PAGE_BYTES = 56 * KIB
CHAIN_PAGES_MAX = 32
POPULATION = 4.0
"""Chains that are asked for, by what there is room for."""
ZIPF = 0.9
"""The chain of rank r is asked for 1/r**ZIPF times as often as the first."""
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

    Requests ask for chains of 1 to 32 pages, four times as many as there is room for, some of them much more often
    than others (Zipf). What is there is read, what is not is put: as an engine does it.
    """
    capacity = size.churn_capacity_bytes
    with serving.connect(CHURN_PAGE_BYTES) as cache:
        churn = _Churn(cache, capacity)
        while not _counts(cache)["evicted_pages"]:
            churn.put(capacity // 16, for_s=size.churn_s)
        churn.put(capacity // 2, for_s=size.churn_s)  # Until the segments are as torn as they get.
        settle()
        churn.tally = tally = _Tally()
        written, counted, begin_s = serving.written_bytes(), _counts(cache), time.monotonic()
        churn.put(capacity, for_s=size.churn_s)
        spent_s = time.monotonic() - begin_s
        cache.flush()
        settle()
        written, told = serving.written_bytes() - written, _counts(cache)
    put = max(tally.put_bytes, CHURN_PAGE_BYTES)
    moved = told["moved_bytes"] - counted["moved_bytes"]
    goal = WRITE_GOAL if size.has_goals else None
    return [
        Row(row="churn, 90 % full: bytes written a byte put", ours=written / put, goal=goal, at_most=True),
        Row(row="churn: bytes moved by compaction a byte put", ours=moved / put),
        Row(row="churn: bytes written by the store a byte it got", ours=written / (put + moved)),
        Row(row="churn: live bytes / capacity", ours=told["live_bytes"] / capacity),
        Row(row="churn: put beside the gets, MiB/s", ours=put / MIB / spent_s),
        Row(row="churn: pages that hit, %", ours=100 * tally.hit_pages / tally.asked_pages),
        Row(row="churn: hit pages that were gone when read, %", ours=100 * tally.gone_pages / max(tally.hit_pages, 1)),
        Row(row="churn: puts that found no room in time, %", ours=100 * tally.refused / max(tally.puts, 1)),
    ]


@dataclass(slots=True)
class _Tally:
    put_bytes: int = 0
    puts: int = 0
    refused: int = 0
    asked_pages: int = 0
    hit_pages: int = 0
    gone_pages: int = 0


class _Churn:
    """One engine."""

    def __init__(self, cache: emberkv.KVCache, capacity_bytes: int) -> None:
        self._cache, self._rng = cache, random.Random(90)
        self.tally = _Tally()
        count = int(POPULATION * capacity_bytes / CHURN_PAGE_BYTES / (1 + CHAIN_PAGES_MAX) * 2)
        self._chains = list(_chains(cache, [self._rng.randint(1, CHAIN_PAGES_MAX) for _ in range(count)]))
        self._weights = list(itertools.accumulate(1 / rank**ZIPF for rank in range(1, count + 1)))
        self._memory = cache.buffer(CHAIN_PAGES_MAX * CHURN_PAGE_BYTES)
        self._into = [self._memory[at * CHURN_PAGE_BYTES :][:CHURN_PAGE_BYTES] for at in range(CHAIN_PAGES_MAX)]

    def put(self, amount_bytes: int, *, for_s: float) -> None:
        """Requests until so much was put, or for so long."""
        amount_bytes, ends_s = amount_bytes + self.tally.put_bytes, time.monotonic() + for_s
        while self.tally.put_bytes < amount_bytes and time.monotonic() < ends_s:
            (chain,) = self._rng.choices(self._chains, cum_weights=self._weights)
            self._request(chain)

    def _request(self, chain: list[bytes]) -> None:
        tally, cache = self.tally, self._cache
        hit = cache.match(chain)
        tally.asked_pages += len(chain)
        tally.hit_pages += hit.pages
        good = cache.get_into(hit, self._into[: hit.pages]) if hit.pages else []
        tally.gone_pages += good.count(False)
        for key, view, there in zip(chain, self._into, good, strict=False):
            verify(not there or view == _payload(key), "ours: wrong bytes")
        cache.release(hit)
        if hit.pages < len(chain):
            self._put(chain[hit.pages :], chain[hit.pages - 1] if hit.pages else None)

    def _put(self, keys: list[bytes], parent: bytes | None) -> None:
        tally = self.tally
        tally.puts += 1
        try:
            states = self._cache.put(keys, [_payload(key) for key in keys], parent=parent)
        except DeadlineExceeded:
            states = ["refused"]
        if "refused" in states:
            tally.refused += 1
            time.sleep(REFUSED_PAUSE_S)
        tally.put_bytes += states.count("stored") * CHURN_PAGE_BYTES


def _payload(key: bytes) -> memoryview:
    """Another one for each key."""
    at = int.from_bytes(key[:4]) % (len(_NOISE) - CHURN_PAGE_BYTES)
    return memoryview(_NOISE)[at : at + CHURN_PAGE_BYTES]


def _chains(cache: emberkv.KVCache, lengths: Iterator[int] | list[int]) -> Iterator[list[bytes]]:
    tokens, first = cache.namespace.page_tokens, 0
    for length in lengths:
        yield cache.keys(range(first, first + length * tokens))
        first += length * tokens


def _put(cache: emberkv.KVCache, chain: list[bytes], page_bytes: int) -> list[str]:
    return cache.put(chain, [memoryview(_NOISE)[:page_bytes]] * len(chain))


def _counts(cache: emberkv.KVCache) -> dict[str, int]:
    found = cache.stat()["namespaces"][cache.namespace.name]
    counts: dict[str, int] = found["counts"] | {"live_bytes": found["live_bytes"]}
    return counts


_NOISE = random.Random(4).randbytes(64 << 20)
"""Nothing that a store could leave out or compress. The beginning of it is every page."""
