"""Batches: many ranges of many files in one step, straight into and out of the caller's memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Union

from ..checksum import crc32c
from ..errors import EmberError, InvalidPath, LimitExceeded, StoreClosed
from ..types import BATCH_ITEMS_MAX, Inode
from ..waiting import all_begun, all_of
from .buffers import flat_view, writable_view
from .core import Core, Range, check_range

if TYPE_CHECKING:
    from ..stores import Store
    from .handle import AsyncFile, File

BatchRead = tuple[Union[str, "File", "AsyncFile"], int, int]
"""(path or open file, offset, length), in bytes."""
BatchWrite = tuple[Union[str, "File", "AsyncFile"], int, Any]
"""(path or file open for writing, offset, payload)."""


async def batch_read(core: Core, items: Sequence[BatchRead], into: Any, *, raise_errors: bool) -> list[Any]:
    """See `Client.batch_read`."""
    check_count(items)
    inodes = await files_at(core, [file for file, _, _ in items if isinstance(file, str)])
    wanted: list[Range | Exception] = []
    for (file, offset, _), view in zip(items, destinations(items, into), strict=True):
        if isinstance(file, str):
            inode, path = inodes[file], file
        else:
            inode, path = file._file.inode_in_place(), file.name
        wanted.append(inode if isinstance(inode, Exception) else Range(inode, offset, view, path))
    return await read_found(core, wanted, raise_errors=raise_errors)


async def files_at(core: Core, paths: Iterable[str]) -> dict[str, Inode | Exception]:
    """The inode of each file, or why there is none; all are asked for at once."""
    names = list(dict.fromkeys(paths))
    found = await all_begun(core.runtime, [core.file(name) for name in names], "batch-stat")
    for one in found:
        if isinstance(one, Exception) and not isinstance(one, EmberError):
            raise one
    return dict(zip(names, found, strict=True))


async def read_found(core: Core, wanted: Sequence[Range | Exception], *, raise_errors: bool) -> list[Any]:
    """Fill every range: bytes read, or what went wrong, which is raised if `raise_errors` says so."""
    read = iter(await core.read_ranges([one for one in wanted if isinstance(one, Range)]))
    results = [next(read) if isinstance(one, Range) else one for one in wanted]
    if raise_errors:
        for result in results:
            if isinstance(result, Exception):
                raise result
    return results


def destinations(items: Sequence[tuple[Any, int, int]], into: Any) -> list[memoryview]:
    """A view per item: of its own buffer, or of its share of the one buffer."""
    for _, offset, length in items:
        check_range(offset, length)
    if isinstance(into, (list, tuple)):
        check_buffers(items, into)
        views = []
        for (_, _, length), buffer in zip(items, into, strict=True):
            view = writable_view(buffer)
            if len(view) < length:
                raise ValueError(f"a buffer of {len(view)} bytes is too small for {length}")
            views.append(view if len(view) == length else view[:length])
        return views
    whole = writable_view(into)
    views, begin = [], 0
    for _, _, length in items:
        views.append(whole[begin : begin + length])
        begin += length
    if begin > len(whole):
        raise ValueError(f"a buffer of {len(whole)} bytes is too small for {begin}")
    return views


def check_sums(sums: array[int] | None, items: Sequence[Any]) -> None:
    """Raises ValueError, unless there is room for one checksum per item."""
    if sums is not None and (sums.typecode != "I" or len(sums) != len(items)):
        raise ValueError(f"{len(items)} items have as many checksums, in an array('I')")


def note_sums(sums: array[int], views: Sequence[memoryview], results: Sequence[Any]) -> None:
    """The CRC32C of what was read of each item."""
    for place, (view, count) in enumerate(zip(views, results, strict=True)):
        if isinstance(count, int):
            sums[place] = crc32c(view[:count])


async def batch_write(core: Core, items: Sequence[BatchWrite], *, whole_chunks: bool = False) -> None:
    """See `Client.batch_write`."""
    check_count(items)
    payloads = [flat_view(data) for _, _, data in items]
    paths = list(dict.fromkeys(file for file, _, _ in items if isinstance(file, str)))
    opened = await all_of(core.runtime, [core.open_for_write(path, create=True) for path in paths], "batch-open")
    handles = {path: each for path, each in zip(paths, opened, strict=True) if not isinstance(each, Exception)}
    errors = [each for each in opened if isinstance(each, Exception)]
    try:
        if not errors:
            await core.write_many(
                [
                    (handles[file] if isinstance(file, str) else file._file.write_handle(), offset, payload)
                    for (file, offset, _), payload in zip(items, payloads, strict=True)
                ],
                whole_chunks=whole_chunks,
            )
    except Exception as error:
        errors.append(error)
    closed = await all_of(core.runtime, [core.close_handle(each) for each in handles.values()], "batch-close")
    # The first is the cause of the others.
    for problem in [*errors, *closed]:
        if isinstance(problem, Exception):
            raise problem


def open_files(items: Sequence[BatchRead] | Sequence[BatchWrite], store: Store) -> list[File | AsyncFile]:
    """The open files that a batch names, each once. They are to be flushed first: a batch goes past their buffers.

    Raises StoreClosed for one that was closed, InvalidPath for one of another store.
    """
    files = list(dict.fromkeys(item[0] for item in items if not isinstance(item[0], str)))
    for file in files:
        if file._ended:
            raise StoreClosed(f"the file {file.name!r} is closed")
        if file._store is not store:
            raise InvalidPath(f"the file {file.name!r} is open in another store")
    return files


def check_buffers(items: Sequence[Any], into: Sequence[Any]) -> None:
    """Raises ValueError, unless there is one for each item."""
    if len(into) != len(items):
        raise ValueError(f"{len(items)} items need as many buffers, not {len(into)}")


def check_count(items: Sequence[Any]) -> None:
    """Raises LimitExceeded for more than one batch may have."""
    if len(items) > BATCH_ITEMS_MAX:
        raise LimitExceeded(f"a batch of {len(items)} items is over the limit of {BATCH_ITEMS_MAX}")
