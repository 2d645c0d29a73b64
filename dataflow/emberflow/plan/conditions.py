"""Conditions that compare columns with constants, read back from the text of a filter.

Only what can be told by a column's value alone: `column op constant`, IN, IS [NOT] NULL, and AND and OR of these
(BETWEEN is two of them). A constant has the column's own type, or the one that a check says the column is cast to.
Anything else is no condition.

Does not know: where columns come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .nodes import Column, Expr

_FLIPPED = {"=": "=", "<>": "<>", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_TYPE = r"[A-Z][A-Z_]*(?:\ [A-Z]+)*(?:\(\d+,\ ?\d+\))?"
_TOKEN = re.compile(
    rf"""\s*(?:
        \0(?P<column>\d+)\0
      | CAST\(\0(?P<casted>\d+)\0\ AS\ (?P<cast>{_TYPE})\)
      | (?P<constant>CAST\((?:'(?:[^']|'')*'|-?\d+)\ AS\ (?P<type>{_TYPE})\)|(?:TRUE|FALSE)\b)
      | (?P<word>[A-Z]+\b|<=|>=|<>|[<>=(),])
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Check:
    """`column operator constants`; the operator is a comparison, IN, IS NULL or IS NOT NULL."""

    column: int
    operator: str
    constants: tuple[str, ...] = ()
    cast: str = ""
    """The type that the column is cast to first."""


@dataclass(frozen=True, slots=True)
class Several:
    """Conditions joined by AND, or by OR."""

    operator: str
    parts: tuple[Condition, ...]


Condition: TypeAlias = Check | Several


def conditions_of(expr: Expr, columns: Sequence[Column]) -> tuple[Condition, ...]:
    """The conditions over `columns` that all hold where `expr` does; none if it is of another form."""
    if expr.volatile:
        return ()
    try:
        read = _Reading(expr, columns).whole()
    except _OfAnotherForm:
        return ()
    return read.parts if isinstance(read, Several) and read.operator == "AND" else (read,)


def checks_of(condition: Condition) -> Iterator[Check]:
    """All checks in a condition."""
    if isinstance(condition, Check):
        yield condition
        return
    for part in condition.parts:
        yield from checks_of(part)


class _OfAnotherForm(Exception):
    """The expression is no condition."""


class _Reading:
    """Reads one expression's text, a token at a time."""

    def __init__(self, expr: Expr, columns: Sequence[Column]) -> None:
        self.text = expr.sql(lambda position: f"\0{position}\0")
        self.columns = columns
        self.end = 0

    def whole(self) -> Condition:
        condition = self.condition()
        if self.text[self.end :].strip():
            raise _OfAnotherForm
        return condition

    def condition(self) -> Condition:
        self.expect("(")
        token = self.next()
        if token["word"] == "(":
            self.end = token.start()
            return self.several()
        if token["constant"]:
            operator, column = self.comparison(), self.next()
            found = self.compared(column, _FLIPPED[operator], [token])
        else:
            found = self.check(token)
        self.expect(")")
        return found

    def several(self) -> Several:
        parts = [self.condition()]
        operators = set()
        while (word := self.next()["word"]) != ")":
            if word not in ("AND", "OR"):
                raise _OfAnotherForm
            operators.add(word)
            parts.append(self.condition())
        if len(operators) > 1:
            raise _OfAnotherForm
        return Several(operators.pop() if operators else "AND", tuple(parts))

    def check(self, column: re.Match[str]) -> Check:
        word = self.next()["word"]
        if word == "IS":
            following = self.next()["word"]
            if following == "NOT":
                self.expect("NULL")
                return self.compared(column, "IS NOT NULL", [])
            if following != "NULL":
                raise _OfAnotherForm
            return self.compared(column, "IS NULL", [])
        if word == "IN":
            return self.compared(column, word, list(self.listed()))
        if word not in _FLIPPED:
            raise _OfAnotherForm
        return self.compared(column, word, [self.next()])

    def listed(self) -> Iterator[re.Match[str]]:
        self.expect("(")
        yield self.next()
        while (word := self.next()["word"]) == ",":
            yield self.next()
        if word != ")":
            raise _OfAnotherForm

    def compared(self, column: re.Match[str], operator: str, constants: Sequence[re.Match[str]]) -> Check:
        position = column["column"] or column["casted"]
        if position is None:
            raise _OfAnotherForm
        type_ = column["cast"] or self.columns[int(position)].type
        if any(token["constant"] is None or (token["type"] or "BOOLEAN") != type_ for token in constants):
            raise _OfAnotherForm
        return Check(int(position), operator, tuple(token["constant"] for token in constants), column["cast"] or "")

    # ---- tokens

    def next(self) -> re.Match[str]:
        token = _TOKEN.match(self.text, self.end)
        if token is None:
            raise _OfAnotherForm
        self.end = token.end()
        return token

    def expect(self, word: str) -> None:
        if self.next()["word"] != word:
            raise _OfAnotherForm

    def comparison(self) -> str:
        word = self.next()["word"]
        if word not in _FLIPPED:
            raise _OfAnotherForm
        return word
