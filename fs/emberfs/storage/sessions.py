"""Which clients have a live session, as the manager said last.

Does not know: how a session is opened, or what a client's requests are.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import SessionExpired


class Sessions:
    """Knows nobody until the first answer."""

    def __init__(self) -> None:
        self.version = 0
        self._live: frozenset[bytes] = frozenset()

    def take(self, version: int, live: Iterable[bytes]) -> None:
        """What a heartbeat's reply said."""
        self.version = version
        self._live = frozenset(live)

    def is_live(self, client: bytes) -> bool:
        return client in self._live

    def check(self, client: bytes) -> None:
        """Raises SessionExpired for a client without a live session."""
        if client not in self._live:
            raise SessionExpired("the cluster has given this client up, or never knew it: connect again")


class Departed:
    """Finds clients whose request rows may go: without a session at two looks in a row.

    A row may be younger than what we know of sessions; one that is older than the last look is not.
    """

    def __init__(self) -> None:
        self._suspects: frozenset[bytes] = frozenset()

    def look(self, clients: Iterable[bytes], sessions: Sessions) -> list[bytes]:
        """Of `clients` (those with rows now) the ones that are gone. Between two looks `sessions` must be renewed."""
        absent = frozenset(client for client in clients if not sessions.is_live(client))
        gone = sorted(absent & self._suspects)
        self._suspects = absent
        return gone
