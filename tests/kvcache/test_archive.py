"""Archives of pages: what goes in comes out, whatever was cut off or damaged.

Run: pytest tests/kvcache/test_archive.py
"""

from __future__ import annotations

import io

import pytest
from emberfs.errors import Corruption
from emberkv.archive import About, Archive, ArchivedPage, ArchiveReader
from emberkv.carry import stretches
from emberkv.keys import ROOT
from emberkv.namespace import Kind, Namespace
from hypothesis import given
from hypothesis import strategies as st

ABOUT = About(Namespace(model="m", dtype="bf16", layout="mla", page_tokens=4, kinds=(Kind("kv"),)), "acme")
KEYS = [bytes([number]) * 32 for number in range(1, 7)]
PAGES = [ArchivedPage(key, parent, 0, key * 3) for key, parent in zip(KEYS, [ROOT, *KEYS], strict=False)]


def archived(pages: list[ArchivedPage]) -> bytes:
    file = io.BytesIO()
    archive = Archive.begin(file, ABOUT)
    for page in pages:
        archive.add(*page)
    assert archive.end() == len(pages)
    return file.getvalue()


WHOLE = archived(PAGES)


def test_what_goes_in_comes_out() -> None:
    reader = ArchiveReader(io.BytesIO(WHOLE))
    assert reader.about == ABOUT
    assert list(reader.pages()) == PAGES and reader.is_whole
    with pytest.raises(Corruption, match="no archive"):
        ArchiveReader(io.BytesIO(b"something else"))


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_a_damaged_byte_is_never_read(where: int, value: int) -> None:
    data = bytearray(WHOLE)
    data[where] = value
    try:
        reader = ArchiveReader(io.BytesIO(bytes(data)))
    except Corruption:
        return
    pages = list(reader.pages())
    assert pages == PAGES[: len(pages)]
    assert reader.is_whole == (bytes(data) == WHOLE)


@given(st.integers(200, len(WHOLE) - 1))
def test_one_that_was_cut_off_goes_on(size: int) -> None:
    file = io.BytesIO(WHOLE[:size])
    archive, done = Archive.resume(file, ABOUT)
    for page in PAGES:
        if (page.key, page.kind) not in done:
            archive.add(*page)
    archive.end()
    assert file.getvalue() == WHOLE
    with pytest.raises(ValueError, match="tenant 'acme'"):
        Archive.resume(io.BytesIO(WHOLE), About(ABOUT.namespace, "another"))


def test_stretches_are_chains_or_roots_of_one_kind() -> None:
    a, b, c, d, e, f = KEYS

    def lengths(*pages: tuple[bytes, bytes, int]) -> list[int]:
        batch = [ArchivedPage(key, parent, kind, b"") for key, parent, kind in pages]
        found = list(stretches(batch))
        assert [page for stretch in found for page in stretch] == batch
        return [len(stretch) for stretch in found]

    assert lengths() == []
    assert lengths((a, ROOT, 0), (b, a, 0), (c, b, 0), (d, b, 0), (e, d, 0)) == [3, 2]
    assert lengths((a, ROOT, 0), (b, ROOT, 0), (c, ROOT, 0), (d, c, 0)) == [3, 1]
    assert lengths((a, ROOT, 0), (b, a, 0), (c, ROOT, 0), (d, ROOT, 1), (e, d, 1)) == [2, 1, 2]
    assert lengths((b, a, 0), (c, b, 0), (f, ROOT, 0)) == [2, 1]
