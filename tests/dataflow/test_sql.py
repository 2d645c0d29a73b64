"""Queries over whole datasets: files named in the SQL, tables in memory, parameters. Run: pytest tests/dataflow"""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor

import emberflow
import pandas as pd
import pyarrow as pa
import pytest
from emberflow import DataFrame, DatasetNotFound, InvalidArgument, QueryError, Session


def test_sql_reads_the_files_its_text_names(session: Session, numbers: DataFrame, root: str) -> None:
    numbers.write_parquet(f"{root}/data", file_size_bytes=1000)
    result = session.sql(f"select k, count(*) c, sum(n) s from '{root}/data/*.parquet' group by k order by k")
    assert result.take_all() == [
        {"k": "k0", "c": 334, "s": 166833},
        {"k": "k1", "c": 333, "s": 166167},
        {"k": "k2", "c": 333, "s": 166500},
    ]
    assert result.schema == {"k": "VARCHAR", "c": "BIGINT", "s": "HUGEINT"}
    assert result.columns == ["k", "c", "s"]


def test_a_frame_reads_anew_at_each_action(session: Session, root: str) -> None:
    frame = session.sql(f"select * from '{root}/x.parquet'")
    session.from_items([1]).write_parquet(f"{root}/x.parquet")
    assert frame.count() == 1
    session.from_items([1, 2]).write_parquet(f"{root}/x.parquet", mode="overwrite")
    assert frame.take_all() == [{"item": 1}, {"item": 2}]


def test_braces_quotes_and_comments_in_sql_are_kept(session: Session) -> None:
    frame = session.sql("select {'x': n, 'y': '{}'} s, '?' q, '$a' d from t -- why? $b\n;", t=pa.table({"n": [1]}))
    assert frame.filter("s.x = 1 -- always").limit(5).take_all() == [{"s": {"x": 1, "y": "{}"}, "q": "?", "d": "$a"}]


def test_parameters_stay_with_their_query(session: Session) -> None:
    low = session.sql("select range n from range(10) where range < ? and 'ü?' <> ?", [4, "x"])
    high = session.sql("select range n from range(10) where range >= $limit", {"limit": 8})
    both = session.sql("from low union all from high where n <> $limit order by n", {"limit": 9}, low=low, high=high)
    assert [row["n"] for row in both.take_all()] == [0, 1, 2, 3, 8]
    assert both.filter("n > 2").count() == 2


@pytest.mark.parametrize("params", [[], [1, 2], {"x": 1}])
def test_parameters_that_do_not_fit_are_refused(session: Session, params: object) -> None:
    with pytest.raises(QueryError, match="parameter"):
        session.sql("select ?", params)  # type: ignore[arg-type]


def test_tables_of_the_same_name_do_not_meet(session: Session) -> None:
    one = session.sql("select sum(a) s from t", t=pa.table({"a": [1, 2]}))
    two = session.sql("select sum(a) s from t", t=pd.DataFrame({"a": [10, 20]}))
    assert session.sql("select t.s + u.s total from t, u", t=one, u=two).take_all() == [{"total": 33}]


def test_variables_of_the_program_are_not_tables(session: Session) -> None:
    frame = pd.DataFrame({"a": [1]})
    with pytest.raises(QueryError, match="frame"):
        session.sql("select * from frame").count()
    assert session.sql("select * from frame", frame=frame).count() == 1


def test_compose_select_filter_limit_and_explain(numbers: DataFrame) -> None:
    frame = numbers.select("n", "n * 2 as double").filter("double > 10").limit(3)
    assert frame.count() == 3
    assert frame.columns == ["n", "double"]
    assert numbers.take(2) == [{"n": 0, **_row(numbers, 0)}, {"n": 1, **_row(numbers, 1)}]
    assert "range" in frame.explain().lower()
    assert "<td>998</td>" not in numbers._repr_html_()
    assert "<td>19</td>" in numbers._repr_html_()
    assert "<u>" not in numbers.session.sql("select {'<u>': 1} as s")._repr_html_()
    assert "md5" in repr(numbers)


def test_an_error_shows_the_place(session: Session) -> None:
    with pytest.raises(QueryError, match=r"LINE \d+:   nope\n *\^"):
        session.sql("select\n  nope\nfrom range($n)", {"n": 3}).take_all()


def _row(numbers: DataFrame, n: int) -> dict[str, object]:
    (row,) = numbers.filter(f"n = {n}").select("k", "t").take_all()
    return row


