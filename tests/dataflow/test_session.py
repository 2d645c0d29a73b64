"""What a session keeps, for how long, and what it runs side by side.

Run: pytest tests/dataflow/test_session.py.
"""

from __future__ import annotations

import gc
import glob
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import emberflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emberflow.errors import CallCancelled, ExchangeCorrupt
from emberflow.job.history import jobs

WAIT_S = 20


@pytest.fixture
def session(tmp_path: Path) -> Iterator[emberflow.Session]:
    with emberflow.init(
        executor="inline", workers=2, shuffle="always", partitions=2, data_root=f"{tmp_path}/root"
    ) as session:
        yield session


@pytest.fixture
def numbers(session: emberflow.Session, tmp_path: Path) -> emberflow.DataFrame:
    """k = 0..999, in a file."""
    pq.write_table(pa.table({"k": range(1000)}), tmp_path / "numbers.parquet")
    return session.read_parquet(f"{tmp_path}/numbers.parquet")


# ---- side by side

# Functions of inline tasks find these here: what is sent with them would be copies.
begun = threading.Event()
may_end = threading.Event()
calls: list[Any] = []


def waits(row: dict[str, Any]) -> dict[str, Any]:
    from tests.dataflow import test_session

    test_session.begun.set()
    assert test_session.may_end.wait(WAIT_S)
    return row


def tells(row: dict[str, Any]) -> dict[str, Any]:
    from tests.dataflow import test_session

    test_session.calls.append(row)
    return row


