"""Programs that share a machine: never more calls at once than it has CPUs and memory for, and each in its turn.

Run: pytest tests/dataflow/test_machine.py. Nothing here depends on how long anything takes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from emberflow.errors import CallCancelled
from emberflow.executor import Call, Capacity, LocalExecutor
from emberflow.executor.machine import INSIDE, Machine, this_machine

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Two CPUs and 8 GiB."""
    return Machine(tmp_path / "calls", Capacity(cpus=2, memory_bytes=8 * GIB))


class Caller:
    """A call in a thread of its own: `runs` once it is admitted, until `end`."""

    def __init__(self, machine: Machine, cpus: int = 1, memory_bytes: int = GIB, largest: int = 2) -> None:
        self.runs = threading.Event()
        self.cancelled = threading.Event()
        self._may_end = threading.Event()
        self._machine = machine
        self._asks = cpus, memory_bytes, largest
        before = waiting(machine)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_for(lambda: self.runs.is_set() or waiting(machine) > before)

    def _run(self) -> None:
        cpus, memory_bytes, most = self._asks
        largest = Capacity(cpus=most, memory_bytes=8 * GIB)
        with self._machine.share(cpus, memory_bytes, largest=largest, is_cancelled=self.cancelled.is_set) as admitted:
            if admitted:
                self.runs.set()
                self._may_end.wait()

    def end(self) -> None:
        self._may_end.set()
        self.cancelled.set()
        self._thread.join()


def waiting(machine: Machine) -> int:
    """Calls that are there, running ones too."""
    return len(list(machine.directory.iterdir())) if machine.directory.exists() else 0


def wait_for(what: object) -> None:
    deadline_s = time.monotonic() + 60
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def test_calls_wait_for_cpus_and_for_memory(machine: Machine) -> None:
    first, second = Caller(machine), Caller(machine)
    third = Caller(machine)
    assert first.runs.wait(60)
    assert second.runs.wait(60)
    assert not third.runs.is_set()
    first.end()
    assert third.runs.wait(60)
    second.end()
    big = Caller(machine, memory_bytes=8 * GIB)
    assert not big.runs.is_set(), "there is a CPU for it, and no memory"
    third.end()
    assert big.runs.wait(60)
    big.end()
    assert waiting(machine) == 0


def test_who_came_first_goes_first_however_big(machine: Machine) -> None:
    running = Caller(machine)
    assert running.runs.wait(60)
    big = Caller(machine, cpus=2)
    small = Caller(machine)
    assert not small.runs.is_set(), "there is a CPU for it, and another comes before it"
    running.end()
    assert big.runs.wait(60)
    assert not small.runs.is_set()
    big.end()
    assert small.runs.wait(60)
    small.end()


def test_who_no_longer_waits_holds_nobody_up(machine: Machine) -> None:
    running = Caller(machine)
    assert running.runs.wait(60)
    big = Caller(machine, cpus=2)
    small = Caller(machine)
    big.end()
    assert small.runs.wait(60)
    assert not big.runs.is_set()
    small.end()
    running.end()


def test_an_executor_that_was_made_larger_than_the_machine_is_used_in_full(machine: Machine) -> None:
    callers = [Caller(machine, largest=4) for _ in range(4)]
    assert all(caller.runs.wait(60) for caller in callers)
    modest = Caller(machine)
    callers[0].end()
    callers[1].end()
    assert not modest.runs.is_set()
    callers[2].end()
    assert modest.runs.wait(60)
    callers[3].end()
    modest.end()


def test_what_a_killed_process_had_is_free(machine: Machine) -> None:
    text = (
        "import sys, time\nfrom pathlib import Path\nfrom emberflow.executor.machine import Machine, Capacity\n"
        "everything = Capacity(cpus=2, memory_bytes=8 << 30)\nmachine = Machine(Path(sys.argv[1]), everything)\n"
        "with machine.share(2, 1, largest=everything, is_cancelled=lambda: False):\n"
        "    print('in', flush=True)\n    time.sleep(600)\n"
    )
    arguments = [sys.executable, "-c", text, str(machine.directory)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        caller = Caller(machine)
        assert not caller.runs.is_set()
        process.send_signal(signal.SIGKILL)
        assert caller.runs.wait(60)
    caller.end()
    assert waiting(machine) == 0


def test_a_directory_that_is_cleaned_up_comes_back(machine: Machine) -> None:
    first = Caller(machine)
    for file in machine.directory.iterdir():
        file.unlink()
    machine.directory.rmdir()
    second = Caller(machine)
    assert second.runs.wait(60)
    first.end()
    second.end()


def test_a_directory_of_others_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    machine = this_machine()
    assert machine is not None
    machine.directory.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert this_machine() is None
    assert "not a directory of this user's alone" in caplog.text


def test_what_runs_inside_a_call_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setenv(INSIDE, "1")
    assert this_machine() is None
    monkeypatch.delenv(INSIDE)
    executor = LocalExecutor(workers=1, cpus=1, memory_bytes=GIB, machine=machine)
    call = Call(name="n", function="tests.dataflow.executor_calls:environment", payload=INSIDE.encode())
    try:
        assert executor.submit(call).future.result(60) == b"1"
    finally:
        executor.close()


def test_executors_take_turns_and_a_waiting_call_can_be_cancelled(machine: Machine, tmp_path: Path) -> None:
    one = Machine(machine.directory, Capacity(cpus=1, memory_bytes=8 * GIB))
    first, second = (LocalExecutor(workers=1, cpus=1, memory_bytes=GIB, machine=one, name=name) for name in "ab")
    log = tmp_path / "log"
    gate = tmp_path / "gate"

    def call(name: str) -> Call:
        payload = json.dumps([str(log), name, str(gate)]).encode()
        return Call(name=name, function="tests.dataflow.executor_calls:noted", payload=payload)

    try:
        handles = [first.submit(call(f"a{n}")) for n in range(3)]
        wait_for(log.exists)
        handles += [second.submit(call(f"b{n}")) for n in range(3)]
        wait_for(lambda: waiting(one) == 2)
        handles[3].cancel()
        with pytest.raises(CallCancelled):
            handles.pop(3).future.result(60)
        wait_for(lambda: waiting(one) == 2)
        gate.touch()
        for handle in handles:
            handle.future.result(60)
    finally:
        first.close()
        second.close()
    # b1 waited when a0 ended, and a1 came only then.
    assert log.read_text().split()[:2] == ["a0", "b1"]


DRIVER = """
import os, sys, time
import emberflow

# As many as the other test machine has, whatever this one has.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
name, log = sys.argv[1:]

def noted(table):
    started = time.monotonic_ns()
    time.sleep(0.05)
    with open(log, "a") as file:
        print(name, started, time.monotonic_ns(), file=file)
    return table

print("ready", flush=True)
sys.stdin.readline()
with emberflow.init(executor="local") as session:
    rows = session.sql("select range n from range(1200)").repartition(12, by_rows=True)
    print(rows.map_batches(noted, schema={"n": "BIGINT"}).count(), flush=True)
"""


def test_two_programs_progress_and_never_use_more_than_there_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, name, str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        for name in "ab"
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        output, error = process.communicate(timeout=120)
        assert output == b"1200\n", error.decode()
    spans = [(name, int(first), int(last)) for name, first, last in map(str.split, log.read_text().splitlines())]
    assert len(spans) == 24
    at_once = max(sum(other[1] <= start < other[2] for other in spans) for _, start, _ in spans)
    assert at_once <= min(2, len(os.sched_getaffinity(0)))
