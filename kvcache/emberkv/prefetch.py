"""`Prefetch`: pages on their way into the caller's memory, layer by layer, while the caller goes on.

The first layer of all pages is read first, so a model may begin with it while the others come. A deadline or `cancel`
ends it between two reads: what is there by then counts, the rest are misses.

Invariants: the buffers are written to until `is_done` and never after it: whoever cancels waits for the read that is
under way. They are kept alive until then.

Does not know: how pages are read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from emberfs.errors import EmberError

STEP_PAGES = 32
STEP_BYTES = 16 << 20
"""So much is read before it is looked whether there is time for more, and one piece at least."""


class Prefetch:
    """See the module. Get one from `KVCache.prefetch`."""

    def __init__(
        self,
        views: Sequence[memoryview],
        *,
        layers: int,
        has_time: Callable[[], bool],
        read: Callable[[Sequence[int], Sequence[memoryview], int], list[bool]],
    ) -> None:
        """`read` fills views with the bytes of pages from some byte on, and says which of them are right."""
        self.layers = layers
        self._views, self._has_time, self._read = views, has_time, read
        self._changed = threading.Condition()
        self._reached = [0] * len(views)
        """Of each page the layers that are there."""
        self._layers_done = 0
        self._is_done = self._is_cancelled = False

    @property
    def is_done(self) -> bool:
        """Nothing is written to the buffers any more."""
        return self._is_done

    def wait(self, layer: int | None = None, *, timeout_s: float | None = None) -> list[bool]:
        """Which pages are there up to `layer`, from 0 on, or whole. Returns when all are that will be, or when the time
        is over: what is not there then may still come, unless it `is_done`."""
        wanted = self.layers if layer is None else layer + 1
        with self._changed:
            self._changed.wait_for(lambda: self._is_done or self._layers_done >= wanted, timeout_s)
            return [reached >= wanted for reached in self._reached]

    def cancel(self) -> list[bool]:
        """Read no more, and wait for what is under way. Which pages are there whole."""
        self._is_cancelled = True
        return self.wait()

    def run(self) -> None:
        """Read all there is time for. Called once, by some thread."""
        try:
            for layer in range(self.layers):
                if not self._run_layer(layer):
                    break
                with self._changed:
                    self._layers_done = layer + 1
                    self._changed.notify_all()
        except EmberError:
            pass  # The store or the cache was closed: what is not there is a miss.
        finally:
            with self._changed:
                self._is_done = True
                self._changed.notify_all()

    def _run_layer(self, layer: int) -> bool:
        """Whether there was time for all of it."""
        left = [page for page, reached in enumerate(self._reached) if reached == layer]
        while left:
            if self._is_cancelled or not self._has_time():
                return False
            size = max(len(self._views[left[0]]) // self.layers, 1)
            count = max(1, min(STEP_PAGES, STEP_BYTES // size))
            step, left = left[:count], left[count:]
            sizes = [len(self._views[page]) // self.layers for page in step]
            parts = [self._views[p][layer * n : (layer + 1) * n] for p, n in zip(step, sizes, strict=True)]
            for page, good in zip(step, self._read(step, parts, layer), strict=True):
                self._reached[page] += good
        return True
