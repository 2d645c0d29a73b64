"""Upkeep of a cluster, asked for by an operator: what `emberfs.maintenance` is for an embedded store.

Everything goes page by page, from here: no server has to remember that it was asked, and who stops just stops. Takes
the credentials of an admin; AccessDenied without.

Does not know: the command line.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, BinaryIO, TypeVar, cast

import msgspec

from ..errors import StaleRouting, StoreClosed, Unavailable, UpdateUnknown
from ..maintenance import FsckReport, NodeScrub, Progress, ScrubSummary, paths_of
from ..manager.tables import read_tables
from ..messages import ChunksScrubbed, ScrubChunks
from ..meta.check import Finding
from ..meta.chunks import ClientChunkOps
from ..meta.livedump import dump_live
from ..routing import Role, TargetState
from ..types import split_chunk_id
from ..waiting import all_of
from .fsck import fsck
from .rows import ClusterRows
from .store import ClusterStore, EveryChain

T = TypeVar("T")

PAGE_BYTES = 32 << 20
PATIENCE_S = 30.0
"""For so long a server that does not answer, or a replica that does not serve, is asked again."""
RETRY_S = 0.5


class ClusterMaintenance:
    """Upkeep of one cluster. Blocking; several threads may not share it."""

    def __init__(self, store: ClusterStore) -> None:
        self._store = store
        self._rows = ClusterRows(store.meta, store.runtime)

    def disk_used_bytes(self) -> int:
        """Of all disks together."""
        return self._store.portal.run(self._store.space())["disk_used_bytes"]

    # --- fsck ------------------------------------------------------------------------------------------------------

    def fsck(self, *, say: Callable[[str], object] = lambda _: None) -> FsckReport:
        """Check names against inodes, and inodes against chunks, while all are in use. Mends nothing."""
        chunks = ClientChunkOps(EveryChain(self._store.routes, self._store.storage))
        return FsckReport(self._run(fsck(self._rows, chunks, self._store.runtime, say=say)))

    # --- dump ------------------------------------------------------------------------------------------------------

    def dump(self, write_line: Callable[[str], object]) -> list[str]:
        """Back the metadata up, while it is in use: versioned JSONL, a line per call. Chunks are not in it.

        Returns the ids, in the trash of the dump, of what no name leads to: damage, which `fsck` tells more about.
        """
        return self._run(self._dump(write_line))

    async def _dump(self, write_line: Callable[[str], object]) -> list[str]:
        tables = msgspec.Raw(msgspec.json.encode(await read_tables(self._rows)))
        now_ns = self._store.runtime.wall_ns()
        return await dump_live(self._rows, write_line, open_spool=_spool, now_ns=now_ns, cluster=tables)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """As the portal does, for what takes long and changes nothing: an interrupt ends it at once."""
        running = asyncio.run_coroutine_threadsafe(work, self._store.runtime.loop)
        try:
            return running.result()
        except BaseException:
            running.cancel()
            raise

    # --- scrub -----------------------------------------------------------------------------------------------------

    def scrub(
        self,
        *,
        bytes_per_s_max: int | None = None,
        progress: Progress | None = None,
        on_node: Callable[[NodeScrub], object] | None = None,
    ) -> ScrubSummary:
        """Let every storage node read all of its chunks back from its disk, and mend what is damaged.

        `progress(chunks, bytes)` is called on the way, `on_node` when a node is through. `bytes_per_s_max`: of a node.
        """
        page_bytes = min(PAGE_BYTES, bytes_per_s_max or PAGE_BYTES)
        walks = self._walks(page_bytes)
        summary = ScrubSummary(nodes=[walk.scrub for walk in walks])
        left = walks
        while left:
            began_s, before = time.monotonic(), [walk.scrub.read_bytes for walk in left]
            self._store.portal.run(self._page_of_each([walk for walk in left if walk.targets]))
            summary.chunks = sum(node.chunks for node in summary.nodes)
            summary.read_bytes = sum(node.read_bytes for node in summary.nodes)
            if progress is not None:
                progress(summary.chunks, summary.read_bytes)
            for walk in left:
                if not walk.targets and on_node is not None:
                    on_node(walk.scrub)
            if bytes_per_s_max is not None:
                read_bytes = max(walk.scrub.read_bytes - was for walk, was in zip(left, before, strict=True))
                time.sleep(max(began_s + read_bytes / bytes_per_s_max - time.monotonic(), 0.0))
            left = [walk for walk in left if walk.targets]
        summary.findings = self._store.portal.run(self._named([found for walk in walks for found in walk.found]))
        return summary

    def _walks(self, page_bytes: int) -> list[_Walk]:
        routing = self._store.routes.routing
        serving = {
            each.target: chain.id
            for chain in routing.chains
            for each in chain.targets
            if each.state == TargetState.SERVING
        }
        walks = []
        for node in routing.nodes:
            if node.role != Role.STORAGE:
                continue
            walk = _Walk(self._store, node.name, node.address, page_bytes)
            for target in (each for each in routing.targets if each.node == node.name):
                if target.id in serving:
                    walk.targets.append((target.chain, target.id))
                else:
                    walk.skip(target.chain, "it does not serve: it is brought up to date first")
            if walk.targets or walk.scrub.skipped:
                walks.append(walk)
        return walks

    async def _page_of_each(self, walks: Sequence[_Walk]) -> None:
        for outcome in await all_of(self._store.runtime, [walk.page() for walk in walks], "scrub-page"):
            if isinstance(outcome, Exception):
                raise outcome

    async def _named(self, found: Sequence[tuple[str, int, bytes, str, bool]]) -> list[Finding]:
        """(node, chain, chunk, detail, repaired) as findings that name files."""
        inodes = [split_chunk_id(chunk)[0] for _, _, chunk, _, _ in found]
        paths = await paths_of(self._rows, inodes)
        return [
            Finding("data", paths[inode], f"{node}, chain {chain}: {detail}", repaired)
            for (node, chain, _, detail, repaired), inode in zip(found, inodes, strict=True)
        ]


class _Walk:
    """The way through the targets of one node."""

    def __init__(self, store: ClusterStore, node: str, address: str, page_bytes: int) -> None:
        self.scrub = NodeScrub(node, skipped=[])
        self.targets: deque[tuple[int, bytes]] = deque()
        """(chain, target) that are left; the first one is under way."""
        self.found: list[tuple[str, int, bytes, str, bool]] = []
        self._store = store
        self._address = address
        self._page_bytes = page_bytes
        self._after = b""
        self._give_up_s: float | None = None

    def skip(self, chain: int, reason: str) -> None:
        self.scrub.skipped.append(f"chain {chain}: {reason}")

    async def page(self) -> None:
        """Ask for one page more."""
        chain, target = self.targets[0]
        request = ScrubChunks(chain, target, self._after, self._page_bytes)
        try:
            reply = await self._store.network.connection(self._address).call(request)
        except (Unavailable, UpdateUnknown, StoreClosed) as error:
            if await self._is_hopeless():
                for left, _ in self.targets:
                    self.skip(left, f"the server does not answer: {error}")
                self.targets.clear()
            return
        except StaleRouting as error:
            if await self._is_hopeless():
                self.skip(chain, str(error))
                self._next()
            return
        assert isinstance(reply, ChunksScrubbed)
        self._give_up_s = None
        self._note(chain, reply)
        if reply.after is None:
            self._next()
        else:
            self._after = reply.after

    async def _is_hopeless(self) -> bool:
        """Wait a moment; True when that was done for long enough."""
        now_s = self._store.runtime.now_s()
        if self._give_up_s is None:
            self._give_up_s = now_s + PATIENCE_S
        if now_s >= self._give_up_s:
            self._give_up_s = None
            return True
        await self._store.runtime.sleep(RETRY_S)
        return False

    def _next(self) -> None:
        self.targets.popleft()
        self._after = b""

    def _note(self, chain: int, reply: ChunksScrubbed) -> None:
        self.scrub.chunks += reply.chunks
        self.scrub.read_bytes += reply.read_bytes
        self.scrub.damaged += len(reply.damaged)
        self.scrub.repaired += sum(each.repaired for each in reply.damaged)
        self.found += [(self.scrub.node, chain, each.chunk, each.detail, each.repaired) for each in reply.damaged]


def _spool() -> BinaryIO:
    return cast("BinaryIO", tempfile.TemporaryFile())
