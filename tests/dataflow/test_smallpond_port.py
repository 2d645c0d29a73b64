"""Scripts of the shape of smallpond's README, examples and tests run with the import changed.

Run: pytest tests/dataflow/test_smallpond_port.py. What a script relies on is asserted, not how rows lie in files.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emberflow as smallpond
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emberflow import UDFListType, UDFStructType, UDFType, udf


@pytest.fixture
def sp() -> Iterator[smallpond.Session]:
    session = smallpond.init()
    yield session
    session.shutdown()


@pytest.fixture
def urls(tmp_path: Path) -> str:
    """Four files of tab-separated urls and payloads, 25 lines each."""
    folder = tmp_path / "urls"
    folder.mkdir()
    for part in range(4):
        lines = [
            f"host{n % 7}.example/p{n} q{n}\t{base64.b64encode(str(n).encode()).decode()}"
            for n in range(part * 25, part * 25 + 25)
        ]
        (folder / f"part-{part}.tsv").write_text("\n".join(lines) + "\n")
    return str(folder / "*.tsv")


def table_of(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(folder.rglob("*.parquet"))])


# ---- the README


def test_the_quick_start(sp: smallpond.Session, tmp_path: Path) -> None:
    ticks = pa.table({"ticker": ["a", "b", "c", "d"] * 6, "price": [float(n) for n in range(24)]})
    pq.write_table(ticks, tmp_path / "prices.parquet")

    df = sp.read_parquet(str(tmp_path / "prices.parquet"))
    df = df.repartition(3, hash_by="ticker")
    df = sp.partial_sql("SELECT ticker, min(price), max(price) FROM {0} GROUP BY ticker", df)
    df.write_parquet(str(tmp_path / "output"))
    shown = df.to_pandas().sort_values("ticker")

    assert shown.values.tolist() == [["a", 0.0, 20.0], ["b", 1.0, 21.0], ["c", 2.0, 22.0], ["d", 3.0, 23.0]]
    assert sorted(table_of(tmp_path / "output").column("ticker").to_pylist()) == ["a", "b", "c", "d"]


# ---- the examples


def sort_urls(sp: smallpond.Session, input_paths: list[str], output_path: str, npartitions: int) -> None:
    dataset = sp.read_csv(input_paths, schema={"urlstr": "varchar", "valstr": "varchar"}, delim=r"\t")
    dataset = dataset.repartition(npartitions)
    urls = dataset.map(
        """
        split_part(urlstr, '/', 1) as host,
        split_part(urlstr, ' ', 1) as url,
        from_base64(valstr) AS payload
        """
    )
    urls = urls.repartition(npartitions, hash_by="host")
    sorted_urls = urls.partial_sort(by=["host"])
    sorted_urls.write_parquet(output_path)


def test_sorting_urls(sp: smallpond.Session, urls: str, tmp_path: Path) -> None:
    sort_urls(sp, [urls], str(tmp_path / "sorted"), npartitions=3)
    rows = table_of(tmp_path / "sorted").to_pylist()
    assert sorted(int(row["payload"]) for row in rows) == list(range(100))
    assert {row["host"] for row in rows} == {f"host{n}.example" for n in range(7)}
    # Each host lies in one partition, and each partition is in order, so a host's rows come in one run.
    runs = [
        row["host"] for row, before in zip(rows, [{"host": None}, *rows], strict=False) if row["host"] != before["host"]
    ]
    assert len(runs) == len(set(runs))


def test_shuffling_data(sp: smallpond.Session, tmp_path: Path) -> None:
    for part in range(3):
        pq.write_table(pa.table({"n": range(part * 100, part * 100 + 100)}), tmp_path / f"{part}.parquet")
    df = sp.read_parquet(str(tmp_path / "*.parquet"), union_by_name=True)
    df = df.repartition(4, by_rows=True).random_shuffle()
    df = sp.partial_sql("select *, cast(random() * 2147483647 as integer) as sort_key from {0} order by sort_key", df)
    df = df.repartition(2, by_rows=True)
    df.write_parquet(str(tmp_path / "shuffled"))
    shuffled = table_of(tmp_path / "shuffled").column("n").to_pylist()
    assert sorted(shuffled) == list(range(300))
    assert shuffled != list(range(300))


def test_a_pipeline_with_two_outputs(sp: smallpond.Session, tmp_path: Path) -> None:
    df = sp.from_items([{"a": n, "b": n * 2} for n in range(20)]).repartition(2, by_rows=True)
    output1 = df.write_parquet_lazy(str(tmp_path / "one"))
    output2 = df.map("a + b as c").write_parquet_lazy(str(tmp_path / "two"))
    assert not (tmp_path / "one").exists()
    sp.wait(output1, output2)
    assert table_of(tmp_path / "one").num_rows == 20
    assert sorted(table_of(tmp_path / "two").column("c").to_pylist()) == list(range(0, 60, 3))


# ---- making frames


def test_from_memory(sp: smallpond.Session) -> None:
    frame = pd.DataFrame({"a": [1, 2, 3], "b": [4, 5, 6]})
    assert sp.from_pandas(frame).to_pandas().equals(frame)
    table = pa.table({"a": [1, 2, 3], "b": [4, 5, 6]})
    assert sp.from_arrow(table).to_arrow() == table
    assert sp.from_items([1, 2, 3]).take_all() == [{"item": 1}, {"item": 2}, {"item": 3}]
    assert sp.from_items([{"a": 1, "b": 4}]).take_all() == [{"a": 1, "b": 4}]


def test_from_files(sp: smallpond.Session, urls: str, tmp_path: Path) -> None:
    assert sp.read_csv(urls, {"urlstr": "varchar", "valstr": "varchar"}, r"\t").count() == 100
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert sp.read_json(str(tmp_path / "rows.json"), {"a": "bigint"}).take_all() == [{"a": 1}, {"a": 2}]
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "rows.parquet")
    assert sp.read_parquet([str(tmp_path / "rows.parquet")], columns=["b"]).take_all() == [{"b": 2}]


# ---- rows by SQL and by functions


@pytest.fixture
def pairs(sp: smallpond.Session) -> smallpond.DataFrame:
    return sp.from_arrow(pa.table({"a": [1, 2, 3], "b": [4, 5, 6]}))


def test_map(pairs: smallpond.DataFrame) -> None:
    assert pairs.map("a + b as c").to_arrow() == pa.table({"c": [5, 7, 9]})
    assert pairs.map(lambda r: {"c": r["a"] + r["b"]}).to_arrow() == pa.table({"c": [5, 7, 9]})
    with_null = pairs.map(
        lambda r: {"c": None if r["a"] == 1 else r["a"] + r["b"]}, schema=pa.schema([("c", pa.int64())])
    )
    assert with_null.to_arrow() == pa.table({"c": pa.array([None, 7, 9], pa.int64())})


def test_map_to_a_struct(pairs: smallpond.DataFrame) -> None:
    assert pairs.map("{'x': a, 'y': [b]} as s").take(1) == [{"s": {"x": 1, "y": [4]}}]


def test_flat_map(pairs: smallpond.DataFrame) -> None:
    expected = pa.table({"c": [1, 4, 2, 5, 3, 6]})
    assert pairs.flat_map(lambda r: [{"c": r["a"]}, {"c": r["b"]}]).to_arrow() == expected
    assert pairs.flat_map("unnest(array[a, b]) as c").to_arrow() == expected
    nulls = pairs.flat_map(lambda r: [{"c": None}], schema=pa.schema([("c", pa.int64())]))
    assert nulls.to_arrow() == pa.table({"c": pa.nulls(3, pa.int64())})


def test_filter(pairs: smallpond.DataFrame) -> None:
    expected = pa.table({"a": [2, 3], "b": [5, 6]})
    assert pairs.filter("a > 1").to_arrow() == expected
    assert pairs.filter(lambda r: r["a"] > 1).to_arrow() == expected


def test_map_batches(sp: smallpond.Session) -> None:
    df = sp.from_arrow(pa.table({"n": range(1000)}))
    counted = df.map_batches(lambda batch: pa.table({"num_rows": [batch.num_rows]}), batch_size=350)
    assert counted.take_all() == [{"num_rows": 350}, {"num_rows": 350}, {"num_rows": 300}]


@udf(params=[UDFType.INT, UDFType.INT], return_type=UDFType.INT)
def gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


@udf(
    params=[UDFType.VARCHAR],
    return_type=UDFListType(UDFStructType({"key": "VARCHAR", "value": "VARCHAR"})),
    name="arguments",
)
def parsed(query: str) -> list[dict[str, str]]:
    return [dict(zip(("key", "value"), pair.split("="), strict=True)) for pair in query.split("&")]


def test_functions_in_sql(sp: smallpond.Session, pairs: smallpond.DataFrame) -> None:
    assert pairs.map("gcd((a * 6)::int, 4::int) as g", udfs=[gcd]).to_arrow().column("g").to_pylist() == [2, 4, 2]
    df = sp.partial_sql("select arguments('x=1&y=2') as found from {0}", pairs, udfs=[parsed])
    assert df.take(1) == [{"found": [{"key": "x", "value": "1"}, {"key": "y", "value": "2"}]}]


# ---- partitions


def numbers(sp: smallpond.Session, count: int = 1000) -> smallpond.DataFrame:
    return sp.from_items(list(range(count)))


def test_partition_by_an_expression(sp: smallpond.Session) -> None:
    df = numbers(sp).repartition(10, by="item % 10")
    df = sp.partial_sql("select min(item % 10) as min, max(item % 10) as max from {0}", df)
    assert df.take_all() == [{"min": i, "max": i} for i in range(10)]


def test_a_partition_key_out_of_range(sp: smallpond.Session) -> None:
    with pytest.raises(Exception, match="10"):
        numbers(sp).repartition(10, by="item % 11").to_arrow()


@pytest.mark.parametrize("how", [{}, {"by_rows": True}, {"hash_by": "item"}, {"hash_by": ["item"]}])
def test_no_row_is_lost_or_doubled(sp: smallpond.Session, how: dict[str, Any]) -> None:
    df = numbers(sp).repartition(10, **how)
    assert df.count() == 1000
    assert sorted(row["item"] for row in df.take_all()) == list(range(1000))


def test_partial_sql_joins_partitions(sp: smallpond.Session) -> None:
    left = sp.from_arrow(pa.table({"id1": range(50), "v1": [str(n) for n in range(50)]})).repartition(4, hash_by="id1")
    right = sp.from_arrow(pa.table({"id2": range(25, 75), "v2": range(50)})).repartition(4, hash_by="id2")
    joined = sp.partial_sql("select id1, v1, v2 from {0} join {1} on id1 = id2", left, right)
    rows = sorted(joined.take_all(), key=lambda row: row["id1"])
    assert rows == [{"id1": n, "v1": str(n), "v2": n - 25} for n in range(25, 50)]


def test_partial_sql_without_an_input(sp: smallpond.Session) -> None:
    assert sp.partial_sql("select * from range(3)").to_arrow() == pa.table({"range": [0, 1, 2]})


def test_equal_keys_meet(sp: smallpond.Session) -> None:
    df = sp.from_items([{"k": value} for value in (0.0, -0.0, 1.0)] * 4).repartition(16, hash_by="k")
    groups = sp.partial_sql("select k, count(*) as n from {0} group by k", df).take_all()
    assert sorted(row["n"] for row in groups) == [4, 8]


def test_partial_sort_takes_directions(sp: smallpond.Session) -> None:
    df = numbers(sp, 100).repartition(1).partial_sort(["item % 2", "item desc"])
    assert [row["item"] for row in df.take(3)] == [98, 96, 94]


def test_random_shuffle_is_random_enough(sp: smallpond.Session) -> None:
    shuffled = [row["item"] for row in numbers(sp, 400).repartition(4, by_rows=True).random_shuffle().take_all()]
    assert sorted(shuffled) == list(range(400))
    inversions = sum(a > b for i, a in enumerate(shuffled) for b in shuffled[i + 1 :])
    # n (n - 1) / 4 = 39900 are expected, with a standard deviation of 1335.
    assert 31_900 <= inversions <= 47_900


# ---- looking, and computing once


def test_looking(sp: smallpond.Session, pairs: smallpond.DataFrame) -> None:
    assert pairs.take(2) == [{"a": 1, "b": 4}, {"a": 2, "b": 5}]
    assert numbers(sp).repartition(10, by_rows=True).limit(2).count() == 2


def test_computing_once(sp: smallpond.Session, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()

    def noted(row: dict[str, Any]) -> dict[str, Any]:
        (calls / f"{row['item']}-{len(list(calls.glob(str(row['item']) + '-*')))}").touch()
        return {"item": row["item"]}

    df = sp.from_items([1, 2]).map(noted, schema=pa.schema([("item", pa.int64())]))
    assert not df.is_computed()
    df.compute()
    assert df.is_computed()
    assert df.count() == 2
    assert len(df.to_arrow()) == 2
    assert len(list(calls.iterdir())) == 2
    assert df.recompute().count() == 2
    assert len(list(calls.iterdir())) == 4


def test_an_error_shows_the_query(sp: smallpond.Session) -> None:
    with pytest.raises(Exception, match="select a,, from"):
        sp.partial_sql("select a,, from {0}", sp.from_items([1, 2, 3])).to_arrow()


def test_what_cannot_be_sent_is_named(sp: smallpond.Session, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log, pytest.raises(smallpond.InvalidArgument, match="log"):
        sp.from_items([1, 2, 3]).repartition(2, by_rows=True).map(lambda row: log.write("x")).to_arrow()
