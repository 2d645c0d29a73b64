"""One path of any fsspec filesystem, and the walk over a tree of them.

fsspec's backends name the same facts differently (`mtime`, `LastModified`, `created`); this is the one place that
knows. Symbolic links are followed to files; a link to a directory is an entry of the walk but is never entered, so a
walk ends whatever the links say.
"""

from __future__ import annotations

import datetime
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem

PART_PREFIX = ".emberline-part-"
"""Names of copies on their way. A walk skips them: a half file is nobody's data."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a listing says of one path."""

    path: str
    kind: str
    """file, directory, link (one that leads to no file or directory) or other (pipe, socket, device)."""
    size_bytes: int
    modified_s: float | None
    """Unix time; None where the backend does not say."""
    mode: int | None
    """Permission bits; None where the backend has none."""
    link_target: str | None

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rsplit("/", 1)[-1] or "/"

    @property
    def is_dir(self) -> bool:
        return self.kind == "directory"

    @property
    def is_file(self) -> bool:
        return self.kind == "file"


def entry_of(info: dict[str, Any]) -> Entry:
    """An fsspec info dictionary as an `Entry`."""
    mode = info.get("mode")
    kind = {"file": "file", "directory": "directory", "link": "link"}.get(info["type"], "other")
    target = info.get("destination")
    return Entry(
        path=info["name"],
        kind=kind,
        size_bytes=int(info.get("size") or 0),
        modified_s=_modified_s(info),
        mode=mode & 0o7777 if isinstance(mode, int) else None,
        link_target=target.decode("utf-8", "replace") if isinstance(target, bytes) else target,
    )


def _modified_s(info: dict[str, Any]) -> float | None:
    for key in ("mtime", "LastModified", "last_modified", "modified", "updated", "created"):
        value = info.get(key)
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None


def get_entry(fs: AbstractFileSystem, path: str) -> Entry:
    """The entry at `path`, links followed. Raises FileNotFoundError."""
    return entry_of(fs.info(path))


def find_entry(fs: AbstractFileSystem, path: str) -> Entry | None:
    """The entry at `path`, None if there is nothing: no such name, or a link to nowhere or in a circle."""
    try:
        return get_entry(fs, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise


def list_entries(fs: AbstractFileSystem, path: str) -> list[Entry]:
    """The entries of a directory by name; a file is a list of itself. Raises FileNotFoundError."""
    infos = fs.ls(path, detail=True)
    own = path.rstrip("/")
    entries = []
    for info in infos:
        entry = entry_of(info)
        # Object stores list a directory's own marker object among its children.
        if entry.path.rstrip("/") == own and (entry.is_dir or len(infos) > 1):
            continue
        entries.append(_follow(fs, info, entry))
    return sorted(entries, key=lambda entry: entry.path)


def _follow(fs: AbstractFileSystem, info: dict[str, Any], entry: Entry) -> Entry:
    """A listing may describe the link; copying needs what it leads to."""
    if not info.get("islink") and entry.kind != "link":
        return entry
    target = find_entry(fs, entry.path)
    if target is None:
        return Entry(entry.path, "link", 0, entry.modified_s, entry.mode, entry.link_target or "?")
    link_target = target.link_target or entry.link_target or "?"
    return Entry(entry.path, target.kind, target.size_bytes, target.modified_s, target.mode, link_target)


def walk(
    fs: AbstractFileSystem, path: str, *, depth_max: int | None = None, with_parts: bool = False
) -> Iterator[tuple[int, Entry]]:
    """Everything under the directory `path`, parents first, siblings by name: (depth from 1, entry)."""
    stack = [(1, entry) for entry in reversed(list_entries(fs, path))]
    while stack:
        depth, entry = stack.pop()
        if entry.name.startswith(PART_PREFIX) and not with_parts:
            continue
        yield depth, entry
        if entry.is_dir and entry.link_target is None and (depth_max is None or depth < depth_max):
            try:
                children = list_entries(fs, entry.path)
            except FileNotFoundError:  # removed since its parent was listed
                continue
            stack.extend((depth + 1, child) for child in reversed(children))


def relative_to(path: str, parent: str) -> str:
    """The part of `path` below `parent`."""
    prefix = parent.rstrip("/") + "/"
    assert path.startswith(prefix), f"{path!r} is not below {parent!r}"
    return path[len(prefix) :]
