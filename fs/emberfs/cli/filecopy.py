"""Copying one file between any two fsspec filesystems, whole or not at all.

Invariants: a reader of the target sees the old file or the complete new one. Where the backend publishes an object
when its upload ends, the bytes go straight there and a failed upload is aborted; elsewhere they go to a temporary
name beside the target, which is renamed over it. The byte count is checked against the listing and against what the
target then says it holds, except where a store took the file in one call: the length is part of that transaction,
and asking for it again would take a quarter of the time of small files. The modification time travels along, so that
the next run sees that the file is complete.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..checksum import crc32c
from .entry import PART_PREFIX, Entry, get_entry
from .location import Location

BLOCK_BYTES = 4 << 20
WHOLE_BYTES_MAX = 4 << 20
"""Up to here a store takes a file in one atomic call; what is longer streams."""

_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"}
"""Directories are only prefixes there."""
_PUBLISH_AT_CLOSE = {*_OBJECT_STORES, "ember"}
"""An upload appears when it ends, in whole; given up, it never does."""
_KEEP_TIME = {"file", "local", "ember"}
"""Backends whose modification times can be set."""
_TIME_RESOLUTION_S = 1e-5
"""What a float of today's Unix time can tell apart, with room."""


class Stopped(Exception):
    """The user interrupted while the file was under way."""


class Mismatch(OSError):
    """The bytes that arrived are not the bytes that were sent."""


def has_directories(target: Location) -> bool:
    """Whether a directory must exist before a file in it."""
    return target.protocol not in _OBJECT_STORES


def is_complete(source: Entry, target: Entry, *, protocol: str) -> bool:
    """Whether `target` looks like a finished copy: same size, and the time the copy gave it (or a later one, where
    times cannot be set). False where the source's time is not known."""
    if not target.is_file or target.size_bytes != source.size_bytes:
        return False
    if source.modified_s is None or target.modified_s is None:
        return False
    if protocol in _KEEP_TIME:
        return abs(target.modified_s - source.modified_s) < _TIME_RESOLUTION_S
    return target.modified_s >= source.modified_s


def have_same_content(left: Location, right: Location, *, stop: threading.Event) -> bool:
    """Whether two files hold the same bytes. Reads both, up to the first difference."""
    with left.fs.open(left.path, "rb") as left_file, right.fs.open(right.path, "rb") as right_file:
        for block in _blocks(left_file, stop):
            if _read_full(right_file, len(block)) != block:
                return False
        return not right_file.read(1)


def copy_file(
    source: Location,
    entry: Entry,
    target: Location,
    *,
    on_bytes: Callable[[int], None],
    stop: threading.Event,
    verify: bool,
) -> int:
    """Copy `source`, which `entry` describes, to `target`; returns its bytes. `verify` reads the copy back.

    Raises Mismatch if the counts or the contents differ, Stopped if `stop` was set; the target is then unchanged
    (except for a Mismatch found by reading back an object store's new object).
    """
    whole = target.protocol in _PUBLISH_AT_CLOSE and entry.size_bytes <= WHOLE_BYTES_MAX
    if whole or target.protocol == "memory":
        data = source.fs.cat_file(source.path)
        _check_count(entry, len(data))
        target.fs.pipe_file(target.path, data, **_attributes(target, entry))
        on_bytes(len(data))
        if verify or target.protocol != "ember":
            _check_copy(target, len(data), crc32c(data) if verify else None, stop)
        _keep_attributes(target, entry)
        return len(data)
    with source.fs.open(source.path, "rb") as reader, _placed(target) as place:
        blocks = _blocks(reader, stop)
        count, checksum = _write(blocks, place, on_bytes=on_bytes, expected=entry, checksum=verify)
        _check_copy(place, count, checksum, stop)
        _keep_attributes(place, entry)
    return count


def put_stream(reader: Any, target: Location, *, on_bytes: Callable[[int], None]) -> int:
    """Write what `reader` gives until its end to `target`, which appears complete or not at all; returns its bytes."""
    with _placed(target) as place:
        count, _ = _write(_blocks(reader, threading.Event()), place, on_bytes=on_bytes)
        _check_copy(place, count, None, threading.Event())
    return count


