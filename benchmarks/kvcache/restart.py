"""How long nobody is served when the service ends and the next one reads its index: killed, and told to stop."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import emberkv

from ..runner import Row, verify
from .serving import Serving

if TYPE_CHECKING:
    from .rows import Size

GOAL_S = 5.0
CHAIN_PAGES = 1000
PAGE_BYTES = 64
"""Nobody reads them: small ones are put sooner."""
STANDBY_S = 2.0
"""A standby has started by then."""
TOGETHER = 64
"""Chains that are looked up in one request."""


def restart_rows(serving: Serving, size: Size) -> list[Row]:
    """From the end of a service to the first hit at the next one. Every page is there then."""
    with serving.connect(0) as cache:
        chains = _stored(cache, size.restart_pages)
    rows = []
    for title, kills, is_ready in (
        ("kill -9 to a hit at the next service", True, False),
        ("kill -9 to a hit at a standby", True, True),
        ("SIGTERM to a hit at the next service", False, False),
    ):
        spent_s = [_restart_s(serving, chains, kills=kills, is_ready=is_ready) for _ in range(size.restarts)]
        row = f"{title}, {size.restart_pages:,} pages, s"
        goal = GOAL_S if size.has_goals else None
        rows.append(Row(row=row, ours=statistics.median(spent_s), goal=goal, at_most=True))
    return rows


def _stored(cache: emberkv.KVCache, count: int) -> list[list[bytes]]:
    tokens = CHAIN_PAGES * cache.namespace.page_tokens
    payloads = [bytes([page % 251]) * PAGE_BYTES for page in range(CHAIN_PAGES)]
    chains = []
    for at in range(count // CHAIN_PAGES):
        chains.append(cache.keys(range(at * tokens, (at + 1) * tokens)))
        verify(set(cache.put(chains[-1], payloads)) == {"stored"}, "ours: a page was refused")
    cache.flush()
    return chains


def _restart_s(serving: Serving, chains: list[list[bytes]], *, kills: bool, is_ready: bool) -> float:
    standby = serving.start_standby() if is_ready else None
    if standby is not None:
        time.sleep(STANDBY_S)
    begin_s = time.perf_counter()
    serving.end_service(kills=kills)
    serving.serve_by(standby or serving.start_standby())
    with serving.connect(0) as cache:
        hit = cache.match(chains[-1])
        spent_s = time.perf_counter() - begin_s
        verify(hit.pages == CHAIN_PAGES, "ours: the last chain was lost")
        for at in range(0, len(chains), TOGETHER):
            hits = cache.match_many(chains[at : at + TOGETHER], lease_s=0.0)
            verify(all(hit.pages == CHAIN_PAGES for hit in hits), "ours: a page was lost")
    return spent_s
