"""What this machine can do at most with bytes of a size: check them, copy them, take them through a socket.

Measured by whoever asks, in the run that they are compared in, by as many threads as the comparison has. The disk's
ceiling is not here: it is measured in turns with the store (`bench_work`).

Does not know: stores.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..checksum import crc32c
from .scratch import uninterrupted

ROTATION_BYTES = 32 << 20
"""Copies go through this much memory: what stays in a CPU's cache flatters the machine."""
REQUEST_BYTES = 128

Side = Callable[[int, int], object]
"""(thread, turn): one operation. Returns False when there is no work left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Seconds that one thread takes for an operation's bytes."""

    crc_s: float
    copy_s: float
    socket_s: float
    """A small request over a loopback TCP connection, and the bytes as its answer."""


class Pace:
    """How long is measured, and by how many threads."""

    def __init__(self, *, seconds: float, threads: int) -> None:
        self.seconds = seconds
        self.threads = threads

    def rate(self, side: Side) -> float:
        """Operations per second of all threads together; 0.0 if there was no work left. Raises what `side` raises."""
        turns = [0] * self.threads
        errors: list[BaseException] = []
        stop = threading.Event()

        def work(thread: int) -> None:
            try:
                for turn in itertools.count():
                    if stop.is_set() or side(thread, turn) is False:
                        return
                    turns[thread] += 1
                    if time.perf_counter() >= end_s:
                        return
            except BaseException as error:
                errors.append(error)

        begin_s = time.perf_counter()
        end_s = begin_s + self.seconds
        others = [threading.Thread(target=work, args=(number,)) for number in range(1, self.threads)]
        for other in others:
            other.start()
        try:
            work(0)
            if errors:
                stop.set()
        finally:
            with uninterrupted():  # Nobody writes any more when this returns: what is there is removed then.
                for other in others:
                    other.join()
        if errors:
            raise errors[0]
        return sum(turns) / (time.perf_counter() - begin_s)


def measure_ceilings(pace: Pace, size: int, count: int) -> Ceilings:
    """Of operations that each take `count` pieces of `size` bytes."""
    source = memoryview(os.urandom(size))
    memory = memoryview(bytearray(max(ROTATION_BYTES, size)))
    places = len(memory) // max(size, 1)

    def check(thread: int, turn: int) -> None:
        for _ in range(count):
            crc32c(source)

    def copy(thread: int, turn: int) -> None:
        for piece in range(count):
            begin = (turn * count + piece + thread) % places * size
            memory[begin : begin + size] = source

    with _Loopback(pace.threads, size * count) as loopback:
        per_s = {"crc": pace.rate(check), "copy": pace.rate(copy), "socket": pace.rate(loopback.ask)}
    crc_s, copy_s, socket_s = (pace.threads / rate for rate in per_s.values())
    return Ceilings(crc_s=crc_s if size else 0.0, copy_s=copy_s if size else 0.0, socket_s=socket_s)


class _Loopback:
    """A TCP connection to ourselves for each thread, and a thread that answers at its other end."""

    def __init__(self, threads: int, answer_bytes: int) -> None:
        self._answer = memoryview(bytearray(max(answer_bytes, REQUEST_BYTES)))
        self._buffers = [memoryview(bytearray(len(self._answer))) for _ in range(threads)]
        self._threads = threads
        self._asking: list[socket.socket] = []
        self._answering: list[threading.Thread] = []

    def __enter__(self) -> _Loopback:
        with socket.create_server(("127.0.0.1", 0)) as server:
            for _ in range(self._threads):
                asking = socket.create_connection(server.getsockname())
                answering, _ = server.accept()
                for sock in (asking, answering):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._asking.append(asking)
                thread = threading.Thread(target=self._serve, args=(answering,), daemon=True)
                self._answering.append(thread)
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for asking in self._asking:
            asking.close()
        for thread in self._answering:
            thread.join()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                while len(sock.recv(REQUEST_BYTES, socket.MSG_WAITALL)) == REQUEST_BYTES:
                    sock.sendall(self._answer)
            except OSError:
                pass  # It was ended in the middle.

    def ask(self, thread: int, turn: int) -> None:
        sock, buffer = self._asking[thread], self._buffers[thread]
        sock.sendall(bytes(REQUEST_BYTES))
        received = 0
        while received < len(buffer):
            received += sock.recv_into(buffer[received:])
