"""What the driver and a worker process say to each other, over a socket pair.

A frame is a message and a payload: their two lengths, the message (msgpack), the payload as it is. The driver sends
one `Run`, gets any number of `Report`s and one `Ended`, and only then may send the next.
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import TypeAlias

import msgspec

from .outcome import Failure
from .surroundings import Surroundings


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker has started."""


class Run(msgspec.Struct, frozen=True, tag=True):
    """Run a function; its argument is the frame's payload."""

    number: int
    """Counts the calls of this worker."""
    name: str
    function: str
    cpus: int
    memory_bytes: int
    surroundings: Surroundings


class Interrupt(msgspec.Struct, frozen=True, tag=True):
    """Call number `number` is cancelled. It may have ended already."""

    number: int


class Bye(msgspec.Struct, frozen=True, tag=True):
    """No more calls: end. If the socket closes without it, the driver is dead."""


class Report(msgspec.Struct, frozen=True, tag=True):
    """The running call reports the frame's payload."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The call has ended. Without a failure its answer is the frame's payload."""

    failure: Failure | None


Message: TypeAlias = Ready | Run | Interrupt | Bye | Report | Ended

_LENGTHS = struct.Struct("<IQ")
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


class Channel:
    """One end. Any thread may send; one receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """To wait on."""
        return self._socket.fileno()

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Raises `OSError` if the other end is gone."""
        header = _encoder.encode(message)
        with self._sending:
            self._socket.sendall(_LENGTHS.pack(len(header), len(payload)) + header)
            self._socket.sendall(payload)

    def receive(self) -> tuple[Message, bytes]:
        """The next frame. Raises `EOFError` if the other end is gone."""
        header_size, payload_size = _LENGTHS.unpack(self._exactly(_LENGTHS.size))
        return _decoder.decode(self._exactly(header_size)), self._exactly(payload_size)

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        pieces: list[bytes] = []
        try:
            while size:
                # All of it in one piece, except where a signal or the end of the stream cuts it.
                pieces.append(piece := self._socket.recv(size, socket.MSG_WAITALL))
                size -= len(piece)
                if not piece:
                    raise EOFError
        except OSError as error:
            raise EOFError from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
