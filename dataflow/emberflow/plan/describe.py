"""A plan as text for people: one line for each operator, indented under what reads it."""

from __future__ import annotations

from collections.abc import Iterator

from .nodes import (
    Aggregate,
    Call,
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
)


def describe(node: Node) -> str:
    """The plan, its root first. `#2` is the column at position 2 of what the line reads."""
    return "\n".join(_lines(node, ""))


def _lines(node: Node, indent: str) -> Iterator[str]:
    yield f"{indent}{_line(node)}"
    for child in node.children:
        yield from _lines(child, indent + "  ")


def _line(node: Node) -> str:
    match node:
        case Scan():
            return f"scan {node.table}: {', '.join(column.name for column in node.columns)}"
        case Input():
            return f"input {node.id}: {', '.join(column.name for column in node.columns)}"
        case Fixed():
            return f"fixed: {node.sql}"
        case Filter():
            return f"filter {' and '.join(map(_expr, node.conditions))}"
        case Project():
            return f"project {', '.join(map(_expr, node.exprs))}"
        case Aggregate():
            keys = f" by {', '.join(map(_expr, node.groups))}" if node.groups else ""
            return f"aggregate {', '.join(map(_call, node.calls)) or 'nothing'}{keys}"
        case Join():
            on = [f"{_expr(c.left)} {c.comparison} right {_expr(c.right)}" for c in node.conditions]
            residual = [_expr(node.residual)] if node.residual is not None else []
            return f"{node.kind} join on {' and '.join(on + residual) or 'everything'}"
        case Sort():
            return f"sort by {_keys(node.keys)}"
        case Limit():
            return f"limit {'all' if node.limit is None else node.limit} offset {node.offset}"
        case Distinct():
            return f"distinct{'' if node.on is None else ' on ' + ', '.join(map(_expr, node.on))}"
        case Window():
            return f"window {', '.join(_expr(call.expr) for call in node.calls)}"
        case Unnest():
            return f"unnest {', '.join(map(_expr, node.exprs))}"
        case SetOperation():
            return f"{node.kind}{' all' if node.all else ''}"
        case Shared():
            return f"shared {node.id}"


def _expr(expr: Expr) -> str:
    return expr.sql(lambda position: f"#{position}")


def _keys(keys: tuple[SortKey, ...]) -> str:
    return ", ".join(key.sql(lambda position: f"#{position}") for key in keys)


def _call(call: Call) -> str:
    order = f" order by {_keys(call.order)}" if call.order else ""
    text = f"{call.function}({'distinct ' if call.distinct else ''}{', '.join(map(_expr, call.args))}{order})"
    return text if call.filter is None else f"{text} where {_expr(call.filter)}"
