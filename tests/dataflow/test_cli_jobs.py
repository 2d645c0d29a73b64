"""`emberline jobs` as a user meets it. Run: pytest tests/dataflow"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from emberflow.job import history
from emberflow.job.event import Event
from emberflow.job.history import JobInfo
from emberflow.job.record import Record
from emberflow.job.steps import Place

from emberline.cli import main

STEP = "a" * 32


def jobs(root: str | None, *arguments: str, code: int = 0) -> Result:
    environment = {"EMBERFLOW_ROOT": root, "COLUMNS": "120", "EMBERLINE_LOG": None}
    result = CliRunner().invoke(main, ["jobs", *arguments], env=environment)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def known(root: str) -> str:
    """A root with a job that has failed."""
    info = JobInfo(id="old-1", name="write hosts\n", query="select *\nfrom x", target="s3://lake/hosts")
    with pytest.raises(ValueError), Record(root, info, explain="stage 0 (scan)") as record:
        record.use(STEP)
        record.note(Event("stage", 0, -1, 0.0, {"label": "scan", "tasks": 2, "reused": 1, "rows": 1000}))
        record.note(Event("output", 0, 1, 0.1, {"text": "hello\n"}))
        record.note(Event("retry", 0, 1, 0.2, {"error": "WorkerDied: it is gone"}))
        raise ValueError("no such column")
    return root


def test_ls(known: str) -> None:
    with Record(known, JobInfo(id="new-1", name="count")):
        head, *rows = jobs(known, "ls").stdout.splitlines()
        assert head.split() == ["id", "state", "started", "took", "tasks", "name"]
        assert [row.split()[:2] for row in rows] == [["new-1", "running"], ["old-1", "failed"]]
        listed = [json.loads(line) for line in jobs(known, "ls", "--json", "--state", "failed").stdout.splitlines()]
    assert [(job["id"], job["steps"], job["tasks"]) for job in listed] == [("old-1", [STEP], 2)]
    assert listed[0]["ended"].endswith("Z")


def test_nothing_to_list(root: str) -> None:
    result = jobs(root, "ls")
    assert result.stdout == ""
    assert f"no jobs under {root}" in result.stderr


def test_show(known: str) -> None:
    text = jobs(known, "show", "old-1").stdout
    for told in (
        "failed",
        "s3://lake/hosts",
        "1/2",
        "WorkerDied: it is gone",
        "from x",
        "stage 0 (scan)",
        "no such col",
    ):
        assert told in text
    shown = json.loads(jobs(known, "show", "old-1", "--json").stdout)
    assert shown["error"] == "ValueError: no such column"
    assert [(stage["label"], stage["done"], stage["rows"]) for stage in shown["stages"]] == [("scan", 1, 1000)]


def test_logs(known: str) -> None:
    assert jobs(known, "logs", "old-1").stdout == "[scan 0.1] hello\n"
    assert jobs(known, "logs", "old-1", "--json").stdout == '{"line": "[scan 0.1] hello"}\n'


def test_cancel(known: str) -> None:
    asked: list[str] = []
    with Record(known, JobInfo(id="new-1"), on_cancel=lambda: asked.append("new-1")) as record:
        assert json.loads(jobs(known, "cancel", "new-1", "--json").stdout) == {"id": "new-1", "asked_to_end": True}
        record.beat()
    assert asked == ["new-1"]
    assert "it is failed" in jobs(known, "cancel", "old-1", code=1).stderr


def test_report(known: str, tmp_path: Path) -> None:
    page = tmp_path / "job.html"
    jobs(known, "report", "old-1", "-o", str(page))
    assert "no such column" in page.read_text(encoding="utf-8")
    assert jobs(known, "report", "old-1", "-o", "-").stdout == page.read_text(encoding="utf-8")


def test_gc(known: str) -> None:
    Place(f"{known}/steps/{STEP}").prepare()
    assert "removed 0 attempts, 0 steps" in jobs(known, "gc").stderr
    options = ("--keep-days", "0", "--max-size", "0B")
    told = json.loads(jobs(known, "gc", *options, "--dry-run", "--json").stdout)
    assert (told["dry_run"], len(told["steps"]), len(told["records"])) == (True, 1, 1)
    assert history.jobs(known)
    result = jobs(known, "gc", *options)
    assert "step  " in result.stdout
    assert "removed 0 attempts, 1 step, 0 half-written datasets, 1 record: 0 B" in result.stderr
    assert not history.jobs(known)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("show", "nope"), 1, "there is no job 'nope' under"),
        (("logs", "../x"), 1, "name of a job"),
        (("gc", "--max-size", "much"), 1, "a size is a number"),
        (("gc", "--keep-days", "-1"), 2, "keep-days"),
        (("report", "old-1"), 2, "--output"),
        (("ls", "--root", "nosuch://x"), 1, "cannot open 'nosuch://x/jobs'"),
    ],
)
def test_mistakes_get_one_clear_line(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = jobs(str(tmp_path), *arguments, code=code)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [("ls",), ("show", "x"), ("logs", "x"), ("cancel", "x"), ("gc",)])
def test_a_root_that_is_missing_is_asked_for(arguments: tuple[str, ...]) -> None:
    result = jobs(None, *arguments, code=2)
    assert "--root URL, or EMBERFLOW_ROOT=URL" in result.stderr


def test_help_teaches() -> None:
    text = jobs(None, "--help").stdout
    for told in ("EMBERFLOW_ROOT", "emberline jobs gc --dry-run", "cancel", "report", "lost"):
        assert told in text
