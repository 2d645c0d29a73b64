"""File scans: where a query reads files, what those files are, and how they are cut into the shares of tasks.

A scan is found in the text of a query by DuckDB's own tokens: `read_parquet(...)` and its like with literal paths, and
`FROM 'path.parquet'`. What is not found stays in the text, and the binder, which may not open files, refuses it: the
query then runs as one task. A scan resolved says how large each file is, so that shares follow bytes and not workers.

Does not know: plans, stages, or who reads the shares.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from ..errors import DatasetNotFound
from ..query import literal, quoted
from ..sources import STAGING_PREFIX, StorageOptions, open_url, url_of
from .nodes import Column

_READERS = {
    **dict.fromkeys(("read_parquet", "parquet_scan"), "read_parquet"),
    **dict.fromkeys(("read_csv", "read_csv_auto"), "read_csv"),
    **dict.fromkeys(("read_json", "read_json_auto"), "read_json"),
    **dict.fromkeys(("read_ndjson", "read_ndjson_auto"), "read_ndjson"),
}
_SUFFIXES = (
    (re.compile(r"\.parquet$"), "read_parquet"),
    (re.compile(r"\.(csv|tsv)(\.gz|\.zst)?$"), "read_csv"),
    (re.compile(r"\.(json|jsonl|ndjson)(\.gz|\.zst)?$"), "read_json"),
)
_GLOB = re.compile(r"[*?\[]")
_FOOTERS_MAX = 2_000
_SMALL_BYTES = 64 << 20
# A share is cut inside a file only where that gives whole row groups to both sides.
_ROW_NUMBER = "file_row_number"


@dataclass(frozen=True, slots=True)
class FileScan:
    """A call of one of DuckDB's readers, with literal paths."""

    function: str
    paths: tuple[str, ...]
    options: str = ""
    """The arguments after the paths, as written, with a leading comma; or nothing."""

    def call(self, files: Sequence[str], *more: str) -> str:
        """The call over other files, with further arguments."""
        names = ", ".join(literal(file) for file in files)
        return f"{self.function}([{names}]{self.options}{''.join(f', {argument}' for argument in more)})"


