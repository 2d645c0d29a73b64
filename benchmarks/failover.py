"""What a client feels when a server dies: each role in turn is killed with -9 under load, and comes back.

A cluster of three storage nodes on this host keeps three copies. One thread writes blocks, each with its number and
its place in it; others read them back, and blocks that nobody writes. Every read is checked: a block is whole, is no
older than the last one acknowledged before the read began, and no newer than the last one that was sent. At the end all
blocks are read once more.

A stall is the longest that one call took while the server was down. Does not say anything about a network: all is on
loopback, and everybody shares two cores.
"""

from __future__ import annotations

import signal
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import emberfs
from emberfs.cluster.local import LocalCluster, Plan
from emberfs.striping import chains_of
from emberfs.types import Chunks

from .runner import Row

BLOCK_BYTES = 64 << 10
WRITE_STALL_GOAL_S = 5.0
CLEAN_STALL_GOAL_S = 1.0
DIRTY_STALL_GOAL_S = 5.0
_HEAD = struct.Struct("<QQ")
"""Number of the write, index of the block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How long, and how much."""

    blocks: int
    settle_s: float
    """Load before the kill."""
    down_s: float
    """Between the kill and the restart."""
    victims: tuple[str, ...]
    has_goals: bool = True


VICTIMS = ("head", "middle", "tail", "metadata", "primary manager", "kv")
FULL = Size(blocks=64, settle_s=3.0, down_s=10.0, victims=VICTIMS)
QUICK = Size(blocks=16, settle_s=1.0, down_s=5.0, victims=("head", "primary manager"))


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    cluster = LocalCluster(directory / "cluster")
    plan = Plan(cluster="bench", replicas=3, targets_per_disk=2, nodes=["storage-1", "storage-2", "storage-3"])
    cluster.up(plan)
    try:
        with emberfs.connect(cluster.url, credentials=str(cluster.directory / "client")) as client:
            rows: list[Row] = []
            for victim in size.victims:
                rows += _kill_one(cluster, client, victim, size)
            return rows
    finally:
        cluster.down()


