"""Aggregates and window functions, from DuckDB's JSON to calls.

Invariant: a call is marked unstable unless its value is known not to depend on the order of the rows it sees.
"""

from __future__ import annotations

from typing import Literal

from .expressions import ExpressionReader, Scope, separated, text
from .fields import Fields, Json, NotPlannable
from .functions import is_stable, restore
from .nodes import Call, Expr, SortKey, WindowCall

_WINDOWS = {
    "WINDOW_ROW_NUMBER": "row_number",
    "WINDOW_RANK": "rank",
    "WINDOW_RANK_DENSE": "dense_rank",
    "WINDOW_NTILE": "ntile",
    "WINDOW_PERCENT_RANK": "percent_rank",
    "WINDOW_CUME_DIST": "cume_dist",
    "WINDOW_FIRST_VALUE": "first_value",
    "WINDOW_LAST_VALUE": "last_value",
    "WINDOW_NTH_VALUE": "nth_value",
    "WINDOW_LEAD": "lead",
    "WINDOW_LAG": "lag",
}
# They count peers as one, so ties do not matter.
_TIES_ARE_EQUAL = frozenset(("rank", "dense_rank", "percent_rank", "cume_dist"))
_EXCLUDE = {"NO_OTHER": "", "CURRENT_ROW": " EXCLUDE CURRENT ROW", "GROUP": " EXCLUDE GROUP", "TIES": " EXCLUDE TIES"}
_DIRECTIONS = {"ASCENDING": False, "DESCENDING": True}
_NULLS = {"NULLS FIRST": True, "NULLS LAST": False}


