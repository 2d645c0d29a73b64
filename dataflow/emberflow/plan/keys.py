"""Key filters: rows that a join will drop, for want of a match, are not sent to it.

Of two sides that meet through exchanges, one may be few rows after its filters. The stages of the other one then wait
for it, read its exchange whole and keep, by a semi join over the join's very conditions, what can match; so NULL, NaN,
collations and types are as in the join. What a side keeps without a match (outer joins, anti joins) is never filtered.

A filter stands as far down as it can be: below the joins whose rows meet later, before the exchanges on the way. Joins
take their turns from the top, since a side that was filtered from above can filter the other side of its own join.

All this is done by guesses: the keys' side is less than half as large as the other one, and filters leave only some
of its rows, for else its keys are likely to be all that there are. Whether a task applies the filter is decided when
sizes are known (`job/keys.py`); so nothing that others see, like the number of partitions, depends on it. A side that
gives something else each time filters nothing: the steps of the other one could not be found again.

Does not know: tasks, or how exchanges are partitioned.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .grade import grade
from .nodes import Aggregate, Condition, Distinct, Expr, Filter, Input, Join, KeyFilter, Limit, Node, Project
from .partitions import is_key
from .pipes import ByExpression, Exchange, ExchangeFeed, Feed, Pipe, SqlSegment, Stage, TableFeed, Whole

_CONDITION_KEEPS = 0.4
_GROUPS_OF_ROWS = 0.3
_LIMIT_KEEPS = 0.1
# One condition is taken to leave out enough.
_REDUCED = 0.5
_KEYS_OF_LARGE = 0.5
_LARGE_BYTES_MIN = 1 << 20
_CONSTANT = re.compile(r"'|CAST\(-?\d")


@dataclass(frozen=True, slots=True)
class Met:
    """A join of the rows of two exchanges. It is all that reads them."""

    node: Join
    left: Exchange
    right: Exchange


def with_key_filters(stages: Sequence[Stage], joins: Sequence[Met], new_feed: Callable[[], int]) -> list[Stage]:
    """The stages, with key filters for those of the `joins`, the lower ones first, that seem to be worth it; each stage
    after those that it reads."""
    filters = _KeyFilters(stages, new_feed)
    for join in reversed(joins):
        filters.add(join)
    filters.mark(stages)
    return _in_order(stages)


class _KeyFilters:
    def __init__(self, stages: Sequence[Stage], new_feed: Callable[[], int]) -> None:
        self._readers = Counter(exchange.id for stage in stages for exchange in stage.inputs())
        self._new_feed = new_feed
        self._keys: set[int] = set()
        """Exchanges that filters read."""
        self._same: dict[int, bool] = {}
        """Whether exchanges get the same rows each time."""

    def add(self, met: Met) -> None:
        """Filters one side of a join by the keys of the other, if that seems to be worth it."""
        node = met.node
        left, right = _of_exchange(met.left), _of_exchange(met.right)
        equal = tuple(condition for condition in node.conditions if is_key(condition))
        if not node.keeps_right and _pays(left, right) and self._is_same(met.left):
            turned = tuple(Condition(c.right, c.left, c.comparison) for c in equal)
            self._before(met.right, met.left, turned, left.rows)
        elif not node.keeps_left and _pays(right, left) and self._is_same(met.right):
            self._before(met.left, met.right, equal, right.rows)

    def _before(self, exchange: Exchange, keys: Exchange, conditions: tuple[Condition, ...], rows: int | None) -> None:
        """Has an exchange get only rows that match some of `keys` by the conditions, whose left sides are over the
        exchange's columns."""
        assert keys.columns is not None
        self._keys.add(keys.id)
        for stage in exchange.producers:
            below = _below(stage.pipe.tree, conditions)
            if below is not None and self._is_open(stage.pipe.feeds.get(below[0])):
                feed = stage.pipe.feeds[below[0]]
                assert isinstance(feed, ExchangeFeed)
                self._before(feed.exchange, keys, below[1], rows)
                continue
            id = self._new_feed()
            tree = KeyFilter(stage.pipe.tree, Input(id, keys.columns), conditions, rows)
            read: Feed = ExchangeFeed(keys, "all")
            stage.pipe = stage.pipe.then(tree, feeds={**stage.pipe.feeds, id: read})

    def _is_same(self, exchange: Exchange) -> bool:
        if exchange.id not in self._same:
            makers = exchange.producers
            own = all(grade(maker, threads=1) != "unstable" for maker in makers)
            self._same[exchange.id] = own and all(self._is_same(read) for maker in makers for read in maker.inputs())
        return self._same[exchange.id]

    def _is_open(self, feed: Feed | None) -> bool:
        """Whether rows may be left out ahead of what a feed reads: nobody else reads them, nor may see by which
        partition they are in that some are missing."""
        if not isinstance(feed, ExchangeFeed) or self._readers[feed.exchange.id] != 1 or feed.exchange.fixed:
            return False
        makers = feed.exchange.producers
        return bool(makers) and all(isinstance(maker.partitioning, ByExpression | Whole) for maker in makers)

    def mark(self, stages: Iterable[Stage]) -> None:
        """Tells the filters whose rows are keys of others."""
        for stage in stages:
            if stage.exchange.id in self._keys and isinstance(stage.pipe.tree, KeyFilter):
                stage.pipe = stage.pipe.then(_marked(stage.pipe.tree))


