"""Where a storage server keeps its targets: opened again after an error, and removed only if it is the same directory.

Run: pytest tests/fs/test_server_targets.py
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from emberfs.portal import Portal
from emberfs.runtime import AsyncioRuntime
from emberfs.server.targets import TargetDirectories

TARGET = b"t" * 16


def on_targets(root: Path, work: Callable[[TargetDirectories], Awaitable[None]]) -> None:
    runtime = AsyncioRuntime()
    targets = TargetDirectories(root, runtime, reserve_bytes=0)

    async def main() -> None:
        await work(targets)
        await targets.close()

    Portal(runtime).run(main())
    runtime.stop()


def test_a_disk_that_fails_at_first_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    async def work(targets: TargetDirectories) -> None:
        with monkeypatch.context() as patched, pytest.raises(OSError, match="too many open files"):
            patched.setattr("emberfs.server.targets.LocalDisk", fails)
            await targets.open(TARGET)
        engine = await targets.open(TARGET)
        await engine.close()

    on_targets(tmp_path, work)


def test_a_target_that_is_not_ours_any_more_is_removed(tmp_path: Path) -> None:
    async def work(targets: TargetDirectories) -> None:
        engine = await targets.open(TARGET)
        assert len(list(tmp_path.iterdir())) == 1
        await engine.close()
        await targets.drop(TARGET)
        await targets.drop(TARGET)
        assert list(tmp_path.iterdir()) == []

    on_targets(tmp_path, work)


def test_what_was_mounted_over_a_running_server_is_not_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rename stands for the mount: what is found at the path is another directory."""

    async def work(targets: TargetDirectories) -> None:
        engine = await targets.open(TARGET)
        (path,) = tmp_path.iterdir()
        path.rename(tmp_path / "hidden")
        path.mkdir()
        (path / "precious").touch()
        await engine.close()
        await targets.drop(TARGET)
        assert (path / "precious").exists()
        assert (tmp_path / "hidden" / "index").exists()

    on_targets(tmp_path, work)
    assert ["not removed" in record.getMessage() for record in caplog.records] == [True]
