"""Guesses of sizes before anything runs: by the files, and by how many filters there are, not by what columns hold.

Does not know: what they are for.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from .nodes import Aggregate, Distinct, Expr, Filter, Input, Join, KeyFilter, Limit, Node, Project
from .pipes import Exchange, ExchangeFeed, Feed, Pipe, SqlSegment, TableFeed

_CONDITION_KEEPS = 0.4
_GROUPS_OF_ROWS = 0.3
_LIMIT_KEEPS = 0.1
_CONSTANT = re.compile(r"'|CAST\(-?\d")


@dataclass(frozen=True, slots=True)
class Guess:
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


class Guesses:
    """Of one program as it is; each exchange is looked at once."""

    def __init__(self) -> None:
        self._known: dict[int, Guess] = {}

    def of_exchange(self, exchange: Exchange) -> Guess:
        if exchange.id not in self._known:
            self._known[exchange.id] = self._of_exchange(exchange)
        return self._known[exchange.id]

    def _of_exchange(self, exchange: Exchange) -> Guess:
        if exchange.made is not None:
            return Guess(exchange.size_bytes)
        guesses = [self._of_pipe(stage.pipe) for stage in exchange.producers]
        rows = [guess.rows for guess in guesses if guess.rows is not None]
        return Guess(
            sum(guess.read_bytes for guess in guesses),
            max(guess.kept for guess in guesses),
            sum(rows) if len(rows) == len(guesses) else None,
        )

    def _of_pipe(self, pipe: Pipe) -> Guess:
        last = pipe.segments[-1]
        # Of a function or a text nobody knows what it keeps.
        return self._of_node(last.tree, pipe) if isinstance(last, SqlSegment) else Guess(pipe.size_bytes)

    def _of_node(self, node: Node, pipe: Pipe) -> Guess:
        match node:
            case Input():
                return self._of_feed(pipe.feeds[node.id]) if node.id in pipe.feeds else Guess(pipe.size_bytes)
            case Filter():
                child = self._of_node(node.child, pipe)
                return replace(child, kept=child.kept * _kept_by(node))
            case KeyFilter():
                child, keys = self._of_node(node.child, pipe), self._of_node(node.keys, pipe)
                return replace(child, kept=child.kept * keys.kept)
            case Project():
                child = self._of_node(node.child, pipe)
                share = min(1.0, len(node.exprs) / max(1, len(node.child.columns)))
                return replace(child, read_bytes=child.read_bytes * share)
            case Aggregate() | Distinct():
                child = self._of_node(node.child, pipe)
                return Guess(child.read_bytes * _GROUPS_OF_ROWS, child.kept)
            case Limit() if node.limit is not None:
                child = self._of_node(node.child, pipe)
                return replace(child, kept=child.kept * _LIMIT_KEEPS)
            case Join():
                return self._of_join(node, pipe)
            case _:
                below = [self._of_node(child, pipe) for child in node.children]
                return Guess(sum(guess.read_bytes for guess in below), max((g.kept for g in below), default=1.0))

    def _of_feed(self, feed: Feed) -> Guess:
        if isinstance(feed, ExchangeFeed):
            return self.of_exchange(feed.exchange)
        if isinstance(feed, TableFeed):
            return Guess(feed.table.nbytes, rows=feed.table.num_rows)
        scan = feed.scan
        if not scan.all_bytes or not scan.size_bytes:
            return Guess(feed.read_bytes, rows=scan.rows)
        # Files and row groups that were left out count as filtered.
        kept = scan.size_bytes / scan.all_bytes
        of_files = scan.all_bytes / sum(file.size_bytes for file in scan.files)
        return Guess(feed.read_bytes / kept, kept, None if scan.rows is None else round(scan.rows * of_files))

    def _of_join(self, node: Join, pipe: Pipe) -> Guess:
        """Rows of the side with more of them, of which each side's filters leave some; of one side, if only its rows
        come out."""
        left, right = self._of_node(node.left, pipe), self._of_node(node.right, pipe)
        if node.kind == "full":
            return Guess(left.read_bytes + right.read_bytes)
        if node.keeps_left or node.keeps_right:
            return left if node.keeps_left else right
        kept = left.kept * right.kept
        if node.kind in ("semi", "right_semi"):
            return replace(left if node.kind == "semi" else right, kept=kept)
        return replace(max(left, right, key=lambda guess: guess.read_bytes), kept=kept)


def left_of_inputs(node: Node) -> float:
    """The share of what a plan reads from its inputs that it puts out."""
    match node:
        case Input():
            return 1.0
        case Filter():
            return _kept_by(node) * left_of_inputs(node.child)
        case Aggregate() | Distinct():
            return _GROUPS_OF_ROWS * left_of_inputs(node.child)
        case Limit() if node.limit is not None:
            return _LIMIT_KEEPS * left_of_inputs(node.child)
        case _:
            return math.prod(map(left_of_inputs, node.children))


def _kept_by(node: Filter) -> float:
    return float(_CONDITION_KEEPS ** sum(map(_comparisons, node.conditions)))


def _comparisons(condition: Expr) -> int:
    """With how many constants a condition compares; others, like IS NOT NULL, are taken to leave most rows in: also of
    an expression with constants, as every computed key of a join is asked for."""
    text = condition.sql(lambda _: "c")
    if _CONSTANT.search(text) is None or " <> " in text or text.removesuffix(")").endswith(" IS NOT NULL"):
        return 0
    return 1 if " OR " in text else 1 + text.count(" AND ")
