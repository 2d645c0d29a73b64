"""The plan: relational operators over columns known by position.

DuckDB binds the SQL; this is what we keep of its answer. An expression is kept as the SQL text it will run as, cut
where it names a column of its input, so the plan can be rearranged and cut into stages without a second type checker.

Invariants: an `Expr` refers to the output columns of the node's child (of both, the left's first, under a `Join`), and
says everything about types in its own text: casts are written out. Nodes are values: equal plans are equal.

Does not know: files, tasks, or how DuckDB's JSON looks (`reader.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class Column:
    """An output column. Names need not be unique; nothing looks a column up by its name."""

    name: str
    type: str
    """As DuckDB writes it: "DECIMAL(15,2)", "STRUCT(a INTEGER)[]"."""


@dataclass(frozen=True, slots=True)
class Expr:
    """SQL text with holes: an `int` stands for the input column at that position."""

    pieces: tuple[str | int, ...]
    type: str
    volatile: bool = False
    """Two evaluations may differ: random(), uuid(), nextval()."""
    unstable: bool = False
    """The value may depend on the order of rows or of additions: a float sum, first(), list() without an order."""

    @property
    def columns(self) -> frozenset[int]:
        """The positions it refers to."""
        return frozenset(piece for piece in self.pieces if isinstance(piece, int))

    @property
    def position(self) -> int | None:
        """The column's position if the expression is one bare column."""
        return self.pieces[0] if len(self.pieces) == 1 and isinstance(self.pieces[0], int) else None

    def sql(self, names: Sequence[str] | Callable[[int], str]) -> str:
        """The text, with column i written as names[i] (or names(i))."""
        name_of = names if callable(names) else names.__getitem__
        return "".join(piece if isinstance(piece, str) else name_of(piece) for piece in self.pieces)

    def moved(self, position_of: Mapping[int, int] | Callable[[int], int]) -> Expr:
        """The same over an input whose columns stand elsewhere."""
        where = position_of if callable(position_of) else position_of.__getitem__
        return replace(self, pieces=tuple(p if isinstance(p, str) else where(p) for p in self.pieces))


def column(position: int, type: str) -> Expr:
    """The expression that is one column."""
    return Expr((position,), type)


@dataclass(frozen=True, slots=True)
class Scan:
    """Rows of a table the binder was given, by its shadow's name. `positions` are the columns read, in order."""

    table: str
    positions: tuple[int, ...]
    columns: tuple[Column, ...]

    @property
    def children(self) -> tuple[Node, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Fixed:
    """Rows that need no input: VALUES, one row of nothing (`SELECT 1`), no rows, or a table function like range().

    `sql` is a whole SELECT; its columns come in the order of `columns`, under any names.
    """

    sql: str
    columns: tuple[Column, ...]
    volatile: bool = False

    @property
    def children(self) -> tuple[Node, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Input:
    """A leaf that stands for rows made elsewhere: the output of another stage, of a CTE, or of a DELIM join's left."""

    id: int
    columns: tuple[Column, ...]

    @property
    def children(self) -> tuple[Node, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class Filter:
    child: Node
    conditions: tuple[Expr, ...]
    """All must be true."""

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.child.columns

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child,)


@dataclass(frozen=True, slots=True)
class Project:
    child: Node
    exprs: tuple[Expr, ...]
    names: tuple[str, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(Column(name, expr.type) for name, expr in zip(self.names, self.exprs, strict=True))

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child,)


@dataclass(frozen=True, slots=True)
class SortKey:
    expr: Expr
    descending: bool
    nulls_first: bool

    def sql(self, names: Sequence[str] | Callable[[int], str]) -> str:
        direction = "DESC" if self.descending else "ASC"
        return f"{self.expr.sql(names)} {direction} NULLS {'FIRST' if self.nulls_first else 'LAST'}"


@dataclass(frozen=True, slots=True)
class Call:
    """One aggregate: `function(DISTINCT args ORDER BY order) FILTER (WHERE filter)`."""

    function: str
    args: tuple[Expr, ...]
    type: str
    distinct: bool = False
    filter: Expr | None = None
    order: tuple[SortKey, ...] = ()
    unstable: bool = False
    """The value may depend on the order in which rows arrive."""


@dataclass(frozen=True, slots=True)
class Aggregate:
    """GROUP BY. Output: the groups in order, then the calls, then one BIGINT for each of `groupings`.

    `sets` are the grouping sets, as positions in `groups`; a plain GROUP BY is one set of all of them, and no groups at
    all is one row even of no input. `groupings` are GROUPING() calls, as positions in `groups`.
    """

    child: Node
    groups: tuple[Expr, ...]
    calls: tuple[Call, ...]
    sets: tuple[tuple[int, ...], ...] = ()
    groupings: tuple[tuple[int, ...], ...] = ()

    @property
    def is_plain(self) -> bool:
        return not self.groupings and (not self.sets or self.sets == (tuple(range(len(self.groups))),))

    @property
    def columns(self) -> tuple[Column, ...]:
        keys = tuple(Column(f"group{i}", group.type) for i, group in enumerate(self.groups))
        values = tuple(Column(call.function, call.type) for call in self.calls)
        return keys + values + tuple(Column("grouping", "BIGINT") for _ in self.groupings)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child,)


JoinKind: TypeAlias = Literal["inner", "left", "right", "full", "semi", "anti", "right_semi", "right_anti", "mark"]
Comparison: TypeAlias = Literal["=", "<>", "<", ">", "<=", ">=", "IS NOT DISTINCT FROM", "IS DISTINCT FROM"]


@dataclass(frozen=True, slots=True)
class Condition:
    """`left comparison right`; `left` is over the left child's columns and `right` over the right's own."""

    left: Expr
    right: Expr
    comparison: Comparison

    @property
    def is_equality(self) -> bool:
        return self.comparison in ("=", "IS NOT DISTINCT FROM")


@dataclass(frozen=True, slots=True)
class Join:
    """Output: the left's columns, then the right's; only the one side's under (right_)semi and (right_)anti; under
    "mark" the left's and one BOOLEAN: whether a match exists, NULL where SQL's IN says unknown.

    No conditions at all and kind "inner" is a cross product. `residual` is over both sides' columns, the left's first.
    `single`: a left join that may match at most one row (a scalar subquery); more is DuckDB's error.
    """

    left: Node
    right: Node
    kind: JoinKind
    conditions: tuple[Condition, ...] = ()
    residual: Expr | None = None
    single: bool = False

    @property
    def columns(self) -> tuple[Column, ...]:
        if self.kind in ("semi", "anti"):
            return self.left.columns
        if self.kind in ("right_semi", "right_anti"):
            return self.right.columns
        if self.kind == "mark":
            return (*self.left.columns, Column("mark", "BOOLEAN"))
        return self.left.columns + self.right.columns

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.left, self.right)

    @property
    def keeps_left(self) -> bool:
        """Whether rows of the left side that match nothing come out."""
        return self.kind in ("left", "full", "anti", "mark")

    @property
    def keeps_right(self) -> bool:
        return self.kind in ("right", "full", "right_anti")

    @property
    def may_see_right_whole(self) -> bool:
        """Whether parts of the left side may each be joined with all of the right one."""
        return self.kind in ("inner", "left", "semi", "anti", "mark")

    @property
    def may_see_left_whole(self) -> bool:
        return self.kind in ("inner", "right", "right_semi", "right_anti")


