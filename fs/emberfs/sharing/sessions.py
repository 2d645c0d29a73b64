"""The clients of a shared store: who is there, who may come back, who has ended.

A client is there while an `Attend` of it is under way. When that is lost (its process died, or the connection did) it
has `grace_s` to come back. It ends when that is over, or when it says so, and not before its last update has ended.

Does not know: what a client has open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import SessionExpired
from ..runtime import Runtime


@dataclass(slots=True)
class _Client:
    attending: int = 0
    """Calls of `Attend`; two while a new connection takes the place of an old one."""
    updates: int = 0
    """Under way."""
    left_s: float = 0.0
    """Since when nobody attends."""
    is_leaving: bool = False


class Sessions:
    """Told of every arrival and departure; `look` ends those whose time is over."""

    def __init__(self, runtime: Runtime, *, grace_s: float) -> None:
        self._runtime = runtime
        self._grace_s = grace_s
        self._clients: dict[bytes, _Client] = {}
        self._empty_s = runtime.now_s()

    @property
    def live(self) -> list[bytes]:
        """Those that have not ended."""
        return list(self._clients)

    def knows(self, client: bytes) -> bool:
        """It is there, or may come back."""
        return client in self._clients

    def idle_s(self) -> float:
        """For how long there has been no client."""
        return 0.0 if self._clients else self._runtime.now_s() - self._empty_s

    def admit(self, client: bytes) -> bool:
        """It is there, or on its way. True if it was not known."""
        is_new = client not in self._clients
        known = self._clients.setdefault(client, _Client())
        known.left_s = self._runtime.now_s()
        known.is_leaving = False
        return is_new

    def begin_attending(self, client: bytes) -> Callable[[], None]:
        """A call of `Attend` has begun; to be called when it has ended. Raises SessionExpired."""
        known = self._known(client)
        known.attending += 1

        def end() -> None:
            known.attending -= 1
            known.left_s = self._runtime.now_s()

        return end

    def begin_update(self, client: bytes) -> Callable[[], None]:
        """An update of chunks has begun; to be called when it has ended. Raises SessionExpired."""
        known = self._known(client)
        known.updates += 1

        def end() -> None:
            known.updates -= 1

        return end

    def leave(self, client: bytes) -> None:
        """It says that it ends."""
        if client in self._clients:
            self._clients[client].is_leaving = True

    def look(self) -> list[bytes]:
        """Forget those whose time is over, and return them."""
        now_s = self._runtime.now_s()
        ended = [
            client
            for client, known in self._clients.items()
            if not known.updates
            and (known.is_leaving or (not known.attending and now_s - known.left_s >= self._grace_s))
        ]
        for client in ended:
            del self._clients[client]
            self._empty_s = now_s
        return ended

    def _known(self, client: bytes) -> _Client:
        known = self._clients.get(client)
        if known is None:
            raise SessionExpired("the owner of the store has given this process up, or never knew it")
        return known
