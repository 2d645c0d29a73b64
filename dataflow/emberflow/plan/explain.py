"""A program as text: its stages, what each runs, and where its rows go."""

from __future__ import annotations

from collections.abc import Iterator

from .describe import describe
from .filescans import ResolvedScan
from .grade import grade
from .pipes import (
    ByExpression,
    ByHash,
    ByRange,
    ExchangeFeed,
    Feed,
    FileFeed,
    Program,
    PythonSegment,
    Spread,
    SqlSegment,
    Stage,
    TextSegment,
)


def explained(program: Program, *, threads: int) -> str:
    """One paragraph per stage, in the order they run; then the program's notes. `threads` are those of a task."""
    lines = [line for stage in program.stages for line in stage_lines(stage, program, threads=threads)]
    if program.notes:
        lines += ["", *program.notes]
    return "\n".join(lines)


def stage_lines(stage: Stage, program: Program, *, threads: int) -> Iterator[str]:
    """One stage's paragraph."""
    is_result = stage.exchange is program.result
    goes = "the result" if is_result else f"exchange {stage.exchange.id}"
    yield f"stage {stage.id} ({stage.label}), {_tasks(stage)}, {grade(stage, threads=threads)} -> {goes}{_how(stage)}"
    for segment in stage.pipe.segments:
        if isinstance(segment, SqlSegment):
            yield from (f"    {line}" for line in describe(segment.tree).splitlines())
        elif isinstance(segment, TextSegment):
            yield f"    sql: {' '.join(segment.text.split())}"
        else:
            assert isinstance(segment, PythonSegment)
            yield f"    python: {segment.step.kind} {segment.step.name}"
    for feed_id, feed in stage.pipe.feeds.items():
        yield f"    input {feed_id}: {_feed(feed)}"


def _tasks(stage: Stage) -> str:
    if stage.pipe.drive is None:
        return "one task"
    feed = stage.pipe.feeds[stage.pipe.drive]
    if isinstance(feed, FileFeed):
        return "a task per partition of files" if feed.by_partition else "a task per share of files"
    assert isinstance(feed, ExchangeFeed)
    return "a task per partition" if feed.by == "partition" else "a task per piece"


def _how(stage: Stage) -> str:
    how = stage.partitioning
    count = stage.exchange.partitions
    if isinstance(how, ByExpression):
        return f", {count} partitions by key"
    if isinstance(how, ByHash):
        return f", {count} partitions by a hash that lasts"
    if isinstance(how, ByRange):
        return f", {count} ranges"
    if isinstance(how, Spread):
        return f", {count} partitions {'in turn' if how.seed is None else 'at random'}"
    return ""


def _feed(feed: Feed) -> str:
    if isinstance(feed, FileFeed):
        return f"{_files(feed.scan)}, columns {', '.join(feed.names) or 'none'}"
    if isinstance(feed, ExchangeFeed):
        whole = {"all": "whole", "partition": "a partition", "piece": "a piece"}[feed.by]
        return f"exchange {feed.exchange.id}, {whole}"
    return f"a table of {feed.table.num_rows:,} rows"


def _files(scan: ResolvedScan) -> str:
    if not scan.all_files:
        return f"{len(scan.files)} files, {scan.size_bytes:,} bytes"
    return f"{len(scan.files)} of {scan.all_files} files, {scan.size_bytes:,} of {scan.all_bytes:,} bytes"
