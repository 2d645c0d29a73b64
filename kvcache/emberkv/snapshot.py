"""A snapshot of an index: frames of a head and of its columns, and the index that they make.

A million pages are some 70 MB, written and read by columns: a page is never touched alone, or a restart would take the
time of as many puts. An *image* is a copy of the columns that nobody changes, so that another thread may encode it.

Does not know: files.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from .index import Index
from .journal import FORMAT, encode_frame, frames
from .keys import KEY_BYTES
from .page import HEADER_BYTES
from .segments import Segment, State
from .table import FREE, ORPHAN, PLACES

_BLOCK_BYTES = 64 << 20


class _Head(msgspec.Struct):
    format: int
    count: int
    """Slots."""
    tenants: list[str]
    quotas: list[int]
    trailing: list[int | None]
    segments: list[tuple[int, int, int, int]]
    """(id, size, state, end)"""
    next_segment: int
    orphans: list[tuple[int, bytes]]
    """(which slot, the parent that is not there)"""
    ttl_s: float = 0.0
    ttls: list[float] = []
    """Empty in a snapshot of a program that knew none."""


@dataclass(frozen=True, slots=True)
class Image:
    """What an index held at one moment. Columns are by slot, of free ones too."""

    keys: list[bytes]
    parent: Any
    used_s: Any
    pinned_s: Any
    tenant: Any
    places: list[Any]
    """Of each kind."""
    head: _Head
    """Its count and the numbers of its orphans are those of slots yet."""


def image_of(index: Index) -> Image:
    """A copy: some 20 ms a million pages."""
    table = index.table
    head = _Head(
        format=FORMAT,
        count=table.count,
        tenants=list(index.tenants),
        quotas=list(index.quotas),
        trailing=list(table.trailing),
        segments=[_segment(each) for each in index.segments],
        next_segment=index.segments.next_id,
        orphans=[(slot, key) for key, waiting in table.waiting() for slot in waiting],
        ttl_s=index.ttl_s,
        ttls=list(index.ttls),
    )
    columns = (table.parent, table.used_s, table.pinned_s, table.tenant)
    parent, used_s, pinned_s, tenant = (np.array(column) for column in columns)
    places = [each[: len(table.keys)].copy() for each in table.places]
    return Image(list(table.keys), parent, used_s, pinned_s, tenant, places, head)


def encode_image(image: Image) -> bytes:
    """A snapshot: all that an index held."""
    slots = np.flatnonzero(image.parent != FREE)
    number = np.full(len(image.keys) + 1, -1, np.int32)
    number[slots] = np.arange(len(slots), dtype=np.int32)
    parent = image.parent[slots]
    parent = np.where(parent >= 0, number[parent], parent).astype("<i4")
    head = msgspec.structs.replace(image.head, orphans=[(int(number[slot]), key) for slot, key in image.head.orphans])
    columns = [
        b"".join([image.keys[slot] for slot in slots.tolist()]),
        parent.tobytes(),
        image.used_s[slots].astype("<f8").tobytes(),
        image.pinned_s[slots].astype("<f8").tobytes(),
        image.tenant[slots].astype("<u2").tobytes(),
        *(places[slots].tobytes() for places in image.places),
    ]
    blocks = [column[begin : begin + _BLOCK_BYTES] for column in columns for begin in _begins(column)]
    return b"".join([encode_frame(msgspec.msgpack.encode(head)), *map(encode_frame, blocks)])


def _begins(column: bytes) -> Sequence[int]:
    return range(0, max(len(column), 1), _BLOCK_BYTES)


def _segment(segment: Segment) -> tuple[int, int, int, int]:
    """One whose end nobody knows is as it was found."""
    state, end = segment.state, segment.end
    if segment.unknown_bytes and state is State.SEALED:
        state, end = State.OPEN, end - segment.unknown_bytes
    return segment.id, segment.size_bytes, int(state), end


def decode_snapshot(data: bytes, *, segment_bytes: int) -> Index:
    """The index that `encode_image` has written. Raises ValueError for what is no whole snapshot."""
    parts = frames(data)
    try:
        head = msgspec.msgpack.decode(next(parts), type=_Head)
    except (StopIteration, msgspec.MsgspecError) as error:
        raise ValueError("not a snapshot of an index") from error
    if head.format != FORMAT:
        raise ValueError(f"a snapshot of format {head.format}: this program reads {FORMAT}")
    rest = b"".join(parts)
    index = Index(head.trailing, segment_bytes=segment_bytes)
    index.tenants, index.quotas = head.tenants, head.quotas
    index.ttl_s, index.ttls = head.ttl_s, head.ttls or [0.0] * len(head.tenants)
    for _ in head.tenants:
        index.table.add_tenant()
    _fill_table(index, head, memoryview(rest))
    _fill_segments(index, head)
    return index


def _fill_table(index: Index, head: _Head, rest: memoryview) -> None:
    table, count, begin = index.table, head.count, 0

    def column(dtype: Any) -> Any:
        nonlocal begin
        size = count * np.dtype(dtype).itemsize
        if begin + size > len(rest):
            raise ValueError("a snapshot that was cut")
        begin += size
        return np.frombuffer(rest[begin - size : begin], dtype)

    table.adopt_keys(column(f"V{KEY_BYTES}").tobytes())
    keys = table.keys
    parent, used_s, pinned_s, tenant = column("<i4"), column("<f8"), column("<f8"), column("<u2")
    table.count = count
    children = np.bincount(parent[parent >= 0], minlength=count).astype(np.uint32)
    table.parent, table.children = array("i", parent.tobytes()), array("I", children.tobytes())
    table.first, table.next, table.before = _siblings(parent)
    table.used_s, table.pinned_s = array("d", used_s.tobytes()), array("d", pinned_s.tobytes())
    table.tenant, table.held = array("H", tenant.tobytes()), array("I", bytes(4 * count))
    table.places = [np.concatenate([column(PLACES), np.zeros(max(count, 1024), PLACES)]) for _ in head.trailing]
    table.adopt_places()
    _count(index)
    for number in range(len(head.tenants)):
        mine = np.flatnonzero(tenant == number)
        table.adopt(number, {keys[slot]: slot for slot in mine.tolist()})
        leaves = mine[children[mine] == 0].tolist()
        heap = [(table.used_s[slot], slot, keys[slot]) for slot in leaves]
        heapq.heapify(heap)
        table.adopt_leaves(number, heap)
    for slot, key in head.orphans:
        assert table.parent[slot] == ORPHAN
        table.await_parent(slot, key)


def _siblings(parent: Any) -> tuple[array[int], array[int], array[int]]:
    """Of a column of parents the columns `first`, `next` and `before`."""
    first, after, before = (np.full(len(parent), -1, "<i4") for _ in range(3))
    order = np.argsort(parent, kind="stable")
    order = order[parent[order] >= 0]
    above = parent[order]
    is_same = above[1:] == above[:-1]
    after[order[:-1][is_same]] = order[1:][is_same]
    before[order[1:][is_same]] = order[:-1][is_same]
    begins = np.concatenate([[True], ~is_same]) if len(order) else np.zeros(0, bool)
    first[above[begins]] = order[begins]
    return array("i", first.tobytes()), array("i", after.tobytes()), array("i", before.tobytes())


def _count(index: Index) -> None:
    """Live bytes, from the places."""
    table = index.table
    tenant = np.asarray(table.tenant)
    for places in table.places:
        there = places[: table.count]
        sizes = np.where(there["segment"] != 0, there["length"].astype(np.int64) + HEADER_BYTES, 0)
        table.live_bytes += int(sizes.sum())
        for number in range(len(table.tenant_bytes)):
            table.tenant_bytes[number] += int(sizes[tenant == number].sum())


def _fill_segments(index: Index, head: _Head) -> None:
    segments, table = index.segments, index.table
    live_bytes: Counter[int] = Counter()
    for places in table.places:
        there = places[: table.count]
        there = there[there["segment"] != 0]
        ids, where = np.unique(there["segment"], return_inverse=True)
        sums = np.bincount(where, weights=there["length"].astype(np.float64) + HEADER_BYTES)
        live_bytes.update({id: int(size) for id, size in zip(ids.tolist(), sums.tolist(), strict=True)})
    for id, size_bytes, state, end in head.segments:
        segments.restore(id, size_bytes, State(state), end, live_bytes.pop(id, 0))
    segments.next_id = head.next_segment
    assert not live_bytes, "pages lie in segments"
