"""DuckDB over fsspec filesystems: many threads on one file, several stores of one protocol, errors from below."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import emberflow
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emberflow import Session
from emberflow.engine import Engine, EngineConfig
from emberflow.sources import protocols_in
from emberfs.filesystem import EmberFileSystem
from fsspec.implementations.memory import MemoryFileSystem

ROWS = 200_000
CHUNK_BYTES = 256 << 10


class Shelves(MemoryFileSystem):  # type: ignore[misc]
    """A protocol with several stores: `shelves://<store>/<path>`, each kept apart by its storage option `prefix`."""

    protocol = "shelves"
    store: dict[str, Any] = {}  # noqa: RUF012 -- shared by every instance, as MemoryFileSystem does
    pseudo_dirs = [""]  # noqa: RUF012
    broken: set[str] = set()  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("shelves://").strip("/") if path.strip("/") else ""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        if path in self.broken:
            raise OSError(5, "checksum mismatch in chunk 7", path)
        data: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        return data


@pytest.fixture
def shelves() -> Iterator[type[Shelves]]:
    fsspec.register_implementation("shelves", Shelves, clobber=True)
    yield Shelves
    Shelves.store.clear()
    Shelves.broken.clear()


def table() -> pa.Table:
    return pa.table({"n": range(ROWS), "t": [f"{n * 2_654_435_761 % ROWS:012}" for n in range(ROWS)]})


def test_a_file_that_is_kept_is_opened_once_and_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"ember://{tmp_path}/store/!/rows"
    filesystem, path = fsspec.url_to_fs(url)
    open_file = EmberFileSystem.open

    def write(number: int, value: int) -> None:
        """A file of some chunks, not one in its inode."""
        with open_file(filesystem, f"{path}/{number}.parquet", "wb", chunk_size_bytes=CHUNK_BYTES) as file:
            numbers = np.random.default_rng(value).integers(0, 1 << 40, ROWS)
            pq.write_table(pa.table({"n": [value] * ROWS, "noise": numbers}), file)
        assert filesystem.size(f"{path}/{number}.parquet") > 4 * CHUNK_BYTES

    for number in range(3):
        write(number, number)
    opened: list[str] = []

    def counted(self: EmberFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        opened.append(path)
        return open_file(self, path, *args, **kwargs)

    monkeypatch.setattr(EmberFileSystem, "open", counted)
    engine = Engine(EngineConfig(threads=1, temp_directory=str(tmp_path)))
    text = f"SELECT sum(n), sum(noise) FROM read_parquet({[f'{url}/{number}.parquet' for number in range(3)]})"
    with engine.running(text) as cursor:
        with engine.keeping_files():
            before = cursor.execute(text).fetchall()
            assert before[0][0] == 3 * ROWS
            assert sorted(opened) == [f"{path}/{number}.parquet" for number in range(3)]
            write(2, 7)
            assert cursor.execute(text).fetchall() == before
            assert len(opened) == 3
        after = cursor.execute(text).fetchall()
        assert after[0][0] == 8 * ROWS
        assert after[0][1] != before[0][1]
        filesystem.rm_file(f"{path}/2.parquet")
        with engine.keeping_files(), pytest.raises(duckdb.IOException, match="No files found"):
            cursor.execute(text)
    engine.close()
    filesystem.close()


def test_many_threads_read_one_file_and_every_value_is_right() -> None:
    memory = fsspec.filesystem("memory")
    name = f"/{uuid.uuid4().hex}.parquet"
    with memory.open(name, "wb") as file:
        pq.write_table(table(), file, row_group_size=2_000)
    with emberflow.init(threads=8) as session:
        for _ in range(3):
            assert session.read_parquet(f"memory:/{name}").to_arrow().sort_by("n") == table()
    memory.rm(name)


def test_many_threads_read_compressed_streams_and_every_value_is_right(session: Session) -> None:
    name = f"memory://{uuid.uuid4().hex}"
    frame = session.from_arrow(table())
    for suffix in ("json.zst", "json.gz"):
        frame.write_json(f"{name}/t.{suffix}")
        for _ in range(4):
            assert session.read_json(f"{name}/t.{suffix}").to_arrow().sort_by("n") == table()
    frame.write_csv(f"{name}/t.csv.gz")
    text = {"n": "BIGINT", "t": "VARCHAR"}
    assert session.read_csv(f"{name}/t.csv.gz", schema=text).to_arrow().sort_by("n") == table()
    fsspec.filesystem("memory").rm(name, recursive=True)


def test_a_protocol_found_in_the_text_is_registered_once(session: Session, shelves: type[Shelves]) -> None:
    session.from_arrow(table()).write_parquet("shelves://a/t.parquet")
    assert session.sql("select count(*) c from 'shelves://a/*.parquet'").take_all() == [{"c": ROWS}]
    assert session.sql("select count(*) c from read_parquet(?)", ["shelves://a/t.parquet"]).count() == 1
    assert session.sql("select * from read_parquet(['shelves://a/t.parquet', 'shelves://a/t.parquet'])").count() == (
        2 * ROWS
    )


def test_an_error_of_the_store_comes_through_as_it_is(session: Session, shelves: type[Shelves]) -> None:
    session.from_arrow(table()).write_parquet("shelves://a/t.parquet")
    shelves.broken.add("/a/t.parquet")
    for action in ("count", "to_arrow", "take_all"):
        with pytest.raises(OSError, match="checksum mismatch in chunk 7") as caught:
            getattr(session.sql("select max(t) m from 'shelves://a/t.parquet'"), action)()
        assert caught.value.errno == 5
        assert "shelves://a/t.parquet" in caught.value.__notes__[0]


def test_an_unfinished_write_is_not_read(session: Session, shelves: type[Shelves]) -> None:
    session.from_items([1]).write_parquet("shelves://a/out/t.parquet")
    session.from_items([2]).write_parquet("shelves://a/.emberflow-dead/new/t.parquet")
    assert session.sql("from 'shelves://a/**/*.parquet'").take_all() == [{"item": 1}]


def test_protocols_in() -> None:
    query = """select 'https://x' from "ember://a" join read_csv(['s3://b']) on 'file:///c' and 'd: //e'"""
    assert protocols_in(query, ["hf://f", 1, ["gs://g"], "see ftp://h"]) == {"https", "ember", "s3", "hf", "gs"}


def test_options_may_name_the_store(tmp_path: Path) -> None:
    store, other = f"ember://{tmp_path}/store", f"ember://{tmp_path}/other"
    with emberflow.init(storage_options={"ember": {"url": store}}) as session:
        session.sql("SELECT 1 AS x").write_parquet("ember://a.parquet")
        session.sql("SELECT 2 AS x").write_parquet(f"{other}/!/a.parquet")
        assert session.read_parquet("ember://a.parquet").take_all() == [{"x": 1}]
        assert session.read_parquet(f"{other}/!/a.parquet").take_all() == [{"x": 2}]
    with emberflow.init() as session:
        assert session.read_parquet(f"{store}/!/a.parquet").take_all() == [{"x": 1}]
