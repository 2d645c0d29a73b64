"""Is a history of reads and updates of chunks linearizable? Wing and Gong's search, with memory, chunk by chunk.

    history = History()
    call = history.begin(chunk, Write(0, b"abc"))
    ...
    history.end(call, Outcome.DONE)             # or UNKNOWN, or NOTHING; a read also says what it got
    for chunk, reason in failures(history): ...

A chunk is a register whose value is its whole content; an absent chunk has the value b"". Every operation happens at
one moment between its begin and its end. One whose outcome is unknown happens at one moment after its begin, or never.
Chunks are independent of each other, so each is judged by itself (linearizability is a local property).

The search (Wing and Gong 1993, with the memory of Lowe 2017): take an operation that began before any other open one
ended, apply it, go on; come back where it led nowhere. What has been taken and the value that came of it are
remembered, so nothing is tried twice. A read that fits is taken at once: taking it earlier never hurts.

Does not know: servers, clients or time; only the order of begins and ends.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

STATES_MAX = 50_000
"""A search that has seen so many states gives up: the history is too concurrent to be judged."""


class Outcome(enum.Enum):
    """How a call ended, as its caller knows."""

    DONE = "done"
    NOTHING = "nothing"
    """It has certainly not happened, and never will."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Write:
    """The payload lies at `offset`; a gap before it is zeros."""

    offset: int
    payload: bytes

    def apply(self, value: bytes) -> bytes:
        end = self.offset + len(self.payload)
        return value[: self.offset].ljust(self.offset, b"\0") + self.payload + value[end:]


@dataclass(frozen=True, slots=True)
class Replace:
    """The chunk is exactly the payload."""

    payload: bytes

    def apply(self, value: bytes) -> bytes:
        return self.payload


@dataclass(frozen=True, slots=True)
class Truncate:
    """At most `length` bytes are left."""

    length: int

    def apply(self, value: bytes) -> bytes:
        return value[: self.length]


@dataclass(frozen=True, slots=True)
class Remove:
    """Nothing is left."""

    def apply(self, value: bytes) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class Read:
    """Asks for [offset, offset + length)."""

    offset: int
    length: int


Operation = Write | Replace | Truncate | Remove | Read


@dataclass(slots=True, eq=False)
class Call:
    """One operation of one client."""

    chunk: bytes
    operation: Operation
    client: str
    begun: int
    """Place of its begin in the order of all begins and ends."""
    begun_s: float
    ended: int | None = None
    """None: it never came to an end."""
    ended_s: float | None = None
    outcome: Outcome = Outcome.UNKNOWN
    got: bytes = b""
    """What a read got."""

    def __str__(self) -> str:
        operation, got = _shown(self.operation), f" -> {_bytes(self.got)}" if isinstance(self.operation, Read) else ""
        end = "" if self.ended_s is None else f"{self.ended_s:.4f}"
        return f"{self.begun_s:.4f}..{end} {self.client} {operation} {self.outcome.value}{got}"


