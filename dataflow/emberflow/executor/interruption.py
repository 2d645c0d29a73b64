"""A request to stop something that runs: what carries it out may be named before or after it is made."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Interruption:
    """At most one request, and what it is to call. Safe to use from many threads."""

    def __init__(self) -> None:
        # Held while the callback runs, so that after on(None) it is known not to; reentrant, for it may call on(None).
        self._lock = threading.RLock()
        self._requested = False
        self._interrupt: Callable[[], None] | None = None

    def on(self, interrupt: Callable[[], None] | None) -> None:
        """What to call on a request, at once if it was made; None: nothing any more."""
        with self._lock:
            self._interrupt = interrupt
            if self._requested and interrupt is not None:
                interrupt()

    def request(self) -> None:
        """Calls what there is to call. A second time does nothing."""
        with self._lock:
            if self._requested:
                return
            self._requested = True
            if self._interrupt is not None:
                self._interrupt()
