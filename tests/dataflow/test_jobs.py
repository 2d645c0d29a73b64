"""Jobs: frames that one DuckDB in this process does not make, on each executor.

Run: pytest tests/dataflow/test_jobs.py.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import duckdb
import emberflow
import pyarrow as pa
import pytest
from emberflow.errors import FlowError
from emberflow.job.task import Attempt
from emberflow.jobs import TOGETHER_BYTES
from emberflow.writer import Target, WriteOptions, _kept_id


@pytest.fixture(params=["inline", "local"], scope="module")
def session(request: pytest.FixtureRequest) -> Iterator[emberflow.Session]:
    with emberflow.init(executor=request.param, workers=2, memory_limit="2GB") as session:
        yield session


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1000 rows in five files: k = 0..999, h = k % 5, s a text."""
    directory = tmp_path_factory.mktemp("files")
    with emberflow.init(threads=1) as session:
        for part in range(5):
            text = f"select range k, range % 5 h, 'x' || range s from range({part * 200}, {part * 200 + 200})"
            session.sql(text).write_parquet(f"{directory}/{part}.parquet")
    return str(directory)


@pytest.fixture
def rows(session: emberflow.Session, files: str) -> emberflow.DataFrame:
    return session.read_parquet(files)


def counts(frame: emberflow.DataFrame) -> list[int]:
    """The number of rows of each partition."""
    return sorted(row["n"] for row in frame.partial_sql("select count(*) n from {0}").take_all())


def kinds(session: emberflow.Session, kind: str) -> list[Any]:
    return [event for event in session.jobs.last if event.kind == kind]


def test_partitions_by_hash_hold_whole_groups(rows: emberflow.DataFrame) -> None:
    parted = rows.repartition(3, hash_by="h")
    groups = parted.partial_sql("select h, count(*) n, min(k) low from {0} group by h").take_all()
    assert sorted((row["h"], row["n"], row["low"]) for row in groups) == [(h, 200, h) for h in range(5)]
    assert len(counts(parted)) == 3


def test_partitions_by_files_by_rows_and_by_a_column(rows: emberflow.DataFrame) -> None:
    assert counts(rows.repartition(5)) == [200] * 5
    assert counts(rows.repartition(2)) == [400, 600]
    assert counts(rows.repartition(4, by_rows=True)) == [250] * 4
    by = rows.repartition(5, by="h").partial_sql("select min(h) low, max(h) high, count(*) n from {0}").take_all()
    assert sorted((row["low"], row["high"], row["n"]) for row in by) == [(h, h, 200) for h in range(5)]


def test_a_partition_number_that_does_not_exist_is_an_error(rows: emberflow.DataFrame) -> None:
    with pytest.raises(emberflow.FlowError, match="partition"):
        rows.repartition(3, by="h").count()


def test_a_shuffle_is_of_all_rows_and_repeats_by_its_seed(rows: emberflow.DataFrame) -> None:
    first = [row["k"] for row in rows.random_shuffle(seed=1).take_all()]
    assert sorted(first) == list(range(1000))
    assert first != sorted(first)
    assert [row["k"] for row in rows.random_shuffle(seed=1).take_all()] == first
    assert [row["k"] for row in rows.random_shuffle(seed=2).take_all()] != first


def test_partial_sql_takes_several_inputs_and_leaves_braces_alone(rows: emberflow.DataFrame) -> None:
    left = rows.repartition(3, hash_by="h")
    right = rows.filter("k < 100").repartition(3, hash_by="h")
    joined = rows.session.partial_sql(
        "select {'h': a.h} as s, count(*) n from {0} a join {1} b on a.h = b.h group by a.h", left, right
    )
    assert sorted((row["s"]["h"], row["n"]) for row in joined.take_all()) == [(h, 200 * 20) for h in range(5)]


def test_partial_sort_orders_each_partition(rows: emberflow.DataFrame) -> None:
    parted = rows.repartition(2, hash_by="s").partial_sort("k desc")
    tables = [row["k"] for row in parted.take_all()]
    breaks = sum(later > earlier for earlier, later in itertools.pairwise(tables))
    assert breaks == 1


