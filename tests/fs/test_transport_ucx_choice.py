"""UCX: how it is chosen, what is said where it is not there, and the blocks that it sends from.

Run: pytest tests/fs/test_transport_ucx_choice.py. What needs the library is skipped where it is not installed.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator

import emberfs
import pytest
from emberfs.errors import LimitExceeded, ProtocolError, Unavailable
from emberfs.routing import Role
from emberfs.runtime import AsyncioRuntime
from emberfs.server import ServerConfig
from emberfs.testing.transport import pattern
from emberfs.transport import TcpConfig, TcpNetwork, ucx_library
from emberfs.transport.aside import Aside
from emberfs.transport.blocks import HUGE_PAGE_BYTES, BlockPool
from emberfs.transport.config import ucx_kinds

SIZE = 1 << 20

needs_ucx = pytest.mark.skipif(
    importlib.util.find_spec("libucx") is None, reason="UCX is not installed: pip install 'emberline[ucx]'"
)


@pytest.fixture
def runtime() -> Iterator[AsyncioRuntime]:
    runtime = AsyncioRuntime()
    yield runtime
    runtime.stop()


def test_kinds_are_named_in_the_order_to_try_them() -> None:
    assert ucx_kinds("auto") == ("rdma", "shm", "tcp")
    assert ucx_kinds("tcp, rdma") == ("tcp", "rdma")
    assert ucx_kinds("") == ()
    with pytest.raises(ValueError, match="'infiniband'"):
        ucx_kinds("tcp,infiniband")


def test_a_kind_that_there_is_not_is_refused_wherever_it_is_named() -> None:
    with pytest.raises(ValueError, match="some of rdma, shm, tcp"):
        TcpConfig(ucx="carrier")
    with pytest.raises(LimitExceeded, match="some of rdma, shm, tcp"):
        emberfs.connect("ember://127.0.0.1:1", ucx="carrier")
    storage = {"name": "a", "role": Role.STORAGE, "listen": "h:1", "managers": ["h:2"], "directory": "/d"}
    assert ServerConfig(**storage, ucx="tcp").ucx == "tcp"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="some of rdma, shm, tcp"):
        ServerConfig(**storage, ucx="carrier")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="storage servers"):
        ServerConfig(name="a", role=Role.META, listen="h:1", managers=["h:2"], kv="kv://h:3", ucx="tcp")


@needs_ucx
def test_devices_that_are_not_there_are_said(runtime: AsyncioRuntime, caplog: pytest.LogCaptureFixture) -> None:
    if os.path.isdir("/sys/class/infiniband") and os.listdir("/sys/class/infiniband"):
        pytest.skip("this machine has RDMA")
    with caplog.at_level(logging.WARNING), pytest.raises(Unavailable, match="no device"):
        TcpNetwork(runtime, TcpConfig(ucx="rdma"))
    assert "no device of kind rdma" in caplog.text


def test_without_the_library_one_learns_how_to_get_it(runtime: AsyncioRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    ucx_library.library.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(Unavailable, match=r"pip install 'emberline\[ucx\]'"):
        TcpNetwork(runtime, TcpConfig(ucx="auto"))


def test_buffers_without_a_rail_break_the_protocol(runtime: AsyncioRuntime) -> None:
    aside = Aside(None, None, runtime.loop, dead_s=1.0)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="there is none"):
        aside.receive(1, [memoryview(bytearray(SIZE))], lambda: None)


def test_blocks_lie_in_huge_pages_and_are_used_again() -> None:
    pool = BlockPool()
    blocks = [pool.take(size) for size in (SIZE, SIZE, 3 * SIZE, 70_000)]
    assert [len(block) for block in blocks] == [SIZE, SIZE, 4 * SIZE, 128 << 10]
    for seed, block in enumerate(blocks):
        block[:] = pattern(len(block), seed)
    assert all(block == pattern(len(block), seed) for seed, block in enumerate(blocks))
    for block in blocks:
        assert ctypes.addressof(ctypes.c_char.from_buffer(block)) % min(len(block), HUGE_PAGE_BYTES) == 0
    first = blocks[0]
    pool.give(first)
    assert pool.take(SIZE - 1) is first


def test_a_large_block_takes_at_most_a_quarter_more_than_was_asked_for() -> None:
    pool = BlockPool()
    for asked_mib, taken_mib in ((16, 16), (17, 20), (21, 24), (33, 40), (9, 10), (8, 8), (5, 8)):
        block = pool.take((asked_mib << 20) - 100)
        assert len(block) == taken_mib << 20
        assert ctypes.addressof(ctypes.c_char.from_buffer(block)) % HUGE_PAGE_BYTES == 0
