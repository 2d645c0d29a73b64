"""What events amount to, and what the progress bar makes of them. Run: pytest tests/dataflow"""

from __future__ import annotations

import pytest
from emberflow.job.event import Event
from emberflow.job.tally import Tally
from emberflow.progress import job_progress, progress_text


def finished(stage: int, task: int, at_s: float, seconds: float, rows: int, worker: str = "local-0") -> Event:
    data = {"rows": rows, "size_bytes": 10 * rows, "seconds": seconds, "cpu_s": seconds / 2, "worker": worker}
    return Event("finished", stage, task, at_s, data)


def test_a_stage_as_it_goes() -> None:
    tally = Tally()
    tally.note(Event("stage", 0, -1, 1.0, {"label": "scan", "tasks": 5, "reused": 1, "rows": 100, "size_bytes": 1000}))
    stage = tally.stages[0]
    assert (stage.done, stage.rows, stage.median_s, stage.skew, tally.left_s) == (1, 100, None, None, None)
    for task, rows in ((1, 10), (2, 10), (3, 40)):
        tally.note(finished(0, task, 3.0, 2.0, rows, f"local-{task}"))
    tally.note(Event("rows", 0, 4, 3.1, {"rows": 7}))
    assert (stage.done, stage.rows, stage.size_bytes, stage.cpu_s) == (4, 167, 1600, 3.0)
    assert (stage.median_s, stage.max_s, stage.skew) == (2.0, 2.0, 4.0)
    assert stage.spilled_bytes is None
    assert tally.left_s == pytest.approx(2.0 / 3)
    tally.note(Event("retry", 0, 4, 3.2, {"error": "x"}))
    assert (stage.retries, stage.rows) == (1, 160)
    tally.note(finished(0, 4, 5.0, 1.0, 9))
    assert stage.is_done
    assert not tally.running


def test_what_was_lost_is_no_longer_done() -> None:
    tally = Tally([Event("stage", 0, -1, 0.0, {"label": "scan", "tasks": 2, "reused": 1})])
    tally.note(finished(0, 1, 1.0, 1.0, 5))
    tally.note(Event("recompute", 0, 1, 2.0, {"error": "x"}))
    assert (tally.stages[0].done, tally.stages[0].rows) == (1, 0)
    tally.note(Event("recompute", 0, 0, 2.0, {"error": "x"}))
    assert tally.stages[0].done == 0
    assert [event.kind for event in tally.troubles] == ["recompute", "recompute"]
    assert len(tally.runs) == 1, "the timeline shows what ran, whatever became of it"


def test_workers_are_in_the_order_of_their_numbers() -> None:
    tally = Tally(finished(0, n, 1.0, 1.0, 1, f"local-{n}") for n in (10, 2, 1))
    assert tally.workers == ["local-1", "local-2", "local-10"]


def test_progress_on_one_line() -> None:
    tally = Tally([Event("stage", 0, -1, 0.0, {"label": "scan", "tasks": 1})])
    assert progress_text(tally, 3) == "stages 0/3, scan 0/1 tasks"
    tally.note(finished(0, 0, 10.0, 10.0, 1_000_000))
    tally.note(Event("stage", 1, -1, 10.0, {"label": "join", "tasks": 400, "reused": 1}))
    tally.note(finished(1, 0, 20.0, 10.0, 5_000))
    tally.note(Event("rows", 1, 1, 20.0, {"rows": 7_000}))
    assert progress_text(tally, 3) == "stages 1/3, join 2/400 tasks, 1,200 rows/s, 66 min 20 s left in this stage"
    for stage in (2, 3):
        tally.note(Event("stage", stage, -1, 20.0, {"label": "[b]", "tasks": 1}))
    assert progress_text(tally, None) == "stages 1/4, join 2/400 tasks, [b] 0/1 tasks, 1 more stage, 1,200 rows/s"


@pytest.mark.parametrize("show", [None, False])
def test_nothing_is_shown_that_nobody_sees(show: bool | None, capfd: pytest.CaptureFixture[str]) -> None:
    with job_progress("a job", show=show) as note:
        note(Event("stage", 0, -1, 0.0, {"label": "scan", "tasks": 1}))
    assert capfd.readouterr() == ("", "")


def test_progress_that_was_asked_for(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with job_progress("a [job]", show=True, stages=1) as note:
        note(Event("stage", 0, -1, 0.0, {"label": "scan", "tasks": 1}))
        note(finished(0, 0, 1.0, 1.0, 5))
    out, err = capfd.readouterr()
    assert out == ""
    assert "a [job]" in err
    assert "stages 1/1" in err
