"""Which partitions partial_sql() brings together, and which frames it refuses.

Run: pytest tests/dataflow/test_partial_sql.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import emberflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emberflow.job import shares

ROWS = 600
KEYS = "select list(k order by k) ks from {0}"
BOTH = "select (select list(k order by k) from {0}) a, (select list(k order by k) from {1}) b"
JOINED = "select a.k, v, w from {0} a join {1} b using (k)"
REFUSED = "their partitions are known"

Frame = emberflow.DataFrame
Layout = Callable[[Frame], Frame]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys 0 to 599 in six files of `a` and six of `b`: the first three of `a` are small, the others large, and the
    other way round in `b`."""
    directory = tmp_path_factory.mktemp("partial")
    for name, column, is_large in (("a", "v", lambda j: j >= 3), ("b", "w", lambda j: j < 3)):
        (directory / name).mkdir()
        for j in range(6):
            keys = range(j * 100, j * 100 + 100)
            texts = [f"{k}" + "x" * (4000 if is_large(j) else 0) for k in keys]
            table = pa.table({"k": keys, column: texts})
            pq.write_table(table, directory / name / f"{j}.parquet", compression="none", use_dictionary=False)
    return directory


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Iterator[emberflow.Session]:
    """Tasks are small enough that some partitions of the files share one and others do not; a parameter: the
    partitions of every exchange."""
    config: dict[str, Any] = {
        "partition_bytes": 200_000,
        "broadcast_bytes": 0,
        "partitions": getattr(request, "param", None),
    }
    with emberflow.init(executor="inline", threads=1, shuffle="always", **config) as session:
        yield session


@pytest.fixture
def a(session: emberflow.Session, files: Path) -> Frame:
    return session.read_parquet(str(files / "a"))


@pytest.fixture
def b(session: emberflow.Session, files: Path) -> Frame:
    return session.read_parquet(str(files / "b"))


def keys_of(frame: Frame) -> list[list[int]]:
    """The keys of each partition."""
    return [row["ks"] or [] for row in frame.partial_sql(KEYS).take_all()]


def grouped(frame: Frame) -> Frame:
    return frame.session.sql("select k, max(length(#2)) n from f group by k", f=frame)


