"""The chunk engine under power failure: at every moment, with every legal outcome, and with bugs that must be found.

A *life* opens an engine on what the last crash left and runs random updates of several chunks at once: published at
once, or prepared and committed or discarded; in batches; and copies of chunks as other replicas have them. It leaves
the log of what the disk did, with a mark wherever the index changed or an update began or was acknowledged. Then it
dies at each point of that log (`volume.crash_points`), and at some with garbage in the sectors that were just being
written, which a flash disk may do. What is found then must be:

  - of each chunk exactly one of the states it may be in: the last acknowledged, or that with the update in the air
    applied in whole, committed and pending version each, every byte;
  - no block leaked, owned twice or unmarked, no pending version or tombstone that is not listed (`check`).

`--sim-seeds` asks for more seeds than the ones that run each time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
from emberfs.engine import Action, ChunkEngine, EngineConfig, InstallItem, Prepared, Update
from emberfs.engine import engine as engine_module
from emberfs.engine import update as update_module
from emberfs.engine.allocator import Allocator
from emberfs.engine.record import Extent, Record
from emberfs.engine.rows import Change
from emberfs.engine.scrub import check
from emberfs.errors import Corruption
from emberfs.kv.memory import MemoryKV
from emberfs.testing.sim.disk import SimDisk
from emberfs.testing.sim.loop import SimRuntime, run
from emberfs.testing.sim.volume import BLOCK_BYTES, SECTOR_BYTES, FileImage, Image, Operation, Sync, Write, crash_points
from emberfs.types import chunk_id

Rows = dict[bytes, bytes]

WRITERS = 3
CHUNKS_EACH = 2
STEPS_EACH = 4
LIVES = 2
IMAGES_PER_POINT = 3
BIG_LENGTH = (1 << 20) + 3 * BLOCK_BYTES
"""Just enough 4 KiB granules for sums beside the block."""
BIG_CHUNK = chunk_id(1, 0)

CONFIG = EngineConfig(keeps_tombstones=True)


@dataclass(frozen=True)
class State:
    """What a chunk is: committed bytes and prepared ones. None: absent, or prepared to be removed."""

    committed: bytes | None
    pending: bytes | None = None
    is_pending: bool = False


ABSENT = State(None)


@dataclass(frozen=True)
class Moment:
    """What a mark in the log says: the index as it is, and what each chunk may be."""

    rows: Rows
    states: dict[bytes, tuple[State, ...]]


class Journal:
    """Keeps the newest `Moment` in the disk's log."""

    def __init__(self, disk: SimDisk, rows: Rows) -> None:
        self._disk = disk
        self.rows = rows
        self.states: dict[bytes, tuple[State, ...]] = {}
        self.mark()

    def mark(self) -> None:
        self._disk.record_mark(Moment(self.rows, dict(self.states)))


class JournaledKV(MemoryKV):
    """Notes each commit at the moment when it is durable."""

    journal: Journal

    def _apply(self, group: Sequence[Any]) -> None:
        super()._apply(group)
        self.journal.rows = self.snapshot()
        self.journal.mark()


@dataclass
class Life:
    """One run of the engine and what it left behind."""

    initial: Image
    first: Moment
    operations: list[Operation] = field(default_factory=list)


def live(seed: int, make: type[ChunkEngine], image: Image, rows: Rows) -> Life:
    """Run a random workload on what is left of the life before."""

    async def main(runtime: SimRuntime) -> Life:
        rng = runtime.random("workload")
        disk = SimDisk.from_image(runtime, image, record=True)

        async def persist() -> None:
            await runtime.sleep(rng.choice([0, 1e-4, 2e-3]))

        index = JournaledKV(runtime, rows=rows, persist=persist)
        journal = index.journal = Journal(disk, dict(rows))
        engine = await make.open(disk, index, runtime, config=CONFIG)
        names = [[chunk_id(writer + 1, number) for number in range(CHUNKS_EACH)] for writer in range(WRITERS)]
        for chunk in [chunk for chunks in names for chunk in chunks]:
            journal.states[chunk] = (await state_of(engine, chunk),)
        journal.mark()
        first = Moment(journal.rows, dict(journal.states))
        start = len(disk.operations)
        writers = [runtime.spawn(write(engine, journal, chunks, rng, seed), "writer") for chunks in names]
        for writer in writers:
            await writer
        await engine.close()
        await index.close()
        # What was before `start` changed nothing but names.
        assert not any(isinstance(operation, Write) for operation in disk.operations[:start])
        return Life(image, first, disk.operations)

    return run(seed, main)


