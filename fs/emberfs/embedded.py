"""The embedded store: every role on one directory, in this process or in a server that several processes share.

    store/
      superblock.json    format, store id, shape; written once, checked at every open
      owner.lock         flock of the owning process; its content says who that is (see `sharing.ownership`)
      owner.sock         where the owner listens for others
      meta/              the metadata KV (LMDB)
      target-1/          a target: index/ (LMDB) and the block files

This is the wiring, and the only place where the services meet the real clock, disk and threads. The first process that
opens a store owns it, and its calls end in its own services. When another process comes, both become clients of a small
server (see `sharing`). Clients of one process share its way to the store. After a fork the child inherits nothing: see
`forget_after_fork`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import UnsetType

from .client.core import Core
from .disk import LocalDisk
from .engine import ChunkEngine, EngineConfig
from .errors import AlreadyExists, EmberError, LimitExceeded, StoreBusy, StoreFormat, Unavailable
from .kv import KV, LmdbKV
from .maintenance import Progress, run_order
from .meta import ClientChunkOps, MetaConfig, MetaService
from .meta.dump import load
from .portal import Portal
from .runtime import AsyncioRuntime
from .sharing.attached import AttachedConnection
from .sharing.door import Door
from .sharing.finding import POLL_S, WAIT_S, find_owner
from .sharing.ownership import Mode, Ownership, read_owner
from .sharing.starting import NewServer, Order
from .storage import StorageService
from .superblock import make_directory, read_or_write_superblock
from .transport import MemoryConnection
from .urls import SCHEME

if TYPE_CHECKING:
    from .lane.client import LaneReader
    from .lane.inline import InlineReader

log = logging.getLogger("emberline.sharing")

MOVE_S = 20.0
"""How long calls of ours that are under way may go on when another process wants to share the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Settings of an embedded store. `targets` is fixed when the store is made; the rest holds for this process."""

    targets: int | None = None
    """Target directories (disks, if you mount them so), that new files are dealt over. None: 1 for a new store."""
    reserve_bytes: int = 64 << 20
    """New data is refused (NoSpace) when the disk has less than this left."""
    gc_delay_s: float = 300.0
    """Seconds that readers of an unlinked or replaced file may go on."""
    trash_s: float = 7 * 86400.0
    """Seconds that removed files stay in the trash."""

    def __post_init__(self) -> None:
        if self.targets is not None and not (isinstance(self.targets, int) and 1 <= self.targets <= 256):
            raise LimitExceeded(f"targets must be 1 to 256: {self.targets!r}")
        for name in ("reserve_bytes", "gc_delay_s", "trash_s"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and value >= 0):
                raise LimitExceeded(f"{name} must be a number, 0 or more: {value!r}")


class Services:
    """The services on a directory that this process owns: an engine per target, chunks and names."""

    def __init__(self, directory: Path, config: StoreConfig, runtime: AsyncioRuntime, *, shared: bool) -> None:
        self.directory = directory
        self.config = config
        self.runtime = runtime
        self.superblock = read_or_write_superblock(directory, config.targets)
        self._shared = shared
        self._closers: list[Any] = []
        self.engines: dict[int, ChunkEngine] = {}

    @classmethod
    async def open(cls, directory: Path, config: StoreConfig, runtime: AsyncioRuntime, *, shared: bool) -> Services:
        """Open or make the store. `shared`: others send requests, so the metadata service is yet to be started.

        Raises StoreFormat, and what opening a KV or an engine raises.
        """
        services = cls(directory, config, runtime, shared=shared)
        try:
            await services._open()
        except BaseException:
            with contextlib.suppress(Exception):  # The first error is the one that says why.
                await services.close()
            raise
        return services

    async def _open(self) -> None:
        directory, runtime = self.directory, self.runtime
        for number in range(1, self.superblock.targets + 1):
            target = directory / f"target-{number}"
            (target / "index").mkdir(parents=True, exist_ok=True)
            index = LmdbKV.open(target / "index", runtime)
            self._closers.append(index)
            engine_config = EngineConfig(reserve_bytes=self.config.reserve_bytes)
            disk = LocalDisk(str(target), runtime)
            engine = await ChunkEngine.open(disk, index, runtime, config=engine_config)
            self._closers.append(engine)
            self.engines[number] = engine
        self.storage_service = StorageService(self.engines, runtime, checks_requests=self._shared)
        used = any(engine.allocator.used_blocks().values() for engine in self.engines.values())
        if used and not (directory / "meta" / "data.mdb").exists():
            raise StoreFormat(
                f"{directory} has data but its metadata is gone: bring {directory}/meta back, or load a dump with "
                f"`emberline fs load FILE ember://{directory}`"
            )
        (directory / "meta").mkdir(exist_ok=True)
        self.meta_kv = LmdbKV.open(directory / "meta", runtime)
        self._closers.append(self.meta_kv)
        meta_config = MetaConfig(
            gc_delay_s=self.config.gc_delay_s,
            trash_s=self.config.trash_s,
            chain_count=len(self.engines),
            stripe=len(self.engines),
            shared=self._shared,
            has_settings=True,
            client_grace_s=0.0,
            clients_interval_s=1.0,
        )
        chunk_ops = ClientChunkOps(dict.fromkeys(self.engines, MemoryConnection(self.storage_service)))
        self.meta_service = MetaService(self.meta_kv, runtime, chunk_ops, config=meta_config)
        self._closers.append(self.meta_service)
        if not self._shared:
            await self.meta_service.start()

    async def close(self) -> None:
        """Close everything in the reverse order of its start, whatever fails on the way; then raise the first error."""
        errors: list[Exception] = []
        while self._closers:
            try:
                await self._closers.pop().close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


class EmbeddedStore:
    """A store in a directory, as this process uses it. Get one from `stores.acquire`."""

    def __init__(self, directory: Path, config: StoreConfig) -> None:
        self.directory = directory
        self.config = config
        self.forked = False
        self.closed = False
        self.url = f"{SCHEME}{directory}"
        self.lanes: InlineReader | LaneReader | None = None
        """While we own the store, our own; else those to its server."""
        self.services: Services | None = None
        """Ours, while we own the store."""
        self._ownership: Ownership | None = None
        self._door: Door | None = None
        self._moving: asyncio.Task[None] | None = None
        self._attached: AttachedConnection | None = None
        make_directory(directory)
        self.runtime = AsyncioRuntime()
        self._first_client = self.runtime.random_bytes(16)
        """Who we are while we own the store, and when we have moved out."""
        self.portal = Portal(self.runtime)
        try:
            self._open()
        except BaseException:
            with contextlib.suppress(Exception):  # The first error is the one that says why.
                self.shut()
            raise

    def _open(self) -> None:
        settings = json.dumps(asdict(self.config))
        deadline_s: float | None = None
        while True:
            owner = find_owner(self.directory, settings, may_own=True)
            if isinstance(owner, Ownership):
                self._ownership = owner
                with contextlib.suppress(OSError):  # A file system without sockets: then nobody can share.
                    self._door = Door(self.runtime, self.directory, self._move_out)
                owner.declare(Mode.INLINE, is_reachable=self._door is not None)
                self.services = services = self.portal.run(self._own())
                self.lanes = self._inline_reader(services)
                self.superblock = services.superblock
                self.meta = MemoryConnection(services.meta_service)
                self._storage = MemoryConnection(services.storage_service)
                break
            self.superblock = read_or_write_superblock(self.directory, self.config.targets)
            attached = AttachedConnection(self.runtime, self.directory, settings, client=self.runtime.random_bytes(16))
            try:
                self.portal.run(attached.open(owner))
            except Unavailable as error:
                self.portal.run(attached.close())
                deadline_s = deadline_s or self.runtime.now_s() + WAIT_S
                if self.runtime.now_s() >= deadline_s:
                    raise StoreBusy(
                        f"process {owner} serves this store and cannot be reached; end it: {error}",
                        str(self.directory),
                        pid=owner,
                    ) from error
                self.portal.run(self.runtime.sleep(POLL_S))  # It is just leaving.
                continue
            self._attached = attached
            self._open_lanes(attached)
            self.portal.ledger.is_close = True
            self.meta, self._storage = MemoryConnection(attached), MemoryConnection(attached)
            break
        self.chains = dict.fromkeys(range(1, self.superblock.targets + 1), self._storage)

    async def _own(self) -> Services:
        services = await Services.open(self.directory, self.config, self.runtime, shared=False)
        if self._door is not None:
            self._door.open()
        return services

    def _inline_reader(self, services: Services) -> InlineReader | None:
        from .lane.native import native

        if native is None:
            return None
        from .lane.inline import InlineReader

        reader = InlineReader(self.runtime, self.portal.ledger, services.engines)
        for chain, engine in services.engines.items():
            engine.extents.mirror = reader.mirror(chain)
        return reader

    def _open_lanes(self, attached: AttachedConnection) -> None:
        from .sharing.lanes import lane_reader  # Who owns a store for itself needs none of that.

        self.lanes = lane_reader(self.runtime, self.portal, attached.network, attached.address)

    # --- moving out ------------------------------------------------------------------------------------------------

    async def _move_out(self) -> None:
        """Give the store to a server that others can reach too, and become its client. In the loop's thread.

        Raises Unavailable, and we own the store still: no server can be started, or calls of ours go on for too long.
        """
        if self._attached is not None:
            return
        if self._moving is None:
            self._moving = self.runtime.spawn(self._move(), "sharing-move")
        moving = self._moving
        try:
            await asyncio.shield(moving)
        finally:
            if moving.done() and self._moving is moving:
                self._moving = None

    async def _move(self) -> None:
        services, ownership = self.services, self._ownership
        assert services is not None and ownership is not None
        server = await self.runtime.offload(NewServer, ownership)
        try:
            await self.portal.pause(timeout_s=MOVE_S)
        except Unavailable:
            await self.runtime.offload(server.close)
            raise
        # From here on there is no way back: if no server begins, our calls will start one.
        settings = json.dumps(asdict(self.config))
        attached = self._attached = AttachedConnection(
            self.runtime, self.directory, settings, client=self._first_client
        )
        try:
            left = services.meta_service.unwritten(attached.client)
            await services.close()
            assert self._door is not None
            self._door.close()
            ownership.declare(Mode.STARTING)
            await self.runtime.offload(server.serve, Order(settings, left))
        except (EmberError, OSError):
            log.exception("%s was given to a server that does not serve it", self.directory)
            await self.runtime.offload(server.close)
            ownership.close()
        finally:
            self.services = self._ownership = self.lanes = None
            self.portal.ledger.is_close = True
            attached.start()
            self.meta.call = self._storage.call = attached.handle
            self.portal.resume()
            self._open_lanes(attached)

    # --- what clients have of it -----------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The store's random id."""
        return self.superblock.store

    def core(self) -> Core:
        """A new client of this store."""
        return Core(self.runtime, self.meta, self.chains, client=self._client)

    def _client(self) -> bytes:
        return self._attached.client if self._attached is not None else self._first_client

    async def space(self) -> dict[str, int]:
        """Bytes: `used_bytes` in blocks that hold chunks, `free_bytes` that new data may still take."""
        found: dict[str, int] = json.loads(await self.maintain("space", {}))
        return found

    async def maintain(self, what: str, arguments: dict[str, Any], progress: Progress | None = None) -> str:
        """Upkeep by name, as JSON: see `maintenance.run_order`. Of a server no progress is heard."""
        if self.services is not None:
            return await run_order(self.services, what, arguments, progress=progress)
        assert self._attached is not None
        return await self._attached.maintain(what, arguments)

    async def spooled_dump(self) -> Path:
        """A new file with a dump of the metadata, made by the server; the caller's to remove."""
        assert self._attached is not None
        return await self._attached.dump()

    # --- the end ---------------------------------------------------------------------------------------------------

    def shut(self) -> None:
        """Let the calls end, close the services or our way to them, then give the directory up.

        Closes everything, whatever fails on the way, and then raises the first error.
        """
        self.closed = True
        self.portal.run(self._stay())
        self.portal.drain()
        if self.lanes is not None:
            self.lanes.close()
        try:
            self.portal.run_last(self._close())
        finally:
            self.runtime.stop()
            if self._ownership is not None:
                self._ownership.close()

    async def _stay(self) -> None:
        """No more moves; one that has begun goes to its end."""
        if self._moving is not None:
            await self.runtime.sleep(0)  # Goes on in the loop's thread.
            await asyncio.wait([self._moving])
        if self._door is not None:
            await self._door.end()

    async def _close(self) -> None:
        if self._attached is not None:
            await self._attached.close()
        if self.services is not None:
            await self.services.close()
            assert self._ownership is not None
            self._ownership.clear()

    def forget_after_fork(self) -> None:
        """In the child: touch nothing but our copies of file descriptors. The parent goes on as if nothing was."""
        self.forked = True
        if self.lanes is not None:
            self.lanes.forget_after_fork()
            self.lanes = None
        if self._door is not None:
            self._door.forget_after_fork()
        if self._attached is not None:
            self._attached.forget_after_fork()
        _inherited.append(self)


