"""Look-ups of prefixes: keys over the socket, places back, a lease on each."""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING

import emberkv

from ..runner import Row, Subject, compare, verify
from .serving import Serving

if TYPE_CHECKING:
    from .rows import Size

PER_REQUEST = 64
CHAIN_PAGES = 128
PAGE_BYTES = 512
"""No look-up touches the pages: small ones are put sooner."""
LEASE_S = 1.0
GOAL = 30_000.0
SINGLES = 2000


def match_rows(serving: Serving, size: Size) -> list[Row]:
    """64 matches in one request, one client; and one match in one request."""
    rng = random.Random(6)
    with serving.connect(0) as cache:
        chains = _stored_chains(cache, size.chains)
        requests = [_request(chains, rng) for _ in range(min(size.match_requests, 64))]
        together = compare(
            f"match, {PER_REQUEST} a request, matches/s",
            _matching(cache, requests, size.match_requests),
            rounds=size.rounds,
            servers={"ours": serving.pids},
        )
        latency_us = _single_us(cache, chains, rng)
    judged = Row(row=together.row, ours=together.ours, goal=GOAL if size.has_goals else None, seconds=together.seconds)
    return [judged, Row(row=f"match of {CHAIN_PAGES} pages alone, us", ours=latency_us)]


def _stored_chains(cache: emberkv.KVCache, count: int) -> list[list[bytes]]:
    tokens = CHAIN_PAGES * cache.namespace.page_tokens
    chains = [cache.keys(range(at * tokens, (at + 1) * tokens)) for at in range(count)]
    payloads = [bytes([page]) * PAGE_BYTES for page in range(CHAIN_PAGES)]
    for chain in chains:
        verify(set(cache.put(chain, payloads)) == {"stored"}, "ours: a page was refused")
    cache.flush()
    return chains


def _request(chains: list[list[bytes]], rng: random.Random) -> tuple[list[list[bytes]], list[int]]:
    """64 chains of 128 keys, and how many of each are there: anything from none to all, as likely as the other."""
    lengths = [rng.randint(0, CHAIN_PAGES) for _ in range(PER_REQUEST)]
    asked = []
    for length in lengths:
        unknown = [rng.randbytes(32) for _ in range(CHAIN_PAGES - length)]
        asked.append(rng.choice(chains)[:length] + unknown)
    return asked, lengths


def _matching(cache: emberkv.KVCache, requests: list[tuple[list[list[bytes]], list[int]]], count: int) -> Subject:
    def work(check: bool) -> float:
        for at in range(count):
            asked, lengths = requests[at % len(requests)]
            hits = cache.match_many(asked, lease_s=LEASE_S)
            verify([hit.pages for hit in hits] == lengths, "ours: a hit is of another length")
        return float(count * PER_REQUEST)

    return work


def _single_us(cache: emberkv.KVCache, chains: list[list[bytes]], rng: random.Random) -> float:
    spent = []
    for _ in range(SINGLES):
        chain = rng.choice(chains)
        begin_s = time.perf_counter()
        hit = cache.match(chain, lease_s=LEASE_S)
        spent.append(time.perf_counter() - begin_s)
        verify(hit.pages == CHAIN_PAGES, "ours: a page is missing")
    return statistics.median(spent) * 1e6
