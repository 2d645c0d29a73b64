"""The writing half of every transaction: limits are checked, and writes folded into a `Batch` until the commit.

Does not know: reading, conflicts, where the batch goes.
"""

from __future__ import annotations

from .batch import Batch
from .limits import check_interval, check_key, check_value, refuse_transaction
from .types import TRANSACTION_BYTES_MAX


class Writing:
    """Base of the transactions: the methods of `types.Transaction` that buffer a write."""

    __slots__ = ("_batch", "_done")

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._done = False

    def put(self, key: bytes, value: bytes) -> None:
        check_key(key)
        check_value(value)
        self._writing(len(key) + len(value)).put(bytes(key), bytes(value))

    def delete(self, key: bytes) -> None:
        check_key(key)
        self._writing(len(key)).delete(bytes(key))

    def delete_range(self, begin: bytes, end: bytes) -> None:
        check_interval(begin, end)
        if begin < end:
            self._writing(len(begin) + len(end)).delete_range(bytes(begin), bytes(end))

    def add(self, key: bytes, delta: int) -> None:
        check_key(key)
        self._writing(len(key) + 8).add(bytes(key), delta)

    def max(self, key: bytes, value: int) -> None:
        check_key(key)
        self._writing(len(key) + 8).max(bytes(key), value)

    def _writing(self, size_bytes: int) -> Batch:
        assert not self._done, "a transaction was used after its commit"
        if self._batch is None:
            self._batch = Batch()
        self._batch.size_bytes += size_bytes
        if self._batch.size_bytes > TRANSACTION_BYTES_MAX:
            refuse_transaction()
        return self._batch
