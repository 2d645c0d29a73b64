"""`dump` and `load`: the metadata of a store as versioned JSON lines."""

from __future__ import annotations

import os
import sys
from typing import TextIO

import click

from ..embedded import restore_metadata
from .output import json_option, note, plural, print_json
from .store import directory_of, open_store, require_store, store_argument


@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs dump backup.jsonl ember:///srv/store\n"
    "  emberline fs dump - | zstd > backup.jsonl.zst"
)
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@store_argument
@json_option
def dump(file: str, store: str | None, as_json: bool) -> None:
    """Write the metadata to FILE ("-": standard output). Names, sizes and places; the chunks are not in it."""
    with open_store(store) as client:
        if file == "-":
            client.maintenance.dump(lambda line: sys.stdout.write(f"{line}\n"))
            sys.stdout.flush()
            return
        # A backup that stopped half-way must not replace the last whole one.
        part = f"{file}.part"
        try:
            with open(part, "w", encoding="utf-8") as out:
                count = _Counter(out)
                client.maintenance.dump(count.write_line)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, file)
        except BaseException:
            if os.path.exists(part):
                os.unlink(part)
            raise
    if as_json:
        print_json({"action": "dump", "file": file, "lines": count.lines})
    else:
        note(f"wrote {plural(count.lines, 'line')} to {file}")


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
    "  zstd -dc backup.jsonl.zst | emberline fs load - ember:///srv/store"
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@store_argument
@json_option
def load(file: str, store: str | None, as_json: bool) -> None:
    """Load metadata from FILE into a store whose meta directory is empty or gone. Nobody may have the store open."""
    directory = directory_of(store)
    require_store(directory)
    if file == "-":
        restore_metadata(directory, (line.rstrip("\n") for line in sys.stdin))
    else:
        with open(file, encoding="utf-8") as lines:
            restore_metadata(directory, (line.rstrip("\n") for line in lines))
    if as_json:
        print_json({"action": "load", "file": file, "directory": str(directory)})
    else:
        note(f"loaded {file}; `emberline fs fsck` checks it against the chunks")
