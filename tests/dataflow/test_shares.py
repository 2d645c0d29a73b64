"""How a stage becomes tasks, by the bytes that its inputs turned out to have.

Run: pytest tests/dataflow/test_shares.py.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from emberflow.exchange.format import Block, ExchangeIndex, pack_blocks
from emberflow.functions.steps import PythonStep
from emberflow.job.shares import Exchanged, ShareConfig, cut
from emberflow.job.steps import Output
from emberflow.plan.filescans import File, ResolvedScan
from emberflow.plan.nodes import Column, Expr, Input, Project
from emberflow.plan.pipes import (
    PREVIOUS,
    Exchange,
    ExchangeFeed,
    FileFeed,
    Pipe,
    PythonSegment,
    Segment,
    SqlSegment,
    Stage,
    TextSegment,
    Whole,
)
from emberflow.plan.scantext import FileScan

MIB = 1 << 20
COLUMNS = (Column("k", "BIGINT"),)


def output(*partition_bytes: int) -> Output:
    """What a producer made, as far as shares look at it."""
    offsets = np.cumsum([0, *partition_bytes])
    blocks = [Block(p, 1, int(offsets[p]), size, 0) for p, size in enumerate(partition_bytes) if size]
    index = ExchangeIndex(
        schema=b"", columns=COLUMNS, num_partitions=len(partition_bytes), packed_blocks=pack_blocks(blocks)
    )
    data = msgspec.msgpack.encode(index)
    return Output(attempt="a", rows=1, size_bytes=sum(partition_bytes), url="u", index=data)


def stage_of(*exchanges: Exchange, by: str = "partition", then: Segment | None = None) -> Stage:
    feeds = {i: ExchangeFeed(exchange, by) for i, exchange in enumerate(exchanges)}  # type: ignore[arg-type]
    pipe = Pipe((SqlSegment(Input(0, COLUMNS)), *([then] if then else [])), dict(feeds), 0, 0)
    return Stage(0, pipe, Whole(), Exchange(99, COLUMNS, 1))


def groups(stage: Stage, outputs: dict[int, list[Output]], config: ShareConfig | None = None) -> list[tuple[int, ...]]:
    return [spec.exchanges[0].partitions for spec in cut(stage, outputs, config or ShareConfig()).specs]


def test_small_neighbours_share_a_task() -> None:
    exchange = Exchange(7, COLUMNS, 6)
    outputs = {7: [output(*[MIB] * 6), output(*[MIB] * 6)]}
    assert groups(stage_of(exchange), outputs, ShareConfig(together_bytes=5 * MIB)) == [(0, 1), (2, 3), (4, 5)]
    assert groups(stage_of(exchange), outputs) == [(0, 1, 2, 3, 4, 5)]
    assert groups(stage_of(exchange), outputs, ShareConfig(together_bytes=-1)) == [(p,) for p in range(6)]


def test_partitions_the_user_asked_for_stay_tasks() -> None:
    exchange = Exchange(7, COLUMNS, 4, fixed=True)
    assert groups(stage_of(exchange), {7: [output(1, 0, 0, 1)]}) == [(0,), (1,), (2,), (3,)]


def test_a_much_larger_partition_is_cut_by_producer_where_that_is_right() -> None:
    left = Exchange(1, COLUMNS, 4, splittable=True)
    right = Exchange(2, COLUMNS, 4)
    outputs = {
        1: [output(MIB, 40 * MIB, MIB, MIB) for _ in range(4)],
        2: [output(MIB, MIB, MIB, MIB)],
    }
    found = cut(stage_of(left, right), outputs, ShareConfig(together_bytes=MIB)).specs
    split = [spec.exchanges for spec in found if spec.exchanges[0].partitions == (1,)]
    assert [exchanges[0].outputs for exchanges in split] == [(0,), (1,), (2,), (3,)]
    assert all(exchanges[1] == Exchanged((1,)) for exchanges in split)
    assert sorted(p for spec in found for p in spec.exchanges[0].partitions) == [0, 1, 1, 1, 1, 2, 3]


def test_nothing_is_cut_where_equal_keys_must_stay_together() -> None:
    exchange = Exchange(1, COLUMNS, 3)
    outputs = {1: [output(MIB, 90 * MIB, MIB) for _ in range(4)]}
    assert groups(stage_of(exchange), outputs, ShareConfig(together_bytes=MIB)) == [(0,), (1,), (2,)]


STEP = PythonSegment(PythonStep(kind="map", function=len), COLUMNS)
"""The user's Python."""


