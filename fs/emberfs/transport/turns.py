"""Whose request a server begins next, and what it takes on at all.

Requests for data (`Message.takes_turns`) of all connections of a listener come here. What servers say to each other
does not: a reader never holds up a chain.

Invariants:
  - Memory held for clients stays within `LoadConfig.bytes_max`, except for one small request of each client.
  - Once half of the memory or of the calls is taken, nobody who has 1 / SHARES of it gets more. A client that does not
    read its replies begins nothing.
  - Clients that have something waiting begin alike much, weighed by bytes, however much each has sent: a deficit round
    robin (Shreedhar and Varghese, 1995).
  - Who has nothing under way may always begin something small: those who hold the memory, or wait for a slow disk, do
    not hold it up.
  - A request that has waited for `LoadConfig.wait_s_max` is refused with Overloaded, and was not begun.

Does not know: connections, or what a request is for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from ..errors import Overloaded
from .frame import HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX

SHARES = 8
SMALL_BYTES_MAX = 64 << 10
"""A request of up to so many bytes is small."""
CALL_COST_BYTES = 64 << 10
"""What a request weighs beside its bytes: reading so many from the page cache takes as long."""
COST_MAX = 8 << 20
QUANTUM_BYTES = 512 << 10
"""What a client may begin in one turn: a few small requests. Heavy ones wait for some turns."""
ROUND_CALLS_MAX = 16
"""So many requests begin before the loop looks at its sockets again."""
UNSENT_BYTES_MAX = 1 << 20
"""A client that has so much of its replies still to read begins nothing."""
RETRY_S_MIN = 0.05

assert COST_MAX <= 16 * QUANTUM_BYTES, "the next one is found in so many rounds of the ring"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadConfig:
    """How much one server takes on for all its clients together."""

    bytes_max: int = 512 << 20
    """Bytes of memory for their requests and replies. Buffers in memory that is shared with a client do not count."""
    calls_max: int = 1024
    """Calls under way: those that wait for a disk or for other servers."""
    waiting_max: int = 16384
    """Calls that wait for their turn."""
    wait_s_max: float = 2.0
    """Seconds that a call waits for its turn. One that comes after one that has waited for half of it is refused."""

    def __post_init__(self) -> None:
        if self.bytes_max < HEADER_BYTES_MAX + PAYLOAD_BYTES_MAX:
            raise ValueError(f"bytes_max has no room for one large message: {self.bytes_max}")
        if self.calls_max < SHARES or self.waiting_max < 1:
            raise ValueError(f"calls_max must be at least {SHARES}, waiting_max at least 1: {self}")
        if self.wait_s_max <= 0:
            raise ValueError(f"wait_s_max must be above 0: {self.wait_s_max}")


class Clock(Protocol):
    """What is needed of a runtime."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Whose thread everything happens in."""

    def now_s(self) -> float:
        """Monotonic seconds."""


class Turn:
    """A request that takes its turn, from its header to the last byte of its answer."""

    __slots__ = ("cost", "fills_bytes", "held_bytes", "is_under_way", "since_s", "unsent_bytes", "waits")

    def __init__(self, *, held_bytes: int, fills_bytes: int, weight: int) -> None:
        """`held_bytes`: of memory, from now on; `fills_bytes`: as soon as it begins. `weight`: bytes it moves."""
        self.held_bytes = held_bytes
        self.fills_bytes = fills_bytes
        self.cost = min(weight + CALL_COST_BYTES, COST_MAX)
        self.waits = False
        self.is_under_way = False
        self.unsent_bytes = 0
        """Of its reply."""
        self.since_s = 0.0

    def begin(self) -> None:
        """Its turn has come."""
        raise NotImplementedError

    def refuse(self, error: Overloaded) -> None:
        """It has waited too long."""
        raise NotImplementedError


class Line:
    """One client: what of it waits, and what is under way."""

    __slots__ = ("calls", "credit", "held_bytes", "unsent_bytes", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Turn] = deque()
        self.credit = 0
        """Bytes that it may begin before others have their turn."""
        self.calls = 0
        """Under way."""
        self.held_bytes = 0
        self.unsent_bytes = 0


