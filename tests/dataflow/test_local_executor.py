"""What is special to worker processes: how they start, what they inherit, and that none is left.

Run: pytest tests/dataflow/test_local_executor.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from emberflow.errors import CallCancelled, InvalidArgument, WorkerDied
from emberflow.executor import LocalExecutor, machine_capacity
from emberflow.executor import capacity as capacity_module

from tests.dataflow.executor_calls import PATIENCE_S, wait_for
from tests.dataflow.test_executors import answer, call, failure, wait_until_gone

ROOT = Path(__file__).resolve().parent.parent.parent


def new_executor(workers: int = 1, *, memory_bytes: int = 1 << 30) -> LocalExecutor:
    return LocalExecutor(workers=workers, cpus=workers, memory_bytes=memory_bytes, grace_s=0.3)


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    """One for all: a worker takes most of a second to start. Each test leaves it as good as new."""
    executor = new_executor()
    yield executor
    executor.close()


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


# ---- starting


def test_nothing_starts_before_the_first_call_nor_more_than_is_needed() -> None:
    before = children()
    executor = new_executor(4)
    assert children() == before
    first = answer(executor, "pid")
    assert answer(executor, "pid") == first
    assert children() - before == {int(first)}
    executor.close()
    assert children() == before


def test_settings_that_can_never_be_right() -> None:
    with pytest.raises(InvalidArgument, match="at least one worker"):
        LocalExecutor(workers=0, cpus=1, memory_bytes=1)


def test_a_worker_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = new_executor()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", ["/nowhere"])
        error = failure(executor, "nothing")
    assert isinstance(error, WorkerDied)
    assert "exited with code 1" in str(error)
    assert "ModuleNotFoundError: No module named" in str(error)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert isinstance(failure(executor, "nothing"), FileNotFoundError)
    executor.close()


def test_workers_see_the_drivers_path_and_directory_of_the_moment(
    executor: LocalExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(executor, "nothing")
    (tmp_path / "emberflow_test_local_module.py").write_text("def f(payload, context): return b'from here'")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    directory, path = json.loads(answer(executor, "place"))
    assert directory == str(tmp_path)
    assert path[: len(sys.path)] == sys.path
    local = executor.submit(call("f", function="emberflow_test_local_module:f"))
    assert local.future.result(PATIENCE_S) == b"from here"


def test_two_executors_know_nothing_of_each_other(executor: LocalExecutor, tmp_path: Path) -> None:
    handle = executor.submit(call("come_and_wait", json.dumps([str(tmp_path), "first"]).encode()))
    wait_for(tmp_path / "first")
    other = new_executor()
    assert answer(other, "echo", b"other") == b"other"
    other.close()
    (tmp_path / "go").touch()
    assert handle.future.result(PATIENCE_S) == b"first"


# ---- dying


def test_the_message_of_a_death_has_its_last_words(executor: LocalExecutor) -> None:
    error = failure(executor, "exit_at_once", b"7")
    assert str(error) == "exit_at_once: worker local-0 exited with code 7; its last output:\nlast words"
    error = failure(executor, "kill_itself", b"%d" % signal.SIGSEGV)
    assert "was killed by SIGSEGV" in str(error)
    assert "in kill_itself" in str(error)


def test_a_worker_that_died_idle_is_replaced(executor: LocalExecutor) -> None:
    pid = int(answer(executor, "pid"))
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert int(answer(executor, "pid")) != pid


def test_a_worker_that_keeps_much_memory_is_replaced(executor: LocalExecutor) -> None:
    bloated = int(answer(executor, "keep_memory", b"600"))
    assert int(answer(executor, "pid")) != bloated
    wait_until_gone(bloated)


@pytest.mark.parametrize("how", ["cancel", "kill"])
def test_what_a_call_started_ends_with_its_worker(executor: LocalExecutor, tmp_path: Path, how: str) -> None:
    handle = executor.submit(call("with_a_child", str(tmp_path).encode()))
    wait_for(tmp_path / "running")
    pids = [int(pid) for pid in (tmp_path / "running").read_text().split()]
    if how == "cancel":
        handle.cancel()
    else:
        os.kill(pids[0], signal.SIGKILL)
    error = handle.future.exception(PATIENCE_S)
    assert isinstance(error, WorkerDied if how == "kill" else CallCancelled)
    for pid in pids:
        wait_until_gone(pid)


# ---- the driver's end

DRIVER = """
import sys
from emberflow.executor import Call, LocalExecutor
executor = LocalExecutor(workers=2, cpus=2, memory_bytes=1 << 30)
calls = [Call(name=f, function=f"tests.dataflow.executor_calls:{f}", payload=p.encode()) for f, p in {calls}]
handles = [executor.submit(call) for call in calls]
"""


def start_driver(folders: list[Path], rest: str) -> subprocess.Popen[bytes]:
    """A program whose workers run a call with a child in one folder and, in the other, one that holds the GIL."""
    calls = [("with_a_child", str(folders[0])), ("deaf", str(folders[1]))]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER.replace("{calls}", repr(calls)) + rest],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    for folder in folders:
        wait_for(folder / "running")
    return driver


@pytest.mark.parametrize("how", ["kill -9", "ctrl-c"])
def test_no_process_outlives_the_driver(tmp_path: Path, how: str) -> None:
    folders = [tmp_path / "child", tmp_path / "deaf"]
    for folder in folders:
        folder.mkdir()
    with start_driver(folders, "sys.stdin.read()") as driver:
        pids = [int(pid) for folder in folders for pid in (folder / "running").read_text().split()]
        # The second ends as any program does that closes nothing; its workers are not in the group.
        os.killpg(driver.pid, signal.SIGKILL if how == "kill -9" else signal.SIGINT)
        driver.communicate(timeout=PATIENCE_S)
    for pid in pids:
        wait_until_gone(pid)


# ---- the machine


def test_the_machines_capacity_heeds_its_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = machine_capacity()
    assert 1 <= whole.cpus <= len(os.sched_getaffinity(0))
    assert whole.memory_bytes > 1 << 20
    monkeypatch.setattr(capacity_module, "CGROUPS", tmp_path)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{1 << 20}\n")
    limited = machine_capacity()
    assert (limited.cpus, limited.memory_bytes) == (1, 1 << 20)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_capacity().cpus == len(os.sched_getaffinity(0))
