"""Runs in Mooncake's environment: owns the segment, or reads from it. One JSON object a line in, "done" a line out."""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

from awscrt.checksums import crc32c
from mooncake.store import MooncakeDistributedStore

MIB = 1 << 20
SEGMENT_BYTES = 2048 * MIB
BUFFER_BYTES = 72 * MIB
"""16 values of 4 MiB, each with its CRC."""


class Worker:
    """A client of the store."""

    def __init__(self, role: str, master: str, metadata: str) -> None:
        self.store: Any = MooncakeDistributedStore()
        segment = SEGMENT_BYTES if role == "owner" else 16 * MIB
        where = f"http://127.0.0.1:{metadata}/metadata"
        code = self.store.setup("127.0.0.1", where, segment, 128 * MIB, "tcp", "", f"127.0.0.1:{master}")
        assert code == 0, f"setup: {code}"
        self.memory = memoryview(bytearray(BUFFER_BYTES))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        assert self.store.register_buffer(self.address, BUFFER_BYTES) == 0
        self.item_bytes = 0
        self.sums: list[int] = []
        self.calls: list[list[int]] = []

    def load(self, path: str, item_bytes: int, items: int) -> None:
        """Under each key its bytes and, before them, their CRC."""
        with open(path, "rb") as file:
            for number in range(items):
                value = file.read(item_bytes)
                code = self.store.put(str(number), crc32c(value).to_bytes(4, "little") + value)
                assert code == 0, f"put: {code}"

    def run(self) -> None:
        for call in self.calls:
            self.item_bytes = self.item_bytes or self.store.get_size(str(call[0]))
            sizes = [self.item_bytes] * len(call)
            places = [at * self.item_bytes for at in range(len(call))]
            pointers = [self.address + place for place in places]
            counts = self.store.batch_get_into([str(number) for number in call], pointers, sizes)
            assert counts == sizes, f"batch_get_into: {counts}"
            for place in places:
                value = self.memory[place : place + self.item_bytes]
                assert crc32c(value[4:]) == int.from_bytes(value[:4], "little"), "wrong bytes"


def main() -> None:
    role, master, metadata = sys.argv[1:]
    worker = Worker(role, master, metadata)
    for line in sys.stdin:
        request = json.loads(line)
        if "path" in request:
            worker.load(request["path"], request["item_bytes"], request["items"])
        elif "calls" in request:
            worker.calls = request["calls"]
        elif "run" in request:
            worker.run()
        print("done", flush=True)


if __name__ == "__main__":
    main()
