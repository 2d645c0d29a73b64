"""What is special to Ray: whose it is, and what cannot be used. Run: pytest tests/dataflow/test_ray_executor.py"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emberflow.errors import CallCancelled, InvalidArgument
from emberflow.executor import RayExecutor

from tests.dataflow.executor_calls import PATIENCE_S, wait_for
from tests.dataflow.test_executors import answer, call


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """The Ray of a program that initialises it itself, with SIGINT ignored as in the background of a shell script."""
    ray = pytest.importorskip("ray")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    finally:
        signal.signal(signal.SIGINT, before)
    yield ray
    ray.shutdown()


def test_without_ray_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidArgument, match=r"Ray is not installed: pip install 'emberline\[ray\]'"):
        RayExecutor()


def test_rays_client_is_refused() -> None:
    pytest.importorskip("ray")
    with pytest.raises(InvalidArgument, match="give the cluster's address"):
        RayExecutor(address="ray://localhost:10001")


def test_the_programs_own_ray_is_used_and_left_alone(ray: Any) -> None:
    executor = RayExecutor(cpus=1)
    assert executor.capacity.cpus == 1
    assert answer(executor, "echo", b"1") == b"1"
    executor.close()
    assert ray.is_initialized()
    whole = RayExecutor()
    assert whole.capacity.cpus == 2
    assert whole.capacity.memory_bytes == int(ray.cluster_resources()["memory"])
    whole.close()


@pytest.mark.usefixtures("ray")
def test_cancel_interrupts_where_sigint_is_ignored(tmp_path: Path) -> None:
    executor = RayExecutor(cpus=1, grace_s=PATIENCE_S)
    try:
        handle = executor.submit(call("until_interrupted", str(tmp_path).encode()))
        wait_for(tmp_path / "running")
        handle.cancel()
        wait_for(tmp_path / "interrupted")
        assert isinstance(handle.future.exception(PATIENCE_S), CallCancelled)
    finally:
        executor.close()
