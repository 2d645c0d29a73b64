"""What every executor promises (`executor/base.py`), tried on each: pytest tests/dataflow/test_executors.py

Things are ordered by files and events; a time limit only ends a test that has failed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emberflow.errors import (
    CallCancelled,
    CallOutOfMemory,
    ExchangeCorrupt,
    FlowError,
    InvalidArgument,
    OutOfMemory,
    SessionClosed,
    WorkerDied,
)
from emberflow.executor import Call, Capacity, Executor, InlineExecutor, LocalExecutor, RayExecutor

from tests.dataflow.executor_calls import PATIENCE_S, wait_for

CPUS = 3
MEMORY_BYTES = 3 << 30

NOTHING = "tests.dataflow.executor_calls:nothing"

NewExecutor = Callable[[], Executor]


def local() -> Executor:
    return LocalExecutor(workers=CPUS, cpus=CPUS, memory_bytes=MEMORY_BYTES, grace_s=0.3)


KINDS: dict[str, NewExecutor] = {
    "inline": lambda: InlineExecutor(Capacity(cpus=CPUS, memory_bytes=MEMORY_BYTES)),
    "local": local,
    "ray": lambda: RayExecutor(cpus=CPUS, memory_bytes=MEMORY_BYTES, grace_s=0.3),
}
HAS_RAY = importlib.util.find_spec("ray") is not None


@pytest.fixture(
    scope="module",
    params=[
        "inline",
        "local",
        pytest.param("ray", marks=pytest.mark.skipif(not HAS_RAY, reason="ray is not installed")),
    ],
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def executor(kind: str) -> Iterator[Executor]:
    """One for all tests of a kind: each has to leave it as good as new."""
    executor = KINDS[kind]()
    yield executor
    executor.close()


@pytest.fixture
def needs_process(kind: str) -> None:
    if kind == "inline":
        pytest.skip("runs calls in this process")


def call(name: str, payload: bytes = b"", *, cpus: int = 1, memory_bytes: int = 0, function: str | None = None) -> Call:
    """A call of `function`, or of the one in executor_calls.py that bears the name."""
    function = function or f"tests.dataflow.executor_calls:{name}"
    return Call(name=name, function=function, payload=payload, cpus=cpus, memory_bytes=memory_bytes)


def answer(executor: Executor, function: str, payload: bytes = b"", *, cpus: int = 1) -> bytes:
    return executor.submit(call(function, payload, cpus=cpus)).future.result(PATIENCE_S)


def failure(executor: Executor, function: str, payload: bytes = b"", *, memory_bytes: int = 0) -> BaseException:
    error = executor.submit(call(function, payload, memory_bytes=memory_bytes)).future.exception(PATIENCE_S)
    assert error is not None
    return error


def said(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


# ---- answers


def test_answers_are_bytes(executor: Executor) -> None:
    assert answer(executor, "echo", b"\0text\xff") == b"\0text\xff"
    assert answer(executor, "nothing") == b""


def test_payloads_and_answers_may_be_large(executor: Executor) -> None:
    large = os.urandom(1 << 20) * 40
    assert answer(executor, "echo", large) == large


def test_a_call_is_told_what_it_may_use(executor: Executor) -> None:
    worker, cpus, memory_bytes = json.loads(answer(executor, "context_of", cpus=2))
    assert worker
    assert cpus == 2
    assert memory_bytes == executor.capacity.memory_bytes * 2 // CPUS
    handle = executor.submit(call("context_of", memory_bytes=1 << 30))
    assert json.loads(handle.future.result(PATIENCE_S))[1:] == [1, 1 << 30]


def test_a_handle_knows_its_call_and_when_it_was_taken_up(executor: Executor) -> None:
    handle = executor.submit(call("nothing"))
    handle.future.result(PATIENCE_S)
    assert handle.call == call("nothing")
    assert handle.started_s is not None


def test_many_threads_may_submit(executor: Executor) -> None:
    with ThreadPoolExecutor(8) as threads:
        numbers = [b"%d" % number for number in range(80)]
        assert list(threads.map(lambda number: answer(executor, "echo", number), numbers)) == numbers


def test_a_worker_keeps_its_state(executor: Executor) -> None:
    seen = [int(answer(executor, "count")) for _ in range(CPUS + 1)]
    assert max(seen) > 1, "with more calls than workers one of them has seen two"


def test_the_listener_of_a_future_may_submit(executor: Executor) -> None:
    second: list[bytes] = []
    done = threading.Event()

    def submit_another(_: object) -> None:
        executor.submit(call("echo", b"2")).future.add_done_callback(
            lambda future: (second.append(future.result()), done.set())  # type: ignore[func-returns-value]
        )

    executor.submit(call("echo", b"1")).future.add_done_callback(submit_another)
    assert done.wait(PATIENCE_S)
    assert second == [b"2"]


# ---- errors


def test_an_exception_arrives_as_it_was_raised(executor: Executor) -> None:
    error = failure(executor, "value_error")
    assert type(error) is ValueError
    assert str(error) == "not this"
    assert "a note of its own" in said(error)


@pytest.mark.usefixtures("needs_process")
def test_an_exception_says_where_it_was_raised(executor: Executor) -> None:
    assert "in value_error" in said(failure(executor, "value_error"))
    # This class keeps no notes when it is pickled.
    error = failure(executor, "exchange_corrupt")
    assert isinstance(error, ExchangeCorrupt)
    assert error.path == "store/part-3"
    assert "in exchange_corrupt" in said(error)


def test_running_out_of_duckdb_memory_is_not_the_workers_end(executor: Executor) -> None:
    assert type(failure(executor, "out_of_memory")) is OutOfMemory


@pytest.mark.usefixtures("needs_process")
def test_an_exception_that_cannot_travel_is_told(executor: Executor) -> None:
    error = failure(executor, "unpicklable")
    assert type(error) is FlowError
    assert str(error) == "Unpicklable: this and that"
    assert "in unpicklable" in said(error)


def test_an_exit_of_the_call_is_not_ours(executor: Executor) -> None:
    error = failure(executor, "exit_program")
    assert type(error) is FlowError
    assert str(error) == "SystemExit: 3"


def test_a_function_that_is_not_there(executor: Executor) -> None:
    assert isinstance(failure(executor, "no_such_function"), AttributeError)
    error = executor.submit(call("x", function="no_such_module:f")).future.exception(PATIENCE_S)
    assert isinstance(error, ModuleNotFoundError)


# ---- capacity


def test_calls_run_at_one_time_up_to_the_capacity(executor: Executor, tmp_path: Path) -> None:
    names = [str(number) for number in range(CPUS)]
    handles = [executor.submit(call("meet", json.dumps([str(tmp_path), name, names]).encode())) for name in names]
    assert [handle.future.result(PATIENCE_S) for handle in handles] == [b"met"] * CPUS


def test_cpus_never_sum_to_more_than_the_capacity(executor: Executor, tmp_path: Path) -> None:
    payload = str(tmp_path).encode()
    handles = [executor.submit(call("overlap", payload, cpus=1 + number % CPUS)) for number in range(18)]
    assert max(int(handle.future.result(PATIENCE_S)) for handle in handles) <= CPUS


@pytest.mark.parametrize("share", [{"cpus": CPUS}, {"memory_bytes": MEMORY_BYTES}], ids=["cpus", "memory"])
def test_a_big_call_is_not_passed_by_small_ones(executor: Executor, tmp_path: Path, share: dict[str, int]) -> None:
    order: list[str] = []
    first = executor.submit(call("come_and_wait", json.dumps([str(tmp_path), "first"]).encode(), memory_bytes=1 << 20))
    wait_for(tmp_path / "first")
    big = executor.submit(call("big", function=NOTHING, **share))
    small = executor.submit(call("small", function=NOTHING, memory_bytes=1 << 20))
    big.future.add_done_callback(lambda _: order.append("big"))
    small.future.add_done_callback(lambda _: order.append("small"))
    assert (big.started_s, small.started_s) == (None, None)
    (tmp_path / "go").touch()
    for handle in (first, big, small):
        handle.future.result(PATIENCE_S)
    assert big.started_s is not None
    assert small.started_s is not None
    assert big.started_s < small.started_s


@pytest.mark.parametrize(
    "share", [{"cpus": CPUS + 1}, {"cpus": 0}, {"memory_bytes": MEMORY_BYTES + 1}, {"memory_bytes": -1}], ids=str
)
def test_a_call_that_can_never_fit_is_refused(executor: Executor, share: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument, match="too-big asks for"):
        executor.submit(call("too-big", function=NOTHING, **share))


# ---- cancelling


def test_cancel_a_call_that_waits(executor: Executor, tmp_path: Path) -> None:
    payload = json.dumps([str(tmp_path), "first"]).encode()
    first = executor.submit(call("come_and_wait", payload, cpus=CPUS))
    wait_for(tmp_path / "first")
    waiting = executor.submit(call("come_and_wait", json.dumps([str(tmp_path), "second"]).encode(), cpus=CPUS))
    third = executor.submit(call("echo", b"3"))
    waiting.cancel()
    assert isinstance(waiting.future.exception(PATIENCE_S), CallCancelled)
    assert not first.future.done()
    (tmp_path / "go").touch()
    assert first.future.result(PATIENCE_S) == b"first"
    assert third.future.result(PATIENCE_S) == b"3"
    assert not (tmp_path / "second").exists()


def patient(kind: str) -> Executor:
    """An executor that gives a cancelled call all the time it takes, however busy the machine is."""
    if kind == "local":
        return LocalExecutor(workers=1, cpus=1, memory_bytes=1 << 30, grace_s=60)
    return RayExecutor(cpus=1, grace_s=60) if kind == "ray" else KINDS[kind]()


def test_cancel_interrupts_a_call_that_runs(kind: str, tmp_path: Path) -> None:
    executor = patient(kind)
    try:
        handle = executor.submit(call("until_interrupted", str(tmp_path).encode()))
        wait_for(tmp_path / "running")
        handle.cancel()
        handle.cancel()
        assert isinstance(handle.future.exception(PATIENCE_S), CallCancelled)
        assert (tmp_path / "interrupted").exists()
    finally:
        executor.close()


def test_cancel_before_there_is_anything_to_interrupt(kind: str, tmp_path: Path) -> None:
    executor = patient(kind)
    try:
        handle = executor.submit(call("interrupted_late", str(tmp_path).encode()))
        wait_for(tmp_path / "running")
        handle.cancel()
        (tmp_path / "go").touch()
        assert isinstance(handle.future.exception(PATIENCE_S), CallCancelled)
        assert (tmp_path / "interrupted").exists()
    finally:
        executor.close()


@pytest.mark.usefixtures("needs_process")
def test_a_call_that_heeds_no_interruption_is_killed(executor: Executor, tmp_path: Path) -> None:
    handle = executor.submit(call("deaf", str(tmp_path).encode()))
    wait_for(tmp_path / "running")
    handle.cancel()
    assert isinstance(handle.future.exception(PATIENCE_S), CallCancelled)
    wait_until_gone(int((tmp_path / "running").read_text()))
    assert answer(executor, "echo", b"next") == b"next"


def test_cancel_after_the_end_does_nothing(executor: Executor) -> None:
    handle = executor.submit(call("echo", b"1"))
    assert handle.future.result(PATIENCE_S) == b"1"
    handle.cancel()
    assert handle.future.result() == b"1"
    assert answer(executor, "echo", b"2") == b"2"


def test_a_future_cannot_be_cancelled_behind_the_executor(executor: Executor, tmp_path: Path) -> None:
    handle = executor.submit(call("until_interrupted", str(tmp_path).encode()))
    assert not handle.future.cancel()
    wait_for(tmp_path / "running")
    handle.cancel()
    assert isinstance(handle.future.exception(PATIENCE_S), CallCancelled)


# ---- reports and output


def test_reports_arrive_in_order_before_the_end(executor: Executor) -> None:
    notes: list[bytes] = []
    handle = executor.submit(call("report_numbers", b"100"), on_report=notes.append)
    handle.future.result(PATIENCE_S)
    assert notes == [b"%d" % number for number in range(100)]


@pytest.mark.usefixtures("needs_process")
def test_all_that_is_printed_arrives_before_the_end(executor: Executor) -> None:
    pieces: list[str] = []
    executor.submit(call("print_much", b"20000"), on_output=pieces.append).future.result(PATIENCE_S)
    lines = "".join(pieces).split("\n")
    assert lines[:20000] == [f"line {number} ä" for number in range(20000)]
    assert lines[20000:] == ["from C", "from a child", "to stderr", "the end"]


def test_a_listener_that_fails_harms_nobody(executor: Executor, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: bytes) -> None:
        raise RuntimeError("the listener's own")

    handle = executor.submit(call("report_numbers", b"1"), on_report=fail)
    assert handle.future.result(PATIENCE_S) == b""
    assert "the listener's own" in caplog.text


# ---- workers that die


@pytest.mark.usefixtures("needs_process")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_fails_its_call_only(executor: Executor, how: signal.Signals, tmp_path: Path) -> None:
    bystander = executor.submit(call("come_and_wait", json.dumps([str(tmp_path), "bystander"]).encode()))
    wait_for(tmp_path / "bystander")
    assert isinstance(failure(executor, "kill_itself", b"%d" % how), WorkerDied)
    assert answer(executor, "echo", b"next") == b"next"
    (tmp_path / "go").touch()
    assert bystander.future.result(PATIENCE_S) == b"bystander"


@pytest.mark.usefixtures("needs_process")
def test_a_worker_killed_from_outside(executor: Executor, tmp_path: Path) -> None:
    handle = executor.submit(call("come_and_wait", json.dumps([str(tmp_path), "running"]).encode()))
    wait_for(tmp_path / "running")
    os.kill(int((tmp_path / "running").read_text()), signal.SIGKILL)
    assert isinstance(handle.future.exception(PATIENCE_S), WorkerDied)


@pytest.mark.usefixtures("needs_process")
def test_a_call_that_holds_too_much_memory_is_ended(executor: Executor) -> None:
    error = failure(executor, "hold_memory", b"200", memory_bytes=64 << 20)
    assert isinstance(error, CallOutOfMemory)
    assert "was given 64 MiB" in str(error)
    assert answer(executor, "echo", b"next") == b"next"


# ---- closing


def test_close_ends_what_runs_and_what_waits(kind: str, tmp_path: Path) -> None:
    executor = KINDS[kind]()
    running = executor.submit(call("until_interrupted", str(tmp_path).encode(), cpus=CPUS))
    waiting = [executor.submit(call("nothing")) for _ in range(3)]
    wait_for(tmp_path / "running")
    executor.close()
    assert running.future.done()
    assert all(isinstance(handle.future.exception(0), CallCancelled) for handle in (running, *waiting))
    executor.close()
    with pytest.raises(SessionClosed, match="submitted to an executor that is closed"):
        executor.submit(call("nothing"))


def wait_until_gone(pid: int) -> None:
    """Until no process has this number, or only what is left of a dead one."""
    deadline = threading.Event()
    for _ in range(int(PATIENCE_S * 100)):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state in "ZX":
            return
        deadline.wait(0.01)
    raise AssertionError(f"process {pid} still runs")
