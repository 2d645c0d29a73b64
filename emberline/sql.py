"""`emberline sql`: one query, printed as a table or as JSON lines, or written to a dataset.

Invariant: what is imported here loads neither DuckDB nor Arrow, so that `--help` does not wait for them.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from emberflow import DataFrame

Mode = Literal["error", "overwrite", "append"]
Format = Literal["parquet", "csv", "json"]

_TABLE_ROWS = 40
_NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL")
_SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_COMPRESSIONS = (".gz", ".zst")
_IN_OPTIONS = {
    'mode="overwrite"': "--mode overwrite",
    'mode="append"': "--mode append",
    "use write_parquet()": "pass -o URL",
}
"""What the library's messages advise, in the words of the command line."""


@click.command("sql")
@click.argument("query")
@click.option("--limit", type=click.IntRange(min=0), help=f"At most this many rows. A table shows {_TABLE_ROWS}.")
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON lines.")
@click.option("-o", "--output", metavar="URL", help="Write to URL: .parquet, .csv or .json(l), or dir/ of Parquet.")
@click.option("--partition-by", metavar="COLUMN", multiple=True, help="With -o: one directory per value. Repeatable.")
@click.option(
    "--mode",
    type=click.Choice(["error", "overwrite", "append"]),
    default="error",
    help="With -o: when the target has files.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads that run the query. By default one per core.")
@click.option("--memory-limit", metavar="SIZE", help='Memory before spilling, as in "4GB".')
def sql(
    query: str,
    limit: int | None,
    as_json: bool,
    output: str | None,
    partition_by: tuple[str, ...],
    mode: Mode,
    threads: int | None,
    memory_limit: str | None,
) -> None:
    """Run one SQL QUERY (DuckDB's dialect) over whole datasets.

    Name files by URL or path, in quotes. Any fsspec URL will do: ember, s3, file, ...; ember://x is in the store of
    EMBERLINE_URL. Unlike those of `emberline fs`, a bare path is a local file.

    \b
    What -o writes, by the end of URL:
      .parquet                one Parquet file
      .csv, .json, .jsonl     one file, also .gz or .zst after it; JSON is one object per line
      / or no suffix          a directory of Parquet files

    \b
    Examples:
      emberline sql "select count(*) from 'ember://./store/corpus/*.parquet'"
      emberline sql "from 'logs/*.json.zst' where level = 'error'" --json --limit 10
      emberline sql "from 'data.csv'" -o ember://./store/data --partition-by day
    """
    if as_json and output is not None:
        raise click.UsageError("--json prints rows and -o writes them: choose one")
    if partition_by and output is None:
        raise click.UsageError("--partition-by needs -o")
    format = _format_of(output, partitioned=bool(partition_by)) if output is not None else "parquet"
    from emberflow import FlowError, init

    try:
        with init(threads=threads, memory_limit=memory_limit) as session:
            frame = session.sql(query)
            if output is not None:
                _write(frame if limit is None else frame.limit(limit), output, format, list(partition_by), mode)
            elif as_json:
                for row in (frame if limit is None else frame.limit(limit)).iter_rows():
                    click.echo(json.dumps(_jsonable(row), ensure_ascii=False, default=str))
            else:
                _print_table(frame, _TABLE_ROWS if limit is None else limit)
    except (FlowError, OSError, ImportError) as error:
        raise click.ClickException(_in_options(str(error))) from error
    except RuntimeError as error:
        # How DuckDB passes Ctrl-C on.
        if "interrupted" in str(error).lower():
            raise KeyboardInterrupt from None
        raise


def _format_of(url: str, *, partitioned: bool) -> Format:
    """What the end of `url` asks for. A suffix that nothing is known of is more likely a mistake than a directory."""
    name = url.rpartition("/")[2]
    for compression in _COMPRESSIONS:
        if name.endswith((f".csv{compression}", f".json{compression}", f".jsonl{compression}")):
            name = name.removesuffix(compression)
    suffix = os.path.splitext(name)[1]
    if partitioned or not suffix:
        return "parquet"
    if suffix not in _SUFFIXES:
        raise click.UsageError(
            f"-o does not write {suffix!r}: end the URL with {', '.join(_SUFFIXES)} (the text formats also with .gz or "
            ".zst after it), or with / for a directory of Parquet files"
        )
    return _SUFFIXES[suffix]


def _in_options(message: str) -> str:
    for python, option in _IN_OPTIONS.items():
        message = message.replace(python, option)
    return message


def _write(frame: DataFrame, url: str, format: Format, partition_by: list[str], mode: Mode) -> None:
    if format == "parquet":
        report = frame.write_parquet(url, partition_by=partition_by, mode=mode)
    elif format == "csv":
        report = frame.write_csv(url, mode=mode)
    else:
        report = frame.write_json(url, mode=mode)
    click.echo(f"{report.num_rows:,} rows, {report.num_files:,} files, {report.size_bytes:,} bytes in {url}", err=True)


def _print_table(frame: DataFrame, limit: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = frame.take(limit + 1)
    table = Table(header_style="bold")
    for name, type_ in frame.schema.items():
        table.add_column(Text(name), justify="right" if type_.startswith(_NUMBERS) else "left", overflow="fold")
    for row in rows[:limit]:
        table.add_row(*(Text("NULL", style="dim") if value is None else Text(str(value)) for value in row.values()))
    console = Console()
    console.print(table)
    if len(rows) > limit:
        console.print(f"The first {limit} rows; --limit shows more.")


def _jsonable(value: Any) -> Any:
    """Without NaN and infinity, which JSON lacks, and with the keys of maps as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value