def rename(source: Location, target: Location) -> None:
    """Rename inside one filesystem, over an existing file. Atomic on local disks and in a store."""
    if source.protocol in {"file", "local"}:
        os.replace(source.path, target.path)
    elif source.protocol == "ember":
        with source.fs.client as client:
            client.rename(source.path, target.path)
    else:
        source.fs.mv(source.path, target.path)


@contextmanager
def _placed(target: Location) -> Iterator[Location]:
    """Where to write so that `target` appears at once: a name beside it, renamed at the end, or an upload to it."""
    if target.protocol in _PUBLISH_AT_CLOSE:
        yield target
        return
    part = target.at(f"{target.path.rpartition('/')[0]}/{PART_PREFIX}{secrets.token_hex(8)}")
    try:
        yield part
        rename(part, target)
    except BaseException:
        _remove_quietly(part)
        raise


def _write(
    blocks: Iterator[bytes],
    target: Location,
    *,
    on_bytes: Callable[[int], None],
    expected: Entry | None = None,
    checksum: bool = False,
) -> tuple[int, int | None]:
    """(bytes written, their CRC32C if `checksum`). Gives the upload up if a block fails or the count is unexpected."""
    count = 0
    crc = 0
    options = {} if expected is None else _attributes(target, expected)
    writer = target.fs.open(target.path, "wb", **options)
    try:
        for block in blocks:
            writer.write(block)
            count += len(block)
            crc = crc32c(block, crc) if checksum else 0
            on_bytes(len(block))
        if expected is not None:
            _check_count(expected, count)
    except BaseException:
        _abort(writer, target)
        raise
    writer.close()
    return count, crc if checksum else None


def _abort(writer: Any, target: Location) -> None:
    """Give a file up. Closing an object store's writer would publish the half that was sent."""
    if target.protocol not in _PUBLISH_AT_CLOSE:
        writer.close()
        return
    writer.discard()
    if not writer.closed:
        writer.closed = True


def _blocks(reader: Any, stop: threading.Event) -> Iterator[bytes]:
    while block := reader.read(BLOCK_BYTES):
        if stop.is_set():
            raise Stopped
        yield block


def _read_full(reader: Any, count: int) -> bytes:
    data: bytes = reader.read(count)
    while len(data) < count and (more := reader.read(count - len(data))):
        data += more
    return data


def _check_count(entry: Entry, count: int) -> None:
    if count != entry.size_bytes:
        raise Mismatch(f"listed with {entry.size_bytes} bytes, but {count} were read: it changes while it is copied")


def _check_copy(target: Location, count: int, checksum: int | None, stop: threading.Event) -> None:
    found = get_entry(target.fs, target.path).size_bytes
    if found != count:
        raise Mismatch(f"{count} bytes were written, but the copy has {found}")
    if checksum is None:
        return
    read_back = 0
    with target.fs.open(target.path, "rb") as reader:
        for block in _blocks(reader, stop):
            read_back = crc32c(block, read_back)
    if read_back != checksum:
        raise Mismatch("the copy, read back, differs from what was written")


def _keep_attributes(target: Location, entry: Entry) -> None:
    if target.protocol in {"file", "local"}:
        if entry.mode is not None:
            os.chmod(target.path, entry.mode & 0o777)
        if entry.modified_s is not None:
            os.utime(target.path, (entry.modified_s, entry.modified_s))


def _attributes(target: Location, entry: Entry) -> dict[str, Any]:
    """What a store takes with a new file, so that it need not be changed in a second transaction."""
    if target.protocol != "ember":
        return {}
    attributes: dict[str, Any] = {}
    if entry.modified_s is not None:
        attributes["mtime_ns"] = round(entry.modified_s * 1e9)
    if entry.mode is not None:
        attributes["permissions"] = entry.mode & 0o777
    return attributes


def _remove_quietly(part: Location) -> None:
    try:
        part.fs.rm_file(part.path)
    except Exception:  # the first error is the one to report
        pass
