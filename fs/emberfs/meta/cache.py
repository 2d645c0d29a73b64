"""Paths that were looked up lately: what `stat` answers without walking again.

An entry is good as long as no row it was made from has changed, and the KV can tell that from its commit history
(`KV.unchanged`), so the answer is always the one a fresh walk would give. An engine that cannot tell caches nothing.
"""

from __future__ import annotations

from ..kv.types import KV
from ..messages import InodeReply

ENTRIES_MAX = 16_384
"""About 1 KB each."""


class _Entry:
    __slots__ = ("keys", "reply", "stamp")

    def __init__(self, stamp: int, keys: tuple[bytes, ...], reply: InodeReply) -> None:
        self.stamp = stamp
        self.keys = keys
        self.reply = reply


class StatCache:
    """Path -> reply. Oldest out first."""

    def __init__(self, kv: KV) -> None:
        self._kv = kv
        self._entries: dict[str, _Entry] = {}

    def get(self, path: str) -> InodeReply | None:
        """What `path` leads to, if that is known and still so."""
        entry = self._entries.get(path)
        if entry is None:
            return None
        stamp = self._kv.stamp()
        if stamp != entry.stamp:
            if stamp is None or not self._kv.unchanged(entry.keys, entry.stamp):
                del self._entries[path]
                return None
            entry.stamp = stamp
        return entry.reply

    def put(self, path: str, stamp: int | None, keys: tuple[bytes, ...], reply: InodeReply) -> None:
        """Keep a reply that was made from `keys` as they were at `stamp`."""
        if stamp is None:
            return
        if len(self._entries) >= ENTRIES_MAX:
            del self._entries[next(iter(self._entries))]
        self._entries[path] = _Entry(stamp, keys, reply)
