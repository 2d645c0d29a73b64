"""What commands print: names made safe for a terminal, sizes, times, columns, JSON lines, and the progress bar.

Data goes to the standard output; progress, summaries and complaints go to the standard error.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that turn the direction of writing."""
_LINE_FEED = re.compile(r"\n")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")


def safe(text: str, *, terminal: bool | None = None) -> str:
    """`text` as a line may hold it: on a terminal control characters are escaped, elsewhere only line feeds, so that
    a name never looks like two."""
    if terminal is None:
        terminal = sys.stdout.isatty()
    escaped = _CONTROL if terminal else _LINE_FEED
    return escaped.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """`text` on one line, control characters escaped: for messages."""
    return safe(" ".join(text.split("\n")), terminal=True)


def human_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in _UNITS[:-1]:
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def plural(count: int, noun: str) -> str:
    """(1, "file") -> "1 file", (2, "file") -> "2 files"."""
    plural_noun = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural_noun}"


def human_time(unix_s: float | None) -> str:
    """Local time to the second; "-" when not known."""
    return "-" if unix_s is None else datetime.datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M:%S")


def iso_time(unix_s: float | None) -> str | None:
    """UTC in ISO 8601, as JSON output has it."""
    if unix_s is None:
        return None
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).isoformat().replace("+00:00", "Z")


def print_line(text: str) -> None:
    """One line of data for people, names in it made safe."""
    click.echo(safe(text))


def print_json(value: Any) -> None:
    """One line of JSON. ASCII only, so that any name survives any terminal."""
    click.echo(json.dumps(value, default=_to_json))


def note(text: str) -> None:
    """A line beside the data."""
    click.echo(safe(text, terminal=True), err=True)


@contextmanager
def note_if_slow(text: str, *, after_s: float = 2.0) -> Iterator[None]:
    """Note `text` when what is done meanwhile takes longer: silence looks like a hang."""
    timer = threading.Timer(after_s, note, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def print_columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Rows aligned in columns; the columns of index `right` to the right. The last column is never padded."""
    if not rows:
        return
    rows = [[safe(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) if index in right else cell.ljust(width)
                 for index, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        click.echo("  ".join(cells).rstrip(" "))


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    width = max((len(name) for name, _ in fields), default=0)
    for name, value in fields:
        print_line(f"{name:<{width}}  {value}")


@contextmanager
def progress_bar(label: str, total_bytes: int | None, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar with rate and remaining time on the standard error, if that is a terminal. Yields `advance(bytes)`."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total_bytes, rate="")

        def advance(count: int) -> None:
            speed = progress.tasks[task].speed
            progress.update(task, advance=count, rate="" if speed is None else f"{human_bytes(speed)}/s")

        yield advance


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if hasattr(value, "__struct_fields__"):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    return str(value)
