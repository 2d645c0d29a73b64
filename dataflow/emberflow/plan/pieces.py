"""A partition too large for one task, aggregated in pieces: what a piece computes, and how the pieces' rows meet again.

Where many rows have one key, one partition holds them all. A join cuts such a partition and gives every piece the other
side whole. An aggregate, or a DISTINCT, that has all of a group's rows in one task cannot be cut like that; where it
has a partial form, each piece gives its partial rows, those meet by key in an exchange of their own, and further tasks
put them together and go on with the rest of the stage's plan.

Whether that happens is decided by bytes, when the stage begins. It then has two further stages: one whose tasks are the
pieces of its large partitions, and one that reads what they give, in the place of the tasks for those partitions.

Does not know: sizes, tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .aggregates import again
from .nodes import Aggregate, Distinct, Expr, Input, Node, Project, SetOperation, column
from .pipes import (
    ByExpression,
    Exchange,
    ExchangeFeed,
    Feed,
    Pieces,
    Pipe,
    SqlSegment,
    Stage,
    TextSegment,
    hashed,
    inputs_of,
)

_PARTITIONS_MAX = 64


def of_rows(
    node: Aggregate, phases: tuple[Aggregate, Aggregate, Project], together: Sequence[int], feed: int
) -> Pieces:
    """An aggregate over whole rows: a piece does the first phase. What comes after it may count on it that rows equal
    in the groups `together` are in one task, which may be fewer than all groups."""
    first, second, last = phases
    piece = replace(first, child=node.child)
    merged = replace(last, child=replace(second, child=Input(feed, piece.columns)))
    return Pieces(node, piece, tuple(column(i, piece.columns[i].type) for i in together), merged, feed)


def of_partials(first: Aggregate, second: Aggregate, feed: int) -> Pieces:
    """An aggregate over partial rows: a piece makes fewer partial rows of them."""
    piece = again(first, second)
    merged = replace(second, child=Input(feed, piece.columns))
    return Pieces(second, piece, _first(piece, len(first.groups)), merged, feed)


def of_distinct(node: Distinct, feed: int) -> Pieces:
    """DISTINCT over all columns: a piece is the same."""
    return Pieces(node, node, _first(node, len(node.columns)), replace(node, child=Input(feed, node.columns)), feed)


def _first(node: Node, count: int) -> tuple[Expr, ...]:
    """The first columns of a node."""
    return tuple(column(i, c.type) for i, c in enumerate(node.columns[:count]))


def stages_in_pieces(stage: Stage, *, id: int, exchange: int, pieces: int) -> tuple[Stage, Stage]:
    """What makes the rows of a stage's large partitions: the stage of its pieces, and the one that puts them together
    for the stage's own exchange. They get the ids `id` and `id + 1`, and what is between them the id `exchange`."""
    how = stage.pipe.pieces
    assert how is not None
    partitions = min(pieces, _PARTITIONS_MAX)
    between = Exchange(exchange, how.piece.columns, partitions, of_pieces=True)
    feeds = stage.pipe.feeds
    own = {feed: feeds[feed] for feed in inputs_of(how.piece) if feed in feeds}
    piece = replace(stage.pipe, segments=(SqlSegment(how.piece),), feeds=own, pieces=None)
    first = Stage(
        id, piece, ByExpression(hashed((_anew(how.keys),), partitions)), between, f"{stage.label} in pieces".strip()
    )
    between.producers.append(first)
    between.size_bytes = int(piece.size_bytes)
    merged = _merging(stage.pipe, how, ExchangeFeed(between, "partition"))
    return first, Stage(id + 1, merged, stage.partitioning, stage.exchange, f"{stage.label} of pieces".strip())


def _merging(pipe: Pipe, how: Pieces, feed: ExchangeFeed) -> Pipe:
    segments = tuple(
        replace(segment, tree=_replaced(segment.tree, how.whole, how.merged))
        if isinstance(segment, SqlSegment)
        else segment
        for segment in pipe.segments
    )
    read = {i for segment in segments if isinstance(segment, SqlSegment) for i in inputs_of(segment.tree)}
    read |= {i for segment in segments if isinstance(segment, TextSegment) for _, i, _ in segment.inputs}
    assert how.feed in read, "the plan of a stage does not hold the node that its pieces are for"
    feeds: dict[int, Feed] = {i: own for i, own in pipe.feeds.items() if i in read}
    return replace(pipe, segments=segments, feeds={**feeds, how.feed: feed}, drive=how.feed, pieces=None)


def _replaced(tree: Node, old: Node, new: Node) -> Node:
    """The tree with `new` in the place of the very node `old`."""
    if tree is old:
        return new
    if isinstance(tree, SetOperation):
        return replace(tree, children=tuple(_replaced(child, old, new) for child in tree.children))
    held = {name: getattr(tree, name) for name in tree.__slots__}
    below = {n: _replaced(v, old, new) for n, v in held.items() if any(v is child for child in tree.children)}
    return replace(tree, **below)  # type: ignore[arg-type]


def _anew(keys: Sequence[Expr]) -> Expr:
    """A hash to be hashed: that of the keys has decided where a row is now, and says nothing more."""
    pieces: list[str | int] = []
    for key in keys:
        pieces += [*([", "] if pieces else []), *key.pieces]
    return Expr(("hash(", *pieces, ")"), "UBIGINT")
