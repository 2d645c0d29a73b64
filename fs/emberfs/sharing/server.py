"""The small server that owns a store while several processes use it, and leaves when nobody does.

It serves what an owner for itself would call directly: names through a metadata service that is shared (every request
that changes something comes as `Once`), chunks with the names of requests checked, and upkeep.

Leaving by itself it takes care of what clients left and clears the lock file: the next owner may own the store for
itself. Ended in another way it leaves the lock file as it is, and the clients start the next one.

Does not know: how it was started (`starting`), or how clients find it (`finding`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ..embedded import Services, StoreConfig
from ..errors import EmberError, LimitExceeded, SessionExpired, Unavailable
from ..kv.types import Transaction, decode_int
from ..maintenance import run_order
from ..messages import (
    Attach,
    Attached,
    Attend,
    Detach,
    Done,
    ListChunks,
    Maintain,
    Maintained,
    Message,
    MeterRead,
    ReadChunks,
    ReadMeter,
    RemoveChunks,
    TruncateChunk,
    WriteChunks,
)
from ..meta.clients import ENDED
from ..meta.dump import dump
from ..meta.handover import Unwritten
from ..meta.keys import client_key
from ..meta.scan import pages
from ..runtime import AsyncioRuntime
from ..transport import TcpConfig, TcpNetwork
from ..transport.types import Listener
from .lanes import end_lanes, lane_server, serve_lanes
from .ownership import Mode, Ownership
from .sessions import Sessions
from .socket_place import SocketPlace

log = logging.getLogger("emberline.sharing")

SETTLE_S = 2.0
"""How long calls may go on when the server leaves."""
GIVEN_UP = "the owner of the store has given this process up"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """How long a server waits for its clients."""

    idle_s: float = 10.0
    """Without any client it leaves after this long."""
    grace_s: float = 10.0
    """A client that lost its connection may come back for so long; then what it has open is closed."""
    look_s: float = 0.5
    """Between two looks at the clients."""

    def __post_init__(self) -> None:
        if min(self.idle_s, self.grace_s) < 0 or self.look_s <= 0:
            raise LimitExceeded("idle_s and grace_s must be at least 0, look_s more than 0")


class SharingServer:
    """A store that is served, from `start` to `close`."""

    def __init__(
        self,
        ownership: Ownership,
        runtime: AsyncioRuntime,
        settings: StoreConfig,
        *,
        on_idle: Callable[[], None],
        config: ServerConfig | None = None,
    ) -> None:
        """`on_idle` is called when there has been no client for a while, in the loop's thread: time to close."""
        self._ownership = ownership
        self._runtime = runtime
        self._settings = settings
        self._config = config or ServerConfig()
        self._sessions = Sessions(runtime, grace_s=self._config.grace_s)
        self._place = SocketPlace(ownership.directory)
        # Clients that are stopped (a debugger) keep what they have: a socket of this host tells who has ended.
        self._lanes = lane_server()
        adopt_lane = None if self._lanes is None else self._lanes.adopt
        self._network = TcpNetwork(runtime, TcpConfig(dead_s=30.0), adopt_lane=adopt_lane)
        self._listener: Listener | None = None
        self._is_leaving = False
        self._on_idle = on_idle
        self._watching: asyncio.Task[None] | None = None
        self._handlers: dict[type[Message], Callable[[Any, Sequence[memoryview]], Awaitable[Message]]] = {
            Attach: self._attach,
            Attend: self._attend,
            Detach: self._detach,
            Maintain: self._maintain,
            ReadMeter: self._read_meter,
            WriteChunks: self._update,
            TruncateChunk: self._update,
            RemoveChunks: self._update,
        }

    async def start(self, left: Unwritten | None) -> None:
        """Open the store and serve. Raises what opening it raises."""
        self._services = await Services.open(self._ownership.directory, self._settings, self._runtime, shared=True)
        meta = self._services.meta_service
        try:
            await meta.start()
            await meta.take_over(left)
            # Of the server before, if it died: they will come back, or end when their time is over.
            async for page in pages(self._services.meta_kv, b"K"):
                for key, value in page:
                    if decode_int(value) < ENDED:
                        self._sessions.admit(key[1:])
            await meta.sessions_changed(self._sessions.live)
            for request in (ReadChunks, ListChunks):
                self._handlers[request] = self._services.storage_service.handle
            if self._lanes is not None:
                serve_lanes(self._lanes, self._services.engines)
            self._place.remove()
            self._listener = await self._network.serve(f"unix:{self._place.path}", self)
        except BaseException:
            await self._services.close()
            raise
        self._ownership.declare(Mode.SERVER, is_reachable=True)
        self._watching = self._runtime.spawn(self._watch(), "sharing-watch")

    async def _watch(self) -> None:
        while self._sessions.idle_s() < self._config.idle_s:
            await self._runtime.sleep(self._config.look_s)
            await self._end_clients()
        self._on_idle()

    async def close(self) -> None:
        """Take no more calls and close the store. If no client is left, the next owner needs no server."""
        self._is_leaving = True
        await self._runtime.sleep(0)  # Goes on in the loop's thread.
        assert self._listener is not None and self._watching is not None
        self._watching.cancel()
        await asyncio.wait([self._watching])
        try:
            await self._listener.close(drain_s=SETTLE_S)
            self._place.close()
            await self._network.close()
        finally:
            # Whatever fails: they would serve what was, for as long as this process takes to end.
            if self._lanes is not None:
                end_lanes(self._lanes, self._services.engines)
        is_clear = not self._sessions.live and await self._services.meta_service.forget_clients()
        if is_clear:
            for engine in self._services.engines.values():
                await engine.drop_requests_except(())
        await self._services.close()
        if is_clear:
            self._ownership.clear()

    def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Awaitable[Message]:
        """Serve one request."""
        handler = self._handlers.get(type(request))
        if handler is not None:
            return handler(request, buffers)
        return self._services.meta_service.handle(request, buffers)

    async def _end_clients(self) -> None:
        ended = self._sessions.look()
        if not ended:
            return

        async def mark(txn: Transaction) -> None:
            for client in ended:
                txn.max(client_key(client), ENDED)

        try:
            # First of all, and durably: no server lets them in again once it is forgotten what they have done.
            await self._services.meta_kv.run(mark, reclaims=True)
            await self._services.meta_service.sessions_changed(self._sessions.live)
            for engine in self._services.engines.values():
                await engine.drop_requests(ended)
        except (EmberError, OSError) as error:
            log.warning("clients that have ended: %s", error)

    async def _attach(self, request: Attach, _: Sequence[memoryview]) -> Message:
        if self._is_leaving:
            raise Unavailable("the server of the store is leaving")
        if request.again and not self._sessions.knows(request.client):
            raise SessionExpired(GIVEN_UP)
        is_new = self._sessions.admit(request.client)
        key = client_key(request.client)

        async def work(txn: Transaction) -> bool:
            if decode_int(await txn.get(key)) >= ENDED:
                return False
            txn.max(key, 1)
            return True

        if not await self._services.meta_kv.run(work, reclaims=True):
            self._sessions.leave(request.client)
            raise SessionExpired(GIVEN_UP)
        if is_new:
            await self._services.meta_service.sessions_changed(self._sessions.live)
            log.info("%s has come", request.description)
        return Attached(os.getpid(), json.dumps(asdict(self._settings)))

    async def _attend(self, request: Attend, _: Sequence[memoryview]) -> Message:
        end = self._sessions.begin_attending(request.client)
        try:
            await self._runtime.future()  # Until the connection is lost.
        finally:
            end()
        return Done()

    async def _detach(self, request: Detach, _: Sequence[memoryview]) -> Message:
        self._sessions.leave(request.client)
        await self._end_clients()
        return Done()

    async def _update(
        self, request: WriteChunks | TruncateChunk | RemoveChunks, buffers: Sequence[memoryview]
    ) -> Message:
        end = self._sessions.begin_update(request.client)
        try:
            return await self._services.storage_service.handle(request, buffers)
        finally:
            end()

    async def _maintain(self, request: Maintain, _: Sequence[memoryview]) -> Message:
        if request.what == "dump":
            return Maintained(json.dumps(await self._spool_dump()))
        result = await run_order(self._services, request.what, json.loads(request.arguments))
        return Maintained(result)

    async def _read_meter(self, _: ReadMeter, __: Sequence[memoryview]) -> Message:
        meter = self._network.meter
        return MeterRead(meter.up_s, meter.kinds)

    async def _spool_dump(self) -> str:
        """The name of a new file in the store's directory with a dump of the metadata; the client's to remove."""
        name = f"dump-{self._runtime.random_bytes(8).hex()}.jsonl"
        path = self._ownership.directory / name
        with _created(path) as file:
            try:
                await dump(self._services.meta_kv, lambda line: file.write(f"{line}\n"))
            except BaseException:
                path.unlink()
                raise
        return name


def _created(path: Path) -> TextIO:
    return path.open("x", encoding="utf-8")
