"""What an operator does to a store: check it, read all of it back, back its names up, ask what it is.

Works on an open embedded store, whoever owns it: what is asked for, and the answer, travel as JSON.

Does not know: the command line, and how the owner is reached.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from .engine.allocator import TRIM_BYTES
from .engine.scrub import Finding as Damage
from .engine.scrub import ScrubReport, check, scrub
from .errors import LimitExceeded
from .kv.types import KV
from .meta.check import Finding
from .meta.dump import dump
from .meta.keys import entry_name, get_inode, unpack_id
from .meta.scan import pages
from .room import room_per_target
from .types import ROOT_INODE

if TYPE_CHECKING:
    from .embedded import EmbeddedStore, Services

T = TypeVar("T")


class FsckReport(msgspec.Struct):
    """What `fsck` found; nothing: all is well."""

    findings: list[Finding] = []

    @property
    def clean(self) -> bool:
        """No finding is left unrepaired."""
        return all(finding.repaired for finding in self.findings)


class NodeScrub(msgspec.Struct):
    """What one storage node of a cluster read and found."""

    node: str
    chunks: int = 0
    read_bytes: int = 0
    damaged: int = 0
    repaired: int = 0
    skipped: list[str] = []
    """What could not be looked at, and why, in words."""


class ScrubSummary(msgspec.Struct):
    """What `scrub` read and found."""

    chunks: int = 0
    read_bytes: int = 0
    findings: list[Finding] = []
    nodes: list[NodeScrub] = []
    """Of a cluster."""

    @property
    def clean(self) -> bool:
        """All was looked at, and nothing is left damaged."""
        return all(finding.repaired for finding in self.findings) and not any(node.skipped for node in self.nodes)


Progress = Callable[[int, int], object]
"""Called with the chunks and the bytes that have been read."""


class Maintenance:
    """Upkeep of one open store. Get it from `Client.maintenance`. It is done by whoever owns the store."""

    def __init__(self, store: EmbeddedStore) -> None:
        self._store = store

    def fsck(self, *, repair: bool = False) -> FsckReport:
        """Check names against inodes, inodes against chunks, and blocks against the index. Run it when nobody writes.

        `repair` mends what loses no byte: see `meta.check`; leaked blocks are freed.
        """
        return self._ask(FsckReport, "fsck", {"repair": repair})

    def scrub(self, *, bytes_per_s_max: int | None = None, progress: Progress | None = None) -> ScrubSummary:
        """Read every byte back from the medium and verify it; `progress(chunks, bytes)` is called on the way.

        If the store is shared, `progress` is called at the end only.
        """
        calls = 0

        def count(chunks: int, read_bytes: int) -> None:
            nonlocal calls
            calls += 1
            if progress is not None:
                progress(chunks, read_bytes)

        summary = self._ask(ScrubSummary, "scrub", {"bytes_per_s_max": bytes_per_s_max}, count)
        if progress is not None and not calls:
            progress(summary.chunks, summary.read_bytes)
        return summary

    def dump(self, write_line: Callable[[str], object]) -> None:
        """Back the metadata up: versioned JSONL, a line per call. Chunks are not in it."""
        spooled = self._store.portal.run(self._dump(write_line))
        if spooled is not None:
            try:
                with spooled.open(encoding="utf-8") as lines:
                    for line in lines:
                        write_line(line.rstrip("\n"))
            finally:
                spooled.unlink()

    async def _dump(self, write_line: Callable[[str], object]) -> Path | None:
        """Hand out the lines, or (from a server) a file with them."""
        services = self._store.services
        if services is None:
            return await self._store.spooled_dump()
        await dump(services.meta_kv, write_line)
        return None

    def info(self) -> dict[str, Any]:
        """What the store is: ids, formats, shape, sizes."""
        facts = self._ask(dict[str, Any], "info", {})
        for target in facts["targets"]:
            target["blocks"] = {int(size): count for size, count in target["blocks"].items()}  # JSON keys are text.
        return facts

    def trim(self) -> int:
        """Give the space of free blocks back to the file system; returns the bytes."""
        return self._ask(int, "trim", {})

    def _ask(self, kind: type[T], what: str, arguments: dict[str, Any], progress: Progress | None = None) -> T:
        return msgspec.json.decode(self._store.portal.run(self._store.maintain(what, arguments, progress)), type=kind)


async def run_order(
    services: Services, what: str, arguments: dict[str, Any], *, progress: Progress | None = None
) -> str:
    """Do what `Maintenance` has a method for; the result as JSON. Raises LimitExceeded for what there is not."""
    order = _ORDERS.get(what)
    if order is None:
        raise LimitExceeded(f"the owner of the store, an older emberline, does not know how to {what}")
    if progress is not None:
        arguments = {**arguments, "progress": progress}
    return msgspec.json.encode(await order(services, **arguments)).decode()


async def _fsck(services: Services, *, repair: bool) -> FsckReport:
    findings = await services.meta_service.check(repair=repair)
    for number, engine in services.engines.items():
        report = await check(engine, repair=repair)
        for found in report.findings:
            where = f"target-{number}" + (f" chunk {found.chunk}" if found.chunk else "")
            findings.append(Finding(found.kind, where, found.message, found.repaired))
    return FsckReport(findings)


async def _scrub(services: Services, *, bytes_per_s_max: int | None, progress: Progress | None = None) -> ScrubSummary:
    summary = ScrubSummary()
    damaged: list[Damage] = []
    for engine in services.engines.values():
        report: ScrubReport = await scrub(
            engine, runtime=services.runtime, bytes_per_s_max=bytes_per_s_max, progress=progress
        )
        summary.chunks += report.chunks
        summary.read_bytes += report.read_bytes
        damaged += report.findings
    inodes = [int(found.chunk.partition(".")[0], 16) for found in damaged]
    paths = await paths_of(services.meta_kv, inodes)
    summary.findings = [
        Finding(found.kind, paths[inode], found.message, False) for found, inode in zip(damaged, inodes, strict=True)
    ]
    return summary


async def _info(services: Services) -> dict[str, Any]:
    superblock = services.superblock
    targets = []
    for number, engine in services.engines.items():
        blocks = engine.allocator.used_blocks()
        targets.append(
            {
                "target": number,
                "id": engine.identity.target.hex(),
                "format": engine.identity.format,
                "blocks": {1 << log2: count for log2, count in blocks.items() if count},
                "block_bytes": sum(count << log2 for log2, count in blocks.items()),
                "counters": msgspec.to_builtins(engine.counters),
            }
        )
    return {
        "directory": str(services.directory),
        "owner": os.getpid(),
        "store": superblock.store,
        "format": superblock.format,
        "created_ns": superblock.created_ns,
        "targets": targets,
        "settings": {
            "reserve_bytes": services.config.reserve_bytes,
            "gc_delay_s": services.config.gc_delay_s,
            "trash_s": services.config.trash_s,
        },
    }


async def _space(services: Services) -> dict[str, int]:
    spaces = [engine.space() for engine in services.engines.values()]
    return {
        "used_bytes": sum(space.used_bytes for space in spaces),
        # Nobody says which of them share a disk: if they do not it is more.
        "free_bytes": len(spaces)
        * room_per_target(min(space.free_bytes for space in spaces), [space.idle_bytes for space in spaces]),
    }


async def _trim(services: Services) -> int:
    total = 0
    for engine in services.engines.values():
        while punched := engine.trim(TRIM_BYTES):
            total += punched
            await services.runtime.sleep(0)  # Others have their turn.
    return total


_ORDERS: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {
    "fsck": _fsck,
    "scrub": _scrub,
    "info": _info,
    "space": _space,
    "trim": _trim,
}


async def paths_of(kv: KV, inodes: Collection[int]) -> dict[int, str]:
    """A path to each inode, found by looking at every entry; "inode 1f" where no entry leads to it."""
    found: dict[int, str] = {}
    left = set(inodes)
    if not left:
        return found
    async for page in pages(kv, b"D"):
        for key, entry in page:
            if (inode := unpack_id(entry)) in left:
                left.discard(inode)
                found[inode] = await _path_of(kv, key)
        if not left:
            break
    return found | {inode: f"inode {inode:x}" for inode in left}


async def _path_of(kv: KV, key: bytes) -> str:
    """The path of an entry, as far up as directories know their names."""
    names, parent = [entry_name(key).decode()], unpack_id(key, 1)
    while parent != ROOT_INODE and (row := await get_inode(kv.begin(), parent)) is not None and row.name:
        names.append(row.name)
        parent = row.parent
    return "/" + "/".join(reversed(names))
