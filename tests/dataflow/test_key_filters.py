"""Rows that a join will drop are not sent to it, and the answers are DuckDB's.

Run: pytest tests/dataflow/test_key_filters.py. What counts as large is small here, but where a test says otherwise.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import emberflow
import msgspec
import pyarrow as pa
import pytest
from emberflow.job import keys as job_keys
from emberflow.job import rendering, shares
from emberflow.job.keys import with_cheap_keys
from emberflow.job.shares import Spec
from emberflow.job.steps import Output
from emberflow.plan import keys, planner
from emberflow.plan.filescans import Share
from emberflow.plan.nodes import Column, Condition, Filter, Input, Join, KeyFilter, Limit, Node, Project, column
from emberflow.plan.pipes import ExchangeFeed, FileFeed, Stage
from hypothesis import given, settings
from hypothesis import strategies as st

BIG, SMALL = 8_000, 400
FORCED: dict[str, Any] = {"executor": "inline", "workers": 2, "shuffle": "always", "partitions": 3}
FORCED |= {"broadcast_bytes": 0, "partition_bytes": 16 << 10}

KEYS = {
    "integers with NULL": ("CASE WHEN i % 11 = 0 THEN NULL ELSE i % 997 END", "b.k = s.k"),
    "null-safe": ("CASE WHEN i % 11 = 0 THEN NULL ELSE i % 997 END", "b.k IS NOT DISTINCT FROM s.k"),
    "most are one": ("CASE WHEN i % 10 < 6 THEN 7 ELSE i % 997 END", "b.k = s.k"),
    "floats": (
        "CASE i % 7 WHEN 0 THEN 'NaN'::DOUBLE WHEN 1 THEN '-NaN'::DOUBLE WHEN 2 THEN (CASE WHEN i > 200 THEN -0.0 "
        "ELSE 0.0 END)::DOUBLE WHEN 3 THEN 'Infinity'::DOUBLE WHEN 4 THEN NULL ELSE (i % 997) / 8 END",
        "b.k = s.k",
    ),
    "a collation": (
        "CASE WHEN i > 200 THEN 'NAME ' || i % 997 ELSE 'name ' || i % 997 END",
        "b.k COLLATE NOCASE = s.k",
    ),
    "two types": ("i % 997", "b.k::SMALLINT = (s.k::DECIMAL(9, 1) / 2)"),
    "two keys": ("i % 997", "b.k = s.k AND b.v % 5 = s.w % 5"),
    "and more": ("i % 997", "b.k = s.k AND b.v > s.w"),
    "no match": ("CASE WHEN i < 300 THEN -i - 1 ELSE i END", "b.k = s.k + 100000"),
    "texts": ("repeat('x', i % 997)", "b.k = s.k"),
}
PICKED = "(SELECT * FROM small WHERE g = 0)"
JOINS = {
    "inner": (f"SELECT b.v, s.w FROM big b JOIN {PICKED} s ON {{on}}", True),
    "inner, turned": (f"SELECT b.v, s.w FROM {PICKED} s JOIN big b ON {{on}}", True),
    "outer, the small side kept": (f"SELECT b.v, s.w FROM {PICKED} s LEFT JOIN big b ON {{on}}", True),
    "outer, the large side kept": (f"SELECT b.v, s.w FROM big b LEFT JOIN {PICKED} s ON {{on}}", False),
    "right": (f"SELECT b.v, s.w FROM big b RIGHT JOIN {PICKED} s ON {{on}}", True),
    "full": (f"SELECT b.v, s.w FROM big b FULL JOIN {PICKED} s ON {{on}}", False),
    "semi": (f"SELECT b.v FROM big b SEMI JOIN {PICKED} s ON {{on}}", True),
    "anti": (f"SELECT b.v FROM big b ANTI JOIN {PICKED} s ON {{on}}", False),
    "semi of the small side": (f"SELECT s.w FROM {PICKED} s SEMI JOIN big b ON {{on}}", True),
    "anti of the small side": (f"SELECT s.w FROM {PICKED} s ANTI JOIN big b ON {{on}}", True),
}
"""With whether the large side may be filtered."""


SIZES = [(keys, "_LARGE_BYTES_MIN", 0), (job_keys, "_ROWS_BYTES_MIN", 0), (job_keys, "_KEYS_OF_DROPPED_BYTES", 1e6)]
USUAL = [(module, name, getattr(module, name)) for module, name, _ in SIZES]


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in SIZES:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def usual_sizes(small_is_large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in USUAL:
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def session() -> Iterator[emberflow.Session]:
    with emberflow.init(**FORCED) as session:
        yield session


def write(directory: Path, key: str, *, big: int = BIG, small: int = SMALL) -> None:
    """`big` in four files, `small` in one, of which a quarter has g = 0: the rest has other keys."""
    directory.mkdir(exist_ok=True)
    with duckdb.connect() as connection:
        for part in range(4):
            rows = f"range({part * big // 4}, {(part + 1) * big // 4}) of(i)"
            connection.execute(f"COPY (SELECT {key} k, i v FROM {rows}) TO '{directory}/big{part}.parquet'")
        rows = f"SELECT {key} k, i w, CASE WHEN i < {small // 4} THEN 0 ELSE 1 + i % 3 END g FROM range({small}) of(i)"
        connection.execute(f"COPY ({rows}) TO '{directory}/small.parquet'")


def over(directory: Path, text: str) -> str:
    """`text` over the files."""
    text = re.sub(r"\bbig\b", f"'{directory}/big*.parquet'", text)
    return re.sub(r"\bsmall\b", f"'{directory}/small.parquet'", text)


def check(session: emberflow.Session, text: str) -> None:
    """A job gives the rows that DuckDB gives."""
    got = session.sql(text).to_arrow()
    with duckdb.connect() as connection:
        expected = connection.sql(text).to_arrow_table()
        assert got.num_rows == expected.num_rows
        assert connection.sql("FROM got EXCEPT ALL FROM expected").fetchall() == []


@dataclass(frozen=True)
class Filtered:
    """How a stage with a key filter went."""

    tasks: int
    applied: int
    """How many of the tasks did."""
    rows: int
    """That they gave."""


def filtered(session: emberflow.Session) -> list[Filtered]:
    """Of the latest job."""
    events = session.jobs.last
    stages = {e.stage: e.data["tasks"] for e in events if e.kind == "stage" and "key filter" in e.data["explain"]}
    return [
        Filtered(
            tasks,
            sum(e.kind == "task" and e.stage == stage and "SEMI JOIN" in e.data["sql"] for e in events),
            sum(e.data["rows"] for e in events if e.kind == "finished" and e.stage == stage),
        )
        for stage, tasks in stages.items()
    ]


def filters(frame: emberflow.DataFrame) -> list[str]:
    """The stages that have key filters, by what they make and what their tasks read, each as often as it has one."""
    stages = re.findall(r"^stage \d+ \((.*?)\), a task per (\w+)(.*(?:\n .*)*)", frame.explain(), re.MULTILINE)
    return [f"{label} of a {read}" for label, read, lines in stages for _ in range(lines.count("key filter"))]


@pytest.fixture(scope="module", params=KEYS)
def keyed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Files, and what a join of them compares."""
    key, on = KEYS[request.param]
    directory = tmp_path_factory.mktemp("keys")
    write(directory, key)
    return directory, on


