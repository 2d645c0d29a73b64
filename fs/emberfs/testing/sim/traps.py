"""Traps: a message that is just setting out is noticed, and held if need be, so that a fault can be timed by it.

    trap = Trap(world, lambda passage: isinstance(passage.request, Forward), holds=True)
    fabric.traps.append(trap)
    passage = await trap.sprung(5.0)        # None: nothing like it in five seconds
    ...
    trap.release()

A held message is late, not lost. A connection with a message held for long would break, as it does when the way is cut:
`breaks` lets it break at once, so that the sender is in doubt while its message is still to come.

Does not know: what the messages mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ...messages import Message
from .loop import SimRuntime


class Passage(NamedTuple):
    """A message that sets out, between two hosts."""

    source: str
    destination: str
    request: Message
    is_reply: bool
    """It is the reply to `request`."""


class Trap:
    """Catches up to `count` messages. Not used again after `release`."""

    def __init__(
        self,
        world: SimRuntime,
        matches: Callable[[Passage], bool],
        *,
        holds: bool = False,
        breaks: bool = False,
        count: int = 1,
    ) -> None:
        self.breaks = breaks
        self._world = world
        self._matches = matches
        self._holds = holds
        self._left = count
        self._first = world.future()
        self._held: list[Callable[[], None]] = []

    def takes(self, passage: Passage, go_on: Callable[[], None]) -> bool:
        """A message sets out. True: it is held; `go_on` lets it travel."""
        if not self._left or not self._matches(passage):
            return False
        self._left -= 1
        if not self._first.done():
            self._first.set_result(passage)
        if self._holds:
            self._held.append(go_on)
        return self._holds

    async def sprung(self, within_s: float) -> Passage | None:
        """The first message caught; None if there is none in time."""
        timer = self._world.loop.call_later(within_s, self._give_up)
        passage: Passage | None = await self._first
        timer.cancel()
        return passage

    def release(self) -> None:
        """Let what is held travel, and catch nothing more."""
        self._left = 0
        self._give_up()
        held, self._held = self._held, []
        for go_on in held:
            go_on()

    def _give_up(self) -> None:
        if not self._first.done():
            self._first.set_result(None)
