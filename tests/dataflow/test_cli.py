"""`emberline sql` as a user meets it. Run: pytest tests/dataflow"""

from __future__ import annotations

import json
from typing import get_args

import pytest
from click.testing import CliRunner, Result
from emberflow import Session
from emberflow.writer import Mode

from emberline.sql import sql as sql_command


def sql(*arguments: str) -> Result:
    return CliRunner().invoke(sql_command, arguments, env={"COLUMNS": "100"})


def test_a_table_with_limited_rows() -> None:
    result = sql("select range n, null x from range(100)")
    assert result.exit_code == 0
    assert "NULL" in result.stdout
    assert "│ 39 │" in result.stdout
    assert "│ 40 │" not in result.stdout
    assert "--limit" in result.stdout
    assert "--limit" not in sql("select range n from range(100)", "--limit", "100").stdout


def test_json_lines() -> None:
    columns = "'ü [b]' t, 1.5 d, sum(range) s, 'nan'::double f, [{'a': date '2024-01-02'}] l, 'ab'::blob b"
    query = f"select {columns} from range(3)"
    result = sql(query, "--json")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"t": "ü [b]", "d": "1.5", "s": 3, "f": None, "l": [{"a": "2024-01-02"}], "b": "6162"}
    ]
    assert len(sql("from range(10)", "--json", "--limit", "4").stdout.splitlines()) == 4


@pytest.mark.parametrize("name", ["out.parquet", "out.csv", "out.csv.gz", "out.json", "out"])
def test_writing(session: Session, root: str, name: str) -> None:
    result = sql("select range n, range % 2 k from range(10)", "-o", f"{root}/{name}")
    assert result.exit_code == 0, result.stderr
    assert "10 rows" in result.stderr
    pattern = f"{root}/out/*.parquet" if name == "out" else f"{root}/{name}"
    assert session.sql(f"select sum(n) s from '{pattern}'").take_all() == [{"s": 45}]
    again = sql("select 1", "-o", f"{root}/{name}")
    assert again.exit_code == 1
    assert "--mode overwrite" in again.stderr
    assert 'mode="' not in again.stderr
    assert sql("select 1", "-o", f"{root}/{name}", "--mode", "overwrite").exit_code == 0


def test_a_slash_makes_a_directory_of_any_name(session: Session, root: str) -> None:
    assert sql("select 1 n", "-o", f"{root}/v1.0/").exit_code == 0
    assert session.sql(f"from '{root}/v1.0/*.parquet'").take_all() == [{"n": 1}]


def test_every_mode_of_the_library_is_an_option() -> None:
    (mode,) = (param for param in sql_command.params if param.name == "mode")
    assert tuple(mode.type.choices) == get_args(Mode)  # type: ignore[attr-defined]


def test_writing_partitions(session: Session, root: str) -> None:
    arguments = ("select range n, range % 2 k from range(10)", "-o", f"{root}/out", "--partition-by", "k")
    assert sql(*arguments).exit_code == 0
    assert sql(*arguments, "--mode", "append").exit_code == 0
    assert session.sql(f"select count(*) c from '{root}/out/k=1/*.parquet'").take_all() == [{"c": 10}]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("selec 1",), 1, "syntax error"),
        (("from '/no/such/*.parquet'",), 1, "No files found"),
        (("select 1", "--json", "-o", "x.csv"), 2, "choose one"),
        (("select 1", "--partition-by", "x"), 2, "needs -o"),
        (("select 1", "--memory-limit", "lots"), 1, "refuses"),
        (("select 1", "-o", "x.xlsx"), 2, ".parquet, .csv, .json, .jsonl"),
        (("select 1", "-o", "x.parquet.gz"), 2, "/ for a directory"),
        (("create table x (a int)",), 1, "pass -o URL"),
    ],
)
def test_mistakes_get_one_clear_line(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = sql(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_help_shows_examples() -> None:
    assert 'emberline sql "select count(*)' in sql("--help").stdout
