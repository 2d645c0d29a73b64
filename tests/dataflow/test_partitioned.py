"""Datasets that are partitioned by our own hash: written with a manifest, and read by later sessions without exchanges.

Run: pytest tests/dataflow/test_partitioned.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import emberflow
import fsspec
import pyarrow.parquet as pq
import pytest
from emberflow.exchange import hash_columns, partition_of

ORDERS = (
    "select n::bigint id, case when n % 11 = 0 then null else (n * 7919 % 300)::integer end customer, "
    "'r' || n % 5 region, (n / 4)::decimal(12, 2) amount from range(3000) t(n)"
)
CUSTOMERS = (
    "select case when n % 50 = 0 then null else n::integer end customer, 'name ' || n as name, "
    "'r' || n % 5 region from range(310) t(n)"
)


def made() -> emberflow.Session:
    return emberflow.init(executor="inline", shuffle="always", partitions=3, broadcast_bytes=0)


@pytest.fixture
def session() -> Iterator[emberflow.Session]:
    with made() as session:
        yield session


def written(root: Path | str, name: str, text: str, *keys: str, count: int = 5) -> str:
    with made() as session:
        session.sql(text).repartition(count, hash_by=keys).write_parquet(f"{root}/{name}")
    return f"{root}/{name}"


@pytest.fixture
def orders(tmp_path: Path) -> str:
    return f"'{written(tmp_path, 'orders', ORDERS, 'customer')}/*.parquet'"


@pytest.fixture
def customers(tmp_path: Path) -> str:
    return f"'{written(tmp_path, 'customers', CUSTOMERS, 'customer')}/*.parquet'"


def rows(frame: emberflow.DataFrame) -> list[tuple[Any, ...]]:
    return sorted((tuple(row.values()) for row in frame.take_all()), key=str)


def stages(session: emberflow.Session, text: str) -> list[str]:
    """Compares the query's rows with plain DuckDB's; the first lines of the plan's stages."""
    frame = session.sql(text)
    assert rows(frame) == sorted(duckdb.sql(text).fetchall(), key=str)
    return re.findall(r"^stage .*$", frame.explain(), re.MULTILINE)


def in_place(session: emberflow.Session, text: str) -> bool:
    """Whether one stage does it all, a task for each partition of the files."""
    (stage, *others) = stages(session, text)
    return not others and "a task per partition of files" in stage


# ---- writing


def test_the_manifest_says_where_each_row_is(root: str) -> None:
    url = written(root, "d", ORDERS, "customer", "region")
    filesystem, path = fsspec.url_to_fs(url)
    manifest = json.loads(filesystem.cat_file(f"{path}/_partitions.json"))
    assert (manifest["format"], manifest["hash"]) == (1, "xxh64")
    assert manifest["keys"] == {
        "columns": ["customer", "region"],
        "types": ["INTEGER", "VARCHAR"],
        "count": 5,
        "hash_version": 1,
    }
    total = 0
    for file in manifest["files"]:
        with filesystem.open(f"{path}/{file['name']}") as opened:
            table = pq.read_table(opened)
        hashes = hash_columns([table["customer"], table["region"]])
        assert set(partition_of(hashes, 5).tolist()) == {file["partition"]}
        assert table.num_rows == file["rows"]
        assert filesystem.size(f"{path}/{file['name']}") == file["size_bytes"]
        total += table.num_rows
    assert total == 3000
    assert {file["partition"] for file in manifest["files"]} == set(range(5))


def test_several_files_of_a_partition(tmp_path: Path, session: emberflow.Session) -> None:
    text = "select range k, md5(range::varchar) a, md5((range + 1)::varchar) b from range(300000)"
    session.sql(text).repartition(2, hash_by="k").write_parquet(f"{tmp_path}/d", file_size_bytes=1)
    manifest = json.loads((tmp_path / "d" / "_partitions.json").read_text())
    assert len(manifest["files"]) > 2
    assert in_place(session, f"select k, count(*), min(a) from '{tmp_path}/d/*.parquet' where k % 7 = 0 group by k")


def test_rows_that_were_computed_are_the_ones_that_are_written(tmp_path: Path, session: emberflow.Session) -> None:
    frame = session.sql("select n, random() x from range(500) t(n)").repartition(4, hash_by="n").compute()
    frame.write_parquet(f"{tmp_path}/d")
    assert sorted(duckdb.execute(f"select n, x from '{tmp_path}/d/*.parquet'").fetchall(), key=str) == rows(frame)
    assert (tmp_path / "d" / "_partitions.json").exists()


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        (["id + 1"], {}),
        (["id"], {"partition_by": "region"}),
        (["id"], {"mode": "append"}),
        (["list"], {}),
        (["f"], {}),
    ],
)
def test_partitions_that_do_not_last_have_no_manifest(
    tmp_path: Path, session: emberflow.Session, keys: list[str], options: dict[str, Any]
) -> None:
    frame = session.sql(f"select *, [id] as list, id::double f from ({ORDERS})").repartition(4, hash_by=keys)
    frame.write_parquet(f"{tmp_path}/d", **options)
    assert not (tmp_path / "d" / "_partitions.json").exists()
    assert duckdb.execute(f"select count(*) from '{tmp_path}/d/**/*.parquet'").fetchall() == [(3000,)]


def test_a_dataset_without_rows(tmp_path: Path, session: emberflow.Session) -> None:
    url = written(tmp_path, "d", f"{ORDERS} limit 0", "customer")
    assert stages(session, f"select customer, count(*) from '{url}/*.parquet' group by customer")


# ---- reading


