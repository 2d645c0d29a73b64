"""The first lines of a worker process, run by path: python -P boot.py SOCKET DRIVER_PID NAME SYS_PATH...

The process leads a session of its own, so a Ctrl-C at the driver's terminal does not reach it. Before it loads
anything, and so while it has one thread, it sets up its guard. Knows nothing of emberflow until it has the driver's
import path.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys


def guard(driver_pid: int) -> None:
    """Forks a process that waits for the end of the driver or of this process, whichever is first, and then kills this
    process group: the worker and what its calls have started. Neither a kill -9 nor a call that never lets another
    thread run keeps it from that. Without pidfds (not Linux) there is none, and the closed socket has to do.
    """
    if not hasattr(os, "pidfd_open"):
        return
    try:
        watched = [os.pidfd_open(driver_pid), os.pidfd_open(os.getpid())]
    except ProcessLookupError:
        os._exit(1)
    if os.getppid() != driver_pid:  # It died before, and somebody else has its number.
        os._exit(1)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        for descriptor in watched:
            os.close(descriptor)
        return
    # Not this process's child: a call that waits for all its children would wait for ever.
    if os.fork():
        os._exit(0)
    # The worker's socket and output must close with the worker.
    low, high = sorted(watched)
    os.closerange(0, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, os.sysconf("SC_OPEN_MAX"))
    poll = select.poll()
    for descriptor in watched:
        poll.register(descriptor, select.POLLIN)
    poll.poll()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    guard(int(sys.argv[2]))
    sys.path[:] = sys.argv[4:]
    worker = importlib.import_module("emberflow.executor.worker")
    worker.main(int(sys.argv[1]), sys.argv[3])
