"""From TOML tables to frozen dataclasses, and back to flat keys; a mistake is told by its key.

A table is a dataclass, a key is one of its fields. Types are checked as they are annotated: numbers, strings, booleans,
literals, tuples, `X | None`, and dataclasses inside. It knows nothing of what the fields mean: dataclasses check that
themselves, and what they raise is told with the table's name.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..errors import ConfigError

T = TypeVar("T")


def build(kind: type[T], table: Mapping[str, Any], name: str = "") -> T:
    """The dataclass of a table. Raises ConfigError, which names the key."""
    assert dataclasses.is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            where = f"[{name}] has" if name else "there is"
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise ConfigError(f"{where} no {key}: {hint}")
    values = {key: _value(hints[key], value, _dotted(name, key)) for key, value in table.items()}
    for key, field in fields.items():
        if key in values:
            continue
        if dataclasses.is_dataclass(hints[key]) and field.default_factory is dataclasses.MISSING:
            values[key] = build(hints[key], {}, _dotted(name, key))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_dotted(name, key)} is not set, and has to be")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(str(error) if not name or str(error).startswith(name) else f"[{name}] {error}") from error


def _dotted(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _value(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotation has it."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (each for each in typing.get_args(hint) if each is not type(None))
        return _value(inner, value, key)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is a table, [{key}], not {value!r}")
        return build(typing.cast(type, hint), value, key)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{key} is one of {', '.join(map(str, choices))}, not {value!r}")
        return value
    if origin is tuple:
        inner = typing.get_args(hint)
        count = None if inner[-1] is Ellipsis else len(inner)
        if not isinstance(value, list | tuple) or (count is not None and len(value) != count):
            raise ConfigError(f"{key} is a list{f' of {count}' if count else ''}, not {value!r}")
        return tuple(_value(inner[0], each, key) for each in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{key} is {names[hint]}, not {value!r}")
    return value


def parse(text: str, source: str) -> dict[str, Any]:
    """The tables of a TOML text. `source` is what errors call it."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error


def override(tables: dict[str, Any], assignments: Iterable[str]) -> None:
    """Sets keys of `tables` from lines as "data.batch_samples=4"; what is no TOML value is a string."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{assignment!r} is not KEY=VALUE, as in data.batch_samples=4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *path, last = key.strip().split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{key.strip()}: {part} is a value, not a table")
        table[last] = value


def flat(config: Any) -> dict[str, Any]:
    """Every field of a dataclass and of those in it, by dotted key; tuples are lists, as JSON has them."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out |= {f"{field.name}.{key}": each for key, each in flat(value).items()}
        else:
            out[field.name] = list(value) if isinstance(value, tuple) else value
    return out
