"""Types and constants, from DuckDB's JSON to SQL text.

Invariants: a type's text is what DESCRIBE shows and what CAST takes; a constant's text has exactly that type, whatever
stands around it, and gives back every bit of the value.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable

import duckdb

from ..query import literal, quoted
from .fields import Fields, Json, NotPlannable

_SMALL_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
_LARGE_INTEGERS = ("HUGEINT", "UHUGEINT")
_TIMES = ("DATE", "TIME", "TIME WITH TIME ZONE", "TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS")
_OTHERS = ("TIMESTAMP WITH TIME ZONE", "INTERVAL", "BOOLEAN", "FLOAT", "DOUBLE", "VARCHAR", "BLOB", "BIT", "UUID")
_SIMPLE = frozenset((*_SMALL_INTEGERS, *_LARGE_INTEGERS, *_TIMES, *_OTHERS, "TIME_NS", "BIGNUM"))

_EPOCH = datetime.datetime(1970, 1, 1)
_DATE_INFINITY_DAYS = 2**31 - 1
_TIMESTAMP_INFINITY = 2**63 - 1
_TIMETZ_OFFSET_MAX_S = 16 * 3600 - 1


class TypeText:
    """Writes types and constants. It asks DuckDB once for its keywords, which it quotes in the names of fields."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        rows = connection.execute("SELECT keyword_name FROM duckdb_keywords()").fetchall()
        self._keywords = frozenset(name for (name,) in rows)

    def field(self, name: str) -> str:
        """The name of a STRUCT's or UNION's member, quoted where DuckDB would."""
        plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and name.lower() not in self._keywords
        return name if plain else quoted(name)

    def type(self, json: Json) -> str:
        fields = Fields(json, "a type")
        id_ = fields.take("id")
        info = Fields(fields.take("type_info", {}), f"the type {id_}")
        fields.done()
        info.ignore("type", "collation")
        alias = info.take("alias", "")
        text = self._nested(id_, info)
        info.done()
        if alias and (id_, alias) != ("VARCHAR", "JSON"):
            raise NotPlannable(f"the type {alias}")
        return alias or text

    def _nested(self, id_: str, info: Fields) -> str:
        if id_ in _SIMPLE:
            return id_
        if id_ == "NULL":
            return '"NULL"'
        if id_ == "DECIMAL":
            return f"DECIMAL({info.take('width')},{info.take('scale')})"
        if id_ == "ENUM":
            info.ignore("values_count")
            return "ENUM(" + ", ".join(literal(value) for value in info.take("values")) + ")"
        if id_ == "LIST":
            return self.type(info.take("child_type")) + "[]"
        if id_ == "ARRAY":
            return f"{self.type(info.take('child_type'))}[{info.take('size')}]"
        if id_ == "MAP":
            key, value = (member["second"] for member in info.take("child_type")["type_info"]["child_types"])
            return f"MAP({self.type(key)}, {self.type(value)})"
        if id_ in ("STRUCT", "UNION", "TUPLE"):
            members = info.take("child_types")[id_ == "UNION" :]
            texts = (f"{self.field(m['first'])} {self.type(m['second'])}" for m in members if m["first"])
            unnamed = (self.type(m["second"]) for m in members if not m["first"])
            return f"{id_}({', '.join([*texts, *unnamed])})"
        raise NotPlannable(f"the type {id_}")

    def constant(self, json: Json, type_: Json = None) -> str:
        """A value with its type. DuckDB 2.0 leaves the type out inside nested values; there `type_` gives it."""
        fields = Fields(json, "a constant")
        type_ = fields.take("type", type_)
        is_null = fields.take("is_null")
        value = fields.take("value", None)
        fields.done()
        text = self.type(type_)
        if is_null:
            return "NULL" if text == '"NULL"' else f"CAST(NULL AS {text})"
        if text == "VARCHAR":
            return f"CAST({literal(value)} AS VARCHAR)"
        if type_["id"] in _SCALARS:
            return _SCALARS[type_["id"]](value, text)
        return self._nested_constant(type_, text, value)

    def _nested_constant(self, type_: Json, text: str, value: Json) -> str:
        info = type_.get("type_info", {})
        if type_["id"] == "DECIMAL":
            return f"CAST({literal(_decimal(_integer(value), info['scale']))} AS {text})"
        if type_["id"] == "ENUM":
            return f"CAST({literal(info['values'][value])} AS {text})"
        if text == "JSON":
            return f"CAST({literal(value)} AS JSON)"
        values = value["children"]
        if type_["id"] in ("LIST", "ARRAY"):
            items = ", ".join(self.constant(item, info["child_type"]) for item in values)
            return f"CAST([{items}] AS {text})"
        if type_["id"] == "MAP":
            key_type, value_type = (m["second"] for m in info["child_type"]["type_info"]["child_types"])
            entries = [entry["value"]["children"] for entry in values]
            keys = ", ".join(self.constant(key, key_type) for key, _ in entries)
            items = ", ".join(self.constant(item, value_type) for _, item in entries)
            return f"CAST(MAP([{keys}], [{items}]) AS {text})"
        members = info["child_types"]
        if type_["id"] == "UNION":
            member = members[values[0]["value"] + 1]
            chosen = next(item for item in values[1:] if not item["is_null"] or len(values) == 2)
            return (
                f"CAST(union_value({quoted(member['first'])} := {self.constant(chosen, member['second'])}) AS {text})"
            )
        held = [self.constant(item, member["second"]) for item, member in zip(values, members, strict=True)]
        if type_["id"] == "STRUCT" and all(member["first"] for member in members):
            names = [quoted(member["first"]) for member in members]
            return "struct_pack(" + ", ".join(f"{n} := {i}" for n, i in zip(names, held, strict=True)) + ")"
        return "row(" + ", ".join(held) + ")"


