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

    def __post_init__(self) -> None:
        for name in ("heartbeat_s", "lease_s", "forward_wait_s", "retry_s", "tombstone_s", "resync_bytes_per_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0: {getattr(self, name)}")
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError(f"a lease of {self.lease_s} s ends before a second heartbeat of {self.heartbeat_s} s")
        if self.resync_parallel < 1:
            raise ValueError(f"resync_parallel must be at least 1: {self.resync_parallel}")