def meeting(directory: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that ends when it has been called for two rows."""

    def meets(row: dict[str, Any]) -> dict[str, Any]:
        (directory / f"{row['item']}.here").touch()
        end_s = time.monotonic() + WAIT_S
        while len(list(directory.glob("*.here"))) < 2:
            assert time.monotonic() < end_s
            time.sleep(0.01)
        return row

    return meets


def test_jobs_of_several_threads_run_at_once(session: emberflow.Session, tmp_path: Path) -> None:
    meets = meeting(tmp_path)
    frames = [session.from_items([number]).map(meets, schema={"item": "BIGINT"}) for number in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        assert [frame.count() for frame in pool.map(emberflow.DataFrame.compute, frames)] == [1, 1]


def test_a_frame_that_several_threads_ask_for_is_made_once(session: emberflow.Session) -> None:
    calls.clear()
    frame = session.from_items([1, 2, 3]).map(tells, schema={"item": "BIGINT"}, version="1")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: frame.compute(), range(4)))
    assert len(calls) == 3


def test_closing_cancels_what_runs(session: emberflow.Session) -> None:
    begun.clear()
    may_end.clear()
    frame = session.from_items([1]).map(waits, schema={"item": "BIGINT"}).map(tells, schema={"item": "BIGINT"})
    with ThreadPoolExecutor(2) as pool:
        computing = pool.submit(frame.compute)
        assert begun.wait(WAIT_S)
        closing = pool.submit(session.close)
        while not session.jobs._closed:
            pass
        # An inline task heeds no interruption while Python runs.
        may_end.set()
        assert isinstance(computing.exception(WAIT_S), CallCancelled)
        closing.result(WAIT_S)
    for late in (frame.compute, frame.take_all, lambda: frame.write_parquet("nowhere")):
        with pytest.raises(emberflow.SessionClosed):
            late()


# ---- what is kept


@pytest.mark.parametrize("shuffle", ["auto", "always"])
def test_what_was_computed_is_what_all_that_is_derived_reads(shuffle: str, tmp_path: Path) -> None:
    with emberflow.init(executor="inline", shuffle=shuffle, partitions=2) as session:
        frame = session.sql("select range k, uuid()::varchar id from range(20)").compute()
        ids = {row["id"] for row in frame.take_all()}
        assert len(ids) == 20
        session.view("kept", frame)
        derived = {
            "filter": frame.filter("true"),
            "group": frame.group_by("id").count(),
            "sql": session.sql("select id from t", t=frame),
            "view": session.sql("select id from kept"),
            "partial_sql": session.partial_sql("select id from {0}", frame),
            "repartition": frame.repartition(2, hash_by="k"),
            "by expression": frame.repartition(2, by="k % 2"),
            "map": frame.map(lambda row: row),
        }
        for name, other in derived.items():
            assert {row["id"] for row in other.take_all()} == ids, name
        frame.write_parquet(f"{tmp_path}/out")
        assert {row["id"] for row in session.read_parquet(f"{tmp_path}/out").take_all()} == ids
        assert frame.count() == 20
        assert frame.schema == {"k": "BIGINT", "id": "VARCHAR"}
        again = {row["id"] for row in frame.recompute().take_all()}
        assert not again & ids
        assert {row["id"] for row in derived["filter"].take_all()} == again


def test_rows_that_nobody_computed_are_not_kept(session: emberflow.Session, numbers: emberflow.DataFrame) -> None:
    assert numbers.count() == len(numbers.take_all()) == 1000
    assert numbers.take(1) == [{"k": 0}]
    assert not numbers.is_computed()
    assert len(session.jobs._results) == 0
    kept = numbers.repartition(2, hash_by="k").compute()
    assert len(session.jobs._results) == 1
    del kept
    gc.collect()
    assert len(session.jobs._results) == 0


def test_a_file_that_changed_is_read_anew(
    session: emberflow.Session, numbers: emberflow.DataFrame, tmp_path: Path
) -> None:
    assert numbers.count() == len(numbers.take_all()) == 1000
    pq.write_table(pa.table({"k": [1, 2]}), tmp_path / "numbers.parquet")
    assert numbers.count() == len(numbers.take_all()) == 2


def test_temporary_files_go_with_the_session(tmp_path: Path) -> None:
    mine = tmp_path / "spill"
    with (
        emberflow.init(executor="inline", temp_directory=str(mine)) as session,
        emberflow.init(executor="inline", temp_directory=str(mine)) as other,
    ):
        kept = session.from_items([1, 2]).repartition(2, by_rows=True).compute()
        other.from_items([1, 2]).repartition(2, by_rows=True).compute()
        other.close()
        assert kept.count() == len(kept.take_all()) == 2
    assert list(mine.iterdir()) == []
    with pytest.raises(emberflow.InvalidArgument, match="temporary"):
        emberflow.init(temp_directory="/dev/null/nowhere")


def test_a_reader_that_was_begun_is_read_to_its_end_when_the_session_is_closed(tmp_path: Path) -> None:
    mine = tmp_path / "spill"
    session = emberflow.init(executor="inline", threads=1, temp_directory=str(mine))
    # More than is read ahead.
    rows = session.sql("select range n, md5(range::varchar) t from range(1_000_000)").repartition(4, hash_by="n")
    readers = [frame.to_batches(batch_rows=1000) for frame in (rows, rows.select("t"), session.sql("from range(100)"))]
    drawn = [next(reader).num_rows for reader in readers]
    session.close()
    drawn = [count + sum(batch.num_rows for batch in reader) for count, reader in zip(drawn, readers, strict=True)]
    assert drawn == [1_000_000, 1_000_000, 100]
    assert list(mine.iterdir()) == []
    with pytest.raises(emberflow.SessionClosed):
        rows.to_batches()


# ---- columns


def test_columns_cost_no_job(session: emberflow.Session, numbers: emberflow.DataFrame) -> None:
    parted = numbers.repartition(2, hash_by="k")
    typed = parted.map(lambda row: row, schema={"k": "HUGEINT"})
    partial = session.partial_sql("select k, k / 2 half from {0}", parted)
    assert parted.filter("k > 1").with_column("z", "1").columns == ["k", "z"]
    assert parted.sample(0.5).join(parted, "K").columns == ["k"]
    assert typed.schema == {"k": "HUGEINT"}
    assert partial.schema == {"k": "BIGINT", "half": "DOUBLE"}
    assert typed.select("sum(k) AS s").schema == {"s": "HUGEINT"}
    assert session.jobs.last == []


def test_columns_have_names_whatever_their_case(numbers: emberflow.DataFrame) -> None:
    replaced = numbers.with_column("K", "k + 1")
    assert replaced.columns == ["K"]
    assert replaced.sort("k").take(1) == [{"K": 1}]


def test_a_view_is_read_by_its_name_alone(session: emberflow.Session) -> None:
    session.view("t", session.sql("select error('nobody asked for this') e"))
    session.view("My View", session.sql("select 7 seven"))
    frame = session.sql("select 'in t' s, total from (select 1 total) -- from t")
    assert "nobody asked" not in frame.query.text
    assert frame.take_all() == [{"s": "in t", "total": 1}]
    assert session.sql("select seven from \"my view\" where 'ä' <> seven::varchar").take_all() == [{"seven": 7}]
    with pytest.raises(emberflow.QueryError, match="nobody asked"):
        session.sql("from T").take_all()


def test_a_shuffle_takes_any_seed(numbers: emberflow.DataFrame) -> None:
    first = [row["k"] for row in numbers.random_shuffle(partitions=2, seed=-1).take_all()]
    assert sorted(first) == list(range(1000))
    assert first == [row["k"] for row in numbers.random_shuffle(partitions=2, seed=2**64 - 1).take_all()]


# ---- one moment


def test_now_is_one_moment_of_all_that_an_action_runs(session: emberflow.Session) -> None:
    # A function without a schema: a job of its own finds its columns.
    moments = session.sql("select now() AS t from range(3)").map(lambda row: row)
    both = session.sql("select t from m union all select now()", m=moments)
    assert both.distinct().count() == 1


def test_now_of_a_named_run_stays(root: str) -> None:
    found = []
    for name in ("a", "a", "b"):
        settings: dict[str, Any] = {"executor": "inline", "shuffle": "always", "job_id": name}
        with emberflow.init(data_root=f"{root}/kept", **settings) as session:
            found.append(session.sql("select now() t, random() r from range(1)").take_all())
    assert found[0] == found[1]
    assert found[0][0]["t"] < found[2][0]["t"]
    assert {job.id for job in jobs(f"{root}/kept")} == {"a-1", "b-1"}


# ---- damage


def damage(directory: Path, *, remove: bool) -> None:
    """Every exchange under the directory: gone, or with other bytes."""
    for name in glob.glob(f"{directory}/**/*.exchange", recursive=True):
        path = Path(name)
        data = path.read_bytes()
        path.unlink()
        if not remove:
            middle = len(data) // 2
            path.write_bytes(bytes(byte ^ (i < middle and i >= 8) for i, byte in enumerate(data)))


@pytest.mark.parametrize("remove", [True, False])
def test_a_damaged_result_is_made_again(
    session: emberflow.Session, numbers: emberflow.DataFrame, tmp_path: Path, remove: bool
) -> None:
    numbers.take_all()
    damage(tmp_path / "root", remove=remove)
    assert len(numbers.take_all()) == 1000
    assert any(event.kind == "task" for event in session.jobs.last)
    kept = numbers.repartition(2, hash_by="k").compute()
    for read in (kept.take_all, kept.filter("k >= 0").take_all):
        damage(tmp_path / "root", remove=remove)
        assert len(read()) == 1000
        assert kept.is_computed()
    damage(tmp_path / "root", remove=remove)
    assert kept.write_parquet(f"{tmp_path}/out").num_rows == 1000


def test_damage_behind_rows_that_were_given_out_is_said_and_mended(session: emberflow.Session, tmp_path: Path) -> None:
    kept = session.sql("select range k, repeat('x', 100) s from range(300000)").repartition(3, by_rows=True).compute()
    (file,) = (tmp_path / "root").glob("steps/*/*.exchange")
    data = bytearray(file.read_bytes())
    data[-len(data) // 8 :] = bytes(len(data) // 8 + 1)
    file.unlink()
    file.write_bytes(data)
    reader = kept.to_batches()
    first = reader.read_next_batch()
    with pytest.raises(ExchangeCorrupt, match="checksum"):
        reader.read_all()
    assert first.num_rows > 0
    assert kept.count() == len(kept.to_arrow()) == 300000
