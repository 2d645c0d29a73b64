"""The lazy operators of a DataFrame, in this process and as jobs with exchanges.

Run: pytest tests/dataflow/test_frames.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emberflow
import pytest


@pytest.fixture(scope="module", params=["auto", "always"])
def session(request: pytest.FixtureRequest) -> Iterator[emberflow.Session]:
    with emberflow.init(executor="inline", shuffle=request.param, partitions=3, broadcast_bytes=0) as session:
        yield session


@pytest.fixture
def people(session: emberflow.Session) -> emberflow.DataFrame:
    return session.sql(
        "select * from (values (1, 'ann', 'x'), (2, 'bob', 'y'), (3, 'cid', 'x'), (4, null, 'z')) p(id, name, team)"
    )


@pytest.fixture
def teams(session: emberflow.Session) -> emberflow.DataFrame:
    return session.sql("select * from (values ('x', 10), ('y', 20), ('w', 30)) t(team, points)")


def rows(frame: emberflow.DataFrame) -> list[tuple[Any, ...]]:
    return sorted((tuple(row.values()) for row in frame.take_all()), key=repr)


def test_columns_come_and_go(people: emberflow.DataFrame) -> None:
    frame = people.with_column("twice", "id * 2").drop("name").rename({"team": "side"})
    assert frame.columns == ["id", "side", "twice"]
    assert rows(frame)[0] == (1, "x", 2)
    assert rows(people.with_column("id", "id + 10"))[0] == (11, "ann", "x")
    for unknown in (people.drop("nobody"), people.rename({"id": "number", "nobody": "somebody"})):
        with pytest.raises(emberflow.QueryError, match="nobody"):
            unknown.take_all()


def test_items_may_differ_in_their_keys(session: emberflow.Session) -> None:
    frame = session.from_items([{"a": 1}, {"b": "x", "a": 2}, 3])
    assert frame.take_all() == [
        {"a": 1, "b": None, "item": None},
        {"a": 2, "b": "x", "item": None},
        {"a": None, "b": None, "item": 3},
    ]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("inner", [1, 2, 3]),
        ("left", [1, 2, 3, 4]),
        ("right", [1, 2, 3, None]),
        ("full", [1, 2, 3, 4, None]),
        ("semi", [1, 2, 3]),
        ("anti", [4]),
    ],
)
def test_joins(people: emberflow.DataFrame, teams: emberflow.DataFrame, how: Any, expected: list[Any]) -> None:
    ids = [row["id"] for row in people.join(teams, "team", how).take_all()]
    assert sorted(ids, key=repr) == sorted(expected, key=repr)


def test_joins_by_conditions_and_of_everything(people: emberflow.DataFrame, teams: emberflow.DataFrame) -> None:
    close = people.join(teams, '"left".id * 10 = "right".points')
    assert sorted(row["id"] for row in close.take_all()) == [1, 2, 3]
    assert people.join(teams, how="cross").count() == 12
    with pytest.raises(emberflow.InvalidArgument, match="cross"):
        people.join(teams)
    with pytest.raises(emberflow.InvalidArgument, match="how is one of"):
        people.join(teams, "team", "outer")  # type: ignore[arg-type]


def test_groups(people: emberflow.DataFrame) -> None:
    assert rows(people.group_by("team").agg("count(*) AS n", "max(id) AS high")) == [
        ("x", 2, 3),
        ("y", 1, 2),
        ("z", 1, 4),
    ]
    assert rows(people.group_by().agg("sum(id) AS total")) == rows(people.agg("sum(id) AS total")) == [(10,)]
    assert rows(people.group_by("team").count()) == [("x", 2), ("y", 1), ("z", 1)]
    with pytest.raises(emberflow.InvalidArgument, match="at least one aggregate"):
        people.group_by("team").agg()


def test_unions_and_distinct_rows(people: emberflow.DataFrame) -> None:
    both = people.union(people)
    assert both.count() == 8
    assert both.distinct().count() == 4
    assert people.distinct("team").count() == 3
    turned = people.select("team", "id", "name")
    assert people.union(turned, by_name=True).distinct().count() == 4


def test_sort_is_of_all_rows(session: emberflow.Session) -> None:
    numbers = session.sql("select (range * 7919) % 1000 n, range % 3 g from range(1000)")
    assert [row["n"] for row in numbers.sort("n").take_all()] == list(range(1000))
    ordered = [(row["g"], row["n"]) for row in numbers.sort("g desc", "n").take_all()]
    assert ordered == sorted(ordered, key=lambda pair: (-pair[0], pair[1]))
    assert [row["n"] for row in numbers.sort("n desc").limit(3).take_all()] == [999, 998, 997]


def test_a_sample_is_the_same_each_time(session: emberflow.Session) -> None:
    numbers = session.sql("select range n from range(2000)")
    first = rows(numbers.sample(0.25, seed=7))
    assert 350 < len(first) < 650
    assert rows(numbers.sample(0.25, seed=7)) == first
    assert rows(numbers.sample(0.25, seed=8)) != first
    assert numbers.sample(1).count() == 2000
    assert numbers.sample(0).count() == 0
    with pytest.raises(emberflow.InvalidArgument, match="from 0 to 1"):
        numbers.sample(2)


def test_views_are_tables_of_every_query(session: emberflow.Session, people: emberflow.DataFrame) -> None:
    session.view("crew", people)
    assert session.sql("select count(*) n from crew").take_all() == [{"n": 4}]
    session.view("crew", people.limit(1))
    assert session.sql("select count(*) n from crew").take_all() == [{"n": 1}]


def test_batches_can_be_awaited(people: emberflow.DataFrame) -> None:
    async def total() -> int:
        return sum([batch.num_rows async for batch in people.stream()])

    assert asyncio.run(total()) == 4


def test_text_is_read_by_lines(session: emberflow.Session, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('one, "two"\n\tthree\n')
    (tmp_path / "b.txt").write_text("four\n\n\x01\nNULL\n")
    frame = session.read_text(str(tmp_path))
    assert frame.schema == {"line": "VARCHAR"}
    lines = {("",), ("\tthree",), ("\x01",), ("NULL",), ("four",), ('one, "two"',)}
    assert len(rows(frame)) == len(lines)
    assert set(rows(frame)) == lines


def test_headers_of_csv_are_found_by_the_schema(session: emberflow.Session, tmp_path: Path) -> None:
    (tmp_path / "with.csv").write_text("a,b\nx,y\n")
    (tmp_path / "without.csv").write_text("x,y\n")
    schema = {"a": "VARCHAR", "b": "VARCHAR"}
    for name in ("with", "without"):
        assert rows(session.read_csv(f"{tmp_path}/{name}.csv", schema)) == [("x", "y")]
    assert session.read_csv(f"{tmp_path}/with.csv", schema, header=False).count() == 2


def test_functions_in_sql(session: emberflow.Session, people: emberflow.DataFrame) -> None:
    @emberflow.udf
    def shout(text: str) -> str:
        return text.upper() + "!"

    session.create_function(shout)
    assert rows(people.filter("id < 3").select("shout(name) AS s")) == [("ANN!",), ("BOB!",)]


def test_explain_says_how(session: emberflow.Session, people: emberflow.DataFrame) -> None:
    if session.config.shuffle == "always":
        text = people.repartition(2).group_by("team").agg("count(*) AS n").explain()
        assert "stage 1 (aggregate), a task per partition, exact -> exchange 1, 3 partitions by key" in text
        assert "aggregate count_star() by" in text
        floats = people.map_batches(lambda table: table).explain()
        assert "unstable" in floats
    else:
        assert people.explain().startswith("in this process, by one DuckDB")


def test_what_is_not_planned_says_why(session: emberflow.Session) -> None:
    frame = session.sql("with recursive t(n) as (select 1 union all select n + 1 from t where n < 5) select * from t")
    if session.config.shuffle == "always":
        assert "runs as one task: a recursive CTE" in frame.explain()
    assert rows(frame) == [(1,), (2,), (3,), (4,), (5,)]


def test_a_deterministic_query_is_a_job_of_one_thread_a_task(session: emberflow.Session) -> None:
    frame = session.sql("select sum(range / 7) total from range(100000)", deterministic=True)
    first = frame.take_all()
    assert session.jobs.threads_of(frame.frame) == 1
    assert frame.take_all() == first


def test_now_is_one_moment_of_a_job(session: emberflow.Session) -> None:
    moments = (
        session.sql("select now() AS t, range % 3 AS g from range(9)").group_by("g").agg("min(t) low", "max(t) high")
    )
    found = {value for row in moments.take_all() for value in (row["low"], row["high"])}
    assert len(found) == 1


def test_settings_that_can_never_be_right() -> None:
    for wrong in ({"workers": 0}, {"executor": "spark"}, {"shuffle": "never"}, {"memory_limit": "much"}, {"colour": 1}):
        with pytest.raises(emberflow.InvalidArgument):
            emberflow.init(**wrong)
