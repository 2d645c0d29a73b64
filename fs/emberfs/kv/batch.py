"""The writes of one transaction, in a normal form that is both an overlay to read through and a job for an engine.

Normal form: first every interval of `clears` is emptied, then each key of `writes` gets its write: new bytes, `None`
for a deletion, or steps of integer arithmetic on the row as it will be when the batch is applied. Each call folds into
it, so a batch is never longer than the rows it touches.

Does not know: versions, conflicts, engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Literal

from ..errors import EmberError, LimitExceeded
from .types import decode_int, encode_int

INT_MAX = (1 << 63) - 1
INT_MIN = -(1 << 63)

Row = tuple[bytes, bytes]
Step = tuple[Literal["add", "max"], int]
Write = bytes | tuple[Step, ...] | None
Scan = Callable[[bytes, bytes, int, bool], list[Row]]
"""(begin, end, limit, reverse): up to `limit` rows of [begin, end)."""


class Batch:
    """What a transaction writes, and while it is being committed, how that went."""

    __slots__ = ("clears", "error", "reclaims", "size_bytes", "waiter", "writes")

    def __init__(self) -> None:
        self.clears: list[tuple[bytes, bytes]] = []
        self.writes: dict[bytes, Write] = {}
        self.size_bytes = 0
        self.reclaims = False
        self.waiter: asyncio.Future[None] | None = None
        self.error: EmberError | None = None

    def put(self, key: bytes, value: bytes) -> None:
        self.writes[key] = value

    def delete(self, key: bytes) -> None:
        self.writes[key] = None

    def delete_range(self, begin: bytes, end: bytes) -> None:
        self.clears.append((begin, end))
        for key in [key for key in self.writes if begin <= key < end]:
            del self.writes[key]

    def add(self, key: bytes, delta: int) -> None:
        self._compute(key, ("add", delta))

    def max(self, key: bytes, value: int) -> None:
        self._compute(key, ("max", value))

    def _compute(self, key: bytes, step: Step) -> None:
        needs_base, value = self.own(key)
        if not needs_base:
            self.writes[key] = compute((step,), value)
            return
        steps = self.writes.get(key, ())
        assert isinstance(steps, tuple)
        if steps and steps[-1][0] == step[0]:
            kind, number = steps[-1]
            steps, step = steps[:-1], (kind, number + step[1] if kind == "add" else max(number, step[1]))
        self.writes[key] = (*steps, step)

    def own(self, key: bytes) -> tuple[bool, bytes | None]:
        """(False, the value) if the batch alone decides it, (True, None) if it depends on the row below."""
        if key in self.writes:
            write = self.writes[key]
            return (True, None) if isinstance(write, tuple) else (False, write)
        return (not _covers(self.clears, key), None)

    def resolve(self, key: bytes, base: bytes | None) -> bytes | None:
        """The value of `key`, given the row below (or below `clears`: None)."""
        return resolve(self.writes[key], base) if key in self.writes else base


def compute(steps: Iterable[Step], base: bytes | None) -> bytes:
    """The row after `steps` on `base`. Raises LimitExceeded: it leaves 64 bits, or is no integer."""
    value = decode_int(base)
    for kind, number in steps:
        value = value + number if kind == "add" else max(value, number)
    if not INT_MIN <= value <= INT_MAX:
        raise LimitExceeded("an integer row would leave 64 bits")
    return encode_int(value)


def resolve(write: Write, base: bytes | None) -> bytes | None:
    """The row after `write` on `base`."""
    return compute(write, base) if isinstance(write, tuple) else write


def _covers(clears: Iterable[tuple[bytes, bytes]], key: bytes) -> bool:
    return any(begin <= key < end for begin, end in clears)


def overlay(
    scan: Scan,
    writes: Mapping[bytes, Write],
    clears: Collection[tuple[bytes, bytes]],
    begin: bytes,
    end: bytes,
    limit: int,
    reverse: bool,
) -> list[Row]:
    """Up to `limit` rows of [begin, end) as they are after `clears`, then `writes`, on top of `scan`."""
    rows: list[Row] = []
    for page, page_begin, page_end in _pages(scan, begin, end, limit, reverse):
        rows += merge(page, writes, clears, page_begin, page_end, reverse)
        if len(rows) >= limit:
            break
    return rows[:limit]


def merge(
    page: list[Row],
    writes: Mapping[bytes, Write],
    clears: Collection[tuple[bytes, bytes]],
    begin: bytes,
    end: bytes,
    reverse: bool,
) -> list[Row]:
    """The rows of [begin, end) after `clears`, then `writes`, where `page` is all there is below."""
    merged = {key: value for key, value in page if not _covers(clears, key)}
    for key, write in writes.items():
        if begin <= key < end:
            value = resolve(write, merged.pop(key, None))
            if value is not None:
                merged[key] = value
    return sorted(merged.items(), reverse=reverse)


def looked_at(rows: list[Row], begin: bytes, end: bytes, limit: int, reverse: bool) -> tuple[bytes, bytes]:
    """The part of [begin, end) that an answer of up to `limit` rows depends on."""
    if len(rows) < limit:
        return begin, end
    last = rows[-1][0]
    return (last, end) if reverse else (begin, last + b"\x00")


def _pages(scan: Scan, begin: bytes, end: bytes, limit: int, reverse: bool) -> Iterator[tuple[list[Row], bytes, bytes]]:
    """(rows below, begin, end) until [begin, end) is covered: cut where a scan stopped because of `limit`."""
    while begin < end:
        page = scan(begin, end, limit, reverse)
        page_begin, page_end = looked_at(page, begin, end, limit, reverse)
        yield page, page_begin, page_end
        begin, end = (begin, page_begin) if reverse else (page_end, end)
