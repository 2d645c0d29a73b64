"""What a server served, by kind of request: how many, how long, how much, and where the time went.

The stages of a request add up to the whole of it:

    queue     from the arrival of its last byte until its handler starts
    disk      files are read or written, or a flush is waited for, one that is shared included
    servers   other servers are waited for: the next of the chain, the kv server
    work      the rest: computing, waiting for locks, and for the process to get to it; making the answer

Reading checks bytes as they land, so the checksums of a read are in `disk`. Not in it: the way of the bytes to the
server and of the answer back.

Costs a microsecond a request, and bounded memory: kinds are the messages that there are. Does not know: the
network, or who reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

from .histogram import Histogram
from .stopwatch import Stopwatch

STAGES = ("queue", "disk", "servers", "work")


class KindStats(msgspec.Struct, array_like=True):
    """One kind of request. A stage's histogram has those requests only that were in it."""

    whole: Histogram = msgspec.field(default_factory=Histogram)
    queue: Histogram = msgspec.field(default_factory=Histogram)
    disk: Histogram = msgspec.field(default_factory=Histogram)
    servers: Histogram = msgspec.field(default_factory=Histogram)
    work: Histogram = msgspec.field(default_factory=Histogram)
    payload_bytes: int = 0
    """In either direction."""
    errors: dict[str, int] = msgspec.field(default_factory=dict)
    """Class of the error -> how many ended with it. They are in the histograms too."""

    def stage(self, name: str) -> Histogram:
        """One of STAGES."""
        histogram: Histogram = getattr(self, name)
        return histogram

    def merge(self, other: KindStats) -> None:
        """Add what `other` holds."""
        self.whole.merge(other.whole)
        for name in STAGES:
            self.stage(name).merge(other.stage(name))
        self.payload_bytes += other.payload_bytes
        for error, count in other.errors.items():
            self.errors[error] = self.errors.get(error, 0) + count

    def since(self, earlier: KindStats) -> KindStats:
        """What came after `earlier`, an older copy of this one."""
        errors = {error: count - earlier.errors.get(error, 0) for error, count in self.errors.items()}
        return KindStats(
            whole=self.whole.since(earlier.whole),
            queue=self.queue.since(earlier.queue),
            disk=self.disk.since(earlier.disk),
            servers=self.servers.since(earlier.servers),
            work=self.work.since(earlier.work),
            payload_bytes=self.payload_bytes - earlier.payload_bytes,
            errors={error: count for error, count in errors.items() if count > 0},
        )


_Served = tuple[float, float, float, float]
"""(queue, from the handler's start to its end, of that disk, of that servers) in seconds"""

PENDING_MAX = 256
"""Requests of a kind that are summed up together, which costs less than one by one."""


class Meter:
    """Of one process. `record` is for the loop's thread, `kinds` for any."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = clock()
        self._kinds: dict[str, KindStats] = {}
        self._pending: dict[str, list[_Served]] = {}
        self._lock = threading.Lock()
        """Of what is summed up: the metrics page is made in a thread of its own."""

    @property
    def up_s(self) -> float:
        """Seconds that it has counted for."""
        return self._clock() - self._began_s

    @property
    def kinds(self) -> dict[str, KindStats]:
        """By kind of request. What is in it goes on being counted."""
        for kind in list(self._pending):
            self._sum_up(kind)
        return dict(self._kinds)

    def watch(self) -> Stopwatch:
        """For a request whose handler starts now."""
        return Stopwatch(self._clock)

    def record(self, kind: str, watch: Stopwatch, *, arrived_s: float, payload_bytes: int, error: str) -> None:
        """A request has been served; `error`: the class of what it ended with, "" for an answer."""
        served_s = watch.stop()
        try:
            pending, stats = self._pending[kind], self._kinds[kind]
        except KeyError:
            pending, stats = self._pending[kind], self._kinds[kind] = [], KindStats()
        pending.append((max(watch.began_s - arrived_s, 0.0), served_s, watch.disk_s, watch.servers_s))
        if payload_bytes:
            stats.payload_bytes += payload_bytes
        if error:
            stats.errors[error] = stats.errors.get(error, 0) + 1
        if len(pending) >= PENDING_MAX:
            self._sum_up(kind)

    def _sum_up(self, kind: str) -> None:
        with self._lock:
            # More may come meanwhile: what is cut off here is what we have seen.
            pending, stats = self._pending[kind], self._kinds[kind]
            served = pending[:]
            del pending[: len(served)]
            stats.whole.record_all([queue_s + served_s for queue_s, served_s, _, _ in served])
            stats.queue.record_all([queue_s for queue_s, _, _, _ in served])
            stats.disk.record_all([disk_s for _, _, disk_s, _ in served if disk_s])
            stats.servers.record_all([servers_s for _, _, _, servers_s in served if servers_s])
            stats.work.record_all([served_s - disk_s - servers_s for _, served_s, disk_s, servers_s in served])
