"""Calls of DuckDB's file readers, in the text of a query.

A call is found by DuckDB's own tokens: `read_parquet(...)` and its like with literal paths, and `FROM 'path.parquet'`.
What is not found stays in the text, and the binder, which may not open files, refuses it: the query then runs as one
task.

Does not know: whether the files are there, plans.
"""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import duckdb

from ..query import literal, quoted

GLOB = re.compile(r"[*?\[]")
"""What makes a path a pattern."""

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
# Arguments with which a column of a scan is the column of that name in its files.
_BY_NAME = {"hive_partitioning", "hive_types", "hive_types_autocast", "filename", "file_row_number", "binary_as_string"}
# Functions with a FROM of their own: extract(year FROM x).
_WITH_FROM = {"extract", "trim", "substring", "overlay"}
_SMALL_BYTES = 64 << 20


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

    @property
    def is_by_name(self) -> bool:
        """Whether its columns are the columns of those names in its files, as far as its arguments say."""
        return self.arguments().keys() <= _BY_NAME

    def call(self, files: Sequence[str], arguments: Mapping[str, str] | None = None) -> str:
        """The call over other files, with its own arguments or others."""
        names = ", ".join(literal(file) for file in files)
        own = self.arguments() if arguments is None else arguments
        return f"{self.function}({', '.join([f'[{names}]', *own.values()])})"


@dataclass(frozen=True, slots=True)
class _Token:
    start: int
    text: str
    is_string: bool


def find(text: str, prefix: str = "emberflow_scan_") -> tuple[str, dict[str, FileScan]]:
    """The text with each scan replaced by a name, and the scans by their names. Equal scans share one."""
    rest, scans = _found(text, prefix)
    return rest, dict(scans)


@functools.lru_cache(maxsize=8)
def _found(text: str, prefix: str) -> tuple[str, tuple[tuple[str, FileScan], ...]]:
    """`find`, which several ask about one query."""
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
    return "".join([*pieces, text[end:]]), tuple((name, scan) for scan, name in names.items())


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
            for name in glob.iglob(path, recursive=True) if GLOB.search(path) else [path]:
                size_bytes += os.path.getsize(name) if os.path.exists(name) else 0
                if size_bytes > _SMALL_BYTES:
                    return False
    return True


def may_read_files(text: str) -> bool:
    """Whether a text that `find` has done with may still read files."""
    tokens = _tokens(text)
    words = {token.text.lower() for token in tokens if not token.is_string}
    tables = any("." in token.text and _is_table(tokens, index) for index, token in enumerate(tokens))
    tables |= any(word.startswith('"') and re.search(r"[./]", word) is not None for word in words)
    return tables or any(word.startswith(("read_", "parquet_", "glob", "sniff_", "query")) for word in words)


def _is_table(tokens: Sequence[_Token], index: int, after: Sequence[str] = ("from", "join", ",")) -> bool:
    """Whether the token at `index` is a string that may stand for a table: not that of `IS DISTINCT FROM 'x'`, nor of
    `extract(year FROM 'x')`."""
    if index == 0 or not tokens[index].is_string or tokens[index - 1].text.lower() not in after:
        return False
    before = [token.text.lower() for token in tokens[max(0, index - 4) : index - 1]]
    if tokens[index - 1].text.lower() != "from":
        return True
    if before[-1:] == ["distinct"] and before[-2:-1] in (["is"], ["not"]):
        return False
    return _called(tokens, index) not in _WITH_FROM


def _called(tokens: Sequence[_Token], index: int) -> str:
    """The word before the bracket that the token at `index` is in; "" if it is in none."""
    depth = 0
    for position in range(index - 1, 0, -1):
        depth += 0 if tokens[position].is_string else _DEPTHS.get(tokens[position].text, 0)
        if depth > 0:
            return tokens[position - 1].text.lower()
    return ""


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
    if not _is_table(tokens, index, ("from", "join")):
        return None
    path = _unquoted(tokens[index].text)
    for suffix, function in _SUFFIXES:
        if suffix.search(path):
            alias = path if GLOB.search(path) else os.path.basename(path).split(".")[0]
            return FileScan(function, (path,)), alias, index + 1
    return None


def _unquoted(text: str) -> str:
    return text[1:-1].replace("''", "'")
