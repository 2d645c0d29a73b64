"""Partitions of a pipe's rows: which rows are together, and pipes whose tasks are partitions.

A pipe over files that are partitioned by our own hash (`partitioned.py`) is cut by their partitions only where that
saves an exchange; else by bytes, as any other.

Does not know: how SQL becomes pipes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import duckdb

from ..errors import InvalidArgument
from ..partitioned import PartitionKeys, may_last
from .frames import Repartition, input_name
from .nodes import Aggregate, Column, Condition, Expr, Join, Limit, Node, Project, Window
from .pipes import PREVIOUS, ExchangeFeed, Feed, FileFeed, Pipe, TextSegment

# Of two columns that a join has made equal DuckDB 2.0 reads the left one, and 1.4 the one that was named.
_READS_THE_LEFT = not duckdb.__version__.startswith("1.")


def kept_whole(pipe: Pipe) -> Pipe:
    """The pipe, where equal keys have to stay in one task: none of its partitions may be cut, other than in `Pieces`,
    whose rows meet again below what is to come."""
    if pipe.pieces is not None:
        return pipe
    for feed in pipe.feeds.values():
        if isinstance(feed, ExchangeFeed) and feed.by == "partition":
            feed.exchange.splittable = False
    driving = None if pipe.drive is None else pipe.feeds[pipe.drive]
    if pipe.drive is None or not isinstance(driving, FileFeed) or not pipe.hashed:
        return pipe
    return replace(pipe, feeds={**pipe.feeds, pipe.drive: replace(driving, by_partition=True)})


def are_aligned(node: Join, left: Pipe, right: Pipe) -> bool:
    """Whether rows of both sides that match are in the same partition of files: they are partitioned alike, by what
    the join compares."""
    keys, others = file_keys(left), file_keys(right)
    if node.kind == "mark" or keys is None or others is None:
        return False
    alike = (keys.types, keys.count, keys.hash_version) == (others.types, others.count, others.hash_version)
    compared = {(c.left.position, c.right.position) for c in node.conditions if is_key(c)}
    return alike and compared.issuperset(zip(left.hashed, right.hashed, strict=True))


def file_keys(pipe: Pipe) -> PartitionKeys | None:
    """By what a pipe's rows, which come from files, are partitioned; None if that is not known."""
    if pipe.drive is None or not pipe.hashed:
        return None
    feed = pipe.feeds[pipe.drive]
    return feed.scan.partitioned if isinstance(feed, FileFeed) else None


def file_positions(feed: Feed) -> tuple[int, ...]:
    """Where the keys by which files are partitioned stand in what is read of them; () if one is not read, or none is
    known."""
    if not isinstance(feed, FileFeed) or feed.scan.partitioned is None:
        return ()
    keys = feed.scan.partitioned.columns
    return tuple(feed.names.index(key) for key in keys) if set(keys) <= set(feed.names) else ()


def lasting_keys(frame: Repartition, columns: Sequence[Column]) -> PartitionKeys | None:
    """What may be told of a frame's partitions to those who read its files: by its columns, if it is by columns whose
    values are the same for all readers."""
    found = {column.name.lower(): column for column in columns}
    keys = [found[key.lower()] for key in frame.keys if key.lower() in found]
    types = tuple(key.type for key in keys)
    if frame.by != "hash" or len(keys) != len(frame.keys) or len(found) != len(columns) or not may_last(types):
        return None
    return PartitionKeys(tuple(key.name for key in keys), types, frame.partitions)


def is_key(condition: Condition) -> bool:
    """Whether rows that match are together if they are partitioned by the condition's sides."""
    return condition.is_equality and not condition.left.volatile and not condition.right.volatile


def covers(groups: Sequence[Expr], columns: Sequence[int]) -> bool:
    """Whether equal groups have equal values in `columns`, of which there are some."""
    positions = {group.position for group in groups}
    return bool(columns) and all(position in positions for position in columns)


def grouped_by(node: Aggregate, columns: Sequence[int]) -> tuple[int, ...]:
    """Where `columns` of an aggregate's child stand in its output."""
    positions = {group.position: i for i, group in enumerate(node.groups)}
    return tuple(positions[c] for c in columns) if all(c in positions for c in columns) else ()


def moved(columns: Sequence[int], node: Project) -> tuple[int, ...]:
    """Where `columns` stand after a projection; () if one is gone."""
    positions = {expr.position: i for i, expr in reversed(list(enumerate(node.exprs)))}
    return tuple(positions[c] for c in columns) if all(c in positions for c in columns) else ()