def test_functions_of_rows_and_of_batches(rows: emberflow.DataFrame) -> None:
    doubled = rows.map(lambda row: {"k": row["k"], "twice": row["k"] * 2})
    assert doubled.schema == {"k": "BIGINT", "twice": "BIGINT"}
    assert sorted(row["twice"] for row in doubled.take_all()) == [2 * k for k in range(1000)]
    assert rows.filter(lambda row: row["k"] % 100 == 0).count() == 10
    assert rows.flat_map(lambda row: [{"k": row["k"]}] * (row["k"] % 3)).count() == sum(k % 3 for k in range(1000))
    heads = rows.repartition(5).map_batches(lambda table: table.slice(0, 2))
    assert heads.count() == 10


def test_sql_over_functions_and_functions_over_sql(rows: emberflow.DataFrame) -> None:
    marked = rows.filter("k < 50").map(lambda row: {"k": row["k"], "odd": row["k"] % 2 == 1})
    answer = rows.session.sql("select odd, count(*) n, sum(k) total from m group by odd order by odd", m=marked)
    assert [(row["odd"], row["n"], row["total"]) for row in answer.take_all()] == [(False, 25, 600), (True, 25, 625)]


def test_a_schema_says_what_a_function_makes(rows: emberflow.DataFrame) -> None:
    typed = rows.map(lambda row: {"k": row["k"], "x": None}, schema={"k": "INTEGER", "x": "DOUBLE"})
    assert typed.schema == {"k": "INTEGER", "x": "DOUBLE"}
    assert typed.count() == 1000