class Turns:
    """The clients of one listener. Everything happens in the loop's thread."""

    def __init__(self, clock: Clock, config: LoadConfig) -> None:
        self.held_bytes = 0
        self.calls = 0
        """Under way."""
        self.waiting = 0
        self._clock = clock
        self._config = config
        self._ring: deque[Line] = deque()
        """Those with something waiting; the first one is next."""
        self._short: Turn | None = None
        """There is no memory for it, and nobody who needs some overtakes it, but for something small."""
        self._is_due = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._lag_s = 0.0
        """How long the last one waited."""

    def admit(self, line: Line, turn: Turn) -> None:
        """Take on a request, of which the header is here. Raises Overloaded."""
        config, size = self._config, turn.held_bytes
        if line.waiting or not self._is_free(line, size):
            if line.waiting and self._clock.now_s() - line.waiting[0].since_s > config.wait_s_max / 2:
                raise self._overloaded("what came before waits already")
            if self.waiting >= config.waiting_max:
                raise self._overloaded(f"{self.waiting} calls wait")
            if self.held_bytes + size > config.bytes_max or (
                size > SMALL_BYTES_MAX and self._is_over_share(line, size)
            ):
                raise self._overloaded(f"{self.held_bytes} bytes are taken")
        self._hold(line, turn, size)

    def enter(self, line: Line, turn: Turn, *, at_once: bool) -> None:
        """A request is here. `at_once`: begin it now, if nobody waits."""
        if at_once and not self._ring and self._has_room(line, turn):
            self._begin(line, turn)
            return
        turn.since_s = self._clock.now_s()
        turn.waits = True
        if not line.waiting:
            self._ring.append(line)
        line.waiting.append(turn)
        self.waiting += 1
        self._go_on()
        if self._sweeper is None:
            self._set_sweeper()

    def withdraw(self, line: Line, turn: Turn) -> bool:
        """Nobody waits for it any more. True if it will not begin; it is to be ended all the same."""
        if not turn.waits:
            return False
        line.waiting.remove(turn)
        self._left(line, turn)
        return True

    def leave(self, line: Line) -> None:
        """The client is lost. What of it has not begun will not, and is to be ended all the same."""
        while line.waiting:
            self._left(line, line.waiting.popleft())

    def answer(self, line: Line, turn: Turn, size: int) -> None:
        """A reply of so many bytes is on its way."""
        self._rest(line, turn)
        turn.unsent_bytes = size
        line.unsent_bytes += size

    def end(self, line: Line, turn: Turn) -> None:
        """Its answer has left, or it was not to be."""
        line.held_bytes -= turn.held_bytes
        self.held_bytes -= turn.held_bytes
        line.unsent_bytes -= turn.unsent_bytes
        self._rest(line, turn)
        if self._ring:
            self._go_on()

    def _rest(self, line: Line, turn: Turn) -> None:
        if turn.is_under_way:
            turn.is_under_way = False
            line.calls -= 1
            self.calls -= 1

    # ---- what there is room for

    def _is_free(self, line: Line, size: int) -> bool:
        """It has nothing here, and wants little."""
        return not line.calls and not line.held_bytes and size <= SMALL_BYTES_MAX

    def _is_over_share(self, line: Line, size: int) -> bool:
        """It has its part, and half of all is taken."""
        config = self._config
        if line.calls >= config.calls_max // SHARES and self.calls >= config.calls_max // 2:
            return True
        is_much = line.held_bytes > 0 and line.held_bytes + size > config.bytes_max // SHARES
        return size > 0 and is_much and self.held_bytes + size > config.bytes_max // 2

    def _has_room(self, line: Line, turn: Turn) -> bool:
        config, size = self._config, turn.fills_bytes
        if line.unsent_bytes > UNSENT_BYTES_MAX or (line.calls and self._is_over_share(line, size)):
            if self._short is turn:
                self._short = None  # It is not memory that it waits for.
            return False
        if not line.calls and turn.held_bytes + size <= SMALL_BYTES_MAX:
            return True
        if self.calls >= config.calls_max:
            return False
        if not size:
            return True  # What it needs it has: to begin it brings memory back.
        if self._short is not None and self._short is not turn and self._short.waits:
            return False
        has_room = self.held_bytes + size <= config.bytes_max
        self._short = None if has_room else turn
        return has_room

    def _hold(self, line: Line, turn: Turn, size: int) -> None:
        line.held_bytes += size
        self.held_bytes += size

    # ---- who is next

    def _next(self) -> tuple[Line, Turn] | None:
        """Who may begin now; its line stays first until its credit is used up."""
        ring, stuck = self._ring, 0
        while stuck < len(ring):
            line = ring[0]
            turn = line.waiting[0]
            if not self._has_room(line, turn):
                stuck += 1
            elif line.credit < turn.cost:
                line.credit += QUANTUM_BYTES
                stuck = 0
            else:
                return line, turn
            ring.rotate(-1)
        return None

    def _begin(self, line: Line, turn: Turn) -> None:
        turn.is_under_way = True
        line.calls += 1
        self.calls += 1
        self._hold(line, turn, turn.fills_bytes)
        turn.held_bytes += turn.fills_bytes
        turn.begin()

    def _go_on(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._clock.loop.call_soon(self._round)

    def _round(self) -> None:
        self._is_due = False
        for _ in range(ROUND_CALLS_MAX):
            found = self._next()
            if found is None:
                return  # Until something ends.
            line, turn = found
            line.waiting.popleft()
            line.credit -= turn.cost
            self._left(line, turn)
            self._lag_s = self._clock.now_s() - turn.since_s
            self._begin(line, turn)
        if self._ring:
            self._go_on()

    def _left(self, line: Line, turn: Turn) -> None:
        """It does not wait any more."""
        turn.waits = False
        self.waiting -= 1
        if not line.waiting:
            line.credit = 0
            self._ring.remove(line)

    # ---- who has waited too long

    def _set_sweeper(self) -> None:
        self._sweeper = self._clock.loop.call_later(self._config.wait_s_max / 4, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        since_s = self._clock.now_s() - self._config.wait_s_max
        for line in list(self._ring):
            while line.waiting and line.waiting[0].since_s <= since_s:
                turn = line.waiting.popleft()
                self._left(line, turn)
                self._lag_s = self._config.wait_s_max
                turn.refuse(self._overloaded(f"a call has waited for {self._config.wait_s_max:g} s"))
        if self._ring:
            self._set_sweeper()

    def _overloaded(self, what: str) -> Overloaded:
        retry_after_s = min(max(self._lag_s, RETRY_S_MIN), self._config.wait_s_max)
        return Overloaded(f"the server has too much to do: {what}", retry_after_s=retry_after_s)
