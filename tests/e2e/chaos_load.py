"""A process that puts load on a store and checks every answer: `chaos_load.py URL CREDENTIALS BOARD NUMBER SEED`.

It goes on until its standard input ends, then prints what it saw as one JSON object. Several of them share a *board*, a
file in memory that says of each block which write was sent last, which was acknowledged last, and which the readers
have seen. From it every reader knows what a linearizable store may answer: nothing older than what was acknowledged or
seen before the read began, nothing newer than what was sent when it ended, and never half a block.

Names are checked against a dictionary: each process has a directory of its own.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import emberfs
import numpy as np
from emberfs.errors import NoSpace

PROCESSES = 2
READERS = 2
"""In each process."""
BLOCKS = 48
BLOCK_BYTES = 16 << 10
CHUNK_BYTES = 64 << 10
"""Four blocks, of different writers, share a chunk."""
NAMES = 12
"""Files in the directory of a process."""
NAMED_BYTES = (10, 70_000)
"""Of a file that lies with its name, and of one in chunks."""
CLEAN = (1 << 64) - 1
"""Instead of a write's number in the file that nobody writes."""
_HEAD = struct.Struct("<QQ")


def block_of(number: int, index: int) -> bytes:
    """Block `index` as write `number` leaves it. Whoever reads a part of it knows whose it is."""
    return _HEAD.pack(number, index) * (BLOCK_BYTES // _HEAD.size)


def clean_blocks() -> list[bytes]:
    """The file that nobody writes: its bytes are nowhere else."""
    return [block_of(CLEAN, index) for index in range(BLOCKS)]


class Board:
    """What the processes tell each other: a row of numbers per fact, a column per block."""

    def __init__(self, path: Path, *, makes: bool = False) -> None:
        shape = (2 + PROCESSES * READERS, BLOCKS)
        self._rows = np.memmap(path, dtype=np.int64, mode="w+" if makes else "r+", shape=shape)
        self.sent, self.acknowledged, self.seen = self._rows[0], self._rows[1], self._rows[2:]

    def oldest(self, index: int) -> int:
        """The write that a read of the block which begins now must not miss."""
        return int(max(self.acknowledged[index], self.seen[:, index].max()))


def prepare(client: emberfs.Client, board: Board) -> None:
    """Make the files; every block of the one that is written to is write 1."""
    board.sent[:] = board.acknowledged[:] = 1
    for path, blocks in (("/dirty", [block_of(1, index) for index in range(BLOCKS)]), ("/clean", clean_blocks())):
        client.put(path, b"".join(blocks), chunk_size_bytes=CHUNK_BYTES)
    for number in range(PROCESSES):
        client.mkdir(f"/names-{number}")


class Load:
    """One process."""

    def __init__(self, client: emberfs.Client, board: Board, *, number: int, seed: int) -> None:
        self.client = client
        self.board = board
        self.number = number
        self.seed = seed
        self.stop = threading.Event()
        self.wrong: list[str] = []
        self.errors: list[str] = []
        self.refused = 0
        """Calls that ended with NoSpace."""
        self.calls: dict[str, int] = {}
        self.longest_s: dict[str, float] = {}

    def run(self) -> None:
        """Until `stop`."""
        threads = [threading.Thread(target=self._write), threading.Thread(target=self._name)]
        threads += [threading.Thread(target=self._read, args=(reader,)) for reader in range(READERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def report(self) -> dict[str, object]:
        """JSON-ready."""
        facts = ("wrong", "errors", "refused", "calls", "longest_s")
        return {name: getattr(self, name) for name in facts}

    def _timed(self, kind: str, work: Callable[..., None], *args: object) -> bool:
        """False: the call failed."""
        begin_s = time.monotonic()
        try:
            work(*args)
        except NoSpace:
            self.refused += 1
            return False
        except Exception as error:
            self.errors.append(
                f"{time.strftime('%T')} {kind} after {time.monotonic() - begin_s:.1f} s: {type(error).__name__} {error}"
            )
            return False
        finally:
            self.longest_s[kind] = max(self.longest_s.get(kind, 0.0), time.monotonic() - begin_s)
            self.calls[kind] = self.calls.get(kind, 0) + 1
        return True

    # --- blocks

    def _write(self) -> None:
        mine = [index for index in range(BLOCKS) if index % PROCESSES == self.number]
        rng = random.Random(self.seed)
        with self.client.open("/dirty", "r+b") as file:
            number = int(self.board.sent.max())
            while not self.stop.is_set():
                number += 1
                index = rng.choice(mine)
                self.board.sent[index] = number
                if self._timed(
                    "write", self.client.batch_write, [(file, index * BLOCK_BYTES, block_of(number, index))]
                ):
                    self.board.acknowledged[index] = number

    def _read(self, reader: int) -> None:
        """The first reader has the files open, the others look them up each time."""
        rng = random.Random(self.seed + 1 + reader)
        row = self.board.seen[self.number * READERS + reader]
        with self.client.open("/clean") as clean, self.client.open("/dirty") as dirty:
            while not self.stop.is_set():
                index = rng.randrange(BLOCKS)
                if rng.random() < 0.3:
                    self._timed(
                        "read by name" if reader else "clean read",
                        self._check_clean,
                        "/clean" if reader else clean,
                        index,
                    )
                else:
                    self._timed("read", self._check, "/dirty" if reader else dirty, index, row)

    def _check_clean(self, file: str | emberfs.File, index: int) -> None:
        if self._block(file, index) != block_of(CLEAN, index):
            self.wrong.append(f"block {index} of what nobody writes has changed")

    def _check(self, file: str | emberfs.File, index: int, row: np.ndarray) -> None:
        oldest = self.board.oldest(index)
        found = self._block(file, index)
        newest = int(self.board.sent[index])
        number = int(_HEAD.unpack_from(found)[0])
        if bytes(found) != block_of(number, index):
            self.wrong.append(f"block {index} is torn, or another one's")
        elif not oldest <= number <= newest:
            self.wrong.append(f"block {index} is write {number}, not {oldest} to {newest}")
        row[index] = max(row[index], number)

    def _block(self, file: str | emberfs.File, index: int) -> bytearray:
        found = bytearray(BLOCK_BYTES)
        self.client.batch_read([(file, index * BLOCK_BYTES, BLOCK_BYTES)], into=[found])
        return found

    # --- names

    def _name(self) -> None:
        rng = random.Random(self.seed + 100)
        directory = f"/names-{self.number}"
        # An earlier load has checked these.
        names = [f"{directory}/{name}" for name, _ in self.client.list(directory)]
        files = {name: self.client.get(name) for name in names}
        step = 0
        # After an error nobody knows what is there, and the test has failed already.
        while not self.stop.is_set() and not self.errors:
            step += 1
            name, other = (f"{directory}/{rng.randrange(NAMES)}" for _ in range(2))
            match rng.choice(["put", "rename", "remove", "get", "list", "collect"]):
                case "put":
                    content = f"{name} {step} ".encode() * (rng.choice(NAMED_BYTES) // 10)
                    if self._timed("put", self.client.put, name, content):
                        files[name] = content
                case "rename" if name in files and name != other:
                    if self._timed("rename", self.client.rename, name, other):
                        files[other] = files.pop(name)
                case "remove" if name in files:
                    if self._timed("remove", self._remove, name):
                        del files[name]
                case "get" if name in files:
                    self._timed("get", self._check_content, name, files[name])
                case "list":
                    self._timed("list", self._check_names, directory, files)
                case "collect" if step % 10 == 0:
                    self._timed("collect", self._collect)
        if not self.errors:
            self._check_names(directory, files)
            for name in sorted(files):
                self._check_content(name, files[name])

    def _remove(self, name: str) -> None:
        self.client.remove(name, trash=False)

    def _collect(self) -> None:
        self.client.collect_garbage(force=True)

    def _check_content(self, name: str, content: bytes) -> None:
        if self.client.get(name) != content:
            self.wrong.append(f"{name} does not hold what was put there")

    def _check_names(self, directory: str, files: dict[str, bytes]) -> None:
        found = {f"{directory}/{name}" for name, _ in self.client.list(directory)}
        if different := found ^ set(files):
            self.wrong.append(f"there or not there, against the last answer: {', '.join(sorted(different))}")


def main(url: str, credentials: str, board: str, number: str, seed: str) -> None:
    """See the module."""
    with emberfs.connect(url, credentials=credentials) as client:
        load = Load(client, Board(Path(board)), number=int(number), seed=int(seed) * 1000 + int(number))
        thread = threading.Thread(target=load.run)
        thread.start()
        sys.stdin.read()
        load.stop.set()
        thread.join()
    print(json.dumps(load.report()))


if __name__ == "__main__":
    main(*sys.argv[1:])
