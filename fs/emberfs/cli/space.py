"""`du` and `df`: how much space is used, and how much is left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import click

from .entry import get_entry, relative_to, walk
from .location import Location, expand, locate, takes_paths
from .output import human_bytes, json_option, print_columns, print_json


@dataclass(slots=True)
class _Sum:
    size_bytes: int = 0
    files: int = 0

    def add(self, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        self.files += 1


@takes_paths
@click.command(epilog="\b\nExamples:\n  emberline fs du ember:///srv/store\n  emberline fs du -s 'books/*'")
@click.argument("path", nargs=-1)
@click.option("-s", "--summarize", is_flag=True, help="Only the total of each PATH.")
@click.option("-d", "--depth", type=click.IntRange(min=0), help="Show directories down to this level.")
@json_option
def du(path: Sequence[str], summarize: bool, depth: int | None, as_json: bool) -> None:
    """Sum up file lengths per directory. A file with two names counts twice."""
    rows: list[tuple[str, str, str]] = []
    for location in expand(path or ["/"]):
        for directory, total in _sums(location, depth_max=0 if summarize else depth).items():
            url = location.join(directory).url
            if as_json:
                print_json({"url": url, "size_bytes": total.size_bytes, "files": total.files})
            rows.append((human_bytes(total.size_bytes), str(total.files), url))
    if not as_json:
        print_columns([("size", "files", "path"), *rows], right=(0, 1))


def _sums(location: Location, *, depth_max: int | None) -> dict[str, _Sum]:
    """Per directory, relative to `location` ("" is itself), the sums over everything below it."""
    sums = {"": _Sum()}
    top = get_entry(location.fs, location.path)
    if not top.is_dir:
        sums[""].add(top.size_bytes)
        return sums
    for level, entry in walk(location.fs, location.path):
        relative = relative_to(entry.path, location.path)
        if entry.is_dir and entry.link_target is None:
            if depth_max is None or level <= depth_max:
                sums[relative] = _Sum()
        elif entry.is_file:
            names = relative.split("/")[:-1]
            for count in range(len(names) + 1):
                directory = sums.get("/".join(names[:count]))
                if directory is not None:
                    directory.add(entry.size_bytes)
    return sums


@takes_paths
@click.command(epilog="\b\nExamples:\n  emberline fs df ember:///srv/store\n  emberline fs df --json file:///data")
@click.argument("path", required=False, default="/")
@json_option
def df(path: str, as_json: bool) -> None:
    """Show free and used space of the store, or of the disk of a file:// path."""
    location = locate(path)
    row: dict[str, int]
    if location.protocol == "ember":
        with location.fs.client as client:
            space, usage = client.space(), client.usage()
        row = {
            **space,
            "files": usage.files,
            "directories": usage.directories,
            "length_bytes": usage.length_bytes,
            "trash_entries": usage.trash_entries,
            "gc_pending": usage.gc_pending,
        }
    elif location.protocol in {"file", "local"}:
        status = os.statvfs(location.path)
        row = {
            "total_bytes": status.f_blocks * status.f_frsize,
            "used_bytes": (status.f_blocks - status.f_bfree) * status.f_frsize,
            "free_bytes": status.f_bavail * status.f_frsize,
        }
    else:
        raise click.UsageError(f"{location.protocol}:// does not say how much space it has")
    if as_json:
        print_json({"url": location.url, **row})
        return
    rows = [(name.removesuffix("_bytes").replace("_", " "), _value(name, value)) for name, value in row.items()]
    print_columns(rows, right=(1,))


def _value(name: str, value: int) -> str:
    return human_bytes(value) if name.endswith("_bytes") else str(value)
