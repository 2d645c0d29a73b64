"""Client sessions: a row each, so that they outlive the primary; when they end is in its memory only.

Invariants: no session ends within `session_timeout_s` after it was opened or extended, or after this manager began to
act as primary. Does not know: what hangs on a session.
"""

from __future__ import annotations

from ..errors import InvalidPath, SessionExpired
from ..messages import CloseClient, ExtendSession, OpenSession
from ..types import CLIENT_ID_BYTES
from .cluster import Change, Cluster
from .rows import SessionRow

DESCRIPTION_CHARS_MAX = 256


class Sessions:
    """Opens, extends, closes and expires."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._extended_s: dict[bytes, float] = {}

    def forget_all(self) -> None:
        """This manager begins as primary: everybody has the full time again."""
        self._extended_s.clear()

    async def open(self, request: OpenSession, *, now_s: float) -> None:
        """Durable when it returns. Opening twice is fine."""
        client = request.client
        if len(client) != CLIENT_ID_BYTES:
            raise InvalidPath(f"a client id has {CLIENT_ID_BYTES} bytes, not {len(client)}")
        self._extended_s[client] = now_s
        row = SessionRow(request.description[:DESCRIPTION_CHARS_MAX])
        await self._cluster.change(
            lambda: Change(sessions={client: row}) if client not in self._cluster.sessions else None
        )

    def extend(self, request: ExtendSession, *, now_s: float) -> None:
        """Raises SessionExpired if there is no such session."""
        if request.client not in self._cluster.sessions:
            raise SessionExpired("the cluster has given this client up: it was silent for too long, or it was closed")
        self._extended_s[request.client] = now_s

    async def close(self, request: CloseClient) -> None:
        """Closing twice is fine."""
        client = request.client
        await self._cluster.change(
            lambda: Change(sessions={client: None}) if client in self._cluster.sessions else None
        )
        self._extended_s.pop(client, None)

    def expire(self, *, now_s: float, since_s: float) -> Change | None:
        """A plan: end the sessions of the silent."""
        timeout_s = self._cluster.settings.session_timeout_s
        for client in [client for client in self._extended_s if client not in self._cluster.sessions]:
            if now_s - self._extended_s[client] >= timeout_s:
                del self._extended_s[client]
        ended = [
            client
            for client in self._cluster.sessions
            if now_s - max(self._extended_s.get(client, since_s), since_s) >= timeout_s
        ]
        return Change(sessions=dict.fromkeys(ended)) if ended else None
