"""Files and row groups that hold nothing of what a query asks for are left out; its rows stay those of plain DuckDB.

Run: pytest tests/dataflow/test_skipping.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import emberflow
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emberflow.plan import footers
from emberflow.plan.conditions import Check, Several, conditions_of
from emberflow.plan.nodes import Column, Expr
from fsspec.implementations.memory import MemoryFileSystem


@pytest.fixture
def session() -> Iterator[emberflow.Session]:
    with emberflow.init(
        executor="inline", shuffle="always", partitions=2, partition_bytes=1, broadcast_bytes=0
    ) as made:
        yield made


def rows(frame: emberflow.DataFrame) -> list[tuple[Any, ...]]:
    return sorted((tuple(row.values()) for row in frame.take_all()), key=str)


def files_read(frame: emberflow.DataFrame) -> list[int]:
    """How many files each scan of the plan reads."""
    return [int(count) for count in re.findall(r"input \d+: (\d+)(?: of \d+)? files", frame.explain())]


def checked(session: emberflow.Session, text: str) -> list[int]:
    """Compares the query's rows with plain DuckDB's; how many files each of its scans reads."""
    frame = session.sql(text)
    assert rows(frame) == sorted(duckdb.sql(text).fetchall(), key=str)
    return files_read(frame)


# ---- conditions

COLUMNS = [Column("n", "INTEGER"), Column("d", "DECIMAL(10,2)"), Column("t", "TIMESTAMP WITH TIME ZONE")]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("(", 0, " = CAST(5 AS INTEGER))"), [Check(0, "=", ("CAST(5 AS INTEGER)",))]),
        (("(CAST(5 AS INTEGER) < ", 0, ")"), [Check(0, ">", ("CAST(5 AS INTEGER)",))]),
        (("(", 1, " IN (CAST('1.00' AS DECIMAL(10,2))))"), [Check(1, "IN", ("CAST('1.00' AS DECIMAL(10,2))",))]),
        (("(", 2, " IS NOT NULL)"), [Check(2, "IS NOT NULL")]),
        (
            ("((", 0, " >= CAST(-5 AS INTEGER)) AND (", 2, " IS NULL))"),
            [Check(0, ">=", ("CAST(-5 AS INTEGER)",)), Check(2, "IS NULL")],
        ),
        (("((", 0, " IS NULL) OR (", 1, " IS NULL))"), [Several("OR", (Check(0, "IS NULL"), Check(1, "IS NULL")))]),
        (("(", 0, " = CAST(5 AS BIGINT))"), []),
        (("(", 0, " = ", 1, ")"), []),
        (("(CAST(", 0, " AS BIGINT) = CAST(5 AS BIGINT))"), [Check(0, "=", ("CAST(5 AS BIGINT)",), "BIGINT")]),
        (("(CAST(", 0, " AS BIGINT) = CAST(5 AS INTEGER))"), []),
        (("(NOT (", 0, " = CAST(5 AS INTEGER)))"), []),
        (("(", 0, " = abs(CAST(5 AS INTEGER)))"), []),
        (("(", 0, " = CAST(5 AS INTEGER)) AND true"), []),
        (("((", 0, " IS NULL) OR (", 1, " IS NULL) AND (", 1, " IS NULL))"), []),
    ],
)
def test_only_comparisons_with_constants_are_conditions(
    pieces: tuple[str | int, ...], expected: list[Check | Several]
) -> None:
    assert list(conditions_of(Expr(pieces, "BOOLEAN"), COLUMNS)) == expected


def test_what_changes_is_no_condition() -> None:
    assert conditions_of(Expr(("(", 0, " IS NULL)"), "BOOLEAN", volatile=True), COLUMNS) == ()


# ---- values in paths


@pytest.fixture
def months(tmp_path: Path) -> str:
    """Twelve files, by year, and by month as a number of two digits."""
    for year in (2023, 2024, 2025):
        for month in range(1, 5):
            folder = tmp_path / f"year={year}" / f"month={month:02d}"
            folder.mkdir(parents=True)
            duckdb.execute(f"copy (select {year} * 100 + {month} ym, range x from range(3)) to '{folder}/f.parquet'")
    return f"read_parquet('{tmp_path}/*/*/*.parquet')"


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("year = 2024", 4),
        ("year <> 2024", 8),
        ("2024 < year", 4),
        ("year in (2023, 2025) and month = 1", 2),
        ("year between 2024 and 2030", 8),
        ("year = 2024 and x > 1", 4),
        ("year = 2024 or month = 3", 6),
        ("year is null", 0),
        ("year is not null", 12),
        ("year = 1999", 0),
        ("year = '2024'", 4),
        ("year % 2 = 0", 12),
        ("year = 2024 or x = 1", 12),
        ("year > 2023.5", 8),
        ("month = '01' and year > 2023", 2),
    ],
)
def test_files_are_left_out_by_their_paths(session: emberflow.Session, months: str, where: str, count: int) -> None:
    assert checked(session, f"select year, month, x, count(*) from {months} where {where} group by all") == [count]


def test_each_scan_has_its_own_files(session: emberflow.Session, months: str) -> None:
    text = f"select a.x, b.ym from {months} a join {months} b using (x) where a.year = 2024 and b.month = 2"
    assert sorted(checked(session, text)) == [3, 4]
    union = f"select x from {months} where year = 2023 and month = 1 union all select ym from {months}"
    assert sorted(checked(session, union)) == [1, 12]
    with_cte = f"with c as materialized (select * from {months} where year = 2024) select * from c a join c b using (x)"
    assert checked(session, with_cte) == [4]


def test_the_plan_says_what_is_left_out(session: emberflow.Session, months: str) -> None:
    told = session.sql(f"select x from {months} where year = 2024 order by x").explain()
    assert re.search(r"4 of 12 files, [\d,]+ of [\d,]+ bytes", told)
    assert " of 12 files" not in session.sql(f"select x from {months} order by x").explain()


@pytest.mark.parametrize("value", ["a%20b", "NULL", "null", "__HIVE_DEFAULT_PARTITION__", "", "é"])
@pytest.mark.parametrize("where", ["k = 'x'", "k <> 'x'", "k is null", "k = 'a b'", "k is not null"])
def test_paths_with_values_written_in_their_own_way(
    session: emberflow.Session, tmp_path: Path, value: str, where: str
) -> None:
    for key in (value, "x"):
        (tmp_path / f"k={key}").mkdir()
        duckdb.execute(f"copy (select {literal(key)} v) to '{tmp_path}/k={key}/f.parquet'")
    checked(session, f"select v, k, count(*) from '{tmp_path}/*/*.parquet' where {where} group by all")


def literal(value: str) -> str:
    return f"'{value}'"


@pytest.mark.parametrize("types", ["", ", hive_types = {'day': VARCHAR}", ", hive_types_autocast = false"])
def test_paths_have_the_types_that_the_query_says(session: emberflow.Session, tmp_path: Path, types: str) -> None:
    for day in ("2024-01-02", "2024-01-10", "2024-02-01"):
        (tmp_path / f"day={day}").mkdir()
        duckdb.execute(f"copy (select 1 v) to '{tmp_path}/day={day}/f.parquet'")
    table = f"read_parquet('{tmp_path}/*/*.parquet', hive_partitioning = true{types})"
    assert checked(session, f"select v, day, count(*) from {table} where day >= '2024-01-10' group by all") == [2]


def test_rows_of_csv_files_are_left_out_by_their_paths(session: emberflow.Session, tmp_path: Path) -> None:
    for part in range(4):
        (tmp_path / f"k={part}").mkdir()
        (tmp_path / f"k={part}" / "f.csv").write_text(f"a,b\n{part},x\n")
    assert checked(session, f"select a, k, count(*) from '{tmp_path}/*/*.csv' where k >= 2 group by all") == [2]


def test_a_column_in_the_path_and_in_the_file_is_not_trusted(session: emberflow.Session, tmp_path: Path) -> None:
    (tmp_path / "k=1").mkdir()
    duckdb.execute(f"copy (select 5 k, 1 v) to '{tmp_path}/k=1/a.parquet'")
    for k in (1, 5):
        checked(session, f"select v from '{tmp_path}/*/*.parquet' where k = {k}")
    duckdb.execute(f"copy (select 6 k, 1 v) to '{tmp_path}/k=1/b.parquet'")
    for k in (1, 5):
        checked(session, f"select v from '{tmp_path}/*/*.parquet' where k = {k}")


# ---- statistics


@pytest.fixture(params=["duckdb", "pyarrow"])
def ranges(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Files of 1000 rows in the order of n; NULLs only in the third of them, nothing else in the fourth."""
    for part in range(5):
        made = (
            "select n::integer n, n / 10.0::double f, (n / 4)::decimal(12, 3) d, "
            "date '2024-01-01' + n::integer AS day, timestamp '2024-01-01' + to_hours(n) ts, "
            "timestamptz '2024-01-01 00:00:00+00' + to_hours(n) tz, "
            "printf('%06d', n) s, n::utinyint u, (n % 1000) > 500 b, {'n': n} st, "
            f"case when {part} = 3 or ({part} = 2 and n % 2 = 0) then null else n end m "
            f"from range({part} * 1000, {part} * 1000 + 1000) t(n)"
        ).replace("n::utinyint", f"{part}::utinyint")
        path = f"{tmp_path}/{part}.parquet"
        if request.param == "duckdb":
            duckdb.execute(f"copy ({made}) to '{path}' (row_group_size 2048)")
        else:
            # A relation's own Arrow: what DuckDB would give any other writer.
            pq.write_table(duckdb.sql(made).to_arrow_table(), path)
    return f"'{tmp_path}/*.parquet'"


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("n = 1500", 1),
        ("n in (3, 4999)", 2),
        ("n between 999 and 1000", 2),
        ("n < 1000", 1),
        ("n <= 1000", 2),
        ("n > 3999", 1),
        ("n >= 3999", 2),
        ("n <> 5", 5),
        ("n = 1 or n = 4500", 2),
        ("n = 1 or f = 1", 5),
        ("n < 500 and s > '004000'", 0),
        ("d = 250", 1),
        ("d < 249.5", 1),
        ("day = '2024-01-05'", 1),
        ("ts < '2024-01-02 12:00:00'", 1),
        ("tz < '2024-01-02 12:00:00+00'", 1),
        ("s = '004321'", 1),
        ("s < '0009995'", 1),
        ("u = 3", 1),
        ("b", 5),
        ("f > 450", 5),
        ("m is null", 2),
        ("m is not null", 4),
        ("m > 2500", 2),
        ("st.n = 5", 5),
        ("abs(n) = 5", 5),
    ],
)
def test_files_are_left_out_by_their_statistics(
    session: emberflow.Session, ranges: str, where: str, count: int
) -> None:
    text = f"select n, s, m, count(*) from {ranges} where {where} group by all"
    assert checked(session, text) == [count]


