"""A stage and a task's shares, as what the task runs: SQL text over named inputs, and functions.

Does not know: attempts, executors, or whether anything ran before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import pyarrow as pa

from ..plan.filescans import Share
from ..plan.grade import is_volatile
from ..plan.nodes import Column, Expr, Input, Node, Project, Scan, column
from ..plan.pipes import (
    PREVIOUS,
    ByExpression,
    ByHash,
    ByRange,
    ExchangeFeed,
    Feed,
    FileFeed,
    PythonSegment,
    Sample,
    Spread,
    SqlSegment,
    Stage,
    TableFeed,
    TextSegment,
)
from ..plan.render import select
from ..plan.stages import sort_key
from ..query import Query
from ..text import written
from .keys import with_cheap_keys
from .shares import Exchanged, Spec
from .steps import Output
from .task import ExchangeRows, ExchangeSink, Piece, Rows, Run, RunSql, TableRows

SortKeyValue: TypeAlias = bytes | int
"""What create_sort_key gives: bytes, or a number where eight of them are enough."""

_PARTITION = "partition"
_SAMPLE_ROWS = 2_000
_PREVIOUS_NAME = "emberflow_previous"


@dataclass(frozen=True, slots=True)
class Written:
    """The stage's rows go to a dataset's files, under the user's names."""

    format: str
    columns: tuple[Column, ...] | None


class Rendering:
    """What the tasks of one stage run. `outputs` are those of the exchanges it reads, by id."""

    def __init__(
        self,
        stage: Stage,
        outputs: Mapping[int, Sequence[Output]],
        *,
        boundaries: Sequence[SortKeyValue] = (),
        compression: str | None = None,
        written: Written | None = None,
    ) -> None:
        self.stage = stage
        self.outputs = outputs
        self.boundaries = boundaries
        self.compression = compression
        self.written = written
        self._tables: dict[int, TableRows] = {}

    def sink(self, index: int) -> ExchangeSink:
        """How the task's rows are partitioned."""
        how = self.stage.partitioning
        count = self.stage.exchange.partitions
        if isinstance(how, ByExpression | ByRange):
            return ExchangeSink(by="column", partitions=count, compression=self.compression)
        if isinstance(how, ByHash):
            return ExchangeSink(by="hash", partitions=count, keys=how.positions, compression=self.compression)
        if isinstance(how, Spread):
            by = "spread" if how.seed is None else "random"
            return ExchangeSink(by=by, partitions=count, start=index, seed=how.seed or 0, compression=self.compression)
        return ExchangeSink(by="whole", partitions=1, compression=self.compression)

    def runs(self, spec: Spec) -> tuple[Run, ...]:
        """The task's segments, in order."""
        pipe = self.stage.pipe
        segments = list(pipe.segments)
        if isinstance(self.stage.partitioning, ByExpression | ByRange):
            with_partition = self._with_partition(with_cheap_keys(pipe, spec, self.outputs))
            if isinstance(segments[-1], SqlSegment):
                segments[-1] = SqlSegment(with_partition)
            else:
                segments.append(SqlSegment(with_partition))
        elif isinstance(segments[-1], SqlSegment):
            segments[-1] = replace(segments[-1], tree=with_cheap_keys(pipe, spec, self.outputs))
        runs: list[Run] = []
        for position, segment in enumerate(segments):
            is_last = position == len(segments) - 1
            if isinstance(segment, PythonSegment):
                runs.append(segment.step)
            elif isinstance(segment, TextSegment):
                runs.append(self._text(segment, spec))
            else:
                runs.append(self._sql(segment.tree, spec, names=self._names() if is_last else segment.names))
        if self.written is not None and self.written.columns is not None and isinstance(runs[-1], RunSql):
            schema = {c.name: c.type for c in self.written.columns}
            runs[-1] = replace(runs[-1], text=written(Query(text=runs[-1].text), schema, self.written.format).text)
        if isinstance(self.stage.partitioning, Sample):
            last = runs[-1]
            assert isinstance(last, RunSql)
            text = f"SELECT * FROM ({last.text}) USING SAMPLE reservoir({_SAMPLE_ROWS} ROWS) REPEATABLE (42)"
            runs[-1] = replace(last, text=text)
        return tuple(runs)

    def _with_partition(self, tree: Node) -> Node:
        """The rows and, last, each one's partition."""
        names = (*(c.name for c in tree.columns), _PARTITION)
        own = tuple(column(i, c.type) for i, c in enumerate(tree.columns))
        how = self.stage.partitioning
        if isinstance(how, ByExpression):
            return Project(tree, (*own, how.expr), names)
        assert isinstance(how, ByRange)
        keyed = Project(tree, (*own, sort_key(how.keys)), names)
        return Project(keyed, (*own, _range(len(own), self.boundaries)), names)

    def _names(self) -> list[str] | None:
        if self.written is None or self.written.columns is None:
            return None
        return [column.name for column in self.written.columns]

    def _sql(self, tree: Node, spec: Spec, *, names: Sequence[str] | None = None) -> RunSql:
        inputs: dict[str, Rows] = {}
        previous: str | None = None

        def source(leaf: Scan | Input) -> str:
            nonlocal previous
            assert isinstance(leaf, Input)
            if leaf.id == PREVIOUS:
                previous = _PREVIOUS_NAME
                return previous
            feed = self.stage.pipe.feeds[leaf.id]
            if isinstance(feed, FileFeed):
                return self._scan(leaf.id, feed, leaf.columns, spec)
            name = f"feed_{leaf.id}"
            inputs[name] = self._rows(leaf.id, feed, spec)
            return name

        text = select(tree, source=source, names=names)
        return RunSql(text=text, inputs=inputs, previous=previous, seeded=is_volatile(tree))

    def _scan(self, feed_id: int, feed: FileFeed, columns: Sequence[Column], spec: Spec) -> str:
        share = spec.files.get(feed_id)
        if share is None:
            share = Share(tuple(file.url for file in feed.scan.files), feed.scan.size_bytes)
        if share.files:
            return feed.scan.sql(share, feed.names)
        nothing = ", ".join(f"CAST(NULL AS {c.type}) AS c{i}" for i, c in enumerate(columns)) or "1 AS c0"
        return f"(SELECT {nothing} WHERE false)"

    def _text(self, segment: TextSegment, spec: Spec) -> RunSql:
        inputs: dict[str, Rows] = {}
        names: dict[str, tuple[str, ...]] = {}
        previous: str | None = None
        for name, feed_id, columns in segment.inputs:
            names[name] = tuple(c.name for c in columns)
            if feed_id == PREVIOUS:
                previous = name
            else:
                inputs[name] = self._rows(feed_id, self.stage.pipe.feeds[feed_id], spec)
        return RunSql(text=segment.text, inputs=inputs, previous=previous, names=names)

    def _rows(self, feed_id: int, feed: Feed, spec: Spec) -> Rows:
        if isinstance(feed, TableFeed):
            if feed_id not in self._tables:
                self._tables[feed_id] = _table_rows(feed)
            return self._tables[feed_id]
        assert isinstance(feed, ExchangeFeed)
        exchange = feed.exchange
        assert exchange.columns is not None
        whole = Exchanged(tuple(range(exchange.partitions)))
        chosen = spec.exchanges.get(feed_id, whole)
        outputs = self.outputs[exchange.id]
        read = outputs if chosen.outputs is None else [outputs[p] for p in chosen.outputs]
        pieces = (Piece(output.url, output.exchange().only(chosen.partitions)) for output in read)
        return ExchangeRows(
            # Of no rows, a function without a schema has not said what its columns are.
            pieces=tuple(piece for piece in pieces if piece.index.num_rows),
            attempts=tuple(output.attempt for output in read),
            partitions=chosen.partitions,
            columns=exchange.columns,
        )


