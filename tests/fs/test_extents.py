"""What a target remembers of where its chunks lie: never what a change may have made old."""

from __future__ import annotations

import pytest
from emberfs.engine.extents import CHANGES_KEPT, Extents, Known
from emberfs.engine.record import Extent, Record, Stamp
from emberfs.engine.rows import Change
from emberfs.types import chunk_id

CHUNK, OTHER = chunk_id(1, 0), chunk_id(1, 1)


class Mirrored:
    """A mirror that only remembers."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    def put(self, chunk: bytes, file: int, block: int, known: Known) -> None:
        self.chunks.append(chunk)

    def drop(self, chunk: bytes) -> None:
        self.chunks.remove(chunk)

    def clear(self) -> None:
        self.chunks.clear()


def place(position: int) -> tuple[int, int]:
    return 1, position


@pytest.fixture
def extents() -> Extents:
    extents = Extents(1 << 20, place)
    extents.mirror = Mirrored()
    return extents


def known(*, row: bytes = b"row", is_clean: bool = True) -> Known:
    return Known(row, Extent(0, 10, 1, 1, b"sums"), 12, b"sums", is_clean)


def note(extents: Extents, chunk: bytes, *, changes: int, is_clean: bool = True) -> bool:
    """True if it was remembered."""
    extents.note(chunk, known(is_clean=is_clean), changes=changes)
    return extents.get(chunk) is not None


def mirrored(extents: Extents) -> list[bytes]:
    assert isinstance(extents.mirror, Mirrored)
    return extents.mirror.chunks


def test_a_change_drops_what_is_known_at_its_beginning(extents: Extents) -> None:
    assert note(extents, CHUNK, changes=extents.changes)
    extents.begin_change([CHUNK])
    assert extents.get(CHUNK) is None
    assert mirrored(extents) == []
    extents.end_change()


@pytest.mark.parametrize("began", ["before", "within"])
def test_a_read_that_began_before_the_end_of_a_change_is_not_noted_after_it(extents: Extents, began: str) -> None:
    """One that began within it may have seen the old row, too: it is there until the commit."""
    seen = extents.changes
    extents.begin_change([CHUNK])
    if began == "within":
        seen = extents.changes
    assert not note(extents, CHUNK, changes=seen), "while it changes"
    assert note(extents, OTHER, changes=seen), "of no concern to others"
    extents.end_change()
    assert not note(extents, CHUNK, changes=seen), "nor afterwards"
    assert note(extents, CHUNK, changes=extents.changes), "but what began then is fine"


def test_changes_that_were_forgotten_count_for_every_chunk(extents: Extents) -> None:
    seen = extents.changes
    extents.begin_change([CHUNK])
    extents.end_change()
    extents.begin_change([chunk_id(2, index) for index in range(CHANGES_KEPT)])
    extents.end_change()
    assert not note(extents, CHUNK, changes=seen)
    assert not note(extents, OTHER, changes=seen), "it might have changed, too, for all we remember"
    assert note(extents, CHUNK, changes=extents.changes)


def test_only_what_is_clean_is_mirrored(extents: Extents) -> None:
    assert note(extents, CHUNK, changes=0, is_clean=False)
    assert mirrored(extents) == []
    assert note(extents, CHUNK, changes=0)
    assert mirrored(extents) == [CHUNK]
    assert note(extents, CHUNK, changes=0, is_clean=False)
    assert mirrored(extents) == []


def test_it_is_bounded_and_the_oldest_go_first() -> None:
    extents = Extents(10_000, place)
    extents.mirror = Mirrored()
    for index in range(100):
        extents.note(chunk_id(3, index), known(), changes=0)
    kept = [index for index in range(100) if extents.get(chunk_id(3, index)) is not None]
    assert 10 < len(kept) < 30
    assert kept == list(range(100 - len(kept), 100))
    assert mirrored(extents) == [chunk_id(3, index) for index in kept]


def test_nothing_is_known_after_the_end(extents: Extents) -> None:
    assert note(extents, CHUNK, changes=0)
    extents.stop()
    assert extents.get(CHUNK) is None
    assert mirrored(extents) == []
    assert not note(extents, CHUNK, changes=extents.changes)


# ---- commits

EXTENT = Extent(0, 10, 1, 1, b"sums")
BESIDE = Extent(0, 10, 1, 1, b"", 0, 7)
"""As a row has it whose sums lie elsewhere."""


def commit(extents: Extents, *changes: Change) -> None:
    extents.begin_change([CHUNK, OTHER])
    extents.end_change()
    extents.note_published(changes)


def change_to(record: Record | None, chunk: bytes = CHUNK) -> Change:
    change = Change()
    change.put_record(chunk, None, record)
    return change


def test_what_was_committed_is_known_and_as_its_row_says(extents: Extents) -> None:
    change = change_to(Record(12, EXTENT))
    commit(extents, change)
    there = extents.get(CHUNK)
    assert there == Known(change.rows[0][1] or b"", EXTENT, 12, b"sums", True)
    assert mirrored(extents) == [CHUNK]


@pytest.mark.parametrize(
    "record",
    [
        None,
        Record(12, EXTENT, EXTENT._replace(version=2)),
        Record(12, EXTENT, None, None, Stamp(2, 1)),
        Record(12, None, EXTENT),
        Record(12, None, None, Stamp(2, 1)),
        Record(12, BESIDE),
        Record(12, EXTENT._replace(length=0, sums=b"")),
    ],
    ids=["none", "pending", "to be removed", "first pending", "tombstone", "beside", "empty"],
)
def test_what_is_pending_or_has_nothing_is_not_known(extents: Extents, record: Record | None) -> None:
    commit(extents, change_to(record))
    assert extents.get(CHUNK) is None and mirrored(extents) == []
    commit(extents, change_to(Record(12, EXTENT)), change_to(record))
    assert extents.get(CHUNK) is None and mirrored(extents) == [], "the last one counts"
    commit(extents, change_to(record), change_to(Record(12, EXTENT)))
    assert mirrored(extents) == [CHUNK]


def test_a_damaged_row_that_was_deleted_is_not_known(extents: Extents) -> None:
    change = change_to(Record(12, EXTENT))
    change.delete_damaged(CHUNK)
    commit(extents, change, change_to(Record(12, EXTENT), OTHER))
    assert mirrored(extents) == [OTHER]


def test_commits_are_noted_for_a_mirror_only(extents: Extents) -> None:
    extents.mirror = None
    commit(extents, change_to(Record(12, EXTENT)))
    assert extents.get(CHUNK) is None


def test_a_commit_that_the_next_change_has_overtaken_is_not_noted(extents: Extents) -> None:
    extents.begin_change([CHUNK])
    extents.note_published([change_to(Record(12, EXTENT))])
    assert extents.get(CHUNK) is None
    extents.end_change()
