"""Which of the pages that are put are stored, by the policy of who puts them.

Run: pytest tests/kvcache/test_admission.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emberkv
import pytest
from emberfs.errors import ProtocolError, Unavailable
from emberfs.testing.sim.loop import SimRuntime
from emberkv import admission, messages
from emberkv.adapters.settings import Settings
from emberkv.admission import ON_EVICT, SECOND_USE, Sightings
from emberkv.errors import InvalidNamespace
from emberkv.keys import ROOT
from emberkv.puts import DEFERRED, KNOWN, STORED
from emberkv.service import KvService

from tests.fs.cli_run import emberline
from tests.kvcache.serving import Server
from tests.kvcache.test_pool import NAMESPACE, PAGE, TENANT, Bench, chain, run


def wanted(sightings: Sightings, keys: list[bytes], *there: bytes, kind: int = 0, parent: bytes = ROOT) -> list[bool]:
    return sightings.wanted(kind, keys, [parent, *keys[:-1]], set(there).__contains__)


def test_the_second_put_of_a_page_is_wanted() -> None:
    seen = Sightings()
    keys = chain(1, 4)
    assert wanted(seen, keys[:2]) == [False, False]
    assert wanted(seen, keys[:2], kind=1) == [False, False], "each kind is put for itself"
    assert wanted(seen, keys) == [True, True, False, False]


def test_what_a_wanted_page_hangs_on_is_wanted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, keys = Sightings(), chain(1, 4)
    wanted(seen, keys[2:3])
    assert wanted(seen, keys) == [True, True, True, False], "its beginning was forgotten"
    assert wanted(Sightings(), keys, keys[1]) == [True, True, False, False], "a page of it is there"
    others = [chain(1, 1)[0], chain(2, 1)[0], chain(3, 1)[0]]
    assert Sightings().wanted(0, others, [ROOT] * 3, {others[2]}.__contains__) == [False, False, True], (
        "they are no chain"
    )
    monkeypatch.setattr(admission, "MARKS", 1)
    small = Sightings()
    assert not any(wanted(small, [key])[0] for key in [*keys, *keys]), "a younger one takes an older one's place"


def test_a_page_of_second_use_is_stored_when_it_is_put_again() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        keys = chain(1, 3)

        async def put(keys: list[bytes], policy: str) -> list[int]:
            number, states, places = await pool.reserve(
                1, TENANT, 0, keys, [ROOT, *keys[:-1]], [PAGE] * len(keys), policy
            )
            if number:
                pool.commit(number, 1, [0] * sum(place is not None for place in places))
            return states

        assert await put(keys[:2], SECOND_USE) == [DEFERRED] * 2
        assert pool.table.count == 0 and pool.index.segments.promised_bytes == 0
        assert await put(keys, SECOND_USE) == [STORED, STORED, DEFERRED]
        assert await put(keys, SECOND_USE) == [KNOWN, KNOWN, STORED]
        assert pool.counts.puts == {"deferred": 3, "stored": 3, "known": 2}
        assert await put(chain(2, 2), "write-through") == [STORED] * 2

    run(work)


@pytest.mark.parametrize("policy", ["write-through", ON_EVICT])
def test_of_an_engine_that_evicts_the_end_comes_before_the_beginning(policy: str) -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime, ttl_s=1000)
        pool = await bench.open()
        if policy == ON_EVICT:
            pool.space.patient.add(TENANT)  # As the service does for who comes with it.
        keys = chain(1, 3)
        for index in (2, 1, 0):
            parent = keys[index - 1] if index else ROOT
            number, _, places = await pool.reserve(1, TENANT, 0, keys[index : index + 1], [parent], [PAGE], policy)
            pool.commit(number, 1, await bench.write(pool, number, places, keys[index : index + 1]))
            await runtime.sleep(bench.config.orphan_s + 2)
        assert len(pool.match(TENANT, b"".join(keys), 0)[0]) == (3 if policy == ON_EVICT else 1)
        number, _, places = await pool.reserve(1, TENANT, 0, chain(2, 2)[1:], chain(2, 1), [PAGE], policy)
        pool.commit(number, 1, await bench.write(pool, number, places, chain(2, 2)[1:]))
        await runtime.sleep(1000 + bench.config.orphan_s + 2)
        assert pool.table.count == 0, "it waits for as long as pages stay"

    run(work)


def test_a_restart_leaves_a_patient_tenant_time_to_come_back() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        pool = await bench.open()
        pool.space.patient.add(TENANT)
        keys = chain(1, 2)
        await bench.put(pool, keys[1:], parent=keys[0])
        await runtime.sleep(10 * bench.config.orphan_s)
        await pool.close()
        for is_patient in (True, False):
            pool = await bench.open()
            await runtime.sleep(bench.config.orphan_s / 2)
            assert pool.table.count == 1
            if is_patient:
                pool.space.patient.add(TENANT)
            await runtime.sleep(3 * bench.config.orphan_s)
            assert pool.table.count == is_patient
            await pool.close()

    run(work)


def test_clients_choose_and_stat_tells(serve: Callable[..., Server]) -> None:
    address = serve().address
    with (
        emberkv.connect(address, NAMESPACE, policy="second-use") as second,
        emberkv.connect(address, NAMESPACE, tenant="acme") as through,
    ):
        keys = second.keys([1, 2, 3])
        assert second.put(keys, [b"x" * 100] * 3) == ["deferred"] * 3
        second.flush()
        assert second.match(keys).reason == "absent"
        assert second.put(keys, [b"x" * 100] * 3, durable="committed") == ["stored"] * 3
        assert second.match(keys).pages == 3
        assert through.put(through.keys([1]), [b"x"]) == ["stored"]
        said = emberline("kv", "stat", "--address", address).stdout
        assert f"{NAMESPACE.name}: clients of default put second-use 1\n" in said
        assert f"{NAMESPACE.name}: clients of acme put write-through 1\n" in said
        with pytest.raises(ProtocolError, match="on-evict, not 'sometimes'"):
            second._caller.call(messages.Open(NAMESPACE, "default", "", "sometimes"), messages.Opened)
    with pytest.raises(ValueError, match="policy is one of"):
        emberkv.connect(address, NAMESPACE, policy="sometimes")
    with pytest.raises(InvalidNamespace, match="policy is one of"):
        Settings(address=address, policy="sometimes")


def test_a_committed_put_of_what_is_known_is_durable_in_one_request() -> None:
    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)

        def service() -> KvService:
            return KvService(bench.files, runtime, root="/kv", store="x", config=bench.config)

        async def ask(serving: KvService, ask: messages.Ask, answer: type[messages.A]) -> messages.A:
            return await messages.send(lambda request, timeout_s: serving.handle(request), ask, answer, timeout_s=1)

        first = service()
        seat = (await ask(first, messages.Open(NAMESPACE, "tenant"), messages.Opened)).seat
        pool = first.pools.opened[NAMESPACE.name]
        keys = chain(1, 2)
        await bench.put(pool, keys, durable=False)
        blob, parents = b"".join(keys), ROOT + keys[0]
        answer = await ask(first, messages.Reserve(seat, 0, blob, parents, [PAGE] * 2, True), messages.Reserved)
        assert list(answer.states) == [KNOWN] * 2 and not answer.reservation
        bench.kill(pool)
        assert (await service().pools.get(NAMESPACE)).table.count == 2

    run(work)


def test_pages_that_no_grant_is_made_for_are_given_up() -> None:
    """Else they would be somebody's who does not write them."""

    class Away:
        async def to_write(self, *_: object, **__: object) -> bytes:
            raise Unavailable("the store is away")

    async def work(runtime: SimRuntime) -> None:
        bench = Bench(runtime)
        granter: Any = Away()
        serving = KvService(bench.files, runtime, root="/kv", store="x", config=bench.config, granter=granter)

        async def ask(ask: messages.Ask, answer: type[messages.A]) -> messages.A:
            return await messages.send(lambda request, timeout_s: serving.handle(request), ask, answer, timeout_s=1)

        seat = (await ask(messages.Open(NAMESPACE, "tenant"), messages.Opened)).seat
        (key,) = chain(1, 1)
        with pytest.raises(Unavailable):
            await ask(messages.Reserve(seat, 0, key, ROOT, [PAGE], grant=True), messages.Reserved)
        assert not serving.pools.opened[NAMESPACE.name].reservations
        answer = await ask(messages.Reserve(seat, 0, key, ROOT, [PAGE]), messages.Reserved)
        assert list(answer.states) == [STORED] and not answer.grant

    run(work)
