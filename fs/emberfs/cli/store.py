"""From a command's STORE argument to an open store.

A command that only looks never makes a store: a mistyped URL is an error, not an empty store.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from ..client.sync import Client
from ..embedded import store_directory
from ..errors import NotFound
from ..urls import SCHEME, SUPERBLOCK, split_url
from .location import STORE_VARIABLE, store_url

_Command = TypeVar("_Command", bound=Callable[..., Any])


def store_argument(function: _Command) -> _Command:
    """The argument STORE, and what the help says of it."""
    text = inspect.cleandoc(function.__doc__ or "")
    function.__doc__ = f"{text}\n\nSTORE is a URL like ember:///store/dir; without it, the one of {STORE_VARIABLE}."
    return click.argument("store", required=False)(function)


def directory_of(url: str | None) -> Path:
    """The directory of the store that `url`, or EMBERLINE_URL, names; a path inside the store is cut off."""
    url = url or store_url()
    if not url.startswith(SCHEME):
        raise click.UsageError(
            f"not the URL of a store: {url!r}; it looks like ember:///store/dir (or set {STORE_VARIABLE})"
        )
    return store_directory(split_url(url)[0] or url).resolve()


def require_store(directory: Path) -> None:
    """Raises NotFound if there is no store at `directory`."""
    if not (directory / SUPERBLOCK).exists():
        raise NotFound("no store here (cp, put, sync and mkdir make one)", str(directory))


@contextmanager
def open_store(url: str | None) -> Iterator[Client]:
    """A client of an existing store, closed at the end. Raises NotFound, StoreBusy, StoreFormat."""
    directory = directory_of(url)
    require_store(directory)
    with Client(f"{SCHEME}{directory}") as client:
        yield client
