"""A plan, or a part of one, as SQL text for DuckDB to run.

Every operator is a subselect with output columns c0..cN, referred to by an alias, so that nothing in the text depends
on how names are looked up. Filters go into the WHERE of what reads them; an ORDER BY stands in the same SELECT as the
LIMIT or the projection above it, because a subselect's order is nobody's promise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..query import quoted
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
    walk,
)

Source: TypeAlias = Callable[[Scan | Input], str]

_JOINS = {"inner": "JOIN", "left": "LEFT JOIN", "right": "RIGHT JOIN", "full": "FULL JOIN"}
_HALVES = {"semi": "SEMI JOIN", "anti": "ANTI JOIN", "right_semi": "SEMI JOIN", "right_anti": "ANTI JOIN"}
_IN_FROM = Scan | Fixed | Input | Filter | Join | KeyFilter
_NULL_SAFE = ("IS DISTINCT FROM", "IS NOT DISTINCT FROM")


def select(node: Node, *, source: Source, names: Sequence[str] | None = None) -> str:
    """A whole SELECT. `source` gives what stands in FROM for a leaf: a Scan's columns are found in it by name, an
    Input's as c0..cN. `names` are those of the output columns; without them they are c0..cN."""
    return _Renderer(source, {}).select(node, names)


@dataclass(frozen=True, slots=True)
class _Block:
    """What a SELECT reads: its FROM with the conditions on it, and how its columns are called there."""

    text: str
    names: tuple[str, ...]
    has_where: bool = False

    def where(self, conditions: Sequence[Expr]) -> _Block:
        written = " AND ".join(condition.sql(self.names) for condition in conditions)
        return replace(self, text=f"{self.text} {'AND' if self.has_where else 'WHERE'} {written}", has_where=True)