async def write(engine: ChunkEngine, journal: Journal, chunks: list[bytes], rng: random.Random, seed: int) -> None:
    """One writer: updates its chunks, one batch after the other. Nobody else does: it holds their locks, so to say."""
    for _ in range(STEPS_EACH):
        batch = rng.sample(chunks, rng.randint(1, len(chunks)))
        prepared = [chunk for chunk in batch if journal.states[chunk][0].is_pending]
        if prepared and rng.random() < 0.6:
            versions = [each.pending_version for each in await engine.states(prepared) if each is not None]
            after = [State(journal.states[chunk][0].pending) for chunk in prepared]
            await step(journal, prepared, after, lambda p=prepared, v=versions: engine.commit(p, v))
            continue
        if prepared and rng.random() < 0.2:
            versions = [each.pending_version for each in await engine.states(prepared) if each is not None]
            after = [State(journal.states[chunk][0].committed) for chunk in prepared]
            await step(journal, prepared, after, lambda p=prepared, v=versions: engine.discard(p, v))
            continue
        if rng.random() < 0.1:
            items = [random_copy(chunk, rng) for chunk in batch]
            after = [State(bytes(item.payload) if item.payload is not None else None) for item in items]
            await step(journal, batch, after, lambda i=items: engine.install(i))
            continue
        publish = rng.random() < 0.5
        updates = [random_update(chunk, journal.states[chunk][0], rng, seed) for chunk in batch]
        after = [apply(update, journal.states[update.chunk][0], publish) for update in updates]
        await step(journal, batch, after, lambda u=updates, p=publish: engine.prepare(u, publish=p))


async def step(journal: Journal, chunks: list[bytes], after: list[State], call: Callable[[], Any]) -> None:
    """While it is in the air each chunk may be in either state, and afterwards only in the new one."""
    for chunk, state in zip(chunks, after, strict=True):
        journal.states[chunk] = (journal.states[chunk][0], state)
    journal.mark()
    await call()
    for chunk, state in zip(chunks, after, strict=True):
        journal.states[chunk] = (state,)
    journal.mark()


def is_big(seed: int) -> bool:
    """Does the first writer's first chunk get BIG_LENGTH in this life? They are slower, and so fewer."""
    return seed % 4 == 2


def random_update(chunk: bytes, state: State, rng: random.Random, seed: int) -> Update:
    length = len(state.committed or b"")
    aligned = rng.random() < 0.4
    if state.committed is None:
        action = Action.WRITE
        offset = 0
        size = BIG_LENGTH if is_big(seed) and chunk == BIG_CHUNK else rng.choice([1, 100, 4096, 8192, 20_000])
    else:
        action = rng.choices(list(Action), [7, 1, 2, 1])[0]
        offset = rng.choice([length, length, rng.randint(0, length), length + rng.randint(0, 5000)])
        size = rng.choice([0, 1, 700, 4096, 9000, 60_000])
    if action is Action.TRUNCATE:
        offset = rng.randint(0, length + 10)
    if aligned:
        offset -= offset % 4096
        size += -size % 4096 if action is Action.WRITE else 0
    if action is Action.REPLACE:
        offset = 0
    payload = rng.randbytes(size) if action in (Action.WRITE, Action.REPLACE) else b""
    granule_log2 = 12 if chunk == BIG_CHUNK else rng.choice([12, 14])
    room_bytes = rng.choice([0, 0, 100_000, 1 << 18])
    return Update(chunk, action, offset, memoryview(payload), granule_log2=granule_log2, room_bytes=room_bytes)


def random_copy(chunk: bytes, rng: random.Random) -> InstallItem:
    """A chunk as another replica has it."""
    payload = memoryview(rng.randbytes(rng.choice([0, 4096, 20_000]))) if rng.random() < 0.8 else None
    return InstallItem(chunk, rng.randint(1, 9), 1, payload, granule_log2=12 if chunk == BIG_CHUNK else 14)


def apply(update: Update, state: State, publish: bool) -> State:
    """What an update makes of a chunk."""
    old = state.committed
    new: bytes | None
    match update.action:
        case Action.REMOVE:
            if old is None and not state.is_pending:
                return state
            new = None
        case Action.REPLACE:
            new = bytes(update.payload)
        case Action.TRUNCATE:
            if old is None or update.offset >= len(old):
                return state
            new = old[: update.offset]
        case Action.WRITE:
            before = (old or b"")[: update.offset].ljust(update.offset, b"\0")
            new = before + bytes(update.payload) + (old or b"")[update.offset + len(update.payload) :]
    return State(new) if publish else State(old, new, True)


