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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from ..errors import DatasetNotFound
from ..query import literal, quoted
from ..sources import STAGING_PREFIX, StorageOptions, open_url, url_of
from .nodes import Column

_DEPTHS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}
_AFTER_A_TABLE = {
    *("where", "group", "having", "window", "qualify", "order", "limit", "offset", "union", "intersect", "except"),
    *("join", "inner", "left", "right", "full", "cross", "natural", "semi", "anti", "asof", "positional", "on"),
    *("using", "tablesample", "pivot", "unpivot", "select"),
}
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
# What filesystems call what changes with a file. A time of creation alone tells nothing of later writes.
_CHANGES = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "modified", "md5", "version")
_VERSIONS = (*_CHANGES, "created", "ino")
_FOOTERS_MAX = 2_000
_SNIFFED_MAX = 100
# Arguments that add columns of a reader's own, or say how these look.
_ADDING = {"filename", "hive_partitioning", "hive_types", "hive_types_autocast", "union_by_name"}
# What sniff_csv tells of a file, by the names of read_csv's arguments.
_DIALECT = {
    "delim": "Delimiter",
    "quote": "Quote",
    "escape": '"Escape"',
    "comment": "Comment",
    "header": "HasHeader",
    "skip": "SkipRows",
    "dateformat": "DateFormat",
    "timestampformat": "TimestampFormat",
}
_SYNONYMS = {"delim": ("sep", "delimiter"), "dateformat": ("date_format",), "timestampformat": ("timestamp_format",)}
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

    def arguments(self) -> dict[str, str]:
        """The arguments after the paths by their names, as written."""
        tokens = _tokens(self.options)
        return {argument.split("=")[0].strip(' :"').lower(): argument for argument in _arguments(self.options, tokens)}

    def call(self, files: Sequence[str], arguments: Mapping[str, str] | None = None) -> str:
        """The call over other files, with its own arguments or others."""
        names = ", ".join(literal(file) for file in files)
        own = self.arguments() if arguments is None else arguments
        return f"{self.function}({', '.join([f'[{names}]', *own.values()])})"


@dataclass(frozen=True, slots=True)
class File:
    """One file of a scan. `version` changes when its bytes do, as far as its filesystem can tell; "" if it tells
    nothing."""

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
    arguments: Mapping[str, str] | None = None
    """With them each share is read as the whole was; None: with those of the scan."""
    is_whole: bool = False
    """The files are one share: by themselves some would be read in another way."""

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def rows(self) -> int | None:
        """Number of rows, if the files say it without being read."""
        return sum(file.rows for file in self.files) if self.files and all(file.groups for file in self.files) else None

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
        found = _call_at(text, tokens, index) or _file_at(tokens, index)
        if found is None:
            index += 1
            continue
        scan, alias, after = found
        name = names.setdefault(scan, f"{prefix}{len(names)}")
        aliased = after < len(tokens) and _is_alias(tokens[after])
        pieces += [text[end : tokens[index].start], name if aliased else f"{name} AS {quoted(alias)}"]
        end = _end(tokens[after - 1])
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
    found = duckdb.tokenize(text)
    tokens = []
    stops = [*(start for start, _ in found[1:]), len(source)]
    for (start, kind), stop in zip(found, stops, strict=False):
        if kind == duckdb.token_type.comment:
            continue
        raw = source[start:stop].decode()
        is_string = kind == duckdb.token_type.string_const
        tokens.append(_Token(len(source[:start].decode()), _string_of(raw) if is_string else raw.rstrip(), is_string))
    return [part for token in tokens for part in _split(token)]


def _end(token: _Token) -> int:
    return token.start + len(token.text)


def _string_of(raw: str) -> str:
    match = re.match(r"'(?:[^']|'')*'", raw)
    return match[0] if match else raw.rstrip()


def _split(token: _Token) -> Iterator[_Token]:
    """Operators one character at a time: the tokenizer may give `([` as one."""
    if token.is_string:
        yield token
        return
    if word := re.match(r'"(?:[^"]|"")*"|[\w$]+', token.text):
        yield _Token(token.start, word[0], False)
        return
    # 1.4 names no comments: they follow a token.
    for offset, character in enumerate(re.split("--|/[*]", token.text)[0]):
        if not character.isspace():
            yield _Token(token.start + offset, character, False)


def _is_alias(token: _Token) -> bool:
    """Whether a token after a table is the table's other name, or leads to it."""
    return token.is_string or (re.match(r'[\w"]', token.text) is not None and token.text.lower() not in _AFTER_A_TABLE)


def _call_at(text: str, tokens: Sequence[_Token], index: int) -> tuple[FileScan, str, int] | None:
    """A reader's call that begins at `index`, the name that it goes by, and where it ends."""
    function = _READERS.get(tokens[index].text.lower())
    if function is None or index + 2 >= len(tokens) or tokens[index + 1].text != "(":
        return None
    depth, close = 0, index + 1
    while close < len(tokens):
        depth += 0 if tokens[close].is_string else _DEPTHS.get(tokens[close].text, 0)
        if depth == 0:
            break
        close += 1
    else:
        return None
    paths, position = _paths_at(tokens, index + 2)
    if not paths or tokens[position].text not in (",", ")"):
        return None
    arguments = _arguments(text, tokens[position:close])
    scan = FileScan(function, paths, "".join(f", {argument}" for argument in arguments))
    # The names of files are then rows; the listing gives absolute ones.
    if "filename" in scan.arguments() and any("://" not in path and not os.path.isabs(path) for path in paths):
        return None
    return scan, tokens[index].text, close + 1


