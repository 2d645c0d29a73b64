"""The timing of the managers among themselves. What all nodes go by is in `settings`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import LimitExceeded
from ..settings import CLOCK_DRIFT_MAX


@dataclass(frozen=True, kw_only=True, slots=True)
class ManagerConfig:
    """Must be the same on all managers of a cluster."""

    renew_s: float = 0.25
    """How often a primary renews its lease, and the others look at it."""
    primary_lease_s: float = 1.0
    """How long a manager acts as primary after the send time of its last successful renewal."""
    takeover_s: float = 1.1
    """How long another one must have seen the lease row unchanged before it takes over."""
    tick_s: float = 0.1
    """How often the primary looks whether anything must change."""
    wait_s_max: float = 30.0
    """The longest that a `GetRouting` waits."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise LimitExceeded(f"{field.name} must be more than 0, not {getattr(self, field.name)}")
        # A lease on a slow clock must be over when the wait on a fast one is.
        if self.primary_lease_s * (1 + CLOCK_DRIFT_MAX) > self.takeover_s * (1 - CLOCK_DRIFT_MAX):
            raise LimitExceeded("takeover_s must be at least 4.1 % more than primary_lease_s: clocks drift")
        if 2 * self.renew_s > self.primary_lease_s:
            raise LimitExceeded("primary_lease_s must be at least twice renew_s: one renewal may be late")
