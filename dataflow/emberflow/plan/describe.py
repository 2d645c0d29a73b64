"""A plan as text for people: one operator a line, its inputs below it and further in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from .nodes import (
    Aggregate,
    Call,
    Condition,
    Distinct,
    Expr,
    Filter,
    Fixed,
    Input,
    Join,
    KeyFilter,
    Limit,
    Node,
    Project,
    Scan,
    SetOperation,
    Shared,
    Sort,
    Unnest,
    Window,
)

_LINE_LENGTH_MAX = 160


def describe(node: Node) -> str:
    """Columns go by their names where those are unique in the input, else by their position: #3."""
    return "\n".join(_lines(node, 0))


def _lines(node: Node, depth: int) -> Iterable[str]:
    line = _line(node)
    yield "  " * depth + (line if len(line) <= _LINE_LENGTH_MAX else line[: _LINE_LENGTH_MAX - 1] + "…")
    for child in node.children:
        yield from _lines(child, depth + 1)


def _line(node: Node) -> str:
    match node:
        case Scan():
            return f"scan {node.table}: {', '.join(column.name for column in node.columns) or 'no columns'}"
        case Fixed():
            return f"rows of {node.sql}"
        case Input():
            return f"input {node.id}"
        case Filter():
            return f"filter {_listed(node.conditions, _namer(node.child), ' and ')}"
        case Project():
            return f"project {_listed(node.exprs, _namer(node.child))}"
        case Aggregate():
            return _aggregate(node)
        case Join():
            return _join(node)
        case KeyFilter():
            return _key_filter(node)
        case Sort():
            return f"sort by {_keys(node)}"
        case Limit():
            return f"limit {'all' if node.limit is None else node.limit} offset {node.offset}"
        case Distinct():
            name_of = _namer(node.child)
            return "distinct" + (f" on {_listed(node.on, name_of)}" if node.on is not None else "")
        case Window():
            return f"window {_listed([call.expr for call in node.calls], _namer(node.child))}"
        case Unnest():
            return f"unnest {_listed(node.exprs, _namer(node.child))}"
        case SetOperation():
            return node.kind + (" all" if node.all else "")
        case Shared():
            return f"input {node.id}, computed once, and what reads it"


def _aggregate(node: Aggregate) -> str:
    name_of = _namer(node.child)
    calls = ", ".join(_call(call, name_of) for call in node.calls)
    by = f" by {_listed(node.groups, name_of)}" if node.groups else ""
    sets = "" if node.is_plain else f" in {len(node.sets)} grouping sets"
    return f"aggregate {calls or 'distinct groups'}{by}{sets}"


def _call(call: Call, name_of: Callable[[int], str]) -> str:
    args = ", ".join(_plain(arg.sql(name_of)) for arg in call.args)
    return f"{call.function}({'distinct ' if call.distinct else ''}{args})" + (" (unstable)" if call.unstable else "")


def _join(node: Join) -> str:
    left, right = _namer(node.left), _namer(node.right)
    on = [_condition(condition, left, right) for condition in node.conditions]
    if node.residual:
        count = len(node.left.columns)
        both: Callable[[int], str] = lambda i: left(i) if i < count else right(i - count)  # noqa: E731
        on.append(_plain(node.residual.sql(both)))
    if not on and node.kind == "inner":
        return "cross join"
    return f"{node.kind} join{' of at most one row' if node.single else ''} on {' and '.join(on) or 'anything'}"


def _key_filter(node: KeyFilter) -> str:
    left, right = _namer(node.child), _namer(node.keys)
    return f"key filter, if cheap: {' and '.join(_condition(c, left, right) for c in node.conditions)}"


def _condition(condition: Condition, left: Callable[[int], str], right: Callable[[int], str]) -> str:
    return f"{_plain(condition.left.sql(left))} {condition.comparison} {_plain(condition.right.sql(right))}"


def _keys(node: Sort) -> str:
    return ", ".join(_plain(key.sql(_namer(node.child))) for key in node.keys)


def _namer(node: Node) -> Callable[[int], str]:
    names = [column.name for column in node.columns]
    return lambda i: names[i] if names.count(names[i]) == 1 else f"#{i}"


def _listed(exprs: Sequence[Expr], name_of: Callable[[int], str], separator: str = ", ") -> str:
    return separator.join(_plain(expr.sql(name_of)) for expr in exprs)


def _plain(text: str) -> str:
    """Without the casts that give a constant its type."""
    return re.sub(r"CAST\(('[^']*'|-?\d+) AS [A-Z_]+(?:\(\d+,\d+\))?\)", r"\1", text)
