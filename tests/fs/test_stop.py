"""What tells a server to end. Run: pytest tests/fs/test_stop.py"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest
from emberfs.stop import Stop

STORM = """
import random, signal
from emberfs.stop import Stop

signal.signal(signal.SIGALRM, lambda *_: stop.set())
for _ in range(5000):
    stop = Stop(())
    signal.setitimer(signal.ITIMER_REAL, 1e-6 + random.random() * 2e-4)
    while not stop.wait(1e-5):
        pass
print("ended", flush=True)
"""


def test_a_signal_may_come_at_any_moment() -> None:
    """With an `Event` the main thread soon waits for itself."""
    done = subprocess.run([sys.executable, "-c", STORM], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "ended\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_set_it_and_it_stays(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = Stop()
        assert not stop.wait(0.0)
        signal.raise_signal(number)
        assert stop.wait(0.0)
        assert stop.wait(60.0)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_another_thread_sets_it() -> None:
    stop = Stop(())
    thread = threading.Thread(target=stop.set)
    thread.start()
    assert stop.wait(60.0)
    thread.join()
