"""Every statement of the corpus as a job with exchanges, with DuckDB's own answer.

Run: pytest tests/dataflow/test_distributed_sql.py. The tables are frames of three partitions, so every type goes
through an exchange, and each statement is cut into stages where it can be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import duckdb
import emberflow
import pyarrow as pa
import pytest
from emberflow.job import rendering, shares
from emberflow.plan import keys
from emberflow.plan.pipes import ExchangeFeed

from .corpus import STATEMENTS, TABLES, Statement


@pytest.fixture(scope="module")
def plain() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        for name, text in TABLES.items():
            connection.execute(f"CREATE TABLE {name} AS {text}")
        yield connection


@pytest.fixture(
    scope="module", params=["partitions", "broadcast", "large partitions", "small partitions", "key filters"]
)
def plan(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def session(plan: str) -> Iterator[emberflow.Session]:
    broadcast_bytes = 1 << 30 if plan == "broadcast" else 0
    with pytest.MonkeyPatch.context() as patch:
        if plan == "large partitions":
            # All that are larger than the usual one count as large, whatever their bytes: they are cut.
            patch.setattr(shares, "SKEW", 1)
            patch.setattr(shares, "_SKEW_BYTES_MIN", 0)
        if plan == "key filters":
            # Wherever one is right, whether it seems to be worth it or not.
            patch.setattr(keys, "_pays", lambda keys, large: True)
            patch.setattr(rendering, "with_cheap_keys", lambda pipe, spec, outputs: pipe.tree)
        yield from opened(broadcast_bytes)


@pytest.fixture(autouse=True)
def small_partitions_share_tasks(plan: str, partitions_are_tasks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them do, in one of the sessions: of the three that most statements have, two or all."""
    if plan == "small partitions":
        monkeypatch.setattr("emberflow.jobs.TOGETHER_BYTES", 2000)


def opened(broadcast_bytes: int) -> Iterator[emberflow.Session]:
    with emberflow.init(executor="inline", shuffle="always", partitions=3, broadcast_bytes=broadcast_bytes) as session:
        for name, text in TABLES.items():
            session.view(name, session.sql(text).repartition(3, by_rows=True).compute())
        yield session


OF_TABLES = {
    "refused2": "a positional join is of rows in the order of a table",
    "refused7": "rowid is of tables",
}
"""Statements that mean nothing over frames, whose rows have no order and no numbers."""
if duckdb.__version__.startswith("1."):
    OF_TABLES |= {
        "nested18": "a struct without names has no text in 1.4, so it goes through no exchange",
        "nested19": "the same",
        "mixed55": "1.4 does not describe SUMMARIZE",
    }


@pytest.mark.parametrize("statement", [s for s in STATEMENTS if s.name not in OF_TABLES], ids=lambda s: s.name)
def test_the_answer_is_duckdbs(
    session: emberflow.Session, plan: str, plain: duckdb.DuckDBPyConnection, statement: Statement
) -> None:
    if session.config.broadcast_bytes and "join" not in statement.sql.lower() and "in (" not in statement.sql.lower():
        return  # Nothing in it could be broadcast: the other session has run the very same stages.
    expected = plain.execute(statement.sql).fetchall()
    types = [(row[0], row[1]) for row in plain.execute(f"DESCRIBE {statement.sql}").fetchall()]
    frame = session.sql(statement.sql)
    if plan == "large partitions" and not can_be_cut(frame):
        return  # As in the first session, too.
    if plan == "small partitions" and not can_be_together(frame):
        return
    if plan == "key filters" and "key filter" not in frame.explain():
        return
    computed = session.jobs.compute(frame.query)
    rows = session.jobs.rows_of(frame.query)
    with session.running(rows) as cursor:
        (name,) = rows.tables
        got = cursor.execute(f"FROM {name}").fetchall()
    assert [column.type for column in computed.columns] == [type_ for _, type_ in types]
    if len({name for name, _ in types}) == len(types):
        assert [column.name for column in computed.columns] == [name for name, _ in types]
    if statement.unstable:
        assert len(got) == len(expected)
        return
    if not statement.ordered:
        # Zeros are equal whatever their sign; DuckDB gives back either.
        got, expected = (sorted(rows, key=lambda row: repr(row).replace("-0.0,", "0.0,")) for rows in (got, expected))
    assert len(got) == len(expected)
    assert all(map(same, got, expected)), (got, expected)


def can_be_cut(frame: emberflow.DataFrame) -> bool:
    """Whether a partition may become several tasks."""
    program = frame.session.jobs.planner(frame.query).program(frame.query)
    return any(exchange.splittable for stage in program.stages for exchange in stage.inputs())


def can_be_together(frame: emberflow.DataFrame) -> bool:
    """Whether a task may have several partitions, or what several tasks made."""
    program = frame.session.jobs.planner(frame.query).program(frame.query)
    feeds = [feed for stage in program.stages for feed in stage.pipe.feeds.values() if isinstance(feed, ExchangeFeed)]
    return any(feed.by != "all" and not feed.exchange.fixed for feed in feeds)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9) or (math.isnan(left) and math.isnan(right))
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_small_partitions_share_tasks(session: emberflow.Session, plan: str) -> None:
    """Some of them, or the statements of the fourth session would be those of the first one over again."""
    rows = session.sql("select range k from range(90)").repartition(3, by_rows=True)
    assert len(session.sql("SELECT DISTINCT k FROM r", r=rows).take_all()) == 90
    tasks = [event.data["tasks"] for event in session.jobs.last if event.kind == "stage"]
    assert plan == "large partitions" or tasks[-1] == (2 if plan == "small partitions" else 3)


def test_large_partitions_are_cut(session: emberflow.Session) -> None:
    """Or the statements of the third session would be those of the first one over again."""
    was_large = shares.SKEW == 1
    left = session.from_arrow(pa.table({"k": [1] * 3000 + list(range(300)), "v": range(3300)}))
    right = session.from_arrow(pa.table({"k": range(300), "name": [f"n{i % 7}" for i in range(300)]}))
    text = "SELECT DISTINCT l.k, name FROM l JOIN r ON l.k = r.k"
    frame = session.sql(text, l=left.repartition(3, by_rows=True), r=right.repartition(3, by_rows=True))
    assert len(frame.take_all()) == 300
    labels = [event.data["label"] for event in session.jobs.last if event.kind == "stage"]
    assert any("in pieces" in label for label in labels) == (was_large and not session.config.broadcast_bytes)