@dataclass(frozen=True, slots=True)
class KeyFilter:
    """Rows of `child` that some row of `keys` equals; or all of them, where that is cheaper. Whoever reads them drops
    the others."""

    child: Node
    keys: Node
    conditions: tuple[Condition, ...]
    """Comparisons for equality, `child` on the left."""
    scanned_rows: int | None = None
    """How many rows there were before filters left those of `keys`, if that is known."""
    is_for_keys: bool = False
    """What it leaves is read as keys of another filter."""

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.child.columns

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child, self.keys)

    @property
    def join(self) -> Join:
        """What it is."""
        return Join(self.child, self.keys, "semi", self.conditions)


@dataclass(frozen=True, slots=True)
class Sort:
    child: Node
    keys: tuple[SortKey, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.child.columns

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child,)


@dataclass(frozen=True, slots=True)
class Limit:
    """`limit` of None is all rows from `offset` on."""

    child: Node
    limit: int | None
    offset: int = 0

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.child.columns

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child,)


@dataclass(frozen=True, slots=True)
class Distinct:
    """One row per value of `on` (all columns if None); which one, `order` says."""

    child: Node
    on: tuple[Expr, ...] | None = None
    order: tuple[SortKey, ...] = ()

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.child.columns

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child,)


@dataclass(frozen=True, slots=True)
class WindowCall:
    """`expr` is the whole call with its OVER clause, as SQL over the child's columns."""

    expr: Expr
    partition_by: tuple[Expr, ...]
    order_by: tuple[SortKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Window:
    """Output: the child's columns, then one per call."""

    child: Node
    calls: tuple[WindowCall, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.child.columns + tuple(Column("window", call.expr.type) for call in self.calls)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child,)


@dataclass(frozen=True, slots=True)
class Unnest:
    """Output: the child's columns, then one per expression; each row as often as its longest list."""

    child: Node
    exprs: tuple[Expr, ...]
    """The lists, not yet unnested; `types` are those of their elements."""
    types: tuple[str, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.child.columns + tuple(Column("unnest", type_) for type_ in self.types)

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.child,)


@dataclass(frozen=True, slots=True)
class SetOperation:
    """UNION, INTERSECT or EXCEPT of children with the same types, position by position."""

    kind: Literal["union", "intersect", "except"]
    all: bool
    children: tuple[Node, ...]
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Shared:
    """`body`, in which every `Input(id)` stands for the rows of `definition`, computed once: a materialised CTE, or
    the left side of a join over a correlated subquery."""

    id: int
    definition: Node
    body: Node

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.body.columns

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.definition, self.body)


Node: TypeAlias = (
    Scan
    | Fixed
    | Input
    | Filter
    | Project
    | Aggregate
    | Join
    | KeyFilter
    | Sort
    | Limit
    | Distinct
    | Window
    | Unnest
    | SetOperation
    | Shared
)


def walk(node: Node) -> Iterable[Node]:
    """The node and everything below it, parents first."""
    yield node
    for child in node.children:
        yield from walk(child)


@dataclass(frozen=True, slots=True)
class Bound:
    """What binding a query gives: its plan, and the names and types the user sees."""

    plan: Node
    columns: tuple[Column, ...]
