"""Scalar functions in Python for SQL: what they take and give, and how DuckDB is told.

    @udf(params=[UDFType.INTEGER, UDFType.INTEGER], return_type=UDFType.INTEGER)
    def gcd(a, b): ...

    @udf
    def host(url: str) -> str: ...

A `Udf` is a value: it travels to workers, and each registers it with its own connection. DuckDB calls it once per row,
or, if it is vectorized, with one Arrow array per argument and up to 2048 rows; it gets Python's values by DuckDB's own
conversion (a MAP is a dict, a HUGEINT an int, a UUID a uuid.UUID).

Does not know: sessions, plans. The vocabulary of types is smallpond's.
"""

from __future__ import annotations

import datetime
import inspect
import types
import typing
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias, Union

import duckdb

from ..errors import InvalidArgument
from .failure import failed
from .shipping import by_fields
from .sqltypes import TypeSpec, UDFAnyParameters, sql_type

NullHandling: TypeAlias = Literal["default", "special"]

# DuckDB 1 takes an int beyond 64 bits for a DOUBLE, and rounds it. As text it is exact; inside a list it is not helped.
_ROUNDS_WIDE_INTEGERS = duckdb.__version__.startswith("1.")
_WIDE_INTEGERS = ("HUGEINT", "UHUGEINT")


