"""Functions that the tests of executors run as calls. They meet each other, and the test, through files in a folder."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from emberflow.errors import ExchangeCorrupt, OutOfMemory
from emberflow.executor import Context

PATIENCE_S = 60.0


def wait_for(path: Path) -> None:
    """Until the file is there; a broken test ends by this limit."""
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)


def echo(payload: bytes, context: Context) -> bytes:
    return payload


def nothing(payload: bytes, context: Context) -> bytes:
    return b""


def pid(payload: bytes, context: Context) -> bytes:
    return b"%d" % os.getpid()


def context_of(payload: bytes, context: Context) -> bytes:
    return json.dumps([context.worker, context.cpus, context.memory_bytes]).encode()


def count(payload: bytes, context: Context) -> bytes:
    """How many calls this worker's state has seen."""
    seen = context.state.get("seen", 0)
    assert isinstance(seen, int)
    context.state["seen"] = seen + 1
    return b"%d" % (seen + 1)


def come_and_wait(payload: bytes, context: Context) -> bytes:
    """Leaves a file "name", and ends when there is one "go"."""
    folder, name = json.loads(payload)
    # Written and moved, so that who sees it can read it.
    (Path(folder) / f"{name}.part").write_text(str(os.getpid()))
    (Path(folder) / f"{name}.part").rename(Path(folder) / name)
    wait_for(Path(folder) / "go")
    return name.encode()


def meet(payload: bytes, context: Context) -> bytes:
    """Ends when as many calls as it is told run at one time."""
    folder, name, others = json.loads(payload)
    (Path(folder) / name).touch()
    for other in others:
        wait_for(Path(folder) / other)
    return b"met"


def overlap(payload: bytes, context: Context) -> bytes:
    """The most CPUs that this call saw in use, by the files of those that run: "cpus-name"."""
    folder = Path(payload.decode())
    mine = folder / f"{context.cpus}-{context.worker}-{time.monotonic_ns()}"
    mine.touch()
    most = 0
    for _ in range(20):
        most = max(most, sum(int(path.name.split("-")[0]) for path in folder.iterdir()))
        time.sleep(0.001)
    mine.unlink()
    return b"%d" % most


def until_interrupted(payload: bytes, context: Context) -> bytes:
    """Leaves "running", ends when it is interrupted, and leaves "interrupted"."""
    folder = Path(payload.decode())
    heard = threading.Event()
    context.on_interrupt(heard.set)
    (folder / "running").touch()
    assert heard.wait(PATIENCE_S)
    context.on_interrupt(None)
    (folder / "interrupted").touch()
    raise InterruptedError("heard it")


def interrupted_late(payload: bytes, context: Context) -> bytes:
    """Sets what is to be interrupted only when the test, which has cancelled it, says "go"."""
    folder = Path(payload.decode())
    (folder / "running").touch()
    wait_for(folder / "go")
    heard = threading.Event()
    context.on_interrupt(heard.set)
    assert heard.wait(PATIENCE_S)
    (folder / "interrupted").touch()
    return b""


def deaf(payload: bytes, context: Context) -> bytes:
    """Leaves its process's number in "running", and lets no other thread of it run for a very long time."""
    folder = Path(payload.decode())
    (folder / "part").write_text(str(os.getpid()))
    (folder / "part").rename(folder / "running")
    return b"%d" % bool(re.match(r"(a+)+b", "a" * 60))


def with_a_child(payload: bytes, context: Context) -> bytes:
    """Starts a process, leaves the numbers of both in "running", and waits."""
    folder = Path(payload.decode())
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "part").write_text(f"{os.getpid()} {child.pid}")
    (folder / "part").rename(folder / "running")
    child.wait()
    return b""


def value_error(payload: bytes, context: Context) -> bytes:
    error = ValueError("not this")
    error.add_note("a note of its own")
    raise error


def exchange_corrupt(payload: bytes, context: Context) -> bytes:
    raise ExchangeCorrupt("torn", "store/part-3")


def out_of_memory(payload: bytes, context: Context) -> bytes:
    raise OutOfMemory("does not fit")


class Unpicklable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def unpicklable(payload: bytes, context: Context) -> bytes:
    raise Unpicklable("this", "that")


def exit_program(payload: bytes, context: Context) -> bytes:
    sys.exit(3)


def report_numbers(payload: bytes, context: Context) -> bytes:
    for number in range(int(payload)):
        context.report(b"%d" % number)
    return b""


def print_much(payload: bytes, context: Context) -> bytes:
    """By Python, by C, by a child, to both streams, without a newline at the end."""
    lines = int(payload)
    for number in range(lines):
        print("line", number, "ä")
    libc = ctypes.CDLL(None)
    libc.puts(b"from C")
    libc.fflush(None)
    os.system("echo from a child")
    print("to stderr", file=sys.stderr)
    libc.printf(b"the ")
    libc.fflush(None)
    print("end", end="")
    return b""


def kill_itself(payload: bytes, context: Context) -> bytes:
    print("last words", flush=True)
    os.kill(os.getpid(), int(payload))
    signal.pause()
    return b""


def exit_at_once(payload: bytes, context: Context) -> bytes:
    print("last words", flush=True)
    os._exit(int(payload))


def hold_memory(payload: bytes, context: Context) -> bytes:
    """Holds many bytes, and would go on for long."""
    held = bytearray(os.urandom(1 << 20)) * int(payload)
    signal.pause()
    return b"%d" % len(held)


def keep_memory(payload: bytes, context: Context) -> bytes:
    context.state["kept"] = bytearray(os.urandom(1 << 20)) * int(payload)
    return b"%d" % os.getpid()


def place(payload: bytes, context: Context) -> bytes:
    """Where it runs and what it can import."""
    return json.dumps([os.getcwd(), sys.path]).encode()


def environment(payload: bytes, context: Context) -> bytes:
    """The value of a variable of the environment."""
    return os.environ[payload.decode()].encode()


def noted(payload: bytes, context: Context) -> bytes:
    """Notes its name in a log, and ends when the gate is open."""
    log, name, gate = json.loads(payload)
    with open(log, "a") as file:
        print(name, file=file)
    wait_for(Path(gate))
    return b""
