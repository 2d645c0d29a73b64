"""What the parts of the metadata service share: the seams, the configuration, and the little they keep in memory.

Everything in memory here is a cache or a hint: a service started on the same KV goes on without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import msgspec

from ..errors import Conflict, LimitExceeded
from ..kv.types import KV, Transaction, decode_int
from ..locks import KeyedLocks
from ..runtime import Runtime
from ..types import CHUNK_SIZE_BYTES_DEFAULT, CHUNK_SIZE_BYTES_MAX, CHUNK_SIZE_BYTES_MIN, Chunks, Inode
from .cache import StatCache
from .chunks import ChunkOps
from .ids import InodeIds
from .keys import mtime_key

T = TypeVar("T")
NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaConfig:
    """Settings of the metadata service."""

    gc_delay_s: float = 300.0
    """Seconds that the chunks of a file stay after its last name went: readers of it may go on for that long."""
    gc_interval_s: float = 60.0
    """Seconds between two looks at the garbage and the trash."""
    trash_s: float = 7 * 86400.0
    """Seconds that something stays in the trash."""
    chain_count: int = 1
    """Chains, ids 1..chain_count, that new files are dealt over."""
    stripe: int = 1
    """How many of them one file uses."""
    id_batch: int = 4096
    """Inode ids leased at a time."""

    def __post_init__(self) -> None:
        if min(self.gc_delay_s, self.trash_s) < 0 or self.gc_interval_s <= 0:
            raise LimitExceeded("gc_delay_s and trash_s must be at least 0, gc_interval_s more than 0")
        if not 1 <= self.stripe <= self.chain_count:
            raise LimitExceeded(f"stripe {self.stripe} must be in 1..chain_count ({self.chain_count})")
        if self.id_batch < 1:
            raise LimitExceeded("id_batch must be at least 1")


@dataclass(slots=True)
class Hint:
    """How far a file reaches by reports that are not in its row yet."""

    truncate_generation: int
    end: int
    mtime_ns: int


class Promotion(NamedTuple):
    """A grant to move an inline file to chunks."""

    session: bytes
    layout: Chunks


class MetaState:
    """Shared by the handlers of one `MetaService`."""

    def __init__(self, kv: KV, runtime: Runtime, chunks: ChunkOps, config: MetaConfig) -> None:
        self.kv = kv
        self.runtime = runtime
        self.chunks = chunks
        self.config = config
        self.ids = InodeIds(kv, runtime, batch=config.id_batch)
        self.turns = KeyedLocks(runtime)
        self.stats = StatCache(kv)
        self.hints: dict[int, Hint] = {}
        """Inode -> length hint. Has entries of files with an open session only."""
        self.reserved: set[int] = set()
        """Inodes that a `put` is writing chunks for."""
        self.promoting: dict[int, Promotion] = {}
        """Inline files that one writer is moving to chunks: nobody else may write chunks under that id meanwhile."""
        self.settling: set[int] = set()
        """Files whose hint is being put into their row: a report waits for its own transaction meanwhile."""
        self.stopping = False
        """The service is closing. Background work ends at its next step: chunk storage wants no cancelled callers."""
        self.resting = False
        """The background work sleeps."""
        self.unswept: tuple[int, int] | None = None
        """Ids that a process which died had leased: chunks there without an inode are nobody's."""
        self.sweeper: asyncio.Task[None] | None = None
        """Deletes detached trees, while there are any."""

    async def read(self, work: Callable[[MetaState, Transaction, Any], Awaitable[T]], request: Any) -> T:
        """Run a request that only reads. No commit, and no closure unless it has to be run again."""
        try:
            return await work(self, self.kv.begin(), request)
        except Conflict:
            return await self.kv.run(lambda txn: work(self, txn, request))

    def new_layout(self, chunk_size_bytes: int = CHUNK_SIZE_BYTES_DEFAULT) -> Chunks:
        """A layout for a file that gets chunks. LimitExceeded for a size that is no power of two within the limits."""
        if not CHUNK_SIZE_BYTES_MIN <= chunk_size_bytes <= CHUNK_SIZE_BYTES_MAX or chunk_size_bytes.bit_count() != 1:
            raise LimitExceeded(
                f"chunk size {chunk_size_bytes} is no power of two in {CHUNK_SIZE_BYTES_MIN}..{CHUNK_SIZE_BYTES_MAX}"
            )
        return Chunks(
            chunk_size_bytes=chunk_size_bytes,
            chain_count=self.config.chain_count,
            stripe=self.config.stripe,
            seed=int.from_bytes(self.runtime.random_bytes(4), "big"),
        )

    def hinted(self, inode: Inode) -> Inode:
        """A file's inode with what is only known in memory."""
        hint = self.hints.get(inode.id)
        if hint is None or hint.truncate_generation != inode.truncate_generation or hint.end <= inode.length:
            return inode
        return msgspec.structs.replace(inode, length=hint.end, mtime_ns=max(inode.mtime_ns, hint.mtime_ns))

    async def current(self, txn: Transaction, inode: Inode) -> Inode:
        """The inode as a caller may see it: a file's length by hints, a directory's time by its own row."""
        if not inode.is_dir:
            return self.hinted(inode)
        mtime_ns = decode_int(await txn.get(mtime_key(inode.id), snapshot=True))
        return msgspec.structs.replace(inode, mtime_ns=mtime_ns) if mtime_ns else inode
