"""Scalar expressions, from DuckDB's JSON to SQL text with holes.

DuckDB 1.4 writes comparisons and casts as classes of their own and drops the lambda from the arguments of list
functions; 2.0 writes all of them as functions. Both end as the same text here.

Invariants: the text binds again to the same functions over the same types: casts are written out, constants have their
type, and a column is checked against the type DuckDB says it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..query import quoted
from .fields import Fields, Json, NotPlannable
from .functions import INFIX, LAMBDAS, NAMED, NEVER_VOLATILE, named_arguments, open_slice, restore
from .nodes import Column, Comparison, Expr
from .typetext import TypeText

COMPARISONS: dict[str, Comparison] = {
    "COMPARE_EQUAL": "=",
    "COMPARE_NOTEQUAL": "<>",
    "COMPARE_LESSTHAN": "<",
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_LESSTHANOREQUALTO": "<=",
    "COMPARE_GREATERTHANOREQUALTO": ">=",
    "COMPARE_DISTINCT_FROM": "IS DISTINCT FROM",
    "COMPARE_NOT_DISTINCT_FROM": "IS NOT DISTINCT FROM",
}


@dataclass(frozen=True, slots=True)
class Scope:
    """What the references in an expression mean: the columns of the operator's input, or inside a lambda its
    parameters and after them what it captured."""

    columns: tuple[Column, ...]
    table: int | None = None
    """The input's number in DuckDB's plan, for the few references DuckDB leaves unresolved."""
    parameters: tuple[str, ...] = ()
    captures: tuple[Expr, ...] = ()
    depth: int = field(default=0, kw_only=True)

    def reference(self, index: int, type_: str) -> Expr:
        if index < len(self.parameters):
            return Expr((self.parameters[index],), type_)
        expr = self._outer(index - len(self.parameters))
        if expr.type != type_:
            raise NotPlannable(f"a reference to a {type_} that is a {expr.type}")
        return expr

    def _outer(self, index: int) -> Expr:
        if self.parameters:
            return self.captures[index]
        if index >= len(self.columns):
            raise NotPlannable("a reference to a column that is not there")
        return Expr((index,), self.columns[index].type)


def text(type_: str, *parts: str | Expr) -> Expr:
    """An expression put together from text and other expressions."""
    pieces: list[str | int] = []
    for part in parts:
        for piece in (part,) if isinstance(part, str) else part.pieces:
            if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] += piece
            else:
                pieces.append(piece)
    exprs = [part for part in parts if isinstance(part, Expr)]
    return Expr(tuple(pieces), type_, any(e.volatile for e in exprs), any(e.unstable for e in exprs))


def separated(exprs: Sequence[Expr], separator: str = ", ") -> list[str | Expr]:
    """The parts of a list, for `text`."""
    parts: list[str | Expr] = []
    for expr in exprs:
        parts += [separator, expr] if parts else [expr]
    return parts


def comparison(left: Expr, operator: str, right: Expr) -> Expr:
    return text("BOOLEAN", "(", left, f" {operator} ", right, ")")


def conjunction(exprs: Sequence[Expr], operator: str = "AND") -> Expr:
    return exprs[0] if len(exprs) == 1 else text("BOOLEAN", "(", *separated(exprs, f" {operator} "), ")")


class ExpressionReader:
    """`volatile`: the functions of which two evaluations may differ."""

    def __init__(self, types: TypeText, *, volatile: frozenset[str]) -> None:
        self.types = types
        self._volatile = volatile
        self._readers = {
            "BOUND_REF": self._reference,
            "BOUND_COLUMN_REF": self._unresolved,
            "BOUND_CONSTANT": self._constant,
            "BOUND_FUNCTION": self._function,
            "BOUND_COMPARISON": self._comparison,
            "BOUND_CONJUNCTION": self._conjunction,
            "BOUND_OPERATOR": self._operator,
            "BOUND_CAST": self._cast,
            "BOUND_CASE": self._case,
            "BOUND_BETWEEN": self._between,
        }

    def read(self, json: Json, scope: Scope) -> Expr:
        fields = Fields(json, "an expression")
        kind = fields.take("expression_class")
        fields.ignore("alias", "query_location", "query_location_length")
        if kind not in self._readers:
            raise NotPlannable(f"an expression of the kind {kind}")
        expr = self._readers[kind](fields, scope)
        fields.done()
        return expr

    def _reference(self, fields: Fields, scope: Scope) -> Expr:
        fields.expect("type", "BOUND_REF")
        fields.expect("depth", 0)
        return scope.reference(fields.take("index", 0), self.types.type(fields.take("return_type")))

    def _unresolved(self, fields: Fields, scope: Scope) -> Expr:
        """Below a table function over columns DuckDB does not turn references into positions."""
        fields.expect("type", "BOUND_COLUMN_REF")
        fields.expect("depth", 0)
        binding = fields.take("binding")
        if scope.table is None or binding["table_index"] != scope.table:
            raise NotPlannable("a reference that DuckDB left unresolved")
        return scope.reference(binding["column_index"], self.types.type(fields.take("return_type")))

    def _constant(self, fields: Fields, scope: Scope) -> Expr:
        fields.expect("type", "VALUE_CONSTANT")
        value = fields.take("value")
        return Expr((self.types.constant(value),), self.types.type(value["type"]))

    def _comparison(self, fields: Fields, scope: Scope) -> Expr:
        operator = COMPARISONS.get(fields.take("type"))
        if operator is None:
            raise NotPlannable("a comparison of a kind we do not know")
        return comparison(self.read(fields.take("left"), scope), operator, self.read(fields.take("right"), scope))

    def _conjunction(self, fields: Fields, scope: Scope) -> Expr:
        kind = fields.take("type")
        if kind not in ("CONJUNCTION_AND", "CONJUNCTION_OR"):
            raise NotPlannable(f"a conjunction {kind}")
        children = [self.read(child, scope) for child in fields.take("children")]
        return conjunction(children, kind.removeprefix("CONJUNCTION_"))

    def _operator(self, fields: Fields, scope: Scope) -> Expr:
        kind = fields.take("type")
        type_ = self.types.type(fields.take("return_type"))
        first, *rest = children = [self.read(child, scope) for child in fields.take("children")]
        if kind == "OPERATOR_NOT":
            return text(type_, "(NOT ", first, ")")
        if kind == "OPERATOR_IS_NULL":
            return text(type_, "(", first, " IS NULL)")
        if kind == "OPERATOR_IS_NOT_NULL":
            return text(type_, "(", first, " IS NOT NULL)")
        if kind == "OPERATOR_COALESCE":
            return text(type_, "coalesce(", *separated(children), ")")
        if kind == "OPERATOR_TRY":
            return text(type_, "TRY(", first, ")")
        if kind in ("COMPARE_IN", "COMPARE_NOT_IN"):
            # x IN (y) with one y could be read as a search in the list y.
            if len(rest) == 1:
                return comparison(first, "=" if kind == "COMPARE_IN" else "<>", rest[0])
            return text(type_, "(", first, " IN (" if kind == "COMPARE_IN" else " NOT IN (", *separated(rest), "))")
        raise NotPlannable(f"the operator {kind}")

    def _cast(self, fields: Fields, scope: Scope) -> Expr:
        fields.expect("type", "OPERATOR_CAST")
        type_ = self.types.type(fields.take("return_type"))
        return self._as_cast(self.read(fields.take("child"), scope), type_, fields.take("try_cast"))

    def _as_cast(self, child: Expr, type_: str, is_try: bool) -> Expr:
        return text(type_, "TRY_CAST(" if is_try else "CAST(", child, f" AS {type_})")

    def _case(self, fields: Fields, scope: Scope) -> Expr:
        fields.expect("type", "CASE_EXPR")
        parts: list[str | Expr] = ["CASE"]
        for check in fields.take("case_checks"):
            when = Fields(check, "a CASE")
            parts += [" WHEN ", self.read(when.take("when_expr"), scope)]
            parts += [" THEN ", self.read(when.take("then_expr"), scope)]
            when.done()
        parts += [" ELSE ", self.read(fields.take("else_expr"), scope), " END"]
        return text(self.types.type(fields.take("return_type")), *parts)

    def _between(self, fields: Fields, scope: Scope) -> Expr:
        fields.expect("type", "COMPARE_BETWEEN")
        value, low, high = (self.read(fields.take(name), scope) for name in ("input", "lower", "upper"))
        return self._bounded(value, low, high, fields)

    def _bounded(self, value: Expr, low: Expr, high: Expr, inclusive: Fields) -> Expr:
        if value.volatile:
            raise NotPlannable("BETWEEN of a value that changes")
        above = comparison(value, ">=" if inclusive.take("lower_inclusive") else ">", low)
        return conjunction([above, comparison(value, "<=" if inclusive.take("upper_inclusive") else "<", high)])

    def _function(self, fields: Fields, scope: Scope) -> Expr:
        kind = fields.take("type")
        name = self.function_name(fields)
        return_type = fields.take("return_type")
        type_ = self.types.type(return_type)
        children = fields.take("children")
        data = self.function_data(fields, name)
        self.check_arguments(fields, name, len(children), has_data=bool(len(data)))
        fields.ignore("is_operator")
        if name in LAMBDAS:
            expr = self._over_list(name, children, data, type_, scope)
        else:
            args = [self.read(child, scope) for child in children]
            expr = self._call(kind, name, args, data, return_type, type_)
        data.done()
        return expr

    def _call(self, kind: str, name: str, args: list[Expr], data: Fields, return_type: Json, type_: str) -> Expr:
        if name == "__cast":
            data.expect("is_default_cast", False, True)
            return self._as_cast(args[0], type_, data.take("try_cast"))
        if kind in COMPARISONS:
            return comparison(args[0], COMPARISONS[kind], args[1])
        if kind == "COMPARE_BETWEEN":
            return self._bounded(args[0], args[1], args[2], data)
        if kind != "BOUND_FUNCTION":
            raise NotPlannable(f"a function of the kind {kind}")
        if name == "constant_or_null":
            data.ignore("value")
            not_null = conjunction([text("BOOLEAN", arg, " IS NOT NULL") for arg in args[1:]])
            return text(type_, "CASE WHEN ", not_null, " THEN ", args[0], " END")
        if name.startswith("__"):
            raise NotPlannable(f"the internal function {name}")
        if name in NAMED:
            data.ignore("variable_return_type", "stype")
        elif len(data):
            name, args = restore(name, args, data, self.types, return_type)
        call = self._written(name, args, named_arguments(name, args, return_type), type_)
        if name in self._volatile and name not in NEVER_VOLATILE:
            return Expr(call.pieces, call.type, True, call.unstable)
        return text(type_, "CAST(", call, f" AS {type_})") if name == "error" and type_ != '"NULL"' else call

    def _written(self, name: str, args: Sequence[Expr], names: Sequence[str | None], type_: str) -> Expr:
        if name in INFIX and len(args) == 2:
            infix = text(type_, "(", args[0], f" {name} ", args[1], ")")
            # A literal has been widened to meet the other side, so the sum of the two would come out wider still.
            return self._as_cast(infix, type_, False) if type_.startswith("DECIMAL") else infix
        sliced = open_slice(name, args)
        if sliced:
            return text(type_, *sliced)
        prefixed = [
            text(arg.type, f"{given} := ", arg) if given else arg for given, arg in zip(names, args, strict=True)
        ]
        return text(type_, self.called(name), "(", *separated(prefixed), ")")

    def called(self, name: str) -> str:
        """A function's name, quoted where it is not a word or the grammar has a form of its own for it."""
        return quoted(name) if self.types.field(name) != name else name

    def function_name(self, fields: Fields) -> str:
        """1.4 has `name`; 2.0 the path of catalog, schema and name."""
        fields.ignore("catalog_name", "schema_name", "has_serialize")
        if "name" in fields:
            return str(fields.take("name"))
        path = Fields(fields.take("qname"), "a function's name")
        names = path.take("path")
        path.done()
        return str(names[-1])

    def function_data(self, fields: Fields, name: str) -> Fields:
        return Fields(fields.take("function_data", {}) or {}, f"the function {name}")

    def check_arguments(self, fields: Fields, name: str, count: int, *, has_data: bool) -> None:
        """`arguments` repeats the children's types. 1.4 keeps in `original_arguments` what a call had before binding
        dropped some; what they were is then in its data."""
        fields.ignore("arguments", "positional_arguments")
        original = fields.take("original_arguments", [])
        if original and len(original) != count and not has_data:
            raise NotPlannable(f"the function {name}, which hides an argument")
        if fields.take("named_arguments", []) and name not in NAMED:
            raise NotPlannable(f"the function {name} with named arguments")

    def _over_list(self, name: str, children: list[Json], data: Fields, type_: str, scope: Scope) -> Expr:
        """A function with a lambda. The lambda's own references count its parameters from the last to the first,
        and then what it captured, which follows in the arguments."""
        has_index, body = data.take("has_index"), data.take("lambda_expr")
        data.ignore("return_type")
        is_reduce = name.endswith("reduce")
        count = (2 if is_reduce else 1) + bool(has_index)
        has_initial = bool(data.take("has_initial", False))
        if any(child.get("expression_class") == "BOUND_LAMBDA" for child in children):
            written = Fields(children.pop(1), "a lambda")
            if written.take("parameter_count") != count:
                raise NotPlannable("a lambda with parameters we do not know")
        args = [self.read(child, scope) for child in children]
        given = args[: 1 + has_initial]
        names = tuple(f"p{scope.depth}_{i}" for i in range(count))
        inner = Scope((), None, names[::-1], tuple(args[len(given) :]), depth=scope.depth + 1)
        read = self.read(body, inner)
        function = text(read.type, f"lambda {', '.join(names)}: ", read)
        return text(type_, self.called(name), "(", *separated([given[0], function, *given[1:]]), ")")
