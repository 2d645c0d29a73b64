"""What keeps a server without targets in the cluster: heartbeats out, routing and sessions back.

Storage nodes have a heart of their own (`storage.node`), because theirs carries a lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from ..client.managers import Managers
from ..errors import EmberError
from ..messages import Heartbeat, HeartbeatReply
from ..routing import Node, Routing
from ..runtime import Runtime
from ..transport.types import Network

HEARTBEAT_S = 0.5

log = logging.getLogger("emberline.server")


class Heart:
    """Tells the primary manager twice a second that `node` is alive."""

    def __init__(
        self,
        runtime: Runtime,
        network: Network,
        managers: Sequence[str],
        node: Node,
        *,
        on_routing: Callable[[Routing], Awaitable[None]] | None = None,
        on_sessions: Callable[[list[bytes]], Awaitable[None]] | None = None,
    ) -> None:
        self.routing = Routing(0)
        self._runtime = runtime
        self._managers = Managers(runtime, network, managers)
        self._node = node
        self._on_routing = on_routing
        self._on_sessions = on_sessions
        self._sessions_version = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """What goes on until `close`."""
        return [] if self._task is None else [self._task]

    def start(self) -> None:
        """Begin."""
        self._task = self._runtime.spawn(self._beat(), "server-heart")

    async def close(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            try:
                await self._task
            except asyncio.CancelledError:
                pass
            self._task = None

    async def _beat(self) -> None:
        is_heard = True
        while True:
            try:
                await self._tell()
                if not is_heard:
                    log.info("a manager takes our heartbeat again")
                is_heard = True
            except EmberError as error:
                if is_heard:
                    log.warning("no manager takes our heartbeat: %s", error)
                is_heard = False
            except Exception:
                # A mistake of ours, maybe in what takes the routing: without heartbeats this server would be lost.
                log.exception("a heartbeat failed")
            await self._runtime.sleep(HEARTBEAT_S)

    async def _tell(self) -> None:
        request = Heartbeat(self._node, [], self.routing.version, self._sessions_version)
        reply = await self._managers.ask(request, HeartbeatReply, timeout_s=HEARTBEAT_S * 4)
        if reply.routing is not None:
            self.routing = reply.routing
            if self._on_routing is not None:
                await self._on_routing(reply.routing)
        if reply.sessions is not None:
            self._sessions_version = reply.sessions_version
            if self._on_sessions is not None:
                await self._on_sessions(reply.sessions)
