"""The settings of a storage node.

Does not know: how they are used.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """Settings of one storage node, beside those of the whole cluster (`emberfs.settings`)."""

    forward_wait_s: float = 10.0
    """So long the head tries to get a write committed, through changes of the chain, before it is UpdateUnknown."""
    retry_s: float = 0.1
    """Pause before something is sent to the successor again in the same chain version."""
    resync_parallel: int = 2
    """So many chains are brought up to date at the same time, and so many that only move beside them."""

    def __post_init__(self) -> None:
        for name in ("forward_wait_s", "retry_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0: {getattr(self, name)}")
        if self.resync_parallel < 1:
            raise ValueError(f"resync_parallel must be at least 1: {self.resync_parallel}")
