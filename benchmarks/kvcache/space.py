"""What pages take on disk, and what is written for them.

Both are looked at from outside: the blocks of the storage server's files, and what the kernel says that the servers
wrote, against the bytes of the payloads. Headers, indexes, logs and what the store keeps for itself are in it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import emberkv

from ..runner import Row, verify
from .pages import page_name
from .serving import Serving, settle

if TYPE_CHECKING:
    from .rows import Size

KIB = 1 << 10
PAGE_SIZES = (56 * KIB, 445 * KIB, 64 * 70_272, 512 * 70_272)
"""What 64 and 512 tokens take of a model of today, and of one with 70,272 bytes a token."""
DISK_GOAL = 1.15
WRITE_GOAL = 1.5
BATCH = 16
CHURN_PAGE_BYTES = 56 * KIB
CHAIN_PAGES_MAX = 32
TOUCHES = 2
"""Matches of pages that are there for each chain that is put: the liked ones stay, so segments die in parts."""
LEASE_S = 0.1
REFUSED_PAUSE_S = 0.05
REFUSED_S_MAX = 20.0


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
    rng = random.Random(90)
    with serving.connect(CHURN_PAGE_BYTES) as cache:
        chains = _chains(cache, iter(lambda: rng.randint(1, CHAIN_PAGES_MAX), 0))
        liked: list[list[bytes]] = []
        _churn(cache, chains, liked, size.churn_capacity_bytes, rng)
        cache.flush()
        settle()
        written, counted = serving.written_bytes(), _counts(cache)
        put, refused = _churn(cache, chains, liked, size.churn_capacity_bytes, rng)
        cache.flush()
        settle()
        written, told = serving.written_bytes() - written, _counts(cache)
    moved = 1 + (told["moved_bytes"] - counted["moved_bytes"]) / put
    verify(told["evicted_pages"] > counted["evicted_pages"], "ours: nothing was evicted, so it was not full")
    goal = WRITE_GOAL if size.has_goals else None
    return [
        Row(row="bytes written a byte put, 90 % full", ours=written / put, goal=goal, at_most=True),
        Row(row="the same by what the service moved", ours=moved),
        Row(row="live bytes / capacity meanwhile", ours=told["live_bytes"] / size.churn_capacity_bytes),
        Row(row="chains that had to be put again for lack of room, %", ours=100 * refused),
    ]


def _chains(cache: emberkv.KVCache, lengths: Iterator[int] | list[int]) -> Iterator[list[bytes]]:
    tokens, first = cache.namespace.page_tokens, 0
    for length in lengths:
        yield cache.keys(range(first, first + length * tokens))
        first += length * tokens


def _churn(
    cache: emberkv.KVCache,
    chains: Iterator[list[bytes]],
    liked: list[list[bytes]],
    amount_bytes: int,
    rng: random.Random,
) -> tuple[int, float]:
    """Put so much. What it was exactly, and the share of chains that did not find room at once."""
    put, count, refused = 0, 0, 0
    while put < amount_bytes:
        chain = next(chains)
        count += 1
        ends_s = time.monotonic() + REFUSED_S_MAX
        while "refused" in _put(cache, chain, CHURN_PAGE_BYTES):
            refused += 1
            verify(time.monotonic() < ends_s, f"ours: no room within {REFUSED_S_MAX} s")
            time.sleep(REFUSED_PAUSE_S)
        put += len(chain) * CHURN_PAGE_BYTES
        liked.append(chain)
        for _ in range(TOUCHES):
            # Of those that were put last, and of few of them more than of most.
            at = len(liked) - 1 - int(len(liked) * rng.random() ** 4)
            cache.match(liked[at], lease_s=LEASE_S)
    return put, refused / count


def _put(cache: emberkv.KVCache, chain: list[bytes], page_bytes: int) -> list[str]:
    return cache.put(chain, [memoryview(_NOISE)[:page_bytes]] * len(chain))


def _counts(cache: emberkv.KVCache) -> dict[str, int]:
    (found,) = cache.stat()["namespaces"].values()
    counts: dict[str, int] = found["counts"] | {"live_bytes": found["live_bytes"]}
    return counts


_NOISE = random.Random(4).randbytes(max(PAGE_SIZES))
"""Nothing that a store could leave out or compress."""
