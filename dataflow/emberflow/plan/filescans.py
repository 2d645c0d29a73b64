"""File scans: the files of one call of a reader, and how they are cut into the shares of tasks.

A scan says how large each file is, so that shares follow bytes and not workers.

Does not know: where a query calls readers, plans, stages, or who reads the shares.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..partitioned import PartitionKeys
from ..query import quoted
from .nodes import Column
from .scantext import FileScan

# A share is cut inside a file only where that gives whole row groups to both sides.
_ROW_NUMBER = "file_row_number"


@dataclass(frozen=True, slots=True)
class File:
    """One file of a scan. `version` changes when its bytes do, as far as its filesystem can tell; "" if it tells
    nothing."""

    url: str
    size_bytes: int
    version: str
    groups: tuple[int, ...] = ()
    """Rows of its row groups, if they are known."""
    skipped: frozenset[int] = frozenset()
    """Row groups that hold nothing of what is asked for."""
    partition: int | None = None
    """Of the scan's partitions the one that all its rows are of."""

    @property
    def rows(self) -> int:
        return sum(self.groups)

    @property
    def kept(self) -> tuple[int, ...]:
        """The row groups that are read, if they are known."""
        return tuple(group for group, _ in enumerate(self.groups) if group not in self.skipped)

    @property
    def read_bytes(self) -> int:
        """What is read of it, if all columns are."""
        if not self.skipped:
            return self.size_bytes
        return self.size_bytes * sum(self.groups[group] for group in self.kept) // max(1, self.rows)


@dataclass(frozen=True, slots=True)
class Share:
    """What one task reads: whole files, or the rows [first_row, end_row) of one."""

    files: tuple[str, ...]
    size_bytes: int
    first_row: int | None = None
    end_row: int | None = None


@dataclass(frozen=True, slots=True)
class ResolvedScan:
    """A scan whose files and columns are known."""

    scan: FileScan
    columns: tuple[Column, ...]
    files: tuple[File, ...]
    arguments: Mapping[str, str] | None = None
    """With them each share is read as the whole was; None: with those of the scan."""
    is_whole: bool = False
    """The files are one share: by themselves some would be read in another way."""
    keys: frozenset[str] = frozenset()
    """Columns, in lower case, that are in the files' paths and in no file."""
    partitioned: PartitionKeys | None = None
    """By what its files are partitioned, if that is known."""
    all_files: int = 0
    all_bytes: int = 0
    """What there was before some files and row groups were left out; 0: nothing was."""

    @property
    def size_bytes(self) -> int:
        return sum(file.read_bytes for file in self.files)

    @property
    def rows(self) -> int | None:
        """Number of rows; a guess, where only some files have told theirs; None if none has."""
        known = [file for file in self.files if file.groups]
        if len(known) == len(self.files):
            return sum(file.rows for file in known) or None
        known_bytes = sum(file.size_bytes for file in known)
        all_bytes = sum(file.size_bytes for file in self.files)
        return sum(file.rows for file in known) * all_bytes // known_bytes if known_bytes else None

    def sql(self, share: Share, names: Sequence[str]) -> str:
        """A SELECT of the share's columns `names` as c0, c1, ..."""
        # A file may have a column in another type than the whole.
        types = {column.name: column.type for column in self.columns}
        chosen = ", ".join(f"CAST({quoted(n)} AS {types[n]}) AS c{i}" for i, n in enumerate(names)) or "1 AS c0"
        arguments = self.scan.arguments() if self.arguments is None else self.arguments
        if share.first_row is None:
            return f"(SELECT {chosen} FROM {self.scan.call(share.files, arguments)})"
        call = self.scan.call(share.files, {**arguments, _ROW_NUMBER: f"{_ROW_NUMBER} = true"})
        assert share.end_row is not None
        within = f"{_ROW_NUMBER} BETWEEN {share.first_row} AND {share.end_row - 1}"
        return f"(SELECT {chosen} FROM {call} WHERE {within})"

    def shares(self, size_bytes: int, *, at_least: int = 1, exactly: int | None = None) -> list[Share]:
        """Shares of about `size_bytes`, in the order of the files; by whole files if `exactly` so many are wanted."""
        if self.is_whole:
            everything = Share(tuple(file.url for file in self.files), self.size_bytes)
            return [everything, *[Share((), 0)] * ((exactly or 1) - 1)]
        if exactly is not None:
            return self._groups_of_files(exactly)
        size_bytes = max(1, min(size_bytes, self.size_bytes // at_least))
        pieces = [piece for file in self.files for piece in self._pieces(file, size_bytes)]
        shares: list[Share] = []
        held: list[Share] = []
        for piece in pieces:
            if held and (
                piece.first_row is not None
                or held[0].first_row is not None
                or sum(share.size_bytes for share in held) + piece.size_bytes // 2 > size_bytes
            ):
                shares.append(_together(held))
                held = []
            held.append(piece)
        return [*shares, _together(held)] if held else [Share((), 0)]

    def partitions(self) -> list[Share]:
        """A share for each partition, in their order; some may be empty."""
        assert self.partitioned is not None
        found: list[list[File]] = [[] for _ in range(self.partitioned.count)]
        for file in self.files:
            assert file.partition is not None
            found[file.partition].append(file)
        return [Share(tuple(f.url for f in files), sum(f.read_bytes for f in files)) for files in found]

    def _groups_of_files(self, count: int) -> list[Share]:
        """`count` shares of whole files, as even in bytes as first fit makes them; some may be empty."""
        bins: list[list[File]] = [[] for _ in range(count)]
        sizes = [0] * count
        for file in sorted(self.files, key=lambda file: (-file.read_bytes, file.url)):
            smallest = sizes.index(min(sizes))
            bins[smallest].append(file)
            sizes[smallest] += file.read_bytes
        order = {file.url: position for position, file in enumerate(self.files)}
        return [
            Share(tuple(sorted((file.url for file in files), key=order.__getitem__)), size)
            for files, size in zip(bins, sizes, strict=True)
        ]

    def _pieces(self, file: File, size_bytes: int) -> Iterator[Share]:
        """The file, cut between row groups if it is larger than a share and may be cut."""
        kept = file.kept
        splittable = self.scan.function == "read_parquet" and len(kept) > 1
        if not splittable or file.read_bytes <= size_bytes * 3 // 2 or _ROW_NUMBER in self.scan.options:
            yield Share((file.url,), file.read_bytes)
            return
        starts = list(itertools.accumulate(file.groups, initial=0))
        pieces = min(len(kept), round(file.read_bytes / size_bytes))
        for piece in range(pieces):
            groups = kept[len(kept) * piece // pieces : len(kept) * (piece + 1) // pieces]
            rows = sum(file.groups[group] for group in groups)
            # What is skipped between two groups stays inside: DuckDB passes it by.
            first, end = starts[groups[0]], starts[groups[-1] + 1]
            yield Share((file.url,), file.size_bytes * rows // max(1, file.rows), first, end)


def path_values(url: str) -> list[tuple[str, str]]:
    """The `column=value` directories of a path, as they are written there."""
    return re.findall(r"([^/=]+)=([^/]*)/", url)


def _together(shares: Sequence[Share]) -> Share:
    if len(shares) == 1:
        return shares[0]
    return Share(tuple(file for share in shares for file in share.files), sum(share.size_bytes for share in shares))