class _Renderer:
    def __init__(self, source: Source, shared: Mapping[int, str]) -> None:
        self._source = source
        self._shared = shared
        """The names of the CTEs that stand for an Input."""

    def select(self, node: Node, names: Sequence[str] | None = None) -> str:
        aliases = [quoted(name) for name in names] if names else [f"c{i}" for i in range(len(node.columns))]
        node = self._with_before(node)
        match node:
            case Shared():
                return self._shared_first(node, names)
            case SetOperation():
                return self._set_operation(node, aliases)
            case Aggregate():
                return self._aggregate(node, aliases)
            case Distinct():
                return self._distinct(node, aliases)
            case Join(kind="mark") | Join(single=True):
                return self._subquery(node, aliases)
            case Window():
                block = self._block(node.child, "t")
                return _list([*block.names, *(call.expr.sql(block.names) for call in node.calls)], aliases, block.text)
            case Unnest():
                block = self._block(node.child, "t")
                unnested = [f"unnest({expr.sql(block.names)})" for expr in node.exprs]
                return _list([*block.names, *unnested], aliases, block.text)
            case _:
                return self._rows(node, aliases)

    def _shared_first(self, node: Shared, names: Sequence[str] | None) -> str:
        definitions = []
        renderer = self
        body: Node = node
        while isinstance(body, Shared):
            name = f"shared{body.id}" if body.id >= 0 else f"before{-body.id}"
            definitions.append(f"{name} AS MATERIALIZED ({renderer.select(body.definition)})")
            renderer = _Renderer(self._source, {**renderer._shared, body.id: name})
            body = renderer._with_before(body.body)
        return f"WITH {', '.join(definitions)} {renderer.select(body, names)}"

    def _with_before(self, node: Node) -> Node:
        """DuckDB 1.4 cannot take apart a correlated subquery with a WITH in it, so the subquery's rows go before."""
        if not isinstance(node, Join) or not (node.kind == "mark" or node.single):
            return node
        if not any(isinstance(each, Shared) for each in walk(node.right)):
            return node
        before = Input(-1 - len(self._shared), node.right.columns)
        return Shared(before.id, node.right, replace(node, right=before))

    def _rows(self, node: Node, aliases: Sequence[str]) -> str:
        """A projection, a limit and an order, as far as they are there, in one SELECT."""
        project = limit = sort = None
        below = node
        if isinstance(below, Project):
            project, below = below, below.child
        # What is computed above a limit is computed for its rows only; for the others it might fail.
        if isinstance(below, Limit) and (project is None or all(expr.position is not None for expr in project.exprs)):
            limit, below = below, below.child
            if isinstance(below, Project) and project is None:
                project, below = below, below.child
        if isinstance(below, Sort):
            sort, below = below, below.child
        assert below is not node or isinstance(node, _IN_FROM), type(node).__name__
        block = self._block(below, "t")
        exprs = [expr.sql(block.names) for expr in project.exprs] if project else block.names
        text = _list(exprs, aliases, block.text)
        if sort:
            text += f" ORDER BY {', '.join(key.sql(block.names) for key in sort.keys)}"
        if limit and limit.limit is not None:
            text += f" LIMIT {limit.limit}"
        return text + (f" OFFSET {limit.offset}" if limit and limit.offset else "")

    def _block(self, node: Node, alias: str) -> _Block:
        match node:
            case Filter():
                return self._block(node.child, alias).where(node.conditions)
            case Scan():
                names = tuple(f"{alias}.{quoted(c.name)}" for c in node.columns)
                return _Block(f"{self._source(node)} AS {alias}", names)
            case Input():
                text = self._shared.get(node.id) or self._source(node)
                return _Block(f"{text} AS {alias}", _names(node, alias))
            case Fixed():
                columns = ", ".join(f"c{i}" for i in range(len(node.columns)))
                return _Block(f"({node.sql}) AS {alias}({columns})", _names(node, alias))
            case Join() if node.kind != "mark" and not node.single:
                return self._join(node, alias)
            case KeyFilter():
                return self._join(node.join, alias)
            case _:
                return self._subselect(node, alias)

    def _subselect(self, node: Node, alias: str) -> _Block:
        return _Block(f"({self.select(node)}) AS {alias}", _names(node, alias))

    def _join(self, node: Join, alias: str) -> _Block:
        left, right = self._side(node.left, f"{alias}l"), self._side(node.right, f"{alias}r")
        both = (*left.names, *right.names)
        on = [_compared(condition, left.names, right.names) for condition in node.conditions]
        on += [node.residual.sql(both)] if node.residual else []
        condition = f" ON {' AND '.join(on) or 'TRUE'}"
        if node.kind in ("right_semi", "right_anti"):
            return _Block(f"{right.text} {_HALVES[node.kind]} {left.text}{condition}", right.names)
        if node.kind in _HALVES:
            return _Block(f"{left.text} {_HALVES[node.kind]} {right.text}{condition}", left.names)
        if node.kind == "inner" and not on:
            return _Block(f"{left.text} CROSS JOIN {right.text}", both)
        return _Block(f"{left.text} {_JOINS[node.kind]} {right.text}{condition}", both)

    def _side(self, node: Node, alias: str) -> _Block:
        """A side of a join: one table, because neither a WHERE nor another JOIN may stand there."""
        return self._block(node, alias) if isinstance(node, Scan | Input | Fixed) else self._subselect(node, alias)

    def _subquery(self, node: Join, aliases: Sequence[str]) -> str:
        """A mark (IN, ANY, EXISTS) and a join that may match one row (a scalar subquery) as the subquery they were,
        so that NULLs and the error for a second row are DuckDB's own."""
        left, right = self._side(node.left, "l"), self._block(node.right, "r")
        nullable = [c for c in node.conditions if node.kind == "mark" and c.comparison not in _NULL_SAFE]
        picks = [_compared(c, left.names, right.names) for c in node.conditions if c not in nullable]
        picks += [node.residual.sql((*left.names, *right.names))] if node.residual else []
        where = f" {'AND' if right.has_where else 'WHERE'} {' AND '.join(picks)}" if picks else ""
        if node.kind != "mark":
            return self._single(node, left, right, where, aliases)
        if not nullable:
            mark = f"EXISTS (SELECT 1 FROM {right.text}{where})"
        else:
            asked = ", ".join(c.left.sql(left.names) for c in nullable)
            values = ", ".join(c.right.sql(right.names) for c in nullable)
            operator = "IN" if nullable[0].comparison == "=" else f"{nullable[0].comparison} ANY"
            asked = f"({asked})" if len(nullable) > 1 else asked
            mark = f"{asked} {operator} (SELECT {values} FROM {right.text}{where})"
        return _list([*left.names, f"({mark})"], aliases, left.text)

    def _single(self, node: Join, left: _Block, right: _Block, where: str, aliases: Sequence[str]) -> str:
        packed = ", ".join(f"c{i} := {name}" for i, name in enumerate(right.names))
        inner = _list(
            [*left.names, f"(SELECT struct_pack({packed}) FROM {right.text}{where})"],
            [*(f"c{i}" for i in range(len(left.names))), "s"],
            left.text,
        )
        outer = [f"t.c{i}" for i in range(len(left.names))]
        outer += [f"struct_extract(t.s, 'c{i}')" for i in range(len(right.names))]
        return _list(outer, aliases, f"({inner}) AS t")

    def _set_operation(self, node: SetOperation, aliases: Sequence[str]) -> str:
        word = f" {node.kind.upper()}{' ALL' if node.all else ''} "
        first, *rest = node.children
        selects = [f"({self.select(child)})" for child in (first, *rest)]
        names = [f"t.c{i}" for i in range(len(node.columns))]
        return _list(names, aliases, f"({word.join(selects)}) AS t")

    def _aggregate(self, node: Aggregate, aliases: Sequence[str]) -> str:
        block = self._block(node.child, "t")
        groups = [group.sql(block.names) for group in node.groups]
        if not node.is_plain:
            # GROUPING() and the sets name the groups, so they have to be columns.
            needed = sorted({i for call in node.calls for i in _call_columns(call)})
            inner = _list(
                [*groups, *(block.names[i] for i in needed)],
                [f"g{i}" for i in range(len(groups))] + [f"c{i}" for i in needed],
                block.text,
            )
            block = _Block(f"({inner}) AS t", tuple(f"t.c{i}" for i in range(len(block.names))))
            groups = [f"t.g{i}" for i in range(len(groups))]
        exprs = [*groups, *(_called(call, block.names) for call in node.calls)]
        exprs += [f"GROUPING({', '.join(groups[i] for i in grouping)})" for grouping in node.groupings]
        by = ""
        if not node.is_plain:
            sets = ", ".join(f"({', '.join(groups[i] for i in set_)})" for set_ in node.sets)
            by = f" GROUP BY GROUPING SETS ({sets})"
        elif groups:
            by = f" GROUP BY {', '.join(str(i + 1) for i in range(len(groups)))}"
        return _list(exprs, aliases, block.text) + by

    def _distinct(self, node: Distinct, aliases: Sequence[str]) -> str:
        block = self._block(node.child, "t")
        if node.on is None:
            return _list(block.names, aliases, block.text, distinct="DISTINCT ")
        on = ", ".join(expr.sql(block.names) for expr in node.on)
        order = ", ".join(key.sql(block.names) for key in node.order)
        text = _list(block.names, aliases, block.text, distinct=f"DISTINCT ON ({on}) ")
        return text + (f" ORDER BY {order}" if order else "")


