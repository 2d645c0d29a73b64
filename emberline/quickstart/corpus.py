"""The first half: text into a store, SQL over it, and back again without a byte that differs.

Takes the text of the Python standard library of this machine into a store as Parquet, runs SQL over it, writes it
back partitioned, and reads that with other programs' readers. Running it again replaces what it wrote and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import emberflow
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

_PART_BYTES = 8 * 1024 * 1024
_SKIPPED_DIRECTORIES = frozenset({"site-packages", "__pycache__"})
MB = 1_000_000
"""Bytes, as rates count them."""

_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("package", pa.string()),
        ("suffix", pa.string()),
        ("bytes", pa.int64()),
        ("lines", pa.int64()),
        ("sha256", pa.string()),
        ("text", pa.string()),
    ]
)

_QUERIES = {
    "Files and bytes per package": """
        select package, count(*) as files, sum(bytes)::bigint as bytes, sum(lines)::bigint as lines
        from {corpus} group by package order by bytes desc limit 8""",
    "Exact duplicates": """
        select count(*) as copies, first(path order by path) as one_of_them, any_value(bytes)::bigint as bytes
        from {corpus} where bytes > 0 group by sha256 having count(*) > 1
        order by count(*) * any_value(bytes) desc, one_of_them limit 5""",
    "Longest files": """
        select path, lines, bytes from {corpus} order by lines desc, path limit 5""",
    "Words per kind of file": """
        select suffix, count(*) as files, sum(len(regexp_extract_all(text, '\\w+')))::bigint as words
        from {corpus} group by suffix order by words desc limit 5""",
}


class QuickstartError(Exception):
    """The job cannot go on, or what was read back is not what was written."""


@dataclass(kw_only=True, slots=True)
class CorpusReport:
    """What the job did and how fast. Sizes are of the text itself, before compression."""

    store: str
    files: int = 0
    text_bytes: int = 0
    skipped_files: int = 0
    parts: int = 0
    stored_bytes: int = 0
    ingest_s: float = 0.0
    query_s: dict[str, float] = field(default_factory=dict)
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    partitions: int = 0
    partition_s: float = 0.0
    verify_s: float = 0.0
    checked_with: list[str] = field(default_factory=list)

    def rates(self) -> dict[str, float]:
        """MB/s in, rows and MB/s through SQL, MB/s partitioned and MB/s read back."""
        query_s = sum(self.query_s.values())
        return {
            "ingest_mb_per_s": self.text_bytes / MB / self.ingest_s,
            "sql_rows_per_s": self.files * len(self.query_s) / query_s,
            "partition_mb_per_s": self.text_bytes / MB / self.partition_s,
            "verify_mb_per_s": self.text_bytes * len(self.checked_with) / MB / self.verify_s,
        }


def run(source: Path, report: CorpusReport, console: Console) -> None:
    """The whole job, filling in `report`. Raises `QuickstartError` when a check fails."""
    raw, by_suffix = f"{report.store}/corpus/raw", f"{report.store}/corpus/by_suffix"
    for url in (raw, by_suffix):
        _remove_old(url)
    console.print(f"[bold]1[/] taking the text under {source} into {raw}")
    ingest(source, raw, report, console)
    with emberflow.init() as session:
        console.print("[bold]2[/] running SQL over it")
        query(session, raw, report)
        console.print(f"[bold]3[/] writing it partitioned into {by_suffix}")
        start = time.perf_counter()
        written = session.read_parquet(raw).write_parquet(by_suffix, partition_by="suffix", mode="overwrite")
        report.partition_s = time.perf_counter() - start
        report.partitions = written.num_files
    console.print("[bold]4[/] reading it back and checking it")
    verify(raw, by_suffix, report)


def ingest(source: Path, url: str, report: CorpusReport, console: Console) -> None:
    """Writes every text file under `source` as a row, into Parquet files of about 8 MiB of text."""
    fs, path = url_to_fs(url)
    fs.makedirs(path, exist_ok=True)
    paths = list(_files(source))
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    held_bytes = 0
    columns = (TextColumn("  ingest"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(file.stat().st_size for file in paths))
        for file in paths:
            data = file.read_bytes()
            progress.advance(task, len(data))
            row = _row(file.relative_to(source), data)
            if row is None:
                report.skipped_files += 1
                continue
            rows.append(row)
            held_bytes += len(data)
            if held_bytes >= _PART_BYTES:
                _write_part(fs, path, rows, report)
                rows, held_bytes = [], 0
        if rows:
            _write_part(fs, path, rows, report)
    report.ingest_s = time.perf_counter() - start
    if not report.files:
        raise QuickstartError(f"there is no text under {source}")


def query(session: emberflow.Session, raw: str, report: CorpusReport) -> None:
    """Runs each question over the whole corpus, by its URL."""
    for title, text in _QUERIES.items():
        start = time.perf_counter()
        report.results[title] = session.sql(text.replace("{corpus}", f"'{raw}/*.parquet'")).take_all()
        report.query_s[title] = time.perf_counter() - start


def verify(raw: str, by_suffix: str, report: CorpusReport) -> None:
    """Reads the partitioned corpus with readers that are not ours and compares it with what went in."""
    start = time.perf_counter()
    expected = (report.files, report.text_bytes)
    fs, path = url_to_fs(by_suffix)
    table = ds.dataset(path, filesystem=fs, partitioning="hive").to_table(columns=["path", "sha256", "text"])
    _check("pyarrow", expected, table["sha256"].to_pylist(), table["text"].to_pylist())
    report.checked_with.append("pyarrow")
    if importlib.util.find_spec("pandas") is not None:
        import pandas as pd  # type: ignore[import-untyped]

        frame = pd.read_parquet(by_suffix, columns=["sha256", "text"])
        _check("pandas", expected, frame["sha256"].tolist(), frame["text"].tolist())
        report.checked_with.append("pandas")
    fs, path = url_to_fs(raw)
    originals = ds.dataset(path, filesystem=fs).to_table(columns=["path", "sha256"])
    if originals.sort_by("path") != table.select(["path", "sha256"]).combine_chunks().sort_by("path"):
        raise QuickstartError(f"{by_suffix} does not hold the same files as {raw}")
    report.verify_s = time.perf_counter() - start


def _check(reader: str, expected: tuple[int, int], digests: list[str], texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    found = (len(encoded), sum(map(len, encoded)))
    if found != expected:
        raise QuickstartError(
            f"{reader} read {found[0]} files and {found[1]} bytes; {expected[0]} and {expected[1]} were written"
        )
    for digest, data in zip(digests, encoded, strict=True):
        if hashlib.sha256(data).hexdigest() != digest:
            raise QuickstartError(f"{reader} read a text whose checksum is not {digest}")


def _files(source: Path) -> Iterator[Path]:
    """The regular files under `source`, in a fixed order."""
    for directory, subdirectories, names in os.walk(source):
        subdirectories[:] = sorted(name for name in subdirectories if name not in _SKIPPED_DIRECTORIES)
        for name in sorted(names):
            file = Path(directory, name)
            if file.is_file() and not file.is_symlink():
                yield file


def _row(path: Path, data: bytes) -> dict[str, Any] | None:
    """One file as a row, or None if it is not text."""
    if b"\0" in data:
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return {
        "path": path.as_posix(),
        "package": path.parts[0] if len(path.parts) > 1 else path.stem,
        "suffix": path.suffix.lstrip(".").lower() or "none",
        "bytes": len(data),
        "lines": data.count(b"\n"),
        "sha256": hashlib.sha256(data).hexdigest(),
        "text": text,
    }


def _write_part(fs: Any, directory: str, rows: list[dict[str, Any]], report: CorpusReport) -> None:
    name = f"{directory}/part-{report.parts:05}.parquet"
    with fs.open(name, "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file, compression="zstd")
    report.parts += 1
    report.files += len(rows)
    report.text_bytes += sum(row["bytes"] for row in rows)
    report.stored_bytes += fs.size(name)


def _remove_old(url: str) -> None:
    """Removes what an earlier run wrote at `url`; refuses if there is anything else."""
    fs, path = url_to_fs(url)
    if not fs.exists(path):
        return
    if foreign := [name for name in fs.find(path) if not name.endswith(".parquet")]:
        raise QuickstartError(f"will not replace {url}: {foreign[0]!r} is not from an earlier run")
    fs.rm(path, recursive=True)