class CallReader:
    def __init__(self, expressions: ExpressionReader) -> None:
        self._expressions = expressions

    def sort_keys(self, orders: list[Json], scope: Scope) -> tuple[SortKey, ...]:
        keys = []
        for order in orders:
            fields = Fields(order, "an ORDER BY")
            direction, nulls = fields.take("type"), fields.take("null_order")
            if direction not in _DIRECTIONS or nulls not in _NULLS:
                raise NotPlannable(f"ORDER BY {direction} {nulls}")
            expr = self._expressions.read(fields.take("expression"), scope)
            fields.done()
            keys.append(SortKey(expr, _DIRECTIONS[direction], _NULLS[nulls]))
        return tuple(keys)

    def aggregate(self, json: Json, scope: Scope) -> Call:
        fields = Fields(json, "an aggregate")
        fields.expect("expression_class", "BOUND_AGGREGATE")
        fields.expect("type", "BOUND_AGGREGATE")
        fields.ignore("alias", "query_location", "query_location_length")
        fields.expect("state_export", "NONE")
        return_type = fields.take("return_type")
        name, args = self._function(fields, scope, return_type)
        kind = fields.take("aggregate_type")
        if kind not in ("DISTINCT", "NON_DISTINCT"):
            raise NotPlannable(f"an aggregate of the kind {kind}")
        condition = fields.take("filter", None)
        ordered = Fields(fields.take("order_bys", {"orders": []}), "an aggregate's ORDER BY")
        order = self.sort_keys(ordered.take("orders"), scope)
        ordered.done()
        fields.done()
        return Call(
            function=name,
            args=tuple(args),
            type=self._expressions.types.type(return_type),
            distinct=kind == "DISTINCT",
            filter=self._expressions.read(condition, scope) if condition else None,
            order=order,
            unstable=not is_stable(name, args, order),
        )

    def _function(self, fields: Fields, scope: Scope, return_type: Json) -> tuple[str, list[Expr]]:
        name = self._expressions.function_name(fields)
        children = fields.take("children")
        data = self._expressions.function_data(fields, name)
        self._expressions.check_arguments(fields, name, len(children), has_data=bool(len(data)))
        fields.ignore("is_operator")
        args = [self._expressions.read(child, scope) for child in children]
        if len(data):
            name, args = restore(name, args, data, self._expressions.types, return_type)
        data.done()
        return name, args

    def window(self, json: Json, scope: Scope) -> WindowCall:
        fields = Fields(json, "a window function")
        fields.expect("expression_class", "BOUND_WINDOW")
        fields.ignore("alias", "query_location", "query_location_length", "partitions_stats", "expr_stats")
        kind = fields.take("type")
        return_type = fields.take("return_type")
        name, args = self._window_function(kind, fields, scope, return_type)
        read = self._expressions.read
        partitions = tuple(read(partition, scope) for partition in fields.take("partitions"))
        orders = fields.take("orders")
        order_by = self.sort_keys(orders, scope)
        arg_order = self.sort_keys(fields.take("arg_orders", []), scope)
        inner: list[str | Expr] = ["DISTINCT "] if fields.take("distinct") else []
        inner += separated(args) if name != "count_star" else ["*"]
        if arg_order:
            inner += [" ORDER BY ", *_keys(arg_order)]
        if fields.take("ignore_nulls"):
            inner += [" IGNORE NULLS"]
        condition = fields.take("filters", None) or fields.take("filter_expr", None)
        outer: list[str | Expr] = [" FILTER (WHERE ", read(condition, scope), ")"] if condition else []
        over: list[str | Expr] = ["PARTITION BY ", *separated(partitions), " "] if partitions else []
        if order_by:
            over += ["ORDER BY ", *_keys(order_by), " "]
        frame, unit = self._frame(fields, orders, order_by, scope)
        # 2.0 keeps the bounds of a RANGE as they were written, and how it took them; the text is bound anew.
        fields.ignore("sql_range_start", "sql_range_end", "sql_range_start_boundary", "sql_range_end_boundary")
        fields.ignore("sql_range_order_type", "sql_range_order_casts")
        fields.done()
        called = "count" if name == "count_star" else self._expressions.called(name)
        type_ = self._expressions.types.type(return_type)
        expr = text(type_, called, "(", *inner, ")", *outer, " OVER (", *over, *frame, ")")
        if not _is_stable_window(kind, name, args, arg_order, unit):
            expr = Expr(expr.pieces, expr.type, expr.volatile, True)
        return WindowCall(expr, partitions, order_by)

    def _window_function(self, kind: str, fields: Fields, scope: Scope, return_type: Json) -> tuple[str, list[Expr]]:
        if kind == "WINDOW_AGGREGATE":
            return self._function(fields, scope, return_type)
        if kind not in _WINDOWS:
            raise NotPlannable(f"the window function {kind}")
        # 2.0 has an offset and a default among the children.
        apart = [fields.take(name, None) for name in ("offset_expr", "default_expr")]
        children = [*fields.take("children"), *(json for json in apart if json)]
        return _WINDOWS[kind], [self._expressions.read(child, scope) for child in children]

    def _frame(
        self, fields: Fields, orders: list[Json], order_by: tuple[SortKey, ...], scope: Scope
    ) -> tuple[list[str | Expr], str]:
        """The frame, always written out, and its unit."""
        start, end = fields.take("start"), fields.take("end")
        units = {bound.rsplit("_", 1)[1] for bound in (start, end) if not bound.startswith("UNBOUNDED")}
        if len(units) > 1 or not units <= {"ROWS", "RANGE", "GROUPS"}:
            raise NotPlannable(f"a window frame from {start} to {end}")
        unit = units.pop() if units else "ROWS"
        low = self._bound(start, fields.take("start_expr", None), orders, order_by, scope)
        high = self._bound(end, fields.take("end_expr", None), orders, order_by, scope)
        exclude = _EXCLUDE[fields.take("exclude_clause")]
        whole = not units and start.startswith("UNBOUNDED") and end.startswith("UNBOUNDED")
        return [f"{unit} BETWEEN ", *low, " AND ", *high, exclude], "WHOLE" if whole and not exclude else unit

    def _bound(
        self, bound: str, json: Json, orders: list[Json], order_by: tuple[SortKey, ...], scope: Scope
    ) -> list[str | Expr]:
        if bound.startswith("UNBOUNDED"):
            return [bound.replace("_", " ")]
        if bound.startswith("CURRENT_ROW"):
            return ["CURRENT ROW"]
        direction: Literal["PRECEDING", "FOLLOWING"] = "PRECEDING" if "PRECEDING" in bound else "FOLLOWING"
        if bound.endswith("RANGE"):
            json = self._range_offset(direction, json, orders, order_by[0])
        return [self._expressions.read(json, scope), f" {direction}"]

    def _range_offset(self, direction: str, json: Json, orders: list[Json], key: SortKey) -> Json:
        """DuckDB has made `key - offset` (or `+`, by the direction) of `offset PRECEDING`; the offset is wanted."""
        operator = "-" if (direction == "PRECEDING") != key.descending else "+"
        children = json.get("children", ())
        name = json.get("name") or json.get("qname", {}).get("path", [""])[-1]
        key_json = orders[0]["expression"]
        # A DATE with an INTERVAL taken off is a TIMESTAMP, and then so is the key.
        keys = [_bare(key_json), *(_bare(child) for child in key_json.get("children", [key_json.get("child")]))]
        if len(children) != 2 or name != operator or _bare(children[0]) not in keys:
            raise NotPlannable("a RANGE frame whose bound DuckDB has rewritten")
        return children[1]


def _bare(json: Json) -> Json:
    """An expression without what only error messages use."""
    if isinstance(json, list):
        return [_bare(item) for item in json]
    if isinstance(json, dict):
        return {k: _bare(v) for k, v in json.items() if k not in ("alias", "query_location", "query_location_length")}
    return json


def _keys(keys: tuple[SortKey, ...]) -> list[str | Expr]:
    parts: list[str | Expr] = []
    for key in keys:
        direction = f" {'DESC' if key.descending else 'ASC'} NULLS {'FIRST' if key.nulls_first else 'LAST'}"
        parts += [", "] if parts else []
        parts += [key.expr, direction]
    return parts


def _is_stable_window(kind: str, name: str, args: list[Expr], order: tuple[SortKey, ...], unit: str) -> bool:
    """Rows that tie in the window's order come in any order, which a frame of ROWS sees and others do not."""
    if kind != "WINDOW_AGGREGATE":
        return name in _TIES_ARE_EQUAL
    return is_stable(name, args, order) and unit != "ROWS"
