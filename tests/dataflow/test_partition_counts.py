"""In how many partitions rows are: what the query says, whatever the sizes of what it reads.

Run: pytest tests/dataflow/test_partition_counts.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import emberflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from emberflow.plan.pipes import FileFeed

PARTITIONS = 4
FEW, MANY = 20, 2000
# Rows of the partitioned frame and of the others, what is broadcast, and partitions of every exchange.
KINDS = (
    (FEW, MANY, 50_000, None),
    (MANY, FEW, 50_000, None),
    (MANY, MANY, 0, None),
    (FEW, FEW, 32 << 20, None),
    (FEW, MANY, 0, 3),
    (MANY, FEW, 32 << 20, 3),
)

Frame = emberflow.DataFrame

SQL: dict[str, tuple[str, int | None]] = {
    # What can have no rows reads nothing, and is one partition.
    "no rows": ("select k from p where false", 1),
    "rows that cannot be": ("select k from p where k > 5 and k < 3", 1),
    "groups of no rows": ("select k, count(*) n from p where 1 = 0 group by k", 1),
    "no rows of a join": ("select p.k from p join t using (k) where false", 1),
    "no rows of a join with files": ("select p.k from p join f using (k) where false", 1),
    "no rows in order": ("select k from p where false order by k", 1),
    "groups of no rows of several joins": (
        "select t.k, count(*) n from t2 join p using (k) join t on p.k = t.k where false group by t.k",
        1,
    ),
    "a join with no rows": ("select p.k from p left join (select k from t where false) e using (k)", 4),
    # A join with what is one partition has the other side's.
    "join with a table": ("select p.k from p join t using (k)", 4),
    "join of a table": ("select p.k from t join p using (k)", 4),
    "left join": ("select p.k from p left join t using (k)", 4),
    "right join": ("select p.k from t right join p using (k)", 4),
    "semi join": ("select k from p semi join t using (k)", 4),
    "anti join": ("select k from p anti join t using (k)", 4),
    "join of no keys": ("select p.k from p join t on p.k < t.k", 4),
    "cross join": ("select p.k from p, (from t limit 3)", 4),
    "join with one partition": ("select p.k from p join one using (k)", 4),
    "join with several of one": ("select p.k from t join p using (k) join one using (k)", 4),
    "in": ("select k from p where k in (select k from t)", 4),
    "in or not": ("select k from p where k in (select k from t) or k % 2 = 0", 4),
    "in a list": (f"select k from p where k in ({', '.join(map(str, range(40)))})", 4),
    "more than the average of files": ("select k from p where k > (select avg(k) from f)", 4),
    "more than the average of other partitions": ("select k from p where k > (select avg(k) from q)", 4),
    "groups of a join's key": ("select p.k, count(*) n from p join t using (k) group by p.k", 4),
    "groups of a key of the right": ("select p.k, count(*) n from t join p using (k) group by p.k", 4),
    "groups of a key of the middle": (
        "select p.k, count(*) n from t join p using (k) join one on p.k = one.k group by p.k",
        4,
    ),
    "groups of a key of the right that may be NULL": (
        "select p.k, count(*) n from t join p on t.k is not distinct from p.k group by p.k",
        4,
    ),
    "groups of a key of the middle that may be NULL": (
        "select p.k, count(*) n from t2 join p on t2.k is not distinct from p.k join t on p.k = t.k group by p.k",
        4,
    ),
    "groups of a key of both": ("select p.k, t.k, count(*) n from t join p using (k) group by p.k, t.k", 4),
    "groups of a key of a right join": ("select p.k, count(t.v) n from t right join p using (k) group by p.k", 4),
    "groups of another key": ("select t.v, count(*) n from t join p using (k) group by t.v", None),
    # Not if each of that one's rows has to be there once.
    "left join of one": ("select t.k from t left join p using (k)", None),
    "full join": ("select t.k from p full join t using (k)", None),
    "semi join of one": ("select k from t semi join p using (k)", None),
    "anti join of one": ("select k from t anti join p using (k)", None),
    # Of other joins nobody knows whose they are.
    "join with files": ("select p.k from p join f using (k)", None),
    "join of files": ("select p.k from f join p using (k)", None),
    "join with files and a table": ("select p.k from p join f using (k) join t using (k)", None),
    "join of two": ("select p.k from p join q using (k)", None),
    "in files": ("select k from p where k in (select k from f)", None),
    "files and a table": ("select f.k from f join t using (k)", None),
    "a table and files": ("select f.k from t join f using (k)", None),
    "union": ("select k from p union all select k from p2", None),
    # What always is in one task is one partition.
    "tables": ("select t.k from t join t2 using (k)", 1),
    "a table and one partition": ("select t.k from t join one using (k)", 1),
    "full join of one and one": ("select t.k from one full join t using (k)", 1),
    "left join of one and one": ("select t.k from one left join t using (k)", 1),
    "no rows, counted": ("select count(*) n from p where false", 1),
    "no first rows": ("select k from p limit 0", 1),
    "first rows": ("select k from f limit 5", 1),
    "first rows in order": ("select k from f order by k limit 5", 1),
    "aggregate": ("select count(*) n from f", 1),
    "aggregate in order": ("select list(k) ks from (select k from f order by k)", 1),
    "window": ("select k, row_number() over (order by k) n from f", 1),
    "window over rows in order": ("select k, row_number() over () n from (select k from f order by k)", 1),
    "table in order": ("select k from t order by k", 1),
    "one partition in order": ("select k from one order by k", 1),
    "a query that is not planned": ("select p.k from p asof join t on p.k >= t.k", 1),
    # And what is in one task because it is small is none.
    "files in order": ("select k from f order by k", None),
    "partitions in order": ("select k from p order by k", None),
    "groups of rows in order": ("select k, list(v) vs from (select k, v from f order by v) group by k", None),
    "window of rows in order": ("select k, sum(k) over (partition by k) n from (select k, v from f order by v)", None),
    "distinct": ("select distinct k from (select k, v from f order by v)", None),
    "rows in order and a table": ("select t.k from (select k from f order by k) f join t using (k)", None),
    "rows in order and partitions": ("select p.k from (select k from f order by v) f join p using (k)", None),
}


Kinds = list[tuple[emberflow.Session, dict[str, Frame]]]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kinds]:
    """Sessions and the frames of a query in them, of several sizes."""
    directory = tmp_path_factory.mktemp("kinds")
    for rows in (FEW, MANY):
        table = pa.table({"k": range(rows), "v": [f"{k % 10}" + "x" * 200 for k in range(rows)]})
        (directory / f"{rows}").mkdir()
        for j in range(4):
            part = table.slice(j * rows // 4, rows // 4)
            pq.write_table(part, directory / f"{rows}" / f"{j}.parquet", compression="none", use_dictionary=False)
    with ExitStack() as stack:
        found = []
        for mine, others, broadcast_bytes, partitions in KINDS:
            config: dict[str, Any] = {"broadcast_bytes": broadcast_bytes, "partitions": partitions}
            session = stack.enter_context(emberflow.init(executor="inline", **config))
            found.append((session, frames_of(session, directory / f"{mine}", directory / f"{others}")))
        yield found


def frames_of(session: emberflow.Session, mine: Path, others: Path) -> dict[str, Frame]:
    files = session.read_parquet(str(others))
    parted = session.read_parquet(str(mine)).repartition(PARTITIONS, hash_by="k")
    return {
        "p": parted,
        "p2": parted.filter("k >= 0"),
        "q": files.repartition(PARTITIONS, hash_by="k"),
        "f": files,
        "t": session.from_arrow(pq.read_table(others)),
        "t2": session.from_arrow(pq.read_table(mine)),
        "one": files.repartition(1, by_rows=True),
    }


def query(session: emberflow.Session, frames: dict[str, Frame], text: str) -> Frame:
    return session.sql(text, **{name: frame for name, frame in frames.items() if name in re.findall(r"\w+", text)})


def count_of(frame: Frame) -> int | None:
    return frame.session.jobs.planner(frame.frame).program(frame.frame).partitions


@pytest.mark.parametrize("name", SQL)
def test_sizes_do_not_change_how_many_there_are(kinds: Kinds, name: str) -> None:
    text, expected = SQL[name]
    assert [count_of(query(session, frames, text)) for session, frames in kinds] == [expected] * len(kinds)


def test_a_branch_without_rows_leaves_files_skipped(session: emberflow.Session, tmp_path: Path) -> None:
    for j in range(4):
        pq.write_table(pa.table({"k": range(j * 10, j * 10 + 10)}), tmp_path / f"{j}.parquet")
    files = session.read_parquet(str(tmp_path))
    parted = session.from_arrow(pa.table({"k": range(20)})).repartition(PARTITIONS, hash_by="k")
    text = "select f.k from f left join (select k from p where 1 = 0) e using (k) where f.k < 5 and f.k >= 0"
    frame = session.sql(text, f=files, p=parted)
    program = session.jobs.planner(frame.frame).program(frame.frame)
    scans = [f.scan for stage in program.stages for f in stage.pipe.feeds.values() if isinstance(f, FileFeed)]
    assert [len(scan.files) for scan in scans] == [1]
    assert frame.count() == 5


@pytest.mark.parametrize("text", ["select p.k from p join t using (k)", "select p.k from t join p using (k)"])
def test_a_large_side_that_every_task_reads_is_told(text: str) -> None:
    table = pa.table({"k": range(1000)})
    for broadcast_bytes, noted in ((table.nbytes - 1, 1), (table.nbytes, 0)):
        with emberflow.init(executor="inline", broadcast_bytes=broadcast_bytes) as session:
            parted = session.from_arrow(table).repartition(PARTITIONS, hash_by="k")
            told = session.sql(text, p=parted, t=session.from_arrow(table)).explain()
            whole = "each of 4 tasks reads a join's side of one partition whole, about 8,000 bytes: 32,000 in sum"
            assert told.count(whole) == noted, told


MEETING = [name for name, (_, count) in SQL.items() if count == PARTITIONS]


@pytest.mark.parametrize("name", MEETING)
def test_rows_stay_in_the_partition_they_were_in(kinds: Kinds, name: str) -> None:
    both = "select (select list(k) from {0}) a, (select list(k) from {1}) b"
    for session, frames in (kinds[0], kinds[2]):
        found = query(session, frames, SQL[name][0])
        met = session.partial_sql(both, found, frames["p"]).take_all()
        assert len(met) == PARTITIONS
        assert all(set(row["a"] or []) <= set(row["b"] or []) for row in met)
        assert sum(len(row["a"] or []) for row in met) == found.count()


SHUFFLED: dict[str, tuple[Callable[[dict[str, Frame]], Frame], int]] = {
    "partitions": (lambda frames: frames["p"], 4),
    "behind a filter": (lambda frames: frames["p"].filter("k >= 3"), 4),
    "behind a function": (lambda frames: frames["p"].map(lambda row: {"k": row["k"]}), 4),
    "computed": (lambda frames: frames["p"].filter("k >= 3").compute(), 4),
    "shuffled": (lambda frames: frames["p"].random_shuffle(partitions=3).select("k"), 3),
    "partial_sql of several": (
        lambda frames: frames["p"].partial_sql("select k from {0} join {1} using (k)", frames["t"]),
        4,
    ),
    "a table": (lambda frames: frames["t"], 1),
    "files": (lambda frames: frames["f"], 8),
    "a join": (lambda frames: frames["p"].join(frames["q"], on="k"), 8),
}


@pytest.mark.parametrize("name", SHUFFLED)
def test_a_shuffle_has_as_many_as_there_were(kinds: Kinds, name: str) -> None:
    frame, expected = SHUFFLED[name]
    for _, frames in kinds[:2]:
        shuffled = frame(frames).random_shuffle()
        assert count_of(shuffled) == expected
        assert len(shuffled.partial_sql("select count(*) n from {0}").take_all()) == expected
    with pytest.raises(emberflow.InvalidArgument, match="at least 1"):
        frame(frames).random_shuffle(partitions=0)
