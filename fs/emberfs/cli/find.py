"""`find`: paths by name, kind, size and age."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import click

from .entry import Entry, walk
from .listing import to_row
from .location import locate, takes_paths
from .output import json_option, print_json, print_line

_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_TIME_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_KINDS = {"f": "file", "d": "directory", "l": "link"}


def _quantity(text: str, units: dict[str, int]) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]?)(?:i?b)?", text.lower())
    if match is None or match[2] not in units:
        raise click.BadParameter(f"{text!r} is not a number with one of the units {', '.join(filter(None, units))}")
    return float(match[1]) * units[match[2]]


def size_bytes(text: str) -> float:
    """64k -> 65536."""
    return _quantity(text, _SIZE_UNITS)


def age_s(text: str) -> float:
    """7d -> 604800."""
    return _quantity(text, _TIME_UNITS)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """What an entry must be. None: anything."""

    name: str | None
    kind: str | None
    larger_bytes: float | None
    smaller_bytes: float | None
    newer_than_s: float | None
    """Unix time."""
    older_than_s: float | None

    def matches(self, entry: Entry) -> bool:
        """Whether every condition holds. A time that is not known is neither newer nor older."""
        modified_s = entry.modified_s
        return (
            (self.name is None or fnmatch.fnmatchcase(entry.name, self.name))
            and (self.kind is None or entry.kind == _KINDS[self.kind])
            and (self.larger_bytes is None or entry.size_bytes > self.larger_bytes)
            and (self.smaller_bytes is None or entry.size_bytes < self.smaller_bytes)
            and (self.newer_than_s is None or (modified_s is not None and modified_s > self.newer_than_s))
            and (self.older_than_s is None or (modified_s is not None and modified_s < self.older_than_s))
        )


@takes_paths
@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs find books --name '*.txt' --larger 1m\n"
    "  emberline fs find ember:///srv/store --type f --older 30d\n"
    "  emberline fs find books --type f -0 | xargs -0 emberline fs checksum"
)
@click.argument("path", required=False, default="/")
@click.option("--name", help="Pattern for the last part of the path.")
@click.option("--type", "kind", type=click.Choice(list(_KINDS)), help="f file, d directory, l link.")
@click.option("--larger", type=size_bytes, metavar="SIZE", help="More bytes than this (64k, 1.5g).")
@click.option("--smaller", type=size_bytes, metavar="SIZE", help="Fewer bytes than this.")
@click.option("--newer", type=age_s, metavar="AGE", help="Changed within this time (90s, 12h, 7d).")
@click.option("--older", type=age_s, metavar="AGE", help="Not changed within this time.")
@click.option("-L", "--depth", type=click.IntRange(min=1), help="Levels to search.")
@click.option("-0", "--print0", is_flag=True, help="End each URL with a zero byte, not a newline.")
@json_option
def find(
    path: str,
    name: str | None,
    kind: str | None,
    larger: float | None,
    smaller: float | None,
    newer: float | None,
    older: float | None,
    depth: int | None,
    print0: bool,
    as_json: bool,
) -> None:
    """Find paths under PATH. Prints URLs that every other command takes.

    One URL is one line: a line feed in a name is printed as \\n. -0 and --json have every name as it is.
    """
    now_s = time.time()
    wanted = _Wanted(
        name=name,
        kind=kind,
        larger_bytes=larger,
        smaller_bytes=smaller,
        newer_than_s=None if newer is None else now_s - newer,
        older_than_s=None if older is None else now_s - older,
    )
    location = locate(path)
    show: Callable[[str], None] = (lambda url: click.echo(f"{url}\0", nl=False)) if print0 else print_line
    for _, entry in walk(location.fs, location.path, depth_max=depth):
        if wanted.matches(entry):
            if as_json:
                print_json(to_row(location, entry))
            else:
                show(location.at(entry.path).url)
