"""Which rows there are, and how much work is in each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..corpus import make_corpus
from ..runner import Row
from . import crowd, gets, matches, puts, restart, space, table, traces
from .serving import serving

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much work there is."""

    data_bytes: int
    """Of pages of each size that is read."""
    page_sizes: tuple[int, ...]
    """Of those."""
    pass_bytes: int
    """Read or written in one pass, at least one batch."""
    rounds: int
    crowd_bytes: int
    """Read by each of the clients of a crowd in a round."""
    chains: int
    """Of 128 pages each, that are looked up."""
    match_requests: int
    """A pass."""
    disk_page_sizes: tuple[int, ...]
    """Of pages whose place on disk is looked at."""
    space_bytes: int
    """Of those of each size, at least 4 of them."""
    churn_capacity_bytes: int
    """Of a service that is as full as it gets, so that pages are evicted for those that are put."""
    churn_s: float
    """So long at most, or until the capacity has been put once more."""
    table_pages: tuple[int, ...]
    """Of an index without pages."""
    restart_pages: int
    restarts: int
    """In each of two ways."""
    has_goals: bool


FULL = Size(
    data_bytes=GIB,
    page_sizes=(56 * KIB, 256 * KIB, MIB, 4 * MIB),
    pass_bytes=256 * MIB,
    rounds=7,
    crowd_bytes=128 * MIB,
    chains=512,
    match_requests=200,
    # What 64 and 512 tokens take of a model of today, and of one with 70,272 bytes a token.
    disk_page_sizes=(56 * KIB, 445 * KIB, 64 * 70_272, 512 * 70_272),
    space_bytes=GIB,
    churn_capacity_bytes=2 * GIB,
    churn_s=60.0,
    table_pages=(1_000_000, 10_000_000),
    restart_pages=1_000_000,
    restarts=3,
    has_goals=True,
)
QUICK = Size(
    data_bytes=64 * MIB,
    page_sizes=(56 * KIB, MIB),
    pass_bytes=32 * MIB,
    rounds=1,
    crowd_bytes=8 * MIB,
    chains=64,
    match_requests=20,
    disk_page_sizes=(56 * KIB,),
    space_bytes=8 * MIB,
    churn_capacity_bytes=64 * MIB,
    churn_s=2.0,
    table_pages=(100_000,),
    restart_pages=10_000,
    restarts=1,
    has_goals=False,
)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    corpus = make_corpus(directory / "raw", size_bytes=size.data_bytes)
    rows: list[Row] = []
    capacity = 4 * GIB + 4 * size.data_bytes + 8 * (size.rounds + 1) * size.pass_bytes
    with serving(directory / "store", capacity_bytes=capacity) as served:
        for page_bytes in size.page_sizes:
            rows += gets.get_rows(directory, served, corpus, size, page_bytes)
        rows += crowd.crowd_rows(directory, served, corpus, size)
        rows += puts.put_rows(directory, served, size)
        rows += matches.match_rows(served, size)
    for page_bytes in size.disk_page_sizes:
        # A store takes space ahead: each size has one of its own, or it would live on what another one took.
        with serving(directory / "space", capacity_bytes=4 * GIB + 2 * size.space_bytes) as served:
            rows.append(space.disk_row(served, size, page_bytes))
    with serving(directory / "full", capacity_bytes=size.churn_capacity_bytes) as served:
        rows += restart.restart_rows(served, size)  # While there is no other namespace.
        rows += space.churn_rows(served, size)
    for pages in size.table_pages:
        rows += table.table_rows(pages)
    return [*rows, *traces.trace_rows()]
