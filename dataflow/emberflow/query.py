"""A query as a value: one SELECT's text, its parameters and the in-memory tables it reads.

Queries nest by text, and names stay apart: parameters are renamed to be unique in the process, tables handed in
become common table expressions, which SQL scopes lexically. `{}` and every other character of the text are kept.
This module does not run anything.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import duckdb
import pyarrow as pa

from .errors import InvalidArgument, QueryError

if TYPE_CHECKING:
    from .plan.frames import Frame

_PARAMETER = re.compile(rb"\$(\w+)|\?(\d*)")
_serial = itertools.count(1)


Source: TypeAlias = Union[pa.Table, "Frame"]
"""What a name in a query may stand for: a table in memory, or the rows of another frame."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, weakref_slot=True)
class Query:
    """One SELECT. `text` has no trailing semicolon; `tables` are registered under their names before it runs."""

    text: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Source] = field(default_factory=dict)
    deterministic: bool = False
    """Run with one thread a task, so that it gives the same bytes each time, ties and float sums included."""

    @property
    def source(self) -> Source | None:
        """The one table or frame that it reads, if that is all that it does (`of_table`)."""
        if len(self.tables) != 1:
            return None
        ((name, source),) = self.tables.items()
        return source if self.text == f"SELECT * FROM {name}" else None

    def wrapped(self, before: str, after: str = "") -> Query:
        """The query `before (text) after`, with the same parameters and tables."""
        # The line break ends a comment that `text` may end with.
        return replace(self, text=f"{before} ({self.text}\n) {after}".rstrip())


def parse(text: str, params: Sequence[Any] | Mapping[str, Any] | None, tables: Mapping[str, Query]) -> Query:
    """The query of a user's SQL. Raises `QueryError` unless it is one statement that returns rows."""
    try:
        statements = duckdb.extract_statements(text)
    except duckdb.Error as error:
        raise QueryError(str(error), text) from error
    if len(statements) != 1 or not _returns_rows(text):
        raise QueryError("one query that returns rows is needed; to write its result use write_parquet()", text)
    text = text.strip().rstrip(";").rstrip()
    bound: dict[str, Any] = {}
    if params is not None:
        text, bound = _rename_parameters(text, params)
    if not tables:
        return Query(text=text, params=bound)
    expressions = ",\n".join(f"{quoted(name)} AS ({table.text}\n)" for name, table in tables.items())
    in_memory: dict[str, Source] = {}
    for table in tables.values():
        bound.update(table.params)
        in_memory.update(table.tables)
    return Query(text=f"WITH {expressions}\nSELECT * FROM ({text}\n)", params=bound, tables=in_memory)


def of_table(table: Source) -> Query:
    """The query that reads a table in memory, or another frame."""
    name = f"emberflow_table_{next(_serial)}"
    return Query(text=f"SELECT * FROM {name}", tables={name: table})


def inlined(query: Query) -> str:
    """The query's text with the values of its parameters written out. Raises `InvalidArgument` for one that has no
    form in SQL."""
    if not query.params:
        return query.text
    source = query.text.encode()
    pieces: list[bytes] = []
    end = 0
    for match in _parameters(source):
        pieces += [source[end : match.start()], value_literal(query.params[match[1].decode()]).encode()]
        end = match.end()
    return b"".join([*pieces, source[end:]]).decode()


def value_literal(value: Any) -> str:
    """A Python value as SQL writes it, of the type that DuckDB gives a parameter of that value."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        # In brackets: `x-?` must not become a comment.
        return str(value) if value >= 0 else f"({value})"
    if isinstance(value, float):
        return f"CAST('{value!r}' AS DOUBLE)"
    if isinstance(value, str):
        return literal(value)
    if isinstance(value, (bytes, bytearray)):
        return "'" + "".join(f"\\x{byte:02X}" for byte in value) + "'::BLOB"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(value_literal(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(str(key))}: {value_literal(item)}" for key, item in value.items()) + "}"
    found = duckdb.execute("SELECT CAST($1 AS VARCHAR), typeof($1)", [value]).fetchone()
    assert found is not None
    return f"CAST({literal(found[0])} AS {found[1]})"


def quoted(identifier: str) -> str:
    """`identifier` as SQL writes it."""
    return '"' + identifier.replace('"', '""') + '"'


def literal(value: str) -> str:
    """A string as SQL writes it; a NUL, which SQL text cannot hold, is spliced in by chr(0)."""
    pieces = ["'" + piece.replace("'", "''") + "'" for piece in value.split("\0")]
    return pieces[0] if len(pieces) == 1 else "(" + " || chr(0) || ".join(pieces) + ")"


def _returns_rows(text: str) -> bool:
    """Whether the one statement in `text` may stand in a FROM clause (SELECT, FROM, WITH, PIVOT, DESCRIBE, ...)."""
    bare = text.strip().rstrip(";")
    try:
        inner = duckdb.extract_statements(f"SELECT * FROM ({bare}\n)")
    except duckdb.Error:
        return False
    return len(inner) == 1


def _parameters(text: bytes) -> Iterator[re.Match[bytes]]:
    """The placeholders `?`, `?1`, `$1` and `$name` of a query, in order, but not those in strings or comments."""
    # DuckDB's tokenizer counts bytes.
    for offset, kind in duckdb.tokenize(text.decode()):
        if kind == duckdb.token_type.operator and (match := _PARAMETER.match(text, offset)):
            yield match


def _rename_parameters(text: str, params: Sequence[Any] | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text with process-wide unique parameter names, and the values under those names."""
    if isinstance(params, str):
        raise InvalidArgument("params is a list or a mapping, not a string")
    values = dict(params) if isinstance(params, Mapping) else {str(i): value for i, value in enumerate(params, 1)}
    prefix = f"p{next(_serial)}_"
    source = text.encode()
    pieces: list[bytes] = []
    used: set[str] = set()
    end = position = 0
    for match in _parameters(source):
        name = (match[1] or match[2] or b"").decode()
        if not name:
            position += 1
            name = str(position)
        if name not in values:
            raise QueryError(f"no value was given for the parameter {match[0].decode()!r}", text)
        used.add(name)
        pieces += [source[end : match.start()], f"${prefix}{name}".encode()]
        end = match.end()
    if unused := sorted(values.keys() - used):
        raise QueryError(f"the query has no parameter named {', '.join(unused)}", text)
    pieces.append(source[end:])
    return b"".join(pieces).decode(), {prefix + name: value for name, value in values.items()}
