"""Sizes, times and counts, as people write and read them."""

from __future__ import annotations

import re

from .errors import InvalidArgument

_SIZE = re.compile(r"(\d+(?:\.\d*)?)\s*(?:([kmgt])(i?))?b?")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def bytes_of(size: str) -> int:
    """A size with its unit, as DuckDB reads it: 1 KB is 1000 bytes, 1 KiB 1024."""
    match = _SIZE.fullmatch(size.strip().lower())
    if match is None:
        raise InvalidArgument(f"a size is a number with B, KB, MB, GB, TB, or KiB to TiB after it, not {size!r}")
    number, power, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(power) + 1 if power else 0))


def bytes_text(size_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in _BINARY[:-1]:
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} {_BINARY[-1]}"


def seconds_text(seconds: float) -> str:
    """0.0123 -> "12 ms", 75 -> "75 s", 200 -> "3 min 20 s"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min {whole % 60} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def count_text(count: int) -> str:
    """1234 -> "1,234", 12345678 -> "12.3 M"."""
    if count < 1_000_000:
        return f"{count:,}"
    return f"{count / 1e6:.1f} M" if count < 1_000_000_000 else f"{count / 1e9:.2f} G"


def plural(count: int, noun: str) -> str:
    """(1, "task") -> "1 task", (2, "task") -> "2 tasks"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
