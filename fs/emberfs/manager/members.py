"""Who is alive, and what the nodes say of their targets. In memory only: a new primary begins with silence.

Invariants: nobody is dead within `wait_s` (what it is when one asks) after the receipt of a heartbeat, nor after this
manager began to act as primary.

Does not know: chains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..messages import TargetReport
from ..routing import LocalState


@dataclass(frozen=True, slots=True)
class Heard:
    """The last heartbeat of a node."""

    at_s: float
    reports: dict[bytes, TargetReport]


class Members:
    """The last heartbeats."""

    def __init__(self, *, wait_s: Callable[[], float]) -> None:
        """`wait_s`: how long after it was granted every lease is over."""
        self._wait_s = wait_s
        self._heard: dict[str, Heard] = {}

    def forget_all(self) -> None:
        """This manager begins as primary."""
        self._heard.clear()

    def forget(self, node: str) -> None:
        self._heard.pop(node, None)

    def hear(self, node: str, reports: Sequence[TargetReport], *, now_s: float) -> bool:
        """Take a heartbeat. True if it says anything new that matters to chains."""
        before, after = self.reports(node), {report.target: report for report in reports}
        self._heard[node] = Heard(now_s, after)
        return _states(before) != _states(after)

    def last_heard_s(self, node: str) -> float | None:
        """When; None: never since this manager is primary."""
        heard = self._heard.get(node)
        return None if heard is None else heard.at_s

    def reports(self, node: str) -> dict[bytes, TargetReport]:
        """What it said last; nothing if it was never heard."""
        heard = self._heard.get(node)
        return {} if heard is None else heard.reports

    def is_dead(self, node: str, *, now_s: float, since_s: float) -> bool:
        """True if its lease is over, whoever gave it. `since_s`: when this manager began to act as primary."""
        heard = self._heard.get(node)
        last_s = since_s if heard is None else max(heard.at_s, since_s)
        return now_s - last_s >= self._wait_s()

    def is_known(self, node: str, *, now_s: float, since_s: float) -> bool:
        """False while a primary that has just begun does not know yet whether the node lives."""
        return node in self._heard or self.is_dead(node, now_s=now_s, since_s=since_s)

    def dead(self, nodes: Iterable[str], *, now_s: float, since_s: float) -> frozenset[str]:
        """Those of `nodes` that are dead."""
        return frozenset(node for node in nodes if self.is_dead(node, now_s=now_s, since_s=since_s))


def _states(reports: Mapping[bytes, TargetReport]) -> dict[bytes, tuple[bytes, LocalState, int]]:
    """The reports without what changes all the time."""
    return {target: (each.generation, each.state, each.synced_version) for target, each in reports.items()}
