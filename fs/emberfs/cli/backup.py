"""`dump` and `load`: the metadata of a store as versioned JSON lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import click

from ..embedded import restore_metadata
from ..urls import cluster_addresses
from .output import json_option, note, plural, print_json
from .store import directory_of, open_cluster, open_store, require_store, store_argument, url_of

NAMELESS_SHOWN = 5


@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs dump backup.jsonl ember:///srv/store\n"
    "  emberline fs dump - | zstd > backup.jsonl.zst\n"
    "  emberline fs dump backup.jsonl ember://db1:7301,db2:7301"
)
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@store_argument
@json_option
def dump(file: str, store: str | None, as_json: bool) -> None:
    """Write the metadata to FILE ("-": standard output). Names, sizes and places; the chunks are not in it.

    A cluster goes on while it is dumped. It takes an admin's credentials.
    """
    with _dumping(url_of(store)) as write_dump:
        if file == "-":
            _note_nameless(write_dump(lambda line: sys.stdout.write(f"{line}\n")))
            sys.stdout.flush()
            return
        # A backup that stopped half-way must not replace the last whole one.
        part = f"{file}.part"
        try:
            with open(part, "w", encoding="utf-8") as out:
                count = _Counter(out)
                nameless = write_dump(count.write_line)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, file)
        except BaseException:
            if os.path.exists(part):
                os.unlink(part)
            raise
    if as_json:
        print_json({"action": "dump", "file": file, "lines": count.lines, "nameless": nameless or []})
    else:
        note(f"wrote {plural(count.lines, 'line')} to {file}")
        _note_nameless(nameless)


def _note_nameless(trash_ids: list[str] | None) -> None:
    if trash_ids:
        note(
            f"no name leads to {plural(len(trash_ids), 'inode')}: in the trash of the dump, as "
            f"{', '.join(trash_ids[:NAMELESS_SHOWN])}{', ...' if len(trash_ids) > NAMELESS_SHOWN else ''}; "
            "see `emberline fs fsck`"
        )


@contextmanager
def _dumping(url: str) -> Iterator[Callable[[Callable[[str], object]], list[str] | None]]:
    """What hands every line of the dump of a store to a function; it may return trash ids, see `ClusterMaintenance`."""
    if cluster_addresses(url):
        with open_cluster(url) as maintenance:
            yield maintenance.dump
    else:
        with open_store(url) as client:
            yield client.maintenance.dump


class _Counter:
    """Lines on their way into a file."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self.lines = 0

    def write_line(self, line: str) -> None:
        """Write one line."""
        self._out.write(f"{line}\n")
        self.lines += 1


@click.command(
    epilog="\b\nExamples:\n"
    "  mv store/meta store/meta.broken && emberline fs load backup.jsonl ember:///srv/store\n"
    "  zstd -dc backup.jsonl.zst | emberline fs load - ember:///srv/store\n"
    "  emberline fs load backup.jsonl --kv /srv/ember-kv   # of a cluster, whose servers are stopped"
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@store_argument
@click.option(
    "--kv",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of a cluster's kv server: empty, and the server stopped.",
)
@json_option
def load(file: str, store: str | None, kv: Path | None, as_json: bool) -> None:
    """Load metadata from FILE into a store whose meta directory is empty or gone. Nobody may have the store open.

    With --kv, into the directory of a cluster's kv server; docs/operations.md says what else that takes.
    """
    directory = kv or _directory_to_load(store)
    if file == "-":
        _load(directory, sys.stdin, is_kv=kv is not None)
    else:
        with open(file, encoding="utf-8") as lines:
            _load(directory, lines, is_kv=kv is not None)
    if as_json:
        print_json({"action": "load", "file": file, "directory": str(directory)})
    elif kv is not None:
        note(f"loaded {file}; start the kv server, the managers, then the storage nodes that served to the end")
    else:
        note(f"loaded {file}; `emberline fs fsck` checks it against the chunks")


def _directory_to_load(store: str | None) -> Path:
    """Of an embedded store. A usage error for a cluster that runs, or would have to."""
    url = url_of(store)
    if cluster_addresses(url):
        raise click.UsageError(
            f"{url} is a cluster, with chains of its own, and the chunks of a dump's files are on those of the dump: "
            "both are loaded together, into the directory of a kv server that is stopped (--kv DIRECTORY)"
        )
    directory = directory_of(url)
    require_store(directory)
    return directory


def _load(directory: Path, lines: TextIO, *, is_kv: bool) -> None:
    stripped = (line.rstrip("\n") for line in lines)
    if is_kv:
        from ..cluster.restoring import restore_kv

        restore_kv(directory, stripped)
    else:
        restore_metadata(directory, stripped)
