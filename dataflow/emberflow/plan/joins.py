"""Joins, from DuckDB's JSON to our plan.

Invariant: a condition that compares one side with the other is a `Condition`, so that a hash join can be seen; what
else a join asks of a pair of rows is its residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .expressions import COMPARISONS, ExpressionReader, Scope, conjunction
from .fields import Fields, Json, NotPlannable
from .nodes import Comparison, Condition, Expr, Join, JoinKind, Node, Project, column

_KINDS: dict[str, JoinKind] = {
    "INNER": "inner",
    "LEFT": "left",
    "RIGHT": "right",
    "FULL": "full",
    "SEMI": "semi",
    "ANTI": "anti",
    "RIGHT_SEMI": "right_semi",
    "RIGHT_ANTI": "right_anti",
    "MARK": "mark",
    "SINGLE": "left",
}
_NULL_SAFE = ("IS DISTINCT FROM", "IS NOT DISTINCT FROM")
_FLIPPED: dict[Comparison, Comparison] = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


class JoinReader:
    def __init__(self, expressions: ExpressionReader) -> None:
        self._expressions = expressions

    def comparison(self, fields: Fields, left: Node, right: Node) -> Node:
        """A join with a list of conditions."""
        conditions, residuals = [], []
        for json in fields.take("conditions"):
            condition = Fields(json, "a join's condition")
            kind = condition.take("comparison")
            if kind in COMPARISONS:
                first = self._expressions.read(condition.take("left"), Scope(left.columns))
                second = self._expressions.read(condition.take("right"), Scope(right.columns))
                conditions.append(Condition(first, second, COMPARISONS[kind]))
            elif kind == "INVALID" and "right" not in condition:
                # 2.0: any predicate over both sides.
                both = Scope(left.columns + right.columns)
                residuals.append(self._expressions.read(condition.take("left"), both))
            else:
                raise NotPlannable(f"a join over {kind}")
            condition.done()
        correlated = len(fields.take("mark_types", []))
        return self._join(fields, left, right, conditions, residuals, correlated)

    def any(self, fields: Fields, left: Node, right: Node) -> Node:
        """A join with one predicate; 1.4 makes one of every outer join that has more than comparisons."""
        conditions, residuals = [], []
        for json in _conjuncts(fields.take("condition")):
            condition = self._as_condition(json, left, right)
            if condition:
                conditions.append(condition)
            else:
                residuals.append(self._expressions.read(json, Scope(left.columns + right.columns)))
        if fields.take("mark_types", []):
            raise NotPlannable("an ANY or ALL subquery over a general predicate")
        return self._join(fields, left, right, conditions, residuals, 0)

    def _as_condition(self, json: Json, left: Node, right: Node) -> Condition | None:
        """The comparison as a condition, if each of its sides looks at one side of the join."""
        operator = COMPARISONS.get(json["type"])
        if operator is None:
            return None
        sides = [json["left"], json["right"]] if "left" in json else json["children"]
        both = Scope(left.columns + right.columns)
        first, second = (self._expressions.read(side, both) for side in sides)
        count = len(left.columns)
        if _is_right(first, count) and _is_left(second, count):
            first, second, operator = second, first, _FLIPPED.get(operator, operator)
        if _is_left(first, count) and _is_right(second, count):
            return Condition(first, second.moved(lambda position: position - count), operator)
        return None

    def _join(
        self,
        fields: Fields,
        left: Node,
        right: Node,
        conditions: Sequence[Condition],
        residuals: Sequence[Expr],
        correlated: int,
    ) -> Node:
        fields.ignore("mark_index", "delim_flipped")
        type_ = fields.take("join_type")
        if type_ not in _KINDS:
            raise NotPlannable(f"a join of the kind {type_}")
        kind = _KINDS[type_]
        if any(condition.left.type != condition.right.type for condition in conditions):
            raise NotPlannable("a join over keys of two types")
        if kind == "mark":
            _check_mark(conditions, residuals, correlated)
        residual = conjunction(residuals) if residuals else None
        node = Join(left, right, kind, tuple(conditions), residual, single=type_ == "SINGLE")
        kept_left = fields.take("left_projection_map", []) or list(range(len(left.columns)))
        kept_right = fields.take("right_projection_map", []) or list(range(len(right.columns)))
        if kind in ("semi", "anti", "mark"):
            kept = kept_left + ([len(left.columns)] if kind == "mark" else [])
        elif kind in ("right_semi", "right_anti"):
            kept = kept_right
        else:
            kept = kept_left + [len(left.columns) + i for i in kept_right]
        if kept == list(range(len(node.columns))):
            return node
        columns = [node.columns[i] for i in kept]
        exprs = tuple(column(i, c.type) for i, c in zip(kept, columns, strict=True))
        return Project(node, exprs, tuple(c.name for c in columns))


def as_semi(join: Node, conditions: Sequence[Expr]) -> tuple[Node, list[Expr]]:
    """A filter on the mark of a mark join as a semi join, or an anti join where the mark is never NULL; with the
    conditions that are left over. The mark's column stays, as the constant it has become."""
    if not isinstance(join, Join) or join.kind != "mark":
        return join, list(conditions)
    mark = len(join.left.columns)
    rest = [condition for condition in conditions if mark not in condition.columns]
    asked = {condition.pieces for condition in conditions if mark in condition.columns}
    is_null_safe = all(condition.comparison in _NULL_SAFE for condition in join.conditions)
    if asked == {(mark,)}:
        kind: JoinKind = "semi"
    elif asked == {("(NOT ", mark, ")")} and is_null_safe:
        kind = "anti"
    else:
        return join, list(conditions)
    known = Expr(("TRUE" if kind == "semi" else "FALSE",), "BOOLEAN")
    exprs = (*(column(i, c.type) for i, c in enumerate(join.left.columns)), known)
    return Project(replace(join, kind=kind), exprs, tuple(c.name for c in join.columns)), rest


def _check_mark(conditions: Sequence[Condition], residuals: Sequence[Expr], correlated: int) -> None:
    """What a mark is when a condition is NULL is plain for IN over a row and for one ANY, each within the rows that
    the correlation (comparisons that are never NULL) picks."""
    nullable = [condition for condition in conditions if condition.comparison not in _NULL_SAFE]
    if residuals or len(conditions) - len(nullable) < correlated:
        raise NotPlannable("a subquery whose NULLs DuckDB's plan does not tell")
    if len(nullable) > 1 and any(condition.comparison != "=" for condition in nullable):
        raise NotPlannable("an ANY or ALL subquery over rows")


def _conjuncts(json: Json) -> list[Json]:
    if json["type"] != "CONJUNCTION_AND":
        return [json]
    return [conjunct for child in json["children"] for conjunct in _conjuncts(child)]


def _is_left(expr: Expr, count: int) -> bool:
    return bool(expr.columns) and max(expr.columns) < count


def _is_right(expr: Expr, count: int) -> bool:
    return bool(expr.columns) and min(expr.columns) >= count
