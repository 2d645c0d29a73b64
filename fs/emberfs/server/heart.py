"""What keeps a server without targets in the cluster: heartbeats out, routing, sessions and configuration back.

Storage nodes have a heart of their own (`storage.node`), because theirs carries a lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from ..client.managers import Managers
from ..errors import AlreadyExists, EmberError
from ..messages import GetRouting, Heartbeat, HeartbeatReply, RoutingReply
from ..routing import Node, Routing
from ..runtime import Runtime
from ..settings import Config, Settings
from ..transport.types import Network
from ..waiting import finish, pause

log = logging.getLogger("emberline.server")


class Heart:
    """Tells the primary manager every `heartbeat_s` that `node` is alive."""

    def __init__(
        self,
        runtime: Runtime,
        network: Network,
        managers: Sequence[str],
        node: Node,
        *,
        on_routing: Callable[[Routing], Awaitable[None]] | None = None,
        on_sessions: Callable[[list[bytes]], Awaitable[None]] | None = None,
        on_config: Callable[[Config], None] | None = None,
    ) -> None:
        self.routing = Routing(0)
        self._runtime = runtime
        self._managers = Managers(runtime, network, managers)
        self._node = node
        self._on_routing = on_routing
        self._on_sessions = on_sessions
        self._on_config = on_config
        self._config_version = 0
        self._heartbeat_s = Settings().heartbeat_s
        self._sessions_version = 0
        self._is_admitted = False
        self._wanted: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """What goes on until `close`, or until another process has taken the name."""
        return [] if self._task is None else [self._task]

    def start(self) -> None:
        """Begin."""
        self._task = self._runtime.spawn(self._beat(), "server-heart")

    def hurry(self) -> None:
        """Beat now, or after the beat that is under way: somebody waits for news."""
        if self._wanted is not None:
            finish(self._wanted)

    async def close(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            try:
                await self._task
            except (asyncio.CancelledError, AlreadyExists):
                pass
            self._task = None

    async def _beat(self) -> None:
        is_heard = True
        while True:
            self._wanted = wanted = self._runtime.future()
            try:
                await self._tell()
                if not is_heard:
                    log.info("a manager takes our heartbeat again")
                is_heard = True
            except AlreadyExists:
                # Another process has our name, and has proved it: nobody would tell us of sessions any more.
                raise
            except EmberError as error:
                self._is_admitted = False
                if is_heard:
                    log.warning("no manager takes our heartbeat: %s", error)
                is_heard = False
            except Exception:
                # A mistake of ours, maybe in what takes the routing: without heartbeats this server would be lost.
                log.exception("a heartbeat failed")
            await pause(self._runtime, self._heartbeat_s, wanted)

    async def _tell(self) -> None:
        if not self._is_admitted:
            # Who takes over a name must know who has it.
            known = await self._managers.ask(GetRouting(), RoutingReply, timeout_s=self._heartbeat_s * 4)
            await self._take(known.routing)
        versions = (self.routing.version, self._sessions_version, self._config_version)
        request = Heartbeat(self._node, [], *versions)
        reply = await self._managers.ask(request, HeartbeatReply, timeout_s=self._heartbeat_s * 4)
        self._is_admitted = True
        if reply.config is not None:
            # First: it says how long those may still be heard whose sessions are gone.
            self._config_version = reply.config.version
            self._heartbeat_s = Settings.of(reply.config.values).heartbeat_s
            if self._on_config is not None:
                self._on_config(reply.config)
        await self._take(reply.routing)
        if reply.sessions is not None:
            self._sessions_version = reply.sessions_version
            if self._on_sessions is not None:
                await self._on_sessions(reply.sessions)

    async def _take(self, routing: Routing | None) -> None:
        if routing is not None and routing.version > self.routing.version:
            self.routing = routing
            if self._on_routing is not None:
                await self._on_routing(routing)
