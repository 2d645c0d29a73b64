"""From a plan to stages: where rows must move, and what can be done before they do.

One rule per operator. Row by row operators join the pipe below them; the others ask that equal keys are together, that
ranges follow each other, or that everything is in one place, and get an exchange if that is not so already. An operator
without a rule of its own gets everything in one place, which is always right.

Does not know: how many tasks there will be, or where exchanges lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from .aggregates import distinct_first, split
from .filescans import ResolvedScan
from .frames import Computed
from .keys import Met
from .nodes import (
    Aggregate,
    Column,
    Distinct,
    Expr,
    Filter,
    Fixed,
    Input,
    Join,
    Limit,
    Node,
    Project,
    Scan,
    SetOperation,
    Shared,
    Sort,
    SortKey,
    Unnest,
    Window,
    column,
)
from .partitions import (
    are_aligned,
    common_keys,
    covers,
    gathers,
    grouped_by,
    is_key,
    kept_whole,
    moved,
    of_join,
    of_right,
    partitions_of,
)
from .pieces import of_distinct, of_partials, of_rows
from .pipes import (
    ByExpression,
    ByRange,
    Exchange,
    ExchangeFeed,
    Feed,
    FileFeed,
    Partitioning,
    Pieces,
    Pipe,
    Sample,
    SqlSegment,
    Stage,
    TableFeed,
    Whole,
    hashed,
)

Pipes = list[Pipe]

_FILTER_SELECTIVITY = 0.4
_GROUP_SELECTIVITY = 0.3
_ROW_BYTES = 64
_PARTITIONS_MAX = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """Sizes that decide how a plan is cut."""

    partitions: int | None = None
    """Partitions of every exchange; None: by bytes."""
    partition_bytes: int = 128 << 20
    """What a partition should hold, as Parquet would hold it."""
    partitions_min: int = 2
    """Fewest partitions of an exchange that is not small: as many as can be worked on at once."""
    broadcast_bytes: int = 32 << 20
    """A join's side of at most so much is given to every task whole."""
    sort_in_one_bytes: int = 32 << 20
    """At most so much is sorted in one place."""


