"""Threads for adapters whose engine must not wait: each task ends, with a result or with what stands for none.

Invariants:
  - A task that has waited for longer than `timeout_s` is not begun: its engine has given it up, or will.
  - Stores have a thread of their own, one since a cache writes one batch after the other: they keep no load waiting.
  - Once `close` has returned no task is under way, and those that come end at once; in a forked child all do.

Does not know: what the tasks do.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .settings import Settings

T = TypeVar("T")

log = logging.getLogger(__name__)


class Workers:
    """See the module. Any thread may submit."""

    def __init__(self, settings: Settings, name: str, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s, self._now_s = settings.timeout_s, now_s
        self._loads = ThreadPoolExecutor(settings.threads, thread_name_prefix=f"emberkv-{name}")
        self._stores = ThreadPoolExecutor(1, thread_name_prefix=f"emberkv-{name}-store")
        self._process = os.getpid()
        self.is_closed = False

    def load(self, work: Callable[[], T], otherwise: T, then: Callable[[T], None]) -> Future[None]:
        """Do `work`, which reads or looks up, and give its result to `then`; `otherwise` if there is none."""
        return self._submit(self._loads, work, otherwise, then)

    def store(self, work: Callable[[], T], otherwise: T, then: Callable[[T], None]) -> Future[None]:
        """The same for work that writes."""
        return self._submit(self._stores, work, otherwise, then)

    def close(self) -> None:
        """End it: what is under way ends, since it has the engine's memory, and what waits is not begun."""
        self.is_closed = True
        if os.getpid() == self._process:
            self._loads.shutdown()
            self._stores.shutdown()

    def _submit(
        self, threads: ThreadPoolExecutor, work: Callable[[], T], otherwise: T, then: Callable[[T], None]
    ) -> Future[None]:
        late_s = self._now_s() + self._timeout_s

        def run() -> None:
            result = otherwise
            try:
                if not self.is_closed and self._now_s() < late_s:
                    result = work()
            except Exception:  # A task that never ended would hang its request.
                log.exception("a task of the KV cache failed")
            then(result)

        if not self.is_closed and os.getpid() == self._process:
            try:
                return threads.submit(run)
            except RuntimeError:  # It was closed just now, or Python is ending.
                pass
        ended: Future[None] = Future()
        then(otherwise)
        ended.set_result(None)
        return ended
