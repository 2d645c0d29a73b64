"""Whether a text of SQL that nobody planned gives the same rows from the same input: what may keep it from that.

DuckDB's parser takes the text apart. What is not known to be steady is in doubt: a function that reads the clock or
draws, a table function that is not on our list, a table that is none of the names given. A function DuckDB does not
have is the user's, whose meaning others look at.

Does not know: files, plans, what follows from a doubt.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import duckdb

_STEADY_TABLES = {"range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree"}
# `age` of one time is its distance from today. Words that are columns to the parser may be the clock to the binder.
_CLOCKS = {"age", "current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}
_NOT_DRAWN = -1


def doubt(text: str, names: Iterable[str]) -> str | None:
    """Why the text, which reads tables called `names`, may give other rows next time; None if it does not."""
    tree = _parsed(text)
    if tree is None:
        return "it is no plain SELECT"
    parts = list(_parts(tree))
    known = {name.lower() for name in names}
    known |= {str(entry["key"]).lower() for part in parts for entry in (part.get("cte_map") or {}).get("map", ())}
    return next((why for part in parts if (why := _doubt_of(part, known))), None)


def _doubt_of(part: dict[str, Any], known: set[str]) -> str | None:
    kind = part.get("type")
    if kind == "BASE_TABLE" and (part["schema_name"] or part["table_name"].lower() not in known):
        return f"it reads {part['table_name']}"
    if kind == "TABLE_FUNCTION" and part["function"].get("function_name", "").lower() not in _STEADY_TABLES:
        return f"it calls the table function {part['function'].get('function_name')}"
    if kind == "SHOW_REF":
        return "it asks for the catalog"
    if kind == "COLUMN_REF" and part["column_names"][-1].lower() in _CLOCKS:
        return f"it reads {part['column_names'][-1]}"
    if str(part.get("function_name", "")).lower() in _unsteady_functions():
        return f"it calls {part['function_name']}()"
    sample = part.get("sample")
    if isinstance(sample, dict) and sample.get("seed", _NOT_DRAWN) == _NOT_DRAWN:
        return "it draws a sample"
    return None


def _parsed(text: str) -> Any:
    with duckdb.connect() as connection:
        found = connection.execute("SELECT json_serialize_sql($1::VARCHAR)", [text]).fetchone()
    assert found is not None
    tree = json.loads(found[0])
    return None if tree.get("error") else tree


def _parts(tree: Any) -> Iterator[dict[str, Any]]:
    stack = [tree]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            yield part
            stack += part.values()
        elif isinstance(part, list):
            stack += part


@functools.cache
def _unsteady_functions() -> frozenset[str]:
    """Functions of DuckDB's that give something else each time, or in each query."""
    with duckdb.connect() as connection:
        rows = connection.execute(
            "SELECT lower(function_name), list(DISTINCT stability), string_agg(macro_definition, ' ') "
            "FROM duckdb_functions() WHERE function_type IN ('scalar', 'aggregate', 'macro') GROUP BY ALL"
        ).fetchall()
    # Some overloads depend on the time zone, which is the same everywhere: then others do not.
    unsteady = {name for name, grades, _ in rows if "VOLATILE" in grades}
    unsteady |= {name for name, grades, _ in rows if "CONSISTENT_WITHIN_QUERY" in grades and "CONSISTENT" not in grades}
    unsteady |= _CLOCKS
    macros = {name for name, _, body in rows if body and unsteady & set(re.findall(r"\w+", body.lower()))}
    return frozenset(unsteady | macros)
