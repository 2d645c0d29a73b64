"""Which clients have a live session, as the manager said last.

Does not know: how a session is opened, or what a client's requests are.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import SessionExpired


class Sessions:
    """Knows nobody until the first answer. Heartbeats come one by one: `ask`, then `take` what was answered."""

    def __init__(self) -> None:
        self.version = 0
        self.asked = 0
        """Questions so far."""
        self.answered = 0
        """The number of the last one that had an answer: what we know is no older than that question."""
        self._live: frozenset[bytes] = frozenset()

    def ask(self) -> None:
        """The next question is sent now."""
        self.asked += 1

    def take(self, version: int, live: Iterable[bytes] | None) -> None:
        """What the answer to the last question says; None: nothing has changed."""
        self.version, self.answered = version, self.asked
        if live is not None:
            self._live = frozenset(live)

    def is_live(self, client: bytes) -> bool:
        return client in self._live

    def check(self, client: bytes) -> None:
        """Raises SessionExpired for a client without a live session."""
        if client not in self._live:
            raise SessionExpired("the cluster has given this client up, or never knew it: connect again")


class Departed:
    """Finds clients whose request rows may go: without a session at two looks in a row.

    A row may be younger than what we know of sessions: its client may have come meanwhile. Not so if the row was there
    at the look before, and the manager was asked after that look. Until it was and has answered, a look says nothing.
    """

    def __init__(self) -> None:
        self._suspects: frozenset[bytes] = frozenset()
        self._asked = 0
        """Questions before the suspects were seen."""

    def look(self, clients: Iterable[bytes], sessions: Sessions) -> list[bytes]:
        """Of `clients` (those with rows now) the ones that are gone."""
        if sessions.answered <= self._asked:
            return []
        absent = frozenset(client for client in clients if not sessions.is_live(client))
        gone = sorted(absent & self._suspects)
        self._suspects, self._asked = absent, sessions.asked
        return gone
