"""The engines against a plain dict, with several transactions open at once.

The model keeps a copy of the rows for every commit. Whatever a transaction reads must be what its copy, taken when it
began, says (plus its own writes), or a `Conflict`; and a commit must succeed or conflict just as the model decides
from what was read and what was written since.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from typing import Any

from emberfs.errors import Conflict
from emberfs.kv.lmdb import LmdbKV
from emberfs.kv.memory import MemoryKV
from emberfs.kv.remote import RemoteKV
from emberfs.kv.server import KvServer
from emberfs.kv.types import KV, Transaction, decode_int, encode_int
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.transport import MemoryConnection
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

Rows = dict[bytes, bytes]
KEYS = st.binary(min_size=1, max_size=2).map(lambda raw: bytes(byte % 4 for byte in raw))
ENDS = st.binary(max_size=3).map(lambda raw: bytes(byte % 5 for byte in raw))
INTS = st.integers(-1000, 1000)


class Model:
    """What one transaction must see, and what it depends on."""

    def __init__(self, transaction: Transaction, version: int, rows: Rows) -> None:
        self.transaction = transaction
        self.version = version
        self.rows = dict(rows)
        self.changes: list[Callable[[Rows], None]] = []
        self.own: set[bytes] = set()
        self.reads: list[Callable[[bytes], bool]] = []
        self.written: list[Callable[[bytes], bool]] = []

    def change(self, change: Callable[[Rows], None]) -> None:
        change(self.rows)
        self.changes.append(change)


def select(rows: Rows, begin: bytes, end: bytes) -> list[tuple[bytes, bytes]]:
    return sorted((key, value) for key, value in rows.items() if begin <= key < end)


def erase(rows: Rows, begin: bytes, end: bytes) -> None:
    for key, _ in select(rows, begin, end):
        del rows[key]


class KVMachine(RuleBasedStateMachine):
    transactions = Bundle("transactions")

    def open_kv(self) -> KV:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.runtime = AsyncioRuntime()
        self.run = Portal(self.runtime).run
        self.directory = tempfile.TemporaryDirectory()
        self.kv = self.open_kv()
        self.versions: list[Rows] = [{}]
        self.writes: list[list[Callable[[bytes], bool]]] = []
        """What made each version after the first: tests for a key."""

    def teardown(self) -> None:
        self.run(self.kv.close())
        self.runtime.stop()
        self.directory.cleanup()

    def read(self, model: Model, reading: Any) -> Any:
        """The outcome of a read, or `Conflict`."""
        try:
            return self.run(reading)
        except Conflict:
            return Conflict

    @initialize(rows=st.dictionaries(KEYS, INTS.map(encode_int), max_size=8))
    def fill(self, rows: Rows) -> None:
        transaction = self.kv.begin()
        for key, value in rows.items():
            transaction.put(key, value)
        self.run(transaction.commit())
        self.versions.append(rows)
        self.writes.append([rows.__contains__])

    @rule(target=transactions)
    def begin(self) -> Model:
        transaction = self.kv.begin()
        # An engine elsewhere lets a transaction begin with its first read.
        self.run(transaction.get(b"\xff", snapshot=True))
        return Model(transaction, len(self.versions) - 1, self.versions[-1])

    @rule(model=transactions, key=KEYS, snapshot=st.booleans())
    def get(self, model: Model, key: bytes, snapshot: bool) -> None:
        value = self.read(model, model.transaction.get(key, snapshot=snapshot))
        if value is Conflict:
            assert self.changed(model, key), "nobody touched that key"
            return
        assert value == model.rows.get(key)
        if not snapshot and key not in model.own:
            model.reads.append(key.__eq__)

    @rule(model=transactions, begin=ENDS, end=ENDS, limit=st.integers(1, 5), reverse=st.booleans())
    def range(self, model: Model, begin: bytes, end: bytes, limit: int, reverse: bool) -> None:
        rows = self.read(model, model.transaction.range(begin, end, limit=limit, reverse=reverse))
        if rows is Conflict:
            assert any(begin <= place < end and self.changed(model, place) for place in PLACES), (
                "nobody touched that range"
            )
            return
        expected = select(model.rows, begin, end)
        assert rows == (expected[::-1] if reverse else expected)[:limit]
        if begin >= end:
            return
        if len(rows) == limit:
            last = rows[-1][0]
            begin, end = (last, end) if reverse else (begin, last + b"\x00")
        model.reads.append(lambda key: begin <= key < end)

    @rule(model=transactions, key=KEYS, number=INTS)
    def put(self, model: Model, key: bytes, number: int) -> None:
        model.transaction.put(key, encode_int(number))
        model.change(lambda rows: rows.update({key: encode_int(number)}))
        self.owned(model, key)

    @rule(model=transactions, key=KEYS)
    def delete(self, model: Model, key: bytes) -> None:
        model.transaction.delete(key)
        model.change(lambda rows: rows.pop(key, None))
        self.owned(model, key)

    def owned(self, model: Model, key: bytes) -> None:
        model.own.add(key)
        model.written.append(key.__eq__)

    @rule(model=transactions, key=KEYS, delta=INTS)
    def add(self, model: Model, key: bytes, delta: int) -> None:
        model.transaction.add(key, delta)
        model.change(lambda rows: rows.update({key: encode_int(decode_int(rows.get(key)) + delta)}))
        model.written.append(key.__eq__)

    @rule(model=transactions, key=KEYS, number=INTS)
    def max(self, model: Model, key: bytes, number: int) -> None:
        model.transaction.max(key, number)
        model.change(lambda rows: rows.update({key: encode_int(max(decode_int(rows.get(key)), number))}))
        model.written.append(key.__eq__)

    @rule(model=transactions, begin=ENDS, end=ENDS)
    def delete_range(self, model: Model, begin: bytes, end: bytes) -> None:
        model.transaction.delete_range(begin, end)
        if begin >= end:
            return  # No rows: nothing is written, and a transaction that writes nothing cannot lose an update.
        model.change(lambda rows: erase(rows, begin, end))
        model.own.update(key for key in ALL_KEYS if begin <= key < end)
        model.written.append(lambda key: begin <= key < end)

    def changed(self, model: Model, key: bytes) -> bool:
        """True if a commit since `model` began wrote `key`."""
        return any(write(key) for writes in self.writes[model.version :] for write in writes)

    @rule(model=consumes(transactions))
    def commit(self, model: Model) -> None:
        stale = any(read(place) and self.changed(model, place) for place in PLACES for read in model.reads)
        try:
            self.run(model.transaction.commit())
        except Conflict:
            assert stale, "a conflict without a cause"
            return
        if not model.changes:
            return
        assert not stale, "a lost update"
        rows = dict(self.versions[-1])
        for change in model.changes:
            change(rows)
        self.versions.append(rows)
        self.writes.append(model.written)

    @invariant()
    def the_rows_are_the_models(self) -> None:
        assert dict(self.run(self.kv.begin().range(b"", b"\xff"))) == self.versions[-1]


PLACES = [bytes(place) for length in range(4) for place in itertools.product(range(5), repeat=length)]
"""Every key, and every end of a range: two ranges that meet have one of these in common, if no key."""
ALL_KEYS = [bytes(key) for key in [(a,) for a in range(4)] + [(a, b) for a in range(4) for b in range(4)]]


class MemoryMachine(KVMachine):
    def open_kv(self) -> KV:
        return MemoryKV(self.runtime)


class LmdbMachine(KVMachine):
    def open_kv(self) -> KV:
        return LmdbKV.open(self.directory.name, self.runtime)

    def teardown(self) -> None:
        self.run(self.kv.close())
        self.kv = self.open_kv()
        self.the_rows_are_the_models()
        super().teardown()


class RemoteMachine(KVMachine):
    def open_kv(self) -> KV:
        server = KvServer(MemoryKV(self.runtime), self.runtime)
        self.run(server.start())
        return RemoteKV(MemoryConnection(server), self.runtime)


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMemory = MemoryMachine.TestCase
TestMemory.settings = SETTINGS
TestLmdb = LmdbMachine.TestCase
TestLmdb.settings = SETTINGS
TestRemote = RemoteMachine.TestCase
TestRemote.settings = SETTINGS