def test_order_survives_streaming(session: Session) -> None:
    frame = session.sql("select range n from range(300000) order by n desc")
    batches = list(frame.to_batches(10_000))
    assert len(batches) > 1
    assert pa.Table.from_batches(batches)["n"].to_pylist() == list(range(299_999, -1, -1))
    assert frame.limit(2).take_all() == [{"n": 299_999}, {"n": 299_998}]


def test_wide_integers_and_time_zones(session: Session, root: str) -> None:
    frame = session.sql("select 170141183460469231731687303715884105727 - range big, 2::uhugeint u from range(1)")
    with pytest.raises(QueryError, match="DECIMAL"):
        frame.take_all()
    frame = session.sql("select sum(range) s, max(range)::uhugeint u, null::hugeint z from range(5)")
    assert frame.take_all() == [{"s": 10, "u": 4, "z": None}]
    assert frame.to_arrow().schema.field("s").type == pa.decimal128(38, 0)
    assert frame.to_pandas()["s"].tolist() == [10]
    frame.write_parquet(f"{root}/wide.parquet")
    assert session.read_parquet(f"{root}/wide.parquet").schema["s"] == "DECIMAL(38,0)"
    moment = session.sql("select timestamptz '2024-06-01 12:00:00+02' t, '2024-06-01'::timestamptz::varchar s")
    assert moment.take_all() == [
        {"t": datetime.datetime(2024, 6, 1, 10, tzinfo=datetime.UTC), "s": "2024-06-01 00:00:00+00"}
    ]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("selec 1", 'syntax error at or near "selec"'),
        ("select nope from range(2)", '"nope" not found'),
        ("select 'x'::int", "Could not convert string 'x'"),
        ("select error('boom')", "boom"),
    ],
)
def test_errors_keep_duckdbs_message(session: Session, query: str, message: str) -> None:
    with pytest.raises(QueryError, match=message) as caught:
        session.sql(query).take_all()
    assert caught.value.query == query
    with pytest.raises(ValueError, match=message):
        session.sql(query).count() if query.startswith("selec 1") else session.sql(query).to_arrow()


def test_an_error_in_the_middle_of_a_stream(session: Session) -> None:
    frame = session.sql("select case when range = 999999 then error('late') else range end x from range(1000000)")
    with pytest.raises(QueryError, match="late"):
        for _ in frame.to_batches():
            pass


@pytest.mark.parametrize("query", ["", "select 1; select 2", "create table t (a int)", "copy (select 1) to 'x'"])
def test_only_one_query_that_returns_rows(session: Session, query: str) -> None:
    with pytest.raises(QueryError, match="one query"):
        session.sql(query)


def test_missing_files(session: Session, root: str) -> None:
    with pytest.raises(DatasetNotFound, match="nowhere"):
        session.sql(f"select * from '{root}/nowhere/*.parquet'").count()
    with pytest.raises(FileNotFoundError):
        session.read_parquet(f"{root}/nowhere.parquet").schema  # noqa: B018


def test_urls_that_are_only_data_cost_nothing(session: Session) -> None:
    assert session.sql("select 'https://example.invalid/x' u, 'nosuch://y' v").count() == 1
    with pytest.raises(InvalidArgument, match="nosuch"):
        session.read_parquet("nosuch://bucket/x.parquet")


def test_threads_share_a_session(session: Session, numbers: DataFrame, root: str) -> None:
    numbers.write_parquet(f"{root}/data", partition_by="k")
    frame = session.read_parquet(f"{root}/data")

    def total(n: int) -> list[dict[str, object]]:
        return session.sql("select sum(n) s from t where n < $n", {"n": n}, t=frame).take_all()

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(total, range(1, 21)))
    assert results == [[{"s": n * (n - 1) // 2}] for n in range(1, 21)]


def test_a_closed_session_and_bad_settings() -> None:
    with emberflow.init() as session:
        frame = session.from_items([{"a": 1}])
    with pytest.raises(emberflow.SessionClosed):
        frame.count()
    for settings in ({"memory_limit": "much"}, {"threads": 0}):
        with pytest.raises(InvalidArgument):
            emberflow.init(**settings)  # type: ignore[arg-type]


def test_memory_limit_is_an_error_of_its_own() -> None:
    with emberflow.init(memory_limit="20MB", threads=1) as session:
        frame = session.sql("select string_agg(repeat(range::varchar, 50), '') s from range(2000000)")
        with pytest.raises(emberflow.OutOfMemory):
            frame.to_arrow()


def test_a_sort_larger_than_memory_spills(session: Session) -> None:
    with emberflow.init(memory_limit="100MB", threads=1) as small:
        sorted_frame = small.sql("select md5(range::varchar) m from range(3000000) order by m")
        assert sum(batch.num_rows for batch in sorted_frame.to_batches()) == 3_000_000
