"""What a target remembers of where its chunks lie: never what a change may have made old."""

from __future__ import annotations

import pytest
from emberfs.engine.extents import CHANGES_KEPT, Extents, Known
from emberfs.engine.record import Extent
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


@pytest.fixture
def extents() -> Extents:
    extents = Extents(1 << 20)
    extents.mirror = Mirrored()
    return extents


def known(*, row: bytes = b"row", is_clean: bool = True) -> Known:
    return Known(row, Extent(0, 10, 1, 1, b"sums"), 12, b"sums", is_clean)


def note(extents: Extents, chunk: bytes, *, changes: int, is_clean: bool = True) -> bool:
    """True if it was remembered."""
    extents.note(chunk, known(is_clean=is_clean), file=1, block=0, changes=changes)
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
    extents = Extents(10_000)
    extents.mirror = Mirrored()
    for index in range(100):
        extents.note(chunk_id(3, index), known(), file=1, block=0, changes=0)
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
