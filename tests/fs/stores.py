"""What the tests of a whole store share: real content, damage to a closed one, a process of its own."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from emberfs.lane import native

needs_native = pytest.mark.skipif(native is None, reason="the native part was not built (no compiler?)")
KIB = 1 << 10
CHUNK = 64 * KIB
"""The smallest chunk: many of them in a small file."""


def content(size: int, seed: int = 1) -> bytes:
    """Bytes that do not repeat, so that a chunk in the wrong place is seen."""
    return random.Random(seed).randbytes(size)


def url_of(directory: Path) -> str:
    return f"ember://{directory}"


def flip_byte(store: Path, data: bytes, offset: int) -> None:
    """Damage `data` at `offset` where it lies in a block file of a closed store."""
    for path in store.glob("target-*/blocks-*"):
        at = path.read_bytes().find(data[offset : offset + 64])
        if at >= 0:
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([data[offset] ^ 0x40]))
            return
    raise AssertionError("the data is in no block file")


@contextmanager
def program(source: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `source`; killed at the end if it is still there."""
    command = [sys.executable, "-c", source, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that a `program` prints; "" at its end."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")
