"""Statements that a data layer has to answer as DuckDB does, and the tables they are over.

Shared by the tests of the plan and of the engine. The tables are small and awkward: NULL, NaN, -0.0, infinities,
unicode, empty tables, keys that meet often, seldom and never.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Statement:
    name: str
    sql: str
    ordered: bool = False
    """The order of the rows is part of the answer: an ORDER BY that leaves no ties."""
    unstable: bool = False
    """DuckDB itself may answer in more ways than one; only the number of rows and the types are sure."""


TABLES: dict[str, str] = {
    "events": """
        SELECT i AS id,
            CASE i % 7 WHEN 0 THEN NULL WHEN 1 THEN 'müller' WHEN 2 THEN 'Zoë' WHEN 3 THEN '東京' WHEN 4 THEN ''
                WHEN 5 THEN 'it''s "x"' ELSE 'alpha' END AS host,
            CAST(CASE i % 4 WHEN 3 THEN NULL WHEN 2 THEN 'c' WHEN 1 THEN 'b' ELSE 'a' END AS ENUM('a', 'b', 'c'))
                AS kind,
            CAST(CASE WHEN i % 11 = 0 THEN NULL ELSE i % 5 - 1 END AS INTEGER) AS n,
            CAST(i AS HUGEINT) * 100000000000000000000 - 7 AS big,
            CAST(CASE WHEN i % 9 = 0 THEN NULL ELSE i * 1.25 - 10 END AS DECIMAL(15, 2)) AS price,
            CASE i % 10 WHEN 0 THEN NULL WHEN 1 THEN 'nan'::DOUBLE WHEN 2 THEN -0.0::DOUBLE WHEN 3 THEN 0.0::DOUBLE
                WHEN 4 THEN 'inf'::DOUBLE WHEN 5 THEN '-inf'::DOUBLE ELSE i / 8.0 END AS score,
            CAST(i / 4.0 AS FLOAT) AS ratio,
            CASE WHEN i % 13 = 0 THEN NULL ELSE DATE '2023-12-30' + CAST(i % 6 AS INTEGER) END AS day,
            TIMESTAMP '2024-02-28 23:59:59.5' + INTERVAL (i * 97) MINUTE AS seen,
            TIMESTAMPTZ '2024-03-31 00:30:00+00' + INTERVAL (i * 31) MINUTE AS seen_tz,
            CASE i % 3 WHEN 0 THEN TRUE WHEN 1 THEN FALSE END AS ok
        FROM range(60) r(i)""",
    "hosts": """
        SELECT * FROM (VALUES ('müller', 'DE', 3), ('Zoë', 'NL', 5), ('東京', 'JP', 5), ('nowhere', NULL, 0),
            (NULL, 'XX', 9), ('alpha', 'GR', 1)) h(host, country, weight)""",
    "pairs": """
        SELECT * FROM (VALUES (1, 10), (1, 11), (2, 20), (2, NULL), (NULL, 30), (3, 3), (4, 1), (NULL, NULL), (1, 10))
            p(a, b)""",
    "more": "SELECT * FROM (VALUES (1, 10), (2, 21), (3, NULL), (NULL, 30), (7, 3)) m(a, c)",
    "things": """
        SELECT CAST(i AS INTEGER) AS id,
            CASE i WHEN 2 THEN NULL WHEN 3 THEN [] ELSE [CAST(i AS INTEGER), NULL, 3 - CAST(i AS INTEGER)] END AS tags,
            CASE i WHEN 1 THEN NULL ELSE ['é', 'w' || i, 'a'] END AS words,
            CASE i WHEN 4 THEN NULL ELSE {'x': CAST(i AS INTEGER), 'y': 'y' || i, 'z': {'deep': i * 1.5}} END AS st,
            CASE i WHEN 0 THEN NULL ELSE MAP {'k': CAST(i AS INTEGER), 'l' || i: 7} END AS m,
            [i, i + 1, i * 2]::DOUBLE[3] AS arr,
            CAST('00000000-0000-0000-0000-00000000000' || i AS UUID) AS uid,
            CAST('\\x00\\xFF' || i AS BLOB) AS raw,
            TIME '10:00:00' + INTERVAL (i * 7) MINUTE AS clock
        FROM range(6) r(i)""",
    "odd": """
        SELECT CAST(i AS INTEGER) AS id, INTERVAL (i) MONTH + INTERVAL (i * 3) HOUR AS span,
            CASE WHEN i % 2 = 0 THEN union_value(num := CAST(i AS INTEGER))::UNION(num INTEGER, txt VARCHAR)
                ELSE union_value(txt := 't' || i)::UNION(num INTEGER, txt VARCHAR) END AS un,
            CAST(CAST(i AS INTEGER) AS BIT) AS bits,
            CAST('12:30:00+0' || i AS TIMETZ) AS zoned
        FROM range(4) r(i)""",
    "nothing": "SELECT CAST(1 AS INTEGER) AS k, 'x' AS v, 1.5::DOUBLE AS d WHERE FALSE",
    "wide": 'SELECT i AS "a b", i * 2 AS "select", i % 3 AS "Ünï", \'q\' || i AS "x""y" FROM range(5) r(i)',
}


def _statements() -> Iterator[Statement]:
    group: list[str] = []
    count = 0
    for line in Path(__file__).with_suffix(".sql").read_text().splitlines():
        if line.startswith("--"):
            group, count = line.split()[1:], 0
        elif line:
            yield Statement(f"{group[0]}{count}", line, "ordered" in group[1:], "unstable" in group[1:])
            count += 1


STATEMENTS: tuple[Statement, ...] = tuple(_statements())