def test_row_groups_are_left_out_of_shares(session: emberflow.Session, tmp_path: Path) -> None:
    path = f"{tmp_path}/f.parquet"
    duckdb.execute(f"copy (select range n, md5(range::varchar) t from range(20480)) to '{path}' (row_group_size 2048)")
    text = f"select n, t from '{path}' where n between 5000 and 7000 or n = 20000"
    frame = session.sql(text)
    found = re.search(r"1 of 1 files, ([\d,]+) of ([\d,]+) bytes", frame.explain())
    assert found is not None
    read, everything = (int(number.replace(",", "")) for number in found.groups())
    assert everything * 0.25 < read < everything * 0.35
    checked(session, text)
    frame.compute()
    assert sum(event.kind == "task" for event in session.jobs.last) <= 4


def test_floats_are_not_trusted(session: emberflow.Session, tmp_path: Path) -> None:
    for part, values in enumerate([[1.0, 2.0], [3.0, float("nan")]]):
        pq.write_table(pa.table({"x": values}), f"{tmp_path}/{part}.parquet")
    assert files_read(session.sql(f"select x from '{tmp_path}/*.parquet' where x > 10")) == [2]


def test_a_file_of_another_type_is_not_trusted(session: emberflow.Session, tmp_path: Path) -> None:
    duckdb.execute(f"copy (select 5 x) to '{tmp_path}/a.parquet'")
    duckdb.execute(f"copy (select unnest(['10', '50', '9']) x) to '{tmp_path}/b.parquet'")
    assert checked(session, f"select x, count(*) from '{tmp_path}/*.parquet' where x = 50 group by all") == [1]
    duckdb.execute(f"copy (select 'z' x) to '{tmp_path}/1.parquet'")
    duckdb.execute(f"copy (select unnest([1, 10, 9]) x) to '{tmp_path}/2.parquet'")
    checked(session, f"select x, count(*) from '{tmp_path}/[12].parquet' where x = '10' group by all")


