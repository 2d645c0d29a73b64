"""docs/rely.md, sentence by sentence: each test carries the numbers of the sentences that it would prove wrong.

Run: pytest tests/fs/test_rely.py
"""

from __future__ import annotations

import errno
import os
import random
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import emberfs
import pytest
from emberfs import Client, Conflict, Corruption, NoSpace, NotFound, TargetFailed
from emberfs.disk import LocalDisk

from tests.fs.stores import CHUNK, content, flip_byte, line_of, program, url_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rely.md"
DATA = content(3 * CHUNK + 100)


def test_every_sentence_has_a_test_and_every_test_a_sentence() -> None:
    written = re.findall(r"^- \*\*(\w+)\*\*", PAGE.read_text(), re.MULTILINE)
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    marks = [mark for source in sources for mark in re.findall(r"mark\.sentence\((.*)\)", source)]
    tested = {number for mark in marks for number in re.findall(r'"(\w+)"', mark)}
    assert len(written) == len(set(written))
    assert tested == set(written)


def together(*works: Callable[[], object]) -> None:
    """Run the works at once, each in a thread, and raise what any of them raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result()


# ---- what is acknowledged is there

WRITER = """
import sys, emberfs
from tests.fs.stores import CHUNK, content
client = emberfs.connect(sys.argv[1])
log = client.open("/log", "ab", chunk_size_bytes=CHUNK)
round, number = int(sys.argv[2]), 0
while True:
    name = f"{round}-{number}"
    data = content(number * 7919 % 300_000, seed=number)
    client.put(f"/put-{number % 5}", data, chunk_size_bytes=CHUNK); print("put", number, flush=True)
    client.batch_write([(f"/batch-{name}", 5, data), ("/shared", number * 1000, data[:1000])])
    print("batch", name, number, flush=True)
    log.write(name.encode().ljust(16)); log.flush(); print("log", name, flush=True)
    client.rename(f"/batch-{name}", f"/moved-{name}"); print("moved", name, number, flush=True)
    if number % 3 == 0:
        client.truncate(f"/moved-{name}", 100); print("cut", name, flush=True)
    if number % 4 == 0:
        client.remove(f"/moved-{name}", trash=False); print("gone", name, flush=True)
    number += 1
