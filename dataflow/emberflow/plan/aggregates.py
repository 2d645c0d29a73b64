"""Aggregates in two phases: what each task computes over its own rows, and how those are put together.

Source: the usual decomposition of distributive and algebraic aggregates (Gray et al., "Data Cube", 1997, section 5).
What has no such form (median, list, string_agg, DISTINCT) is not split: its rows meet in one place first.
"""

from __future__ import annotations

from dataclasses import replace

from .nodes import Aggregate, Call, Expr, Node, Project, column

_INTEGERS = frozenset(
    {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "HUGEINT"}
)
_SAME = frozenset({"min", "max", "bool_and", "bool_or", "bit_and", "bit_or", "bit_xor", "any_value"})
_SUMS = frozenset({"sum", "sum_no_overflow"})
_COUNTS = frozenset({"count", "count_star"})
_AVERAGES = frozenset({"avg", "mean"})


def _is_number(type_: str) -> bool:
    return type_ in _INTEGERS or type_ in ("FLOAT", "DOUBLE") or type_.startswith("DECIMAL(")


def _partials(call: Call) -> tuple[Call, ...] | None:
    """What a task computes for the call, or None if that cannot be put together afterwards."""
    if call.distinct or call.order:
        return None
    plain = replace(call, unstable=False)
    if call.function in _COUNTS:
        return (plain,)
    if len(call.args) != 1:
        return None
    type_ = call.args[0].type
    if call.function in _SAME:
        return (plain,)
    if call.function in _SUMS and _is_number(type_):
        return (plain,)
    if call.function in _AVERAGES and _is_number(type_) and call.type == "DOUBLE":
        # DuckDB adds floats up with compensation in fsum only; its avg of floats is sum / count.
        return replace(plain, function="sum", type=_sum_type(type_)), replace(plain, function="count", type="BIGINT")
    return None


def _sum_type(type_: str) -> str:
    if type_ in _INTEGERS:
        return "HUGEINT"
    if type_.startswith("DECIMAL("):
        return f"DECIMAL(38,{type_[:-1].split(',')[1].strip()})"
    return "DOUBLE"


def _merged(call: Call, first: int) -> tuple[tuple[Call, ...], int]:
    """The calls over partial columns that begin at `first`, and how many of those columns there are."""
    if call.function in _COUNTS:
        return (Call("sum", (column(first, "BIGINT"),), "HUGEINT"),), 1
    if call.function in _AVERAGES:
        total = _sum_type(call.args[0].type)
        sums = Call("sum", (column(first, total),), total, unstable=call.unstable)
        return (sums, Call("sum", (column(first + 1, "BIGINT"),), "HUGEINT")), 2
    return (Call(call.function, (column(first, call.type),), call.type, unstable=call.unstable),), 1


def _final(call: Call, position: int) -> Expr:
    """The call's value, from merged columns that begin at `position`."""
    if call.function in _COUNTS:
        return Expr(("CAST(coalesce(", position, ", 0) AS BIGINT)"), "BIGINT")
    if call.function in _AVERAGES:
        pieces = ("(CAST(", position, " AS DOUBLE) / CAST(nullif(", position + 1, ", 0) AS DOUBLE))")
        return Expr(pieces, "DOUBLE", unstable=True)
    return Expr(("CAST(", position, f" AS {call.type})"), call.type)


def split(node: Aggregate) -> tuple[Aggregate, Aggregate, Project] | None:
    """(per task, over the partial rows, to the node's own columns); None if the node has to see all rows at once.

    The second's child is only a stand-in with the first's columns: the caller puts the exchange there.
    """
    partials = [_partials(call) for call in node.calls]
    if any(partial is None for partial in partials):
        return None
    first = Aggregate(node.child, node.groups, tuple(call for partial in partials if partial for call in partial))
    width = len(node.groups)
    keys = tuple(column(i, group.type) for i, group in enumerate(node.groups))
    merged: list[Call] = []
    finals: list[Expr] = list(keys)
    position = width
    for call in node.calls:
        finals.append(_final(call, width + len(merged)))
        calls, used = _merged(call, position)
        merged += calls
        position += used
    second = Aggregate(first, keys, tuple(merged), node.sets, node.groupings)
    offset = width + len(merged)
    finals += [column(offset + i, "BIGINT") for i in range(len(node.groupings))]
    return first, second, Project(second, tuple(finals), tuple(c.name for c in node.columns))


def again(first: Aggregate, second: Aggregate) -> Project:
    """Partial rows from partial rows, in the same columns: `second`, over some of them, as `first` would give it."""
    exprs = tuple(Expr(("CAST(", i, f" AS {c.type})"), c.type) for i, c in enumerate(first.columns))
    return Project(second, exprs, tuple(c.name for c in first.columns))


def distinct_first(node: Aggregate) -> tuple[Node, Aggregate] | None:
    """(rows made distinct, the aggregate over those) where every call is DISTINCT over the same one argument."""
    args = {call.args for call in node.calls}
    whole = all(call.distinct and call.filter is None and not call.order for call in node.calls)
    if not node.calls or not whole or len(args) != 1 or not node.is_plain:
        return None
    exprs = (*node.groups, *next(iter(args)))
    rows = Aggregate(node.child, exprs, ())
    width = len(node.groups)
    own = tuple(column(width + i, expr.type) for i, expr in enumerate(exprs[width:]))
    # No two rows are equal now, so DISTINCT has nothing left to do.
    calls = tuple(replace(call, args=own, distinct=False) for call in node.calls)
    return rows, Aggregate(rows, tuple(column(i, g.type) for i, g in enumerate(node.groups)), calls)