def block_of(number: int, index: int) -> bytes:
    """Block `index` as write `number` leaves it."""
    return _HEAD.pack(number, index) * (BLOCK_BYTES // _HEAD.size)


@dataclass
class Load:
    """Files under load, and what was seen."""

    client: emberfs.Client
    blocks: int
    stop: threading.Event = field(default_factory=threading.Event)
    sent: list[int] = field(default_factory=list)
    """Block -> number of the last write that was sent."""
    acknowledged: list[int] = field(default_factory=list)
    stalls_s: dict[str, float] = field(default_factory=lambda: {"write": 0.0, "clean": 0.0, "dirty": 0.0})
    operations: dict[str, int] = field(default_factory=lambda: {"write": 0, "clean": 0, "dirty": 0})
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def prepare(self) -> None:
        """Make the files."""
        self.sent = [1] * self.blocks
        self.acknowledged = [1] * self.blocks
        content = b"".join(block_of(1, index) for index in range(self.blocks))
        for path in ("/dirty", "/clean"):
            self.client.put(path, content, chunk_size_bytes=BLOCK_BYTES)

    def write(self) -> None:
        """One block after the other, each in a chunk of its own."""
        with self.client.open("/dirty", "r+b") as file:
            number = 1
            while not self.stop.is_set():
                number += 1
                index = number % self.blocks
                self.sent[index] = number
                self._timed("write", self._write, file, number, index)

    def _write(self, file: emberfs.File, number: int, index: int) -> None:
        self.client.batch_write([(file, index * BLOCK_BYTES, block_of(number, index))])
        self.acknowledged[index] = number

    def read(self, kind: str) -> None:
        """Blocks of one file, round and round."""
        index = 0
        while not self.stop.is_set():
            index = (index + 7) % self.blocks
            self._timed(kind, self.check, kind, index)

    def check(self, kind: str, index: int) -> None:
        """Read one block and compare."""
        oldest = self.acknowledged[index] if kind == "dirty" else 1
        found = bytearray(BLOCK_BYTES)
        self.client.batch_read([(f"/{kind}", index * BLOCK_BYTES, BLOCK_BYTES)], into=[found])
        newest = self.sent[index] if kind == "dirty" else 1
        number, _ = _HEAD.unpack_from(found)
        if bytes(found) != block_of(number, index):
            self.wrong.append(f"block {index} of /{kind} is torn or another one's")
        elif not oldest <= number <= newest:
            self.wrong.append(f"block {index} of /{kind} is write {number}, not {oldest} to {newest}")

    def _timed(self, kind: str, work: Callable[..., None], *args: object) -> None:
        begin_s = time.monotonic()
        try:
            work(*args)
        except OSError as error:
            self.errors.append(f"{kind}: {error}")
        self.stalls_s[kind] = max(self.stalls_s[kind], time.monotonic() - begin_s)
        self.operations[kind] += 1


def _kill_one(cluster: LocalCluster, client: emberfs.Client, victim: str, size: Size) -> list[Row]:
    load = Load(client, size.blocks)
    load.prepare()
    server = cluster.server(_name_of(cluster, client, victim))
    threads = [
        threading.Thread(target=load.write),
        threading.Thread(target=load.read, args=("clean",)),
        threading.Thread(target=load.read, args=("dirty",)),
    ]
    for thread in threads:
        thread.start()
    try:
        time.sleep(size.settle_s)
        load.stalls_s = dict.fromkeys(load.stalls_s, 0.0)
        server.stop(by=signal.SIGKILL)
        time.sleep(size.down_s)
        server.start()
        begin_s = time.monotonic()
        with cluster.admin(timeout_s=60) as admin:
            cluster.wait_serving(admin, lambda _: None)
        back_s = time.monotonic() - begin_s
        time.sleep(1.0)
    finally:
        load.stop.set()
        for thread in threads:
            thread.join()
    lost = sum(_read_number(client, index) < load.acknowledged[index] for index in range(size.blocks))
    goal = size.has_goals
    stall_goal = goal and victim != "kv"
    for problem in [*load.wrong[:3], *load.errors[:3]]:
        print(f"  {victim}: {problem}")
    return [
        Row(row=f"{victim}: acknowledged writes lost", ours=lost, goal=0 if goal else None, at_most=True),
        Row(row=f"{victim}: wrong reads", ours=len(load.wrong), goal=0 if goal else None, at_most=True),
        Row(row=f"{victim}: calls that failed", ours=len(load.errors)),
        Row(row=f"{victim}: calls", ours=sum(load.operations.values())),
        Row(
            row=f"{victim}: longest write, s",
            ours=load.stalls_s["write"],
            goal=WRITE_STALL_GOAL_S if stall_goal else None,
            at_most=True,
        ),
        Row(
            row=f"{victim}: longest read of what nobody writes, s",
            ours=load.stalls_s["clean"],
            goal=CLEAN_STALL_GOAL_S if stall_goal else None,
            at_most=True,
        ),
        Row(
            row=f"{victim}: longest read of what is written, s",
            ours=load.stalls_s["dirty"],
            goal=DIRTY_STALL_GOAL_S if stall_goal else None,
            at_most=True,
        ),
        Row(row=f"{victim}: restart to all serving, s", ours=back_s),
    ]


def _read_number(client: emberfs.Client, index: int) -> int:
    found = bytearray(BLOCK_BYTES)
    client.batch_read([("/dirty", index * BLOCK_BYTES, BLOCK_BYTES)], into=[found])
    return int(_HEAD.unpack_from(found)[0])


def _name_of(cluster: LocalCluster, client: emberfs.Client, victim: str) -> str:
    """The server that plays this part for the first block under load."""
    with cluster.admin() as admin:
        reply = admin.status()
    match victim:
        case "metadata":
            return "meta-1"
        case "kv":
            return "kv-1"
        case "primary manager":
            return next(node.node.name for node in reply.nodes if node.node.address == reply.primary)
    layout = client.stat("/dirty").layout
    assert isinstance(layout, Chunks)
    chain = next(chain for chain in reply.routing.chains if chain.id == chains_of(layout)[0])
    place = {"head": 0, "middle": 1, "tail": 2}[victim]
    target = chain.serving[place].target
    return next(each.node for each in reply.routing.targets if each.id == target)
