"""What makes a directory a store: `superblock.json`, written once and checked at every open.

Does not know: who owns the directory now, and what else is in it.
"""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

import msgspec

from .errors import InvalidPath, StoreFormat
from .urls import SUPERBLOCK

STORE_FORMAT = 1
BESIDE = frozenset([SUPERBLOCK, "superblock.new", "owner.lock", "owner.sock", "owner.log"])
"""What may be in the directory of a store that is just being made."""


class StoreVersion(msgspec.Struct, frozen=True):
    """The part of every superblock, however new."""

    format: int


class Superblock(msgspec.Struct, frozen=True):
    """What a directory says of itself."""

    format: int
    store: str
    """Random id in hex."""
    targets: int
    created_ns: int
    crc: int = 0
    """CRC32 of the JSON with this field 0."""

    def sealed(self) -> Superblock:
        """With its checksum."""
        return msgspec.structs.replace(self, crc=zlib.crc32(msgspec.json.encode(msgspec.structs.replace(self, crc=0))))


def make_directory(directory: Path) -> None:
    """Make sure that `directory` is there and ours to use. Raises StoreFormat, and touches nothing of a stranger."""
    for parent in directory.parents:
        if (parent / SUPERBLOCK).exists():
            raise InvalidPath(f"{directory} is inside the store {parent}; a path in it is ember://{parent}/!/…")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreFormat(f"{directory} is not an emberline store: a file is in the way") from error
    strangers = {entry.name for entry in directory.iterdir()} - BESIDE
    # Looked for last: a store that somebody is making at this moment has it before anything else.
    if strangers and not (directory / SUPERBLOCK).exists():
        raise StoreFormat(
            f"{directory} is not an emberline store and not empty (it holds {min(strangers)!r}); "
            "give an empty or a new directory"
        )


def read_or_write_superblock(directory: Path, targets: int | None) -> Superblock:
    """The store's; made if there is none, by whoever owns the directory. Raises StoreFormat."""
    path = directory / SUPERBLOCK
    if not path.exists():
        superblock = Superblock(STORE_FORMAT, os.urandom(16).hex(), targets or 1, time.time_ns()).sealed()
        _write_durably(path, msgspec.json.format(msgspec.json.encode(superblock)))
        return superblock
    content = path.read_bytes()
    try:
        # The format first and alone: what else a newer one says is not known.
        store_format = msgspec.json.decode(content, type=StoreVersion).format
        if store_format > STORE_FORMAT:
            raise StoreFormat(
                f"{directory} has store format {store_format}; this emberline reads up to {STORE_FORMAT}: upgrade it"
            )
        superblock = msgspec.json.decode(content, type=Superblock)
    except msgspec.DecodeError as error:
        raise StoreFormat(f"{path} is damaged: {error}") from error
    if superblock.sealed() != superblock:
        raise StoreFormat(f"{path} is damaged: its checksum does not match")
    if targets not in (None, superblock.targets):
        raise StoreFormat(f"{directory} has {superblock.targets} targets, not {targets}: that cannot be changed")
    return superblock


def _write_durably(path: Path, content: bytes) -> None:
    """Write a new file so that it is there whole or not at all."""
    temporary = path.with_suffix(".new")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
