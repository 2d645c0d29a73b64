"""Pages of a tenant out of a cache into an archive, and back.

Out: parents come before what hangs on them, so that whoever reads the archive can put each page as it comes. In: the
same put again stores nothing twice, so an import that was cut off is simply done again.

Does not know: files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from .archive import Archive, ArchivedPage, ArchiveReader
from .client import KVCache
from .hit import Hit
from .keys import ROOT
from .page import NO_PLACE
from .runs import RunReader, chosen

LEASE_S = 60.0
BATCH_PAGES = 1024
BATCH_BYTES = 32 << 20
"""So much is put at a time."""

Advance = Callable[[int], None]
"""Is told the bytes that went."""


def all_pages(cache: KVCache) -> list[tuple[bytes, bytes]]:
    """(key, parent) of every page of the tenant, each after its parent, chains together."""
    below: dict[bytes, list[bytes]] = {}
    after = 0
    while True:
        listing = cache.browse(after, count=8192)
        for key, parent in zip(listing.hit.keys, listing.parents, strict=True):
            below.setdefault(parent, []).append(key)
        after = listing.next
        if not after:
            break
    # What hangs on a page that went meanwhile is not reached, and nobody would find it anyway.
    ordered, stack = [], [(key, ROOT) for key in reversed(below.get(ROOT, ()))]
    while stack:
        key, parent = stack.pop()
        ordered.append((key, parent))
        stack += [(each, key) for each in reversed(below.get(key, ()))]
    return ordered


def prefix_pages(cache: KVCache, keys: Sequence[bytes], parent: bytes = ROOT) -> list[tuple[bytes, bytes]]:
    """(key, parent) of the pages of a chain that are there."""
    there = cache.match(keys, lease_s=0).keys
    return list(zip(there, [parent, *there], strict=False))


def export_pages(
    cache: KVCache, archive: Archive, pages: Sequence[tuple[bytes, bytes]], *,
    done: Collection[tuple[bytes, int]] = (), advance: Advance = lambda _: None,
) -> int:  # fmt: skip
    """Copy pages into an archive, but those (key, kind) that are `done`. How many payloads could not be had."""
    reader, missing = RunReader(cache), 0
    for begin in range(0, len(pages), BATCH_PAGES):
        batch = pages[begin : begin + BATCH_PAGES]
        for number, kind in enumerate(cache.namespace.kinds):
            wanted = [each for each in batch if (each[0], number) not in done]
            found = cache.lookup([key for key, _ in wanted], kind=kind.name, lease_s=LEASE_S) if wanted else []
            # That a kind is not there says something only of the first, which every page has.
            missing += sum(each is None for each in found) if number == 0 else 0
            hits = [each for each in found if each is not None]
            parents = dict(wanted)
            hit = chosen(_joined(hits, len(cache.namespace.kinds)), number, [True] * len(hits))
            for run in reader.read(hit, number):
                keys = hit.keys_of(run.first, len(run.payloads))
                for key, payload, is_good in zip(keys, run.payloads, run.are_good, strict=True):
                    if is_good:
                        archive.add(key, parents[key], number, payload)
                        advance(len(payload))
                    else:
                        missing += 1
            cache.release(*hits[:1])
    return missing


def _joined(hits: Sequence[Hit], kinds: int) -> Hit:
    """Hits of one page each, which have one lease, as one."""
    if not hits:
        return Hit(0, 0, "whole", 0, b"", (b"",) * kinds, 0)
    places = tuple(b"".join(hit.places[kind] or NO_PLACE for hit in hits) for kind in range(kinds))
    chain = b"".join(hit.chain for hit in hits)
    return Hit(len(hits), 0, "whole", hits[0].lease, chain, places, hits[0].tenant)


def import_pages(cache: KVCache, archive: ArchiveReader, *, advance: Advance = lambda _: None) -> Counter[str]:
    """Put the pages of an archive; by what became of them. It is all there, durably, when this returns."""
    outcomes: Counter[str] = Counter()
    for batch in _batches(archive.pages()):
        for run in stretches(batch):
            keys, payloads = [each.key for each in run], [each.payload for each in run]
            kind, is_chain = cache.namespace.kinds[run[0].kind].name, len(run) < 2 or run[1].parent == run[0].key
            outcomes.update(cache.put(keys, payloads, parent=run[0].parent, kind=kind, chained=is_chain))
        advance(sum(len(each.payload) for each in batch))
    cache.flush()
    return outcomes


def _batches(pages: Iterable[ArchivedPage]) -> Iterator[list[ArchivedPage]]:
    batch: list[ArchivedPage] = []
    size = 0
    for page in pages:
        batch.append(page)
        size += len(page.payload)
        if size >= BATCH_BYTES or len(batch) >= BATCH_PAGES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def stretches(batch: Sequence[ArchivedPage]) -> Iterator[list[ArchivedPage]]:
    """As few as can be of one kind each, in which each page hangs on the one before, or all hang on nothing."""
    stretch: list[ArchivedPage] = []
    for page in batch:
        if stretch and not _goes_on(stretch, page):
            yield stretch
            stretch = []
        stretch.append(page)
    if stretch:
        yield stretch


def _goes_on(stretch: Sequence[ArchivedPage], page: ArchivedPage) -> bool:
    first, second = stretch[0], stretch[1] if len(stretch) > 1 else page
    if page.kind != first.kind:
        return False
    if page.parent == stretch[-1].key:
        return second.parent == first.key
    return page.parent == second.parent == first.parent == ROOT
