"""How scans are found in a query's text, and cut into the shares of tasks.

Run: pytest tests/dataflow/test_filescans.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import emberflow
import fsspec
import pytest
from emberflow.job.identity import stores
from emberflow.plan.doubt import doubt
from emberflow.plan.filescans import File, ResolvedScan, Share
from emberflow.plan.footers import Footers
from emberflow.plan.resolving import listed, resolve
from emberflow.plan.scantext import FileScan, find
from fsspec.implementations.memory import MemoryFileSystem


@pytest.mark.parametrize(
    ("text", "expected", "scans"),
    [
        ("from 'a.parquet'", 'from S0 AS "a"', [FileScan("read_parquet", ("a.parquet",))]),
        ("select * from 's3://b/*.csv.gz' t", "select * from S0 t", [FileScan("read_csv", ("s3://b/*.csv.gz",))]),
        ("from read_parquet('a')", 'from S0 AS "read_parquet"', [FileScan("read_parquet", ("a",))]),
        ("from parquet_scan(['a', 'b'])", 'from S0 AS "parquet_scan"', [FileScan("read_parquet", ("a", "b"))]),
        (
            "from read_csv_auto('a', delim = '|', types={'x': 'INT'}) t where x = '('",
            "from S0 t where x = '('",
            [FileScan("read_csv", ("a",), ", delim = '|', types={'x': 'INT'}")],
        ),
        (
            "from 'a.json' join 'b.jsonl' using (k)",
            'from S0 AS "a" join S1 AS "b" using (k)',
            [FileScan("read_json", ("a.json",)), FileScan("read_json", ("b.jsonl",))],
        ),
        (
            "from 'a.parquet' x, read_parquet('a.parquet') y",
            "from S0 x, S0 y",
            [FileScan("read_parquet", ("a.parquet",))],
        ),
        (
            "from 'it''s é.parquet' -- from 'no.csv'",
            "from S0 AS \"it's é\" -- from 'no.csv'",
            [FileScan("read_parquet", ("it's é.parquet",))],
        ),
        (
            "select trim((select t from 'a.csv')), extract(year from d) from 'a.csv'",
            'select trim((select t from S0 AS "a")), extract(year from d) from S0 AS "a"',
            [FileScan("read_csv", ("a.csv",))],
        ),
        ("from 'd/*.csv' where x", 'from S0 AS "d/*.csv" where x', [FileScan("read_csv", ("d/*.csv",))]),
        (
            "from read_csv('a', header := true, -- the data :)\n /* ( */ names = ['a,b', \"c\"]) as x",
            "from S0 as x",
            [FileScan("read_csv", ("a",), ", header := true, names = ['a,b', \"c\"]")],
        ),
    ],
)
def test_a_scan_is_found_and_named(text: str, expected: str, scans: list[FileScan]) -> None:
    found, named = find(text, prefix="S")
    assert found == expected
    assert list(named.values()) == scans


@pytest.mark.parametrize(
    "text",
    [
        "select 'from ''a.parquet''' from t",
        "select extract(year from date '2020-01-01')",
        "select substring('abc.parquet' from 2)",
        "select extract(year from 'x.csv'), trim(both 'v' from 'x.csv'), trim(from 'y.parquet')",
        "select x is distinct from 'abc.csv', y is not distinct from 'd.csv'",
        "from read_csv('a.csv', filename = true)",
        "from read_parquet($paths)",
        "from read_parquet('a' || 'b')",
        "from read_parquet([x for x in y])",
        "select read_parquet from t",
        "from range(10)",
    ],
)
def test_what_is_no_scan_stays(text: str) -> None:
    assert find(text) == (text, {})


def scan_of(*files: File) -> ResolvedScan:
    return ResolvedScan(FileScan("read_parquet", ("x",)), (), files)


def test_shares_follow_bytes_and_keep_files_whole_and_in_order() -> None:
    files = [File(f"f{i}", size, "") for i, size in enumerate([40, 40, 40, 100, 10, 10])]
    shares = scan_of(*files).shares(100)
    assert [share.files for share in shares] == [("f0", "f1", "f2"), ("f3",), ("f4", "f5")]
    assert sum(share.size_bytes for share in shares) == 240


def test_a_large_file_is_cut_between_row_groups() -> None:
    shares = scan_of(File("f", 1000, "", (10, 20, 30, 40))).shares(250)
    assert [(share.first_row, share.end_row) for share in shares] == [(0, 10), (10, 30), (30, 60), (60, 100)]
    assert all(share.files == ("f",) for share in shares)


def test_there_are_as_many_shares_as_asked_for_if_the_files_allow() -> None:
    assert len(scan_of(*(File(f"f{i}", 10, "") for i in range(9))).shares(1_000_000, at_least=4)) >= 4
    exactly = scan_of(*(File(f"f{i}", 10 + i, "") for i in range(5))).shares(0, exactly=3)
    assert len(exactly) == 3
    assert sorted(file for share in exactly for file in share.files) == ["f0", "f1", "f2", "f3", "f4"]
    assert [share.files for share in scan_of(File("f", 1, "")).shares(0, exactly=2)] == [("f",), ()]


def test_no_files_make_one_empty_share() -> None:
    assert scan_of().shares(100) == [Share((), 0)]


def resolved(scan: FileScan, connection: duckdb.DuckDBPyConnection) -> ResolvedScan:
    return resolve(scan, listed(scan, {}), Footers(), connection)


def test_the_shares_of_a_real_scan_are_its_rows(tmp_path: Path) -> None:
    connection = duckdb.connect()
    connection.execute(
        f"copy (select i k, i % 7 h from range(50000) t(i)) to '{tmp_path}/a.parquet' (row_group_size 10000)"
    )
    connection.execute(f"copy (select i k, i % 7 h from range(50000, 50010) t(i)) to '{tmp_path}/b.parquet'")
    scan = resolved(FileScan("read_parquet", (f"{tmp_path}/*.parquet",)), connection)
    assert [column.type for column in scan.columns] == ["BIGINT", "BIGINT"]
    assert scan.rows == 50010
    shares = scan.shares(scan.size_bytes // 4)
    assert len(shares) > 2
    total = " UNION ALL ".join(f"FROM {scan.sql(share, ['k'])}" for share in shares)
    assert connection.execute(f"SELECT count(*), sum(c0) FROM ({total})").fetchone() == (50010, sum(range(50010)))


def test_csv_shares_have_the_types_of_the_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("k,v\n1,2\n")
    (tmp_path / "b.csv").write_text("k,v\n3,x\n")
    connection = duckdb.connect()
    scan = resolved(FileScan("read_csv", (f"{tmp_path}/*.csv",)), connection)
    rows = [connection.execute(f"FROM {scan.sql(share, ['v'])}").fetchall() for share in scan.shares(1)]
    assert rows == [[("2",)], [("x",)]]


def test_a_scan_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(emberflow.DatasetNotFound, match=r"\*\.parquet"):
        listed(FileScan("read_parquet", (f"{tmp_path}/*.parquet",)), {})


# ---- texts that nobody planned


@pytest.fixture
def session() -> Iterator[emberflow.Session]:
    with emberflow.init(
        executor="inline", shuffle="always", partitions=3, partition_bytes=1, broadcast_bytes=0
    ) as made:
        yield made


def rows(frame: emberflow.DataFrame) -> list[tuple[Any, ...]]:
    return sorted((tuple(row.values()) for row in frame.take_all()), key=str)


@pytest.mark.parametrize(
    "text",
    [
        "select now() from t",
        "select CURRENT_DATE from t",
        "select x from t where d > current_timestamp - interval 1 day",
        "select age(d) from t",
        "select random() from t",
        "select uuid() from t",
        "from t using sample 10%",
        'from "f.parquet"',
        "from 'f.unknown'",
        "from query('from f')",
        "from glob('*.csv')",
        "from main.t",
        "from t where x in (select y from other)",
        "pivot t on x using sum(y)",
        "show tables",
    ],
)
def test_a_text_that_may_give_other_rows_is_in_doubt(text: str) -> None:
    assert doubt(text, ["t"]) is not None


@pytest.mark.parametrize(
    "text",
    [
        "select sum(x) over (order by y), row_number() over () from T",
        "with c as (select x, year(d) n from t) select n from c, range(3) r(i), unnest([1, 2])",
        "select my_own_function(x), date_trunc('day', d), strftime(d, '%Y') from t",
        "select now, today from t tablesample reservoir(3 rows) repeatable (5)",
    ],
)
def test_an_ordinary_text_is_not_in_doubt(text: str) -> None:
    assert doubt(text, ["t"]) is None


@pytest.mark.parametrize("reading", ["'{}'", '"{}"', "query('from ''{}''')"])
def test_a_text_sees_a_file_that_was_written_anew(session: emberflow.Session, tmp_path: Path, reading: str) -> None:
    file = tmp_path / "f.parquet"
    side = session.sql("select 1 as k").repartition(1, by_rows=True)
    table = reading.format(file)
    whole, part = f"select y from {table} using sample 100%", f"select y from {{0}} join {table} f using (k)"
    for value in ("old", "new"):
        duckdb.execute(f"copy (select 1 as k, '{value}' as y) to '{file}'")
        assert rows(session.sql(whole)) == rows(session.partial_sql(part, side)) == [(value,)]


@pytest.mark.parametrize("value", ["now()", "random()", "current_timestamp"])
def test_a_text_reads_the_clock_each_time(session: emberflow.Session, value: str) -> None:
    side = session.sql("select 1 as k").repartition(1, by_rows=True)
    whole, part = f"select {value} from (values (1)) using sample 100%", f"select {value} from {{0}}"
    assert rows(session.sql(whole)) != rows(session.sql(whole))
    assert rows(session.partial_sql(part, side)) != rows(session.partial_sql(part, side))


def same_as_duckdb(session: emberflow.Session, query: str) -> None:
    assert rows(session.sql(query)) == sorted(duckdb.sql(query).fetchall(), key=str)


@pytest.mark.parametrize(
    "query",
    [
        "select a.x from '{}/a.csv'",
        "select read_csv.x from read_csv('{}/a.csv', header := true, -- so :)\n delim = ',') where x > 0",
        "select filename, count(*) from '{}/a.csv' group by all",
        "select x from '{}/a.csv' where 'a' is distinct from 'report.csv'",
    ],
)
def test_a_query_that_duckdb_understands_is_understood(session: emberflow.Session, tmp_path: Path, query: str) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3,4\n")
    same_as_duckdb(session, query.format(tmp_path))


def test_names_of_files_are_as_relative_as_they_were_given(
    session: emberflow.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3,4\n")
    monkeypatch.chdir(tmp_path)
    same_as_duckdb(session, "select x, filename from read_csv('*.csv', filename = true)")


def test_a_query_that_duckdb_refuses_is_the_users_error(session: emberflow.Session, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(emberflow.QueryError, match="nowhere"):
        session.sql(f"select nowhere from '{tmp_path}/a.csv'").take_all()


class Forgetful(MemoryFileSystem):
    """A filesystem that knows the names and sizes of its files, and nothing else."""

    protocol = "forgetful"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("forgetful://")))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        known = super().info(path, **kwargs)
        return {key: known[key] for key in ("name", "size", "type")}


def test_files_of_unknown_age_are_read_each_time(session: emberflow.Session) -> None:
    fsspec.register_implementation("forgetful", Forgetful, clobber=True)
    for value in ("a", "b"):
        Forgetful().pipe_file("/f.csv", f"x\n{value}\n".encode())
        assert rows(session.sql("select x from 'forgetful://f.csv' group by x")) == [(value,)]


def test_a_store_is_told_by_its_endpoint_and_not_by_its_secrets() -> None:
    def options(endpoint: str, secret: str) -> dict[str, Any]:
        return {"s3": {"client_kwargs": {"endpoint_url": endpoint}, "secret": secret}}

    assert stores(options("a", "x")) == stores(options("a", "y")) != stores(options("b", "x"))


# ---- files of one scan that differ


def test_parquet_files_of_other_types_and_columns(session: emberflow.Session, tmp_path: Path) -> None:
    for name, select in [
        ("w/a", "1::INT x"),
        ("w/b", "1::BIGINT x"),
        ("u/a", "1 x"),
        ("u/b", "2 x, 3 y"),
        ("p=01/a", "1 x"),
        ("p=z/a", "2 x"),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        duckdb.execute(f"copy (select {select}) to '{tmp_path}/{name}.parquet'")
    same_as_duckdb(session, f"select x, count(*) from '{tmp_path}/w/*.parquet' group by x")
    union = f"read_parquet('{tmp_path}/u/*.parquet', union_by_name = true)"
    same_as_duckdb(session, f"select y, count(*) from {union} group by y")
    hive = f"read_parquet('{tmp_path}/p=*/*.parquet')"
    same_as_duckdb(session, f"select p, count(*) from {hive} group by p")


@pytest.mark.parametrize("reader", ["read_csv", "read_json"])
def test_columns_that_are_in_no_file(session: emberflow.Session, tmp_path: Path, reader: str) -> None:
    for part in (1, 2):
        (tmp_path / f"k={part}").mkdir()
        text = f"a,b\n{part},x\n" if reader == "read_csv" else f'{{"a": {part}, "b": "x"}}\n'
        (tmp_path / f"k={part}" / "f").write_text(text)
    same_as_duckdb(session, f"select * from {reader}('{tmp_path}/*/f', filename = true, hive_partitioning = true)")


def test_csv_shares_have_the_dialect_of_the_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id;txt\n1;"a;b"\n2;c,d\n')
    (tmp_path / "b.csv").write_text("id;txt\n3;e,f\n")
    connection = duckdb.connect()
    scan = resolved(FileScan("read_csv", (f"{tmp_path}/*.csv",)), connection)
    parts = [connection.execute(f"FROM {scan.sql(share, ['id', 'txt'])}").fetchall() for share in scan.shares(1)]
    assert parts == [[(1, "a;b"), (2, "c,d")], [(3, "e,f")]]


def test_csv_files_of_several_dialects_are_one_share(session: emberflow.Session, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id;txt\n1;a\n2;c\n")
    (tmp_path / "b.csv").write_text("id,txt\n3,e\n4,f\n")
    scan = resolved(FileScan("read_csv", (f"{tmp_path}/*.csv",)), duckdb.connect())
    assert [len(share.files) for share in scan.shares(1)] == [2]
    assert [len(share.files) for share in scan.shares(1, exactly=2)] == [2, 0]
    same_as_duckdb(session, f"select * from '{tmp_path}/*.csv'")
