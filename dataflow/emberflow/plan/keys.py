"""Key filters: rows that a join will drop, for want of a match, are not sent to it.

Of two sides that meet through exchanges, one may be few rows after its filters. The stages of the other one then wait
for it, read its exchange whole and keep, by a semi join over the join's own equalities, what can match; so NULL, NaN,
collations and types are as in the join. What a side keeps without a match (outer joins, anti joins) is never filtered.

A filter stands as far down as it can be and still has much to leave out: below the joins whose rows meet later, before
the exchanges on the way. One whose keys are computed stays where the join would compute them: other rows, which a join
or filter on the way drops, may have no such key, and an error instead. Joins take their turns from the top, since a
side that was filtered from above can filter the other side of its own join.

All this is done by guesses: the keys' side is at most half as large as the other one, and filters leave only some
of its rows, for else its keys are likely to be all that there are. Whether a task applies the filter is decided when
sizes are known (`job/keys.py`); so nothing that others see, like the number of partitions, depends on it. A side that
gives something else each time filters nothing: the steps of the other one could not be found again.

Does not know: tasks, or how exchanges are partitioned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .grade import grade
from .guesses import Guess, Guesses
from .nodes import Condition, Filter, Input, Join, KeyFilter, Node, Project
from .partitions import is_key
from .pipes import ByExpression, Exchange, ExchangeFeed, Feed, Stage, Whole

# One condition is taken to leave out enough.
_REDUCED = 0.5
_KEYS_OF_LARGE = 0.5
_LARGE_BYTES_MIN = 1 << 20


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
        # Anew for each join: what was filtered meanwhile is smaller.
        guesses = Guesses()
        left, right = guesses.of_exchange(met.left), guesses.of_exchange(met.right)
        equal = tuple(condition for condition in node.conditions if is_key(condition))
        if not node.keeps_right and _pays(left, right) and self._is_same(met.left):
            turned = tuple(Condition(c.right, c.left, c.comparison) for c in equal)
            self._before(met.right, met.left, turned, left)
        elif not node.keeps_left and _pays(right, left) and self._is_same(met.right):
            self._before(met.left, met.right, equal, right)

    def _before(self, exchange: Exchange, keys: Exchange, conditions: tuple[Condition, ...], guess: Guess) -> None:
        """Has an exchange get only rows that match some of `keys` by the conditions, whose left sides are over the
        exchange's columns."""
        assert keys.columns is not None
        self._keys.add(keys.id)
        are_columns = all(condition.left.position is not None for condition in conditions)
        for stage in exchange.producers:
            below = _below(stage.pipe.tree, conditions) if are_columns else None
            if below is not None and self._is_open(stage.pipe.feeds.get(below[0])):
                feed = stage.pipe.feeds[below[0]]
                assert isinstance(feed, ExchangeFeed)
                if _is_large(Guesses().of_exchange(feed.exchange), guess):
                    self._before(feed.exchange, keys, below[1], guess)
                    continue
            id = self._new_feed()
            tree = KeyFilter(stage.pipe.tree, Input(id, keys.columns), conditions, guess.rows)
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
        partition they are in that some are missing; and they are not few rows for all."""
        if not isinstance(feed, ExchangeFeed) or feed.by == "all":
            return False
        if self._readers[feed.exchange.id] != 1 or feed.exchange.fixed:
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


def _pays(keys: Guess, large: Guess) -> bool:
    return _is_large(large, keys) and keys.kept <= _REDUCED


def _is_large(large: Guess, keys: Guess) -> bool:
    return large.size_bytes >= max(_LARGE_BYTES_MIN, keys.size_bytes / _KEYS_OF_LARGE)
