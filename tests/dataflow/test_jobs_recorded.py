"""Jobs as a session runs them leave their records, and can be ended from outside. Run: pytest tests/dataflow"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import emberflow
import pytest
from click.testing import CliRunner
from emberflow.errors import CallCancelled, QueryError
from emberflow.job.event import Event
from emberflow.job.history import jobs, show
from emberflow.job.report import report
from emberflow.job.tally import Tally

from emberline.cli import main


@pytest.fixture
def session(tmp_path: Path) -> Iterator[emberflow.Session]:
    root = str(tmp_path / "root")
    with emberflow.init(executor="inline", shuffle="always", partitions=2, data_root=root, job_id="j") as session:
        yield session


def grouped(session: emberflow.Session) -> emberflow.DataFrame:
    numbers = session.sql("select range % 10 k, range n from range(1000)").repartition(2, by_rows=True)
    return session.sql("select k, count(*) c from numbers group by k", numbers=numbers)


def test_a_write_leaves_a_record(session: emberflow.Session, tmp_path: Path) -> None:
    grouped(session).write_parquet(str(tmp_path / "out"))
    record = show(str(tmp_path / "root"), "j-1")
    info = record.info
    assert (info.state, info.target, info.tasks_done) == ("done", str(tmp_path / "out"), info.tasks)
    assert (info.staging or "").startswith(str(tmp_path / ".emberflow-"))
    assert "count(*)" in info.query
    assert sorted(info.steps) == sorted(path.name for path in (tmp_path / "root" / "steps").iterdir())
    tally = Tally(record.events)
    assert len(tally.stages) == info.stages > 1
    assert any(stage.inputs for stage in tally.stages.values())
    assert all(stage.explain and stage.is_done for stage in tally.stages.values())
    assert record.explain
    assert "write" in report(record)


def test_what_a_task_spills_is_in_the_record(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    with emberflow.init(executor="inline", workers=1, data_root=root, job_id="j", memory_limit="128MB") as session:
        rows = session.sql("select md5(range::varchar) m from range(3_000_000)").repartition(1, by_rows=True)
        rows.partial_sql("select * from {0} order by m").compute()
    record = show(root, "j-1")
    spread, ordered = Tally(record.events).stages.values()
    assert spread.spilled_bytes == 0
    assert (ordered.spilled_bytes or 0) > 32 << 20
    assert "<dt>spilled</dt>" in report(record)
    result = CliRunner().invoke(main, ["jobs", "show", "j-1", "--json"], env={"EMBERFLOW_ROOT": root})
    told = [stage["spilled_bytes"] for stage in json.loads(result.output)["stages"]]
    assert told == [0, ordered.spilled_bytes]


def test_a_failed_write_is_known_to_have_failed(session: emberflow.Session, tmp_path: Path) -> None:
    bad = session.sql("select error('no such thing') e from t", t=grouped(session).repartition(2, by_rows=True))
    with pytest.raises(QueryError):
        bad.write_parquet(str(tmp_path / "out"))
    (info,) = jobs(str(tmp_path / "root"))
    assert info.state == "failed"
    assert "no such thing" in info.error


def test_a_job_is_ended_from_outside(session: emberflow.Session) -> None:
    frame = grouped(session)
    runs = session.jobs
    job = runs._job(runs.planner(frame.frame).program(frame.frame), frame.frame, None)

    def watch(event: Event) -> None:
        if event.kind == "task":
            job.stop()

    job.watch = watch
    with pytest.raises(CallCancelled, match="was cancelled"):
        job.run()
