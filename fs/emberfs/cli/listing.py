"""`ls`, `tree` and `stat`: what is where."""

from __future__ import annotations

import datetime
import stat as stat_bits
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click

from ..errors import NotFound
from ..striping import chains_of
from ..types import Chunks
from .entry import Entry, get_entry, list_entries, relative_to, walk
from .location import Location, expand, locate, takes_paths
from .output import (
    human_bytes,
    human_time,
    iso_time,
    json_option,
    plural,
    print_columns,
    print_fields,
    print_json,
    print_line,
)

_TIMES = {"atime", "ctime", "mtime", "created"}
"""What backends call times, as Unix seconds."""
_TYPE_BITS = {"directory": stat_bits.S_IFDIR, "file": stat_bits.S_IFREG, "link": stat_bits.S_IFLNK}
_SORT_KEYS: dict[str, Callable[[Entry], Any]] = {
    "name": lambda entry: entry.path,
    "size": lambda entry: (-entry.size_bytes, entry.path),
    "time": lambda entry: (-(entry.modified_s or 0), entry.path),
}


def to_row(location: Location, entry: Entry) -> dict[str, Any]:
    """An entry as JSON output has it."""
    return {
        "url": location.at(entry.path).url,
        "path": entry.path,
        "name": entry.name,
        "type": entry.kind,
        "size_bytes": entry.size_bytes,
        "modified": iso_time(entry.modified_s),
        "mode": None if entry.mode is None else f"{entry.mode:04o}",
        "link_target": entry.link_target,
    }


def _label(entry: Entry, name: str) -> str:
    name += "/" if entry.is_dir else ""
    return name if entry.link_target is None else f"{name} -> {entry.link_target}"


@takes_paths
@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs ls ember:///srv/store\n"
    "  emberline fs ls -l --sort size books\n"
    "  emberline fs ls -R --json books | jq .size_bytes"
)
@click.argument("path", nargs=-1)
@click.option("-l", "--long", is_flag=True, help="Show mode, size and time.")
@click.option("-R", "--recursive", is_flag=True, help="Go into directories.")
@click.option("-d", "--directory", is_flag=True, help="Show directories themselves, not what is in them.")
@click.option("--sort", type=click.Choice(list(_SORT_KEYS)), default="name", show_default=True, help="Order.")
@json_option
def ls(path: Sequence[str], long: bool, recursive: bool, directory: bool, sort: str, as_json: bool) -> None:
    """List directories. Without PATH, the root of the store EMBERLINE_URL names.

    One name is one line: a line feed in a name is printed as \\n. --json has every name as it is.
    """
    locations = expand(path or ["/"])
    for location in locations:
        top = get_entry(location.fs, location.path)
        if len(locations) > 1 and top.is_dir and not directory and not as_json:
            print_line(f"{location.url}:")
        if directory or not top.is_dir:
            _print_entries(location, [(top, location.path)], long=long, as_json=as_json)
        elif recursive:
            walked: Iterable[Entry] = (entry for _, entry in walk(location.fs, location.path))
            if sort != "name":
                walked = sorted(walked, key=_SORT_KEYS[sort])
            named = ((entry, relative_to(entry.path, location.path)) for entry in walked)
            _print_entries(location, named, long=long, as_json=as_json)
        else:
            entries = sorted(list_entries(location.fs, location.path), key=_SORT_KEYS[sort])
            _print_entries(location, [(entry, entry.name) for entry in entries], long=long, as_json=as_json)


def _print_entries(location: Location, named: Iterable[tuple[Entry, str]], *, long: bool, as_json: bool) -> None:
    if as_json:
        for entry, _ in named:
            print_json(to_row(location, entry))
    elif long:
        print_columns([_long_row(entry, name) for entry, name in named], right=(1,))
    else:
        for entry, name in named:
            print_line(name + "/" if entry.is_dir else name)


def _long_row(entry: Entry, name: str) -> tuple[str, str, str, str]:
    mode = stat_bits.filemode(_TYPE_BITS.get(entry.kind, 0) | (entry.mode or 0))
    size = "-" if entry.is_dir else human_bytes(entry.size_bytes)
    return (
        mode if entry.mode is not None else f"{mode[0]}---------",
        size,
        human_time(entry.modified_s),
        _label(entry, name),
    )


