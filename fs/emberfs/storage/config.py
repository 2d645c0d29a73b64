"""The settings of a storage node.

Does not know: how they are used.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """Settings of one storage node. `heartbeat_s` and `lease_s` must suit the manager's."""

    heartbeat_s: float = 0.5
    """Seconds between two heartbeats."""
    lease_s: float = 2.5
    """Targets serve for so many seconds from the sending of the last heartbeat that the primary manager answered."""
    forward_wait_s: float = 10.0
    """So long the head tries to get a write committed, through changes of the chain, before it is UpdateUnknown."""
    retry_s: float = 0.1
    """Pause before something is sent to the successor again in the same chain version."""
    tombstone_s: float = 600.0
    """The trace of a removed chunk stays at least this long."""
    resync_bytes_per_s: int = 200 << 20
    """All resyncs of this node together send no more than this."""
    resync_parallel: int = 2
    """So many chains are brought up to date at the same time."""
    scrub_interval_s: float = 14 * 86400.0
    """Each chunk is read back from the medium once in this time, if `scrub_bytes_per_s` is enough. 0: never."""
    scrub_bytes_per_s: int = 20 << 20
    """The scrub never reads faster than this; 20 MiB/s are 23 TiB in two weeks."""

    def __post_init__(self) -> None:
        positive = ("heartbeat_s", "lease_s", "forward_wait_s", "retry_s", "tombstone_s", "resync_bytes_per_s")
        for name in (*positive, "scrub_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0: {getattr(self, name)}")
        if self.scrub_interval_s < 0:
            raise ValueError(f"scrub_interval_s must be at least 0: {self.scrub_interval_s}")
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError(f"a lease of {self.lease_s} s ends before a second heartbeat of {self.heartbeat_s} s")
        if self.resync_parallel < 1:
            raise ValueError(f"resync_parallel must be at least 1: {self.resync_parallel}")