async def state_of(engine: ChunkEngine, chunk: bytes) -> State:
    """What the engine says a chunk is, every byte verified by it."""
    record = await engine.record(chunk)
    if record is None:
        return ABSENT
    committed = await content(engine, chunk, record, record.committed)
    if record.committed is not None:
        buffer = memoryview(bytearray(record.committed.length))
        (count,) = await engine.read([chunk], [0], [buffer])
        assert count == len(buffer) and bytes(buffer) == committed, count
    return State(committed, await content(engine, chunk, record, record.pending), record.is_pending)


async def content(engine: ChunkEngine, chunk: bytes, record: Record, extent: Extent | None) -> bytes | None:
    if extent is None:
        return None
    buffer = memoryview(bytearray(extent.length))
    await engine.reader.read_extent(chunk, extent, record.granule_log2, 0, buffer)
    return bytes(buffer)


@dataclass(frozen=True)
class Death:
    """What a restart finds, and what it may find in it."""

    operations_count: int
    fates: Any
    image: Image
    moment: Moment


def deaths(life: Life, rng: random.Random, *, images: int, points_max: int) -> Iterator[Death]:
    """Ways to die in this life: every point if there are at most `points_max`, else so many of them."""
    count = len(life.operations) + 1
    chosen = set(rng.sample(range(count), min(count, points_max)))
    unsynced: list[tuple[int, Write]] = []
    for point in crash_points(life.operations, limit=images, rng=rng, initial=life.initial):
        number = point.operations_count - 1
        operation = life.operations[number] if number >= 0 else None
        if isinstance(operation, Write) and (not unsynced or unsynced[-1][0] != number):
            unsynced.append((number, operation))
        elif isinstance(operation, Sync):
            began, name = operation.began, operation.name
            unsynced = [(at, each) for at, each in unsynced if at >= began or each.name != name]
        if point.operations_count not in chosen:
            continue
        moment = point.mark.label if point.mark is not None else life.first
        yield Death(point.operations_count, point.fates, point.image, moment)
        if unsynced and not point.fates:
            _, victim = rng.choice(unsynced)
            yield Death(point.operations_count, f"garbage in {victim.name}", spoilt(point.image, victim, rng), moment)


def spoilt(image: Image, victim: Write, rng: random.Random) -> Image:
    """The power failed while a sector at either end of `victim` was written: it holds garbage."""
    file = image[victim.name]
    blocks = dict(file.blocks)
    for byte in (victim.offset, victim.offset + len(victim.payload) - 1):
        block, position = divmod(byte, BLOCK_BYTES)
        start = position - position % SECTOR_BYTES
        if block in blocks and rng.random() < 0.7:
            blocks[block] = blocks[block][:start] + rng.randbytes(SECTOR_BYTES) + blocks[block][start + SECTOR_BYTES :]
    return {**image, victim.name: FileImage(blocks, file.size, file.allocated)}


def inspect(make: type[ChunkEngine], death: Death) -> None:
    """Restart after `death` and look at everything."""

    async def main(runtime: SimRuntime) -> None:
        index = MemoryKV(runtime, rows=death.moment.rows)
        engine = await make.open(SimDisk.from_image(runtime, death.image), index, runtime, config=CONFIG)
        for chunk, states in death.moment.states.items():
            found = await state_of(engine, chunk)
            assert found in states, f"{shape(found)} is none of {[shape(state) for state in states]}"
        report = await check(engine)
        assert not report.findings, report.findings
        await engine.close()

    try:
        SimRuntime(0, inline_probability=1).run(main)
    except (AssertionError, Corruption) as error:
        error.add_note(f"died after operation {death.operations_count} with {death.fates}")
        raise


def shape(state: State) -> str:
    sizes = [None if part is None else len(part) for part in (state.committed, state.pending)]
    return f"{sizes[0]} committed, {sizes[1] if state.is_pending else 'none'} pending"


def torture(seed: int, make: type[ChunkEngine] = ChunkEngine, *, images: int, points_max: int) -> int:
    """Live, die in many ways, and go on from one of them. Returns the number of deaths looked at."""
    rng = random.Random(f"deaths {seed}")
    image: Image = {}
    rows: Rows = {}
    looked_at = 0
    for number in range(LIVES):
        life = live(seed * LIVES + number, make, image, rows)
        for death in deaths(life, rng, images=images, points_max=points_max):
            inspect(make, death)
            looked_at += 1
            if rng.random() < 1 / looked_at:
                image, rows = death.image, death.moment.rows
    return looked_at


def test_a_crash_at_any_moment_loses_nothing_acknowledged_and_leaves_nothing_half_there(seeds: Sequence[int]) -> None:
    for seed in seeds:
        assert torture(seed, images=IMAGES_PER_POINT, points_max=60) > 50