def _table_rows(feed: TableFeed) -> TableRows:
    chosen = feed.table.select(list(feed.positions))
    columns = tuple(feed.columns)
    if not columns:
        # Rows have to have something to travel in.
        chosen = pa.table({"blank": pa.nulls(feed.table.num_rows, pa.bool_())})
        columns = (Column("blank", "BOOLEAN"),)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, chosen.schema) as stream:
        stream.write_table(chosen)
    return TableRows(data=sink.getvalue().to_pybytes(), columns=columns)


def _range(key: int, boundaries: Sequence[SortKeyValue]) -> Expr:
    """How many of the boundaries are not above the key: a search by halves, written out."""

    def search(low: int, high: int) -> list[str | int]:
        if low == high:
            return [str(low)]
        middle = (low + high) // 2
        bound = _literal(boundaries[middle])
        return [
            "CASE WHEN ",
            key,
            f" < {bound} THEN ",
            *search(low, middle),
            " ELSE ",
            *search(middle + 1, high),
            " END",
        ]

    return Expr(("CAST(", *search(0, len(boundaries)), " AS UINTEGER)"), "UINTEGER")


def _literal(key: SortKeyValue) -> str:
    if isinstance(key, int):
        return f"CAST('{key}' AS BIGINT)"
    return "'" + "".join(f"\\x{byte:02X}" for byte in key) + "'::BLOB"


def boundaries_of(keys: Iterable[SortKeyValue], partitions: int) -> tuple[SortKeyValue, ...]:
    """Cuts between `partitions` ranges of about as many of `keys` each; fewer if many are equal."""
    ordered = sorted(keys)
    if not ordered:
        return ()
    cuts = [ordered[len(ordered) * i // partitions] for i in range(1, partitions)]
    return tuple(key for key, _ in itertools.groupby(cuts))


def text_of(runs: Sequence[Run]) -> Any:
    """What a task runs, for people: its SQL, or the name of its function."""
    return "\n".join(run.text if isinstance(run, RunSql) else str(run) for run in runs)