class Builder:
    """Builds the stages of one program. `sources` are what scans read, by name; `frames` what inputs stand for."""

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        self.stages: list[Stage] = []
        self.notes: list[str] = []
        self.met: list[Met] = []
        """Joins whose sides meet through exchanges, those below before those above."""
        self._exchanges = 0
        self._feeds = 0

    # ---- pieces

    def new_feed(self) -> int:
        self._feeds += 1
        return self._feeds

    def exchange(
        self,
        pipes: Sequence[Pipe],
        partitioning: Partitioning | Callable[[Pipe], Partitioning],
        partitions: int = 1,
        *,
        label: str,
        fixed: bool = False,
    ) -> Exchange:
        """An exchange that all the pipes write to."""
        blank = pipes[0].known_columns == ()
        if blank:
            # Rows have to have something to travel in.
            one = (Expr(("1",), "INTEGER"),)
            pipes = [pipe.then(Project(pipe.tree, one, ("one",))) for pipe in pipes]
        exchange = Exchange(self._exchanges, pipes[0].known_columns, partitions, fixed=fixed, blank=blank)
        self._exchanges += 1
        for pipe in pipes:
            how = partitioning(pipe) if callable(partitioning) else partitioning
            stage = Stage(len(self.stages), pipe, how, exchange, label)
            exchange.producers.append(stage)
            exchange.size_bytes += int(pipe.size_bytes)
            self.stages.append(stage)
        return exchange

    def made(self, frame: Computed) -> Exchange:
        """What an earlier job has made, as an exchange of this program."""
        made = frame.exchange
        exchange = Exchange(self._exchanges, made.columns, made.partitions, fixed=True, made=frame.outputs)
        exchange.size_bytes = sum(output.size_bytes for output in frame.outputs)
        self._exchanges += 1
        return exchange

    def reading(self, exchange: Exchange, by: str, **changes: object) -> Pipe:
        """A pipe that begins with an exchange's rows."""
        assert exchange.columns is not None
        feed = self.new_feed()
        drive = None if by == "all" else feed
        rows: Node = Input(feed, exchange.columns)
        pipe = Pipe(
            (SqlSegment(Project(rows, (), ()) if exchange.blank else rows),),
            {feed: ExchangeFeed(exchange, by)},  # type: ignore[arg-type]
            drive,
            exchange.size_bytes,
        )
        return replace(pipe, **changes)  # type: ignore[arg-type]

    def together(self, pipes: Pipes, *, label: str = "gather") -> Pipe:
        """All rows in one task."""
        if len(pipes) == 1 and pipes[0].drive is None:
            return pipes[0]
        return self.reading(self.exchange(pipes, Whole(), label=label), "all")

    def by_key(self, pipes: Pipes, keys: Sequence[Expr], *, label: str, partitions: int | None = None) -> Exchange:
        """Rows with equal keys in one partition."""
        count = partitions or self.partitions_for(sum(pipe.size_bytes for pipe in pipes))
        return self.exchange(pipes, ByExpression(hashed(keys, count)), count, label=label)

    def partitions_for(self, size_bytes: float) -> int:
        if self.config.partitions is not None:
            return self.config.partitions
        wanted = int(size_bytes / self.config.partition_bytes) + 1
        return min(max(wanted, self.config.partitions_min), _PARTITIONS_MAX)

    # ---- operators

    def build(self, node: Node, scope: Mapping[object, Callable[[Node], Pipes]]) -> Pipes:
        """The pipes of a plan. `scope` says what its leaves stand for: by a scan's table, or by an input's id."""
        if isinstance(node, Scan):
            return scope[node.table](node)
        if isinstance(node, Input):
            return scope[node.id](node)
        if isinstance(node, Fixed):
            return [Pipe((SqlSegment(node),), {}, None, _ROW_BYTES, partitions=1)]
        if isinstance(node, Filter | Project | Unnest):
            return [self.row_by_row(node, pipe) for pipe in self.build(node.child, scope)]
        if isinstance(node, Shared):
            exchange = self.exchange(self.build(node.definition, scope), Whole(), label="shared")
            inner = {**scope, node.id: lambda leaf: [self.reading(exchange, "piece")]}
            return self.build(node.body, inner)
        if isinstance(node, SetOperation):
            return self._set_operation(node, scope)
        if isinstance(node, Join):
            return self._join(node, self.build(node.left, scope), self.build(node.right, scope))
        rule = {
            Aggregate: self._aggregate,
            Sort: self._sort,
            Limit: self._limit,
            Distinct: self._distinct,
            Window: self._window,
        }[type(node)]
        if isinstance(node, Limit) and isinstance(node.child, Sort) and node.limit is not None:
            return self._top(node, node.child, self.build(node.child.child, scope))
        below = self.build(node.children[0], scope)
        pipes: Pipes = rule(node, below)  # type: ignore[operator]
        if is_one(pipes):
            # They may be in one task only because they are few.
            is_always = gathers(node) or partitions_of(below) == 1
            pipes = [replace(pipes[0], partitions=1 if is_always else None)]
        return pipes

    def row_by_row(self, node: Filter | Project | Unnest, pipe: Pipe) -> Pipe:
        tree = replace(node, child=pipe.tree)
        if isinstance(node, Filter):
            return pipe.then(tree, size_bytes=pipe.size_bytes * _FILTER_SELECTIVITY)
        if isinstance(node, Project):
            share = min(1.0, len(node.exprs) / max(1, len(pipe.columns)))
            return pipe.then(tree, hashed=moved(pipe.hashed, node), size_bytes=pipe.size_bytes * share)
        return pipe.then(tree)

    def _aggregate(self, node: Aggregate, pipes: Pipes) -> Pipes:
        phases = split(node)
        if len(pipes) == 1 and (pipes[0].drive is None or (node.is_plain and covers(node.groups, pipes[0].hashed))):
            pipe = pipes[0]
            whole = replace(node, child=pipe.tree)
            together = grouped_by(node, pipe.hashed)
            if phases is not None and is_cut(pipe):
                pipe = replace(pipe, pieces=of_rows(whole, phases, together, self.new_feed()))
            return [kept_whole(pipe).then(whole, hashed=together, ordered=False)]
        if phases is not None:
            first, second, last = phases
            partial = [self._partial(first, pipe) for pipe in pipes]
            return [self._over(self._meet(partial, first.groups, node), first, second, last)]
        if (steps := distinct_first(node)) is not None:
            rows, after = steps
            assert isinstance(rows, Aggregate)
            met = self._aggregate(rows, pipes)
            return self._aggregate(after, met)
        pipe = self._meet_rows(pipes, node)
        return [pipe.then(replace(node, child=pipe.tree))]

    def _partial(self, first: Aggregate, pipe: Pipe) -> Pipe:
        size = pipe.size_bytes * _GROUP_SELECTIVITY if first.groups else _ROW_BYTES
        return pipe.then(replace(first, child=pipe.tree), size_bytes=size, hashed=(), ordered=False)

    def _meet(self, partial: Pipes, groups: Sequence[Expr], node: Aggregate) -> Pipe:
        """Where the partial rows of one group come together."""
        if not groups or not node.is_plain:
            return self.together(partial, label="aggregate")
        keys = [column(i, group.type) for i, group in enumerate(groups)]
        exchange = self.by_key(partial, keys, label="aggregate")
        return self.reading(exchange, "partition", hashed=tuple(range(len(groups))))

    def _over(self, pipe: Pipe, first: Aggregate, second: Aggregate, last: Project) -> Pipe:
        second = replace(second, child=pipe.tree)
        if pipe.drive is not None:
            pipe = self._in_pieces(pipe, of_partials(first, second, self.new_feed()))
        return pipe.then(replace(last, child=second))

    def _in_pieces(self, pipe: Pipe, pieces: Pieces) -> Pipe:
        """The pipe, which reads one exchange by its partitions, the large ones in pieces."""
        for feed in pipe.feeds.values():
            assert isinstance(feed, ExchangeFeed)
            feed.exchange.splittable = True
        return replace(pipe, pieces=pieces)

    def _meet_rows(self, pipes: Pipes, node: Aggregate) -> Pipe:
        """Where whole rows of one group come together."""
        if not node.groups or not node.is_plain or any(group.volatile for group in node.groups):
            return self.together(pipes, label="aggregate")
        exchange = self.by_key(pipes, node.groups, label="aggregate")
        positions = tuple(p for group in node.groups if (p := group.position) is not None)
        complete = len(positions) == len(node.groups)
        return self.reading(exchange, "partition", hashed=grouped_by(node, positions) if complete else ())

    def _distinct(self, node: Distinct, pipes: Pipes) -> Pipes:
        if len(pipes) == 1 and pipes[0].drive is None:
            return [pipes[0].then(replace(node, child=pipes[0].tree))]
        keys = node.on if node.on is not None else all_columns(node)
        if any(key.volatile for key in keys):
            pipe = self.together(pipes, label="distinct")
            return [pipe.then(replace(node, child=pipe.tree))]
        if node.on is None:
            pipes = [pipe.then(replace(node, child=pipe.tree), ordered=False) for pipe in pipes]
        pipe = self.reading(self.by_key(pipes, keys, label="distinct"), "partition")
        positions = tuple(p for key in keys if (p := key.position) is not None)
        known = positions if len(positions) == len(keys) else ()
        node = replace(node, child=pipe.tree)
        if node.on is None:
            pipe = self._in_pieces(pipe, of_distinct(node, self.new_feed()))
        return [pipe.then(node, hashed=known)]

    def _window(self, node: Window, pipes: Pipes) -> Pipes:
        common = common_keys(node)
        if len(pipes) == 1 and (pipes[0].drive is None or (common and covers(common, pipes[0].hashed))):
            pipe = kept_whole(pipes[0])
            return [pipe.then(replace(node, child=pipe.tree), ordered=False)]
        if not common or any(key.volatile for key in common):
            pipe = self.together(pipes, label="window")
        else:
            positions = tuple(p for key in common if (p := key.position) is not None)
            known = positions if len(positions) == len(common) else ()
            pipe = self.reading(self.by_key(pipes, common, label="window"), "partition", hashed=known)
        return [pipe.then(replace(node, child=pipe.tree))]

    def _set_operation(self, node: SetOperation, scope: Mapping[object, Callable[[Node], Pipes]]) -> Pipes:
        sides = [self.build(child, scope) for child in node.children]
        if node.kind == "union":
            arms = [renamed(pipe, node.columns) for side in sides for pipe in side]
            return arms if node.all else self._distinct(Distinct(Input(0, node.columns)), arms)
        sides = [[renamed(pipe, node.columns) for pipe in side] for side in sides]
        count = self.partitions_for(sum(pipe.size_bytes for side in sides for pipe in side))
        keys = [column(i, c.type) for i, c in enumerate(node.columns)]
        pipes = [
            self.reading(self.by_key(side, keys, label=node.kind, partitions=count), "partition") for side in sides
        ]
        merged = merge(pipes[0], *pipes[1:])
        tree = replace(node, children=tuple(pipe.tree for pipe in pipes))
        return [merged.then(tree, hashed=tuple(range(len(node.columns))))]

    # ---- order

    def _sort(self, node: Sort, pipes: Pipes) -> Pipes:
        size = sum(pipe.size_bytes for pipe in pipes)
        small = size <= self.config.sort_in_one_bytes and self.config.partitions is None
        if small or is_one(pipes) or partitions_of(pipes) == 1:
            pipe = self.together(pipes, label="sort")
            return [pipe.then(replace(node, child=pipe.tree), ordered=True)]
        if any(not is_cheap(pipe) for pipe in pipes):
            pipes = [self.reading(self.exchange(pipes, Whole(), label="sort input"), "piece")]
        sample = self.exchange([sampled(pipe, node.keys) for pipe in pipes], Sample(), label="sample")
        count = self.partitions_for(size)
        exchange = self.exchange(pipes, ByRange(node.keys, sample), count, label="sort")
        pipe = self.reading(exchange, "partition", ordered=True)
        return [pipe.then(replace(node, child=pipe.tree))]

    def _top(self, node: Limit, sort: Sort, pipes: Pipes) -> Pipes:
        """ORDER BY with LIMIT: each task gives its own first rows."""
        assert node.limit is not None
        if not (len(pipes) == 1 and pipes[0].drive is None):
            enough = Limit(sort, node.limit + node.offset)
            pipes = [
                pipe.then(replace(enough, child=replace(sort, child=pipe.tree)), size_bytes=_ROW_BYTES)
                for pipe in pipes
            ]
        pipe = self.together(pipes, label="top")
        return [pipe.then(replace(node, child=replace(sort, child=pipe.tree)), ordered=True, partitions=1)]

    def _limit(self, node: Limit, pipes: Pipes) -> Pipes:
        ordered = len(pipes) == 1 and pipes[0].ordered
        if not (len(pipes) == 1 and pipes[0].drive is None) and node.limit is not None:
            enough = node.limit + node.offset
            pipes = [pipe.then(Limit(pipe.tree, enough)) for pipe in pipes]
        pipe = self.together(pipes, label="limit")
        return [pipe.then(replace(node, child=pipe.tree), ordered=ordered)]

    # ---- joins

    def _join(self, node: Join, lefts: Pipes, rights: Pipes) -> Pipes:
        equal = [condition for condition in node.conditions if is_key(condition)]
        left_bytes = sum(pipe.size_bytes for pipe in lefts)
        right_bytes = sum(pipe.size_bytes for pipe in rights)
        if len(lefts) == len(rights) == 1 and are_aligned(node, lefts[0], rights[0]):
            left, right = kept_whole(lefts[0]), kept_whole(rights[0])
            known = left.hashed if node.kind in ("inner", "left", "semi", "anti") else ()
            return [self._joined(node, left, right, hashed=known)]
        count = of_join(node, partitions_of(lefts), partitions_of(rights))
        if count == 1 or (is_one(lefts) and is_one(rights)):
            right = rights[0] if is_one(rights) and is_simple(rights[0]) else self._for_all(rights)
            return [self._joined(node, self.together(lefts), right, partitions=count)]
        if count is not None:
            is_left = partitions_of(lefts) == 1
            self._note_whole(left_bytes if is_left else right_bytes, count)
            return self._with_whole(node, lefts, rights, is_left=is_left, partitions=count)
        must = not equal or node.kind == "mark"
        right_may, left_may = node.may_see_right_whole, node.may_see_left_whole
        if right_may and (
            right_bytes <= self.config.broadcast_bytes or (must and not (left_may and left_bytes < right_bytes))
        ):
            return self._with_whole(node, lefts, rights, is_left=False)
        if left_may and (must or left_bytes <= self.config.broadcast_bytes):
            return self._with_whole(node, lefts, rights, is_left=True)
        if must:
            return [self._joined(node, self.together(lefts), self._for_all(rights))]
        return self._co_partitioned(node, lefts, rights, left_bytes + right_bytes)

    def _with_whole(
        self, node: Join, lefts: Pipes, rights: Pipes, *, is_left: bool, partitions: int | None = None
    ) -> Pipes:
        """One side's tasks, each of which reads the other side whole, the left one if `is_left`."""
        if not is_left:
            right = self._for_all(rights)
            return [self._joined(node, left, right, hashed=left.hashed, partitions=partitions) for left in lefts]
        left = self._for_all(lefts)
        return [
            self._joined(node, left, right, hashed=of_right(node, right.hashed), partitions=partitions)
            for right in rights
        ]

    def _note_whole(self, size_bytes: float, partitions: int) -> None:
        """Says what it costs to keep partitions, where by sizes alone they would not be kept."""
        if size_bytes > self.config.broadcast_bytes:
            self.notes.append(
                f"each of {partitions} tasks reads a join's side of one partition whole, about {size_bytes:,.0f} bytes:"
                f" {partitions * size_bytes:,.0f} in sum"
            )

    def _for_all(self, pipes: Pipes) -> Pipe:
        return self.reading(self.exchange(pipes, Whole(), label="broadcast"), "all")

    def _co_partitioned(self, node: Join, lefts: Pipes, rights: Pipes, size_bytes: float) -> Pipes:
        equal = [condition for condition in node.conditions if is_key(condition)]
        count = self.partitions_for(size_bytes)
        drops = [c.comparison == "=" for c in equal]
        left = self._side(lefts, [c.left for c in equal], drops, node.keeps_left, count)
        right = self._side(rights, [c.right for c in equal], drops, node.keeps_right, count)
        self.met.append(Met(node, left, right))
        # Where NULL keys are kept they are spread, so equal keys are together only if they are not NULL.
        known: tuple[int, ...] = ()
        if node.kind in ("inner", "semi") and all(c.left.position is not None for c in equal):
            known = tuple(c.left.position for c in equal if c.left.position is not None)
        # Of a partition one side at most is cut: each of its rows meets the whole other side once.
        left.splittable = node.kind in ("inner", "left", "semi", "anti")
        right.splittable = node.kind in ("inner", "right", "right_semi", "right_anti")
        return [self._joined(node, self.reading(left, "partition"), self.reading(right, "partition"), hashed=known)]

    def _side(self, pipes: Pipes, keys: list[Expr], drops: list[bool], keeps: bool, count: int) -> Exchange:
        """One side of a join, by its keys. NULL never equals: such rows go if only matches count, else anywhere."""
        never = [key for key, drop in zip(keys, drops, strict=True) if drop]
        nulls = [Expr(("(", *key.pieces, ") IS NOT NULL"), "BOOLEAN") for key in never]
        if not keeps:
            pipes = [pipe.then(Filter(pipe.tree, tuple(nulls))) if nulls else pipe for pipe in pipes]
            return self.by_key(pipes, keys, label="join", partitions=count)
        expr = hashed(keys, count)
        if nulls:
            whole = hashed([column(i, c.type) for i, c in enumerate(pipes[0].columns)], count)
            some = tuple(piece for null in nulls for piece in (" AND ", *null.pieces))[1:]
            expr = Expr(("CASE WHEN ", *some, " THEN ", *expr.pieces, " ELSE ", *whole.pieces, " END"), "UINTEGER")
        return self.exchange(pipes, ByExpression(expr), count, label="join")

    def _joined(
        self, node: Join, left: Pipe, right: Pipe, *, hashed: tuple[int, ...] = (), partitions: int | None = None
    ) -> Pipe:
        tree = replace(node, left=left.tree, right=right.tree)
        size = max(left.size_bytes, right.size_bytes)
        return merge(left, right).then(tree, hashed=hashed, ordered=False, size_bytes=size, partitions=partitions)


