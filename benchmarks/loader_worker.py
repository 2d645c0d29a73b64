"""Runs in the peers' environment: writes samples in a peer's format, and reads them at random, a batch at a time.

One JSON object a line in, "done" a line out. Run: loader_worker.py streaming|litdata FOLDER RAW_TOKENS SEQUENCE_TOKENS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def windows(raw: str, sequence: int) -> Iterator[Any]:
    """Every sample, in order."""
    tokens = np.memmap(raw, "<u4", "r")
    for number in range((len(tokens) - 1) // sequence):
        yield np.array(tokens[number * sequence : (number + 1) * sequence + 1])


class Streaming:
    """mosaicml-streaming: MDS shards, uncompressed, without hashes."""

    def __init__(self, folder: str, raw: str, sequence: int) -> None:
        from streaming import MDSWriter, StreamingDataset

        if not Path(folder).exists():
            with MDSWriter(out=folder, columns={"tokens": f"ndarray:uint32:{sequence + 1}"}) as writer:
                for window in windows(raw, sequence):
                    writer.write({"tokens": window})
        self._samples = StreamingDataset(local=folder, shuffle=False, batch_size=1)

    def read(self, numbers: list[int]) -> Any:
        return np.stack([self._samples[number]["tokens"] for number in numbers])


class Litdata:
    """litdata: blocks of tokens, uncompressed."""

    def __init__(self, folder: str, raw: str, sequence: int) -> None:
        import torch
        from litdata import StreamingDataset, TokensLoader
        from litdata.streaming.writer import BinaryWriter

        if not Path(folder).exists():
            Path(folder).mkdir()
            writer = BinaryWriter(folder, chunk_bytes="64MB", item_loader=TokensLoader(sequence + 1))
            for number, window in enumerate(windows(raw, sequence)):
                writer[number] = torch.from_numpy(window.astype(np.int32))
            writer.done()
            writer.merge()
        self._samples = StreamingDataset(folder, item_loader=TokensLoader(sequence + 1), shuffle=False)
        self._stack = torch.stack

    def read(self, numbers: list[int]) -> Any:
        return self._stack([self._samples[number] for number in numbers]).numpy()


def main() -> None:
    kind, folder, raw, sequence_text = sys.argv[1:]
    sequence = int(sequence_text)
    peer = {"streaming": Streaming, "litdata": Litdata}[kind](folder, raw, sequence)
    tokens = np.memmap(raw, "<u4", "r")
    calls: list[list[int]] = []
    print("done", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        calls = request.get("calls", calls)
        for call in calls if "check" in request else []:
            batch = peer.read(call)
            if request["check"]:
                for row, number in zip(batch, call, strict=True):
                    assert np.array_equal(row, tokens[number * sequence : (number + 1) * sequence + 1]), number
        print("done", flush=True)


if __name__ == "__main__":
    main()