@pytest.mark.parametrize("kind", JOINS)
def test_joins(session: emberflow.Session, keyed: tuple[Path, str], kind: str) -> None:
    directory, on = keyed
    text, is_filtered = JOINS[kind]
    check(session, over(directory, text.format(on=on)))
    assert len(filtered(session)) == is_filtered
    for stage in filtered(session):
        assert stage.applied == stage.tasks > 1
        assert stage.rows < 0.8 * BIG


def test_large_partitions_are_cut_as_well(
    session: emberflow.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "SKEW", 1)
    monkeypatch.setattr(shares, "_SKEW_BYTES_MIN", 0)
    write(tmp_path, KEYS["most are one"][0])
    check(session, over(tmp_path, JOINS["inner"][0].format(on="b.k = s.k")))
    assert sum(e.kind == "task" for e in session.jobs.last) > 4 + 1 + 3, "a partition is several tasks"


@pytest.mark.parametrize("where", ["g % 10 = 5", "g >= 0"])
def test_a_small_side_without_rows_and_one_with_all(session: emberflow.Session, tmp_path: Path, where: str) -> None:
    write(tmp_path, "i % 997")
    for text, is_filtered in JOINS.values():
        check(session, over(tmp_path, text.format(on="b.k = s.k").replace("g = 0", where)))
        assert len(filtered(session)) == is_filtered
        for stage in filtered(session):
            assert (stage.applied, stage.rows) == ((0, BIG) if where == "g >= 0" else (stage.tasks, 0))


