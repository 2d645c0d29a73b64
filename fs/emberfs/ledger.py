"""What the clients of this process did with a store, and where the time of their calls went.

The time of a call is that of the servers it waited for, of the disk, and the rest: `total_s = servers_s + disk_s +
client_s`. In a store that this process owns the services run in the caller's thread: there are no servers to wait for,
and a call is so short that the disk is told apart only for who asks for it (`is_close`).

Costs a few hundred nanoseconds a call, a microsecond where servers are waited for. Memory is bounded: a line for each
kind of call and of request that there is.

Does not know: what an operation is, beyond the name of the coroutine that does it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CodeType

from .histogram import Histogram
from .stopwatch import Stopwatch


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationStats:
    """The calls of one kind, or the requests of one kind."""

    count: int
    errors: int
    """How many raised. They are in the times too."""
    total_s: float
    servers_s: float
    """Of that, waited for servers: for what they did, for the network, and in the queues of both sides."""
    disk_s: float
    """Of that, waited for a disk of this process, where that was told apart."""
    p50_s: float
    p99_s: float
    max_s: float
    payload_bytes: int
    """Of requests, in either direction; of calls it is not counted."""

    @property
    def client_s(self) -> float:
        """The rest: in this process."""
        return self.total_s - self.servers_s - self.disk_s


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientStats:
    """Of all clients that this process has of one store, since the first was opened. A forked child begins anew."""

    operations: dict[str, OperationStats]
    """By what was called: get, put, stat, entries (what `list` does), batch_read; of open files file.read and so on."""
    requests: dict[str, OperationStats]
    """What was sent to servers for them, by kind of message; `lane`: reads that went over lanes, each to one server or
    several. Empty while this process owns the store."""


class _Line:
    """Sums of one kind."""

    __slots__ = ("disk_s", "errors", "histogram", "payload_bytes", "servers_s", "times")

    def __init__(self) -> None:
        self.histogram = Histogram()
        self.errors = 0
        self.servers_s = 0.0
        self.disk_s = 0.0
        self.payload_bytes = 0
        self.times: list[float] = []
        """Seconds that are not in the histogram yet. Appending is safe from any thread."""

    def add(self, other: _Line) -> None:
        self.histogram.merge(other.histogram)
        self.errors += other.errors
        self.servers_s += other.servers_s
        self.disk_s += other.disk_s
        self.payload_bytes += other.payload_bytes

    def stats(self) -> OperationStats:
        histogram = self.histogram
        return OperationStats(
            count=histogram.count,
            errors=self.errors,
            total_s=histogram.total_s,
            servers_s=self.servers_s,
            disk_s=self.disk_s,
            p50_s=histogram.quantile_s(0.5),
            p99_s=histogram.quantile_s(0.99),
            max_s=histogram.max_s,
            payload_bytes=self.payload_bytes,
        )


TIMES_MAX = 256
"""Calls of a kind that are noted before they are summed up: together they cost less, and nobody waits long for it."""


class Ledger:
    """Kept by a portal. Any thread may note calls; they are summed up a few hundred at a time, by whoever came last."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.is_close = False
        """Calls have a stopwatch: where servers are waited for, and for who wants to know of the disk."""
        self._clock = clock
        self._operations: dict[CodeType, _Line] = {}
        self._requests: dict[str, _Line] = {}
        self._over_lanes: list[tuple[CodeType, float, float, int]] = []
        """Arguments of `note_lane` that are not summed up yet."""
        self._lock = threading.Lock()
        """Of the sums."""

    def watch(self) -> Stopwatch:
        """For a call that begins."""
        return Stopwatch(self._clock, self)

    def note(self, code: CodeType, seconds: float) -> None:
        """A call of the coroutine `code` has ended."""
        try:
            times = self._operations[code].times
        except KeyError:
            times = self._line(code).times
        times.append(seconds)
        if len(times) >= TIMES_MAX:
            self._sum_up(self._operations[code])

    def note_failure(self, code: CodeType) -> None:
        """That call raised."""
        with self._lock:
            self._line(code).errors += 1

    def note_waits(self, code: CodeType, watch: Stopwatch) -> None:
        """That call had a stopwatch."""
        watch.stop()
        with self._lock:
            line = self._line(code)
            line.servers_s += watch.servers_s
            line.disk_s += watch.disk_s

    def note_lane(self, code: CodeType, seconds: float, waited_s: float, payload_bytes: int) -> None:
        """A read that the coroutine `code` would have done went over lanes, and waited so long for their servers."""
        self._over_lanes.append((code, seconds, waited_s, payload_bytes))
        if len(self._over_lanes) >= TIMES_MAX:
            self._sum_up_lanes()

    def _sum_up_lanes(self) -> None:
        with self._lock:
            reads = self._over_lanes[:]
            del self._over_lanes[: len(reads)]
            lane = self._requests.setdefault("lane", _Line()) if reads else _Line()
            for code, seconds, waited_s, payload_bytes in reads:
                line = self._line(code)
                line.histogram.record(seconds)
                line.servers_s += waited_s
                lane.histogram.record(waited_s)
                lane.servers_s += waited_s
                lane.payload_bytes += payload_bytes

    def _line(self, code: CodeType) -> _Line:
        return self._operations.setdefault(code, _Line())

    def _sum_up(self, line: _Line) -> None:
        with self._lock:
            # Others go on noting: what is cut off here is what we have seen.
            times = line.times[:]
            del line.times[: len(times)]
            line.histogram.record_all(times)

    def record(self, kind: str, *, whole_s: float, payload_bytes: int, error: str) -> None:
        """See `stopwatch.Sent`. In the loop's thread."""
        line = self._requests.get(kind)
        if line is None:
            line = self._requests[kind] = _Line()
        line.histogram.record(whole_s)
        line.servers_s += whole_s
        line.payload_bytes += payload_bytes
        if error:
            line.errors += 1

    def stats(self) -> ClientStats:
        """A copy."""
        self._sum_up_lanes()
        for line in list(self._operations.values()):
            self._sum_up(line)
        operations = _sums((_name(code), line) for code, line in list(self._operations.items()))
        return ClientStats(operations=operations, requests=_sums(list(self._requests.items())))


def _sums(lines: Iterable[tuple[str, _Line]]) -> dict[str, OperationStats]:
    sums: dict[str, _Line] = {}
    for name, line in lines:
        sums.setdefault(name, _Line()).add(line)
    return {name: sums[name].stats() for name in sorted(sums)}


def _name(code: CodeType) -> str:
    """ "Core.get" -> "get", "Client.get_into.<locals>.fill" -> "get_into", "WritableFile.write" -> "file.write"."""
    owner, _, method = code.co_qualname.partition(".<locals>")[0].rpartition(".")
    return f"file.{method}" if owner.endswith("File") else method