def scan_shares(
    names: tuple[str, ...],
    *,
    function: str = "read_parquet",
    type: str = "BIGINT",
    then: Segment | None = None,
    size_bytes: int = 16 * MIB,
    udfs: frozenset[str] = frozenset(),
) -> int:
    """Of 8 files with 4 columns, of which a stage reads `names`; b is of `type`."""
    columns = tuple(Column(name, type if name == "b" else "BIGINT") for name in "abcd")
    paths = tuple(f"/{number}" for number in range(8))
    scan = ResolvedScan(FileScan(function, paths), columns, tuple(File(path, size_bytes, "") for path in paths))
    segments = (SqlSegment(Input(0, columns)), *([then] if then else []))
    pipe = Pipe(segments, {0: FileFeed(scan, names)}, 0, 0)
    return len(cut(Stage(0, pipe, Whole(), Exchange(99, columns, 1)), {}, ShareConfig(functions=udfs)).specs)


def test_shares_of_files_follow_the_bytes_of_the_columns_that_are_read() -> None:
    assert scan_shares(("a", "b", "c", "d")) == 8
    assert scan_shares(("a",)) == 4
    assert scan_shares(()) == 1
    assert scan_shares(("a",), function="read_csv") == 8
    assert scan_shares(("b",), type="DECIMAL(15,2)") == 4


@pytest.mark.parametrize("type", ["VARCHAR", "BLOB", "BIGINT[]", "STRUCT(a DATE)", "TIMESTAMP[]", "JSON", "ENUM('a')"])
def test_a_column_that_may_be_nearly_all_of_a_file_counts_as_all(type: str) -> None:
    assert scan_shares(("b",), type=type) == 8
    assert scan_shares(("a",), type=type) == 4


def over(sql: str) -> SqlSegment:
    return SqlSegment(Project(Input(PREVIOUS, COLUMNS), (Expr((sql, "(", 0, ")"), "BIGINT"),), ("c0",)))


@pytest.mark.parametrize(
    ("then", "runs_python"),
    [
        (STEP, True),
        (over("slow"), True),
        (over('"SLOW"'), True),
        (TextSegment("SELECT Slow(c0) FROM r", (("r", PREVIOUS, COLUMNS),), COLUMNS), True),
        (over("slower"), False),
        (TextSegment("SELECT slower(c0) FROM r", (("r", PREVIOUS, COLUMNS),), COLUMNS), False),
    ],
)
def test_what_the_users_python_takes_does_not_follow_bytes(then: Segment, runs_python: bool) -> None:
    udfs = frozenset({"slow", "other"})
    assert scan_shares(("a",), then=then, udfs=udfs) == (8 if runs_python else 4)
    assert scan_shares(("a",), then=then, size_bytes=3 * MIB, udfs=udfs) == (8 if runs_python else 1)
    assert scan_shares(("a",), then=then, size_bytes=2 * MIB, udfs=udfs) == 1
    config = ShareConfig(together_bytes=4 * MIB, together_python_bytes=-1, functions=udfs)
    exchange = Exchange(7, COLUMNS, 6)
    stage = stage_of(exchange, then=then)
    assert len(groups(stage, {7: [output(*[MIB] * 6)]}, config)) == (6 if runs_python else 2)
    pieces = cut(stage_of(exchange, by="piece", then=then), {7: [output(MIB)] * 6}, config).specs
    assert len(pieces) == (6 if runs_python else 2)


def test_pieces_are_neighbours_up_to_a_tasks_bytes() -> None:
    exchange = Exchange(1, COLUMNS, 1)
    outputs = {1: [output(size * MIB) for size in (3, 3, 9, 1, 1)]}
    found = cut(stage_of(exchange, by="piece"), outputs, ShareConfig(together_bytes=6 * MIB)).specs
    assert [spec.exchanges[0].outputs for spec in found] == [(0, 1), (2,), (3, 4)]


def test_everything_for_one_task_needs_no_share() -> None:
    pipe = Pipe((SqlSegment(Input(0, COLUMNS)),), {0: ExchangeFeed(Exchange(1, COLUMNS, 4), "all")}, None, 0)
    stage = Stage(0, pipe, Whole(), Exchange(2, COLUMNS, 1))
    (only,) = cut(stage, {1: [output(1, 1, 1, 1)]}, ShareConfig()).specs
    assert only.exchanges == {}
