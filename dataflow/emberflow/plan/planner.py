"""From a frame to a program: SQL is bound and cut into stages, the other operators are put around it.

A query that cannot be planned is not an error: it runs as one task, as DuckDB would run it, and the program's notes say
why. Columns that only a run can tell (of a Python function without a schema) are found by running: `compute`.

Does not know: workers, tasks, where exchanges lie.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import duckdb
import pyarrow as pa

from ..functions.udf import Udf
from ..partitioned import PartitionKeys
from ..query import Query, inlined, of_table
from .binder import NotPlannable, bind
from .doubt import doubt
from .filescans import ResolvedScan
from .frames import Apply, Computed, Frame, PartialSql, Repartition, Shuffle
from .keys import with_key_filters
from .nodes import Column, Expr, Input, Node, Project, Scan, column, walk
from .partitions import file_positions, lasting_keys, met, of_files, partitions_of, seen_whole, shuffled, value
from .pipes import (
    PREVIOUS,
    ByExpression,
    ByHash,
    Exchange,
    ExchangeFeed,
    Feed,
    FileFeed,
    Pipe,
    Program,
    PythonSegment,
    Spread,
    SqlSegment,
    TableFeed,
    TextSegment,
    Whole,
    hashed,
)
from .prune import pruned
from .scantext import FileScan, find
from .skipping import with_conditions
from .stages import Builder, Pipes, StageConfig, feed_of

# What a row takes, where nothing says how many there are.
_ROW_BYTES = 64
# Of a random shuffle, where nothing says how many.
_SHUFFLED_PARTITIONS = 8


class Catalog(Protocol):
    """What a planner may ask of the world."""

    def resolve(self, scan: FileScan) -> ResolvedScan:
        """The scan's files and columns."""

    def narrowed(self, scan: ResolvedScan, exprs: tuple[Expr, ...]) -> ResolvedScan:
        """The scan of the files that may hold rows which meet the conditions, which are over the scan's columns."""

    def describe(self, text: str, shadows: Mapping[str, Sequence[Column]]) -> tuple[Column, ...]:
        """The columns of a query over tables with these columns."""

    def columns_of(self, table: pa.Table) -> tuple[Column, ...]:
        """A table's columns, as DuckDB would have them."""

    def computed(self, frame: Frame) -> Computed | None:
        """The frame's rows, if an earlier job has made them."""

    def compute(self, frame: Frame) -> Computed:
        """Runs a job that makes the frame's rows."""


