"""A call in the hands of an executor: the `Handle` that every one of them gives out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from .base import Call
from .interruption import Interruption

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Submission:
    """A call, whoever waits for it, and how far it is. Only its `Slots` ends it."""

    def __init__(
        self,
        call: Call,
        *,
        memory_bytes: int,
        cancel: Callable[[Submission], None],
        on_report: Callable[[bytes], None] | None,
        on_output: Callable[[str], None] | None,
    ) -> None:
        self.call = call
        self.memory_bytes = memory_bytes
        """`call.memory_bytes`, or its share."""
        self.future: Future[bytes] = Future()
        # From here on future.cancel() refuses: it would promise an end that has not come.
        self.future.set_running_or_notify_cancel()
        self.started_s: float | None = None
        self.cancelled_s: float | None = None
        """When it was cancelled, by `time.monotonic()`."""
        self.interruption = Interruption()
        """Requested when it is cancelled after its turn has come."""
        self._cancel = cancel
        self._on_report = on_report
        self._on_output = on_output

    def cancel(self) -> None:
        """Asks the call to stop. Returns at once; does nothing once it has ended."""
        self._cancel(self)

    def report(self, note: bytes) -> None:
        """Hands on what the call reports."""
        _tell(self._on_report, note)

    def output(self, text: str) -> None:
        """Hands on what the call prints."""
        _tell(self._on_output, text)


def _tell(listener: Callable[[_T], None] | None, what: _T) -> None:
    if listener is None:
        return
    try:
        listener(what)
    except Exception:
        # The listener's mistake is neither the call's nor the executor's.
        _log.exception("a listener to a running call failed")