def test_columns_under_other_names_are_not_trusted(session: emberflow.Session, tmp_path: Path) -> None:
    for part in (1, 2):
        duckdb.execute(
            f"copy (select {part} a, {10 - part} b) to '{tmp_path}/{part}.parquet' (field_ids {{a: 1, b: 2}})"
        )
    renamed = "schema = map {1: {name: 'b', type: 'INTEGER', default_value: NULL}}"
    checked(session, f"select b, count(*) from read_parquet('{tmp_path}/*.parquet', {renamed}) where b = 1 group by b")


def test_text_that_was_cut_in_statistics(session: emberflow.Session, tmp_path: Path) -> None:
    for part, letter in enumerate(["a", "é", "\U0001f600"]):
        duckdb.execute(f"copy (select repeat('{letter}', 500) || range s from range(5)) to '{tmp_path}/{part}.parquet'")
    table = f"'{tmp_path}/*.parquet'"
    for where in ("s > 'b'", "s < 'b'", "s >= repeat('é', 500)", "s = repeat('é', 500) || '3'", "s > '\\xff'"):
        checked(session, f"select s, count(*) from {table} where {where} group by all")


def test_a_member_is_not_taken_for_the_column_of_that_name(session: emberflow.Session, tmp_path: Path) -> None:
    for i in range(2):
        members = pa.array([{"b": 100}, {"b": 200}])
        pq.write_table(pa.table({"a": members, "a, b": pa.array([i, i + 1])}), tmp_path / f"{i}.parquet")
    assert checked(session, f"""SELECT "a, b", count(*) FROM '{tmp_path}/*.parquet' WHERE "a, b" = 1 GROUP BY ALL""")


