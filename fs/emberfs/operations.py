"""fsspec's operations as coroutines on a client's core: shared by the blocking and the awaitable methods."""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Sequence
from typing import Any

from .client.batch import check_count, files_at, read_found
from .client.buffers import NewBytes
from .client.core import MESSAGE_BYTES_MAX, Core, NewFile, Range
from .client.file import OpenFile, open_file
from .client.namespace import Namespace
from .errors import InvalidPath, IsADirectory, NotADirectory, NotFound
from .types import Inode, Kind

KINDS = {Kind.FILE: "file", Kind.DIRECTORY: "directory", Kind.SYMLINK: "link"}
COPY_BYTES = 16 << 20


def describe(name: str, inode: Inode) -> dict[str, Any]:
    """fsspec's info of an inode."""
    return {
        "name": name,
        "size": inode.length,
        "type": KINDS[inode.kind],
        "mtime": inode.mtime_ns / 1e9,
        "ctime": inode.ctime_ns / 1e9,
        "mode": inode.mode,
        "ino": inode.id,
        "nlink": inode.nlink,
        "islink": False,
    }


async def info(core: Core, path: str) -> dict[str, Any]:
    """Of what `path` leads to; a link that leads nowhere, or in a circle, describes itself."""
    try:
        return describe(path, await core.stat(path))
    except (NotFound, InvalidPath):
        return describe_link(path, await core.stat(path, False))


def describe_link(path: str, inode: Inode) -> dict[str, Any]:
    """A symbolic link itself."""
    return describe(path, inode) | {"islink": True, "destination": inode.target}


async def ls(core: Core, path: str, detail: bool) -> list[Any]:
    """Entries of a directory; of a file, the file."""
    names = Namespace(core)
    try:
        entries = await names.entries(path)
    except NotADirectory:
        inode = await core.stat(path)
        return [describe(path, inode)] if detail else [path]
    base = path if path.endswith("/") else path + "/"
    if not detail:
        return [base + name for name, _ in entries]
    found = []
    for name, inode in entries:
        if inode.kind == Kind.SYMLINK:
            found.append(await info(core, base + name) | {"islink": True, "destination": inode.target})
        else:
            found.append(describe(base + name, inode))
    return found


async def kind(core: Core, path: str) -> str | None:
    """ "file", "directory" or None."""
    try:
        return KINDS[(await core.stat(path)).kind]
    except (NotFound, NotADirectory, InvalidPath):
        return None


async def cat(core: Core, path: str, start: int | None, end: int | None) -> bytes:
    """Bytes [start, end) of a file."""
    if start is None and end is None:
        return await core.get(path)
    begin, length = _range(start, end, (await core.file(path)).length)
    return await core.get(path, begin, length)


