"""Pages on their way to the store, put by a thread so that no step of the engine waits for a service.

Pages of a request are put in order. What there is no room for, here or at the service, is not put, and neither is
what comes after it.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from emberkv import KVCache
from emberkv.adapters.door import FAILED, Door
from torch import Tensor

from .trail import Trail

PENDING_BYTES_MAX = 256 << 20
"""Payloads that wait for the thread, at most."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pages:
    """Payloads [n, bytes] of one kind, of pages `first` on of a request."""

    trail: Trail
    kind: str
    first: int
    payloads: Tensor
    tokens: tuple[int, ...]
    """Of the pages, for routers that follow KV events; none: they are not told."""

    @property
    def size_bytes(self) -> int:
        return self.payloads.numel()


class Writer:
    """Of one engine."""

    def __init__(self, door: Door) -> None:
        self.stored_bytes = 0
        """Payloads that the service wanted, so far."""
        self.refused_pages = 0
        self._door = door
        self._thread = ThreadPoolExecutor(1, "embertrain-prefix")
        self._lock = threading.Lock()
        self._pending_bytes = 0
        self._last: Future[None] | None = None

    def add(self, pages: Pages) -> None:
        """Have them put."""
        with self._lock:
            has_room = self._pending_bytes + pages.size_bytes <= PENDING_BYTES_MAX or not self._pending_bytes
            if pages.trail.is_broken or not has_room:
                pages.trail.is_broken = True
                self.refused_pages += len(pages.payloads)
                return
            self._pending_bytes += pages.size_bytes
        self._last = self._thread.submit(self._put, pages)

    def flush(self) -> None:
        """All that was added is with the service, or refused."""
        if self._last is not None:
            wait([self._last])
        self._door.call(KVCache.flush, None)

    def close(self) -> None:
        """The same, and the end."""
        self.flush()
        self._thread.shutdown()

    def _put(self, pages: Pages) -> None:
        count, first = len(pages.payloads), pages.first
        states = [FAILED] * count
        try:
            if not pages.trail.is_lost:
                states = self._door.call(lambda kv: _put(kv, pages), states)
        except Exception:  # Nobody looks at what becomes of the thread's work.
            log.exception("pages %d to %d could not be put", first, first + count)
        finally:
            lost = sum(state in (FAILED, "refused") for state in states)
            self.refused_pages += lost
            self.stored_bytes += states.count("stored") * (pages.size_bytes // count)
            # States are at the end of a chain or beside it: only rows hold what comes after them.
            if lost and pages.kind == "rows":
                pages.trail.is_lost = pages.trail.is_broken = True
            log.debug("pages %d to %d, %s: %s", first, first + count, pages.kind, set(states))
            with self._lock:
                self._pending_bytes -= pages.size_bytes


def _put(kv: KVCache, pages: Pages) -> list[str]:
    first, keys = pages.first, pages.trail.keys
    return kv.put(
        keys[first : first + len(pages.payloads)],
        list(pages.payloads.numpy()),
        parent=keys[first - 1] if first else None,
        kind=pages.kind,
        tokens=list(pages.tokens) or None,
    )
