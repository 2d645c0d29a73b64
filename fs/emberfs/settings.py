"""The configuration of a cluster: what holds on all its nodes, and changes while they run.

The manager keeps it, with a version, and hands it out with heartbeat replies. What one process is told in its file
(`server.config`) is never in here, and the other way round: decision 0011.

Invariants: a lease (`Settings.lease_s`) ends before its wait (`dead_after_s`) on clocks that drift apart.

Does not know: who goes by a setting, or rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

import msgspec

from .errors import LimitExceeded, NotFound

CLOCK_DRIFT_MAX = 0.02
"""How far a monotonic clock may run fast or slow; all margins are made for it on both sides."""
LEASE_FRACTION = 5 / 6
"""Of `dead_after_s`: the rest is for clocks that drift, and for what is decided late."""
assert LEASE_FRACTION * (1 + CLOCK_DRIFT_MAX) < 1 - CLOCK_DRIFT_MAX

Value = int | float
"""Bytes and counts are whole numbers, seconds need not be."""


def _setting(default: Value, *, least: Value, most: Value, means: str) -> Any:
    return field(default=default, metadata={"least": least, "most": most, "means": means})


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One value each, in force everywhere. Bounds are checked when a value is set, see `checked`."""

    dead_after_s: float = _setting(
        3.0,
        least=2.0,
        most=60.0,
        means="a node counts as dead when it was silent for so long; it serves for 5/6 of that without an answer",
    )
    heartbeat_s: float = _setting(0.5, least=0.1, most=20.0, means="pause between two heartbeats of a node")
    session_timeout_s: float = _setting(
        60.0, least=8.0, most=86400.0, means="a client that is silent for so long is given up; it calls every 5 s"
    )
    resync_bytes_per_s: int = _setting(
        200 << 20, least=1 << 20, most=1 << 40, means="what a disk sends at most to replicas that their chain lacks"
    )
    migration_bytes_per_s: int = _setting(
        50 << 20, least=1 << 20, most=1 << 40, means="what a disk sends at most to replicas of chains that only move"
    )
    moves_max: int = _setting(4, least=1, most=1000, means="chains that move to other nodes at the same time")
    tombstone_s: float = _setting(
        600.0, least=1.0, most=30 * 86400.0, means="the trace of a removed chunk stays at least so long"
    )
    scrub_interval_s: float = _setting(
        14 * 86400.0,
        least=0.0,
        most=3650 * 86400.0,
        means="each chunk is read back from the disk once in this time, if scrub_bytes_per_s is enough; 0: never",
    )
    scrub_bytes_per_s: int = _setting(
        20 << 20, least=1 << 20, most=1 << 40, means="a disk is never scrubbed faster; 20 MiB/s are 23 TiB in two weeks"
    )
    gc_delay_s: float = _setting(
        300.0, least=0.0, most=30 * 86400.0, means="readers of a removed or replaced file may go on for so long"
    )
    gc_interval_s: float = _setting(60.0, least=0.1, most=86400.0, means="pause between two looks at the garbage")
    trash_s: float = _setting(7 * 86400.0, least=0.0, most=3650 * 86400.0, means="removed files stay in the trash")

    @property
    def lease_s(self) -> float:
        """A node serves for so long after the send time of its last answered heartbeat, by its own clock."""
        return self.dead_after_s * LEASE_FRACTION

    @classmethod
    def of(cls, values: Mapping[str, Value]) -> Settings:
        """With defaults for what is not in `values`. Names of a newer release mean nothing here."""
        own: dict[str, Any] = {name: value for name, value in values.items() if name in SETTINGS}
        return cls(**own)

    def values(self) -> dict[str, Value]:
        """Name -> value, of all."""
        return asdict(self)


SETTINGS: dict[str, Field[Any]] = {each.name: each for each in fields(Settings)}
"""Name -> default and metadata: least, most, and in words what it means."""


class Config(msgspec.Struct, frozen=True, array_like=True):
    """The configuration as it is published."""

    version: int = 0
    """Counts changes. 0: none was heard yet."""
    values: dict[str, Value] = {}
    """Of all settings that the manager knows."""
    chosen: tuple[str, ...] = ()
    """Those that somebody has set; the others have their defaults."""
    waits_s: float = Settings().dead_after_s
    """So long after it was granted every lease is over. More than `dead_after_s` for a while after that was lowered."""


def known(name: str) -> Field[Any]:
    """Raises NotFound for a name that is none."""
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        raise NotFound(f"there is no setting {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return SETTINGS[name]


def checked(name: str, value: Value) -> Value:
    """`value` as the setting has it. Raises NotFound, LimitExceeded: it cannot be."""
    setting = known(name)
    least, most = setting.metadata["least"], setting.metadata["most"]
    if not least <= value <= most:
        raise LimitExceeded(f"{name} is {least} to {most}, not {value}")
    if isinstance(setting.default, float):
        return float(value)
    if value != int(value):
        raise LimitExceeded(f"{name} is a whole number, not {value}")
    return int(value)


def check_together(settings: Settings) -> None:
    """Raises LimitExceeded: each may be, and all of them cannot."""
    if settings.tombstone_s < settings.dead_after_s:
        raise LimitExceeded(
            f"tombstone_s {settings.tombstone_s} is less than dead_after_s {settings.dead_after_s}: "
            "servers would forget what they have heard nothing of"
        )
    if 2 * settings.heartbeat_s > settings.lease_s:
        raise LimitExceeded(
            f"heartbeat_s {settings.heartbeat_s} is too long for dead_after_s {settings.dead_after_s}: the lease of "
            f"{settings.lease_s:.2f} s would end before a second heartbeat"
        )