def _below(node: Node, conditions: tuple[Condition, ...]) -> tuple[int, tuple[Condition, ...]] | None:
    """The input from which all columns come that the conditions compare, and the conditions over its columns, if rows
    that do not meet them may be left out there."""
    match node:
        case Input():
            return node.id, conditions
        case Filter() | KeyFilter():
            return _below(node.child, conditions)
        case Project():
            where = {i: p for i, expr in enumerate(node.exprs) if (p := expr.position) is not None}
            return _below(node.child, _moved(conditions, where)) if _are_over(conditions, where) else None
        case Join():
            return _below_join(node, conditions)
        case _:
            return None


def _below_join(node: Join, conditions: tuple[Condition, ...]) -> tuple[int, tuple[Condition, ...]] | None:
    """Of a side that the join may leave out rows of without others coming out instead."""
    width = len(node.left.columns)
    if node.single:
        # Its error for a second row would come, or not, by what is left out.
        return None
    if node.kind in ("right_semi", "right_anti"):
        return _below(node.right, conditions)
    if node.kind in ("inner", "left", "semi", "anti", "mark") and _are_over(conditions, range(width)):
        return _below(node.left, conditions)
    where = {width + i: i for i in range(len(node.right.columns))}
    if node.kind in ("inner", "right") and _are_over(conditions, where):
        return _below(node.right, _moved(conditions, where))
    return None


def _marked(node: Node) -> Node:
    return replace(node, child=_marked(node.child), is_for_keys=True) if isinstance(node, KeyFilter) else node


def _are_over(conditions: Iterable[Condition], positions: Iterable[int]) -> bool:
    known = set(positions)
    return all(condition.left.columns <= known for condition in conditions)


def _moved(conditions: Iterable[Condition], where: dict[int, int]) -> tuple[Condition, ...]:
    return tuple(replace(condition, left=condition.left.moved(where)) for condition in conditions)


def _in_order(stages: Sequence[Stage]) -> list[Stage]:
    """The stages in the order that they are in, but each after those that it reads; their ids follow it."""
    ordered: dict[Stage, None] = {}
    under_way: set[Stage] = set()

    def add(stage: Stage) -> None:
        if stage in ordered:
            return
        assert stage not in under_way, "stages wait for each other"
        under_way.add(stage)
        for exchange in stage.inputs():
            for maker in exchange.producers:
                add(maker)
        ordered[stage] = None

    for stage in stages:
        add(stage)
    for position, stage in enumerate(ordered):
        stage.id = position
    return list(ordered)


# ---- guesses


@dataclass(frozen=True, slots=True)
class _Guess:
    """What a plan says of its rows before anything runs."""

    read_bytes: float
    """What they would take if no filter left any out."""
    kept: float = 1.0
    """The share of them that filters leave."""
    rows: int | None = None
    """How many there would be, if footers tell."""

    @property
    def size_bytes(self) -> float:
        return self.read_bytes * self.kept