def _integer(value: Json) -> int:
    """A number, or a 128-bit one in two halves."""
    return value["upper"] * 2**64 + value["lower"] if isinstance(value, dict) else int(value)


def _decimal(unscaled: int, scale: int) -> str:
    digits = str(abs(unscaled)).rjust(scale + 1, "0")
    whole, fraction = digits[: len(digits) - scale], digits[len(digits) - scale :]
    return ("-" if unscaled < 0 else "") + whole + ("." + fraction if scale else "")


def _float(value: Json, text: str) -> str:
    number = float(value)
    if math.isfinite(number):
        return f"CAST('{number!r}' AS {text})"
    return f"CAST('{'nan' if math.isnan(number) else 'inf' if number > 0 else '-inf'}' AS {text})"


def _date(days: int, text: str) -> str:
    if abs(days) == _DATE_INFINITY_DAYS:
        return f"CAST('{'-' if days < 0 else ''}infinity' AS DATE)"
    try:
        return f"CAST('{(_EPOCH + datetime.timedelta(days=days)).date().isoformat()}' AS DATE)"
    except OverflowError:
        return f"(CAST('1970-01-01' AS DATE) + CAST({days} AS INTEGER))"


def _timestamp(unit: str) -> Callable[[int, str], str]:
    """A count since 1970 as a timestamp; the count itself goes into the text, so nothing is rounded."""

    def write(count: int, text: str) -> str:
        if abs(count) == _TIMESTAMP_INFINITY:
            return f"CAST('{'-' if count < 0 else ''}infinity' AS {text})"
        if unit == "ns":
            return f"make_timestamp_ns(CAST({count} AS BIGINT))"
        micros = count * {"s": 1_000_000, "ms": 1_000, "us": 1}[unit]
        zone = "+00" if "ZONE" in text else ""
        try:
            return f"CAST('{(_EPOCH + datetime.timedelta(microseconds=micros)).isoformat(sep=' ')}{zone}' AS {text})"
        except OverflowError:
            return f"CAST(make_timestamp(CAST({micros} AS BIGINT)) AS {text})"

    return write


def _clock(micros: int) -> str:
    """hh:mm:ss.ffffff; 24:00:00 is a time in SQL and not in Python."""
    seconds, micros = divmod(micros, 1_000_000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{micros:06}"


def _timetz(bits: int, text: str) -> str:
    """The upper 40 bits are the microseconds; the lower 24 count the offset down from its maximum."""
    offset_s = _TIMETZ_OFFSET_MAX_S - (bits & 0xFFFFFF)
    sign = "-" if offset_s < 0 else "+"
    hours, rest_s = divmod(abs(offset_s), 3600)
    return f"CAST('{_clock(bits >> 24)}{sign}{hours:02}:{rest_s // 60:02}:{rest_s % 60:02}' AS {text})"


def _uuid(value: Json, text: str) -> str:
    """DuckDB keeps it with the first bit flipped, so that it sorts as a signed number."""
    digits = f"{(_integer(value) % 2**128) ^ 2**127:032x}"
    return f"CAST('{'-'.join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))}' AS UUID)"


def _interval(value: Json, text: str) -> str:
    months, days, micros = (value.get(unit, 0) for unit in ("months", "days", "micros"))
    return f"CAST('{months} months {days} days {micros} microseconds' AS INTERVAL)"


_SCALARS: dict[str, Callable[[Json, str], str]] = {
    **dict.fromkeys(_SMALL_INTEGERS, lambda value, text: f"CAST({value} AS {text})"),
    **dict.fromkeys(_LARGE_INTEGERS, lambda value, text: f"CAST('{_integer(value)}' AS {text})"),
    **dict.fromkeys(("FLOAT", "DOUBLE"), _float),
    "BOOLEAN": lambda value, text: "TRUE" if value else "FALSE",
    "BLOB": lambda value, text: f"CAST({literal(value)} AS BLOB)",
    "DATE": _date,
    "TIME": lambda value, text: f"CAST('{_clock(value)}' AS TIME)",
    "TIME WITH TIME ZONE": _timetz,
    "TIMESTAMP_S": _timestamp("s"),
    "TIMESTAMP_MS": _timestamp("ms"),
    "TIMESTAMP": _timestamp("us"),
    "TIMESTAMP WITH TIME ZONE": _timestamp("us"),
    "TIMESTAMP_NS": _timestamp("ns"),
    "INTERVAL": _interval,
    "UUID": _uuid,
}