class History:
    """What clients did, as they saw it."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._events = 0

    def begin(self, chunk: bytes, operation: Operation, *, client: str = "", now_s: float = 0.0) -> Call:
        """A client is about to send it."""
        call = Call(chunk, operation, client, self._next(), now_s)
        self.calls.append(call)
        return call

    def end(self, call: Call, outcome: Outcome, got: bytes = b"", *, now_s: float = 0.0) -> None:
        """The client knows as much as it ever will."""
        call.ended, call.ended_s, call.outcome, call.got = self._next(), now_s, outcome, got

    def _next(self) -> int:
        self._events += 1
        return self._events


def failures(history: History) -> Iterator[tuple[bytes, str]]:
    """(chunk, story) of each chunk whose calls fit no order."""
    chunks: dict[bytes, list[Call]] = {}
    for call in history.calls:
        chunks.setdefault(call.chunk, []).append(call)
    for chunk, calls in chunks.items():
        if (stuck := check(calls)) is not None:
            yield chunk, stuck


def check(calls: Sequence[Call]) -> str | None:
    """None if there is an order; else how far the search came, as a text. All calls are of one chunk."""
    relevant = [call for call in calls if _matters(call)]
    # Most of what is unknown never happened, or was overwritten unseen: often an order without it is found at once.
    seen = b"\0".join(call.got for call in relevant if isinstance(call.operation, Read))
    likely = [call for call in relevant if call.outcome is not Outcome.UNKNOWN or _is_seen(call, seen)]
    if len(likely) < len(relevant) and _Search(likely, burst_max=1).run() is None:
        return None
    for burst_max in (1, 2, 3):
        if _Search(relevant, burst_max=burst_max).run() is None:
            return None
    return _Search(relevant, burst_max=len(relevant)).run()


def _matters(call: Call) -> bool:
    if call.outcome is Outcome.NOTHING:
        return False
    return call.outcome is Outcome.DONE or not isinstance(call.operation, Read)


def _is_seen(call: Call, seen: bytes) -> bool:
    operation = call.operation
    return isinstance(operation, Write | Replace) and operation.payload[:8] in seen


@dataclass(slots=True)
class _Frame:
    """One choice on the way: the calls taken so far (a bit each), the value they gave, and what can come next."""

    taken: int
    value: bytes
    burst: int = 0
    """How many optional calls were taken since a read was."""
    choices: list[int] = field(default_factory=list)


class _Search:
    """Depth first over the orders of `calls`, with at most `burst_max` calls of unknown outcome between two reads.

    Few are enough nearly always, and the orders with few of them are quickly looked through.
    """

    def __init__(self, calls: Sequence[Call], *, burst_max: int) -> None:
        self._burst_max = burst_max
        self._calls = sorted(calls, key=lambda call: call.begun)
        self._ends = [
            call.ended if call.outcome is Outcome.DONE and call.ended is not None else None for call in self._calls
        ]
        self._needed = sum(1 << index for index, end in enumerate(self._ends) if end is not None)
        self._seen: dict[tuple[int, bytes], list[tuple[int, int]]] = {}
        """(needed calls taken, value) -> the optional calls taken with them, and the burst: only the smallest."""
        self._states = 0
        self._best: tuple[int, int, bytes] = (-1, 0, b"")

    def run(self) -> str | None:
        """None if an order was found, else a story."""
        stack = [self._frame(0, b"", 0)]
        while stack:
            frame = stack[-1]
            if frame.taken & self._needed == self._needed:
                return None
            if self._states > STATES_MAX:
                return self._story("too many states to decide")
            if not frame.choices:
                stack.pop()
                continue
            index = frame.choices.pop()
            operation = self._calls[index].operation
            assert not isinstance(operation, Read)
            value = operation.apply(frame.value)
            is_optional = self._ends[index] is None
            if is_optional and (value == frame.value or frame.burst == self._burst_max):
                continue
            following = self._frame(frame.taken | 1 << index, value, frame.burst + is_optional)
            if self._is_new(following):
                self._states += 1
                stack.append(following)
        return self._story("no order fits")

    def _is_new(self, frame: _Frame) -> bool:
        """Not if we were here with as few, or fewer, of the optional calls: these may still be taken later."""
        optional = frame.taken & ~self._needed
        sets = self._seen.setdefault((frame.taken & self._needed, frame.value), [])
        if any(seen & optional == seen and burst <= frame.burst for seen, burst in sets):
            return False
        sets.append((optional, frame.burst))
        return True

    def _frame(self, taken: int, value: bytes, burst: int) -> _Frame:
        """Take every read that fits, then list the updates that may come next: the most urgent one last."""
        while True:
            candidates = self._candidates(taken)
            reads = [index for index in candidates if isinstance(self._calls[index].operation, Read)]
            fitting = [index for index in reads if _fits(self._calls[index], value)]
            if not fitting:
                break
            for index in fitting:
                taken |= 1 << index
                burst = 0
        count = (taken & self._needed).bit_count()
        if count > self._best[0]:
            self._best = (count, taken, value)
        never = 1 << 62
        updates = [index for index in candidates if not isinstance(self._calls[index].operation, Read)]
        updates.sort(key=lambda index: -(self._ends[index] or never - self._calls[index].begun))
        return _Frame(taken, value, burst, updates)

    def _candidates(self, taken: int) -> list[int]:
        """Calls not taken that began before the first end of any of them."""
        limit: int | None = None
        found: list[int] = []
        for index in range(_trailing_ones(taken), len(self._calls)):
            if taken >> index & 1:
                continue
            if limit is not None and self._calls[index].begun > limit:
                break
            end = self._ends[index]
            found.append(index)
            if end is not None and (limit is None or end < limit):
                limit = end
        return found

    def _story(self, reason: str) -> str:
        _, taken, value = self._best
        waiting = [self._calls[index] for index in self._candidates(taken)]
        done = [call for index, call in enumerate(self._calls) if taken >> index & 1][-12:]
        lines = [f"{reason}; at best these are taken last:", *(f"  {call}" for call in done)]
        lines += [f"that gives {_bytes(value)}, and of these none fits:", *(f"  {call}" for call in waiting)]
        return "\n".join(lines)


def _fits(call: Call, value: bytes) -> bool:
    operation = call.operation
    assert isinstance(operation, Read)
    return value[operation.offset : operation.offset + operation.length] == call.got


def _trailing_ones(bits: int) -> int:
    """How many of the lowest bits are set."""
    return (~bits & (bits + 1)).bit_length() - 1


def _shown(operation: Operation) -> str:
    match operation:
        case Write(offset, payload):
            return f"write {_bytes(payload)} at {offset}"
        case Replace(payload):
            return f"replace {_bytes(payload)}"
        case Truncate(length):
            return f"truncate {length}"
        case Read(offset, length):
            return f"read [{offset}, {offset + length})"
        case _:
            return "remove"


def _bytes(content: bytes) -> str:
    """Short, and still telling one content from another."""
    return repr(content) if len(content) <= 40 else f"{content[:28]!r}..{content[-8:]!r} ({len(content)} bytes)"
