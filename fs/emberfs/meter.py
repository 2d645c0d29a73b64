"""What a server served, by kind of request: how many, how long, how much, and where the time went.

The stages of a request add up to the whole of it:

    queue     from the arrival of its last byte until its handler starts
    disk      files are read or written, or a flush is waited for, one that is shared included
    servers   other servers are waited for: the next of the chain, the kv server
    work      the rest: computing, waiting for locks, and for the process to get to it

Reading checks bytes as they land, so the checksums of a read are in `disk`. Not in it: the way of the bytes to the
server and of the answer back.

Costs a microsecond or two a request, and bounded memory: kinds are the messages that there are. Does not know: the
network, or who reads it.
"""

from __future__ import annotations

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


class Meter:
    """Of one process."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = clock()
        self.kinds: dict[str, KindStats] = {}

    @property
    def up_s(self) -> float:
        """Seconds that it has counted for."""
        return self._clock() - self._began_s

    def watch(self) -> Stopwatch:
        """For a request whose handler starts now."""
        return Stopwatch(self._clock)

    def record(self, kind: str, watch: Stopwatch, *, arrived_s: float, payload_bytes: int, error: str) -> None:
        """A request has been served; `error`: the class of what it ended with, "" for an answer."""
        served_s = watch.stop()
        stats = self.kinds.get(kind)
        if stats is None:
            stats = self.kinds[kind] = KindStats()
        queue_s = max(watch.began_s - arrived_s, 0.0)
        disk_s, servers_s = watch.disk_s, watch.servers_s
        stats.whole.record(queue_s + served_s)
        stats.queue.record(queue_s)
        stats.work.record(served_s - disk_s - servers_s)
        if disk_s:
            stats.disk.record(disk_s)
        if servers_s:
            stats.servers.record(servers_s)
        stats.payload_bytes += payload_bytes
        if error:
            stats.errors[error] = stats.errors.get(error, 0) + 1
