"""`cat` and `checksum`: what is in files."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from ..checksum import crc32c
from .entry import get_entry, walk
from .filecopy import BLOCK_BYTES
from .location import Location, expand, takes_paths
from .output import json_option, print_json, print_line, progress_bar


class _Crc32c:
    """hashlib's interface to the store's own checksum."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = crc32c(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


_ALGORITHMS: dict[str, Callable[[], Any]] = {
    "crc32c": _Crc32c,
    "md5": lambda: hashlib.md5(usedforsecurity=False),
    "sha256": hashlib.sha256,
}


@takes_paths
@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs cat books/faust.txt | less\n"
    "  emberline fs cat 'logs/*.jsonl' | grep error\n"
    "  emberline fs cat --offset 1000000 --length 4096 model.safetensors | xxd"
)
@click.argument("path", nargs=-1, required=True)
@click.option("--offset", type=click.IntRange(min=0), default=0, help="First byte.")
@click.option("--length", type=click.IntRange(min=0), help="Bytes at most, of each file.")
def cat(path: Sequence[str], offset: int, length: int | None) -> None:
    """Write files to the standard output."""
    out = sys.stdout.buffer
    for location in expand(path):
        for block in _blocks(location, offset=offset, length=length):
            out.write(block)
    out.flush()


def _blocks(location: Location, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
    if get_entry(location.fs, location.path).is_dir:
        raise IsADirectoryError(f"is a directory: {location.url}")
    with location.fs.open(location.path, "rb") as file:
        if offset:
            file.seek(offset)
        left = sys.maxsize if length is None else length
        while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
            left -= len(block)
            yield block


@takes_paths
@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs checksum -a sha256 ember:///srv/store/!/model.safetensors\n"
    "  emberline fs checksum -r books > books.crc32c"
)
@click.argument("path", nargs=-1, required=True)
@click.option(
    "-a", "--algorithm", type=click.Choice(list(_ALGORITHMS)), default="crc32c", show_default=True, help="Which one."
)
@click.option("-r", "--recursive", is_flag=True, help="Every file of directories.")
@click.option("-j", "--jobs", type=click.IntRange(1, 256), default=4, show_default=True, help="Files at once.")
@json_option
def checksum(path: Sequence[str], algorithm: str, recursive: bool, jobs: int, as_json: bool) -> None:
    """Print the checksum and URL of each file."""
    files, total_bytes = _files(expand(path), recursive=recursive)
    executor = ThreadPoolExecutor(jobs)
    try:
        with progress_bar("reading", total_bytes) as advance:
            digests = executor.map(lambda file: _digest(file, algorithm, on_bytes=advance), files)
            for file, (digest, count) in zip(files, digests, strict=True):
                if as_json:
                    print_json({"url": file.url, "algorithm": algorithm, "checksum": digest, "size_bytes": count})
                else:
                    print_line(f"{digest}  {file.url}")
    finally:
        executor.shutdown(cancel_futures=True)


def _files(locations: Sequence[Location], *, recursive: bool) -> tuple[list[Location], int]:
    files: list[Location] = []
    total_bytes = 0
    for location in locations:
        top = get_entry(location.fs, location.path)
        if top.is_dir and not recursive:
            raise IsADirectoryError(f"is a directory, pass -r for the files in it: {location.url}")
        entries = [entry for _, entry in walk(location.fs, location.path)] if top.is_dir else [top]
        wanted = [entry for entry in entries if entry.is_file]
        files.extend(location.at(entry.path) for entry in wanted)
        total_bytes += sum(entry.size_bytes for entry in wanted)
    return files, total_bytes


def _digest(location: Location, algorithm: str, *, on_bytes: Callable[[int], None]) -> tuple[str, int]:
    """(checksum in hex, bytes)."""
    state = _ALGORITHMS[algorithm]()
    count = 0
    for block in _blocks(location):
        state.update(block)
        count += len(block)
        on_bytes(len(block))
    return state.hexdigest(), count
