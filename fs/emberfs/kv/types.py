"""The ordered transactional KV: the interface every engine gives, and its limits.

The model is FoundationDB's: a transaction reads at one snapshot and commits only if nothing it read has changed since
(serializable, optimistic). Blind atomic operations (`add`, `max`) read nothing and so never conflict.

    txn = kv.begin()
    value = await txn.get(key)
    txn.put(key, new)
    await txn.commit()          # Conflict: nothing happened, run it again (`kv.run` does)

Contract of every engine:
  - Keys are ordered as unsigned bytes. All limits below are the same everywhere, and are checked when a key or value
    is handed in, so that what works on one engine works on all.
  - `get`/`range` return what was committed at one moment, plus the transaction's own writes; if that is no longer to be
    had they raise `Conflict`. The moment is the `begin`, or for an engine elsewhere the first read.
  - A commit is atomic and, once `commit` returned, durable. Before that no other transaction sees it.
  - `commit` raises `Conflict` (nothing happened), `NoSpace` (nothing happened), `TargetFailed` or `UpdateUnknown`
    (it may have happened). An engine elsewhere raises `Unavailable` (nothing happened) if it cannot be reached.
  - A transaction may be kept across awaits; an engine keeps no lock, snapshot or reader slot for it meanwhile.
  - Range ends: `begin` inclusive, `end` exclusive.

Does not know: inodes, chunks, or who calls it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")

KEY_BYTES_MAX = 511
"""LMDB's default key limit, and so everybody's."""
VALUE_BYTES_MAX = 1 << 20
TRANSACTION_BYTES_MAX = 16 << 20
"""Keys and values written by one transaction, together."""
TRANSACTION_TIME_MAX_S = 10.0
"""A transaction older than this may raise `Conflict` whatever it read: engines forget history after that."""
RANGE_ROWS_MAX = 10_000
"""One `range` call returns at most this many rows; page on with the last key + b"\\x00"."""
RUN_ATTEMPTS_MAX = 50


class Transaction(Protocol):
    """One attempt. After `commit` or an error, drop it."""

    async def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        """The value or None. `snapshot=True` adds no read conflict: the commit does not depend on this key."""

    async def get_many(self, keys: Sequence[bytes], *, snapshot: bool = False) -> list[bytes | None]:
        """`get` of several keys in one step, in the order of `keys`."""

    async def range(
        self,
        begin: bytes,
        end: bytes,
        *,
        limit: int = RANGE_ROWS_MAX,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[tuple[bytes, bytes]]:
        """Up to `limit` rows of [begin, end) in key order (backwards if `reverse`).

        The read conflict covers the keys that were looked at: [begin, last row] when `limit` cut the answer short.
        """

    def put(self, key: bytes, value: bytes) -> None:
        """Set a row."""

    def delete(self, key: bytes) -> None:
        """Remove a row; absent is fine."""

    def delete_range(self, begin: bytes, end: bytes) -> None:
        """Remove every row of [begin, end)."""

    def add(self, key: bytes, delta: int) -> None:
        """Atomic: the row as a little-endian signed 64-bit integer (absent is 0), plus `delta`."""

    def max(self, key: bytes, value: int) -> None:
        """Atomic: the row becomes max(row, value), same encoding as `add`."""

    async def commit(self, *, reclaims: bool = False) -> None:
        """Apply everything, durably. `reclaims=True` marks a transaction that frees space: it may use the reserve."""


class KV(Protocol):
    """An ordered transactional key-value store."""

    def begin(self) -> Transaction:
        """Start a transaction, at the newest committed state of now or of its first read."""

    def stamp(self) -> int | None:
        """A number for the newest applied state; None if the engine cannot say `unchanged`."""

    def unchanged(self, keys: Sequence[bytes], stamp: int) -> bool:
        """True if no row of `keys` has changed since `stamp`. False may also mean that it is not known any more."""

    async def run(self, work: Callable[[Transaction], Awaitable[T]], *, reclaims: bool = False) -> T:
        """Run `work` in a transaction and commit it, again after each `Conflict` (at most RUN_ATTEMPTS_MAX times)."""

    async def close(self) -> None:
        """Wait for commits in flight and let go of the files. Further calls raise `StoreClosed`."""


def encode_int(value: int) -> bytes:
    """The row format of `add` and `max`: little-endian signed 64-bit."""
    return value.to_bytes(8, "little", signed=True)


def decode_int(row: bytes | None) -> int:
    """The integer of an `add`/`max` row; an absent row is 0."""
    return 0 if row is None else int.from_bytes(row, "little", signed=True)