def seen_whole(pipe: Pipe) -> Pipe:
    """A pipe that reads one exchange or table, as one that every task reads whole."""
    ((feed, source),) = pipe.feeds.items()
    if isinstance(source, ExchangeFeed):
        return replace(pipe, feeds={feed: replace(source, by="all")}, drive=None)
    return pipe


def partitions_of(pipes: Sequence[Pipe]) -> int | None:
    """In how many partitions the rows of pipes are, if the plan says so, whatever the sizes of what they read."""
    return pipes[0].partitions if len(pipes) == 1 else None


def of_join(node: Join, left: int | None, right: int | None) -> int | None:
    """In how many partitions a join's rows are, by those of its sides: as many as one side's, if the other is one
    partition, which all of them see whole. Of two that have several, or of one that has none that are known, nobody can
    say whose tasks there will be, for that is a matter of sizes."""
    if right == 1 and (left == 1 or node.may_see_right_whole):
        return left
    return right if left == 1 and node.may_see_left_whole else None


def of_right(node: Join, columns: Sequence[int]) -> tuple[int, ...]:
    """Where `columns` of a join's right side stand in its output, for those who read them there."""
    if node.kind in ("right_semi", "right_anti"):
        return tuple(columns)
    read: dict[int | None, int] = {}
    if node.kind == "inner" and _READS_THE_LEFT:
        equal = [c for c in node.conditions if is_key(c) and c.comparison == "="]
        read = {c.right.position: p for c in equal if (p := c.left.position) is not None}
    return tuple(read.get(c, len(node.left.columns) + c) for c in columns)


def gathers(node: Node) -> bool:
    """Whether an operator has all rows in one task, however many there are."""
    if isinstance(node, Aggregate):
        return not node.groups or not node.is_plain
    return isinstance(node, Limit) or (isinstance(node, Window) and not common_keys(node))


def common_keys(node: Window) -> list[Expr]:
    """What all calls of a window partition by."""
    return [key for key in node.calls[0].partition_by if all(key in call.partition_by for call in node.calls)]


def met(counts: Mapping[str, int | None]) -> int | None:
    """How many partitions frames have together of which each, by its name in the text, has `counts`. Raises
    `InvalidArgument` unless all but those of one have as many: nobody could say which of their partitions meet."""
    parted = {name: count for name, count in counts.items() if count != 1}
    unknown = next((name for name, count in parted.items() if count is None), None)
    if unknown is not None and len(parted) > 1:
        position = list(counts).index(unknown)
        told = f"{{{position}}}" if unknown == input_name(position) else unknown
        raise InvalidArgument(
            f"partial_sql() takes several frames if their partitions are known, and those of {told} are not:"
            " repartition() it as the others are, or into 1, which every partition of the others sees whole"
        )
    several = sorted({count for count in parted.values() if count is not None})
    if len(several) > 1:
        told = " and ".join(map(str, several))
        raise InvalidArgument(
            f"partial_sql() takes frames of as many partitions, or of one, not of {told}: repartition() them alike"
        )
    return next(iter(parted.values()), 1)


def value(key: Expr) -> Expr:
    """A partition as the user gives it; one that is not a number is none."""
    pieces = ("CAST(coalesce(", *key.pieces, ", error('a row has no partition: the key is NULL')) AS UINTEGER)")
    return Expr(pieces, "UINTEGER")


def of_files(pipes: Sequence[Pipe], count: int) -> Pipe | None:
    """The pipe with its files in `count` shares, if it reads files and nothing else. Not if what it does with them may
    show the shares that were asked for before."""
    if len(pipes) != 1 or len(pipes[0].feeds) != 1:
        return None
    ((feed, source),) = pipes[0].feeds.items()
    if not isinstance(source, FileFeed) or source.by_partition:
        return None
    if source.shares is not None and len(pipes[0].segments) > 1:
        return None
    return replace(pipes[0], feeds={feed: replace(source, shares=count)}, hashed=(), partitions=count)


def shuffled(pipe: Pipe, seed: int) -> Pipe:
    """Each partition's rows in an order that the seed decides."""
    columns = tuple(Column(f"c{i}", c.type) for i, c in enumerate(pipe.columns))
    listed = ", ".join(f"c{i}" for i in range(len(columns)))
    numbered = f"SELECT {listed}, row_number() OVER () AS emberflow_row FROM emberflow_rows"
    text = f"SELECT {listed} FROM ({numbered}) ORDER BY hash(emberflow_row, {seed}), emberflow_row"
    return pipe.after(TextSegment(text, (("emberflow_rows", PREVIOUS, columns),), columns, reads=()))
