"""From what the user typed to a filesystem and a path in it.

A URL goes to fsspec. A bare path is a path in the store that EMBERLINE_URL names, except that one which begins with
"./", "../" or "~/" is a local file, as nothing in a store is called that. A command that only reads never
makes a store: a mistyped URL is an error, not an empty directory. Stores that were opened are closed with the command.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import fsspec
from fsspec import AbstractFileSystem

from ..errors import NotFound
from ..filesystem import EmberFileSystem
from ..stores import resolve
from ..urls import SCHEME, SUPERBLOCK, cluster_addresses, split_url
from .output import note

STORE_VARIABLE = "EMBERLINE_URL"
_LOCAL_PREFIXES = ("./", "../", "~/")


_PATHS = "A path is a URL, or local if it begins with ./, ../ or ~/, or else a path in the store of EMBERLINE_URL."


def takes_paths(command: click.Command) -> click.Command:
    """Say in the help of `command` what a path is."""
    local = " LOCAL is local without them too." if any(param.name == "local" for param in command.params) else ""
    command.help = f"{inspect.cleandoc(command.help or '')}\n\n{_PATHS}{local}"
    return command


@dataclass(frozen=True, slots=True)
class Location:
    """A path in a filesystem."""

    fs: AbstractFileSystem
    path: str
    into: bool = False
    """The user ended it with a slash: as a target it is a directory to copy into."""

    @property
    def protocol(self) -> str:
        protocol = self.fs.protocol
        return protocol if isinstance(protocol, str) else str(protocol[0])

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def url(self) -> str:
        """The location as the user can type it again."""
        if self.protocol == "ember":
            return f"{self.fs.storage_options['url']}/!{self.path}"
        return str(self.fs.unstrip_protocol(self.path))

    def join(self, relative: str) -> Location:
        """The path `relative` below this one; itself when `relative` is empty."""
        return Location(self.fs, f"{self.path.rstrip('/')}/{relative}") if relative else self

    def at(self, path: str) -> Location:
        """Another path of the same filesystem."""
        return Location(self.fs, path)


def locate(text: str, *, local: bool = False, creates: bool = False) -> Location:
    """The location `text` names. A bare path is in the store of EMBERLINE_URL, or local (see above, or with `local`).

    A store that is not there is NotFound; with `creates` it is made.
    """
    if "://" in text:
        fs, path = _open_url(text, creates=creates)
    elif local or text.startswith(_LOCAL_PREFIXES) or text in {".", ".."}:
        fs, path = _open_url(f"file://{os.path.abspath(os.path.expanduser(text))}")
    else:
        fs, root = _open_url(store_url(text), creates=creates)
        path = f"{root.rstrip('/')}/{text.strip('/')}".rstrip("/") or fs.root_marker
    return Location(fs, path, into=text.endswith("/"))


def store_url(bare_path: str = "") -> str:
    """What EMBERLINE_URL says; a usage error if it says nothing. `bare_path` is what needs it."""
    url = os.environ.get(STORE_VARIABLE, "")
    if url:
        return url
    if bare_path:
        raise click.UsageError(
            f"{bare_path!r} is not a URL, and {STORE_VARIABLE} is not set: give a URL like "
            f"ember:///store/dir/!/path or file:///path, or set {STORE_VARIABLE}"
        )
    raise click.UsageError(f"name a store, like ember:///store/dir, or set {STORE_VARIABLE}")


def store_in(url: str) -> tuple[str, str]:
    """(URL of the store, path in it) that an ember:// URL names. The store need not be there yet."""
    store, path = split_url(url)
    given = os.environ.get(STORE_VARIABLE)
    if store is None and given and given != url:
        return store_in(given)[0], path
    if store is None and not url.startswith(f"{SCHEME}/"):
        raise click.UsageError(f"{url!r} is a path in the store of {STORE_VARIABLE}, which is not set")
    # No store on the way and none given: it is the URL of one that is to be made.
    return resolve(store or url), path.rstrip("/") or "/" if store else "/"


def is_missing(store: str) -> bool:
    """True for the URL of an embedded store that has not been made."""
    return not cluster_addresses(store) and not (Path(store.removeprefix(SCHEME)) / SUPERBLOCK).exists()


def _open_url(url: str, *, creates: bool = False) -> tuple[AbstractFileSystem, str]:
    if not url.startswith(SCHEME):
        fs, path = fsspec.url_to_fs(url)
        return fs, path
    # Every way to write a store's URL gives the same filesystem, so that a copy inside one store is seen as such.
    store, path = store_in(url)
    if is_missing(store):
        directory = store.removeprefix(SCHEME)
        if not creates:
            raise NotFound("no store here (cp, put, sync and mkdir make one)", directory)
        note(f"making a new store at {directory}")
    fs = EmberFileSystem(url=store)
    context = click.get_current_context(silent=True)
    if context is not None:
        context.call_on_close(fs.close)
    return fs, path


def expand(texts: Sequence[str], *, local: bool = False) -> list[Location]:
    """The locations the arguments name, patterns expanded. A path that exists as it is written is not a pattern."""
    locations: list[Location] = []
    for text in texts:
        location = locate(text, local=local)
        if not any(char in location.path for char in "*?[") or location.fs.exists(location.path):
            locations.append(location)
            continue
        matches = sorted(location.fs.glob(location.path))
        if not matches:
            raise NotFound("nothing matches", text)
        locations.extend(location.at(match) for match in matches)
    return locations
