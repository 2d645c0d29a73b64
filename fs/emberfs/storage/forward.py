"""The way between two neighbours of a chain, in one chain version: numbered calls down, each taken once.

`Link` is the sender's end. `Inbound` is the receiver's: it refuses a call that comes twice or after its sender has
given it up, gives up what the sender gave up, and matches each `Vouch` with its `Forward` (either may come first).

Does not know: engines, or what a chunk is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ..errors import StaleRouting, Unavailable, UpdateUnknown
from ..messages import Message, Vouch
from ..runtime import Runtime
from ..transport.types import Connection
from ..waiting import call, finish, first_of, until

VOUCH_RETRY_S = 0.05
EARLY_VOUCHES_MAX = 65_536
"""Vouches that are kept for a Forward that may still come. Beyond that the oldest go: they were given up long ago."""


class Link:
    """The way to the successor. Its calls end, as UpdateUnknown, when the chain changes."""

    def __init__(
        self, runtime: Runtime, connection: Connection, chain: int, *, version: int, changed: asyncio.Future[None]
    ) -> None:
        self._runtime = runtime
        self._connection = connection
        self._chain = chain
        self._version = version
        self._changed = changed
        self._last = 0
        self._air: dict[int, None] = {}
        """Numbers of calls that have not ended, oldest first."""

    def take_number(self) -> int:
        """The number of the next call. Give it back with `end`."""
        self._last += 1
        self._air[self._last] = None
        return self._last

    async def send(
        self, number: int, build: Callable[[int, int], Message], buffers: Sequence[memoryview] = ()
    ) -> Message:
        """The reply to `build(number, oldest)`. Raises what the successor raises, Unavailable, UpdateUnknown."""
        return await self.ask(build(number, next(iter(self._air))), buffers)

    def end(self, number: int) -> None:
        """The call is over for us: what the successor still does for it is given up with the next call."""
        del self._air[number]

    async def call(self, build: Callable[[int, int], Message], buffers: Sequence[memoryview] = ()) -> Message:
        """`send` with the next number."""
        number = self.take_number()
        try:
            return await self.send(number, build, buffers)
        finally:
            self.end(number)

    async def ask(self, request: Message, buffers: Sequence[memoryview] = ()) -> Message:
        """The reply to a request that bears no number."""
        if self._changed.done():
            raise StaleRouting("the chain has changed")
        work = call(self._connection, request, buffers)
        return await until(self._runtime, work, self._changed, name="to-successor")

    async def vouch(self, number: int, *, abandoned: bool = False) -> None:
        """Tell the successor what became of call `number` here. Returns once it knows, or the call has ended."""
        while number in self._air and not self._changed.done():
            try:
                await self.ask(Vouch(self._chain, self._version, number, abandoned))
            except (Unavailable, UpdateUnknown, StaleRouting):
                # Stale: it does not know our chain version yet. It may when the call arrives, and then waits for this.
                await self._runtime.sleep(VOUCH_RETRY_S)
            else:
                return


class Abandoned(Exception):
    """The predecessor could not prepare it: nobody before us holds it."""


class Passing:
    """A call of the predecessor that is under way here."""

    def __init__(self, runtime: Runtime, changed: asyncio.Future[None]) -> None:
        self._runtime = runtime
        self._changed = changed
        self.given_up = runtime.future()
        """Done when the sender has given up the call."""
        self._told = runtime.future()
        self._is_abandoned = False

    def tell(self, *, abandoned: bool) -> None:
        """The predecessor's `Vouch` is here."""
        if not self._told.done():
            self._is_abandoned = abandoned
            finish(self._told)

    @property
    def is_vouched(self) -> bool:
        return self._told.done() and not self._is_abandoned

    async def vouched(self) -> None:
        """Return once all before us hold it. Raises Abandoned, or UpdateUnknown if that is no longer to be had."""
        if not self._told.done():
            await first_of(self._runtime, self._told, self.given_up, self._changed)
        if not self._told.done():
            raise UpdateUnknown("given up by the predecessor, or the chain changed")
        if self._is_abandoned:
            raise Abandoned


class Inbound:
    """What comes from the predecessor."""

    def __init__(self, runtime: Runtime, changed: asyncio.Future[None]) -> None:
        self._runtime = runtime
        self._changed = changed
        self._oldest = 0
        self._seen: dict[int, None] = {}
        """Numbers from `_oldest` on that came already."""
        self._passing: dict[int, Passing] = {}
        self._early: dict[int, bool] = {}

    def begin(self, number: int, oldest: int) -> Passing:
        """Take a call. Raises UpdateUnknown for one that came before, or that its sender has given up."""
        if oldest > self._oldest:
            self._oldest = oldest
            self._seen = {each: None for each in self._seen if each >= oldest}
            self._early = {each: told for each, told in self._early.items() if each >= oldest}
            for each, passing in self._passing.items():
                if each < oldest:
                    finish(passing.given_up)
        if number < self._oldest or number in self._seen:
            raise UpdateUnknown("a late copy of a request")
        self._seen[number] = None
        passing = self._passing[number] = Passing(self._runtime, self._changed)
        if number in self._early:
            passing.tell(abandoned=self._early.pop(number))
        return passing

    def end(self, number: int) -> None:
        """The call has been answered."""
        del self._passing[number]

    def tell(self, number: int, *, abandoned: bool) -> None:
        """A `Vouch` for call `number`, which may not be here yet."""
        if number in self._passing:
            self._passing[number].tell(abandoned=abandoned)
        elif number >= self._oldest and number not in self._seen:
            self._early[number] = abandoned
            if len(self._early) > EARLY_VOUCHES_MAX:
                del self._early[next(iter(self._early))]