@pytest.mark.parametrize("on", ["b.k = s.k", "b.k % 997 = s.k % 997"])
def test_what_is_not_filtered_before_filters_nothing(session: emberflow.Session, tmp_path: Path, on: str) -> None:
    """A constant in what is compared leaves all rows in."""
    write(tmp_path, "i % 997")
    check(session, over(tmp_path, f"SELECT b.v, s.w FROM big b JOIN small s ON {on}"))
    assert filtered(session) == []


SIDES = {
    "a column": "SELECT k, {value} r FROM small WHERE g = 0",
    "a condition": "SELECT k, w r FROM small WHERE g = 0 AND {value} > 0",
    "behind GROUP BY": "SELECT k, max({value}) r FROM small WHERE g = 0 GROUP BY k",
    "of what all tasks read": "SELECT s.k, r FROM small s JOIN (SELECT w x, {value} r FROM small) ON w < x WHERE g = 0",
}


@pytest.mark.parametrize("side", SIDES)
def test_what_changes_each_time_filters_nothing(session: emberflow.Session, tmp_path: Path, side: str) -> None:
    write(tmp_path, "i % 997")
    text = over(tmp_path, f"SELECT b.v, s.r FROM big b JOIN ({SIDES[side]}) s ON b.k = s.k")
    check(session, text.format(value="pi()"))
    assert filtered(session) != []
    assert filters(session.sql(text.format(value="random()"))) == []
    turned = over(tmp_path, f"SELECT b.v, s.r FROM ({SIDES[side]}) s LEFT JOIN big b ON b.k = s.k")
    assert filters(session.sql(turned.format(value="pi()"))) != []
    assert filters(session.sql(turned.format(value="random()"))) == []


def test_what_a_function_gives_filters_nothing(session: emberflow.Session, tmp_path: Path) -> None:
    write(tmp_path, "i % 997")
    picked = session.sql(over(tmp_path, "SELECT k, w FROM small")).map_batches(
        lambda table: table, schema={"k": "BIGINT", "w": "BIGINT"}
    )
    text = over(tmp_path, "SELECT b.v FROM big b JOIN (SELECT * FROM p WHERE w = 3) s ON b.k = s.k")
    assert filters(session.sql(text, p=picked)) == []


CHAIN = """
    SELECT b.v, m.x, s.w FROM (SELECT * FROM small WHERE g = 0) s
    JOIN (SELECT v % 5000 a, k c, v x FROM big WHERE v < 15000) m ON m.c = s.k
    {kind} JOIN big b ON b.v % 5000 = m.a
"""


@pytest.mark.parametrize("kind", ["", "LEFT", "SEMI", "ANTI"])
def test_filters_of_filtered_rows(session: emberflow.Session, tmp_path: Path, kind: str) -> None:
    write(tmp_path, "i % 997")
    text = CHAIN.format(kind=kind) if kind in ("", "LEFT") else CHAIN.format(kind=kind).replace("b.v, ", "")
    check(session, over(tmp_path, text))
    assert len(filtered(session)) == 2
    for stage in filtered(session):
        assert stage.applied == stage.tasks > 1
        assert stage.rows < BIG / 2