def _pays(keys: _Guess, large: _Guess) -> bool:
    is_worth_it = large.size_bytes >= max(_LARGE_BYTES_MIN, keys.size_bytes / _KEYS_OF_LARGE)
    return is_worth_it and keys.kept <= _REDUCED


def _of_exchange(exchange: Exchange) -> _Guess:
    if exchange.made is not None:
        return _Guess(exchange.size_bytes)
    guesses = [_of_pipe(stage.pipe) for stage in exchange.producers]
    rows = [guess.rows for guess in guesses if guess.rows is not None]
    return _Guess(
        sum(guess.read_bytes for guess in guesses),
        max(guess.kept for guess in guesses),
        sum(rows) if len(rows) == len(guesses) else None,
    )


def _of_pipe(pipe: Pipe) -> _Guess:
    last = pipe.segments[-1]
    # Of a function or a text nobody knows what it keeps.
    return _of_node(last.tree, pipe) if isinstance(last, SqlSegment) else _Guess(pipe.size_bytes)


def _of_node(node: Node, pipe: Pipe) -> _Guess:
    match node:
        case Input():
            return _of_feed(pipe.feeds[node.id]) if node.id in pipe.feeds else _Guess(pipe.size_bytes)
        case Filter():
            child = _of_node(node.child, pipe)
            return replace(child, kept=child.kept * _CONDITION_KEEPS ** sum(map(_comparisons, node.conditions)))
        case KeyFilter():
            child, keys = _of_node(node.child, pipe), _of_node(node.keys, pipe)
            return replace(child, kept=child.kept * keys.kept)
        case Project():
            child = _of_node(node.child, pipe)
            share = min(1.0, len(node.exprs) / max(1, len(node.child.columns)))
            return replace(child, read_bytes=child.read_bytes * share)
        case Aggregate() | Distinct():
            child = _of_node(node.child, pipe)
            return _Guess(child.read_bytes * _GROUPS_OF_ROWS, child.kept)
        case Limit() if node.limit is not None:
            child = _of_node(node.child, pipe)
            return replace(child, kept=child.kept * _LIMIT_KEEPS)
        case Join():
            return _of_join(node, pipe)
        case _:
            below = [_of_node(child, pipe) for child in node.children]
            return _Guess(sum(guess.read_bytes for guess in below), max((g.kept for g in below), default=1.0))


def _of_feed(feed: Feed) -> _Guess:
    if isinstance(feed, ExchangeFeed):
        return _of_exchange(feed.exchange)
    if isinstance(feed, TableFeed):
        return _Guess(feed.table.nbytes, rows=feed.table.num_rows)
    # Files that were left out count as filtered.
    scan = feed.scan
    left = max(scan.size_bytes, 1) / max(scan.all_bytes or scan.size_bytes, 1)
    return _Guess(feed.read_bytes / left, left, None if scan.rows is None else round(scan.rows / left))


def _of_join(node: Join, pipe: Pipe) -> _Guess:
    """Rows of the side with more of them, of which each side's filters leave some; of one side, where only that one's
    rows come out."""
    left, right = _of_node(node.left, pipe), _of_node(node.right, pipe)
    if node.kind == "full":
        return _Guess(left.read_bytes + right.read_bytes)
    if node.keeps_left or node.keeps_right:
        return left if node.keeps_left else right
    kept = left.kept * right.kept
    if node.kind in ("semi", "right_semi"):
        return replace(left if node.kind == "semi" else right, kept=kept)
    return replace(max(left, right, key=lambda guess: guess.read_bytes), kept=kept)


def _comparisons(condition: Expr) -> int:
    """With how many constants a condition compares; others, like IS NOT NULL, are taken to leave most rows in."""
    text = condition.sql(lambda _: "c")
    if _CONSTANT.search(text) is None or " <> " in text:
        return 0
    return 1 if " OR " in text else 1 + text.count(" AND ")
