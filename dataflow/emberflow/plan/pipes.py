"""What a plan is cut into: pipes of work that need no other task, exchanges between them, and stages.

A pipe is run by many tasks, each over its own share of the pipe's *driving* feed and over all of the others. A stage is
a pipe and where its rows go. Everything here is a value, made before anything runs; what depends on sizes only known
later (how many tasks, which partitions together) is the job's to decide.

Does not know: how to run, where files are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import pyarrow as pa

from ..functions.steps import PythonStep
from ..job.steps import Output
from ..partitioned import PartitionKeys
from .filescans import ResolvedScan
from .nodes import Column, Expr, Input, Node, SortKey, walk

# Types of which no value takes more than 16 bytes.
_NARROW = re.compile(
    r"BOOLEAN|U?(TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT)|FLOAT|DOUBLE|DECIMAL\(\d+,\d+\)|DATE|UUID|INTERVAL"
    r"|TIME(STAMP(_S|_MS|_NS)?)?( WITH TIME ZONE)?"
)


@dataclass(frozen=True, slots=True)
class FileFeed:
    """Columns of files; driving, each task reads a share of them."""

    scan: ResolvedScan
    names: tuple[str, ...]
    shares: int | None = None
    """How many shares there must be, by whole files; None: as many as the bytes ask for."""
    by_partition: bool = False
    """A share is a partition of the files, which are partitioned."""

    @property
    def read_bytes(self) -> float:
        """What is read of them at most: of Parquet's columns a part if those that are read are narrow ones. Any other,
        like texts, may be nearly all of a file."""
        types = {column.name: column.type for column in self.scan.columns}
        are_narrow = all(_NARROW.fullmatch(types[name]) for name in self.names)
        is_all = self.scan.scan.function != "read_parquet" or not are_narrow
        return self.scan.size_bytes * (1 if is_all else len(self.names) / max(1, len(self.scan.columns)))


@dataclass(frozen=True, slots=True, eq=False)
class TableFeed:
    """Columns of a table that was handed in; never cut."""

    table: pa.Table
    columns: tuple[Column, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExchangeFeed:
    """Rows of an exchange: a partition for each task, the output of some producers for each, or all for all."""

    exchange: Exchange
    by: Literal["partition", "piece", "all"]


Feed: TypeAlias = FileFeed | TableFeed | ExchangeFeed


@dataclass(frozen=True, slots=True)
class SqlSegment:
    """A plan over the pipe's feeds, or over the segment before it (`Input(PREVIOUS)`)."""

    tree: Node
    names: tuple[str, ...] | None = None
    """Of its columns, for a function that comes next and looks at them; else c0, c1, ..."""


@dataclass(frozen=True, slots=True)
class TextSegment:
    """The user's own SELECT over whole inputs, each under its name: `partial_sql`, or a query we do not understand."""

    text: str
    inputs: tuple[tuple[str, int, tuple[Column, ...]], ...]
    """(name in the text, feed or PREVIOUS, its columns)"""
    columns: tuple[Column, ...]
    reads: tuple[ResolvedScan, ...] | None = None
    """The files that the text itself reads; None if nobody can tell, or if it may give other rows next time."""


@dataclass(frozen=True, slots=True, eq=False)
class PythonSegment:
    """The user's function over the rows of the segment before it. Without a schema its columns are known only when it
    has run: nothing but another function, or the result, may follow."""

    step: PythonStep
    columns: tuple[Column, ...] | None


Segment: TypeAlias = SqlSegment | TextSegment | PythonSegment

PREVIOUS = -1
"""The id of the input that is the segment before."""


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """A partition's rows aggregated piece by piece, and what that gives put together: `pieces.py`."""

    whole: Node
    """The node of the pipe's plan that needs all rows with equal keys."""
    piece: Node
    """What is computed over some of its rows."""
    keys: tuple[Expr, ...]
    """Over what `piece` gives: equal ones have to meet again."""
    merged: Node
    """What gives the rows of `whole`, over those of all pieces, which it reads as the input `feed`."""
    feed: int


