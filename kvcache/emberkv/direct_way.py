"""A client's direct way to one address of the service: when a connection for it is opened, and who has it.

It is one connection, and one thread's at a time: who finds it taken goes over the one that all threads share. A service
takes so many connections: none is opened for who asks once in a while, none is kept that is idle, and a service that
refused one is not asked again at once.

Does not know: what is asked.
"""

from __future__ import annotations

import math
import threading

from emberfs.errors import EmberError
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.transport import TcpNetwork
from emberfs.transport.direct import DirectConnection

MISSES_MAX = 8
"""After so many requests without a connection one is opened."""
PAUSE_S, PAUSE_S_MAX = 2.0, 60.0
"""None is asked for so long after one was refused; twice as long each time."""


class DirectWay:
    """See the module. From any thread."""

    def __init__(self, address: str, network: TcpNetwork, portal: Portal, runtime: AsyncioRuntime) -> None:
        self.connection: DirectConnection | None = None
        """The last one, which may be over."""
        self._address, self._network, self._portal, self._now_s = address, network, portal, runtime.now_s
        self._lock = threading.Lock()
        self._missed = 0
        """Requests without a connection, since there was one last."""
        self._is_opening = False
        self._pause_s = 0.0
        self._not_before_s = -math.inf
        """None is opened before; inf: none ever."""

    def take(self) -> DirectConnection | None:
        """It is ours until its `end`. None: there is none yet, or another thread has it."""
        connection = self.connection
        if connection is not None and connection.try_begin():
            return connection
        with self._lock:
            connection = self.connection  # It may have come meanwhile.
            if connection is not None and not connection.is_closed:
                return None
            self._missed += 1
            if self._missed < MISSES_MAX or self._is_opening or self._now_s() < self._not_before_s:
                return None
            self._is_opening = True
        self._portal.post(self._open())
        return None

    def drain(self, timeout_s: float) -> None:
        """Take no more requests, and return when the one under way has ended, or its time is over."""
        self._not_before_s = math.inf
        if self.connection is not None:
            self.connection.drain(timeout_s)

    async def _open(self) -> None:
        """For later requests: whoever wants it now goes on without."""
        try:
            made = await self._network.open_direct(self._address)
        except (EmberError, OSError):
            self._pause_s = min(max(2 * self._pause_s, PAUSE_S), PAUSE_S_MAX)
            self._not_before_s = self._now_s() + self._pause_s
        else:
            with self._lock:
                self.connection, self._missed, self._pause_s = made, 0, 0.0
            if made is None:
                self._not_before_s = math.inf
        finally:
            self._is_opening = False
