"""What an operator does to a store: check it, read all of it back, back its names up, ask what it is.

Works on an embedded store of this process, while it is open. Does not know: the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from .engine.scrub import ScrubReport, check, scrub
from .kv.types import KV
from .meta.check import Finding
from .meta.dump import dump
from .meta.keys import entry_name, get_inode, unpack_id
from .meta.scan import pages
from .types import ROOT_INODE

if TYPE_CHECKING:
    from .embedded import EmbeddedStore


class FsckReport(msgspec.Struct):
    """What `fsck` found; nothing: all is well."""

    findings: list[Finding] = []

    @property
    def clean(self) -> bool:
        """No finding is left unrepaired."""
        return all(finding.repaired for finding in self.findings)


class ScrubSummary(msgspec.Struct):
    """What `scrub` read and found."""

    chunks: int = 0
    read_bytes: int = 0
    findings: list[Finding] = []

    @property
    def clean(self) -> bool:
        """Nothing is damaged."""
        return not self.findings


class Maintenance:
    """Upkeep of one open store. Get it from `Client.maintenance`."""

    def __init__(self, store: EmbeddedStore) -> None:
        self._store = store

    def fsck(self, *, repair: bool = False) -> FsckReport:
        """Check names against inodes, inodes against chunks, and blocks against the index. Run it when nobody writes.

        `repair` mends what loses no byte: see `meta.check`; leaked blocks are freed.
        """
        return self._store.portal.run(self._fsck(repair))

    async def _fsck(self, repair: bool) -> FsckReport:
        findings = await self._store.meta_service.check(repair=repair)
        for number, engine in self._store.engines.items():
            report = await check(engine, repair=repair)
            for found in report.findings:
                where = f"target-{number}" + (f" chunk {found.chunk}" if found.chunk else "")
                findings.append(Finding(found.kind, where, found.message, found.repaired))
        return FsckReport(findings)

    def scrub(
        self, *, bytes_per_s_max: int | None = None, progress: Callable[[int, int], object] | None = None
    ) -> ScrubSummary:
        """Read every byte back from the medium and verify it; `progress(chunks, bytes)` is called on the way."""
        return self._store.portal.run(self._scrub(bytes_per_s_max, progress))

    async def _scrub(self, bytes_per_s_max: int | None, progress: Callable[[int, int], object] | None) -> ScrubSummary:

        summary = ScrubSummary()
        for engine in self._store.engines.values():
            report: ScrubReport = await scrub(
                engine, runtime=self._store.runtime, bytes_per_s_max=bytes_per_s_max, progress=progress
            )
            summary.chunks += report.chunks
            summary.read_bytes += report.read_bytes
            for found in report.findings:
                summary.findings.append(Finding(found.kind, await self._file_of(found.chunk), found.message, False))
        return summary

    async def _file_of(self, chunk: str) -> str:
        """The chunk as a path, when an entry leads to its file; else by its number."""
        inode = int(chunk.partition(".")[0], 16)
        return await _path_of(self._store.meta_kv, inode) or f"inode {inode:x}"

    def dump(self, write_line: Callable[[str], object]) -> None:
        """Back the metadata up: versioned JSONL, a line per call. Chunks are not in it."""
        self._store.portal.run(dump(self._store.meta_kv, write_line))

    def info(self) -> dict[str, Any]:
        """What the store is: ids, formats, shape, sizes."""
        superblock = self._store.superblock
        targets = []
        for number, engine in self._store.engines.items():
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
            "directory": str(self._store.directory),
            "store": superblock.store,
            "format": superblock.format,
            "created_ns": superblock.created_ns,
            "targets": targets,
            "settings": {
                "reserve_bytes": self._store.config.reserve_bytes,
                "gc_delay_s": self._store.config.gc_delay_s,
                "trash_s": self._store.config.trash_s,
            },
        }

    def space(self) -> dict[str, int]:
        """Bytes: `used_bytes` in blocks that hold chunks, `free_bytes` the file system has left above the reserve."""
        info = self.info()
        free = self._store.free_bytes() - self._store.config.reserve_bytes
        return {"used_bytes": sum(target["block_bytes"] for target in info["targets"]), "free_bytes": max(free, 0)}

    def trim(self) -> int:
        """Give wholly free block groups back to the file system; returns the bytes."""
        return self._store.portal.run(self._trim())

    async def _trim(self) -> int:
        return sum(engine.trim() for engine in self._store.engines.values())


async def _path_of(kv: KV, inode: int) -> str | None:
    """A path to an inode, found by looking at every entry."""
    async for page in pages(kv, b"D"):
        for key, entry in page:
            if unpack_id(entry) == inode:
                names, parent = [entry_name(key).decode()], unpack_id(key, 1)
                while parent != ROOT_INODE and (row := await get_inode(kv.begin(), parent)) is not None and row.name:
                    names.append(row.name)
                    parent = row.parent
                return "/" + "/".join(reversed(names))
    return None
