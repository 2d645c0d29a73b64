"""From what a function gives to columns: which types the first rows say, and whether later ones fit them.

Types are taken wide, for the next rows to fit: an int is a BIGINT (a HUGEINT beyond 64 bits), a Decimal has 38 digits.
What Python values do not say comes from the input's column of the same name: the type of a MAP, of a column that is all
None, or of an empty list. An int among floats is a float; nothing else is converted.

Does not know: functions, streams.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from .failure import cut
from .rows import HUGEINT, MISFITS, UHUGEINT, array, python_values
from .sqltypes import duckdb_types


class Misfit(Exception):
    """What a function gave does not fit. The message continues "map function 'f' ..."; `row` is what it was called
    with."""

    def __init__(self, message: str, row: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True, slots=True)
class Produced:
    """Rows that came out, each with the row it came from and that one's number."""

    rows: Sequence[Mapping[str, Any]]
    sources: Sequence[Mapping[str, Any]]
    numbers: Sequence[int]

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self.rows]


def schema_of_rows(out: Produced, given: pa.Schema) -> pa.Schema:
    """The columns of rows: every key, in the order of first sight. `given` is the input's schema."""
    names = list(dict.fromkeys(name for row in out.rows for name in row))
    for name in names:
        if not isinstance(name, str):
            raise Misfit(f"gave a row with the key {cut(name)}; keys are the names of columns", out.sources[0])
    found: dict[str, pa.DataType] = {}
    for name in names:
        values, hint = out.column(name), _hint(name, given)
        try:
            found[name] = _wide(_inferred(values, hint))
        except MISFITS as error:
            at = _first_misfit(values, partial(_inferred, hint=None))
            before = "" if at == 0 else f", and {cut(values[at - 1])} before it"
            raise Misfit(
                f"gave {_shown(values[at])} for {name!r} in row {out.numbers[at]}{before}: no type takes that. "
                f"Say it: {_advice(found, names)}",
                out.sources[at],
            ) from error
        # DuckDB's own NULL, untyped, may well be passed on.
        if _has_null(found[name]) and found[name] != hint:
            raise Misfit(
                f"gave only None (or empty lists) for {name!r} in the first {len(values)} rows, which says no type. "
                f"Say it: {_advice({**found, name: None}, names)}"
            )
    return pa.schema(list(found.items()))


def fitted_rows(out: Produced, target: pa.Schema, *, inferred: bool) -> list[pa.RecordBatch]:
    """Rows as a batch of the schema. If it was inferred, a key that it has not is refused and not dropped."""
    if inferred and (new := set().union(*out.rows) - set(target.names)):
        at = next(i for i, row in enumerate(out.rows) if new & row.keys())
        name = next(name for name in out.rows[at] if name in new)
        advice = _advice({**dict(zip(target.names, target.types, strict=True)), name: None}, [])
        raise Misfit(
            f"gave {name!r} in row {out.numbers[at]}, which no row before had. Say it: {advice}", out.sources[at]
        )
    columns = []
    for field in target:
        values = out.column(field.name)
        try:
            columns.append(array(values, field.type))
        except MISFITS as error:
            at = _first_misfit(values, partial(array, type_=field.type))
            raise _does_not_fit(values[at], field, out.numbers[at], target, inferred, out.sources[at]) from error
    return [pa.RecordBatch.from_arrays(columns, schema=target)]


def schema_of_table(table: pa.Table, given: pa.Schema) -> pa.Schema:
    """The columns of a table, as it has them."""
    found: dict[str, pa.DataType] = {}
    for field in table.schema:
        hint = _hint(field.name, given)
        found[field.name] = hint if pa.types.is_null(field.type) and hint is not None else field.type
        if pa.types.is_null(found[field.name]) and hint is None:
            raise Misfit(
                f"gave only None for {field.name!r} in the first table, which says no type. "
                f"Say it: {_advice({**found, field.name: None}, table.schema.names)}"
            )
    return pa.schema(list(found.items()))