def _arguments(text: str, tokens: Sequence[_Token]) -> list[str]:
    """Arguments as they are written, from the comma before each to the next."""
    pieces: list[list[_Token]] = []
    depth = 0
    for token in tokens:
        depth += 0 if token.is_string else _DEPTHS.get(token.text, 0)
        if token.text == "," and depth == 0:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [text[piece[0].start : _end(piece[-1])] for piece in pieces if piece]


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


def _file_at(tokens: Sequence[_Token], index: int) -> tuple[FileScan, str, int] | None:
    """`FROM 'file'` or `JOIN 'file'`, where the file's ending says how it is read; the name that it goes by."""
    token = tokens[index]
    if not token.is_string or index == 0 or tokens[index - 1].text.lower() not in ("from", "join"):
        return None
    before = [token.text.lower() for token in tokens[max(0, index - 4) : index - 1]]
    if before[-1:] == ["distinct"] and before[-2:-1] in (["is"], ["not"]):
        return None
    path = _unquoted(token.text)
    for suffix, function in _SUFFIXES:
        if suffix.search(path):
            alias = path if _GLOB.search(path) else os.path.basename(path).split(".")[0]
            return FileScan(function, (path,)), alias, index + 1
    return None


def _unquoted(text: str) -> str:
    return text[1:-1].replace("''", "'")


# ---- resolving


def listed(scan: FileScan, options: StorageOptions) -> list[File]:
    """The scan's files. Raises `DatasetNotFound`, or what the filesystem raises."""
    files = list(_files(scan.paths, options))
    if not files:
        raise DatasetNotFound(f"No files found that match {', '.join(scan.paths)}")
    return files


def resolve(scan: FileScan, files: Sequence[File], connection: Any) -> ResolvedScan:
    """Asks DuckDB for the scan's columns, and for the row groups of its files."""
    columns = _described(scan.call(scan.paths), connection)
    arguments = _pinned(scan, files, columns, connection)
    if scan.function == "read_parquet" and len(files) <= _FOOTERS_MAX:
        files = list(_with_groups(files, connection))
    return ResolvedScan(scan, columns, tuple(files), arguments, arguments is None)


def _described(call: str, connection: Any) -> tuple[Column, ...]:
    rows = connection.execute(f"DESCRIBE SELECT * FROM {call}").fetchall()
    return tuple(Column(str(row[0]), str(row[1])) for row in rows)


def _pinned(scan: FileScan, files: Sequence[File], columns: Sequence[Column], connection: Any) -> dict[str, str] | None:
    """Arguments with which any of the files are read as all of them are together; None if there are none such."""
    given = scan.arguments()
    if len(files) < 2:
        return given
    union = given.get("union_by_name", "= false")
    if re.search(r"=\s*'?(false|0)", union, re.IGNORECASE) is None:
        return None
    keys = {key.lower() for file in files for key in re.findall(r"([^/=]+)=[^/]*/", file.url)}
    own = tuple(columns)
    if keys or "filename" in given:
        bare = {name: argument for name, argument in given.items() if name not in _ADDING}
        own = _described(scan.call(scan.paths, {**bare, "hive_partitioning": "hive_partitioning = false"}), connection)
        if any(column.name.lower() in keys for column in own):
            return None
        parts = [column for column in columns if column.name.lower() in keys]
        given["hive_partitioning"] = f"hive_partitioning = {'true' if parts else 'false'}"
        if parts:
            given.pop("hive_types_autocast", None)
            given["hive_types"] = f"hive_types = {_types(parts)}"
    if scan.function == "read_csv":
        return _pinned_csv(scan, files, given, own, connection)
    if scan.function != "read_parquet" and "columns" not in given:
        # Of rows that are no objects, the one column has a name of DuckDB's.
        return None if [column.name for column in own] == ["json"] else {**given, "columns": f"columns = {_types(own)}"}
    return given


def _types(columns: Sequence[Column]) -> str:
    return f"{{{', '.join(f'{literal(column.name)}: {literal(column.type)}' for column in columns)}}}"


def _pinned_csv(
    scan: FileScan, files: Sequence[File], given: dict[str, str], own: Sequence[Column], connection: Any
) -> dict[str, str] | None:
    """`given` with the dialect and the types of the files, if they all have one."""
    bare = [argument for name, argument in scan.arguments().items() if name not in _ADDING]
    found: dict[str, set[Any]] = {name: set() for name in _DIALECT}
    for file in files[:_SNIFFED_MAX]:
        call = f"sniff_csv({', '.join([literal(file.url), *bare])})"
        try:
            row = connection.execute(f"SELECT Columns, {', '.join(_DIALECT.values())} FROM {call}").fetchone()
        except duckdb.Error:
            return None
        if not {column.name for column in own} <= {column["name"] for column in row[0]}:
            return None
        for values, value in zip(found.values(), row[1:], strict=True):
            values.add(value)
    for name, values in found.items():
        # A file without quotes, or without dates, does not say how it would write them.
        values -= {None, "(empty)"}
        if len(values) > 1:
            return None
        if values and not given.keys() & {name, *_SYNONYMS.get(name, ())}:
            (value,) = values
            given[name] = f"{name} = {literal(value) if isinstance(value, str) else value}"
    if not given.keys() & {"columns", "types", "dtypes", "column_types", "all_varchar"}:
        given["types"] = f"types = {_types(own)}"
    return given


def _files(paths: Iterable[str], options: StorageOptions) -> Iterator[File]:
    for path in paths:
        filesystem, inner = open_url(path, options)
        found = filesystem.glob(inner, detail=True) if _GLOB.search(inner) else {inner: filesystem.info(inner)}
        for name in sorted(found):
            info = found[name]
            if info.get("type") == "directory" or f"/{STAGING_PREFIX}" in name:
                continue
            version = [str(info[key]) for key in _VERSIONS if info.get(key) is not None]
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
