"""Operators, from DuckDB's JSON to our plan.

DuckDB gives each operator's references as positions in its input. Where an operator of DuckDB's does several things at
once (a scan that filters and extracts, a join that drops columns), ours is several nodes.

Invariants: every field of the JSON is read or is known not to matter; else the query is not planned.
Does not know: where the JSON comes from (`binder.py`), expressions (`expressions.py`, `calls.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .calls import CallReader
from .expressions import ExpressionReader, Scope
from .fields import Fields, Json, NotPlannable
from .joins import JoinReader, as_semi
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
    SetOperation,
    Shared,
    Sort,
    Unnest,
    Window,
    column,
)
from .scans import ScanReader

# DuckDB's "no number".
_NONE = 2**64 - 1


def pick(node: Node, positions: Sequence[int]) -> Node:
    """Some of a node's columns."""
    if list(positions) == list(range(len(node.columns))):
        return node
    columns = [node.columns[i] for i in positions]
    exprs = tuple(column(i, c.type) for i, c in zip(positions, columns, strict=True))
    return Project(node, exprs, tuple(c.name for c in columns))


class Reader:
    """Reads one plan. The ids of `Shared` count from 0."""

    def __init__(self, expressions: ExpressionReader) -> None:
        self._expressions = expressions
        self._types = expressions.types
        self._calls = CallReader(expressions)
        self._joins = JoinReader(expressions)
        self._scans = ScanReader(expressions)
        self._shared = 0
        self._ctes: dict[int, Input] = {}
        self._delims: list[Node] = []
        self._readers = {
            "LOGICAL_GET": self._get,
            "LOGICAL_DUMMY_SCAN": self._dummy,
            "LOGICAL_EMPTY_RESULT": self._empty,
            "LOGICAL_EXPRESSION_GET": self._values,
            "LOGICAL_PROJECTION": self._project,
            "LOGICAL_FILTER": self._filter,
            "LOGICAL_AGGREGATE_AND_GROUP_BY": self._aggregate,
            "LOGICAL_WINDOW": self._window,
            "LOGICAL_UNNEST": self._unnest,
            "LOGICAL_ORDER_BY": self._sort,
            "LOGICAL_LIMIT": self._limit,
            "LOGICAL_DISTINCT": self._distinct,
            "LOGICAL_COMPARISON_JOIN": self._comparison_join,
            "LOGICAL_ANY_JOIN": self._any_join,
            "LOGICAL_CROSS_PRODUCT": self._cross_product,
            "LOGICAL_DELIM_JOIN": self._delim_join,
            "LOGICAL_DELIM_GET": self._delim_get,
            "LOGICAL_UNION": self._set_operation,
            "LOGICAL_EXCEPT": self._set_operation,
            "LOGICAL_INTERSECT": self._set_operation,
            "LOGICAL_MATERIALIZED_CTE": self._cte,
            "LOGICAL_CTE_REF": self._cte_reference,
        }

    def read(self, json: Json) -> Node:
        fields = Fields(json, "an operator")
        kind = fields.take("type")
        if kind not in self._readers:
            raise NotPlannable(_REFUSED.get(kind, f"the operator {kind}"))
        fields.what = f"the operator {kind}"
        fields.ignore("estimated_cardinality")
        node = self._readers[kind](kind, fields)
        fields.done()
        return node

    def _child(self, fields: Fields) -> tuple[Node, Scope]:
        """The only child, and what references to it mean."""
        (json,) = fields.take("children")
        node = self.read(json)
        return node, Scope(node.columns, json.get("table_index", json.get("group_index")))

    def _children(self, fields: Fields) -> list[Node]:
        return [self.read(json) for json in fields.take("children")]

    def _get(self, kind: str, fields: Fields) -> Node:
        children = fields.take("children")
        if not children:
            return self._scans.read(fields)
        (json,) = children
        child = self.read(json)
        return self._scans.unnest(fields, child)

    def _dummy(self, kind: str, fields: Fields) -> Node:
        fields.ignore("table_index")
        fields.expect("children", [])
        return Fixed("SELECT CAST(NULL AS INTEGER)", (Column("dummy", "INTEGER"),))

    def _empty(self, kind: str, fields: Fields) -> Node:
        fields.ignore("bindings")
        fields.expect("children", [])
        types = [self._types.type(type_) for type_ in fields.take("return_types")]
        nulls = ", ".join("NULL" if type_ == '"NULL"' else f"CAST(NULL AS {type_})" for type_ in types)
        columns = tuple(Column(f"c{i}", type_) for i, type_ in enumerate(types))
        return Fixed(f"SELECT {nulls or 'NULL'} WHERE FALSE", columns)

    def _values(self, kind: str, fields: Fields) -> Node:
        fields.ignore("table_index")
        child = self.read(fields.take("children")[0])
        if not isinstance(child, Fixed):
            raise NotPlannable("VALUES that refer to another table")
        types = [self._types.type(type_) for type_ in fields.take("expr_types")]
        rows = [[self._expressions.read(json, Scope(())) for json in row] for row in fields.take("expressions")]
        written = ", ".join("(" + ", ".join(expr.sql(()) for expr in row) + ")" for row in rows)
        columns = tuple(Column(f"c{i}", type_) for i, type_ in enumerate(types))
        return Fixed(f"VALUES {written}", columns, volatile=any(expr.volatile for row in rows for expr in row))

    def _project(self, kind: str, fields: Fields) -> Node:
        fields.ignore("table_index")
        child, scope = self._child(fields)
        jsons = fields.take("expressions")
        exprs = tuple(self._expressions.read(json, scope) for json in jsons)
        names = tuple(json.get("alias") or f"c{i}" for i, json in enumerate(jsons))
        return Project(_one_row(child, exprs), exprs, names)

    def _filter(self, kind: str, fields: Fields) -> Node:
        child, scope = self._child(fields)
        read = [self._expressions.read(json, scope) for json in fields.take("expressions")]
        child, conditions = as_semi(child, read)
        kept = fields.take("projection_map", [])
        node = Filter(child, tuple(conditions)) if conditions else child
        return pick(node, kept) if kept else node

    def _aggregate(self, kind: str, fields: Fields) -> Node:
        fields.ignore("group_index", "aggregate_index", "groupings_index", "distinct_validity")
        child, scope = self._child(fields)
        groups = tuple(self._expressions.read(json, scope) for json in fields.take("groups"))
        calls = tuple(self._calls.aggregate(json, scope) for json in fields.take("expressions"))
        sets = tuple(tuple(sorted(set_)) for set_ in fields.take("grouping_sets"))
        groupings = tuple(tuple(grouping) for grouping in fields.take("grouping_functions"))
        if sets in (((),), (tuple(range(len(groups))),)) and (sets[0] or not groups):
            sets = ()
        return Aggregate(child, groups, calls, sets, groupings)

    def _window(self, kind: str, fields: Fields) -> Node:
        fields.ignore("window_index")
        child, scope = self._child(fields)
        return Window(child, tuple(self._calls.window(json, scope) for json in fields.take("expressions")))

    def _unnest(self, kind: str, fields: Fields) -> Node:
        fields.ignore("unnest_index")
        child, scope = self._child(fields)
        exprs, types = [], []
        for json in fields.take("expressions"):
            unnest = Fields(json, "an UNNEST")
            unnest.expect("expression_class", "BOUND_UNNEST")
            unnest.expect("type", "BOUND_UNNEST")
            unnest.ignore("alias", "query_location", "query_location_length")
            exprs.append(self._expressions.read(unnest.take("child"), scope))
            types.append(self._types.type(unnest.take("return_type")))
            unnest.done()
        return Unnest(child, tuple(exprs), tuple(types))

    def _sort(self, kind: str, fields: Fields) -> Node:
        child, scope = self._child(fields)
        node = Sort(child, self._calls.sort_keys(fields.take("orders"), scope))
        kept = fields.take("projections", [])
        return pick(node, kept) if kept else node

    def _limit(self, kind: str, fields: Fields) -> Node:
        child, _ = self._child(fields)
        limit = self._bound(fields.take("limit_val"))
        offset = self._bound(fields.take("offset_val"))
        fields.expect("unpruned_offset", _NONE)
        return Limit(child, limit, offset or 0)

    def _bound(self, json: Json) -> int | None:
        fields = Fields(json, "LIMIT")
        kind, value = fields.take("type"), fields.take("constant_integer", 0)
        fields.ignore("constant_percentage")
        if kind not in ("CONSTANT_VALUE", "UNSET"):
            raise NotPlannable("a LIMIT that is not a plain number")
        fields.done()
        return int(value) if kind == "CONSTANT_VALUE" else None

    def _distinct(self, kind: str, fields: Fields) -> Node:
        child, scope = self._child(fields)
        targets = tuple(self._expressions.read(json, scope) for json in fields.take("distinct_targets"))
        ordered = Fields(fields.take("order_by", {"orders": []}), "DISTINCT ON's ORDER BY")
        order = self._calls.sort_keys(ordered.take("orders"), scope)
        ordered.done()
        type_ = fields.take("distinct_type")
        if type_ == "DISTINCT_ON":
            return Distinct(child, targets, order)
        every = set(range(len(child.columns)))
        if type_ != "DISTINCT" or order or {i for target in targets for i in target.columns} != every:
            raise NotPlannable("a DISTINCT over some of its columns")
        # Under a collation rows are the same if their columns are after it; any of them may stand for the others.
        return Distinct(child, None if {target.position for target in targets} == every else targets)

    def _comparison_join(self, kind: str, fields: Fields) -> Node:
        fields.expect("duplicate_eliminated_columns", [])
        left, right = self._children(fields)
        return self._joins.comparison(fields, left, right)

    def _any_join(self, kind: str, fields: Fields) -> Node:
        left, right = self._children(fields)
        return self._joins.any(fields, left, right)

    def _cross_product(self, kind: str, fields: Fields) -> Node:
        left, right = self._children(fields)
        return Join(left, right, "inner")

    def _delim_join(self, kind: str, fields: Fields) -> Node:
        """A join over a correlated subquery: below its right side, DELIM_GET is the distinct values of some of the
        left's columns."""
        if fields.take("delim_flipped", False):
            raise NotPlannable("a correlated subquery on the left of its join")
        left_json, right_json = fields.take("children")
        left = self.read(left_json)
        input_ = Input(self._next_id(), left.columns)
        keys = tuple(
            self._expressions.read(json, Scope(left.columns)) for json in fields.take("duplicate_eliminated_columns")
        )
        self._delims.append(Aggregate(input_, keys, ()))
        right = self.read(right_json)
        self._delims.pop()
        return Shared(input_.id, left, self._joins.comparison(fields, input_, right))

    def _delim_get(self, kind: str, fields: Fields) -> Node:
        fields.ignore("table_index")
        fields.expect("children", [])
        return self._referenced(self._delims[-1] if self._delims else None, fields.take("chunk_types"))

    def _cte(self, kind: str, fields: Fields) -> Node:
        fields.ignore("ctename", "materialize", "column_count")
        fields.expect("key_targets", [])
        definition_json, body_json = fields.take("children")
        definition = self.read(definition_json)
        input_ = Input(self._next_id(), definition.columns)
        self._ctes[fields.take("table_index")] = input_
        return Shared(input_.id, definition, self.read(body_json))

    def _cte_reference(self, kind: str, fields: Fields) -> Node:
        fields.ignore("table_index", "bound_columns", "materialized_cte")
        fields.expect("is_recurring", False)
        fields.expect("children", [])
        return self._referenced(self._ctes.get(fields.take("cte_index")), fields.take("chunk_types"))

    def _referenced(self, node: Node | None, types: list[Json]) -> Node:
        if node is None:
            raise NotPlannable("a recursive CTE")
        if [c.type for c in node.columns] != [self._types.type(type_) for type_ in types]:
            raise NotPlannable("a shared subquery whose columns do not fit its use")
        return node

    def _next_id(self) -> int:
        self._shared += 1
        return self._shared - 1

    def _set_operation(self, kind: str, fields: Fields) -> Node:
        fields.ignore("table_index", "column_count", "allow_out_of_order")
        children = tuple(self._children(fields))
        types = {tuple(c.type for c in child.columns) for child in children}
        if len(types) != 1:
            raise NotPlannable("a set operation over different types")
        is_all = bool(fields.take("setop_all"))
        match kind:
            case "LOGICAL_UNION":
                return SetOperation("union", is_all, children, children[0].columns)
            case "LOGICAL_EXCEPT":
                return SetOperation("except", is_all, children, children[0].columns)
            case _:
                return SetOperation("intersect", is_all, children, children[0].columns)


def _one_row(node: Node, exprs: Sequence[Expr]) -> Node:
    """The aggregate below a scalar subquery: a first() of rows that have to be one, or it is an error."""
    if not isinstance(node, Aggregate) or [call.function for call in node.calls] != ["first", "count_star"]:
        return node
    if not any("error(" in expr.sql(str) for expr in exprs):
        return node
    first, count = node.calls
    return replace(node, calls=(replace(first, unstable=False), count))


_REFUSED = {
    "LOGICAL_RECURSIVE_CTE": "a recursive CTE",
    "LOGICAL_ASOF_JOIN": "an ASOF join",
    "LOGICAL_POSITIONAL_JOIN": "a positional join",
    "LOGICAL_SAMPLE": "a SAMPLE",
    "LOGICAL_PIVOT": "a PIVOT",
}
