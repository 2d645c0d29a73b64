"""What the parts of the metadata service share: the seams, the configuration, and the little they keep in memory.

Everything in memory here is a cache or a hint: a service started on the same KV goes on without it. When several
servers share the KV, what would have to be known to all of them (`hints`, `reserved`, `promoting`) is in rows instead.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import msgspec

from ..errors import Conflict, LimitExceeded, Unavailable
from ..kv.types import KV, Transaction, decode_int
from ..locks import KeyedLocks
from ..runtime import Runtime
from ..settings import Config, Settings
from ..types import CHUNK_SIZE_BYTES_DEFAULT, CHUNK_SIZE_BYTES_MAX, CHUNK_SIZE_BYTES_MIN, Chunks, Inode
from .blocks import BLOCK_IDS, Blocks
from .cache import StatCache
from .chunks import ChunkOps
from .claims import Claims
from .clients import Clients, RequestName
from .ids import InodeIds
from .keys import length_key, mtime_key

T = TypeVar("T")
NANOSECONDS = 1_000_000_000
STRIPE_DEFAULT = 16
"""Chains of a new file in a cluster that has more: enough to keep a reader's network busy, and few enough that removing
or measuring a file, which asks each of its chains, does not ask them all."""
CLIENT_GRACE_MARGIN_S = 2.0
"""For clocks that drift; see `client_grace_s`."""
SETTINGS_WAIT_S = 2.0
"""How long a request waits for a configuration that was not heard of yet."""
SETTINGS_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaConfig:
    """Settings of the metadata service."""

    gc_delay_s: float = Settings().gc_delay_s
    """Seconds that the chunks of a file stay after its last name went: readers of it may go on for that long."""
    gc_interval_s: float = Settings().gc_interval_s
    """Seconds between two looks at the garbage and the trash."""
    trash_s: float = Settings().trash_s
    """Seconds that something stays in the trash."""
    chain_count: int = 1
    """Chains, ids 1..chain_count, that new files are dealt over."""
    stripe: int = 1
    """How many of them one file uses."""
    id_batch: int = 4096
    """Inode ids leased at a time."""
    shared: bool = False
    """Several servers serve the same KV: the cluster. Requests that change something must come as `Once`."""
    has_settings: bool = False
    """Shared: what is said here holds. Else it comes with `configure`, as in a cluster, and before that nothing is
    collected and no change is taken: by the defaults, what a setting should keep would be gone for good."""
    client_grace_s: float = Settings().dead_after_s + CLIENT_GRACE_MARGIN_S
    """Shared: seconds between a client's end and its recovery. By then every storage node refuses its requests: it has
    heard of that, or its lease is over."""
    clients_interval_s: float = 2.0
    """Shared: seconds between two looks for clients that have ended."""

    def __post_init__(self) -> None:
        if min(self.gc_delay_s, self.trash_s) < 0 or self.gc_interval_s <= 0:
            raise LimitExceeded("gc_delay_s and trash_s must be at least 0, gc_interval_s more than 0")
        if not 1 <= self.stripe <= self.chain_count:
            raise LimitExceeded(f"stripe {self.stripe} must be in 1..chain_count ({self.chain_count})")
        if self.id_batch < 1:
            raise LimitExceeded("id_batch must be at least 1")
        if self.shared and self.id_batch < 4 * BLOCK_IDS:
            raise LimitExceeded(f"id_batch of servers that share a KV must be at least {4 * BLOCK_IDS}")
        if self.client_grace_s < 0 or self.clients_interval_s <= 0:
            raise LimitExceeded("client_grace_s must be at least 0, clients_interval_s more than 0")


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


@dataclass(slots=True)
class Background:
    """What the service does unasked."""

    stopping: bool = False
    """The service is closing. Background work ends at its next step: chunk storage wants no cancelled callers."""
    resting: bool = False
    """The background work sleeps."""
    unswept: tuple[int, int] | None = None
    """Ids that a process which died had leased: chunks there without an inode are nobody's."""
    sweeper: asyncio.Task[None] | None = None
    """Deletes detached trees, while there are any."""


