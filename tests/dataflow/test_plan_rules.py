"""Plan rules that once gave other rows than DuckDB. Run: pytest tests/dataflow/test_plan_rules.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emberflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emberflow.job import shares


@pytest.fixture
def session() -> Iterator[emberflow.Session]:
    with emberflow.init(executor="inline", shuffle="always", partitions=3, broadcast_bytes=0) as session:
        session.view(
            "t", session.sql("select range k, range % 4 g, range / 4 x from range(12)").repartition(3, by_rows=True)
        )
        yield session


def rows(frame: emberflow.DataFrame) -> list[tuple[Any, ...]]:
    return sorted(tuple(row.values()) for row in frame.take_all())


def test_an_aggregate_that_nobody_looks_at_is_still_one_row(session: emberflow.Session) -> None:
    assert rows(session.sql("select 1 one from (select count(*) from t)")) == [(1,)]
    assert rows(session.sql("select k from t, (select max(x) m from t) where k < 2")) == [(0,), (1,)]


def test_groups_stay_whole_where_a_join_could_be_cut(
    session: emberflow.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "_SKEW_BYTES_MIN", 64)
    skewed = session.sql("select case when range < 9000 then 7 else range end k from range(10000)")
    left = skewed.repartition(4, by_rows=True)
    right = session.sql("select range k from range(10000)").repartition(2, by_rows=True)
    counted = session.sql("select k, count(*) n from l join r using (k) group by k having k = 7", l=left, r=right)
    assert rows(counted) == [(7, 9000)]
    ranked = session.sql(
        "select max(n) from (select count(*) over (partition by k) n from l join r using (k))", l=left, r=right
    )
    assert rows(ranked) == [(9000,)]


def test_a_key_that_changes_is_evaluated_once(session: emberflow.Session) -> None:
    groups = session.sql("select random() > 0.5 g, median(k) m from t group by 1")
    assert groups.count() <= 2


def test_a_negative_parameter_is_a_number(session: emberflow.Session) -> None:
    assert rows(session.sql("select k-?\n as y from t where k = 1", [-5])) == [(6,)]


def test_arbitrary_of_shares_without_rows(session: emberflow.Session) -> None:
    assert rows(session.sql("select arbitrary(x), any_value(x) from t where k = 4")) == [(1.0, 1.0)]


def test_one_file_is_in_order_on_several_threads(tmp_path: Path) -> None:
    with emberflow.init(executor="inline", shuffle="always", threads=4, partitions=3) as session:
        numbers = session.sql("select (range * 7919) % 300000 n from range(300000)").repartition(3, by_rows=True)
        numbers.sort("n").write_parquet(f"{tmp_path}/one.parquet")
    # A job on several threads reads in no order.
    written = pq.read_table(f"{tmp_path}/one.parquet").column("n").to_pylist()
    assert written == sorted(written)


def test_two_frames_of_functions_join(session: emberflow.Session, tmp_path: Path) -> None:
    def same(row: dict[str, Any]) -> dict[str, Any]:
        return row

    schema = {"k": "BIGINT"}
    left = session.sql("select range k from range(3)").map(same, schema=schema)
    right = session.sql("select range k from range(1, 4)").map(same, schema=schema)
    left.join(right, "k").write_parquet(f"{tmp_path}/out")
    assert rows(session.read_parquet(f"{tmp_path}/out")) == [(1,), (2,)]


def test_a_frame_of_one_partition_is_seen_whole(session: emberflow.Session) -> None:
    many = session.sql("select range k from range(9)").repartition(3, by_rows=True)
    one = session.sql("select range k from range(2)").repartition(1)
    counted = session.partial_sql("select count(*) n from {0} a, {1} b", many, one)
    assert [row["n"] for row in counted.take_all()] == [6, 6, 6]
    two = session.sql("select range k from range(2)").repartition(2, by_rows=True)
    with pytest.raises(emberflow.InvalidArgument, match="2 and 3"):
        session.partial_sql("select count(*) n from {0} a, {1} b", many, two).count()


def test_rows_of_a_table_are_counted(session: emberflow.Session) -> None:
    assert session.from_arrow(pa.table({"a": [1, 2, 3]})).count() == 3


def test_a_computed_frame_beside_an_unstable_one(session: emberflow.Session, tmp_path: Path) -> None:
    fixed = session.sql("select range k from range(20)").repartition(2, hash_by="k").compute()
    loose = session.sql("select range k from range(20)").map(lambda row: row, schema={"k": "BIGINT"})
    session.sql("select * from c join u using (k)", c=fixed, u=loose).write_parquet(f"{tmp_path}/out")
    assert session.read_parquet(f"{tmp_path}/out").count() == 20


def test_a_function_for_sql_is_what_it_is_told_to_be(session: emberflow.Session) -> None:
    def length(text: str | None) -> int:
        return -1 if text is None else len(text)

    texts = session.sql("select unnest(['abc', null]) s")
    found = []
    for handling in ("default", "special"):
        udf = emberflow.Udf.of(length, ["VARCHAR"], return_type="BIGINT", name="length_of", null_handling=handling)
        session.create_function(udf)
        found.append(sorted((row["n"] for row in texts.select("length_of(s) n").take_all()), key=repr))
    assert found == [[3, None], [-1, 3]]


def test_decimals_are_narrow_on_their_way_and_wide_for_functions(session: emberflow.Session) -> None:
    frame = session.sql("select k, max(d) d from (select k, cast(k as decimal(12, 2)) d from t) group by k")
    made = session.jobs.compute(frame.frame)
    assert {str(output.exchange().arrow_schema.field(1).type) for output in made.outputs} == {"decimal64(12, 2)"}
    assert [row[1] for row in rows(frame)] == list(range(12))
    typed = frame.map_batches(
        lambda table: table.append_column("type", pa.array([str(table.schema.field(1).type)] * len(table)))
    )
    assert {row[2] for row in rows(typed)} == {"decimal128(12, 2)"}