def fitted_table(table: pa.Table, target: pa.Schema, *, inferred: bool) -> list[pa.RecordBatch]:
    """A table in batches of the schema. If it was inferred, a column that it has not is refused and not dropped."""
    names = table.schema.names
    wrong = [name for name in target.names if name not in names]
    wrong += [name for name in names if inferred and name not in target.names]
    if wrong:
        raise Misfit(f"gave a table with the columns {names}; {target.names} are expected")
    columns = []
    for field in target:
        column = table.column(field.name)
        try:
            wide = field.type in (HUGEINT, UHUGEINT) and column.type != field.type
            columns.append(array(python_values(column), field.type) if wide else column.cast(field.type))
        except MISFITS as error:
            since = "the first table has" if inferred else "the schema says"
            raise Misfit(f"gave {field.name!r} as {column.type}, where {since} {field.type}: {error}") from error
    return list(pa.Table.from_arrays(columns, schema=target).to_batches())


def _inferred(values: Sequence[Any], hint: pa.DataType | None) -> pa.DataType:
    """The narrowest type that pyarrow sees in the values, or the hint where that knows better."""
    if hint is not None and (pa.types.is_nested(hint) or hint == HUGEINT):
        try:
            array(values, hint)
        except MISFITS:
            pass
        else:
            return hint
    if set(map(type, values)) - {type(None)} == {uuid.UUID}:
        return pa.uuid()
    try:
        found = pa.array(values).type
    except OverflowError:
        array(values, HUGEINT)
        return HUGEINT
    if hint is not None and _has_null(found):
        return hint
    if hint is not None and pa.types.is_decimal(found) and pa.types.is_decimal(hint):
        return pa.decimal128(38, max(found.scale, hint.scale))
    return found


def _wide(type_: pa.DataType) -> pa.DataType:
    """A type that later values have a better chance to fit."""
    if pa.types.is_decimal128(type_):
        return pa.decimal128(38, type_.scale)
    if pa.types.is_timestamp(type_) and type_.tz is not None:
        return pa.timestamp(type_.unit, "UTC")
    return type_


def _has_null(type_: pa.DataType) -> bool:
    return pa.types.is_null(type_) or any(_has_null(type_.field(i).type) for i in range(type_.num_fields))


def _hint(name: str, given: pa.Schema) -> pa.DataType | None:
    position = given.get_field_index(name)
    return given.field(position).type if position >= 0 else None


def _first_misfit(values: Sequence[Any], build: Callable[[Sequence[Any]], object]) -> int:
    """The first value that cannot be built together with those before it; all of them cannot."""
    fits, fails = 0, len(values)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        try:
            build(values[:middle])
        except MISFITS:
            fails = middle
        else:
            fits = middle
    return fails - 1


def _does_not_fit(
    value: Any, field: pa.Field, number: int, target: pa.Schema, inferred: bool, source: Mapping[str, Any]
) -> Misfit:
    types = dict(zip(target.names, target.types, strict=True))
    expected = _names(types)[field.name]
    why = f"gave {_shown(value)} for {field.name!r} in row {number}, "
    if not inferred:
        return Misfit(f"{why}where the schema says {expected}", source)
    wider = pa.float64() if isinstance(value, float) and pa.types.is_integer(field.type) else None
    advice = _advice({**types, field.name: wider}, [])
    return Misfit(f"{why}where the first rows have {expected}. Say it: {advice}", source)


def _advice(types: Mapping[str, pa.DataType | None], more: Sequence[str]) -> str:
    """The `schema=` to pass, with dots for what the user has to say."""
    known = _names({name: type_ for name, type_ in types.items() if type_ is not None})
    names = dict.fromkeys([*types, *more])
    return "schema={" + ", ".join(f"{name!r}: {known.get(name, '...')!r}" for name in names) + "}"


def _names(types: Mapping[str, pa.DataType]) -> dict[str, str]:
    return duckdb_types(pa.schema(list(types.items()))) if types else {}


def _shown(value: Any) -> str:
    return f"{cut(value)} ({type(value).__name__})"