def _fails(row: dict[str, Any]) -> dict[str, Any]:
    return {"k": 1 // (row["k"] - 7)}


def _same(row: dict[str, Any]) -> dict[str, Any]:
    return row


FAILING: dict[str, Callable[[emberflow.DataFrame], emberflow.DataFrame]] = {
    "no schema": lambda f: f.map(_fails),
    "schema": lambda f: f.map(_fails, schema={"k": "BIGINT"}),
    "rows kept": lambda f: f.filter(lambda row: bool(_fails(row))),
    "many rows": lambda f: f.flat_map(lambda row: [_fails(row)], schema={"k": "BIGINT"}),
    "sql after it": lambda f: f.map(_fails, schema={"k": "BIGINT"}).select("k + 1 as k"),
    "functions around it": lambda f: (
        f.map(_same).map(_fails, schema={"k": "BIGINT"}).map(_same, schema={"k": "BIGINT"})
    ),
}


@pytest.mark.parametrize("how", FAILING)
def test_what_a_function_gets_wrong_is_said_with_its_row(rows: emberflow.DataFrame, how: str, tmp_path: Path) -> None:
    frame = FAILING[how](rows)
    for run in (frame.take_all, lambda: frame.write_parquet(f"{tmp_path}/failed")):
        with pytest.raises(emberflow.UserCodeError, match=r"failed.*ZeroDivisionError") as caught:
            run()
        assert "'k': 7" in str(caught.value)
        assert "in _fails" in str(caught.value)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert not kinds(rows.session, "retry")


def test_what_a_function_gives_that_its_schema_forbids_is_said_as_such(rows: emberflow.DataFrame) -> None:
    with pytest.raises(emberflow.UserCodeError, match="where the schema says INTEGER"):
        rows.map(lambda row: {"k": row["s"]}, schema={"k": "INTEGER"}).take_all()
    with pytest.raises(emberflow.UserCodeError, match=r"map_batches function .* ZeroDivisionError"):
        rows.map_batches(lambda table: 1 // 0, schema={"k": "BIGINT"}).take_all()


def test_an_error_of_duckdbs_below_a_function_stays_one(rows: emberflow.DataFrame) -> None:
    with pytest.raises(emberflow.QueryError, match="Could not convert") as caught:
        rows.select("cast(s as integer) i").map(_same, schema={"i": "INTEGER"}).take_all()
    assert "Python exception" not in str(caught.value)


def _exits(row: dict[str, Any]) -> dict[str, Any]:
    raise SystemExit(3)


@pytest.mark.parametrize("schema", [None, {"k": "BIGINT"}])
def test_a_function_that_ends_the_program_ends_its_task(
    rows: emberflow.DataFrame, schema: dict[str, str] | None
) -> None:
    with pytest.raises(emberflow.FlowError, match="SystemExit: 3") as caught:
        rows.map(_exits, schema=schema).take_all()
    assert not isinstance(caught.value, emberflow.QueryError)


def test_partitions_are_tasks_of_their_own_where_functions_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberflow.jobs.TOGETHER_BYTES", TOGETHER_BYTES)
    same = emberflow.udf(["BIGINT"], "BIGINT", name="same_k")(lambda k: k)
    with emberflow.init(executor="inline", partitions=8) as session:
        parted = session.sql("select range k from range(2000)").repartition(4, hash_by="k")
        groups = session.sql("select distinct k % 100 k from p", p=parted)
        session.create_function(same)
        for frame, expected in (
            (groups.select("k + 1 k"), 1),
            (groups.map(_same, schema={"k": "BIGINT"}), 8),
            (groups.select("same_k(k) k"), 8),
        ):
            assert len(frame.take_all()) == 100
            assert [event.data["tasks"] for event in kinds(session, "stage")][-1] == expected


def test_bad_sql_is_duckdbs_own_error(rows: emberflow.DataFrame) -> None:
    with pytest.raises(emberflow.QueryError, match="nothere"):
        rows.repartition(2).partial_sql("select nothere from {0}").take_all()
    with pytest.raises(emberflow.QueryError, match="Could not convert"):
        rows.repartition(2).partial_sql("select cast(s as integer) from {0}").take_all()


def test_rows_are_made_once_and_again_when_asked(rows: emberflow.DataFrame) -> None:
    frame = rows.filter("k < 77").map(lambda row: row)
    assert not frame.is_computed()
    frame.compute()
    assert frame.is_computed()
    rows.session.jobs.last.clear()
    assert frame.count() == 77
    assert not kinds(rows.session, "task")
    frame.recompute()
    assert kinds(rows.session, "done")


def test_a_step_done_once_is_not_done_again(session: emberflow.Session, files: str) -> None:
    def parted() -> emberflow.DataFrame:
        return session.read_parquet(files).repartition(3, hash_by="s")

    parted().compute()
    parted().compute()
    assert not kinds(session, "task")
    os.utime(glob.glob(f"{files}/*.parquet")[0])
    parted().compute()
    assert kinds(session, "task")


@pytest.mark.parametrize("format", ["parquet", "csv", "json"])
def test_a_job_writes_a_dataset(rows: emberflow.DataFrame, format: str, tmp_path: Path) -> None:
    frame = rows.repartition(3, hash_by="h").partial_sql("select *, k::hugeint as wide from {0}")
    target = f"{tmp_path}/out"
    report = getattr(frame, f"write_{format}")(target)
    assert report.num_rows == 1000
    assert report.num_files == 3
    again = getattr(rows.session, f"read_{format}")(target)
    assert again.count() == 1000
    assert [row["k"] for row in again.sort("k").take(3)] == [0, 1, 2]
    assert again.columns == ["k", "h", "s", "wide"]
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(emberflow.DatasetExists):
        getattr(frame, f"write_{format}")(target)
    getattr(frame, f"write_{format}")(target, mode="append")
    assert getattr(rows.session, f"read_{format}")(target).count() == 2000


def test_a_job_writes_one_file_or_hive_partitions(rows: emberflow.DataFrame, tmp_path: Path) -> None:
    frame = rows.repartition(2, hash_by="h").partial_sql("select * from {0}")
    frame.write_parquet(f"{tmp_path}/one.parquet")
    assert rows.session.read_parquet(f"{tmp_path}/one.parquet").count() == 1000
    frame.write_parquet(f"{tmp_path}/hive", partition_by="h")
    assert sorted(os.listdir(f"{tmp_path}/hive")) == [f"h={h}" for h in range(5)]
    assert rows.session.read_parquet(f"{tmp_path}/hive").filter("h = 3").count() == 200


def test_a_failed_write_leaves_nothing(rows: emberflow.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(emberflow.QueryError):
        rows.repartition(3).partial_sql("select cast(s as integer) from {0}").write_parquet(f"{tmp_path}/out")
    assert os.listdir(tmp_path) == []


def test_tables_in_memory_go_through_jobs_too(session: emberflow.Session) -> None:
    table = pa.table({"k": [1, 2, 3, None], "s": ["a", None, "ä", "\0"]})
    frame = session.from_arrow(table).repartition(2, by_rows=True).partial_sql("select * from {0}")
    assert sorted(frame.to_arrow().to_pylist(), key=str) == sorted(table.to_pylist(), key=str)


def test_wide_integers_of_a_function_are_written(rows: emberflow.DataFrame, tmp_path: Path) -> None:
    wide = rows.filter("k < 3").map(
        lambda row: {"k": row["k"], "w": 2**70 + row["k"]}, schema={"k": "BIGINT", "w": "HUGEINT"}
    )
    wide.write_parquet(f"{tmp_path}/out")
    written = rows.session.read_parquet(f"{tmp_path}/out").sort("k").take_all()
    assert [int(row["w"]) for row in written] == [2**70, 2**70 + 1, 2**70 + 2]


def test_a_write_of_a_named_job_goes_on_and_can_be_done_twice(files: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"executor": "inline", "data_root": f"{tmp_path}/root", "job_id": "nightly"}
    with emberflow.init(**settings) as session:
        for times in (1, 2):
            parted = session.read_parquet(files).repartition(2, hash_by="h")
            assert parted.write_parquet(f"{tmp_path}/out", mode="append").num_rows == 1000
            assert session.read_parquet(f"{tmp_path}/out").count() == 1000 * times
    assert sorted(os.listdir(tmp_path)) == ["out", "root"]


def test_an_append_that_was_killed_half_way_is_made_once(files: str, tmp_path: Path) -> None:
    out = f"{tmp_path}/out"
    settings: dict[str, Any] = {"data_root": f"{tmp_path}/root", "job_id": "nightly", "executor": "inline"}
    with emberflow.init(**settings) as session:
        frame = session.read_parquet(files).repartition(3, hash_by="k")
        frame.write_parquet(out)
        count = session.read_parquet(out).count()
        # As a driver leaves it that is killed after the first of its moves.
        stage = Target(out, WriteOptions(format="parquet"), {}, id=_kept_id(frame, out))._stage
        Path(stage, "new").mkdir(parents=True)
        for path in (f"{out}/part-x-00000.parquet", f"{stage}/new/part-x-00001.parquet"):
            session.read_parquet(out).limit(5).write_parquet(path)
        Path(stage, "appending.json").write_text('["part-x-00000.parquet", "part-x-00001.parquet"]')
        assert session.read_parquet(out).count() == count + 5
        frame.write_parquet(out, mode="append")
        assert session.read_parquet(out).count() == 2 * count


def test_a_bug_of_ours_is_told_as_one(files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("two and two")

    monkeypatch.setattr(Attempt, "_write", broken)
    with emberflow.init(executor="inline") as session:
        rows = session.read_parquet(files).repartition(2, by_rows=True)
        with pytest.raises(FlowError, match=r"a bug in emberflow.* in repartition by rows 0\.0: two and two") as caught:
            rows.compute()
    assert not isinstance(caught.value, AssertionError)
    assert isinstance(caught.value.__cause__, AssertionError)


def test_workers_with_another_duckdb_are_refused(
    session: emberflow.Session, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = session.read_parquet(files).repartition(2, hash_by="h")
    monkeypatch.setattr("emberflow.job.job.duckdb_minor", lambda: "0.9")
    with pytest.raises(emberflow.FlowError, match=r"has DuckDB \d+\.\d+, and the driver 0\.9: install the same one"):
        frame.partial_sql("select count(*) n from {0}").take_all()


def test_a_cancelled_attempt_interrupts_each_cursor_that_is_open() -> None:
    attempt, interrupted = Attempt(cast(Any, SimpleNamespace(columns=None)), cast(Any, None)), list[str]()
    closed = duckdb.connect()
    closed.close()
    attempt._cursors = [closed, SimpleNamespace(interrupt=lambda: interrupted.append("open"))]
    attempt._interrupt()
    assert interrupted == ["open"]