def _range(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    """Python slice ends as (offset, length)."""
    begin, stop, _ = slice(start, end).indices(size)
    return begin, max(stop - begin, 0)


async def cat_ranges(core: Core, paths: Sequence[str], starts: Any, ends: Any, on_error: str) -> list[Any]:
    """Many ranges in one batch."""
    begins = list(starts) if isinstance(starts, (list, tuple)) else [starts] * len(paths)
    stops = list(ends) if isinstance(ends, (list, tuple)) else [ends] * len(paths)
    if len(begins) != len(paths) or len(stops) != len(paths):
        raise ValueError("paths, starts and ends must be of one length")
    check_count(paths)
    inodes = await files_at(core, paths)
    targets: list[NewBytes] = []
    wanted: list[Range | Exception] = []
    for path, start, stop in zip(paths, begins, stops, strict=True):
        inode = inodes[path]
        offset, length = _range(start, stop, 0 if isinstance(inode, Exception) else inode.length)
        targets.append(NewBytes(length))
        wanted.append(inode if isinstance(inode, Exception) else Range(inode, offset, targets[-1].view, path))
    results = await read_found(core, wanted, raise_errors=on_error == "raise")
    return [
        result if isinstance(result, Exception) else target.finish(result)
        for result, target in zip(results, targets, strict=True)
        if not (isinstance(result, Exception) and on_error == "omit")
    ]


async def with_parents(core: Core, path: str, auto_mkdir: bool, work: Any) -> Any:
    """Run `work()`; if a parent is missing and may be made, make it and run it again."""
    try:
        return await work()
    except NotFound:
        if not auto_mkdir:
            raise
        await mkdir(core, posixpath.dirname(path), True, True)
        return await work()


async def pipe(core: Core, path: str, value: memoryview, new: NewFile, auto_mkdir: bool) -> None:
    """A whole file."""
    await with_parents(core, path, auto_mkdir, lambda: core.put(path, value, new))


async def mkdir(core: Core, path: str, parents: bool, exist_ok: bool) -> None:
    """A directory."""
    await Namespace(core).mkdir(path, 0o755, parents, exist_ok)


async def remove(core: Core, path: str, recursive: bool, trash: bool, want: str) -> None:
    """A file, link, directory or tree."""
    await Namespace(core).remove(path, recursive, trash, want)


async def remove_if_empty(core: Core, path: str, trash: bool) -> None:
    """A file, or a directory that has nothing left in it."""
    inode = await core.stat(path, False)
    if not inode.is_dir:
        await remove(core, path, False, trash, "file")
    elif not await Namespace(core).entries(path):
        await remove(core, path, False, False, "directory")


async def move(core: Core, source: str, target: str, into: bool, auto_mkdir: bool) -> None:
    """Rename, into `target` if that is a directory or is said to be (`into`)."""
    await core.stat(source, False)
    if into or await kind(core, target) == "directory":
        target = posixpath.join(target, posixpath.basename(source))
    await with_parents(core, target, auto_mkdir, lambda: Namespace(core).rename(source, target, True))


async def touch(core: Core, path: str, truncate: bool, auto_mkdir: bool) -> None:
    """An empty file, or a new time."""
    if not truncate and await kind(core, path) is not None:
        await Namespace(core).set_attributes(path, None, core.runtime.wall_ns(), None, None)
        return
    await pipe(core, path, memoryview(b""), NewFile(), auto_mkdir)


async def copy(core: Core, source: str, target: str, auto_mkdir: bool) -> None:
    """A file to another name, by way of memory, a few chunks at a time; a directory is only made."""
    try:
        inode = await core.file(source)
    except IsADirectory:
        await mkdir(core, target, True, True)
        return
    writer = await _open_new(core, target, auto_mkdir)
    buffer = memoryview(bytearray(min(COPY_BYTES, inode.length)))
    try:
        for offset in range(0, inode.length, COPY_BYTES):
            count = await core.read_range(Range(inode, offset, buffer, source))
            await writer.write(offset, buffer[:count])
    except BaseException:
        await writer.discard()
        raise
    await writer.close()


async def _open_new(core: Core, path: str, auto_mkdir: bool, mode: str = "wb") -> OpenFile:
    file: OpenFile = await with_parents(core, path, auto_mkdir, lambda: open_file(core, path, mode))
    return file


async def get_file(core: Core, path: str, local: str, callback: Any) -> None:
    """A file to the local file system; a directory is only made."""
    runtime = core.runtime
    try:
        inode = await core.file(path)
    except IsADirectory:
        await runtime.offload(_make_local_directory, local)
        return
    callback.set_size(inode.length)
    file = await runtime.offload(open, local, "wb")
    try:
        buffer = memoryview(bytearray(min(COPY_BYTES, inode.length)))
        for offset in range(0, inode.length, COPY_BYTES):
            count = await core.read_range(Range(inode, offset, buffer, path))
            await runtime.offload(file.write, buffer[:count])
            callback.relative_update(count)
    finally:
        await runtime.offload(file.close)


def _make_local_directory(path: str) -> None:

    os.makedirs(path, exist_ok=True)


def _open_local(path: str) -> io.FileIO:
    return io.FileIO(path, "rb")


async def put_file(core: Core, local: str, path: str, mode: str, auto_mkdir: bool, callback: Any) -> None:
    """A file of the local file system, named once it is whole."""
    runtime = core.runtime
    with await runtime.offload(_open_local, local) as file:
        writer = await _open_new(core, path, auto_mkdir, "xb" if mode == "create" else "wb")
        buffer = memoryview(bytearray(COPY_BYTES))
        offset = 0
        try:
            while count := await runtime.offload(file.readinto, buffer):
                await writer.write(offset, buffer[:count])
                offset += count
                callback.relative_update(count)
        except BaseException:
            await writer.discard()
            raise
    await writer.close()


assert COPY_BYTES <= MESSAGE_BYTES_MAX
