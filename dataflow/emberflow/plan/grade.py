"""How far two runs of a stage agree: in every byte, in their rows, or not at all.

DuckDB with two or more threads adds floats up, breaks ties and takes first rows in an order of its own; with one, and
inputs in the same order, it does the same thing twice. What gives something else each time (random(), a function of the
user's, a text we have not understood) is unstable on any number of threads.
"""

from __future__ import annotations

from typing import Literal

from .nodes import Aggregate, Distinct, Fixed, Limit, Node, Sort, walk
from .pipes import Spread, SqlSegment, Stage

Grade = Literal["exact", "same rows", "unstable"]


def grade(stage: Stage, *, threads: int) -> Grade:
    """What another attempt at the stage's tasks makes, with so many threads a task and the same input."""
    trees = [segment.tree for segment in stage.pipe.segments if isinstance(segment, SqlSegment)]
    if len(trees) < len(stage.pipe.segments) or any(is_volatile(tree) for tree in trees):
        return "unstable"
    if threads == 1:
        return "exact"
    # Rows that are dealt out in turn lie elsewhere when they come in another order.
    if isinstance(stage.partitioning, Spread) or any(depends_on_order(tree) for tree in trees):
        return "unstable"
    return "same rows"


def is_volatile(tree: Node) -> bool:
    """Whether some expression gives something else each time it is evaluated."""
    # `Expr` and `Fixed` say it in their text, whatever node holds them.
    return "volatile=True" in repr(tree)


def depends_on_order(tree: Node) -> bool:
    """Whether the rows that come out may depend on the order of those that go in."""
    for node in walk(tree):
        if isinstance(node, Limit) or (isinstance(node, Distinct) and node.on is not None):
            return True
        if isinstance(node, Aggregate) and any(call.unstable for call in node.calls):
            return True
        if not isinstance(node, Sort | Fixed) and "unstable=True" in repr(_own(node)):
            return True
    return False


def _own(node: Node) -> tuple[object, ...]:
    """What a node holds besides its children."""
    children = set(map(id, node.children))
    values = (getattr(node, name) for name in node.__slots__)
    return tuple(value for value in values if id(value) not in children and value is not node.children)
