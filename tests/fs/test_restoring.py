"""A cluster's metadata backup: its tables come back with the names, under versions that nobody has seen."""

from __future__ import annotations

import msgspec
import pytest
from emberfs.cluster.restoring import ID_STEP, restore
from emberfs.errors import AlreadyExists, StoreFormat
from emberfs.kv.memory import MemoryKV
from emberfs.kv.types import Transaction
from emberfs.manager import rows
from emberfs.manager.tables import RESTORE_STEP, Tables, read_tables, write_tables
from emberfs.messages import Heartbeat, SetConfig
from emberfs.meta.dump import dump
from emberfs.meta.keys import get_ids
from emberfs.routing import Chain, ChainTarget, Node, Role, Target, TargetState
from emberfs.settings import Config
from emberfs.testing.sim.loop import SimRuntime, run
from msgspec.structs import replace

from tests.fs.manager_fakes import Managers
from tests.fs.meta_fakes import Meta

TABLES = Tables(
    routing_version=7,
    sessions_version=9,
    setup=rows.Setup(3, 2, False),
    nodes=[rows.NodeRow(Node("s1", Role.STORAGE, "s1:1", b"now", "rack"), True, False, (b"before",))],
    targets=[Target(b"t" * 16, "s1", 1)],
    chains=[Chain(1, 5, (ChainTarget(b"t" * 16, TargetState.SERVING, b"generation"),), 3), Chain(2, 0, ())],
    config=rows.ConfigRow(4, {"trash_s": 90 * 86400.0, "moves_max": 9, "of_a_newer_release": 1}, 20.0),
)


def dumped(meta: Meta) -> list[str]:
    """A dump with TABLES in its header."""
    lines: list[str] = []
    meta.run(dump(meta.kv, lines.append))
    header = msgspec.json.decode(lines[0])
    header["cluster"] = msgspec.to_builtins(TABLES)
    return [msgspec.json.encode(header).decode(), *lines[1:]]


@pytest.fixture
def lines() -> list[str]:
    meta = Meta()
    meta.put("/file", b"hello")
    lines = dumped(meta)
    meta.close()
    return lines


def test_tables_and_names_come_back_and_ids_begin_far_behind(lines: list[str]) -> None:
    meta = Meta()
    kv = MemoryKV(meta.runtime)
    meta.run(restore(kv, lines))
    restored = meta.run(read_tables(kv))
    assert (restored.routing_version, restored.sessions_version) == (7 + RESTORE_STEP, 9 + RESTORE_STEP)
    assert [chain.version for chain in restored.chains] == [5 + RESTORE_STEP, 0]
    assert restored.chains[0].targets == TABLES.chains[0].targets
    assert (restored.setup, restored.nodes, restored.targets) == (TABLES.setup, TABLES.nodes, TABLES.targets)
    assert restored.config == replace(TABLES.config, version=4 + RESTORE_STEP)
    assert meta.run(get_ids(kv.begin())).next > ID_STEP
    copy = Meta(kv, runtime=meta.runtime)
    assert copy.names("/") == ["file"]
    copy.run(copy.service.close())
    with pytest.raises(AlreadyExists):
        meta.run(write_tables(kv, TABLES))
    meta.close()


def test_managers_go_by_the_configuration_of_the_dump_and_nodes_take_it() -> None:
    async def main(runtime: SimRuntime) -> tuple[Config, Config]:
        managers = Managers(runtime)
        await write_tables(managers.kv, TABLES)
        await managers.start()
        reply = await managers.call(Heartbeat(Node("d1", Role.META, "d1:1", b"1"), [], 0, 0, 4))
        changed = (await managers.call(SetConfig(reply.config.version, {"moves_max": 5}))).config
        await managers.close()
        return reply.config, changed

    config, changed = run(0, main)
    assert (config.version, config.waits_s) == (4 + RESTORE_STEP, 20.0)
    assert config.chosen == ("moves_max", "trash_s")
    assert (config.values["trash_s"], config.values["moves_max"]) == (90 * 86400.0, 9)
    assert (changed.version, changed.values["trash_s"]) == (5 + RESTORE_STEP, 90 * 86400.0)


def test_a_dump_without_a_configuration_is_loaded_with_the_defaults(lines: list[str]) -> None:
    header = msgspec.json.decode(lines[0])
    del header["cluster"]["config"]
    meta = Meta()
    kv = MemoryKV(meta.runtime)
    meta.run(restore(kv, [msgspec.json.encode(header).decode(), *lines[1:]]))
    assert meta.run(read_tables(kv)).config == rows.ConfigRow(1 + RESTORE_STEP)
    meta.close()


def test_tables_are_of_one_moment() -> None:
    meta = Meta()
    meta.run(write_tables(meta.kv, TABLES))

    reads = 0

    async def get_all(txn: Transaction, prefix: bytes, kind: type[msgspec.Struct]) -> dict[bytes, msgspec.Struct]:
        nonlocal reads
        reads += 1
        if reads == 2:
            change = meta.kv.begin()
            change.put(rows.FORMAT_KEY, rows.encode(rows.Format(routing_version=99)))
            await change.commit()
        return await original(txn, prefix, kind)

    original = rows.get_all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "get_all", get_all)
        assert meta.run(read_tables(meta.kv)).routing_version == 99
    assert reads == 6
    meta.close()


def test_what_is_no_dump_of_a_cluster_is_refused(lines: list[str]) -> None:
    header = msgspec.json.decode(lines[0])
    embedded = {name: value for name, value in header.items() if name != "cluster"}
    meta = Meta()
    for bad, says in ((embedded, "an embedded store"), ({**header, "cluster": {"chains": 1}}, "tables of the cluster")):
        kv = MemoryKV(meta.runtime)
        with pytest.raises(StoreFormat, match=says):
            meta.run(restore(kv, [msgspec.json.encode(bad).decode(), *lines[1:]]))
        assert not kv.snapshot()
    meta.close()
