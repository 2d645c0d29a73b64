"""Datasets that are partitioned by our own hash: which file holds which partition, for whoever reads them later.

The manifest is `_partitions.json` in the dataset's directory, among the files that it names. What it says holds of each
file by itself, so it is as true of some of them; files that it does not name, or that have another size, make it say
nothing. Names of the files begin with `part-` and have the partition in them, so that of other datasets nobody looks
for a manifest.

Does not know: plans, or how rows are hashed (`exchange/hashing.py`).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from .exchange.hashing import HASH_VERSION

MANIFEST = "_partitions.json"
FORMAT = 1

_NAMED = re.compile(r"part-[0-9a-f]+-p\d{5,}-\d{5,}\.parquet$")
# Types of which every reader of Parquet, DuckDB too, finds the values that were hashed.
_LASTING = re.compile(
    r"U?(TINYINT|SMALLINT|INTEGER|BIGINT)|DECIMAL\(.*\)|BOOLEAN|VARCHAR|DATE|TIMESTAMP( WITH TIME ZONE)?"
)


class PartitionKeys(msgspec.Struct, frozen=True):
    """By what rows are in which of `count` partitions: columns and, as DuckDB writes them, their types."""

    columns: tuple[str, ...]
    types: tuple[str, ...]
    count: int
    hash_version: int = HASH_VERSION


class PartitionFile(msgspec.Struct, frozen=True):
    """A file whose rows are all of one partition."""

    name: str
    partition: int
    rows: int
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """What `_partitions.json` holds."""

    format: int
    hash: str
    keys: PartitionKeys
    files: tuple[PartitionFile, ...]


def may_last(types: Sequence[str]) -> bool:
    """Whether keys of these types say the same to whoever reads them from files."""
    return all(_LASTING.fullmatch(type_) for type_ in types)


def file_name(unique: str, partition: int, number: int) -> str:
    """The name of a partition's file, among files that share `unique`."""
    return f"part-{unique}-p{partition:05d}-{number:05d}.parquet"


def write_manifest(filesystem: Any, directory: str, keys: PartitionKeys, files: Sequence[PartitionFile]) -> None:
    """Puts the manifest beside the files that it names."""
    manifest = Manifest(FORMAT, "xxh64", keys, tuple(files))
    filesystem.pipe_file(posixpath.join(directory, MANIFEST), msgspec.json.encode(manifest) + b"\n")


def read_manifest(filesystem: Any, paths: Sequence[str]) -> Manifest | None:
    """The manifest of the directory that all of these files are in; None if there is none that is known to be of them,
    or one that we do not understand."""
    directories = {posixpath.dirname(path) for path in paths}
    if len(directories) != 1 or not all(_NAMED.search(path) for path in paths):
        return None
    try:
        data = filesystem.cat_file(posixpath.join(directories.pop(), MANIFEST))
        manifest = msgspec.json.decode(data, type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None
    known = manifest.format == FORMAT and manifest.hash == "xxh64" and manifest.keys.hash_version == HASH_VERSION
    return manifest if known else None
