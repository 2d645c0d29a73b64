"""Read every page of a tenant, or a sample, and tell which ones are not what they should be.

It reads as any reader does: header, key, place and checksum are compared, and what is damaged is reported to the
service, which looks for itself and takes it out. So a second run finds it no more.

Does not know: which namespaces and tenants there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .client import KVCache
from .runs import RunReader, chosen

LEASE_S = 60.0
LOOKS_MAX = 3


@dataclass(slots=True)
class Verified:
    """What was found."""

    pages: int = 0
    """Payloads that were read, good or not; a page of two kinds is two."""
    read_bytes: int = 0
    gone: int = 0
    """They went while we read: evicted, expired or removed."""
    unread: int = 0
    """The service has them and we could not read them: does this machine reach the store?"""
    damaged: list[tuple[bytes, str]] = field(default_factory=list)
    """(key, kind). They are taken out by now."""


def verify(
    cache: KVCache, *, takes: Callable[[], bool] = lambda: True, advance: Callable[[int], None] = lambda _: None
) -> Verified:
    """Read the pages that `takes` says, in turn; `advance` is told the bytes. Raises Unavailable, DeadlineExceeded."""
    found, reader, after = Verified(), RunReader(cache, reports=False), 0
    while True:
        listing = cache.browse(after, lease_s=LEASE_S)
        taken = [takes() for _ in range(listing.hit.pages)]
        for number, kind in enumerate(cache.namespace.kinds):
            hit = chosen(listing.hit, number, taken)
            for run in reader.read(hit, number):
                size = sum(map(len, run.payloads))
                found.pages += len(run.payloads)
                found.read_bytes += size
                keys = hit.keys_of(run.first, len(run.payloads))
                _tell(cache, found, kind.name, [key for key, good in zip(keys, run.are_good, strict=True) if not good])
                advance(size)
        cache.release(listing.hit)
        after = listing.next
        if not after:
            return found


def _tell(cache: KVCache, found: Verified, kind: str, bad: list[bytes]) -> None:
    """Add what became of pages that could not be read, once the service has looked at them."""
    for _ in range(LOOKS_MAX):
        # It looks for one reader at a time, and does nothing for a second one.
        if not bad:
            return
        cache.report(bad, kind=kind)
        left = []
        for key, hit in zip(bad, cache.match_many([[key] for key in bad], lease_s=0), strict=True):
            if hit.reason == "whole":
                left.append(key)
            elif hit.reason in ("damaged", "no state") or hit.reason.startswith("kind "):
                found.damaged.append((key, kind))
            else:
                found.gone += 1
        bad = left
    found.unread += len(bad)
