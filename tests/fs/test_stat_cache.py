"""`stat` remembers what it found, and must never be seen to: it answers what a fresh walk would.

Run: pytest tests/fs/test_stat_cache.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from emberfs.errors import EmberError
from emberfs.kv.types import TRANSACTION_TIME_MAX_S
from emberfs.messages import (
    CloseSession,
    CollectGarbage,
    Inode,
    Link,
    Opened,
    Remove,
    Rename,
    ReportLength,
    SetAttr,
    Stat,
    Symlink,
    TrashEmpty,
    TrashList,
    TrashRestore,
    Truncate,
    WriteInline,
)
from emberfs.meta.cache import StatCache
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.fs.meta_fakes import CHUNK, ClockRuntime, Meta

pytestmark = pytest.mark.sentence("V2")

NAMES = ["a", "b", "c"]
PATHS = ["/" + "/".join(names) for one in NAMES for names in ([one], [one, "a"], [one, "b"], [one, "a", "b"])]
PATH = st.sampled_from(PATHS)


class FastClock(ClockRuntime):
    """Its monotonic clock moves with the other one, so that the KV forgets its history."""

    def now_s(self) -> float:
        return super().now_s() + self.ahead_ns / 1e9


class Namespace(RuleBasedStateMachine):
    """Random operations; after each, every path is looked up twice: by the service, and past its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.meta = Meta(runtime=FastClock())
        self.sessions: list[tuple[Opened, int]] = []

    def teardown(self) -> None:
        self.meta.close()

    def attempt(self, call: Callable[[], Any]) -> Any:
        """Most random operations are refused; the refused are as good a test as the others."""
        try:
            return call()
        except EmberError:
            return None

    @initialize()
    def make_tree(self) -> None:
        for path in ("/a", "/b", "/a/a"):
            self.meta.mkdir(path)

    @rule(path=PATH, size=st.integers(0, 50))
    def put(self, path: str, size: int) -> None:
        self.attempt(lambda: self.meta.put(path, b"x" * size))

    @rule(path=PATH, size=st.integers(1, 3 * CHUNK))
    def put_chunks(self, path: str, size: int) -> None:
        self.attempt(lambda: self.meta.put_chunks(path, size))

    @rule(path=PATH)
    def mkdir(self, path: str) -> None:
        self.attempt(lambda: self.meta.mkdir(path))

    @rule(source=PATH, to=PATH)
    def rename(self, source: str, to: str) -> None:
        self.attempt(lambda: self.meta(Rename(source, to, True)))

    @rule(path=PATH, trash=st.booleans(), recursive=st.booleans())
    def remove(self, path: str, trash: bool, recursive: bool) -> None:
        self.attempt(lambda: self.meta(Remove(path, recursive, trash, "any")))

    @rule(path=st.sampled_from(["", *PATHS]))
    def restore(self, path: str) -> None:
        entries = self.meta(TrashList()).entries
        if entries:
            self.attempt(lambda: self.meta(TrashRestore(entries[-1].id, path)))

    @rule()
    def empty_the_trash(self) -> None:
        self.meta(TrashEmpty(0.0))
        self.meta(CollectGarbage(True))

    @rule(to=st.sampled_from([*PATHS, "..", "a", "../b/a"]), path=PATH)
    def symlink(self, to: str, path: str) -> None:
        self.attempt(lambda: self.meta(Symlink(to, path)))

    @rule(source=PATH, to=PATH)
    def link(self, source: str, to: str) -> None:
        self.attempt(lambda: self.meta(Link(source, to)))

    @rule(path=PATH, mode=st.integers(0, 0o777), mtime_ns=st.one_of(st.none(), st.integers(0, 1 << 60)))
    def set_attributes(self, path: str, mode: int, mtime_ns: int | None) -> None:
        self.attempt(lambda: self.meta(SetAttr(path, mode, mtime_ns)))

    @rule(path=PATH, length=st.integers(0, 2 * CHUNK))
    def truncate(self, path: str, length: int) -> None:
        self.attempt(lambda: self.meta(Truncate(path, 0, length)))

    @rule(path=PATH, create=st.booleans())
    def open(self, path: str, create: bool) -> None:
        opened = self.attempt(lambda: self.meta.open(path, create=create))
        if opened is not None:
            self.sessions.append((opened, 0))

    @precondition(lambda self: self.sessions)
    @rule(end=st.integers(1, 5 * CHUNK), durable=st.booleans())
    def report(self, end: int, durable: bool) -> None:
        """A hint, or with `durable` a change of the row."""
        opened, last = self.sessions[-1]
        inode = opened.inode
        done = self.attempt(
            lambda: self.meta(ReportLength(opened.session, inode.id, end, inode.truncate_generation, durable))
        )
        self.sessions[-1] = (opened, last if done is None else max(last, end))

    @precondition(lambda self: self.sessions)
    @rule(offset=st.integers(0, 100))
    def write_inline(self, offset: int) -> None:
        opened, _ = self.sessions[-1]
        self.attempt(lambda: self.meta(WriteInline(opened.session, opened.inode.id, offset, b"data")))

    @precondition(lambda self: self.sessions)
    @rule(first=st.booleans())
    def close(self, first: bool) -> None:
        opened, end = self.sessions.pop(0 if first else -1)
        inode = opened.inode
        self.attempt(lambda: self.meta(CloseSession(opened.session, inode.id, end, inode.truncate_generation)))

    @rule(seconds=st.sampled_from([0.5, TRANSACTION_TIME_MAX_S + 1]))
    def wait(self, seconds: float) -> None:
        self.meta.runtime.advance(seconds)

    @invariant()
    def the_answer_is_that_of_a_fresh_walk(self) -> None:
        for path in ["/", *PATHS]:
            assert self.stat(path) == self.stat_past_the_cache(path), path

    def stat(self, path: str) -> Inode | type[EmberError]:
        try:
            return self.meta(Stat(path)).inode  # type: ignore[no-any-return]
        except EmberError as error:
            return type(error)

    def stat_past_the_cache(self, path: str) -> Inode | type[EmberError]:
        state = self.meta.service._state
        kept, state.stats = state.stats, StatCache(self.meta.kv)
        try:
            return self.stat(path)
        finally:
            state.stats = kept


Namespace.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestStatIsAFreshWalk = Namespace.TestCase


def test_the_cache_is_used_at_all() -> None:
    """Else the machine above proves nothing."""
    meta = Meta()
    try:
        meta.mkdir("/a")
        meta.put("/a/file", b"x")
        meta.stat("/a/file")
        kept = meta.service._state.stats.get("/a/file")
        assert kept is not None and meta.stat("/a/file") is kept.inode
        meta.put("/a/other", b"x")
        assert meta.service._state.stats.get("/a/file") is not None, "an unrelated change costs nothing"
        meta.put("/a/file", b"xy")
        assert meta.service._state.stats.get("/a/file") is None
    finally:
        meta.close()