STAR = """
    SELECT m.v, m.x, s.w FROM (SELECT a.k, a.v, b.k x FROM big a LEFT JOIN big b ON a.v = b.v) m
    JOIN (SELECT * FROM small WHERE g = 0) s ON m.k = s.k
"""


def test_what_is_filtered_from_above_filters_the_other_side(session: emberflow.Session, tmp_path: Path) -> None:
    """`a` has no filters of its own, and the join of `s` is above that of `a` and `b`."""
    write(tmp_path, "i % 997")
    check(session, over(tmp_path, STAR))
    (of_a, of_b) = filtered(session)
    assert of_a.applied == of_a.tasks > 1
    assert of_b == of_a


def test_keys_of_others_are_filtered_however_few_they_are(
    session: emberflow.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all filters that they have. Rows that are no keys are sent as they are."""
    monkeypatch.setattr(job_keys, "_ROWS_BYTES_MIN", 1 << 30)
    write(tmp_path, "i % 997")
    check(session, over(tmp_path, STAR + " JOIN (SELECT * FROM small WHERE g = 1) t ON m.v = t.w"))
    (of_a, of_b) = filtered(session)
    assert (of_a.applied, of_b.applied) == (of_a.tasks, 0)
    assert of_b.rows == BIG
    of_tasks = [e.data["sql"].count("SEMI JOIN") for e in session.jobs.last if e.kind == "task"]
    assert of_tasks.count(2) == of_a.tasks


@pytest.mark.usefixtures("usual_sizes")
def test_without_them_everything_is_sent(tmp_path: Path) -> None:
    """And with them the joins' tasks are as many, in as many partitions; sizes as they are outside of tests."""
    big = 600_000
    write(tmp_path, "(i * 7919) % 400009", big=big, small=20_000)
    text = over(tmp_path, JOINS["inner"][0].format(on="b.k = s.k"))
    with emberflow.init(**{**FORCED, "partition_bytes": 128 << 20}) as session:
        compare_sent(session, text, big)


def compare_sent(session: emberflow.Session, text: str, big: int) -> None:
    check(session, text)
    (stage,) = filtered(session)
    assert stage.applied == stage.tasks
    assert stage.rows < big / 20
    tasks = [e.data["tasks"] for e in session.jobs.last if e.kind == "stage"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "with_key_filters", lambda stages, joins, new_feed: stages)
        check(session, text)
        assert sum(e.data["rows"] for e in session.jobs.last if e.kind == "finished") >= big
        assert sorted(e.data["tasks"] for e in session.jobs.last if e.kind == "stage") == sorted(tasks)


# ---- whether a task applies one


def stage_with_filter(session: emberflow.Session, directory: Path) -> Stage:
    query = session.sql(over(directory, JOINS["inner"][0].format(on="b.k = s.k"))).query
    program = session.jobs.planner(query).program(query)
    (stage,) = [stage for stage in program.stages if isinstance(stage.pipe.tree, KeyFilter)]
    return stage


@pytest.mark.usefixtures("usual_sizes")
@pytest.mark.parametrize(
    ("own_bytes", "rows", "key_bytes", "applies"),
    [
        (8 << 20, 100, 3 << 20, True),
        (8 << 20, 100, (3 << 20) + 1, False),
        (8 << 20, 200, 2 << 20, True),
        (8 << 20, 200, (2 << 20) + 1, False),
        (8 << 20, 201, 0, False),
        (1 << 20, 1, 0, True),
        ((1 << 20) - 2, 1, 0, False),
    ],
)
def test_keys_are_read_where_they_are_few(
    session: emberflow.Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_bytes: int,
    rows: int,
    key_bytes: int,
    applies: bool,
) -> None:
    monkeypatch.setattr(keys, "_LARGE_BYTES_MIN", 0)
    write(tmp_path, "i % 997")
    pipe = stage_with_filter(session, tmp_path).pipe
    assert isinstance(pipe.tree, KeyFilter)
    assert pipe.tree.scanned_rows == SMALL
    assert isinstance(pipe.tree.keys, Input)
    assert pipe.drive is not None
    files = pipe.feeds[pipe.drive]
    assert isinstance(files, FileFeed)
    # Both columns are read, and half of the bytes are in the files.
    spec = Spec({pipe.drive: Share(("f",), own_bytes // 2)})
    source = pipe.feeds[pipe.tree.keys.id]
    assert isinstance(source, ExchangeFeed)
    made = {source.exchange.id: [Output(attempt="a", rows=rows, size_bytes=key_bytes)]}
    found = with_cheap_keys(pipe, spec, made)
    assert isinstance(found, KeyFilter) == applies
    if not applies:
        assert found == pipe.tree.child


# ---- how far down they stand

ROWS = (Column("a", "BIGINT"), Column("b", "BIGINT"))
ON_A = (Condition(column(0, "BIGINT"), column(0, "BIGINT"), "="),)


def joined(kind: str, *, single: bool = False) -> Join:
    return Join(Input(1, ROWS), Input(2, ROWS), kind, ON_A, single=single)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("node", "compared", "found"),
    [
        (Input(1, ROWS), 1, (1, 1)),
        (Filter(Input(1, ROWS), ()), 1, (1, 1)),
        (Project(Input(1, ROWS), (column(1, "BIGINT"), column(0, "BIGINT")), ("b", "a")), 0, (1, 1)),
        (Limit(Input(1, ROWS), 5), 0, None),
        (joined("inner"), 0, (1, 0)),
        (joined("inner"), 3, (2, 1)),
        (joined("left"), 0, (1, 0)),
        (joined("left"), 2, None),
        (joined("left", single=True), 0, None),
        (joined("right"), 0, None),
        (joined("right"), 3, (2, 1)),
        (joined("full"), 0, None),
        (joined("full"), 2, None),
        (joined("semi"), 1, (1, 1)),
        (joined("anti"), 1, (1, 1)),
        (joined("mark"), 1, (1, 1)),
        (joined("mark"), 2, None),
        (joined("right_semi"), 1, (2, 1)),
        (joined("right_anti"), 1, (2, 1)),
    ],
)
def test_how_far_down(node: Node, compared: int, found: tuple[int, int] | None) -> None:
    """A column that is compared, to the input that it comes from and where it stands there."""
    below = keys._below(node, (Condition(column(compared, "BIGINT"), column(0, "BIGINT"), "="),))
    assert (below and (below[0], below[1][0].left.position)) == found


def test_what_two_stages_read_is_not_filtered_for_one(session: emberflow.Session, tmp_path: Path) -> None:
    write(tmp_path, "i % 997")
    text = """
        WITH m AS MATERIALIZED (SELECT b.v, b.k FROM big b JOIN big o ON b.v = o.v)
        SELECT (SELECT count(*) FROM m) n, m.v FROM m JOIN (SELECT * FROM small WHERE g = 0) s ON m.k = s.k
    """
    check(session, over(tmp_path, text))
    assert len(filtered(session)) == 1


PLACES = {
    "below a join": ("SELECT b.k, o.v FROM big b JOIN big o ON b.v = o.v", "join of a share"),
    "below what is computed once": ("FROM m", "shared of a share"),
    "above a group": ("SELECT max(k) k, v FROM big GROUP BY v", "join of a partition"),
    "above few rows": (
        "SELECT t.k, b.v FROM big b JOIN (SELECT range k, range w FROM range(400)) t ON b.v % 400 = t.w",
        "join of a partition",
    ),
    "above what all tasks read": (
        "SELECT o.k, b.v FROM big b JOIN big o ON b.v >= o.v AND b.v <= o.v AND b.k < o.v + 997",
        "join of a share",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_filter_is_as_far_down_as_it_leaves_much_out(session: emberflow.Session, tmp_path: Path, place: str) -> None:
    write(tmp_path, "i % 997")
    large, where = PLACES[place]
    large = (
        f"WITH m AS MATERIALIZED (SELECT k, v FROM big) SELECT b.v, s.w FROM ({large}) b JOIN {PICKED} s ON b.k = s.k"
    )
    check(session, over(tmp_path, large))
    assert filters(session.sql(over(tmp_path, large))) == [where]
    (stage,) = filtered(session)
    assert stage.applied == stage.tasks > 1
    assert stage.rows < 0.8 * BIG


def test_a_partition_that_was_asked_for_has_all_its_rows(session: emberflow.Session, tmp_path: Path) -> None:
    """So whoever asks for it again finds it, whatever it is joined with."""
    write(tmp_path, "i % 997")
    parted = session.sql(over(tmp_path, "SELECT k, v FROM big")).repartition(5, hash_by="v")
    text = over(tmp_path, f"SELECT p.v, s.w FROM p JOIN {PICKED} s ON p.k = s.k")
    assert filters(session.sql(text, p=parted)) == ["join of a partition"]
    joined = session.sql(text, p=parted).to_arrow()
    (stage,) = filtered(session)
    assert (stage.tasks, stage.applied) == (5, 5)
    (of_parted,) = [e.stage for e in session.jobs.last if e.kind == "stage" and "repartition" in e.data["label"]]
    assert sum(e.data["rows"] for e in session.jobs.last if e.kind == "finished" and e.stage == of_parted) == BIG
    with duckdb.connect() as connection:
        expected = connection.sql(over(tmp_path, JOINS["inner"][0].format(on="b.k = s.k"))).to_arrow_table()
        assert joined.num_rows == expected.num_rows
        assert connection.sql("FROM joined EXCEPT ALL FROM expected").fetchall() == []


# ---- what is lost is made again


def test_keys_that_are_lost_are_made_again(tmp_path: Path) -> None:
    write(tmp_path / "files", "i % 997")
    text = over(tmp_path / "files", JOINS["inner"][0].format(on="b.k = s.k"))
    steps = tmp_path / "root" / "steps"
    with emberflow.init(**FORCED, data_root=f"{tmp_path}/root") as session:
        check(session, text)
        (first, *others) = sorted(steps.glob("*/*.won"), key=lambda path: path.stat().st_mtime_ns)
        # The side of the keys is done; nothing else is, and its file is gone.
        (lost,) = first.parent.glob("*.exchange")
        for won in others:
            won.unlink()
        os.unlink(lost)
        check(session, text)
        assert [e.kind for e in session.jobs.last].count("recompute") == 1
        (stage,) = filtered(session)
        assert stage.applied >= stage.tasks


def test_an_output_names_the_keys_that_it_read(tmp_path: Path) -> None:
    """Those without rows, too: another attempt might have some."""
    write(tmp_path / "files", "i % 997")
    text = over(tmp_path / "files", JOINS["inner"][0].format(on="b.k = s.k")).replace("g = 0", "g % 10 = 5")
    with emberflow.init(**FORCED, data_root=f"{tmp_path}/root") as session:
        check(session, text)
    won = sorted((tmp_path / "root" / "steps").glob("*/*.won"), key=lambda path: path.stat().st_mtime_ns)
    outputs = [msgspec.msgpack.decode(path.read_bytes(), type=Output) for path in won]
    (stage,) = filtered(session)
    assert [output.inputs for output in outputs[1 : 1 + stage.tasks]] == stage.tasks * [[outputs[0].attempt]]


def test_steps_are_found_again_by_the_keys_that_they_read(tmp_path: Path) -> None:
    write(tmp_path / "files", "i % 997")
    text = over(tmp_path / "files", JOINS["inner"][0].format(on="b.k = s.k"))
    with emberflow.init(**FORCED, data_root=f"{tmp_path}/root") as session:
        check(session, text)
        (stage,) = filtered(session)
        check(session, text)
        assert filtered(session) == [replace(stage, applied=0, rows=0)], "they are there already"
        check(session, text.replace("g = 0", "g = 1"))
        (other,) = filtered(session)
        assert other.applied == other.tasks


# ---- anything

values = st.one_of(st.none(), st.integers(-3, 3))
rows = st.lists(st.tuples(values, values), max_size=12)
kinds = ["JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN", "SEMI JOIN", "ANTI JOIN"]


@settings(max_examples=30, deadline=None)
@given(
    tables=st.tuples(rows, rows, rows),
    first=st.sampled_from(kinds),
    second=st.sampled_from(kinds),
    compares=st.sampled_from(["=", "IS NOT DISTINCT FROM"]),
    of_right=st.booleans(),
    pay=st.lists(st.booleans(), min_size=1, max_size=4).filter(any),
)
def test_any_rows(
    tables: tuple[list[tuple[int | None, int | None]], ...],
    first: str,
    second: str,
    compares: str,
    of_right: bool,
    pay: list[bool],
) -> None:
    """Filters wherever they are right, in one direction or in the other, whether they seem to be worth it or not."""
    schema = pa.schema([("k", pa.int64()), ("v", pa.int64())])
    whole = {
        name: pa.Table.from_arrays([pa.array([row[i] for row in rows], pa.int64()) for i in range(2)], schema=schema)
        for name, rows in zip("abc", tables, strict=True)
    }
    is_half = first.startswith(("SEMI", "ANTI"))
    inner = f"SELECT a.k, a.v, {'b' if of_right and not is_half else 'a'}.v w FROM a {first} b ON a.k {compares} b.k"
    outer = "" if second.startswith(("SEMI", "ANTI")) else ", c.v x"
    text = f"SELECT t.*{outer} FROM ({inner}) t {second} c ON t.w {compares} c.k"
    worth = itertools.cycle(pay)
    with pytest.MonkeyPatch.context() as patch, emberflow.init(**FORCED) as session, duckdb.connect() as connection:
        patch.setattr(keys, "_pays", lambda keys, large: next(worth))
        patch.setattr(rendering, "with_cheap_keys", lambda pipe, spec, outputs: pipe.tree)
        parts = {name: session.from_arrow(table).repartition(2, by_rows=True) for name, table in whole.items()}
        got = session.sql(text, **parts).to_arrow()
        for name, table in whole.items():
            connection.register(name, table)
        expected = connection.sql(text).to_arrow_table()
        assert got.num_rows == expected.num_rows
        assert connection.sql("FROM got EXCEPT ALL FROM expected").fetchall() == []


@pytest.mark.parametrize("kind", ["JOIN", "LEFT JOIN", "SEMI JOIN"])
def test_keys_are_computed_of_rows_that_the_join_would_see(
    session: emberflow.Session, tmp_path: Path, kind: str
) -> None:
    """Of others it may be an error: those that are no numbers are gone by then."""
    with duckdb.connect() as connection:
        texts = "CASE WHEN i % 2 = 1 THEN (i % 500)::VARCHAR ELSE 'x' || i END"
        connection.execute(f"COPY (SELECT i id, {texts} t FROM range(4000) of(i)) TO '{tmp_path}/texts.parquet'")
        connection.execute(f"COPY (SELECT i id FROM range(4000) of(i) WHERE i % 2 = 1) TO '{tmp_path}/good.parquet'")
        connection.execute(f"COPY (SELECT i k, i % 7 g FROM range(500) of(i)) TO '{tmp_path}/few.parquet'")
        text = (
            f"SELECT count(*), max(s.k) FROM (SELECT * FROM '{tmp_path}/few.parquet' WHERE g = 3) s {kind} "
            f"(SELECT a.id, a.t FROM '{tmp_path}/texts.parquet' a JOIN '{tmp_path}/good.parquet' USING (id)) b "
            "ON CAST(b.t AS BIGINT) = s.k"
        )
        expected = connection.execute(text).fetchall()
    assert [tuple(row.values()) for row in session.sql(text).to_arrow().to_pylist()] == expected
