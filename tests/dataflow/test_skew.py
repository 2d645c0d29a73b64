"""Many rows with one key: the partition that holds them becomes several tasks, and the rows are DuckDB's.

Run: pytest tests/dataflow/test_skew.py. The exchanges here hold a few MiB, and a partition counts as large from a
sixteenth of the usual size on.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import emberflow
import pytest
from emberflow.job import shares

ROWS = 60_000
SMALL_BYTES = 256 << 10
KEYS = {
    "one key": f"CASE WHEN i % 10 < 6 THEN 7 ELSE i % {ROWS // 20} END",
    "no key": "CAST(NULL AS BIGINT)",
}
FACTS = (
    "SELECT {key} k, i % 5 small, i v, CAST(i % 100 AS DECIMAL(12, 2)) price, "
    "md5(i::VARCHAR) t FROM range({first}, {last}) of(i)"
)
NAMES = f"SELECT i k, 'name ' || i % 50 AS name FROM range({ROWS // 20}) of(i) UNION ALL SELECT NULL, 'nobody'"


@dataclass(frozen=True)
class Facts:
    """Eight files, and what their keys are."""

    keys: str
    directory: str

    def query(self, text: str) -> str:
        """`text` over the files."""
        text = re.sub(r"\bfacts\b", f"'{self.directory}/parts/*.parquet'", text)
        return re.sub(r"\bnames\b", f"'{self.directory}/all.parquet'", text)


@pytest.fixture(scope="module", autouse=True)
def _small_is_large() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shares, "_SKEW_BYTES_MIN", shares._SKEW_BYTES_MIN >> 4)
        yield


@pytest.fixture(scope="module", params=KEYS)
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    directory = tmp_path_factory.mktemp("skew")
    (directory / "parts").mkdir()
    with duckdb.connect() as connection:
        for part in range(8):
            first, last = part * ROWS // 8, (part + 1) * ROWS // 8
            text = FACTS.format(key=KEYS[request.param], first=first, last=last)
            connection.execute(f"COPY ({text}) TO '{directory}/parts/{part}.parquet'")
        connection.execute(f"COPY ({NAMES}) TO '{directory}/all.parquet'")
    return Facts(request.param, str(directory))


@pytest.fixture(scope="module")
def session() -> Iterator[emberflow.Session]:
    # Small shares of files: a partition is cut between what several tasks have put into it.
    with emberflow.init(
        executor="inline", workers=2, shuffle="always", partitions=6, threads=1, partition_bytes=SMALL_BYTES
    ) as session:
        yield session


def tasks(session: emberflow.Session) -> dict[str, int]:
    """Tasks of the latest job, by the label of their stage."""
    return {str(e.data["label"]): int(e.data["tasks"]) for e in session.jobs.last if e.kind == "stage"}


def check(session: emberflow.Session, facts: Facts, text: str) -> None:
    """A job gives the rows that DuckDB gives."""
    query = facts.query(text)
    got = session.sql(query).to_arrow()
    with duckdb.connect() as connection:
        expected = connection.sql(query).to_arrow_table()
        assert got.num_rows == expected.num_rows
        assert connection.sql("FROM got EXCEPT ALL FROM expected").fetchall() == []


JOINS = {
    "inner": "SELECT v, t, name FROM facts f JOIN names n ON f.k = n.k",
    "left": "SELECT v, t, name FROM facts f LEFT JOIN names n ON f.k = n.k",
    "right": "SELECT v, t, name FROM names n RIGHT JOIN facts f ON f.k = n.k",
    "full": "SELECT v, t, name FROM facts f FULL JOIN names n ON f.k = n.k",
    "semi": "SELECT v, t FROM facts f SEMI JOIN names n ON f.k = n.k",
    "anti": "SELECT v, t FROM facts f ANTI JOIN names n ON f.k + 1 = n.k",
    "equal nulls": "SELECT v, t, name FROM facts f JOIN names n ON f.k IS NOT DISTINCT FROM n.k",
}


@pytest.mark.parametrize("kind", JOINS)
def test_joins(session: emberflow.Session, facts: Facts, kind: str) -> None:
    check(session, facts, JOINS[kind])
    joined = tasks(session)["result"]
    if facts.keys == "one key" and kind != "full":
        assert joined > 6, "the large partition is several tasks"
    elif kind == "equal nulls":
        assert joined > 6
    else:
        # No NULL equals another: such rows are gone, or lie anywhere.
        assert joined == 6


AGGREGATES = "count(*) n, count(v) nv, sum(v) s, sum(price) p, avg(v) a, min(t) lo, max(t) hi, bool_or(v % 2 = 0) b"


def test_an_aggregate_after_a_join_by_the_same_key(session: emberflow.Session, facts: Facts) -> None:
    text = (
        f"SELECT f.k, {AGGREGATES}, max(name) FROM facts f JOIN names n ON f.k IS NOT DISTINCT FROM n.k "
        "GROUP BY f.k HAVING count(*) > 1"
    )
    check(session, facts, text)
    found = tasks(session)
    # In pieces, and those once more: the other partitions each by a task of their own.
    assert found["result in pieces"] > 2
    assert found["result of pieces"] == 1
    assert found["result"] == 5


def test_what_comes_after_finds_equal_keys_together(
    session: emberflow.Session, facts: Facts, tmp_path_factory: Any
) -> None:
    text = (
        "SELECT k, n, name, row_number() OVER (PARTITION BY k ORDER BY s) r FROM ("
        "SELECT f.k, f.small, count(*) n, sum(v) s, max(name) AS name FROM facts f "
        "JOIN names n ON f.k IS NOT DISTINCT FROM n.k GROUP BY f.k, f.small) WHERE n > 1"
    )
    check(session, facts, text)
    assert "result in pieces" in tasks(session)
    out = str(tmp_path_factory.mktemp("out") / "set")
    written = session.sql(facts.query(text)).write_parquet(out)
    assert written.num_rows == session.sql(facts.query(text)).count()


@pytest.mark.parametrize(
    "text",
    [
        f"SELECT k, {AGGREGATES} FROM facts GROUP BY k",
        "SELECT k, count(DISTINCT small) n FROM facts GROUP BY k",
        "SELECT DISTINCT k, small FROM facts",
        f"SELECT {AGGREGATES} FROM facts",
    ],
)
def test_aggregates_of_one_table_never_get_that_far(session: emberflow.Session, facts: Facts, text: str) -> None:
    check(session, facts, text)
    # Each task has made one row of each group before any row moves.
    assert not any("pieces" in label for label in tasks(session))


def test_what_cannot_be_put_together_stays_whole(session: emberflow.Session, facts: Facts) -> None:
    check(session, facts, "SELECT k, median(v) m, count(*) n FROM facts GROUP BY k")
    assert tasks(session)["result"] == 6


def test_pieces_that_are_lost_or_damaged_are_made_again(facts: Facts, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each step of the job in turn: its files are damaged, and what comes after it is not known any more."""
    root = tmp_path_factory.mktemp("root")
    text = f"SELECT f.k, {AGGREGATES} FROM facts f JOIN names n ON f.k IS NOT DISTINCT FROM n.k GROUP BY f.k"

    def run() -> list[str]:
        with emberflow.init(
            executor="inline", shuffle="always", partitions=6, broadcast_bytes=0, data_root=str(root),
            partition_bytes=SMALL_BYTES,
        ) as session:  # fmt: skip
            check(session, facts, text)
            assert "result in pieces" in tasks(session)
            return [event.kind for event in session.jobs.last]

    run()
    damaged = 0
    for step in sorted((root / "steps").iterdir()):
        for file in step.glob("*.exchange"):
            data = bytearray(file.read_bytes())
            if len(data) > 1000:
                data[len(data) // 2] ^= 255
                file.write_bytes(data)
                damaged += 1
        for other in (root / "steps").iterdir():
            if other != step and other.stat().st_mtime_ns >= step.stat().st_mtime_ns:
                shutil.rmtree(other)
        run()
    assert damaged >= 3