_inherited: list[EmbeddedStore] = []
"""Stores of our parent process. Kept, so that no finalizer touches the parent's LMDB environment or event loop."""


def restore_metadata(directory: Path, lines: Iterable[str]) -> None:
    """Load a metadata dump into a store that is not open and whose `meta` directory is empty or gone.

    Raises StoreBusy, StoreFormat, AlreadyExists (there is metadata already: move `meta` away first).
    """
    make_directory(directory)
    ownership = Ownership.take(directory)
    if ownership is None:
        owner = read_owner(directory)
        pid = owner.pid if owner is not None else None
        raise StoreBusy(f"process {pid} has this store open; close it there first", str(directory), pid=pid)
    try:
        read_or_write_superblock(directory, None)
        meta, new = directory / "meta", directory / "meta.new"
        if (meta / "data.mdb").exists():
            raise AlreadyExists(f"there is metadata already: move {meta} away, then load again", str(directory))
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        runtime = AsyncioRuntime()
        portal = Portal(runtime)
        try:
            kv = LmdbKV.open(new, runtime)
            try:
                portal.run(_load(kv, lines))
            finally:
                portal.run(kv.close())
        finally:
            runtime.stop()
        # Whole now: a load that failed leaves the store as it was.
        if meta.exists():
            meta.rmdir()
        new.rename(meta)
    finally:
        ownership.close()


async def _load(kv: KV, lines: Iterable[str]) -> None:
    header = await load(kv, lines)
    if not isinstance(header.cluster, UnsetType):
        raise StoreFormat("a dump of a cluster: the chunks of its files are not in this store")
