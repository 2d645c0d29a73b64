"""The threads of adapters: every task ends, in time or with nothing.

Run: pytest tests/kvcache/test_adapter_workers.py.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator

import pytest
from emberkv.adapters.settings import Settings
from emberkv.adapters.workers import Workers

SETTINGS = Settings(address="127.0.0.1:1", timeout_s=5.0, threads=1)


class Clock:
    now_s = 100.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def workers(clock: Clock) -> Iterator[Workers]:
    made = Workers(SETTINGS, "test", now_s=lambda: clock.now_s)
    yield made
    made.close()


def test_a_task_gives_its_result_and_a_failing_one_what_stands_for_none(workers: Workers) -> None:
    results: list[str] = []

    def fail() -> str:
        raise OSError("injected")

    workers.load(lambda: "loaded", "nothing", results.append).result(60)
    workers.load(fail, "nothing", results.append).result(60)
    workers.store(lambda: "stored", "nothing", results.append).result(60)
    assert results == ["loaded", "nothing", "stored"]


def test_a_task_that_waited_for_too_long_is_not_begun(workers: Workers, clock: Clock) -> None:
    results: list[str] = []
    begun, goes_on = threading.Event(), threading.Event()

    def wait() -> str:
        begun.set()
        return str(goes_on.wait(60))

    first = workers.load(wait, "nothing", results.append)
    second = workers.load(lambda: "begun", "nothing", results.append)
    assert begun.wait(60)
    clock.now_s += SETTINGS.timeout_s
    goes_on.set()
    for each in (first, second):
        each.result(60)
    assert results == ["True", "nothing"]


def test_a_store_keeps_no_load_waiting(workers: Workers) -> None:
    results: list[str] = []
    goes_on = threading.Event()
    store = workers.store(lambda: str(goes_on.wait(60)), "nothing", results.append)
    workers.load(lambda: "loaded", "nothing", results.append).result(60)
    assert results == ["loaded"]
    goes_on.set()
    store.result(60)


def test_after_close_nothing_is_begun_and_everything_ends(clock: Clock) -> None:
    workers = Workers(SETTINGS, "test", now_s=lambda: clock.now_s)
    results: list[str] = []
    begun, goes_on = threading.Event(), threading.Event()

    def wait() -> str:
        begun.set()
        return str(goes_on.wait(60))

    first = workers.load(wait, "nothing", results.append)
    second = workers.load(lambda: "begun", "nothing", results.append)
    assert begun.wait(60)
    closing = threading.Thread(target=workers.close)
    closing.start()
    while not workers.is_closed:
        pass
    assert workers.store(lambda: "begun", "nothing", results.append).done()
    goes_on.set()
    closing.join(60)
    assert first.done() and second.done()  # What was under way has ended; what waited was not begun.
    assert results == ["nothing", "True", "nothing"]


def test_in_a_forked_child_every_task_ends_at_once(workers: Workers) -> None:
    workers.load(lambda: "loaded", "nothing", lambda _: None).result(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Of forks in processes with threads, from Python 3.12 on.
        child = os.fork()
    if child == 0:
        results: list[str] = []
        ended = workers.load(lambda: "begun", "nothing", results.append).done()
        workers.close()
        os._exit(0 if ended and results == ["nothing"] else 1)
    assert os.waitpid(child, 0)[1] == 0