def test_the_workload_reaches_every_way_of_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums beside the block, and each way that an update may go, published and prepared."""
    ways: set[tuple[str, bool]] = set()
    plan = ChunkEngine._next_extent
    slots: set[int | None] = set()

    async def noted(self: ChunkEngine, update: Any, committed: Any, *args: Any) -> Extent | None:
        extent = await plan(self, update, committed, *args)
        ways.add((args[2].way, committed is not None))
        slots.add(extent.slot if extent is not None else None)
        return extent

    monkeypatch.setattr(ChunkEngine, "_next_extent", noted)
    for seed in range(20):
        image: Image = {}
        for number in range(LIVES):
            live(seed * LIVES + number, ChunkEngine, image, {})
    assert {way for way, _ in ways} == {"fresh", "in place", "copy", "truncate", "remove"}
    assert slots == {None, 0, 1}


# ---- The test can fail: each of these engines has one bug.


class SkipsDataSync(ChunkEngine):
    """Commits the index before the data is on the medium."""

    async def _flush(self, changes: list[Change]) -> None:
        for change in changes:
            change.files = []
        await super()._flush(changes)


class FreesTooEarly(ChunkEngine):
    """Gives a block away while the record that names it is still the durable one."""

    async def _plan(
        self, update: Update, record: Record | None, publish: bool, change: Change, writes: Any
    ) -> Prepared:
        before = len(change.freed)
        prepared = await super()._plan(update, record, publish, change, writes)
        for position in change.freed[before:]:
            self.allocator.release(position)
        return prepared

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._limbo.add = lambda positions: None  # type: ignore[method-assign]


class ForgetsGroupRows(ChunkEngine):
    """Does not write down which blocks are taken."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

        class Forgetful(Allocator):
            def group_rows(self, named: Any, freed: Any) -> dict[tuple[int, int], int]:
                self.adopt(super().group_rows(named, freed))
                return {}

        self.allocator.__class__ = Forgetful


class OverwritesInPlace(ChunkEngine):
    """Merges a partial write into the committed block."""

    async def _next_extent(
        self, update: Update, committed: Any, granule_log2: int, version: int, plan: Any, change: Change, writes: Any
    ) -> Extent | None:
        extent = await super()._next_extent(update, committed, granule_log2, version, plan, change, writes)
        if plan.way == "copy" and extent is not None and extent.slot is None and committed.slot is None:
            file, old = self.allocator.place(committed.position)
            if extent.position >> 56 == committed.position >> 56:
                self.allocator.release(change.named.pop())
                writes[-1] = (file, writes[-1][1], old)
                extent = extent._replace(position=committed.position)
        return extent


class FreesNothing(ChunkEngine):
    """Leaves the blocks of replaced versions marked."""

    async def _plan(
        self, update: Update, record: Record | None, publish: bool, change: Change, writes: Any
    ) -> Prepared:
        prepared = await super()._plan(update, record, publish, change, writes)
        change.freed.clear()
        return prepared


class KeepsOneSumSlot(ChunkEngine):
    """Writes the sums of an append over the committed ones."""

    def _with_sums(self, extent: Extent, *args: Any) -> Extent:
        other = extent._replace(slot=1 - extent.slot) if extent.slot is not None else extent
        return super()._with_sums(other, *args)


def unaligned_appends() -> AbstractContextManager[Any]:
    """Appends go in place whatever the committed length is, over the sector that holds the last committed bytes."""
    return patch.object(update_module, "SECTOR_BYTES", 1)


def appends_over_pending() -> AbstractContextManager[Any]:
    """An update that replaces a prepared append writes over its bytes."""
    plan_update = update_module.plan_update
    return patch.object(
        engine_module,
        "plan_update",
        lambda update, committed, pending, **sizes: plan_update(update, committed, None, **sizes),
    )


@pytest.mark.parametrize(
    ("make", "bug", "first", "seeds_max"),
    [
        (SkipsDataSync, nullcontext, 0, 2),
        (FreesTooEarly, nullcontext, 0, 20),
        (ForgetsGroupRows, nullcontext, 0, 2),
        (OverwritesInPlace, nullcontext, 0, 10),
        (FreesNothing, nullcontext, 0, 2),
        (KeepsOneSumSlot, nullcontext, 7, 40),
        (ChunkEngine, unaligned_appends, 1, 20),
        (ChunkEngine, appends_over_pending, 13, 40),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_bug_is_found(
    make: type[ChunkEngine], bug: Callable[[], AbstractContextManager[Any]], first: int, seeds_max: int
) -> None:
    """`first`: a seed that found it when this was written."""
    with bug(), pytest.raises((AssertionError, Corruption)):
        for seed in range(first, first + seeds_max):
            torture(seed, make, images=IMAGES_PER_POINT, points_max=60)
