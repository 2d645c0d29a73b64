"""What the plan has to know of DuckDB's functions one by one: what they hide when bound, and which answers are stable.

A bound function may have dropped arguments it had read already, and keeps them in `function_data`. A function that
carries such data and is not named here is not planned.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..query import literal, quoted
from .fields import Fields, Json, NotPlannable
from .nodes import Expr, SortKey
from .typetext import TypeText

# Called with names for their arguments.
NAMED = frozenset(("struct_pack", "struct_insert", "union_value"))
INFIX = frozenset(("+", "-", "*", "/", "//", "%", "||"))

# Functions whose data DuckDB makes again from their arguments, and what is in it.
_DECIMAL = ("check_overflow", "return_type", "arguments")
_DERIVED = {
    **dict.fromkeys(("+", "-", "*", "add", "subtract", "multiply"), _DECIMAL),
    "row": ("variable_return_type",),
}
_SORTS = frozenset(("list_sort", "array_sort", "list_reverse_sort", "array_reverse_sort", "list_grade_up"))
_SORTS_ALL = _SORTS | {"array_grade_up", "grade_up"}
_OF_LISTS = frozenset(("list_aggregate", "list_aggr", "array_aggregate", "array_aggr", "aggregate"))
_SLICES = frozenset(("array_slice", "list_slice"))
_PARTS = frozenset(("date_part", "datepart"))
_JOINED = frozenset(("string_agg", "group_concat", "listagg"))
_QUANTILES = frozenset(("quantile", "quantile_cont", "quantile_disc", "median", "mad"))
LAMBDAS = frozenset(
    f"{prefix}{name}" for prefix in ("list_", "array_", "") for name in ("transform", "apply", "filter", "reduce")
)

_ORDERS = {"ASCENDING": "ASC", "DESCENDING": "DESC"}

# The value cannot depend on the order of rows or of additions, whatever the arguments.
_STABLE = _QUANTILES | {"count", "count_star", "countif", "count_if", "min", "max", "bool_and", "bool_or"}
_STABLE |= {"bit_and", "bit_or", "bit_xor", "bitstring_agg", "histogram"}
# The same if what is added up is exact.
_STABLE_IF_EXACT = frozenset(("sum", "avg", "mean"))
_EXACT = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
# Made by the binder for scalar subqueries and not a value at all.
NEVER_VOLATILE = frozenset(("error",))


def is_stable(name: str, args: Sequence[Expr], order: Sequence[SortKey]) -> bool:
    """Whether an aggregate's value is the same for every order of its input."""
    if name in _STABLE:
        return True
    if name in _STABLE_IF_EXACT:
        return args[0].type in (*_EXACT, "UHUGEINT", "BOOLEAN") or args[0].type.startswith("DECIMAL")
    # An order by everything the aggregate looks at: rows that tie are equal. (0.0 and -0.0 tie and are not equal.)
    keys = {key.expr.pieces for key in order}
    looked_at = [arg for arg in args if arg.columns]
    return bool(order) and all(arg.pieces in keys and arg.type not in ("DOUBLE", "FLOAT") for arg in looked_at)


def restore(name: str, args: list[Expr], data: Fields, types: TypeText, return_type: Json) -> tuple[str, list[Expr]]:
    """The name and the arguments a bound call was written with, from what it kept."""
    if name in _DERIVED:
        data.ignore(*_DERIVED[name])
        return name, args
    if name in _SORTS_ALL:
        order, nulls = _ORDERS[data.take("order_type")], data.take("null_order")
        name = "list_grade_up" if data.take("is_grade_up") else "list_sort"
        data.expect("default_collation", "")
        data.ignore("return_type", "child_type", "sort_key")
        return name, [args[0], Expr((literal(order),), "VARCHAR"), Expr((literal(nulls),), "VARCHAR")]
    if name in _OF_LISTS:
        bind = Fields(data.take("bind_data"), name)
        bind.ignore("stype")
        call = Fields(bind.take("aggr_expr"), name)
        bind.done()
        inner = Fields(call.take("function_data", {}), name)
        hidden = call.take("original_arguments", []) or len(inner)
        inner_name = call.take("name", None) or call.take("qname")["path"][-1]
        if hidden:
            restored = restore(inner_name, args[:1] + args[2:], inner, types, call.take("return_type"))[1]
            args = [*args[:2], *restored[1:]]
        inner.done()
        return name, args
    if name in _PARTS:
        data.ignore("stype", "part_codes")
        members = return_type["type_info"]["child_types"]
        parts = ", ".join(literal(member["first"]) for member in members)
        return name, [Expr((f"[{parts}]",), "VARCHAR[]"), args[-1]]
    if name in _JOINED:
        separator = literal(data.take("separator"))
        return name, [args[0], Expr((f"CAST({separator} AS VARCHAR)",), "VARCHAR")]
    if name == "bitstring_agg":
        low, high = (types.constant(data.take(end)) for end in ("min", "max"))
        return name, [args[0], Expr((low,), ""), Expr((high,), "")]
    if name == "approx_quantile":
        values = [f"CAST('{value!r}' AS FLOAT)" for value in data.take("quantiles")]
        return name, _with_quantiles(args, values, types.type(return_type))
    if name in _QUANTILES:
        return name, _quantiles(name, args, data, types, return_type)
    return name, args


def _quantiles(name: str, args: list[Expr], data: Fields, types: TypeText, return_type: Json) -> list[Expr]:
    if data.take("desc"):
        raise NotPlannable(f"{name} in descending order")
    values = [types.constant(value) for value in data.take("quantiles")]
    data.ignore("order")
    if name in ("median", "mad"):
        return args[:1]
    return _with_quantiles(args, values, types.type(return_type))


def _with_quantiles(args: list[Expr], values: list[str], answer: str) -> list[Expr]:
    """A list of quantiles, which may be of one, was asked for if the answer is a list of what was looked at."""
    listed = _list_depth(answer) > _list_depth(args[0].type)
    return [args[0], Expr((f"[{', '.join(values)}]" if listed else values[0],), "")]


def _list_depth(type_: str) -> int:
    return (len(type_) - len(type_.rstrip("[]"))) // 2


def open_slice(name: str, args: Sequence[Expr]) -> list[Expr | str] | None:
    """The parts of a slice that leaves a bound open (`x[:2]`): DuckDB writes an empty list for the bound, and 1.4 does
    not take one back in a call."""
    is_open = [str(arg.pieces[0]).startswith("CAST([] AS") for arg in args]
    if name not in _SLICES or not any(is_open[1:3]):
        return None
    low, high = ("" if open_ else arg for arg, open_ in zip(args[1:3], is_open[1:3], strict=True))
    step: list[Expr | str] = [":", args[3]] if len(args) == 4 else []
    return ["(", args[0], ")[", low, ":", high or ("-" if step else ""), *step, "]"]


def named_arguments(name: str, args: Sequence[Expr], return_type: Json) -> list[str | None]:
    """The names that go before the arguments (`a := `), which DuckDB keeps only in the type of the answer."""
    names: list[str | None] = [None] * len(args)
    if name not in NAMED:
        return names
    members = [member["first"] for member in return_type["type_info"]["child_types"]]
    if name == "union_value":
        members = members[1:]
    for back in range(1, len(args) + (name != "struct_insert")):
        names[-back] = quoted(members[-back])
    return names