class Planner:
    """Makes one program."""

    def __init__(
        self, config: StageConfig, catalog: Catalog, *, now: datetime.datetime, udfs: Sequence[Udf] = ()
    ) -> None:
        self.builder = Builder(config)
        self.catalog = catalog
        self.now = now
        self.udfs = udfs
        self._done: dict[int, tuple[Frame, Pipes, tuple[Column, ...] | None]] = {}

    def program(self, frame: Frame, *, to_files: bool = False, one: bool = False) -> Program:
        """The program that makes the frame's rows; `to_files`: for a dataset, of `one` file or many."""
        keys = self._lasting(frame) if to_files and not one else None
        pipes, columns = self.pipes(frame) if keys is None else self._by_lasting(frame, keys)
        ordered = len(pipes) == 1 and pipes[0].ordered
        partitions = partitions_of(pipes)
        if one:
            pipes = [replace(self.builder.together(pipes, label="one file"), ordered=ordered)]
        result = None if to_files else _exchange_of(pipes)
        if result is None or not result.producers:
            result = self.builder.exchange(pipes, Whole(), label="result")
        stages = with_key_filters(self.builder.stages, self.builder.met, self.builder.new_feed)
        return Program(tuple(stages), result, columns, ordered, tuple(self.builder.notes), partitions, keys)

    def pipes(self, frame: Frame) -> tuple[Pipes, tuple[Column, ...] | None]:
        """The pipes of a frame, and its columns as the user named them."""
        if id(frame) not in self._done:
            pipes, columns = self._pipes(self.catalog.computed(frame) or frame)
            self._done[id(frame)] = frame, pipes, columns
        _, pipes, columns = self._done[id(frame)]
        return pipes, columns

    def _pipes(self, frame: Frame) -> tuple[Pipes, tuple[Column, ...] | None]:
        if isinstance(frame, Query):
            return self._query(frame)
        if isinstance(frame, Repartition):
            return self._repartition(frame)
        if isinstance(frame, Shuffle):
            return self._shuffle(frame)
        if isinstance(frame, PartialSql):
            return self._partial_sql(frame)
        if isinstance(frame, Apply):
            pipes, _ = self.pipes(frame.child)
            named = [self._named(pipe, frame.child) for pipe in pipes]
            columns = self._columns_after(frame)
            return [pipe.after(PythonSegment(frame.step, columns), hashed=()) for pipe in named], columns
        exchange = self.builder.made(frame)
        an_output_each = exchange.partitions == 1 and frame.partitions in (None, len(frame.outputs))
        by = "piece" if an_output_each else "partition"
        return [self.builder.reading(exchange, by, partitions=frame.partitions)], frame.columns

    def _columns_after(self, frame: Apply) -> tuple[Column, ...] | None:
        if frame.step.kind == "filter":
            return self.pipes(frame.child)[1]
        schema = frame.step.schema
        if schema is None:
            return None
        assert isinstance(schema, pa.Schema)
        return self.catalog.columns_of(pa.Table.from_batches([], schema))

    def _named(self, pipe: Pipe, frame: Frame) -> Pipe:
        """The pipe with its last columns under the user's names, for a function that looks at them."""
        _, columns = self.pipes(frame)
        last = pipe.segments[-1]
        if columns is None or isinstance(last, PythonSegment):
            return pipe
        names = tuple(c.name for c in columns)
        if isinstance(last, TextSegment):
            if names == tuple(c.name for c in last.columns):
                return pipe
            exprs = tuple(column(i, c.type) for i, c in enumerate(pipe.columns))
            pipe = self.builder.row_by_row(Project(pipe.tree, exprs, names), pipe)
            last = pipe.segments[-1]
        assert isinstance(last, SqlSegment)
        named = SqlSegment(last.tree, names)
        return replace(pipe, segments=(*pipe.segments[:-1], named))

    def known(self, frame: Frame) -> tuple[Pipes, tuple[Column, ...]]:
        """As `pipes`, with columns that are known: by running the frame, if nothing else helps."""
        pipes, columns = self.pipes(frame)
        if columns is None:
            computed = self.catalog.compute(frame)
            pipes, columns = self._pipes(computed)
            assert columns is not None
            self._done[id(frame)] = frame, pipes, columns
        return pipes, columns

    # ---- SQL

    def _query(self, query: Query) -> tuple[Pipes, tuple[Column, ...]]:
        frames: dict[str, tuple[Pipes, tuple[Column, ...]]] = {}
        tables: dict[str, pa.Table] = {}
        for name, source in query.tables.items():
            if isinstance(source, pa.Table):
                tables[name] = source
            else:
                frames[name] = self.known(source)
        try:
            return self._planned(query, frames, tables)
        except NotPlannable as why:
            self.builder.notes.append(f"runs as one task: {why}")
            return self._as_one_task(query, frames, tables)

    def _planned(
        self,
        query: Query,
        frames: Mapping[str, tuple[Pipes, tuple[Column, ...]]],
        tables: Mapping[str, pa.Table],
    ) -> tuple[Pipes, tuple[Column, ...]]:
        text, scans = find(inlined(query))
        sources: dict[str, ResolvedScan | pa.Table] = {n: self.catalog.resolve(scan) for n, scan in scans.items()}
        sources.update(tables)
        shadows: dict[str, Sequence[Column]] = {name: columns for name, (_, columns) in frames.items()}
        rows = {name: _rows_of(pipes) for name, (pipes, _) in frames.items()}
        for name, source in sources.items():
            if isinstance(source, ResolvedScan):
                shadows[name] = source.columns
                rows[name] = source.rows or max(1, source.size_bytes // _ROW_BYTES)
            else:
                shadows[name] = self.catalog.columns_of(source)
                rows[name] = source.num_rows
        try:
            bound = bind(text, shadows, rows=rows, now=self.now, setup=self._set_up if self.udfs else None)
        except duckdb.Error as error:
            # It may have a meaning with the files themselves: of columns that only their readers have, of other names.
            raise NotPlannable(f"an expression over tables in place of files: {error}") from error
        scope: dict[object, Callable[[Node], Pipes]] = {}

        def scanned(node: Scan, conditions: tuple[Expr, ...]) -> Scan:
            """Each scan of files is of its own files: those that its conditions leave."""
            source = sources.get(node.table)
            if source is None:
                return node
            name = f"{node.table} {len(scope)}"
            if isinstance(source, ResolvedScan):
                over = tuple(condition.moved(node.positions.__getitem__) for condition in conditions)
                source = self.catalog.narrowed(source, over)
            scope[name] = self._scanning(source)
            return replace(node, table=name)

        plan = with_conditions(pruned(bound.plan), scanned)
        for name, (pipes, _) in frames.items():
            uses = sum(isinstance(node, Scan) and node.table == name for node in walk(plan))
            scope[name] = self._reading(pipes, uses)
        return self.builder.build(plan, scope), bound.columns

    def _set_up(self, connection: duckdb.DuckDBPyConnection) -> None:
        for udf in self.udfs:
            udf.register(connection)

    def _scanning(self, source: ResolvedScan | pa.Table) -> Callable[[Node], Pipes]:
        def pipes(node: Node) -> Pipes:
            assert isinstance(node, Scan)
            feed = self.builder.new_feed()
            segment = SqlSegment(Input(feed, node.columns))
            if isinstance(source, pa.Table):
                return [Pipe((segment,), {feed: feed_of(source, node)}, None, source.nbytes, partitions=1)]
            share = len(node.columns) / max(1, len(source.columns))
            files = feed_of(source, node)
            return [Pipe((segment,), {feed: files}, feed, source.size_bytes * share, hashed=file_positions(files))]

        return pipes

    def _reading(self, pipes: Pipes, uses: int) -> Callable[[Node], Pipes]:
        """What a scan of a frame stands for; a frame scanned more than once is made once, and kept."""
        kept: Exchange | None = None
        if uses > 1:
            kept = self.builder.exchange(pipes, Whole(), label="shared")

        def chosen(node: Node) -> Pipes:
            assert isinstance(node, Scan)
            below = pipes if kept is None else [self.builder.reading(kept, "piece")]
            exprs = tuple(column(p, c.type) for p, c in zip(node.positions, node.columns, strict=True))
            names = tuple(c.name for c in node.columns)
            return [self.builder.row_by_row(Project(pipe.tree, exprs, names), pipe) for pipe in below]

        return chosen

    def _as_one_task(
        self,
        query: Query,
        frames: Mapping[str, tuple[Pipes, tuple[Column, ...]]],
        tables: Mapping[str, pa.Table],
    ) -> tuple[Pipes, tuple[Column, ...]]:
        feeds: dict[int, Feed] = {}
        inputs: list[tuple[str, int, tuple[Column, ...]]] = []
        for name, (pipes, columns) in frames.items():
            exchange = self.builder.exchange(pipes, Whole(), label="gather")
            feed = self.builder.new_feed()
            feeds[feed] = ExchangeFeed(exchange, "all")
            inputs.append((name, feed, columns))
        for name, table in tables.items():
            columns = self.catalog.columns_of(table)
            feed = self.builder.new_feed()
            feeds[feed] = TableFeed(table, columns, tuple(range(len(columns))))
            inputs.append((name, feed, columns))
        text = inlined(query)
        columns = self.catalog.describe(text, {name: columns for name, _, columns in inputs})
        size = sum(feed.exchange.size_bytes for feed in feeds.values() if isinstance(feed, ExchangeFeed))
        size += sum(self.catalog.resolve(scan).size_bytes for scan in find(text)[1].values())
        reads = self._reads(text, [*frames, *tables])
        segment = TextSegment(text, tuple(inputs), columns, reads)
        return [Pipe((segment,), feeds, None, size or 1, ordered=True, partitions=1)], columns

    def _reads(self, text: str, names: Sequence[str]) -> tuple[ResolvedScan, ...] | None:
        """The files that a text reads, if with them and its inputs `names` it gives the same rows each time."""
        rest, scans = find(text)
        if doubt(rest, [*names, *scans]) is not None:
            return None
        return tuple(self.catalog.resolve(scan) for scan in scans.values())

    # ---- partitions

    def _repartition(self, frame: Repartition) -> tuple[Pipes, tuple[Column, ...]]:
        if frame.keys:
            return self._by_keys(frame)
        pipes, columns = self.known(frame.child)
        if frame.by == "files" and (pipe := of_files(pipes, frame.partitions)) is not None:
            return [pipe], columns
        label = f"repartition by {frame.by}"
        exchange = self.builder.exchange(pipes, Spread(), frame.partitions, label=label, fixed=True)
        return [self.builder.reading(exchange, "partition", partitions=frame.partitions)], columns

    def _shuffle(self, frame: Shuffle) -> tuple[Pipes, tuple[Column, ...]]:
        pipes, columns = self.known(frame.child)
        count = frame.partitions or partitions_of(pipes) or _SHUFFLED_PARTITIONS
        exchange = self.builder.exchange(pipes, Spread(frame.seed), count, label="repartition by random", fixed=True)
        return [shuffled(self.builder.reading(exchange, "partition", partitions=count), frame.seed)], columns

    def _by_keys(self, frame: Repartition) -> tuple[Pipes, tuple[Column, ...]]:
        """By columns; or by expressions, which travel behind the columns and end there."""
        pipes, columns = self.known(frame.child)
        names = [c.name.lower() for c in columns]
        if all(key.lower() in names for key in frame.keys):
            positions = [names.index(key.lower()) for key in frame.keys]
            exchange = self._parted(frame, pipes, [column(p, columns[p].type) for p in positions])
            pipe = self.builder.reading(exchange, "partition", hashed=tuple(positions), partitions=frame.partitions)
            return [pipe], columns
        listed = ", ".join(f"({key}) AS emberflow_key{i}" for i, key in enumerate(frame.keys))
        child = frame.child
        if not isinstance(child, Query) or self.catalog.computed(child) is not None:
            child = of_table(child)
        pipes, columns = self.known(child.wrapped(f"SELECT *, {listed} FROM"))
        width = len(columns) - len(frame.keys)
        keys = [column(width + i, columns[width + i].type) for i in range(len(frame.keys))]
        exchange = self._parted(frame, pipes, keys)
        pipe = self.builder.reading(exchange, "partition", partitions=frame.partitions)
        own = tuple(column(i, c.type) for i, c in enumerate(columns[:width]))
        return [pipe.then(Project(pipe.tree, own, tuple(c.name for c in columns[:width])))], columns[:width]

    def _lasting(self, frame: Frame) -> PartitionKeys | None:
        """By what the frame's rows are partitioned, if it may be told to those who read its files."""
        if not isinstance(frame, Repartition):
            return None
        computed = self.catalog.computed(frame)
        return lasting_keys(frame, computed.columns if computed else self.known(frame.child)[1])

    def _by_lasting(self, frame: Frame, keys: PartitionKeys) -> tuple[Pipes, tuple[Column, ...]]:
        """The rows in partitions by the hash that lasts; rows that were computed are taken as they are."""
        assert isinstance(frame, Repartition)
        pipes, columns = self.known(self.catalog.computed(frame) or frame.child)
        names = [column.name for column in columns]
        positions = tuple(names.index(name) for name in keys.columns)
        exchange = self.builder.exchange(pipes, ByHash(positions), keys.count, label="repartition by hash", fixed=True)
        return [self.builder.reading(exchange, "partition", hashed=positions)], columns

    def _parted(self, frame: Repartition, pipes: Pipes, keys: Sequence[Expr]) -> Exchange:
        how = ByExpression(hashed(keys, frame.partitions) if frame.by == "hash" else value(keys[0]))
        return self.builder.exchange(pipes, how, frame.partitions, label=f"repartition by {frame.by}", fixed=True)

    def _partial_sql(self, frame: PartialSql) -> tuple[Pipes, tuple[Column, ...]]:
        sides = {name: self.known(child) for name, child in frame.inputs.items()}
        columns = self.catalog.describe(frame.text, {name: columns for name, (_, columns) in sides.items()})
        reads = self._reads(frame.text, list(sides))
        if len(sides) == 1:
            ((name, (pipes, own)),) = sides.items()
            segment = TextSegment(frame.text, ((name, PREVIOUS, own),), columns, reads)
            return [pipe.after(segment, hashed=(), ordered=False) for pipe in pipes], columns
        partitions = met({name: partitions_of(pipes) for name, (pipes, _) in sides.items()})
        feeds: dict[int, Feed] = {}
        inputs = []
        drive = None
        for name, (pipes, own) in sides.items():
            pipe = self._aligned(pipes)
            ((feed, source),) = pipe.feeds.items()
            feeds[feed] = source
            drive = drive if drive is not None else pipe.drive
            inputs.append((name, feed, own))
        size = sum(pipe.size_bytes for pipes, _ in sides.values() for pipe in pipes)
        segment = TextSegment(frame.text, tuple(inputs), columns, reads)
        return [Pipe((segment,), feeds, drive, size, partitions=partitions)], columns

    def _aligned(self, pipes: Pipes) -> Pipe:
        """A pipe that is one feed and nothing else, whose shares are the partitions of `pipes`; a single one is for
        all."""
        if len(pipes) == 1 and _is_bare(pipes[0]):
            pipe = pipes[0]
        else:
            pipe = self.builder.reading(self.builder.exchange(pipes, Whole(), label="partition", fixed=True), "piece")
        return seen_whole(pipe) if partitions_of(pipes) == 1 else pipe


def _is_bare(pipe: Pipe) -> bool:
    """Whether it only reads one exchange or table."""
    if len(pipe.feeds) != 1 or len(pipe.segments) != 1:
        return False
    (feed,) = pipe.feeds.values()
    (segment,) = pipe.segments
    return isinstance(segment, SqlSegment) and isinstance(segment.tree, Input) and not isinstance(feed, FileFeed)


def _rows_of(pipes: Pipes) -> int:
    """A guess, for the order of joins."""
    return int(sum(pipe.size_bytes for pipe in pipes)) // _ROW_BYTES + 1


def _exchange_of(pipes: Pipes) -> Exchange | None:
    """The exchange whose rows are those of the pipes, if they do nothing but read one whole."""
    if len(pipes) != 1 or not _is_bare(pipes[0]):
        return None
    (feed,) = pipes[0].feeds.values()
    return feed.exchange if isinstance(feed, ExchangeFeed) else None