@takes_paths
@click.command(epilog="\b\nExamples:\n  emberline fs tree ember:///srv/store\n  emberline fs tree -L 2 --size books")
@click.argument("path", required=False, default="/")
@click.option("-L", "--depth", type=click.IntRange(min=1), help="Levels to show.")
@click.option("-s", "--size", is_flag=True, help="Show file sizes.")
@json_option
def tree(path: str, depth: int | None, size: bool, as_json: bool) -> None:
    """Show a directory as a tree."""
    location = locate(path)
    entries = list(walk(location.fs, location.path, depth_max=depth))
    if as_json:
        for level, entry in entries:
            print_json(to_row(location, entry) | {"depth": level})
        return
    print_line(location.url)
    for prefix, entry in _branches(entries):
        suffix = f"  ({human_bytes(entry.size_bytes)})" if size and not entry.is_dir else ""
        print_line(f"{prefix}{_label(entry, entry.name)}{suffix}")
    directories = sum(entry.is_dir for _, entry in entries)
    total = human_bytes(sum(entry.size_bytes for _, entry in entries if not entry.is_dir))
    counts = f"{plural(directories, 'directory')}, {plural(len(entries) - directories, 'file')}"
    print_line("")
    print_line(f"{counts}, {total}")


def _branches(entries: Sequence[tuple[int, Entry]]) -> Iterator[tuple[str, Entry]]:
    """Each entry with the lines that lead to it: whether it is its parent's last child is known from behind."""
    lasts: list[bool] = []
    open_levels: set[int] = set()
    for level, _ in reversed(entries):
        open_levels = {open_level for open_level in open_levels if open_level <= level}
        lasts.append(level not in open_levels)
        open_levels.add(level)
    ended: dict[int, bool] = {}
    for (level, entry), last in zip(entries, reversed(lasts), strict=True):
        ended[level] = last
        above = "".join("    " if ended[upper] else "│   " for upper in range(1, level))
        yield above + ("└── " if last else "├── "), entry


@takes_paths
@click.command(epilog="\b\nExamples:\n  emberline fs stat books/faust.txt\n  emberline fs stat --json 'books/*.txt'")
@click.argument("path", nargs=-1, required=True)
@json_option
def stat(path: Sequence[str], as_json: bool) -> None:
    """Show everything known about a path."""
    for number, location in enumerate(expand(path)):
        info = location.fs.info(location.path)
        row = to_row(location, get_entry(location.fs, location.path))
        row |= {"layout": layout} if (layout := _layout(location)) else {}
        details = {key: value for key, value in info.items() if key not in {"name", "type", "size", "mode", "mtime"}}
        if as_json:
            print_json(row | {"details": details})
            continue
        if number:
            print_line("")
        fields = [(str(name), value) for name, value in (row | details).items() if value is not None]
        print_fields([(name.replace("_", " "), _in_words(name, value)) for name, value in fields])


def _layout(location: Location) -> dict[str, Any] | None:
    """How a store keeps the bytes of a file; None for anything else."""
    if location.protocol != "ember":
        return None
    with location.fs.client as client:
        try:
            inode = client.stat(location.path)
        except NotFound:  # a link to nowhere
            return None
    if isinstance(inode.layout, Chunks):
        size_bytes = inode.layout.chunk_size_bytes
        chunks = -(-inode.length // size_bytes)
        return {
            "kind": "chunks", "chunk_size_bytes": size_bytes, "chunks": chunks,
            "chains": list(chains_of(inode.layout)[:chunks]),
        }  # fmt: skip
    return None if inode.layout is None else {"kind": "inline"}


def _in_words(name: str, value: Any) -> str:
    if name == "layout" and value["kind"] == "chunks":
        chains = ", ".join(map(str, value["chains"])) or "none"
        size = human_bytes(value["chunk_size_bytes"])
        return f"{plural(value['chunks'], 'chunk')} of at most {size}, on chains {chains}"
    if name == "layout":
        return "inline, in the metadata"
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if name in _TIMES and isinstance(value, int | float):
        return str(iso_time(value))
    return str(value)