@dataclass(frozen=True, slots=True, eq=False)
class Pipe:
    """Segments run one after the other in each task; the first reads the feeds."""

    segments: tuple[Segment, ...]
    feeds: dict[int, Feed]
    drive: int | None
    """Which feed's shares make the tasks; None: there is one task."""
    size_bytes: float
    """A guess at what it puts out, as Parquet would hold it."""
    hashed: tuple[int, ...] = ()
    """Output columns whose equal values are all in one task; () if none are known."""
    ordered: bool = False
    """The tasks' outputs one after the other are in the order that was asked for."""
    partitions: int | None = None
    """In how many partitions its rows are, one for each task, whatever the sizes of what is read: because the user
    asked for them, or 1 where all rows always are in one task. None: tasks are as sizes want them, and nobody may tell
    them apart."""
    pieces: Pieces | None = None
    """How a partition that is much larger than the others is aggregated; None: by one task, like all of them."""

    @property
    def known_columns(self) -> tuple[Column, ...] | None:
        """Its columns, or None if only a run can tell."""
        last = self.segments[-1]
        return last.tree.columns if isinstance(last, SqlSegment) else last.columns

    @property
    def columns(self) -> tuple[Column, ...]:
        columns = self.known_columns
        assert columns is not None
        return columns

    @property
    def tree(self) -> Node:
        """What a further operator reads: the last segment's plan, or an input that stands for its rows."""
        last = self.segments[-1]
        return last.tree if isinstance(last, SqlSegment) else Input(PREVIOUS, self.columns)

    def then(self, tree: Node, **changes: object) -> Pipe:
        """The pipe with `tree`, made over `self.tree`, as its last step."""
        last = self.segments[-1]
        before = self.segments[:-1] if isinstance(last, SqlSegment) else self.segments
        return replace(self, segments=(*before, SqlSegment(tree)), **changes)  # type: ignore[arg-type]

    def after(self, segment: Segment, **changes: object) -> Pipe:
        """The pipe with one more segment."""
        return replace(self, segments=(*self.segments, segment), **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Whole:
    """All rows of a task in one partition."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Some rows of a task, the same ones each time, in one partition."""


@dataclass(frozen=True, slots=True)
class ByExpression:
    """The partition is an integer expression's value, of 0 to partitions - 1."""

    expr: Expr


@dataclass(frozen=True, slots=True)
class ByHash:
    """The partition is that of our own hash of some columns, which outlives the job."""

    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ByRange:
    """Partitions that follow each other in the order of `keys`, cut at quantiles of what `sample` holds."""

    keys: tuple[SortKey, ...]
    sample: Exchange


@dataclass(frozen=True, slots=True)
class Spread:
    """Rows dealt out in turn (`seed` None) or at random."""

    seed: int | None = None


Partitioning: TypeAlias = Whole | Sample | ByExpression | ByHash | ByRange | Spread


@dataclass(eq=False, slots=True)
class Exchange:
    """Rows between stages: every producer's tasks write all its partitions."""

    id: int
    columns: tuple[Column, ...] | None
    partitions: int
    fixed: bool = False
    """Each partition is a task's of its own, as the user asked; else small neighbours may share one."""
    producers: list[Stage] = field(default_factory=list)
    size_bytes: float = 0
    splittable: bool = False
    """A partition may be cut into pieces by producer if it is much larger than the others: where the rows of a piece
    stay (one side of a join), or by the `Pieces` of the pipe that reads it."""
    blank: bool = False
    """Its rows have no columns; in the files they have one of no meaning."""
    of_pieces: bool = False
    """What `Pieces` give: as few tasks as its bytes ask for read it, whatever is asked of other exchanges."""
    made: tuple[Output, ...] | None = None
    """What an earlier job has put there; such an exchange has no producers."""


@dataclass(eq=False, slots=True)
class Stage:
    """A pipe and where its rows go."""

    id: int
    pipe: Pipe
    partitioning: Partitioning
    exchange: Exchange
    label: str = ""

    def inputs(self) -> Iterator[Exchange]:
        """The exchanges it reads, each as often as it does."""
        for feed in self.pipe.feeds.values():
            if isinstance(feed, ExchangeFeed):
                yield feed.exchange
        if isinstance(self.partitioning, ByRange):
            yield self.partitioning.sample

    def runs_python(self, functions: Collection[str]) -> bool:
        """Whether its tasks run the user's Python: as a step, or as one of the `functions` that SQL may call."""
        if any(isinstance(segment, PythonSegment) for segment in self.pipe.segments):
            return True
        if not functions:
            return False
        said = [segment.text if isinstance(segment, TextSegment) else repr(segment) for segment in self.pipe.segments]
        if isinstance(self.partitioning, ByExpression):
            said.append(repr(self.partitioning.expr))
        names = "|".join(map(re.escape, functions))
        # A column of that name costs some tasks.
        return re.search(rf"(?<!\w)({names})(?!\w)", " ".join(said), re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Stages, each after those it reads from. The last exchange holds the result, in the order of its stages' tasks."""

    stages: tuple[Stage, ...]
    result: Exchange
    columns: tuple[Column, ...] | None
    """As the user named them; None if a function of theirs decides."""
    ordered: bool
    notes: tuple[str, ...] = ()
    """What was not understood, and why, and what costs more than it seems: for explain()."""
    partitions: int | None = None
    """In how many partitions the result's rows are, if the user asked for them."""
    partitioned: PartitionKeys | None = None
    """By what the result's tasks are partitions, where that may be told to later readers of its files."""


def inputs_of(tree: Node) -> set[int]:
    """The ids of the inputs a plan reads."""
    return {node.id for node in walk(tree) if isinstance(node, Input)}


def hashed(keys: Sequence[Expr], partitions: int) -> Expr:
    """The partition of a row by its keys' hash."""
    pieces: list[str | int] = []
    for key in keys:
        pieces += [*([", "] if pieces else []), *key.pieces]
    if not pieces:
        return Expr(("CAST(0 AS UINTEGER)",), "UINTEGER")
    return Expr(("CAST(hash(", *pieces, f") % {partitions} AS UINTEGER)"), "UINTEGER")