class MetaState:
    """Shared by the handlers of one `MetaService`."""

    def __init__(
        self, kv: KV, runtime: Runtime, chunks: ChunkOps, config: MetaConfig, ask_sessions: Callable[[], None]
    ) -> None:
        self.kv = kv
        self.runtime = runtime
        self.chunks = chunks
        self.config = config
        self.ids = InodeIds(kv, runtime, batch=config.id_batch)
        self.shared = config.shared
        self.is_configured = config.has_settings or not config.shared
        """What `config` says is what the cluster goes by."""
        self.chain_count = config.chain_count
        self.stripe = config.stripe
        self.turns = KeyedLocks(runtime)
        self.claims: KeyedLocks | Claims = Claims(kv, runtime) if config.shared else self.turns
        """Turns that servers which share the KV take with each other."""
        self.clients = Clients(kv, runtime, ask_sessions)
        self.blocks = Blocks(kv, runtime, self.ids, self.clients)
        self.background = Background()
        self.name: RequestName | None = None
        """Of the request that this state serves, if it came as `Once`: see `named`."""
        self.is_decided = False
        """That request has happened."""
        self.stats = StatCache(kv)
        self.hints: dict[int, Hint] = {}
        """Inode -> length hint. Has entries of files with an open session only."""
        self.reserved: set[int] = set()
        """Inodes that a `put` is writing chunks for."""
        self.promoting: dict[int, Promotion] = {}
        """Inline files that one writer is moving to chunks: nobody else may write chunks under that id meanwhile."""
        self.settling: set[int] = set()
        """Files whose hint is being put into their row: a report waits for its own transaction meanwhile."""

    def configure(self, config: Config) -> None:
        """What the whole cluster goes by from now on."""
        settings = Settings.of(config.values)
        self.config = replace(
            self.config,
            gc_delay_s=settings.gc_delay_s,
            gc_interval_s=settings.gc_interval_s,
            trash_s=settings.trash_s,
            client_grace_s=config.waits_s + CLIENT_GRACE_MARGIN_S,
        )
        self.is_configured = True

    async def wait_for_settings(self) -> None:
        """Return when they are known; they come with the first answer of a manager. Raises Unavailable."""
        deadline_s = self.runtime.now_s() + SETTINGS_WAIT_S
        while not self.is_configured:
            if self.runtime.now_s() >= deadline_s:
                raise Unavailable("the metadata server has not heard of the cluster's configuration")
            await self.runtime.sleep(SETTINGS_POLL_S)

    def named(self, name: RequestName) -> MetaState:
        """This state, as the handler of one request sees it."""
        view = copy.copy(self)
        view.name = name
        return view

    @property
    def client(self) -> bytes:
        """Whose request this is; empty if the KV is not shared."""
        return b"" if self.name is None else self.name.client

    def decide(self, work: Callable[[Transaction], Awaitable[T]], kind: Any, *, reclaims: bool = False) -> Awaitable[T]:
        """Run the one transaction that makes a request happen, and return its result, which is of type `kind`.

        If the request was decided before (see `clients`) this is the result of then, and nothing is run: what the
        handler does afterwards must bear being done again.
        """
        if self.name is None:
            return self.kv.run(work, reclaims=reclaims)
        return self._decide_once(self.name, work, kind, reclaims)

    async def _decide_once(
        self, name: RequestName, work: Callable[[Transaction], Awaitable[T]], kind: Any, reclaims: bool
    ) -> T:
        result = await self.clients.decide(name, work, kind, reclaims=reclaims)
        self.is_decided = True
        return result

    def step(self, work: Callable[[Transaction], Awaitable[T]], *, reclaims: bool = False) -> Awaitable[T]:
        """Run a transaction of a request that has several and is decided after the last."""
        if self.name is None:
            return self.kv.run(work, reclaims=reclaims)
        return self.clients.step(self.name, work, reclaims=reclaims)

    def chains_changed(self, chains: Sequence[int], stripe: int | None) -> None:
        """There are these chains from now on: new files are dealt over them."""
        there = set(chains)
        self.chain_count = next(count for count in range(len(there) + 1) if count + 1 not in there)
        self.stripe = min(self.chain_count, stripe or STRIPE_DEFAULT)

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
        if not self.chain_count:
            raise Unavailable("the cluster has no chain to put a file on yet")
        return Chunks(
            chunk_size_bytes=chunk_size_bytes,
            chain_count=self.chain_count,
            stripe=self.stripe,
            seed=int.from_bytes(self.runtime.random_bytes(4), "big"),
        )

    def hinted(self, inode: Inode) -> Inode:
        """A file's inode with what is only known in memory."""
        hint = self.hints.get(inode.id)
        if hint is None or hint.truncate_generation != inode.truncate_generation or hint.end <= inode.length:
            return inode
        return msgspec.structs.replace(inode, length=hint.end, mtime_ns=max(inode.mtime_ns, hint.mtime_ns))

    async def measured(self, txn: Transaction, inode: Inode, *, snapshot: bool = False) -> Inode:
        """A file's inode with the length that reports say: `hinted`, or the row that is shared."""
        if not self.shared or type(inode.layout) is not Chunks:
            return self.hinted(inode)
        end = decode_int(await txn.get(length_key(inode.id), snapshot=snapshot))
        return msgspec.structs.replace(inode, length=end) if end > inode.length else inode

    async def current(self, txn: Transaction, inode: Inode) -> Inode:
        """The inode as a caller may see it: a file's length by reports, a directory's time by its own row."""
        if not inode.is_dir:
            return await self.measured(txn, inode, snapshot=True)
        mtime_ns = decode_int(await txn.get(mtime_key(inode.id), snapshot=True))
        return msgspec.structs.replace(inode, mtime_ns=mtime_ns) if mtime_ns else inode
