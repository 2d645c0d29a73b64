"""Frames: how messages, buffers and signs of life are cut out of a byte stream. Pure: no socket, no clock.

    prefix   28 bytes, little-endian: magic, version, kind, buffer count, call id, header length, header CRC, prefix CRC
    header   buffer count × u32 lengths, then the encoded message
    payload  the bytes of the buffers, one after the other; only in a REQUEST, a REPLY and the ASIDE kinds

An ASIDE request or reply has its small buffers in the payload, and the others come another way (`aside`).
A PLACED request has its buffers in regions (`region`): where they are stands before the message, as count × (number,
offset), and no byte of them travels.

Invariants:
  - Nothing of a frame is believed before its CRC and its limits were checked. A stream that breaks one raises
    `ProtocolError` once and is over: what follows cannot be trusted to begin at a frame.
  - A large payload lands where the receiver wants it, without a stop in between; small ones are copied there.

Does not know: what a message says, or that the payload may be somebody's memory.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from ..checksum import crc32c
from ..errors import ProtocolError
from ..types import BATCH_ITEMS_MAX
from .blocks import scratch

MAGIC = b"emb\xf3"
PROTOCOL_MIN = 1
PROTOCOL_MAX = 1
"""The protocols this program speaks; a handshake agrees on one."""
FRAME_VERSION = 1
"""Of the prefix below. The handshake itself travels in it, so it changes last of all."""

HEADER_BYTES_MAX = 20 << 20
"""A KV transaction (16 MiB), or a full batch with its names and positions."""
HELLO_BYTES_MAX = 64 << 10
"""Before the handshake nobody gets more of our memory than this."""
PAYLOAD_BYTES_MAX = (64 << 20) + (1 << 20)
"""What a client puts into one message (64 MiB), and slack."""

RECEIVE_BYTES = 128 << 10
"""Read at once where many small frames may come."""
DIRECT_BYTES_MIN = 32 << 10
"""From here on a system call of its own is cheaper than a copy."""

_PREFIX = struct.Struct("<4sBBHQII")
_U32 = struct.Struct("<I")
PREFIX_BYTES = _PREFIX.size + _U32.size

assert PREFIX_BYTES == 28
assert BATCH_ITEMS_MAX < 1 << 16
assert 4 * BATCH_ITEMS_MAX < HEADER_BYTES_MAX


class Kind(enum.IntEnum):
    """What a frame is."""

    HELLO = 1
    """The first frame each way."""
    REQUEST = 2
    """Its buffers are payload: their bytes follow."""
    FETCH = 3
    """A request whose buffers are to be filled: only their lengths are told."""
    REPLY = 4
    """With as many bytes of each destination as were filled."""
    ERROR = 5
    """The other possible answer to a request."""
    PING = 6
    """Nothing to say, and alive. Each side sends its own, so none is answered."""
    CANCEL = 7
    """Nobody waits for this call any more. It is answered all the same."""
    GOODBYE = 8
    """The server takes no new call; those under way still end."""
    REGION = 9
    """A file descriptor comes with it: memory of the client, from now on the region of this number."""
    FORGET = 10
    """The region of this number is not named any more."""
    PLACED = 11
    """A request whose buffers lie in regions, to be filled or not."""
    PLACED_REPLY = 12
    """To a PLACED request: how many bytes of each buffer were filled."""
    LANE = 13
    """Over a unix socket a file descriptor comes with it: the server's end of a lane. Over TCP the server answers with
    the same, and from then on the connection is a lane."""
    RAIL = 14
    """The way for large buffers that the sender offers, or its answer to that."""
    RAIL_UP = 15
    """What came over the rail has arrived: the other side may use it."""
    ASIDE_REQUEST = 16
    """A REQUEST whose large buffers come over the rail."""
    ASIDE_REPLY = 17
    """A REPLY whose large buffers come over the rail."""


ASIDE_BYTES_MIN = 32 << 10
"""A buffer from this size on is a large one."""
ASIDE_KINDS = (Kind.ASIDE_REQUEST, Kind.ASIDE_REPLY)


class Frame(NamedTuple):
    """A frame without its payload."""

    kind: Kind
    call: int
    """Numbers a request and its answer within one connection; 0 where there is none."""
    lengths: tuple[int, ...]
    """Of each buffer, in bytes."""
    body: memoryview
    """The encoded message. Valid until `Receiver.begin` returns."""


class Receiver(Protocol):
    """Who takes the frames of one stream."""

    def begin(self, frame: Frame) -> Iterable[memoryview]:
        """The header has come. Returns where the payload goes, as many bytes as `lengths` says (of an ASIDE kind, as
        its small buffers have); none, for none."""

    def end(self) -> None:
        """The payload of the frame that was begun last has landed."""


def encode_frame(kind: Kind, call: int, body: bytes = b"", lengths: Sequence[int] = ()) -> bytes:
    """Everything of a frame but its payload."""
    header = struct.pack(f"<{len(lengths)}I", *lengths) + body if lengths else body
    prefix = _PREFIX.pack(MAGIC, FRAME_VERSION, kind, len(lengths), call, len(header), crc32c(header))
    return prefix + _U32.pack(crc32c(prefix)) + header


_PLACE = struct.Struct("<QQ")


def encode_places(places: Iterable[tuple[int, int]]) -> bytes:
    """(number, offset) of each buffer."""
    return b"".join(_PLACE.pack(number, offset) for number, offset in places)


def decode_places(body: memoryview, count: int) -> tuple[list[tuple[int, int]], memoryview]:
    """The places of `count` buffers, and what follows. Raises ProtocolError."""
    size = count * _PLACE.size
    if size > len(body):
        raise ProtocolError(f"a frame with {count} buffers and without their places")
    return list(_PLACE.iter_unpack(body[:size])), body[size:]


class FrameReader:
    """Cuts one stream into frames. Fill what `get_buffer` returns, say how far with `buffer_updated`, and so on."""

    def __init__(self, receiver: Receiver) -> None:
        self.header_bytes_max = HELLO_BYTES_MAX
        """Raised by the receiver once it knows whom it talks to."""
        self._receiver = receiver
        self._view = memoryview(bytearray(RECEIVE_BYTES))
        self._start = 0
        self._end = 0
        """[start, end) of `_view` has been read and not yet been looked at."""
        self._prefix: tuple[Kind, int, int, int, int] | None = None
        """(kind, buffer count, call, header length, header CRC) of a frame whose header is not complete."""
        self._sinks: deque[memoryview] = deque()
        """Where the next bytes of the stream go, if not to `_view`."""
        self._filled: Callable[[], None] = self._receiver.end
        """What to do once there is no sink left."""
        self._is_direct = False
        self._is_stopped = False

    def get_buffer(self) -> memoryview:
        """Where to read the next bytes to; never empty."""
        if self._sinks and len(self._sinks[0]) >= DIRECT_BYTES_MIN:
            self._is_direct = True
            return self._sinks[0]
        self._is_direct = False
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start > RECEIVE_BYTES // 2:
            rest = bytes(self._view[self._start : self._end])
            self._view[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        elif self._end == RECEIVE_BYTES:
            raise AssertionError("a frame that does not fit must have gone to a sink")
        return self._view[self._end :]

    def buffer_updated(self, count: int) -> None:
        """`count` bytes were read into the last buffer. Raises ProtocolError."""
        if self._is_direct:
            self._advance(count)
            if not self._sinks:
                self._filled()
        else:
            self._end += count
        self._parse()

    @property
    def has_rest(self) -> bool:
        """Bytes have come that are not part of a frame that was handled."""
        return self._start != self._end or self._prefix is not None or bool(self._sinks)

    def stop(self) -> None:
        """The connection is over: what was read and not yet looked at is nobody's."""
        self._is_stopped = True
        self._sinks.clear()

    def divert(self) -> None:
        """Nobody wants the rest of the payload that is landing."""
        left = sum(len(sink) for sink in self._sinks)
        self._sinks.clear()
        self._sinks.extend(scratch(left))

    def _parse(self) -> None:
        while not self._is_stopped:
            if self._sinks:
                self._scatter()
                if self._sinks:
                    return
                self._filled()  # Which may have found more sinks.
                continue
            if self._prefix is None:
                if self._end - self._start < PREFIX_BYTES:
                    return
                self._prefix = self._take_prefix()
            length = self._prefix[3]
            if self._end - self._start >= length:
                header = self._view[self._start : self._start + length]
                self._start += length
                self._take_header(header)
            elif length > RECEIVE_BYTES // 2:
                large = memoryview(bytearray(length))
                self._sinks.append(large)
                self._filled = lambda large=large: self._take_header(large)  # type: ignore[misc]
            else:
                return

    def _scatter(self) -> None:
        """Copy what was read to where it belongs."""
        while self._sinks and self._start < self._end:
            sink = self._sinks[0]
            count = min(len(sink), self._end - self._start)
            sink[:count] = self._view[self._start : self._start + count]
            self._start += count
            self._advance(count)

    def _advance(self, count: int) -> None:
        if count == len(self._sinks[0]):
            self._sinks.popleft()
        else:
            self._sinks[0] = self._sinks[0][count:]

    def _take_prefix(self) -> tuple[Kind, int, int, int, int]:
        start = self._start
        magic, version, kind, count, call, length, header_crc = _PREFIX.unpack_from(self._view, start)
        if magic != MAGIC:
            raise ProtocolError("these are not emberline's bytes (perhaps one side speaks TLS and the other does not)")
        (crc,) = _U32.unpack_from(self._view, start + _PREFIX.size)
        if crc32c(self._view[start : start + _PREFIX.size]) != crc:
            raise ProtocolError("a frame's prefix does not match its checksum")
        if version != FRAME_VERSION:
            raise ProtocolError(f"frame version {version}: this program knows only {FRAME_VERSION}")
        if not Kind.HELLO <= kind <= Kind.ASIDE_REPLY:
            raise ProtocolError(f"a frame of unknown kind {kind}")
        if length > self.header_bytes_max:
            raise ProtocolError(f"a header of {length} bytes is over the limit of {self.header_bytes_max}")
        if count > BATCH_ITEMS_MAX or 4 * count > length:
            raise ProtocolError(f"{count} buffers in a frame with a header of {length} bytes")
        self._start += PREFIX_BYTES
        return Kind(kind), count, call, length, header_crc

    def _take_header(self, header: memoryview) -> None:
        assert self._prefix is not None
        kind, count, call, _, crc = self._prefix
        self._prefix = None
        if crc32c(header) != crc:
            raise ProtocolError("a frame's header does not match its checksum")
        lengths = struct.unpack_from(f"<{count}I", header)
        total = sum(lengths)
        if total > PAYLOAD_BYTES_MAX:
            raise ProtocolError(f"a payload of {total} bytes is over the limit of {PAYLOAD_BYTES_MAX}")
        sinks = self._receiver.begin(Frame(kind, call, lengths, header[4 * count :]))
        if self._is_stopped:
            return
        if kind in ASIDE_KINDS:
            total = sum(length for length in lengths if length < ASIDE_BYTES_MIN)
        if kind in (Kind.REQUEST, Kind.REPLY, *ASIDE_KINDS) and total:
            self._sinks.extend(sink for sink in sinks if len(sink))
            assert sum(len(sink) for sink in self._sinks) == total, "a receiver with too much or too little room"
            self._filled = self._receiver.end
        else:
            self._receiver.end()
