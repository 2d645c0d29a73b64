"""What a running call is given, in every executor."""

from __future__ import annotations

import traceback
from collections.abc import Callable

from .interruption import Interruption


class CallContext:
    """The `Context` of one call."""

    def __init__(
        self, worker: str, *, cpus: int, memory_bytes: int, state: dict[str, object], report: Callable[[bytes], None]
    ) -> None:
        self.worker = worker
        self.cpus = cpus
        self.memory_bytes = memory_bytes
        self.state = state
        self._report = report
        self._interruption = Interruption()

    def report(self, note: bytes) -> None:
        """Tells the caller something while the call runs."""
        self._report(note)

    def on_interrupt(self, interrupt: Callable[[], None] | None) -> None:
        """What to call when the call is cancelled; None: nothing any more."""
        self._interruption.on(None if interrupt is None else lambda: _call(interrupt))

    def interrupt(self) -> None:
        """The call is cancelled."""
        self._interruption.request()


def _call(interrupt: Callable[[], None]) -> None:
    try:
        interrupt()
    except Exception:
        # There is nobody to raise it to: the call goes on, and what it prints is seen.
        traceback.print_exc()