def test_a_file_that_is_left_out_has_its_say_in_the_dialect(tmp_path: Path) -> None:
    """What another run has made of the files that are left counts only if they were read in the same way."""
    for k in (1, 2):
        (tmp_path / f"k={k}").mkdir()
    (tmp_path / "k=1" / "f.csv").write_text("a,s\n1,x#y\n2,z\n")
    text = f"SELECT a, s, count(*) FROM read_csv('{tmp_path}/*/*.csv', hive_partitioning=true) WHERE k = 1 GROUP BY ALL"
    found = []
    for other in ("a,s\n#hello\n1,z\n2,w\n", "a,s\n1,z\n2,w\n"):
        (tmp_path / "k=2" / "f.csv").write_text(other)
        for root in ("steps", f"new steps {len(found)}"):
            with emberflow.init(
                executor="inline", shuffle="always", partitions=2, data_root=str(tmp_path / root)
            ) as session:
                found.append(rows(session.sql(text)))
    with_comments, _, without, anew = found
    assert without == anew == sorted(duckdb.sql(text).fetchall(), key=str)
    assert with_comments != without


def test_with_too_much_to_know_nothing_is_left_out(
    session: emberflow.Session, ranges: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"SELECT n, count(*) FROM {ranges} WHERE n = 5 GROUP BY n"
    (few,) = checked(session, text)
    for limit in ("FOOTERS_MAX", "_STATISTICS_MAX"):
        with monkeypatch.context() as patch:
            patch.setattr(footers, limit, 1)
            with emberflow.init(executor="inline", shuffle="always", partitions=2, partition_bytes=1) as other:
                (all_of_them,) = checked(other, text)
        assert all_of_them > few


# ---- what is opened


class Counting(MemoryFileSystem):
    """A filesystem that counts what is read of each file."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    reads: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("counting://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.reads[self._strip_protocol(path)] += 1
        return bytes(super().cat_file(path, start=start, end=end, **kwargs))


def test_files_that_are_left_out_are_not_opened(session: emberflow.Session, tmp_path: Path) -> None:
    fsspec.register_implementation("counting", Counting, clobber=True)
    duckdb.execute(f"copy (select range x from range(100)) to '{tmp_path}/f.parquet'")
    data = (tmp_path / "f.parquet").read_bytes()
    for k in range(100):
        Counting().pipe_file(f"/t/k={k}/f.parquet", data)
    Counting.reads.clear()
    table = "read_parquet('counting://t/*/*.parquet')"
    assert rows(session.sql(f"select k, sum(x) from {table} where k in (41, 42) group by k")) == [
        (41, 4950),
        (42, 4950),
    ]
    # The first file says the columns; a few more, how many rows there may be.
    assert len(Counting.reads) <= 12
    assert {"/t/k=41/f.parquet", "/t/k=42/f.parquet"} <= Counting.reads.keys()


@pytest.mark.parametrize("pattern", ["counting://hive/*/*.parquet", "counting://plain/*/*.parquet"])
def test_footers_are_read_once(session: emberflow.Session, tmp_path: Path, pattern: str) -> None:
    fsspec.register_implementation("counting", Counting, clobber=True)
    for k in range(30):
        duckdb.execute(f"COPY (SELECT range + {100 * k} n FROM range(100)) TO '{tmp_path}/f.parquet'")
        data = (tmp_path / "f.parquet").read_bytes()
        Counting().pipe_file(f"/hive/k={k}/f.parquet", data)
        Counting().pipe_file(f"/plain/{k}/f.parquet", data)
    wheres = ["n = 501", "n = 702", "n % 2 = 0", "n % 3 = 0", "n > 903", "true"]
    session.sql(f"SELECT n, count(*) FROM read_parquet('{pattern}') WHERE n = 1104 GROUP BY n").explain()
    Counting.reads.clear()
    for where in wheres:
        session.sql(f"SELECT n, count(*) FROM read_parquet('{pattern}') WHERE {where} GROUP BY n").explain()
    # Types are looked up of what is to be left out for the first time.
    assert sum(Counting.reads.values()) <= 4
