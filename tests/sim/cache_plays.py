"""One server of a KV cache, or what it works on, ends in the middle of an act; another one goes on.

    for death, messages in rehearse(act, seed).items():     # so many leave its victim during the act
        for number in range(1, messages + 1):
            play(act, death, number, seed)                  # it ends just as that one was to leave

A process does nothing that others see but send messages: to end just before the n-th, for every n, is to end at every
moment there is. What the disks of a node that loses power keep is up to the seed.

Does not know: what is right (see `cache_ledger`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from emberfs.errors import EmberError
from emberfs.messages import Stat
from emberfs.testing.sim.cluster import SimCluster, SimMachine
from emberfs.testing.sim.loop import SimRuntime
from emberfs.testing.sim.process import SimProcess
from emberfs.testing.sim.traps import Passage, Trap
from emberkv import messages
from emberkv.page import HEADER_BYTES
from emberkv.segments import State

from tests.sim.cache_cluster import DIRECTORY, NAMESPACE, PAGE_BYTES, TENANT, chain
from tests.sim.cache_ledger import Leased
from tests.sim.cache_stage import ALLOWED, AWAY, LEASE_S, RESERVATION_S, SHAPE, Stage, hurried

DOWN_S = 0.7
LATE_S = 1.0
STANDBY_S = 0.5
ACT_S = 30.0
"""An act ends within it."""


class Toll:
    """A trap: stops a process as it is about to send its n-th message, which is held until `release`.

    `breaks`: the process dies of it, so the message never leaves, and its connection is no more.
    """

    def __init__(self, stage: Stage, host: str, process: SimProcess, number: int, *, breaks: bool) -> None:
        self.breaks = breaks
        self.count = 0
        self.is_reached = False
        self.what = ""
        self._deaf = set(stage.managers)
        self.host, self._process, self._number = host, process, number
        self._go_on: Callable[[], None] | None = None
        self._fabric = stage.cluster.fabric
        self._fabric.traps.append(self)  # type: ignore[arg-type]

    def takes(self, passage: Passage, go_on: Callable[[], None]) -> bool:
        """See `traps.Trap`."""
        if passage.source != self.host or passage.destination in self._deaf or not self._process.is_alive:
            return False
        self.count += 1
        if self.count != self._number:
            return False
        self._process.pause()
        self.is_reached, self._go_on = True, go_on
        request = type(passage.request).__name__
        self.what = f"reply to {request}" if passage.is_reply else f"{request} to {passage.destination}"
        return True

    def release(self) -> None:
        if self._go_on is not None:
            go_on, self._go_on = self._go_on, None
            go_on()

    def end(self) -> None:
        self._fabric.traps.remove(self)  # type: ignore[arg-type]


# ---- deaths

Victim = Callable[[Stage, int], tuple[str, SimProcess]]
"""(host, process), of a stage and of the server that acts."""


class Death(NamedTuple):
    """Whom the toll stops, and what becomes of it."""

    victim: Victim
    strike: Callable[[Stage, int, Toll], Awaitable[None]]
    is_final: bool = True
    """The process that was stopped does not go on."""


def _server(stage: Stage, acting: int) -> tuple[str, SimProcess]:
    return stage.servers[acting].host, stage.servers[acting].process


def _node(stage: Stage, acting: int) -> tuple[str, SimProcess]:
    return _machine(stage.cluster.storage[0])


def _meta(stage: Stage, acting: int) -> tuple[str, SimProcess]:
    return _machine(stage.cluster.metas[0])


def _writer(stage: Stage, acting: int) -> tuple[str, SimProcess]:
    return stage.writer.client.name, stage.writer.process


def _machine(machine: SimMachine) -> tuple[str, SimProcess]:
    assert machine.process is not None
    return machine.name, machine.process


async def _kill_server(stage: Stage, acting: int, toll: Toll) -> None:
    stage.servers[acting].kill()
    await stage.world.sleep(DOWN_S)
    stage.start_all()


async def _blackout(stage: Stage, acting: int, toll: Toll) -> None:
    """The server, all nodes and the metadata."""
    stage.servers[acting].kill()
    machines = [*stage.cluster.storage, *stage.cluster.metas, stage.cluster.kv]
    for machine in machines:
        machine.kill(power=True)
    await stage.world.sleep(DOWN_S)
    for machine in machines:
        machine.start()
    await stage.world.sleep(DOWN_S)
    stage.start_all()


async def _stop_server(stage: Stage, acting: int, toll: Toll) -> None:
    """Another one takes over; then it goes on where it was, and its message arrives. Its beat is late to see it."""
    before = stage.servers[acting].pool
    stage.start_all()
    stage.reader.addresses.sort(key=stage.servers[acting].address.__eq__)  # It is asked last.
    other = await stage.served()
    assert other is not stage.servers[acting]
    client = await stage.join("successor")
    await stage.within(client, stage.put_patiently(client, chain(80, 4)))
    trap = Trap(stage.world, lambda passage: _looks_who_serves(passage, toll.host), holds=True)
    stage.cluster.fabric.traps.append(trap)
    toll.release()
    stage.servers[acting].process.resume()
    await stage.world.sleep(LATE_S)
    trap.release()
    await stage.world.sleep(LATE_S)
    stage.cluster.fabric.traps.remove(trap)
    assert before is None or before.is_lost, "who was overtaken does not know it"


async def _stop_alone(stage: Stage, acting: int, toll: Toll) -> None:
    """For longer than a reservation lasts, and nobody else is there."""
    stage.servers[1 - acting].kill()
    await stage.world.sleep(RESERVATION_S + DOWN_S)
    toll.release()
    stage.servers[acting].process.resume()


def _looks_who_serves(passage: Passage, host: str) -> bool:
    asked = passage.request
    return passage.source == host and isinstance(asked, Stat) and "/owner/" in asked.path


async def _cut_power(stage: Stage, acting: int, toll: Toll) -> None:
    """Of a storage node."""
    await _crash(stage, stage.cluster.storage[0])


async def _kill_meta(stage: Stage, acting: int, toll: Toll) -> None:
    await _crash(stage, stage.cluster.metas[0])


async def _crash(stage: Stage, machine: SimMachine) -> None:
    machine.kill(power=True)
    await stage.world.sleep(DOWN_S)
    machine.start()


async def _kill_writer(stage: Stage, acting: int, toll: Toll) -> None:
    stage.writer.client.kill()


async def _stop_writer(stage: Stage, acting: int, toll: Toll) -> None:
    """Until somebody else has put its pages; what it writes then comes late."""
    await stage.world.sleep(RESERVATION_S + DOWN_S)
    client = await stage.join("other")
    for prompt in (3, 4):
        await stage.within(client, stage.put_patiently(client, chain(prompt, 4)))
    toll.release()
    stage.writer.process.resume()
    await stage.world.sleep(LATE_S)


DEATHS = {
    "the server is killed": Death(_server, _kill_server),
    "all lose power": Death(_server, _blackout),
    "the server is stopped and goes on when it is over": Death(_server, _stop_server, is_final=False),
    "the server is stopped for a while": Death(_server, _stop_alone, is_final=False),
    "a node loses power": Death(_node, _cut_power),
    "the metadata server is killed": Death(_meta, _kill_meta),
    "the writer is killed": Death(_writer, _kill_writer),
    "the writer is stopped for a while": Death(_writer, _stop_writer, is_final=False),
}


# ---- acts


class Act(NamedTuple):
    """What is done until somebody dies."""

    perform: Callable[[Stage], Coroutine[Any, Any, None]]
    prepare: Callable[[Stage], Coroutine[Any, Any, None]]
    acting: int = 0
    """Which server does it."""
    in_server: bool = False
    """It is the server's own work, and not the writer's."""
    errors: tuple[type[EmberError], ...] = ALLOWED
    """What whoever does it may be told."""


def _pool(stage: Stage) -> Any:
    pool = stage.servers[0].pool
    assert pool is not None
    return pool


async def _nothing(stage: Stage) -> None:
    pass


async def _some_pages(stage: Stage) -> None:
    for prompt in (1, 2):
        await stage.ledger.put(stage.writer, chain(prompt, 4))


async def _open(stage: Stage) -> None:
    await stage.writer.seated()


async def _put(stage: Stage) -> None:
    for prompt in (3, 4):
        await stage.ledger.put(stage.writer, chain(prompt, 4))


async def _full_quota(stage: Stage) -> None:
    """Two segments of pages, and the second one is leased."""
    quota = messages.Quota(NAMESPACE.name, TENANT, 8 * (HEADER_BYTES + PAGE_BYTES))
    await stage.writer.seated()
    await stage.writer.call(quota, messages.Okay)
    await _some_pages(stage)


async def _evict(stage: Stage) -> None:
    """The first prompt goes for the third, its segment when no lease can reach it, and the fourth gets the room."""
    leased = await stage.ledger.match(stage.writer, chain(2, 4), lease_s=LEASE_S)
    await stage.ledger.put(stage.writer, chain(3, 4))
    await _removed(stage, 1)
    await stage.ledger.put(stage.writer, chain(4, 4))
    await stage.ledger.read(stage.writer, leased)


async def _removed(stage: Stage, segment: int) -> None:
    """Return when the file of a segment is gone."""
    while await stage.writer.store.exists(f"{DIRECTORY}/segments/{segment:08x}"):
        await stage.writer.process.sleep(0.1)


async def _halves(stage: Stage) -> None:
    """Three segments, of each of which half is dead."""
    for prompt in range(1, 7):
        await stage.ledger.put(stage.writer, chain(prompt, 2))
    keys = b"".join(chain(prompt, 1)[0] for prompt in (1, 3, 5))
    await stage.writer.ask(lambda seat: messages.Remove(seat, keys), messages.Okay)
    await stage.writer.flush()


async def _compact(stage: Stage) -> None:
    """While somebody reads under a lease, where the pages were."""
    pool = _pool(stage)
    space = pool.space
    leased = [await stage.ledger.match(stage.reader, chain(prompt, 2), lease_s=LEASE_S) for prompt in (2, 4)]
    reading = stage.reader.process.spawn(_read_on(stage, leased), "read")
    async with pool._making_room:
        for segment in list(pool.index.segments):
            space.seal(segment)
            await space.compaction.compact(segment)
        await space.collect()
    assert not any(each.state is State.SEALED and each.id <= 3 and each.live_bytes for each in pool.index.segments)
    await reading
    while any(each.id <= 3 for each in pool.index.segments) and not pool.is_lost:
        await stage.servers[0].process.sleep(0.1)


async def _read_on(stage: Stage, leased: Sequence[Leased]) -> None:
    """For as long as the first lease lasts."""
    while stage.world.now_s() < leased[0].until_s:
        for each in leased:
            await stage.ledger.read(stage.reader, each)
        await stage.reader.process.sleep(0.3)


async def _snapshot(stage: Stage) -> None:
    """While pages are put."""
    pool = _pool(stage)
    before = pool._wal._number
    pool._wal.want_snapshot()
    for prompt in (3, 4):
        await stage.ledger.put(stage.writer, chain(prompt, 2))
    while (pool._wal._number == before or pool._wal._log is None) and stage.ledger.owner is pool:
        await stage.writer.process.sleep(0.05)


async def _erase(stage: Stage) -> None:
    """What is leased, too; its files wait for the lease."""
    leased = await stage.ledger.match(stage.writer, chain(2, 4), lease_s=LEASE_S)
    await stage.writer.call(messages.Erase(TENANT), messages.Numbers)
    await stage.ledger.read(stage.writer, leased)
    for segment in (1, 2):
        await _removed(stage, segment)


async def _close(stage: Stage) -> None:
    """With a put that nobody waits for."""
    service = stage.servers[0].service
    assert service is not None
    await service.close()


async def _take_over(stage: Stage) -> None:
    """The one before was killed."""
    stage.servers[0].kill()
    stage.writer.addresses.append(stage.servers[1].address)
    await stage.writer.match(chain(1, 4))
    await stage.ledger.put(stage.writer, chain(3, 4))


ACTS = {
    "opening": Act(_open, _nothing, errors=AWAY),
    "put": Act(_put, _some_pages),
    "eviction": Act(_evict, _full_quota),
    "compaction": Act(_compact, _halves, in_server=True, errors=(EmberError,)),
    "snapshot": Act(_snapshot, _some_pages),
    "erasure": Act(_erase, _some_pages),
    "end": Act(_close, _some_pages, in_server=True, errors=(EmberError,)),
    "takeover": Act(_take_over, _some_pages, acting=1),
}


# ---- plays


def rehearse(act: str, seed: int) -> dict[str, int]:
    """Death -> how many messages its victim sends during the act. Nobody dies."""
    return _run(act, "", 0, seed)


def play(act: str, death: str, number: int, seed: int) -> None:
    """The same, and the victim ends as it is about to send the message of that number."""
    _run(act, death, number, seed)


def _run(act: str, death: str, number: int, seed: int) -> dict[str, int]:
    tolls: dict[str, Toll] = {}

    async def main(world: SimRuntime) -> None:
        stage = Stage(SimCluster(world, config=SHAPE))
        try:
            await stage.open()
            await _play(stage, ACTS[act], death, number, tolls)
        finally:
            stage.close()

    with hurried():
        try:
            SimRuntime(seed).run(main)
        except BaseException as error:
            if death:
                error.add_note(f"{act}: {death}, as message {number} was to leave: {tolls[death].what}")
            raise
    return {name: toll.count for name, toll in tolls.items()}


async def _play(stage: Stage, act: Act, death: str, number: int, tolls: dict[str, Toll]) -> None:
    """`death` "": nobody dies."""
    await stage.within(stage.writer, act.prepare(stage))
    stage.start_all()  # The other one stands by.
    await stage.world.sleep(STANDBY_S)
    for name, each in DEATHS.items():
        if death in ("", name):
            tolls[name] = Toll(stage, *each.victim(stage, act.acting), number, breaks=each.is_final)
    process = stage.servers[act.acting].process if act.in_server else stage.writer.process
    acting = process.spawn(_suppressed(act.perform(stage), act.errors), "act")
    until_s = stage.world.now_s() + ACT_S
    while not acting.done() and not any(toll.is_reached for toll in tolls.values()):
        assert stage.world.now_s() < until_s, "the act does not end"
        await stage.world.sleep(0.02)
    if death:
        assert tolls[death].is_reached, f"it sent {tolls[death].count} messages, and not {number}"
        await DEATHS[death].strike(stage, act.acting, tolls[death])
        if process.is_alive:
            done, _ = await asyncio.wait([acting], timeout=ACT_S)
            assert done, "the act does not end"
    for toll in tolls.values():
        toll.end()
    if acting.done():
        acting.result()
    stage.start_all()
    await stage.check()


async def _suppressed(work: Awaitable[None], errors: tuple[type[EmberError], ...]) -> None:
    """Who asks may be told that something does not work now."""
    with contextlib.suppress(*errors):
        await work
