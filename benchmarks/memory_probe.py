"""The part of the memory benchmark that is measured: runs in a process of its own and prints one JSON object.

    python -m benchmarks.memory_probe open URL CHUNKS CHUNK_BYTES
    python -m benchmarks.memory_probe stream URL-or-path BYTES

Invariants: RssAnon is what counts (memory that only this process can free), sampled by a thread; the page cache and
LMDB's map are the kernel's to drop.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from .runner import verify

CALL_BYTES = 1 << 20
SAMPLE_INTERVAL_S = 0.005
READS = 1000
READ_BYTES = 64 << 10
MARK_SEED = 7
"""Of the bytes in the last chunk of the large store; the others hold zeros."""


def rss_anon_bytes() -> int:
    """Anonymous memory of this process that is in RAM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon line")


class PeakRss:
    """While inside, samples RssAnon; `bytes` is the largest seen."""

    def __enter__(self) -> PeakRss:
        self.bytes = rss_anon_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_INTERVAL_S):
            self.bytes = max(self.bytes, rss_anon_bytes())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, rss_anon_bytes())


def probe_open(url: str, chunks: int, chunk_bytes: int) -> dict[str, float]:
    """Open a store, then read here and there in /large and verify it."""
    import emberfs  # Inside, so that the plain side of `stream` does not pay for it.

    with PeakRss() as peak:
        begin = time.perf_counter()
        client = emberfs.connect(url)
        opened_s = time.perf_counter() - begin
        opened_bytes = rss_anon_bytes()
        picks, zeros = random.Random(0), bytes(READ_BYTES)
        with client.open("/large", "rb") as file:
            into = [memoryview(bytearray(READ_BYTES)) for _ in range(16)]
            for _ in range(0, READS, len(into)):
                # Chunk 0 is the one the store wrote itself, the last one is marked.
                offsets = [picks.randrange(1, chunks - 1) * chunk_bytes for _ in into]
                counts = client.batch_read([(file, offset, READ_BYTES) for offset in offsets], into=into)
                verify(counts == [READ_BYTES] * len(into), f"short reads: {counts}")
                verify(all(view == zeros for view in into), "a chunk of zeros holds something else")
            file.seek((chunks - 1) * chunk_bytes)
            verify(file.read(READ_BYTES) == random.Random(MARK_SEED).randbytes(chunk_bytes)[:READ_BYTES], "last chunk")
        client.close()
    return {"opened_s": opened_s, "opened_bytes": opened_bytes, "peak_bytes": peak.bytes}


def probe_stream(place: str, size_bytes: int) -> dict[str, float]:
    """Write a file by 1 MiB calls, read it back by 1 MiB calls, compare; a store's URL or a plain path."""
    base = random.Random(0).randbytes(CALL_BYTES)
    with PeakRss() as peak:
        begin = time.perf_counter()
        if place.startswith("ember://"):
            import emberfs

            with emberfs.connect(place) as client:
                _stream(lambda mode: client.open("/stream", mode), base, size_bytes)
        else:
            _stream(Path(place).open, base, size_bytes)
        stream_s = time.perf_counter() - begin
    return {"stream_s": stream_s, "peak_bytes": peak.bytes}


def _stream(opened: Callable[[str], Any], base: bytes, size_bytes: int) -> None:
    block = bytearray(base)
    with opened("wb") as file:
        for number in range(size_bytes // CALL_BYTES):
            block[:8] = number.to_bytes(8, "little")
            file.write(block)
    with opened("rb") as file:
        for number in range(size_bytes // CALL_BYTES):
            block[:8] = number.to_bytes(8, "little")
            verify(file.read(CALL_BYTES) == block, f"wrong bytes in MiB {number}")
        verify(not file.read(1), "the file is too long")


if __name__ == "__main__":
    probe = {"open": probe_open, "stream": probe_stream}[sys.argv[1]]
    print(json.dumps(probe(sys.argv[2], *map(int, sys.argv[3:]))))
