"""What a process prints: finding all of it, by Python, by C and by child processes."""

from __future__ import annotations

import ctypes
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_READ_BYTES = 1 << 16


def flush_output() -> None:
    """Sends what Python and C still hold of what was printed to where it goes."""
    for stream in (sys.stdout, sys.stderr):
        # A call may have closed or replaced them.
        with suppress(AttributeError, ValueError, OSError):
            stream.flush()
    ctypes.CDLL(None).fflush(None)


@contextmanager
def captured_output(hear: Callable[[bytes], None]) -> Iterator[None]:
    """Within it, what goes to this process's standard output and error goes to `hear`, on another thread, piece by
    piece. On leaving, everything that was printed by this process has been heard."""
    flush_output()
    reader, writer = os.pipe()
    saved = [(os.dup(descriptor), descriptor) for descriptor in (1, 2)]
    stopper, stop = os.pipe()
    thread = threading.Thread(target=_listen, args=(reader, stopper, hear), daemon=True)
    thread.start()
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)
    os.close(writer)
    try:
        yield
    finally:
        flush_output()
        for copy, descriptor in saved:
            os.dup2(copy, descriptor)
            os.close(copy)
        # Not the closing of the pipe's other end: a child that was left running may hold it open.
        os.close(stop)
        thread.join()


def _listen(reader: int, stopper: int, hear: Callable[[bytes], None]) -> None:
    os.set_blocking(reader, False)
    is_stopped = False
    while not is_stopped:
        ready = select.select([reader, stopper], [], [])[0]
        is_stopped = stopper in ready
        with suppress(BlockingIOError):
            while data := os.read(reader, _READ_BYTES):
                hear(data)
            is_stopped = True
    os.close(reader)
    os.close(stopper)
