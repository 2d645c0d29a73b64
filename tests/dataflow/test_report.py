"""The page made of a job's record: whole, alone, and safe to open. Run: pytest tests/dataflow"""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from emberflow.errors import InvalidArgument
from emberflow.job.event import Event
from emberflow.job.history import JobInfo, JobRecord
from emberflow.job.report import report
from emberflow.quantities import bytes_of, bytes_text, seconds_text

_VOID = {"meta", "br"}
EVIL = "<script>alert('1')</script> & \"x\" \udcff"


class Page(HTMLParser):
    """What a browser would make of it: tags in balance, texts, and every attribute that could reach out."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("href", "src", "xlink:href")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def events(label: str = "scan") -> tuple[Event, ...]:
    """Two scans, one of them reused, a join that reads both, and a last stage that reads the first too."""
    done = [
        Event("stage", 0, -1, 0.0, {"label": label, "tasks": 2, "explain": "explain of it"}),
        Event("stage", 1, -1, 0.0, {"label": "other", "tasks": 2, "reused": 2, "rows": 77}),
    ]
    for task, worker in ((0, "local-0"), (1, "local-1")):
        data = {"rows": 5, "size_bytes": 2048, "seconds": 1.0, "cpu_s": 0.5, "worker": worker, "spilled_bytes": 4096}
        done += [
            Event("task", 0, task, 0.1, {"attempt": "a", "sql": "SELECT c0 < 1"}),
            Event("finished", 0, task, 1.5, data),
        ]
    done.append(Event("retry", 0, 1, 0.7, {"error": f"WorkerDied: {label}"}))
    done.append(Event("stage", 2, -1, 2.0, {"label": "join", "tasks": 4, "inputs": [0, 1]}))
    done.append(Event("stage", 3, -1, 2.0, {"label": "sort", "tasks": 0, "inputs": [2, 0]}))
    return tuple(done)


def test_a_page_holds_what_is_known() -> None:
    info = JobInfo(id="j-1", name="write hosts", query="select 1", started_s=1e9, seen_s=1e9 + 3, ended_s=1e9 + 3)
    info.state, info.error = "failed", "QueryError: no such column"
    text = report(JobRecord(info=info, events=events(), explain="the whole plan", output="[scan 0.1] hello\n"))
    page = Page(text)
    for told in ("write hosts", "failed", "QueryError: no such column", "select 1", "2001-09-09 01:46:40", "local-1"):
        assert told in page.text
    for told in ("the whole plan", "[scan 0.1] hello", "SELECT c0 < 1", "explain of it", "WorkerDied", "8.0 KiB"):
        assert told in page.text
    assert page.tags.count("svg") == 2
    assert text.count('class="arrow"') == 5, "four of the stages' inputs, one of them past a layer"
    assert text.count('class="head"') == 4


def test_whatever_comes_from_a_job_is_only_text() -> None:
    info = JobInfo(id="j", name=EVIL, query=EVIL, error=EVIL, host=EVIL, target=EVIL, versions={EVIL: EVIL})
    plain = report(JobRecord(info=JobInfo(id="j", query="q", error="e", host="h", target="t"), events=events()))
    evil = report(JobRecord(info=info, events=events(EVIL), explain=EVIL, output=EVIL))
    assert "script" not in Page(evil).tags
    assert Page(evil).text.count("<script>") > 8
    assert set(Page(evil).tags) == set(Page(plain).tags)
    evil.encode()


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = report(JobRecord(info=JobInfo(id="j"), events=events()))
    page = Page(text)
    assert all(link.startswith("#stage-") for link in page.links)
    assert "url(" not in text
    assert "@import" not in text
    assert {link.removeprefix("#") for link in page.links} == {f"stage-{n}" for n in range(4)}


def test_a_job_that_has_just_begun_has_a_page() -> None:
    assert "running" in Page(report(JobRecord(info=JobInfo(id="j")))).text


def test_tasks_at_once_on_one_worker_get_lanes_of_their_own() -> None:
    def bars(*ends_s: float) -> int:
        runs = [Event("stage", 0, -1, 0.0, {"label": "scan", "tasks": 9})]
        runs += [Event("finished", 0, n, end, {"seconds": 1.0, "worker": "inline"}) for n, end in enumerate(ends_s)]
        text = report(JobRecord(info=JobInfo(id="j"), events=tuple(runs)))
        lines = text[text.index('class="timeline"') :].split("<rect")[1:]
        return len({line.partition('y="')[2].partition('"')[0] for line in lines})

    assert bars(1.0, 2.0, 3.0) == 1
    assert bars(1.0, 1.5, 2.0) == 2
    assert bars(1.0, 1.0, 1.0) == 3


def test_quantities() -> None:
    assert [bytes_of(size) for size in ("1KB", "1 KiB", "2.5GB", "7", "7b", "1t")] == [
        *(1000, 1024, 2_500_000_000, 7, 7, 10**12)
    ]
    for size in ("", "GB", "1XB", "1 bk", "-1GB", "1ib"):
        with pytest.raises(InvalidArgument, match="a size"):
            bytes_of(size)
    assert [bytes_text(size) for size in (0, 1023, 1536, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "5.0 TiB"]
    assert [seconds_text(s) for s in (0.012, 9.94, 75, 200, 8000)] == [
        "12 ms",
        "9.9 s",
        "75 s",
        "3 min 20 s",
        "2 h 13 min",
    ]