LAYOUTS: dict[str, Layout] = {
    "hash": lambda f: f.repartition(4, hash_by="k"),
    "hash of an expression": lambda f: f.repartition(4, hash_by="k % 50"),
    "value": lambda f: f.repartition(4, by="k // 150"),
    "files": lambda f: f.repartition(4),
    "rows": lambda f: f.repartition(4, by_rows=True),
    "shuffled": lambda f: f.random_shuffle(partitions=4, seed=3),
    "function": lambda f: f.repartition(4, hash_by="k").map_batches(lambda t: t.select(["k"]), schema={"k": "BIGINT"}),
    "function without a schema": lambda f: f.repartition(4, hash_by="k").map(lambda row: {"k": row["k"]}),
    "filter": lambda f: f.repartition(4, hash_by="k").filter("k >= 7"),
    "partial_sql": lambda f: f.repartition(4, hash_by="k").partial_sql("select k from {0} where k % 3 = 0"),
    "files, filtered": lambda f: f.repartition(4).filter("k % 3 = 0"),
    "files, partial_sql": lambda f: f.repartition(4).partial_sql("select * from {0} order by k desc"),
    "groups of the key": lambda f: grouped(f.repartition(4, hash_by="k")),
    "computed": lambda f: f.repartition(4, hash_by="k").compute(),
    "computed files": lambda f: f.repartition(4).compute(),
    "filter of computed": lambda f: f.repartition(4, hash_by="k").compute().filter("k >= 7"),
    "computed function": lambda f: f.repartition(4, by_rows=True).map(lambda row: {"k": row["k"]}).compute(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_partitions_with_the_same_number_meet(a: Frame, b: Frame, layout: str) -> None:
    left, right = LAYOUTS[layout](a), b.repartition(4, hash_by="k")
    first, second = keys_of(left), keys_of(right)
    assert len(first) == len(second) == 4
    for frames, parts in (((left, right), (first, second)), ((right, left), (second, first))):
        met = a.session.partial_sql(BOTH, *frames).take_all()
        assert [(row["a"] or [], row["b"] or []) for row in met] == list(zip(*parts, strict=True))


NOT_BY_KEY = ("files", "rows", "shuffled", "computed function")
BY_KEY = [name for name in LAYOUTS if not any(word in name for word in NOT_BY_KEY)]


@pytest.mark.parametrize("layout", BY_KEY)
def test_two_frames_that_are_partitioned_alike_join_as_they_would_whole(
    a: Frame, b: Frame, files: Path, layout: str
) -> None:
    left, right = LAYOUTS[layout](a), LAYOUTS[layout](b)
    found = a.session.partial_sql("select a.k from {0} a join {1} b using (k)", left, right).take_all()
    every = 3 if layout == "partial_sql" else 1
    least = 7 if "filter" in layout else 0
    theirs = duckdb.sql(
        f"select a.k from '{files}/a/*.parquet' a join '{files}/b/*.parquet' b using (k)"
        f" where a.k % {every} = 0 and a.k >= {least} order by 1"
    ).fetchall()
    assert sorted((row["k"],) for row in found) == theirs


UNKNOWN: dict[str, Layout] = {
    "files": lambda f: f,
    "files, filtered": lambda f: f.filter("k >= 0"),
    "function": lambda f: f.map_batches(lambda t: t.select(["k"]), schema={"k": "BIGINT"}),
    "groups": grouped,
    "groups of another key": lambda f: f.session.sql("select k % 50 k from f group by 1", f=f.repartition(4, by="k%4")),
    "computed groups": lambda f: grouped(f).compute(),
    "filter of computed groups": lambda f: grouped(f).compute().filter("k >= 0"),
    "distinct": lambda f: f.select("k").distinct(),
    "join": lambda f: f.session.sql("select x.k from x join y using (k)", x=f, y=f.repartition(4, hash_by="k")),
    "used twice": lambda f: f.session.sql(
        "select * from f where k >= (select min(k) from f)", f=f.repartition(4, hash_by="k")
    ),
    "union": lambda f: f.filter("k < 300").repartition(2).union(f.filter("k >= 300").repartition(2)),
}


@pytest.mark.parametrize("session", [None, 4], indirect=True, ids=["by bytes", "partitions=4"])
@pytest.mark.parametrize("layout", UNKNOWN)
def test_partitions_that_nobody_asked_for_are_refused(a: Frame, b: Frame, layout: str) -> None:
    unknown, known = UNKNOWN[layout](a), b.repartition(4, hash_by="k")
    query = "select count(*) n from {0} a join {1} b using (k)"
    for frames in ((unknown, known), (known, unknown), (unknown, unknown)):
        with pytest.raises(emberflow.InvalidArgument, match=REFUSED):
            a.session.partial_sql(query, *frames).take_all()
    # What the message says helps.
    alike = unknown.repartition(4, hash_by="k")
    found = a.session.partial_sql(query, alike, known).take_all()
    assert sum(row["n"] for row in found) == unknown.count()


def test_the_message_names_the_frame(a: Frame, b: Frame) -> None:
    known = b.repartition(4, hash_by="k")
    with pytest.raises(emberflow.InvalidArgument, match=r"those of \{1\} are not"):
        a.session.partial_sql("select * from {0}, {1}", known, a).take_all()
    with pytest.raises(emberflow.InvalidArgument, match="those of loose are not"):
        a.session.partial_sql("select * from {0}, loose", known, loose=a).take_all()
    with pytest.raises(emberflow.InvalidArgument, match="not of 3 and 4"):
        a.session.partial_sql("select * from {0}, {1}", a.repartition(3), b.repartition(4)).take_all()


ONE: dict[str, Layout] = {
    "files": lambda f: f.repartition(1),
    "rows": lambda f: f.repartition(1, by_rows=True),
    "filter": lambda f: f.repartition(1, by_rows=True).filter("k >= 0"),
    "computed": lambda f: f.repartition(1, by_rows=True).compute(),
    "computed files": lambda f: f.repartition(1).compute(),
    "filter of computed": lambda f: f.repartition(1, hash_by="k").compute().filter("k >= 0"),
    "function": lambda f: f.repartition(1, hash_by="k").map_batches(
        lambda t: t, schema={"k": "BIGINT", "w": "VARCHAR"}
    ),
    "first rows": lambda f: f.sort("k").limit(ROWS),
    "table": lambda f: f.session.from_arrow(f.to_arrow()),
}


@pytest.mark.parametrize("layout", ONE)
def test_a_frame_of_one_partition_is_seen_whole_by_all_others(a: Frame, b: Frame, files: Path, layout: str) -> None:
    one = ONE[layout](b)
    assert keys_of(one) == [list(range(ROWS))]
    theirs = duckdb.sql(
        f"select k, v, w from '{files}/a/*.parquet' a join '{files}/b/*.parquet' b using (k) order by k"
    ).fetchall()
    # Of a frame whose partitions are not known each row is in one of them.
    for many in (a.repartition(4, by_rows=True), a.repartition(3), a, a.repartition(1)):
        found = a.session.partial_sql(JOINED, many, one).take_all()
        assert sorted(tuple(row.values()) for row in found) == theirs
    reversed_ = "select a.k, v, w from {1} a join {0} b using (k)"
    found = a.session.partial_sql(reversed_, one, a.repartition(4)).take_all()
    assert sorted(tuple(row.values()) for row in found) == theirs


def test_partitions_of_a_join_of_partitioned_frames_are_nobodys(files: Path) -> None:
    """Which side's they would be depends on sizes."""
    with emberflow.init(executor="inline", shuffle="always") as always, emberflow.init(executor="inline") as session:
        for s in (always, session):
            a, b = s.read_parquet(str(files / "a")), s.read_parquet(str(files / "b"))
            by_key, by_rows = a.repartition(4, hash_by="k"), b.repartition(4, by_rows=True)
            for text in ("select l.k from l join r using (k)", "select l.k from r join l using (k)"):
                loose = s.sql(text, l=by_key, r=by_rows)
                with pytest.raises(emberflow.InvalidArgument, match=REFUSED):
                    s.partial_sql(BOTH, loose, b.repartition(4, hash_by="k")).take_all()


def test_a_join_with_what_has_no_partitions_keeps_them(files: Path) -> None:
    with emberflow.init(executor="inline") as session:
        a, b = session.read_parquet(str(files / "a")), session.read_parquet(str(files / "b"))
        parted, names = a.repartition(4, hash_by="k"), session.sql("select range k, range % 7 g from range(100)")
        few = session.sql("select p.k, g from p join n using (k)", p=parted, n=names)
        met = session.partial_sql(BOTH, few, b.repartition(4, hash_by="k")).take_all()
        assert sum(len(row["a"] or []) for row in met) == 100
        assert all(set(row["a"] or []) <= set(row["b"]) for row in met)


def test_a_frame_that_meets_itself_has_no_partitions_that_are_known(files: Path) -> None:
    """Its rows may meet by other columns than those it is partitioned by."""
    with emberflow.init(executor="inline") as session:
        a, b = session.read_parquet(str(files / "a")), session.read_parquet(str(files / "b"))
        parted = a.repartition(4, hash_by="k")
        joined = session.sql("select x.k from x join y on x.k + 1 = y.k", x=parted.filter("k < 50"), y=parted)
        with pytest.raises(emberflow.InvalidArgument, match=REFUSED):
            session.partial_sql(BOTH, joined, b.repartition(4, hash_by="k")).take_all()


def test_a_function_sees_shuffled_rows_under_their_names(files: Path) -> None:
    with emberflow.init(executor="inline") as session:
        a = session.read_parquet(str(files / "a"))
        shuffled = a.random_shuffle(partitions=4)
        keys = sorted(row["k"] for row in a.select("k").take_all())
        assert sorted(row["k"] for row in shuffled.map(lambda row: {"k": row["k"]}).take_all()) == keys
        assert set(shuffled.map_batches(lambda table: table.slice(0, 1)).take_all()[0]) == {"k", "v"}
        assert shuffled.filter(lambda row: row["k"] < 5).count() == 5


def test_groups_by_a_key_that_files_are_partitioned_by_are_not_partitioned_as_repartition_would(
    a: Frame, b: Frame, tmp_path: Path
) -> None:
    a.repartition(4, hash_by="k").write_parquet(f"{tmp_path}/parted")
    lasting = a.session.sql("select k, median(length(v)) m from p group by k", p=a.session.read_parquet(f"{tmp_path}"))
    with pytest.raises(emberflow.InvalidArgument, match=REFUSED):
        a.session.partial_sql("select * from {0} join {1} using (k)", lasting, b.repartition(4, hash_by="k")).count()


def test_a_partition_that_is_cut_for_its_size_is_none_that_meets_others(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "_SKEW_BYTES_MIN", 64)
    with emberflow.init(executor="inline", threads=1, shuffle="always", partitions=4, broadcast_bytes=0) as session:
        skewed = session.read_parquet(str(files / "a")).select("case when k < 500 then 7 else k end k, v")
        joined = session.sql("select k, v from s join u using (k)", s=skewed, u=session.read_parquet(str(files / "b")))
        with pytest.raises(emberflow.InvalidArgument, match=REFUSED):
            session.partial_sql("select * from {0}, {1}", joined, joined.repartition(4, hash_by="k")).count()


def test_what_was_done_with_partitions_stays_when_there_are_others(a: Frame) -> None:
    three = a.repartition(3).partial_sql("select count(*) n from {0}")
    assert [row["n"] for row in three.repartition(2).take_all()] == [200, 200, 200]
    sizes = a.repartition(3).map_batches(lambda t: pa.table({"n": [len(t)]}), batch_size=ROWS, schema={"n": "BIGINT"})
    assert [row["n"] for row in sizes.repartition(1).take_all()] == [200, 200, 200]
    # A filter shows nothing of them: its files are dealt out anew, and no row moves.
    assert sorted(len(keys) for keys in keys_of(a.repartition(3).filter("k >= 0").repartition(2))) == [200, 400]


def test_a_frame_meets_itself(a: Frame) -> None:
    for frame in (a.repartition(4, hash_by="k"), a.repartition(4), a.repartition(4, by_rows=True).compute()):
        met = a.session.partial_sql(BOTH, frame, frame).take_all()
        assert [row["a"] for row in met] == [row["b"] for row in met] == keys_of(frame)