_FROM_PYTHON: dict[Any, str] = {
    bool: "BOOLEAN",
    int: "BIGINT",
    float: "DOUBLE",
    str: "VARCHAR",
    bytes: "BLOB",
    datetime.datetime: "TIMESTAMP",
    datetime.date: "DATE",
    datetime.time: "TIME",
    datetime.timedelta: "INTERVAL",
    uuid.UUID: "UUID",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Udf:
    """A scalar function for SQL. Made by `Udf.of` or `@udf`; calling it calls the function."""

    name: str
    """Its name in SQL."""
    function: Callable[..., Any]
    parameters: tuple[str, ...] | None
    """DuckDB types; None: any arguments."""
    return_type: str
    vectorized: bool = False
    """It takes and gives Arrow arrays."""
    null_handling: NullHandling = "default"
    """"default": NULL for any NULL argument, uncalled, and it must not give None. "special": it is called with None."""
    deterministic: bool = True
    """Equal arguments give equal results, so DuckDB may call it once for many rows."""
    version: str | None = None
    """For the step cache, in place of looking into the function."""

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        parameters: Sequence[TypeSpec] | UDFAnyParameters | None = None,
        *,
        return_type: TypeSpec | None = None,
        name: str | None = None,
        vectorized: bool = False,
        null_handling: NullHandling | None = None,
        deterministic: bool = True,
        version: str | None = None,
    ) -> Udf:
        """The value for a function. Types that are not given come from its annotations; so does the null handling,
        which is "special" if one of them allows None. Raises `InvalidArgument` for what annotations do not say."""
        name = name or str(getattr(function, "__name__", ""))
        if not name.isidentifier():
            raise InvalidArgument(f"a function for SQL needs a name: name='...', not {name!r}")
        hints = _Hints(function, name)
        if isinstance(parameters, UDFAnyParameters):
            types_: tuple[str, ...] | None = None
        else:
            types_ = hints.parameters() if parameters is None else tuple(sql_type(given) for given in parameters)
        result = hints.result() if return_type is None else sql_type(return_type)
        if null_handling is None:
            null_handling = "special" if hints.nullable else "default"
        elif null_handling not in typing.get_args(NullHandling):
            raise InvalidArgument(f"null_handling is 'default' or 'special', not {null_handling!r}")
        return cls(
            name=name,
            function=function,
            parameters=types_,
            return_type=result,
            vectorized=vectorized,
            null_handling=null_handling,
            deterministic=deterministic,
            version=version,
        )

    def register(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Makes the function known to a connection and all its cursors, in place of an earlier one of that name.

        To replace one, come with the very connection object that it was registered with. With other types it needs
        that no result of the connection is unread, and a name that is not DuckDB's own: such a name gets one more
        overload, chosen by the types of the arguments, which cannot be undone. Else raises `InvalidArgument`.
        """
        slots = _slots.setdefault(connection, {})
        slot = slots.get(self.name.lower())
        if slot is not None and slot.takes(self):
            slot.udf = self
            return
        if slot is not None:
            if slot.is_overload:
                # Removing it would take DuckDB's own of that name along.
                raise InvalidArgument(f"{self.name!r} is a name of DuckDB's too, and was registered with other types")
            connection.remove_function(self.name)
        there = "SELECT 1 FROM duckdb_functions() WHERE lower(function_name) = lower(?) LIMIT 1"
        slot = _Slot(self, is_overload=bool(connection.execute(there, [self.name]).fetchall()))
        types_: Any = None if self.parameters is None else [connection.sqltype(type_) for type_ in self.parameters]
        # DuckDB's stubs name enums for what are plain words.
        words: dict[str, Any] = {
            "type": "arrow" if self.vectorized else "native",
            "null_handling": self.null_handling,
            "side_effects": not self.deterministic,
        }
        try:
            connection.create_function(self.name, slot.entry(), types_, connection.sqltype(self.return_type), **words)
        except (duckdb.NotImplementedException, duckdb.CatalogException) as error:
            raise InvalidArgument(f"the function {self.name!r} is there already: {error}") from error
        slots[self.name.lower()] = slot

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)

    def __reduce__(self) -> tuple[object, ...]:
        return by_fields(self)


class _Slot:
    """What DuckDB calls under one name. The function in it can be exchanged, for each task brings its own copy."""

    def __init__(self, udf: Udf, *, is_overload: bool) -> None:
        self.udf = udf
        self.is_overload = is_overload

    def takes(self, other: Udf) -> bool:
        """Whether DuckDB was told the same of the function as it would be of the other."""
        return all(getattr(self.udf, name) == getattr(other, name) for name in _TOLD)

    def entry(self) -> Callable[..., Any]:
        """The function as DuckDB gets it: an error of its says whose it is, and where."""
        as_text = _ROUNDS_WIDE_INTEGERS and not self.udf.vectorized and self.udf.return_type in _WIDE_INTEGERS

        def call(*arguments: Any) -> Any:
            udf = self.udf
            try:
                result = udf.function(*arguments)
            except Exception as error:
                raise failed(error, what="SQL", function=udf.name) from error
            return str(result) if as_text and result is not None else result

        if self.udf.parameters is not None:
            # DuckDB counts them.
            names = [f"p{i}" for i in range(len(self.udf.parameters))]
            parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
            call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call


_TOLD = ("parameters", "return_type", "vectorized", "null_handling", "deterministic")
_slots: weakref.WeakKeyDictionary[duckdb.DuckDBPyConnection, dict[str, _Slot]] = weakref.WeakKeyDictionary()
"""By connection, then by name."""


@typing.overload
def udf(params: Callable[..., Any]) -> Udf: ...
@typing.overload
def udf(
    params: Sequence[TypeSpec] | UDFAnyParameters | None = None,
    return_type: TypeSpec | None = None,
    *,
    use_arrow_type: bool = False,
    name: str | None = None,
    null_handling: NullHandling | None = None,
    deterministic: bool = True,
    version: str | None = None,
) -> Callable[[Callable[..., Any]], Udf]: ...
def udf(
    params: Callable[..., Any] | Sequence[TypeSpec] | UDFAnyParameters | None = None,
    return_type: TypeSpec | None = None,
    *,
    use_arrow_type: bool = False,
    name: str | None = None,
    null_handling: NullHandling | None = None,
    deterministic: bool = True,
    version: str | None = None,
) -> Udf | Callable[[Callable[..., Any]], Udf]:
    """A decorator that makes a function one for SQL: `@udf(params=[...], return_type=...)`, or bare `@udf` if its
    annotations say the types. With `use_arrow_type` it takes and gives Arrow arrays. `Udf` describes the rest."""

    def decorated(function: Callable[..., Any]) -> Udf:
        return Udf.of(
            function,
            None if callable(params) else params,
            return_type=return_type,
            name=name,
            vectorized=use_arrow_type,
            null_handling=null_handling,
            deterministic=deterministic,
            version=version,
        )

    return decorated(params) if callable(params) else decorated


class _Hints:
    """What the annotations of a function say about its types."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._name = name
        try:
            self._signature = inspect.signature(function)
            self._hints = typing.get_type_hints(function)
        except (TypeError, ValueError, NameError):
            # Of C, or with annotations that name what is not there.
            self._signature, self._hints = inspect.Signature(), {}

    @property
    def nullable(self) -> bool:
        """Whether an argument or the result may be None."""
        return any(type(None) in typing.get_args(hint) for hint in self._hints.values())

    def parameters(self) -> tuple[str, ...]:
        found = []
        for parameter in self._signature.parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                raise self._unknown("params=[...]", f"{parameter} can be any number of arguments")
            found.append(self._type_of(parameter.name, parameter.name, "params=[...]"))
        return tuple(found)

    def result(self) -> str:
        return self._type_of("return", "its result", "return_type=...")

    def _type_of(self, key: str, what: str, cure: str) -> str:
        if key not in self._hints:
            raise self._unknown(cure, f"{what} has no annotation that can be read")
        return self._sql(self._hints[key], what, cure)

    def _sql(self, hint: Any, what: str, cure: str) -> str:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Union, types.UnionType):
            kinds = [argument for argument in arguments if argument is not type(None)]
            if len(kinds) == 1:
                return self._sql(kinds[0], what, cure)
        if origin is list and arguments:
            return self._sql(arguments[0], what, cure) + "[]"
        if hint in _FROM_PYTHON:
            return _FROM_PYTHON[hint]
        example = "'DECIMAL(18, 2)'" if hint is Decimal else "'STRUCT(a BIGINT)' or 'MAP(VARCHAR, BIGINT)'"
        example = example if hint is Decimal or dict in (hint, origin) else "'BIGINT'"
        raise self._unknown(cure, f"{what} is a {getattr(hint, '__name__', hint)}; a type is, for example, {example}")

    def _unknown(self, cure: str, why: str) -> InvalidArgument:
        return InvalidArgument(f"the DuckDB types of {self._name!r} are not known: {why}. Pass {cure}")
