"""A circuit breaker: who fails several times in a row is left alone for a while, and then tried once.

    closed      calls go through; so many failures in a row open it
    open        calls do not: until its time is over, which grows with each opening and is jittered, so that clients
                that lost the same service do not all come back at once
    half-open   one call goes through, the probe: it closes the breaker, or opens it for longer

Does not know: what is called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from emberfs.errors import LimitExceeded

JITTER = 0.5
"""Of a time, so much may be missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerConfig:
    """When it opens, and for how long."""

    failures: int = 5
    """So many in a row."""
    wait_s: float = 0.5
    """The first time; twice as long with each probe that fails."""
    wait_s_max: float = 15.0

    def __post_init__(self) -> None:
        if self.failures < 1 or not 0 < self.wait_s <= self.wait_s_max:
            raise LimitExceeded(f"a breaker opens after a failure at least, for a time above 0: not {asdict(self)}")


class Breaker:
    """Safe to use from many threads. `random`: from 0 to 1."""

    def __init__(self, config: BreakerConfig, *, now_s: Callable[[], float], random: Callable[[], float]) -> None:
        self._config, self._now_s, self._random = config, now_s, random
        self._lock = threading.Lock()
        self._failures = 0
        """In a row."""
        self._openings = 0
        """Since a call last succeeded; 0: it is closed."""
        self._until_s = 0.0
        self._is_probing = False
        self._opened_total = self._refused_total = 0

    @property
    def state(self) -> str:
        """ "closed", "open" or "half-open"."""
        if not self._openings:
            return "closed"
        return "half-open" if self._is_probing or self._now_s() >= self._until_s else "open"

    def figures(self) -> dict[str, Any]:
        """For people: the state, and what happened since the start."""
        with self._lock:
            return {
                "state": self.state,
                "failures": self._failures,
                "opens_in_s": max(self._until_s - self._now_s(), 0.0) if self._openings else 0.0,
                "opened": self._opened_total,
                "refused": self._refused_total,
            }

    def admit(self) -> bool:
        """Whether a call may go through. Each that may ends with `succeeded`, `failed` or `abandoned`."""
        with self._lock:
            if not self._openings:
                return True
            if self._is_probing or self._now_s() < self._until_s:
                self._refused_total += 1
                return False
            self._is_probing = True
            return True

    def succeeded(self) -> None:
        """It was answered, whatever the answer was."""
        with self._lock:
            self._failures = self._openings = 0
            self._is_probing = False

    def failed(self) -> None:
        """Nobody answered, or not in time."""
        with self._lock:
            self._failures += 1
            is_late = self._openings and not self._is_probing  # It began before the breaker opened.
            self._is_probing = False
            if is_late or self._failures < self._config.failures:
                return
            wait_s = min(self._config.wait_s * 2**self._openings, self._config.wait_s_max)
            self._until_s = self._now_s() + wait_s * (1 - JITTER * self._random())
            self._openings += 1
            self._opened_total += 1

    def abandoned(self) -> None:
        """Nothing is known of it: it was interrupted."""
        with self._lock:
            self._is_probing = False
