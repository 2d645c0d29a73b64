"""The bytes that every benchmark stores: pseudo-random, the same in each run, in one plain file that is mapped."""

from __future__ import annotations

import mmap
import random
from pathlib import Path

BLOCK_BYTES = 64 << 20


def make_corpus(path: Path, *, size_bytes: int) -> memoryview:
    """Write `size_bytes` to `path` and map it: the raw side reads the file, everybody is verified against the map."""
    with path.open("wb") as file:
        for begin in range(0, size_bytes, BLOCK_BYTES):
            file.write(random.Random(begin).randbytes(min(BLOCK_BYTES, size_bytes - begin)))
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ))
