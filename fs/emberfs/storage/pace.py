"""How fast a node may send what others lack: a token bucket, and turns for those who send at the same time.

There are two. *Recovery* brings back replicas that a chain is short of, and goes as fast as `resync_bytes_per_s`;
*migration* is the resync of a chain that has all that it wants and only moves, and keeps to `migration_bytes_per_s`.
Neither waits for the other.

Does not know: what is sent.
"""

from __future__ import annotations

import asyncio
from collections import deque

from ..routing import Chain
from ..runtime import Runtime
from ..settings import Settings
from ..waiting import finish, first_of, pause

SLEEP_S_MIN = 1e-6
"""What a clock can be slept by, rounding apart."""


class Pace:
    """One bucket. Its rate may change while some wait."""

    def __init__(self, runtime: Runtime, *, bytes_per_s: float, parallel: int) -> None:
        self._runtime = runtime
        self._bytes_per_s = bytes_per_s
        self._sent_bytes = 0.0
        """Of all `take`s, those that wait included: each may go when what was taken before it was due."""
        self._due_bytes = 0.0
        """So much might have been sent until `_since_s`; it grows with time from there."""
        self._since_s = runtime.now_s()
        self._retuned = runtime.future()
        self._turns = parallel
        self._waiting: deque[asyncio.Future[None]] = deque()

    def retune(self, bytes_per_s: float) -> None:
        """From now on at this rate, for those who wait already, too."""
        self._due_bytes, self._since_s = self._due(), self._runtime.now_s()
        self._bytes_per_s = bytes_per_s
        retuned, self._retuned = self._retuned, self._runtime.future()
        finish(retuned)

    async def take(self, count: int, stop: asyncio.Future[None]) -> None:
        """Return when `count` bytes may be sent: at once if all before were sent in time. Or when `stop` is done."""
        if self._due() > self._sent_bytes:
            # Nobody saves up for later.
            self._due_bytes, self._since_s = self._sent_bytes, self._runtime.now_s()
        before, self._sent_bytes = self._sent_bytes, self._sent_bytes + count
        while (left_s := (before - self._due()) / self._bytes_per_s) > SLEEP_S_MIN and not stop.done():
            await pause(self._runtime, left_s, self._retuned, stop)

    def _due(self) -> float:
        return self._due_bytes + (self._runtime.now_s() - self._since_s) * self._bytes_per_s

    async def begin(self, stop: asyncio.Future[None]) -> bool:
        """Wait for a turn; False if `stop` came first. Give it back with `end`."""
        if self._turns:
            self._turns -= 1
            return True
        turn = self._runtime.future()
        self._waiting.append(turn)
        await first_of(self._runtime, turn, stop)
        if turn.done():
            return True
        self._waiting.remove(turn)
        return False

    def end(self) -> None:
        """The next one may run."""
        if self._waiting:
            finish(self._waiting.popleft())
        else:
            self._turns += 1


class Paces:
    """The two of a node."""

    def __init__(self, runtime: Runtime, *, parallel: int) -> None:
        settings = Settings()
        self.recovery = Pace(runtime, bytes_per_s=settings.resync_bytes_per_s, parallel=parallel)
        self.migration = Pace(runtime, bytes_per_s=settings.migration_bytes_per_s, parallel=parallel)

    def retune(self, settings: Settings) -> None:
        """Other caps are in force."""
        self.recovery.retune(settings.resync_bytes_per_s)
        self.migration.retune(settings.migration_bytes_per_s)

    def of(self, chain: Chain) -> Pace:
        """That of a resync in `chain` as it is now."""
        return self.recovery if chain.is_short else self.migration