def _names(node: Node, alias: str) -> tuple[str, ...]:
    return tuple(f"{alias}.c{i}" for i in range(len(node.columns)))


def _list(exprs: Sequence[str], aliases: Sequence[str], text: str, *, distinct: str = "") -> str:
    written = ", ".join(f"{expr} AS {alias}" for expr, alias in zip(exprs, aliases, strict=True))
    return f"SELECT {distinct}{written or 'NULL'} FROM {text}"


def _compared(condition: Condition, left: Sequence[str], right: Sequence[str]) -> str:
    return f"({condition.left.sql(left)} {condition.comparison} {condition.right.sql(right)})"


def _called(call: Call, names: Sequence[str]) -> str:
    if call.function == "count_star":
        inner = "*"
    else:
        inner = ("DISTINCT " if call.distinct else "") + ", ".join(arg.sql(names) for arg in call.args)
        inner += f" ORDER BY {', '.join(key.sql(names) for key in call.order)}" if call.order else ""
    written = f"{quoted(call.function) if call.function != 'count_star' else 'count'}({inner})"
    return written + (f" FILTER (WHERE {call.filter.sql(names)})" if call.filter else "")


def _call_columns(call: Call) -> frozenset[int]:
    exprs = [*call.args, *(key.expr for key in call.order), *([call.filter] if call.filter else [])]
    return frozenset().union(*(expr.columns for expr in exprs)) if exprs else frozenset()