@pytest.mark.parametrize(
    "text",
    [
        "select customer, count(*), sum(amount) from {orders} group by customer",
        "select customer, region, count(distinct id) from {orders} where amount > 100 group by all",
        "select customer, list(id order by id)[1:3] from {orders} group by customer having count(*) > 3",
        "select id, row_number() over (partition by customer order by id) from {orders}",
        "select o.id, c.name from {orders} o join {customers} c using (customer)",
        "select o.id, c.name from {orders} o left join {customers} c using (customer)",
        "select o.id, c.name from {orders} o full join {customers} c using (customer)",
        "select o.id, c.name from {orders} o right join {customers} c on o.customer = c.customer and o.id > 5",
        "select o.id from {orders} o semi join {customers} c using (customer)",
        "select o.id from {orders} o anti join {customers} c using (customer)",
        "select o.id, c.name from {orders} o join {customers} c on o.customer is not distinct from c.customer",
        "select o.id, c.name from {orders} o join {customers} c using (customer, region)",
        "select customer, count(*) from {orders} o join {customers} c using (customer) where o.id < 99 group by all",
        "select c.name, o.n from (select customer, count(*) n from {orders} group by customer) o "
        "join {customers} c using (customer)",
        "select a.id, b.id, c.name from {orders} a join {orders} b on a.customer = b.customer and a.id = b.id + 300 "
        "join {customers} c on b.customer = c.customer",
    ],
)
def test_equal_keys_need_no_exchange(session: emberflow.Session, orders: str, customers: str, text: str) -> None:
    assert in_place(session, text.format(orders=orders, customers=customers))


@pytest.mark.parametrize(
    "text",
    [
        "select region, count(*) from {orders} group by region",
        "select abs(customer), count(*) from {orders} group by all",
        "select count(distinct customer) from {orders}",
        "select o.id, c.name from {orders} o join {customers} c on o.customer = c.customer + 1",
        "select o.id, c.name from {orders} o join {customers} c using (region) where o.id < 30",
        "select customer, count(*) from (select customer from {orders} union all select customer from {customers}) "
        "group by all",
        "select o.id, c.name from {orders} o full join {customers} c using (customer) order by all",
        "select id from {orders} where customer in (select customer from {customers})",
        "select id, customer not in (select customer from {customers} where customer is not null) from {orders}",
    ],
)
def test_other_keys_need_one(session: emberflow.Session, orders: str, customers: str, text: str) -> None:
    assert len(stages(session, text.format(orders=orders, customers=customers))) >= 1


def test_outer_joins_do_not_say_where_their_other_rows_are(
    session: emberflow.Session, orders: str, customers: str
) -> None:
    text = f"select o.customer, count(*) from {orders} o full join {customers} c using (customer) group by o.customer"
    assert not in_place(session, text)


def test_datasets_that_are_partitioned_otherwise_meet_in_an_exchange(
    session: emberflow.Session, tmp_path: Path
) -> None:
    orders = written(tmp_path, "orders", ORDERS, "customer")
    for name, text, count in [
        ("count", CUSTOMERS, 4),
        ("type", CUSTOMERS.replace("integer", "bigint"), 5),
    ]:
        other = written(tmp_path, name, text, "customer", count=count)
        query = f"select id, name from '{orders}/*.parquet' join '{other}/*.parquet' using (customer)"
        assert not in_place(session, query)


def test_files_that_the_manifest_does_not_name(session: emberflow.Session, tmp_path: Path) -> None:
    url = written(tmp_path, "d", ORDERS, "customer")
    text = f"select customer, count(*) from '{url}/*.parquet' group by customer"
    assert in_place(session, text)
    session.sql(ORDERS).write_parquet(url, mode="append")
    assert not in_place(session, text)
    session.sql(ORDERS).repartition(3, hash_by="customer").write_parquet(url, mode="overwrite")
    assert in_place(session, text)
    file = next(Path(url).glob("*.parquet"))
    duckdb.execute(f"copy ({ORDERS}) to '{file}' (format parquet)")
    assert not in_place(session, text)
    session.sql(ORDERS).write_parquet(url, mode="overwrite")
    assert not in_place(session, text)


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"hash": "other"}, {"keys": {"columns": ["customer"], "types": ["INTEGER"], "count": 2}}, "x", {}],
)
def test_a_manifest_that_is_not_understood_says_nothing(
    session: emberflow.Session, tmp_path: Path, change: dict[str, Any] | str
) -> None:
    url = written(tmp_path, "d", ORDERS, "customer")
    path = Path(url) / "_partitions.json"
    if isinstance(change, str):
        path.write_text(change)
    elif change:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    else:
        path.unlink()
    assert not in_place(session, f"select customer, count(*) from '{url}/*.parquet' group by customer")


def test_some_of_the_files_are_enough(session: emberflow.Session, tmp_path: Path) -> None:
    url = written(tmp_path, "d", ORDERS, "customer")
    assert in_place(session, f"select customer, count(*) from '{url}/*-p0000[123]-*.parquet' group by customer")


def test_rows_that_are_dealt_out_anew_are_still_together(session: emberflow.Session, orders: str) -> None:
    counted = session.sql(f"select customer, count(*) n from {orders} group by customer").repartition(2)
    expected = duckdb.sql(f"select customer, count(*) n from {orders} group by customer").fetchall()
    assert rows(counted) == sorted(expected, key=str)
    files = session.sql(f"select customer, id from {orders}").repartition(2)
    again = session.sql("select customer, count(*) from files group by customer", files=files)
    assert rows(again) == sorted(expected, key=str)


def test_a_key_that_is_in_the_path_too_is_not_the_files(session: emberflow.Session, tmp_path: Path) -> None:
    (tmp_path / "customer=7").mkdir()
    url = written(tmp_path / "customer=7", "d", ORDERS, "customer")
    text = f"select customer, count(*) from read_parquet('{url}/*.parquet', hive_partitioning = true) group by all"
    assert not in_place(session, text)