"""


@pytest.mark.sentence("D1", "D2", "D4")
def test_killed_at_any_moment_nothing_acknowledged_is_lost(store: Path) -> None:
    chance = random.Random(11)
    log: list[str] = []
    for round_number in range(6):
        lines = []
        with program(WRITER, url_of(store), round_number) as writer:
            lines += [line_of(writer).split() for _ in range(chance.randrange(1, 60))]
            writer.kill()
            assert writer.stdout is not None
            lines += [line.split() for line in writer.stdout.read().splitlines()]
            writer.wait()
        with emberfs.connect(url_of(store)) as client:
            check_round(client, lines)
            log += [line[1] for line in lines if line[0] == "log"]
            records = re.findall(r"\S+", client.get("/log").decode()) if client.exists("/log") else []
            assert [record for record in records if record in set(log)] == log
            assert client.maintenance.fsck().findings == []


def check_round(client: Client, lines: list[list[str]]) -> None:
    """Every acknowledged step of a killed writer is there; of the step that it died in, all or nothing."""
    done: dict[str, set[str]] = {}
    for kind, name, *_ in lines:
        done.setdefault(kind, set()).add(name)
    puts = [int(line[1]) for line in lines if line[0] == "put"]
    for slot in range(5):
        acknowledged = [number for number in puts if number % 5 == slot]
        next_put = (puts[-1] if puts else -1) + 1
        may_be = acknowledged[-1:] + [next_put] * (next_put % 5 == slot)
        if acknowledged:
            assert client.get(f"/put-{slot}") in [content(number * 7919 % 300_000, seed=number) for number in may_be]
    for line in lines:
        if line[0] == "moved" and line[1] not in done.get("gone", ()):
            name, number = line[1], int(line[2])
            whole = bytes(5) + content(number * 7919 % 300_000, seed=number)
            dying = line is [last for last in lines if last[0] == "moved"][-1]
            if dying and not client.exists(f"/moved-{name}"):
                assert number % 4 == 0
                continue
            cut = whole[:100].ljust(100, b"\0")
            assert client.get(f"/moved-{name}") in ([cut] if name in done.get("cut", ()) else [whole, cut])
        if line[0] == "gone":
            assert not client.exists(f"/moved-{line[1]}")
        if line[0] == "batch":
            number = int(line[2])
            part = content(number * 7919 % 300_000, seed=number)[:1000]
            assert client.get("/shared", number * 1000, len(part)) == part


HOLDER = """
import sys, emberfs
client = emberfs.connect(sys.argv[1])
file = client.open("/file", "r+b")
file.write(b"flushed"); file.flush(); file.write(b" and held back")
fresh = client.open("/fresh", "wb")
fresh.write(bytes(10_000_000)); fresh.fsync()
print("written", flush=True)
sys.stdin.read()
"""


@pytest.mark.sentence("D3", "A2")
def test_what_was_not_flushed_or_not_closed_is_lost_with_the_process(client: Client, store: Path) -> None:
    client.put("/file", bytes(100))
    client.put("/fresh", b"old")
    client.close()
    with program(HOLDER, url_of(store)) as holder:
        assert line_of(holder) == "written"
        holder.kill()
        holder.wait()
    with emberfs.connect(url_of(store)) as again:
        assert again.get("/file") == b"flushed".ljust(100, b"\0")
        assert again.get("/fresh") == b"old"


# ---- what happens at once


@pytest.mark.sentence("A1", "A6", "T1")
def test_readers_see_the_old_or_the_new_and_nothing_between(client: Client) -> None:
    versions = [bytes([number]) * (number * CHUNK + 10) for number in range(1, 5)]
    client.put("/put", versions[0], chunk_size_bytes=CHUNK)
    client.put("/moved", versions[0])
    ended = threading.Event()

    def change() -> None:
        try:
            for step in range(60):
                client.put("/put", versions[step % 4], chunk_size_bytes=CHUNK)
                client.put("/next", versions[step % 4])
                client.rename("/next", "/moved")
        finally:
            ended.set()

    def read() -> None:
        while not ended.is_set():
            assert client.get("/put") in versions
            assert client.get("/moved") in versions

    together(change, read, read)


@pytest.mark.sentence("A6")
def test_a_tree_has_one_of_its_names_at_any_moment(client: Client) -> None:
    client.mkdir("/a/deep/tree", parents=True)
    client.put("/a/deep/tree/file", b"x")
    ended = threading.Event()

    def move() -> None:
        try:
            for _ in range(100):
                client.rename("/a", "/b")
                client.rename("/b", "/a")
        finally:
            ended.set()

    def look() -> None:
        while not ended.is_set():
            assert len(client.list("/")) == 1, "one listing is one moment"

    together(move, look)


@pytest.mark.sentence("A2", "A3")
def test_a_new_file_appears_whole_or_never(client: Client) -> None:
    client.put("/file", b"old")
    with client.open("/file", "wb", chunk_size_bytes=CHUNK) as file:
        file.write(DATA)
        file.fsync()
        assert client.get("/file") == b"old"
    assert client.get("/file") == DATA
    for path in ("/file", "/never"):
        with pytest.raises(ZeroDivisionError), client.open(path, "wb", chunk_size_bytes=CHUNK) as file:
            file.write(DATA + DATA)
            raise ZeroDivisionError
    assert client.get("/file") == DATA
    assert [name for name, _ in client.list("/")] == ["file"]
    client.collect_garbage(force=True)
    assert client.maintenance.info()["targets"][0]["blocks"] == {CHUNK: 4}, "what was discarded takes no space"


@pytest.mark.sentence("A4")
def test_a_write_within_a_chunk_is_atomic(client: Client) -> None:
    client.put("/file", bytes(2 * CHUNK), chunk_size_bytes=CHUNK)
    begin, size = CHUNK + 5_000, 50_000
    ended = threading.Event()

    def write() -> None:
        try:
            for step in range(1, 80):
                client.batch_write([("/file", begin, bytes([step]) * size)])
        finally:
            ended.set()

    def read() -> None:
        while not ended.is_set():
            part = client.get("/file", begin, size)
            assert part == part[:1] * size
            assert client.get("/file", CHUNK, 5_000) == bytes(5_000)

    together(write, read, read)


class HalfFailingDisk(LocalDisk):
    """The disk of one target fails to sync while told to."""

    failing: ClassVar[set[str]] = set()

    async def sync(self, files: Sequence[int]) -> None:
        if any(self._path.endswith(name) for name in self.failing):
            raise OSError(errno.EIO, "Input/output error")
        await super().sync(files)


@pytest.mark.sentence("A5")
def test_a_write_over_several_chunks_may_be_there_in_part(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emberfs.embedded.LocalDisk", HalfFailingDisk)
    with emberfs.connect(url_of(store), targets=2) as client:
        client.put("/file", b"o" * 2 * CHUNK, chunk_size_bytes=CHUNK)
        monkeypatch.setattr(HalfFailingDisk, "failing", {"target-2"})
        with pytest.raises(TargetFailed):
            client.batch_write([("/file", 0, b"n" * 2 * CHUNK)])
        chunks = [client.get("/file", begin, CHUNK) for begin in (0, CHUNK)]
        assert sorted(chunks) == [b"n" * CHUNK, b"o" * CHUNK], "each chunk is old or new, the write is neither"


@pytest.mark.sentence("A7")
def test_a_large_tree_is_gone_at_once(client: Client) -> None:
    for number in range(3):
        client.mkdir(f"/tree/{number}", parents=True)
        client.batch_write([(f"/tree/{number}/{name}", 0, b"x") for name in range(400)])
    client.remove("/tree", recursive=True, trash=False)
    assert client.list("/") == []
    client.mkdir("/tree")
    assert client.list("/tree") == []
    client.collect_garbage(force=True)
    assert client.usage().files == 0


# ---- how long a file is


@pytest.mark.sentence("L1")
def test_the_length_is_the_largest_acknowledged_end(client: Client) -> None:
    client.put("/file", bytes(CHUNK), chunk_size_bytes=CHUNK)
    with client.open("/file", "r+b") as one, client.open("/file", "r+b") as other:
        for file, end in [(one, 300_000), (other, 200_000), (one, 100_000), (other, 400_000)]:
            file.seek(end - 1)
            file.write(b"x")
            file.flush()
        assert client.stat("/file").length == 400_000
        other.close()
        assert client.stat("/file").length == 400_000
    assert client.stat("/file").length == 400_000


@pytest.mark.sentence("L1")
def test_writers_in_parallel_lose_no_end(client: Client) -> None:
    def write(writer: int) -> None:
        with client.open("/file", "r+b") as file:
            for step in range(20):
                file.seek((step * 4 + writer) * 10_000)
                file.write(bytes([writer + 1]) * 10_000)
                file.flush()

    client.put("/file", b"")
    together(*[lambda writer=writer: write(writer) for writer in range(4)])  # type: ignore[misc]
    assert client.get("/file") == b"".join(bytes([writer + 1]) * 10_000 for _ in range(20) for writer in range(4))


@pytest.mark.sentence("L2")
@pytest.mark.parametrize("last", ["close", "flush", "fsync", "nothing"])
def test_a_stale_report_never_undoes_a_truncate(client: Client, last: str) -> None:
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    writer = client.open("/file", "r+b")
    writer.seek(10 * CHUNK)
    writer.write(b"far")
    writer.flush()
    client.truncate("/file", 10)
    if last != "nothing":
        getattr(writer, last)()
    writer.close()
    assert client.stat("/file").length == 10
    client.truncate("/file", 11 * CHUNK)
    assert client.get("/file") == DATA[:10] + bytes(11 * CHUNK - 10)


@pytest.mark.sentence("L2")
@pytest.mark.parametrize("offset", [0, 5, 100, 2 * CHUNK + 1, 20 * CHUNK])
def test_what_is_written_after_a_truncate_counts(client: Client, offset: int) -> None:
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    with client.open("/file", "r+b") as writer:
        writer.seek(10 * CHUNK)
        writer.write(b"before")
        writer.flush()
        client.truncate("/file", 10)
        writer.seek(offset)
        writer.write(b"after")
        writer.flush()
        end = max(10, offset + 5)
        expected = DATA[:10].ljust(end, b"\0")
        expected = expected[:offset] + b"after" + expected[offset + 5 :]
        assert client.get("/file") == expected
    assert client.get("/file") == expected


@pytest.mark.sentence("L3")
def test_holes_read_as_zeros_and_take_no_space(client: Client) -> None:
    with client.open("/holes", "wb", chunk_size_bytes=CHUNK) as file:
        for index in (3, 700):
            file.seek(index * CHUNK + 50)
            file.write(b"island")
    client.truncate("/holes", 2000 * CHUNK)
    data = client.get("/holes", 0, 701 * CHUNK)
    islands = {index * CHUNK + 50 + at: b"island"[at] for index in (3, 700) for at in range(6)}
    assert len(data) == 701 * CHUNK and sum(data) == sum(islands.values())
    assert all(data[offset] == byte for offset, byte in islands.items())
    assert client.get("/holes", 1999 * CHUNK) == bytes(CHUNK)
    assert client.maintenance.info()["targets"][0]["blocks"] == {CHUNK: 2}


@pytest.mark.sentence("L4")
def test_a_second_appender_is_told(client: Client, store: Path) -> None:
    with client.open("/log", "ab") as first:
        first.write(b"first ")
        for mode in ("ab", "a+b"):
            with pytest.raises(Conflict, match=r"appending already.*/log"):
                client.open("/log", mode)
        with client.open("/other", "ab") as other:
            other.write(b"another file is another file")
    with client.open("/log", "ab") as second:
        second.write(b"second")
    assert client.get("/log") == b"first second"


@pytest.mark.sentence("L4")
def test_an_appender_that_died_blocks_nobody(store: Path) -> None:
    with program(HOLDER.replace('"/file", "r+b"', '"/file", "ab"'), url_of(store)) as holder:
        assert line_of(holder) == "written"
        holder.kill()
        holder.wait()
    with emberfs.connect(url_of(store)) as client:
        with client.open("/file", "ab") as file:
            file.write(b"!")
        assert client.get("/file") == b"flushed!"


@pytest.mark.sentence("L5", "T1")
@pytest.mark.parametrize("mode", ["ab", "wb"])
def test_threads_on_one_open_file_take_turns(client: Client, mode: str) -> None:
    with client.open("/log", mode, chunk_size_bytes=CHUNK) as file:

        def write(writer: int) -> None:
            for step in range(200):
                file.write(b"<%d %d %s>" % (writer, step, b"-" * (step * 37 % 900)))
                if step % 50 == 0:
                    file.flush()

        together(*[lambda writer=writer: write(writer) for writer in range(4)])  # type: ignore[misc]
    found = re.findall(rb"<(\d+) (\d+) (-*)>", client.get("/log"))
    records = [(int(writer), int(step)) for writer, step, _ in found]
    assert sorted(records) == [(writer, step) for writer in range(4) for step in range(200)]
    assert all(len(dashes) == int(step) * 37 % 900 for _, step, dashes in found)
    assert sum(len(b"<%s %s %s>" % record) for record in found) == client.stat("/log").length


# ---- what others see


@pytest.mark.sentence("V1")
def test_the_next_call_of_any_client_sees_it(client: Client, store: Path) -> None:
    with emberfs.connect(url_of(store)) as other:
        for step in range(20):
            client.put("/file", b"x" * step)
            assert (other.stat("/file").length, other.get("/file")) == (step, b"x" * step)
            other.truncate("/file", step + 5_000)
            assert client.stat("/file").length == step + 5_000
            with client.open("/file", "ab") as file:
                file.write(b"more")
                file.flush()
                assert other.stat("/file").length == step + 5_004
            client.rename("/file", "/renamed")
            assert not other.exists("/file") and other.stat("/renamed").length == step + 5_004
            other.set_attributes("/renamed", mode=0o600 + step)
            assert client.stat("/renamed").mode == 0o600 + step
            client.remove("/renamed")
            assert not other.exists("/renamed")


@pytest.mark.sentence("V1")
def test_close_to_open(client: Client, store: Path) -> None:
    with emberfs.connect(url_of(store)) as other:
        for step in range(1, 20):
            with client.open("/file", "ab" if step % 2 else "r+b") as file:
                file.write(content(step * 3000, seed=step))
            with other.open("/file") as reader:
                assert content(step * 3000, seed=step) in reader.read()


@pytest.mark.sentence("V3")
@pytest.mark.parametrize("how", ["unlink", "trash", "put", "rename over"])
def test_a_reader_of_a_file_without_a_name_goes_on(client: Client, how: str) -> None:
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    client.put("/other", b"other")
    with client.open("/file") as reader:
        assert reader.read(10) == DATA[:10]
        if how == "put":
            client.put("/file", b"new")
        elif how == "rename over":
            client.rename("/other", "/file")
        else:
            client.remove("/file", trash=how == "trash")
        client.collect_garbage()
        client.put("/later", bytes(len(DATA)), chunk_size_bytes=CHUNK)
        assert reader.read() == DATA[10:]


@pytest.mark.sentence("V4")
def test_when_the_delay_is_over_a_reader_is_told(store: Path) -> None:
    with emberfs.connect(url_of(store), gc_delay_s=0.0) as client:
        client.put("/file", DATA, chunk_size_bytes=CHUNK)
        client.put("/holes", b"", chunk_size_bytes=CHUNK)
        client.truncate("/holes", 5 * CHUNK)
        with client.open("/file") as reader, client.open("/holes") as holes:
            client.remove("/file", trash=False)
            client.collect_garbage()
            client.put("/later", content(len(DATA), seed=9), chunk_size_bytes=CHUNK)
            with pytest.raises(NotFound, match=r"removed while it was open.*/file"):
                reader.read()
            with pytest.raises(NotFound):
                client.batch_read([(reader, 5, 10)], into=bytearray(10))
            results = client.batch_read([(reader, 5, 10), (holes, 0, 10)], into=bytearray(20), raise_errors=False)
            assert isinstance(results[0], NotFound) and results[1] == 10, "a hole of a file that is there is a hole"


@pytest.mark.sentence("V4")
def test_a_hole_of_a_file_without_a_name_might_be_a_collected_chunk(client: Client) -> None:
    client.put("/file", DATA, chunk_size_bytes=CHUNK)
    client.truncate("/file", 10 * CHUNK)
    with client.open("/file") as reader:
        assert reader.read_at(8 * CHUNK, 10) == bytes(10)
        client.remove("/file", trash=False)
        assert reader.read_at(0, len(DATA)) == DATA
        with pytest.raises(NotFound):
            reader.read_at(8 * CHUNK, 10)


# ---- damage and full disks


@pytest.mark.sentence("C1", "C2")
@pytest.mark.parametrize("seed", range(8))
def test_no_flipped_bit_ever_reaches_a_reader(store: Path, seed: int) -> None:
    at = random.Random(seed).randrange(len(DATA) - 64)
    with emberfs.connect(url_of(store)) as client:
        client.put("/file", DATA, chunk_size_bytes=CHUNK)
        client.put("/other", content(CHUNK, seed=2))
    flip_byte(store, DATA, at)
    with emberfs.connect(url_of(store)) as client:
        with pytest.raises(Corruption, match="/file") as caught:
            client.get("/file")
        assert caught.value.chunk == f"{client.stat('/file').id:x}.{at // CHUNK}"
        begin = caught.value.offset
        assert begin is not None and begin <= at < begin + (16 << 10)
        assert client.get("/file", 0, begin) == DATA[:begin]
        assert client.get("/file", begin + (16 << 10)) == DATA[begin + (16 << 10) :]
        assert client.get("/other") == content(CHUNK, seed=2)


@pytest.mark.sentence("S1", "S2")
def test_a_full_store_takes_nothing_new_and_still_gives_back(store: Path) -> None:
    with emberfs.connect(url_of(store)) as client:
        for name in "abc":
            client.put(f"/{name}", DATA, chunk_size_bytes=CHUNK)
    disk = os.statvfs(store)
    with emberfs.connect(url_of(store), reserve_bytes=2 * disk.f_bavail * disk.f_frsize) as client:
        with pytest.raises(NoSpace):
            client.put("/large", bytes(64 << 20))
        with pytest.raises(NoSpace), client.open("/large", "wb") as file:
            file.write(bytes(64 << 20))
        assert [name for name, _ in client.list("/")] == ["a", "b", "c"]
        blocks = client.maintenance.info()["targets"][0]["blocks"]
        assert blocks == {CHUNK: 12}, "nothing of the refused is left"
        assert client.get("/a") == DATA
        client.remove("/a", trash=False)
        client.remove("/b")
        client.trash_empty()
        assert client.collect_garbage(force=True).chunks == 8
        client.put("/again", DATA, chunk_size_bytes=CHUNK)
        assert client.get("/again") == DATA


@pytest.mark.sentence("S2")
def test_what_small_chunks_gave_back_large_ones_take(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free_bytes(disk: LocalDisk) -> int:
        return (32 << 20) - sum(path.stat().st_blocks * 512 for path in store.rglob("blocks-*"))

    monkeypatch.setattr(LocalDisk, "free_bytes", free_bytes)
    with emberfs.connect(url_of(store), reserve_bytes=1 << 20) as client:
        for size in (64 << 10, 4 << 20, 64 << 10):
            names = []
            with pytest.raises(NoSpace):
                while True:
                    client.put(f"/{len(names)}", content(size), chunk_size_bytes=size)
                    names.append(f"/{len(names)}")
            assert len(names) * size > 26 << 20
            assert all(client.get(name) == content(size) for name in names)
            for name in names[:-1]:
                client.remove(name, trash=False)
            client.collect_garbage(force=True)
            assert client.space()["free_bytes"] > 26 << 20
            client.remove(names[-1], trash=False)
            client.collect_garbage(force=True)