@dataclass(frozen=True, slots=True)
class File:
    """One file of a scan. `version` changes when its bytes do, as far as its filesystem can tell."""

    url: str
    size_bytes: int
    version: str
    groups: tuple[int, ...] = ()
    """Rows of its row groups, if they are known."""

    @property
    def rows(self) -> int:
        return sum(self.groups)


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

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def rows(self) -> int | None:
        """Number of rows, if the files say it without being read."""
        return sum(file.rows for file in self.files) if self.files and all(file.groups for file in self.files) else None

    def sql(self, share: Share, names: Sequence[str]) -> str:
        """A SELECT of the share's columns `names` as c0, c1, ..."""
        chosen = ", ".join(f"{quoted(name)} AS c{i}" for i, name in enumerate(names)) or "1 AS c0"
        call = self.scan.call(share.files, *self._pins())
        if share.first_row is None:
            return f"(SELECT {chosen} FROM {call})"
        call = self.scan.call(share.files, *self._pins(), f"{_ROW_NUMBER} = true")
        assert share.end_row is not None
        within = f"{_ROW_NUMBER} BETWEEN {share.first_row} AND {share.end_row - 1}"
        return f"(SELECT {chosen} FROM {call} WHERE {within})"

    def _pins(self) -> list[str]:
        """Arguments that make every share read the types that the whole was found to have."""
        if self.scan.function == "read_parquet" or re.search(r"\b(columns|types|dtypes)\s*=", self.scan.options):
            return []
        pairs = ", ".join(f"{literal(column.name)}: {literal(column.type)}" for column in self.columns)
        return [f"{'types' if self.scan.function == 'read_csv' else 'columns'} = {{{pairs}}}"]

    def shares(self, size_bytes: int, *, at_least: int = 1, exactly: int | None = None) -> list[Share]:
        """Shares of about `size_bytes`, in the order of the files; by whole files if `exactly` so many are wanted."""
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

    def _groups_of_files(self, count: int) -> list[Share]:
        """`count` shares of whole files, as even in bytes as first fit makes them; some may be empty."""
        bins: list[list[File]] = [[] for _ in range(count)]
        sizes = [0] * count
        for file in sorted(self.files, key=lambda file: (-file.size_bytes, file.url)):
            smallest = sizes.index(min(sizes))
            bins[smallest].append(file)
            sizes[smallest] += file.size_bytes
        order = {file.url: position for position, file in enumerate(self.files)}
        return [
            Share(tuple(sorted((file.url for file in files), key=order.__getitem__)), size)
            for files, size in zip(bins, sizes, strict=True)
        ]

    def _pieces(self, file: File, size_bytes: int) -> Iterator[Share]:
        """The file, cut between row groups if it is larger than a share and may be cut."""
        whole = Share((file.url,), file.size_bytes)
        splittable = self.scan.function == "read_parquet" and len(file.groups) > 1
        if not splittable or file.size_bytes <= size_bytes * 3 // 2 or _ROW_NUMBER in self.scan.options:
            yield whole
            return
        pieces = min(len(file.groups), round(file.size_bytes / size_bytes))
        start, position = 0, 0
        for piece in range(pieces):
            end_group = len(file.groups) * (piece + 1) // pieces
            end = position + sum(file.groups[start:end_group])
            yield Share((file.url,), file.size_bytes * (end - position) // max(1, file.rows), position, end)
            start, position = end_group, end


def _together(shares: Sequence[Share]) -> Share:
    if len(shares) == 1:
        return shares[0]
    return Share(tuple(file for share in shares for file in share.files), sum(share.size_bytes for share in shares))


# ---- finding scans in a query's text


@dataclass(frozen=True, slots=True)
class _Token:
    start: int
    text: str
    is_string: bool


def find(text: str, prefix: str = "emberflow_scan_") -> tuple[str, dict[str, FileScan]]:
    """The text with each scan replaced by a name, and the scans by their names. Equal scans share one."""
    tokens = _tokens(text)
    names: dict[FileScan, str] = {}
    pieces: list[str] = []
    end = index = 0
    while index < len(tokens):
        found = _call_at(tokens, index) or _file_at(tokens, index)
        if found is None:
            index += 1
            continue
        scan, after = found
        name = names.setdefault(scan, f"{prefix}{len(names)}")
        pieces += [text[end : tokens[index].start], name]
        last = tokens[after - 1]
        end = last.start + len(last.text)
        index = after
    return "".join([*pieces, text[end:]]), {name: scan for scan, name in names.items()}


def small(text: str) -> bool:
    """Whether all files that a query reads are on a local disk and of no size to speak of, as far as that is known at
    once."""
    rest, scans = find(text)
    if may_read_files(rest):
        return False
    size_bytes = 0
    for scan in scans.values():
        for path in scan.paths:
            if "://" in path:
                return False
            for name in glob.iglob(path, recursive=True) if _GLOB.search(path) else [path]:
                size_bytes += os.path.getsize(name) if os.path.exists(name) else 0
                if size_bytes > _SMALL_BYTES:
                    return False
    return True


def may_read_files(text: str) -> bool:
    """Whether a text that `find` has done with may still read files."""
    words = {token.text.lower() for token in _tokens(text) if not token.is_string}
    tables = any(_file_named(token, before) for before, token in itertools.pairwise(_tokens(text)))
    tables |= any(word.startswith('"') and re.search(r"[./]", word) is not None for word in words)
    return tables or any(word.startswith(("read_", "parquet_", "glob", "sniff_", "query")) for word in words)


def _file_named(token: _Token, before: _Token) -> bool:
    return token.is_string and before.text.lower() in ("from", "join", ",") and "." in token.text


def _tokens(text: str) -> list[_Token]:
    # DuckDB's tokenizer counts bytes, and gives starts only.
    source = text.encode()
    found = [(start, kind) for start, kind in duckdb.tokenize(text) if kind != duckdb.token_type.comment]
    tokens = []
    for (start, kind), (stop, _) in zip(found, [*found[1:], (len(source), None)], strict=True):
        raw = source[start:stop].decode()
        is_string = kind == duckdb.token_type.string_const
        tokens.append(_Token(len(source[:start].decode()), _string_of(raw) if is_string else raw.rstrip(), is_string))
    return [part for token in tokens for part in _split(token)]


def _string_of(raw: str) -> str:
    match = re.match(r"'(?:[^']|'')*'", raw)
    return match[0] if match else raw.rstrip()


def _split(token: _Token) -> Iterator[_Token]:
    """Operators one character at a time: the tokenizer may give `([` as one."""
    if token.is_string or re.match(r"[\w\"$]", token.text):
        yield token if token.is_string else _Token(token.start, re.split(r"\s", token.text)[0], False)
        return
    for offset, character in enumerate(token.text):
        if not character.isspace():
            yield _Token(token.start + offset, character, False)


def _call_at(tokens: Sequence[_Token], index: int) -> tuple[FileScan, int] | None:
    """A reader's call that begins at `index`, and where it ends."""
    function = _READERS.get(tokens[index].text.lower())
    if function is None or index + 2 >= len(tokens) or tokens[index + 1].text != "(":
        return None
    depth, close = 0, index + 1
    while close < len(tokens):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(tokens[close].text, 0)
        if depth == 0:
            break
        close += 1
    else:
        return None
    paths, position = _paths_at(tokens, index + 2)
    if not paths or tokens[position].text not in (",", ")"):
        return None
    options = " ".join(token.text for token in tokens[position:close])
    return FileScan(function, paths, options), close + 1


def _paths_at(tokens: Sequence[_Token], index: int) -> tuple[tuple[str, ...], int]:
    """The literal path or list of paths at `index`, and what follows; no paths if it is something else."""
    if tokens[index].is_string:
        return (_unquoted(tokens[index].text),), index + 1
    if tokens[index].text != "[":
        return (), index
    paths = []
    for position in range(index + 1, len(tokens)):
        token = tokens[position]
        if token.is_string:
            paths.append(_unquoted(token.text))
        elif token.text == "]":
            return tuple(paths), position + 1
        elif token.text != ",":
            break
    return (), index


def _file_at(tokens: Sequence[_Token], index: int) -> tuple[FileScan, int] | None:
    """`FROM 'file'` or `JOIN 'file'`, where the file's ending says how it is read."""
    token = tokens[index]
    if not token.is_string or index == 0 or tokens[index - 1].text.lower() not in ("from", "join"):
        return None
    path = _unquoted(token.text)
    for suffix, function in _SUFFIXES:
        if suffix.search(path):
            return FileScan(function, (path,)), index + 1
    return None


def _unquoted(text: str) -> str:
    return text[1:-1].replace("''", "'")


# ---- resolving


def listed(scan: FileScan, options: StorageOptions) -> list[File]:
    """The scan's files. Raises `DatasetNotFound`, or what the filesystem raises."""
    files = list(_files(scan.paths, options))
    if not files:
        raise DatasetNotFound(f"no files match {', '.join(scan.paths)}")
    return files


def resolve(scan: FileScan, files: Sequence[File], connection: Any) -> ResolvedScan:
    """Asks DuckDB for the scan's columns, and for the row groups of its files."""
    described = connection.execute(f"DESCRIBE SELECT * FROM {scan.call(scan.paths)}").fetchall()
    columns = tuple(Column(str(row[0]), str(row[1])) for row in described)
    if scan.function == "read_parquet" and len(files) <= _FOOTERS_MAX:
        files = list(_with_groups(files, connection))
    return ResolvedScan(scan, columns, tuple(files))


def _files(paths: Iterable[str], options: StorageOptions) -> Iterator[File]:
    for path in paths:
        filesystem, inner = open_url(path, options)
        found = filesystem.glob(inner, detail=True) if _GLOB.search(inner) else {inner: filesystem.info(inner)}
        for name in sorted(found):
            info = found[name]
            if info.get("type") == "directory" or f"/{STAGING_PREFIX}" in name:
                continue
            version = [str(info[key]) for key in ("ETag", "etag", "mtime", "created", "ino", "version") if key in info]
            yield File(url_of(filesystem, name), int(info["size"] or 0), ",".join(version))


def _with_groups(files: Sequence[File], connection: Any) -> Iterator[File]:
    """The files with the rows of their row groups, from their footers."""
    names = ", ".join(literal(file.url) for file in files)
    rows = connection.execute(
        "SELECT file_name, list(n ORDER BY g) FROM ("
        "SELECT DISTINCT file_name, row_group_id AS g, row_group_num_rows AS n "
        f"FROM parquet_metadata([{names}])) GROUP BY file_name"
    ).fetchall()
    groups = dict(rows)
    for file in files:
        yield File(file.url, file.size_bytes, file.version, tuple(groups.get(file.url, ())))
