"""Copies in memory of what a session's queries read again and again: what may use them, and when they are void."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emberflow
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emberflow import copies as copies_module
from emberflow import sources
from emberflow.errors import InvalidArgument

ROWS = 50_000

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="files without names are Linux's")


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"ember://{tmp_path}/store/!"


@pytest.fixture
def session() -> Iterator[emberflow.Session]:
    with emberflow.init(threads=2) as session:
        yield session


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs of the files that DuckDB was given through Python, as they are opened."""
    urls: list[str] = []
    original = sources.UrlFileSystem.open

    def noted(self: Any, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        urls.append(path)
        return original(self, path, mode, **kwargs)

    monkeypatch.setattr(sources.UrlFileSystem, "open", noted)
    return urls


def put(url: str, first: int = 0, rows: int = ROWS) -> None:
    """A file of the numbers from `first` on, and of texts that no encoding makes short."""
    numbers = range(first, first + rows)
    filesystem, path = fsspec.url_to_fs(url)
    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    with filesystem.open(path, "wb") as file:
        pq.write_table(pa.table({"n": numbers, "t": [f"{n * 2_654_435_761 % 2**32:012}" for n in numbers]}), file)


def test_a_query_beside_one_that_is_drawn_from_has_no_part_in_its_copies(
    session: emberflow.Session, store: str
) -> None:
    url = f"{store}/t.parquet"
    put(url)
    frame = session.read_parquet(url)
    frame.to_arrow(), frame.to_arrow()
    drawn = frame.to_batches(batch_rows=100)
    next(drawn)
    assert session.copies.size_bytes > 0
    for named in (
        f"select distinct filename f from read_parquet('{url}', filename=true)",
        f"select distinct file_name f from parquet_metadata('{url}')",
        f"select file f from \"glob\"('{url}')",
        f"select distinct f from read_parquet('{url}'), (select file_name f from \"parquet_metadata\"('{url}'))",
    ):
        assert {row["f"] for row in session.sql(named).take_all()} == {url}, named
    drawn.close()
    assert session.sql(f"select count(*) c from '{url}'").take_all() == [{"c": ROWS}]


def test_what_was_read_is_copied_once_and_then_read_by_duckdb_itself(
    session: emberflow.Session, store: str, opened: list[str]
) -> None:
    put(f"{store}/t.parquet")
    frame = session.read_parquet(f"{store}/t.parquet")
    expected = frame.to_arrow()
    assert opened and session.copies.size_bytes == 0
    opened.clear()
    assert frame.to_arrow() == expected
    assert opened == []
    size_bytes = fsspec.filesystem("ember", url=store.removesuffix("/!")).size("/t.parquet")
    assert session.copies.size_bytes == size_bytes
    assert session.sql("select sum(n) s from t", t=frame).take_all() == [{"s": sum(range(ROWS))}]
    assert opened == [] and session.copies.size_bytes == size_bytes
    assert not [name for name in os.listdir(session.spill) if name.startswith("copies")]


def test_what_little_was_read_of_is_not_copied(session: emberflow.Session, store: str, opened: list[str]) -> None:
    put(f"{store}/t.parquet")
    for _ in range(2):
        assert session.read_parquet(f"{store}/t.parquet").count() == ROWS
    assert opened and session.copies.size_bytes == 0


def test_a_file_of_a_new_name_or_of_new_bytes_is_read_anew(session: emberflow.Session, store: str) -> None:
    frame = session.read_parquet(f"{store}/*.parquet")
    total = session.sql("select sum(n) s, count(distinct t) c from t", t=frame)
    put(f"{store}/a.parquet")
    for _ in range(3):
        assert total.take_all() == [{"s": sum(range(ROWS)), "c": ROWS}]
    assert session.copies.size_bytes > 0
    for first in (1, 2, 3):
        put(f"{store}/a.parquet", first)  # As long as it was.
        for _ in range(3):
            assert total.take_all() == [{"s": sum(range(first, first + ROWS)), "c": ROWS}]
    held_bytes = session.copies.size_bytes
    put(f"{store}/b.parquet", ROWS + 3)
    for _ in range(3):
        assert total.take_all() == [{"s": sum(range(3, 2 * ROWS + 3)), "c": 2 * ROWS}]
    assert session.copies.size_bytes > held_bytes  # Of b, too, and nothing that a is no more.
    fsspec.url_to_fs(f"{store}/a.parquet")[0].rm("/a.parquet")
    assert total.take_all() == [{"s": sum(range(ROWS + 3, 2 * ROWS + 3)), "c": ROWS}]


def test_a_file_that_is_written_into_is_read_anew(session: emberflow.Session, store: str) -> None:
    frame = session.read_parquet(f"{store}/t.parquet")
    put(f"{store}/new.parquet", 7)
    put(f"{store}/t.parquet")
    for _ in range(3):
        assert frame.to_arrow()["n"][0].as_py() == 0
    assert session.copies.size_bytes > 0
    filesystem = fsspec.url_to_fs(store)[0]
    new = filesystem.cat_file("/new.parquet")
    with filesystem.open("/t.parquet", "r+b") as file:
        file.write(new)
        file.truncate(len(new))
    assert frame.to_arrow()["n"][0].as_py() == 7


def test_a_pattern_keeps_the_order_of_its_files(session: emberflow.Session, store: str, opened: list[str]) -> None:
    for number in (10, 9, 1, 2):
        put(f"{store}/d/{number}.parquet", number * ROWS, 1_000)
    frame = session.read_parquet(f"{store}/d")
    expected = frame.to_arrow()
    frame.to_arrow()
    opened.clear()
    assert frame.to_arrow() == expected and opened == []
    put(f"{store}/d/11.parquet", 0, 1_000)
    assert frame.to_arrow()["n"][2_000].as_py() == 0  # 1, 10, 11, 2, 9 as ever.
    assert f"{store}/d/1.parquet" in opened  # All of a pattern, or none.


def test_partitions_in_the_path_are_columns(session: emberflow.Session, store: str, opened: list[str]) -> None:
    for year in (2019, 2020):
        put(f"{store}/d/year={year}/t.parquet", year, 1_000)
    frames = [
        session.read_parquet(f"{store}/d"),
        session.read_parquet([f"{store}/d/year=2019/t.parquet", f"{store}/d/year=2020/t.parquet"]),
    ]
    expected = [frame.to_arrow() for frame in frames]
    assert expected[0] == expected[1] and set(expected[0]["year"].to_pylist()) == {2019, 2020}
    opened.clear()
    assert [frame.to_arrow() for frame in frames] == expected and opened == []


def test_a_key_in_the_sessions_own_directory_is_no_column(store: str, tmp_path: Path) -> None:
    for year in (2019, 2020):
        put(f"{store}/d/year={year}/t.parquet", year, 1_000)
    with emberflow.init(temp_directory=str(tmp_path / "k=v" / "spill")) as session:
        for _ in range(3):
            assert session.read_parquet(f"{store}/d").to_arrow().column_names == ["n", "t", "year"]


@pytest.mark.parametrize(
    "text",
    [
        "select distinct filename from read_parquet('{0}')",
        "select distinct filename from read_parquet('{0}', filename = true)",
        "select distinct file_name as filename from parquet_metadata('{0}')",
        "select distinct p.file_name from parquet_metadata('{0}') p, (select count(t) from read_parquet('{0}'))",
    ],
)
def test_names_of_files_are_those_of_the_store(session: emberflow.Session, store: str, text: str) -> None:
    url = f"{store}/t.parquet"
    put(url)
    for _ in range(3):
        session.read_parquet(url).to_arrow()
    assert session.copies.size_bytes > 0
    assert [list(row.values()) for row in session.sql(text.format(url)).take_all()] == [[url]]


def test_errors_name_the_file_of_the_store(session: emberflow.Session, store: str) -> None:
    put(f"{store}/a.parquet", 0, 1_000)
    filesystem = fsspec.url_to_fs(store)[0]
    with filesystem.open("/b.parquet", "wb") as file:
        pq.write_table(
            pa.table({"n": ["x"] * 1_000, "t": [f"{n * 2_654_435_761 % 2**32:012}" for n in range(1_000)]}), file
        )
    for name in "ab":
        for _ in range(2):
            session.read_parquet(f"{store}/{name}.parquet").to_arrow()
    assert session.copies.size_bytes == sum(filesystem.size(f"/{name}.parquet") for name in "ab")
    with pytest.raises(emberflow.QueryError) as caught:
        session.read_parquet([f"{store}/a.parquet", f"{store}/b.parquet"]).to_arrow()
    assert f"{store}/b.parquet" in str(caught.value) and "/proc/" not in str(caught.value)


def test_damage_is_no_copy_and_only_what_is_read_of_it_counts(
    session: emberflow.Session, store: str, tmp_path: Path
) -> None:
    put(f"{store}/t.parquet", rows=200_000)
    frame = session.read_parquet(f"{store}/t.parquet")
    numbers = session.sql("select n from t", t=frame)
    filesystem = fsspec.url_to_fs(store)[0]
    with filesystem.open("/t.parquet", "rb") as file:
        group = pq.ParquetFile(file).metadata.row_group(0)
        offset = group.column(1).dictionary_page_offset or group.column(1).data_page_offset
        damaged = filesystem.cat_file("/t.parquet")[offset + 300_000 : offset + 300_032]
    filesystem.close()
    found = 0
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file() and (place := path.read_bytes().find(damaged)) >= 0:
            with path.open("r+b") as raw:
                raw.seek(place)
                raw.write(bytes(32))
            found += 1
    assert found == 1
    for _ in range(6):
        assert session.sql("select sum(n) s from t", t=numbers).take_all() == [{"s": sum(range(200_000))}]
    assert session.copies.size_bytes == 0
    with pytest.raises(OSError, match="checksum mismatch"):
        frame.to_arrow()


def test_copies_stay_within_their_bytes_and_idle_ones_go(
    store: str, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        put(f"{store}/{name}.parquet")
    size_bytes = fsspec.url_to_fs(store)[0].size("/a.parquet")
    with emberflow.init(copies_bytes=size_bytes * 3 // 2) as session:
        a, b = (session.read_parquet(f"{store}/{name}.parquet") for name in "ab")
        for frame in (a, a, b, b, b):
            assert frame.to_arrow()["n"][-1].as_py() == ROWS - 1
        assert session.copies.size_bytes == size_bytes
        opened.clear()
        a.to_arrow()
        assert opened == []
        monkeypatch.setattr(copies_module, "IDLE_S", 0.0)
        b.to_arrow()
        opened.clear()
        b.to_arrow()
        assert opened == [] and session.copies.size_bytes == size_bytes
        a.to_arrow()
        assert opened
    with emberflow.init(copies_bytes=0) as session:
        for _ in range(3):
            session.read_parquet(f"{store}/a.parquet").to_arrow()
        assert session.copies.size_bytes == 0


def test_of_a_pattern_that_is_too_much_nothing_is_copied(store: str) -> None:
    for name in "ab":
        put(f"{store}/{name}.parquet")
    with emberflow.init(copies_bytes=fsspec.url_to_fs(store)[0].size("/a.parquet") * 3 // 2) as session:
        for _ in range(3):
            assert session.read_parquet(f"{store}/*.parquet").to_arrow().num_rows == 2 * ROWS
        assert session.copies.size_bytes == 0


def test_a_path_that_leads_upwards_is_no_name_of_a_copy(
    session: emberflow.Session, store: str, opened: list[str]
) -> None:
    put(f"{store}/t.parquet")
    frame = session.read_parquet(f"{store}/k=v/{'../' * 20}t.parquet")
    for _ in range(3):
        opened.clear()
        assert frame.to_arrow().num_rows == ROWS and opened


def test_a_copy_lasts_as_long_as_the_query_that_reads_it(session: emberflow.Session, store: str) -> None:
    put(f"{store}/t.parquet", rows=400_000)
    frame = session.read_parquet(f"{store}/t.parquet")
    for _ in range(2):
        frame.to_arrow()
    batches = frame.to_batches(1_000)
    first = next(iter(batches))
    put(f"{store}/t.parquet", 1_000_000)
    assert frame.to_arrow()["n"][0].as_py() == 1_000_000  # Drops the other copy.
    assert first.num_rows + sum(batch.num_rows for batch in batches) == 400_000


def test_a_session_that_is_closed_leaves_copies_to_the_query_that_reads_them(
    session: emberflow.Session, store: str
) -> None:
    for part in range(20):  # More than DuckDB opens at once.
        put(f"{store}/{part:02}.parquet", part * ROWS)
    frame = session.read_parquet(store)
    frame.to_arrow(), frame.to_arrow()
    assert session.copies.size_bytes > 0
    drawn = frame.to_batches(batch_rows=1000)
    first = next(drawn).num_rows
    session.close()
    assert first + sum(batch.num_rows for batch in drawn) == 20 * ROWS
    assert not os.path.exists(session.spill)


def test_several_threads_read_copies_while_files_are_replaced(session: emberflow.Session, store: str) -> None:
    for number in range(4):
        put(f"{store}/d/{number}.parquet", 0, 1_000)
    total = session.sql("select count(*) c, count(distinct t) d from t", t=session.read_parquet(f"{store}/d"))

    def ask(_: int) -> None:
        for _ in range(15):
            assert total.take_all() == [{"c": 4_000, "d": 1_000}]

    def replace(_: int) -> None:
        for turn in range(20):
            put(f"{store}/d/{turn % 4}.parquet", 0, 1_000)

    with ThreadPoolExecutor(4) as pool:
        for done in [*(pool.submit(ask, n) for n in range(3)), pool.submit(replace, 0)]:
            done.result()
    session.sql("select 1").take_all()
    held = session.copies.size_bytes
    assert 0 < held <= sum(fsspec.url_to_fs(store)[0].size(f"/d/{n}.parquet") for n in range(4))


def test_wrong_bytes_for_copies_are_refused() -> None:
    for settings in ({"copies_bytes": -1}, {"copies_bytes": 10**9, "memory_limit": "1GB"}):
        with pytest.raises(InvalidArgument, match="copies_bytes"):
            emberflow.init(**settings)