def merge(first: Pipe, *others: Pipe) -> Pipe:
    """The first pipe, with the feeds of the others. Only one of them may be more than one plan over its feeds."""
    feeds: dict[int, Feed] = dict(first.feeds)
    segments = first.segments
    driving = next((pipe for pipe in (first, *others) if pipe.drive is not None), first)
    for other in others:
        if not is_simple(other):
            assert is_simple(first)
            segments = other.segments
        feeds.update(other.feeds)
    cut = [pipe.pieces for pipe in (first, *others) if pipe.pieces is not None]
    assert len(cut) <= 1, "of pipes that are put together one at most is driven by partitions that meet again"
    return replace(
        first,
        segments=segments,
        feeds=feeds,
        drive=driving.drive,
        partitions=None,
        pieces=cut[0] if cut else None,
    )


def is_simple(pipe: Pipe) -> bool:
    """Whether the pipe is one plan over its feeds, which can stand inside another."""
    return len(pipe.segments) == 1 and isinstance(pipe.segments[0], SqlSegment)


def is_cut(pipe: Pipe) -> bool:
    """Whether a large partition of what the pipe reads may go to several tasks, each of which gives rows of its own."""
    feeds = [feed for feed in pipe.feeds.values() if isinstance(feed, ExchangeFeed) and feed.by == "partition"]
    return pipe.pieces is None and is_simple(pipe) and any(feed.exchange.splittable for feed in feeds)


