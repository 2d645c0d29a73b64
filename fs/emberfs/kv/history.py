"""What recent commits wrote: the memory that decides whether a transaction conflicts.

Invariants:
  - A `History` knows every write of the versions (`forgotten_version`, newest]. A reader older than that may have
    missed a write, so it is told so rather than answered.
  - Nothing here is ever on disk: after a restart no transaction is open, so there is nothing to conflict with.

Does not know: values, engines, or time (it is handed the time).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

Interval = tuple[bytes, bytes]
"""[begin, end) of keys."""


class WriteSet:
    """The keys and intervals that one group of commits writes."""

    __slots__ = ("clears", "keys")

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.clears: list[Interval] = []

    def extend(self, keys: Iterable[bytes], clears: Iterable[Interval]) -> None:
        self.keys.update(keys)
        self.clears.extend(clears)

    def clears_key(self, key: bytes) -> bool:
        return any(begin <= key < end for begin, end in self.clears)

    def clears_interval(self, begin: bytes, end: bytes) -> bool:
        """True if a clear meets [begin, end)."""
        return any(cleared < end and begin < cleared_end for cleared, cleared_end in self.clears)

    def touches_key(self, key: bytes) -> bool:
        return key in self.keys or self.clears_key(key)

    def touches_interval(self, begin: bytes, end: bytes) -> bool:
        """True if a write meets [begin, end)."""
        return self.clears_interval(begin, end) or any(begin <= key < end for key in self.keys)

    def touches_any(self, keys: Collection[bytes], intervals: Iterable[Interval]) -> bool:
        if not self.keys.isdisjoint(keys) or any(self.touches_interval(*interval) for interval in intervals):
            return True
        return bool(self.clears) and any(self.clears_key(key) for key in keys)


class History:
    """The write sets of the applied versions of the last seconds, newest last."""

    __slots__ = ("_entries", "_last_clear", "_last_write", "forgotten_version")

    def __init__(self) -> None:
        self._entries: deque[tuple[int, float, WriteSet]] = deque()
        self._last_write: dict[bytes, int] = {}
        self._last_clear = 0
        self.forgotten_version = 0

    def record(self, version: int, now_s: float, written: WriteSet) -> None:
        self._entries.append((version, now_s, written))
        self._last_write.update(dict.fromkeys(written.keys, version))
        if written.clears:
            self._last_clear = version

    def forget(self, before_s: float) -> None:
        """Drop what was recorded before `before_s`."""
        while self._entries and self._entries[0][1] < before_s:
            version, _, written = self._entries.popleft()
            self.forgotten_version = version
            for key in written.keys:
                if self._last_write[key] == version:
                    del self._last_write[key]

    def touches_key(self, key: bytes, since: int) -> bool:
        """True if `key` was written in a version above `since`."""
        if self._last_write.get(key, 0) > since:
            return True
        return self._last_clear > since and any(written.clears_key(key) for written in self._newer(since))

    def touches_interval(self, begin: bytes, end: bytes, since: int) -> bool:
        """True if a key of [begin, end) was written in a version above `since`."""
        return any(written.touches_interval(begin, end) for written in self._newer(since))

    def _newer(self, since: int) -> Iterable[WriteSet]:
        for version, _, written in reversed(self._entries):
            if version <= since:
                return
            yield written
