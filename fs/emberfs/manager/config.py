"""The timing of the cluster, as the manager keeps it. See "Leases" in docs/replication.md."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import LimitExceeded

CLOCK_DRIFT_MAX = 0.02
"""How far a monotonic clock may run fast or slow; all margins are made for it on both sides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ManagerConfig:
    """Must be the same on all managers of a cluster."""

    renew_s: float = 0.25
    """How often a primary renews its lease, and the others look at it."""
    primary_lease_s: float = 1.0
    """How long a manager acts as primary after the send time of its last successful renewal."""
    takeover_s: float = 1.1
    """How long another one must have seen the lease row unchanged before it takes over."""
    storage_lease_s: float = 2.5
    """How long a server serves after the send time of its last answered heartbeat, by its own clock."""
    dead_after_s: float = 3.0
    """How long after the receipt of its last heartbeat a node counts as dead."""
    session_timeout_s: float = 60.0
    """How long a client may be silent before its session ends."""
    tick_s: float = 0.1
    """How often the primary looks whether anything must change."""
    wait_s_max: float = 30.0
    """The longest that a `GetRouting` waits."""
    moves_max: int = 4
    """Chains that are on the move between nodes at the same time."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise LimitExceeded(f"{field.name} must be more than 0, not {getattr(self, field.name)}")
        for shorter, longer in (("primary_lease_s", "takeover_s"), ("storage_lease_s", "dead_after_s")):
            # A lease on a slow clock must be over when the wait on a fast one is.
            if getattr(self, shorter) * (1 + CLOCK_DRIFT_MAX) > getattr(self, longer) * (1 - CLOCK_DRIFT_MAX):
                raise LimitExceeded(f"{longer} must be at least 4.1 % more than {shorter}: clocks drift")
        if 2 * self.renew_s > self.primary_lease_s:
            raise LimitExceeded("primary_lease_s must be at least twice renew_s: one renewal may be late")
