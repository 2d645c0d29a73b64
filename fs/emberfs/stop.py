"""When a server has to end: a signal says so, or whoever has seen why.

A signal's handler runs between two steps of the main thread, also where that holds the lock of an `Event`, whose `set`
then waits for itself: a server that is told to end at such a moment never does. A byte can be written anywhere.

Does not know: what ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import weakref
from collections.abc import Iterable

ENDING = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """What an `Event` would be. Made, and waited for, by the main thread."""

    def __init__(self, signals: Iterable[signal.Signals] = ENDING) -> None:
        """From now on these set it."""
        reads, self._writes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for each in (reads, self._writes):
            weakref.finalize(self, os.close, each).atexit = False  # A signal may come later still.
        self._poll = select.poll()
        self._poll.register(reads, select.POLLIN)
        for number in signals:
            signal.signal(number, lambda *_: self.set())

    def set(self) -> None:
        """It is time. From any thread, or handler."""
        with contextlib.suppress(BlockingIOError):  # So often that nobody needs to be told again.
            os.write(self._writes, b"!")

    def wait(self, timeout_s: float) -> bool:
        """Whether it is time, now or within so long.

        Not for ever: only the main thread handles a signal, and another one may have been woken by it.
        """
        return bool(self._poll.poll(timeout_s * 1000))