def is_one(pipes: Pipes) -> bool:
    """Whether all the rows are in one task."""
    return len(pipes) == 1 and pipes[0].drive is None


def is_cheap(pipe: Pipe) -> bool:
    """Whether running the pipe twice costs less than keeping its rows: files, filtered and projected."""
    feeds = list(pipe.feeds.values())
    if len(pipe.segments) > 1 or any(isinstance(feed, ExchangeFeed) and feed.by == "partition" for feed in feeds):
        return False
    tree = pipe.tree
    while isinstance(tree, Filter | Project):
        exprs = tree.conditions if isinstance(tree, Filter) else tree.exprs
        if any(expr.volatile for expr in exprs):
            return False
        tree = tree.child
    return isinstance(tree, Input)


def sampled(pipe: Pipe, keys: Sequence[SortKey]) -> Pipe:
    """The pipe's sort keys only, as bytes that compare as the rows do; the job takes some of them."""
    key = sort_key(keys)
    return pipe.then(Project(pipe.tree, (key,), ("key",)), size_bytes=_ROW_BYTES, hashed=(), ordered=False)


def sort_key(keys: Sequence[SortKey]) -> Expr:
    """One BLOB whose order is that of the keys."""
    pieces: list[str | int] = ["create_sort_key("]
    for i, key in enumerate(keys):
        direction = f"'{'DESC' if key.descending else 'ASC'} NULLS {'FIRST' if key.nulls_first else 'LAST'}'"
        pieces += [*([", "] if i else []), *key.expr.pieces, f", {direction}"]
    return Expr((*pieces, ")"), "BLOB")


def all_columns(node: Node) -> tuple[Expr, ...]:
    return tuple(column(i, c.type) for i, c in enumerate(node.columns))


def renamed(pipe: Pipe, columns: Sequence[Column]) -> Pipe:
    """The pipe with the names of a set operation's columns; types are equal already."""
    exprs = tuple(column(i, c.type) for i, c in enumerate(pipe.columns))
    return pipe.then(Project(pipe.tree, exprs, tuple(c.name for c in columns)), ordered=False)


def feed_of(source: ResolvedScan | pa.Table, node: Scan) -> Feed:
    """The feed of the columns that a scan reads."""
    if isinstance(source, pa.Table):
        return TableFeed(source, node.columns, node.positions)
    return FileFeed(source, tuple(column.name for column in node.columns))
