"""What is thought of the sizes of rows and of keys, and whether a task reads keys for it.

Run: pytest tests/dataflow/test_key_guesses.py. Shares are asserted by the constants they are made of: which plans are
taken to leave rows out is what matters, and what that changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from emberflow.exchange.format import Block, ExchangeIndex, pack_blocks
from emberflow.job.keys import with_cheap_keys
from emberflow.job.shares import Exchanged, Spec
from emberflow.job.steps import Output
from emberflow.plan.filescans import File, ResolvedScan
from emberflow.plan.guesses import _CONDITION_KEEPS as FILTERED
from emberflow.plan.guesses import _GROUPS_OF_ROWS as GROUPED
from emberflow.plan.guesses import _LIMIT_KEEPS as LIMITED
from emberflow.plan.guesses import Guess, Guesses, left_of_inputs
from emberflow.plan.nodes import (
    Aggregate,
    Column,
    Condition,
    Distinct,
    Expr,
    Filter,
    Input,
    Join,
    KeyFilter,
    Limit,
    Node,
    Project,
    Sort,
    column,
)
from emberflow.plan.pipes import (
    PREVIOUS,
    Exchange,
    ExchangeFeed,
    Feed,
    FileFeed,
    Pipe,
    Segment,
    SqlSegment,
    Stage,
    TableFeed,
    TextSegment,
    Whole,
)
from emberflow.plan.scantext import FileScan

MIB = 1 << 20
COLUMNS = (Column("k", "BIGINT"), Column("v", "BIGINT"))
EQUAL = (Condition(column(0, "BIGINT"), column(0, "BIGINT"), "="),)
ROWS, OTHERS, KEYS, MORE_KEYS = (Input(i, COLUMNS) for i in range(4))


def where(*conditions: str, of: Node = ROWS) -> Filter:
    """Rows of which conditions on the first column hold."""
    return Filter(of, tuple(Expr((0, condition), "BOOLEAN") for condition in conditions))


def join(kind: str, left: Node = ROWS, right: Node = OTHERS) -> Join:
    return Join(left, right, kind, EQUAL)  # type: ignore[arg-type]


ONE, TWO = " = CAST(1 AS BIGINT)", " < CAST(-2 AS BIGINT)"


# ---- what a plan leaves of its inputs


@pytest.mark.parametrize(
    ("node", "left"),
    [
        (ROWS, 1),
        (Project(ROWS, (column(0, "BIGINT"),), ("k",)), 1),
        (Sort(ROWS, ()), 1),
        (where(ONE), FILTERED),
        (where(" = 'a'"), FILTERED),
        (where(ONE, TWO), FILTERED**2),
        (where(f"{ONE} AND c{TWO}"), FILTERED**2),
        (where(f"{ONE} OR c{TWO} AND c{TWO}"), FILTERED),
        (where(" <> CAST(1 AS BIGINT)"), 1),
        (where(" IS NOT NULL"), 1),
        (where(" % CAST(5 AS BIGINT) IS NOT NULL"), 1),
        (Filter(ROWS, (Expr(("((", 0, " % CAST(5 AS BIGINT)) IS NOT NULL)"), "BOOLEAN"),)), 1),
        (Filter(ROWS, (Expr(("((", 0, ONE, ") AND (", 1, " IS NOT NULL))"), "BOOLEAN"),)), FILTERED**2),
        (where(ONE, " IS NOT NULL"), FILTERED),
        (where(ONE, of=where(TWO)), FILTERED**2),
        (Aggregate(where(ONE), (column(0, "BIGINT"),), ()), GROUPED * FILTERED),
        (Distinct(where(ONE)), GROUPED * FILTERED),
        (Limit(where(ONE), 5), LIMITED * FILTERED),
        (Limit(where(ONE), None, 5), FILTERED),
        (join("inner", where(ONE), Distinct(OTHERS)), FILTERED * GROUPED),
    ],
)
def test_what_a_plan_leaves_of_its_inputs(node: Node, left: float) -> None:
    assert left_of_inputs(node) == pytest.approx(left)


# ---- whether a task reads keys


def output(*partition_bytes: int, rows: int = 1) -> Output:
    """What a producer made, as far as its partitions are weighed."""
    offsets = np.cumsum([0, *partition_bytes])
    blocks = [Block(p, 1, int(offsets[p]), size, 0) for p, size in enumerate(partition_bytes) if size]
    index = ExchangeIndex(
        schema=b"", columns=COLUMNS, num_partitions=len(partition_bytes), packed_blocks=pack_blocks(blocks)
    )
    return Output(attempt="a", rows=rows, size_bytes=sum(partition_bytes), index=msgspec.msgpack.encode(index))


def keyed(node: Node, keys: Input = KEYS, *, is_for_keys: bool = False) -> KeyFilter:
    """With nothing known of what its keys come from: taken to leave a half, if its keys take a quarter."""
    return KeyFilter(node, keys, EQUAL, is_for_keys=is_for_keys)


def reading(tree: Node, made: Mapping[int, Sequence[Output]], drive: int | None = ROWS.id) -> Pipe:
    """A pipe that reads exchanges, one for each feed: its share of the driving one, and the others whole."""
    feeds: dict[int, Feed] = {
        i: ExchangeFeed(Exchange(i, COLUMNS, 2), "partition" if i == drive else "all") for i in made
    }
    return Pipe((SqlSegment(tree),), feeds, drive, 0)


def applied(pipe: Pipe, made: Mapping[int, Sequence[Output]], share: Exchanged | None) -> list[int]:
    """The keys that a task reads, the first ones last."""
    spec = Spec() if share is None else Spec({}, {ROWS.id: share})
    tree = with_cheap_keys(pipe, spec, made)
    found = []
    while isinstance(tree, KeyFilter):
        assert isinstance(tree.keys, Input)
        found.append(tree.keys.id)
        tree = tree.child
    return found


BOTH, SECOND = Exchanged((0, 1)), Exchanged((1,))


@pytest.mark.parametrize(
    ("tree", "made", "share", "weighed_bytes"),
    [
        (ROWS, {0: [output(6 * MIB, 2 * MIB)]}, BOTH, 8 * MIB),
        (ROWS, {0: [output(6 * MIB, 2 * MIB), output(MIB, 3 * MIB)]}, SECOND, 5 * MIB),
        (ROWS, {0: [output(6 * MIB, 2 * MIB), output(MIB, 3 * MIB)]}, Exchanged((1,), (1,)), 3 * MIB),
        (where(ONE), {0: [output(6 * MIB, 4 * MIB)]}, BOTH, FILTERED * 10 * MIB),
        (Distinct(ROWS), {0: [output(6 * MIB, 4 * MIB)]}, BOTH, GROUPED * 10 * MIB),
        (join("inner"), {0: [output(6 * MIB, 2 * MIB)], 1: [output(64 * MIB, 64 * MIB)]}, BOTH, 8 * MIB),
    ],
    ids=["all", "a partition", "a piece of one", "filtered", "grouped", "with what all tasks read"],
)
def test_keys_are_weighed_against_the_rows_that_a_task_would_send(
    tree: Node, made: dict[int, list[Output]], share: Exchanged, weighed_bytes: float
) -> None:
    for part, found in [(0.24, [KEYS.id]), (0.26, [])]:
        outputs = {**made, KEYS.id: [output(int(part * weighed_bytes), 0)]}
        assert applied(reading(keyed(tree), outputs), outputs, share) == found


def test_the_only_task_sends_all_that_it_reads() -> None:
    table = pa.table({"k": pa.array(range(MIB // 4), pa.int64()), "v": pa.array(range(MIB // 4), pa.int64())})
    assert table.nbytes == 4 * MIB
    for part, found in [(0.24, [KEYS.id]), (0.26, [])]:
        outputs = {1: [output(3 * MIB, MIB)], KEYS.id: [output(int(part * 8 * MIB), 0)]}
        pipe = reading(keyed(join("inner")), outputs, drive=None)
        pipe = replace(pipe, feeds={**pipe.feeds, ROWS.id: TableFeed(table, COLUMNS, (0, 1))})
        assert applied(pipe, outputs, None) == found


@pytest.mark.parametrize(
    ("lower", "upper", "found"),
    [
        (1.9, 0.9, [MORE_KEYS.id, KEYS.id]),
        (1.9, 1.1, [KEYS.id]),
        (2.1, 1.9, [MORE_KEYS.id]),
        (2.1, 2.1, []),
    ],
)
def test_a_filter_is_weighed_against_what_those_below_it_leave(lower: float, upper: float, found: list[int]) -> None:
    outputs = {
        ROWS.id: [output(6 * MIB, 2 * MIB)],
        KEYS.id: [output(int(lower * MIB), 0)],
        MORE_KEYS.id: [output(int(upper * MIB), 0)],
    }
    tree = keyed(keyed(ROWS), MORE_KEYS)
    assert applied(reading(tree, outputs), outputs, BOTH) == found


def test_of_few_rows_only_those_are_filtered_that_are_keys_themselves() -> None:
    outputs = {ROWS.id: [output(600, 400)], KEYS.id: [output(100, 0)]}
    assert applied(reading(keyed(ROWS), outputs), outputs, BOTH) == []
    assert applied(reading(keyed(ROWS, is_for_keys=True), outputs), outputs, BOTH) == [KEYS.id]


# ---- what is thought before anything runs

WIDE, NARROW = 1000, 10


def table_of(rows: int) -> TableFeed:
    table = pa.table({name: pa.array(range(rows), pa.int64()) for name in "kv"})
    return TableFeed(table, COLUMNS, (0, 1))


def guessed(*segments: Segment, size_bytes: float = 7.0) -> Guess:
    """Of an exchange that a pipe writes, over tables of 1000 rows and of 10, of 16 bytes each."""
    feeds: dict[int, Feed] = {ROWS.id: table_of(WIDE), OTHERS.id: table_of(NARROW), KEYS.id: table_of(NARROW)}
    pipe = Pipe(segments, feeds, None, size_bytes)
    exchange = Exchange(0, COLUMNS, 1)
    exchange.producers.append(Stage(0, pipe, Whole(), exchange))
    return Guesses().of_exchange(exchange)


SMALL = where(ONE, of=OTHERS)


@pytest.mark.parametrize(
    ("node", "guess"),
    [
        (ROWS, Guess(16 * WIDE, 1, WIDE)),
        (where(ONE, TWO), Guess(16 * WIDE, FILTERED**2, WIDE)),
        (Project(where(ONE), (column(0, "BIGINT"),), ("k",)), Guess(8 * WIDE, FILTERED, WIDE)),
        (Distinct(where(ONE)), Guess(GROUPED * 16 * WIDE, FILTERED)),
        (Aggregate(where(ONE), (column(0, "BIGINT"),), ()), Guess(GROUPED * 16 * WIDE, FILTERED)),
        (Limit(where(ONE), 5), Guess(16 * WIDE, FILTERED * LIMITED, WIDE)),
        (KeyFilter(where(TWO), where(ONE, of=KEYS), EQUAL), Guess(16 * WIDE, FILTERED**2, WIDE)),
        (join("inner", where(TWO), SMALL), Guess(16 * WIDE, FILTERED**2, WIDE)),
        (join("inner", SMALL, where(TWO)), Guess(16 * WIDE, FILTERED**2, WIDE)),
        (join("left", ROWS, SMALL), Guess(16 * WIDE, 1, WIDE)),
        (join("left", SMALL, ROWS), Guess(16 * NARROW, FILTERED, NARROW)),
        (join("right", SMALL, ROWS), Guess(16 * WIDE, 1, WIDE)),
        (join("anti", ROWS, SMALL), Guess(16 * WIDE, 1, WIDE)),
        (join("semi", ROWS, SMALL), Guess(16 * WIDE, FILTERED, WIDE)),
        (join("right_semi", where(TWO), SMALL), Guess(16 * NARROW, FILTERED**2, NARROW)),
        (join("full", where(TWO), SMALL), Guess(16 * (WIDE + NARROW))),
        (Sort(where(ONE), ()), Guess(16 * WIDE, FILTERED)),
    ],
)
def test_what_is_guessed_of_a_plan(node: Node, guess: Guess) -> None:
    found = guessed(SqlSegment(node))
    assert [found.read_bytes, found.kept] == pytest.approx([guess.read_bytes, guess.kept])
    assert found.rows == guess.rows


def test_of_the_users_text_nothing_is_known_but_its_size() -> None:
    text = TextSegment("FROM t", (("t", PREVIOUS, COLUMNS),), COLUMNS)
    assert guessed(SqlSegment(where(ONE)), text) == Guess(7.0)
    assert guessed(SqlSegment(ROWS), text, SqlSegment(where(ONE, of=Input(PREVIOUS, COLUMNS)))) == Guess(7.0, FILTERED)


def test_what_was_made_has_its_size_and_is_all_there_is() -> None:
    exchange = Exchange(0, COLUMNS, 1, size_bytes=5, made=(output(5),))
    assert Guesses().of_exchange(exchange) == Guess(5)


def test_rows_of_several_stages_are_added_up() -> None:
    exchange = Exchange(0, COLUMNS, 1)
    for tree in (where(ONE), where(TWO, TWO), ROWS):
        pipe = Pipe((SqlSegment(tree),), {ROWS.id: table_of(NARROW)}, None, 0)
        exchange.producers.append(Stage(0, pipe, Whole(), exchange))
    assert Guesses().of_exchange(exchange) == Guess(3 * 16 * NARROW, 1, 3 * NARROW)
    del exchange.producers[2]
    assert Guesses().of_exchange(exchange) == Guess(2 * 16 * NARROW, FILTERED, 2 * NARROW)
    exchange.producers[0].pipe = exchange.producers[0].pipe.then(Distinct(ROWS))
    assert Guesses().of_exchange(exchange).rows is None


@pytest.mark.parametrize(
    ("skipped", "kept"), [(frozenset[int](), 0.25), (frozenset({1}), 0.15)], ids=["files", "and row groups"]
)
def test_what_was_left_out_of_files_counts_as_filtered(skipped: frozenset[int], kept: float) -> None:
    """800 bytes with 80 rows in 8 files; two of them are read, or one of them and a fifth of the other."""
    files = (File("/a", 100, "", (2, 8), skipped), File("/b", 100, "", (10,)))
    scan = ResolvedScan(FileScan("read_csv", ("/a", "/b")), COLUMNS, files, all_files=8, all_bytes=800)
    exchange = Exchange(0, COLUMNS, 1)
    pipe = Pipe((SqlSegment(where(ONE)),), {ROWS.id: FileFeed(scan, ("k", "v"))}, ROWS.id, 0)
    exchange.producers.append(Stage(0, pipe, Whole(), exchange))
    guess = Guesses().of_exchange(exchange)
    assert [guess.read_bytes, guess.kept] == pytest.approx([800, kept * FILTERED])
    assert guess.rows == 80
