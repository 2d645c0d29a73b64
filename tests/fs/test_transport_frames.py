"""Bytes that are not frames: whatever comes, a stream is frames or refused, and is never read past its limits."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

import pytest
from emberfs.checksum import crc32c
from emberfs.errors import EmberError, NotFound, ProtocolError
from emberfs.messages import Stat, Usage
from emberfs.transport.codec import decode_failure, decode_message, encode_failure, encode_message
from emberfs.transport.frame import (
    HEADER_BYTES_MAX,
    HELLO_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    PREFIX_BYTES,
    Frame,
    FrameReader,
    Kind,
    encode_frame,
)
from emberfs.transport.window import SMALL_BYTES_MAX, Window
from hypothesis import given
from hypothesis import strategies as st

Seen = tuple[Kind, int, bytes, list[bytes]]


class Sink:
    """Takes every frame, and gives each payload memory of its own."""

    def __init__(self) -> None:
        self.ended: list[Seen] = []
        self._frame: tuple[Kind, int, bytes] | None = None
        self._memory: list[bytearray] = []

    def begin(self, frame: Frame) -> Iterable[memoryview]:
        self._frame = (frame.kind, frame.call, bytes(frame.body))
        has_payload = frame.kind in (Kind.REQUEST, Kind.REPLY)
        self._memory = [bytearray(length) for length in frame.lengths] if has_payload else []
        return [memoryview(each) for each in self._memory]

    def end(self) -> None:
        assert self._frame is not None
        self.ended.append((*self._frame, [bytes(each) for each in self._memory]))


def feed(reader: FrameReader, stream: bytes, steps: Iterator[int]) -> None:
    """Hand `stream` over in pieces, each at most as long as the next step."""
    begin = 0
    while begin < len(stream):
        buffer = reader.get_buffer()
        piece = stream[begin : begin + min(len(buffer), next(steps))]
        buffer[: len(piece)] = piece
        reader.buffer_updated(len(piece))
        begin += len(piece)


def encode(seen: Seen) -> bytes:
    kind, call, body, payload = seen
    return encode_frame(kind, call, body, [len(each) for each in payload]) + b"".join(payload)


def forged(**fields: int) -> bytes:
    """A prefix whose checksum is right, whatever else it says."""
    values = {"magic": 0xF3626D65, "version": 1, "kind": 6, "count": 0, "call": 0, "length": 0, "crc": 0, **fields}
    prefix = struct.pack("<IBBHQII", *values.values())
    return prefix + struct.pack("<I", crc32c(prefix))


sizes = st.one_of(st.integers(0, 200), st.sampled_from([32 << 10, (32 << 10) - 1, 140_000]))
content = sizes.map(lambda size: bytes(range(256)) * (size // 256) + bytes(size % 256))
plain = st.tuples(st.sampled_from([Kind.PING, Kind.ERROR]), st.integers(0, 2**64 - 1), content, st.just([]))
loaded = st.tuples(
    st.sampled_from([Kind.REQUEST, Kind.REPLY]), st.integers(0, 2**64 - 1), content, st.lists(content, max_size=4)
)
frames = st.lists(st.one_of(plain, loaded), max_size=5)
steps = st.lists(st.integers(1, 200_000), max_size=20).map(lambda few: [*few, 100_000])


def endless(values: Sequence[int]) -> Iterator[int]:
    while True:
        yield from values


@given(frames, steps)
def test_frames_arrive_whole_however_the_stream_is_cut(sent: list[Seen], cuts: list[int]) -> None:
    sink = Sink()
    reader = FrameReader(sink)
    reader.header_bytes_max = HEADER_BYTES_MAX
    feed(reader, b"".join(map(encode, sent)), endless(cuts))
    assert sink.ended == sent


@given(frames, steps, st.data())
def test_a_damaged_stream_gives_frames_that_were_sent_or_is_refused(
    sent: list[Seen], cuts: list[int], data: st.DataObject
) -> None:
    stream = bytearray(b"".join(encode(each) for each in sent) + encode_frame(Kind.PING, 1))
    place = data.draw(st.integers(0, len(stream) - 1))
    stream[place] ^= data.draw(st.integers(1, 255))
    sink = Sink()
    reader = FrameReader(sink)
    reader.header_bytes_max = HEADER_BYTES_MAX
    try:
        feed(reader, bytes(stream), endless(cuts))
    except ProtocolError:
        pass
    # Payloads carry no checksum of ours: all else is as it was sent.
    assert [seen[:3] for seen in sink.ended] == [(*each,)[:3] for each in [*sent, (Kind.PING, 1, b"", [])]][
        : len(sink.ended)
    ]


@given(st.binary(max_size=2000), steps)
def test_noise_is_never_a_frame(noise: bytes, cuts: list[int]) -> None:
    sink = Sink()
    try:
        feed(FrameReader(sink), noise, endless(cuts))
    except ProtocolError:
        pass
    assert not sink.ended


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"magic": 1}, "not emberline's bytes"),
        ({"version": 2}, "frame version 2"),
        ({"kind": 0}, "unknown kind"),
        ({"kind": 18}, "unknown kind"),
        ({"length": HELLO_BYTES_MAX + 1}, "over the limit"),
        ({"count": 3, "length": 11}, "3 buffers"),
        ({"count": 5000, "length": 40_000}, "5000 buffers"),
    ],
)
def test_a_prefix_over_the_limits_is_refused_before_anything_is_read(fields: dict[str, int], why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        feed(FrameReader(Sink()), forged(**fields), endless([PREFIX_BYTES]))


def test_a_payload_over_the_limit_is_refused() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        feed(FrameReader(Sink()), encode_frame(Kind.REQUEST, 1, b"", [PAYLOAD_BYTES_MAX, 1]), endless([100]))


def test_a_diverted_payload_lands_in_scratch_memory() -> None:
    class Keeping(Sink):
        def begin(self, frame: Frame) -> Iterable[memoryview]:
            return [memoryview(each) for each in (first, second)][: len(frame.lengths)]

        def end(self) -> None:
            ended.append(bytes(first))

    first, second, ended = bytearray(1000), bytearray(100_000), []
    reader = FrameReader(Keeping())
    stream = encode_frame(Kind.REPLY, 1, b"", [1000, 100_000]) + b"x" * 101_000 + encode_frame(Kind.PING, 0)
    half = PREFIX_BYTES + 8 + 500
    feed(reader, stream[:half], endless([100]))
    reader.divert()
    feed(reader, stream[half:], endless([5000]))
    assert first == b"x" * 500 + bytes(500)
    assert second == bytes(100_000)
    assert len(ended) == 2


@given(st.binary(max_size=200))
def test_noise_is_no_message_and_no_error(noise: bytes) -> None:
    for decode in (decode_message, decode_failure):
        try:
            decode(memoryview(noise))
        except ProtocolError:
            pass


@given(st.integers(0, 7), st.integers(0, 255))
def test_a_damaged_message_is_a_message_or_refused(place: int, value: int) -> None:
    body = bytearray(encode_message(Stat("/a", True, 7)))
    body[place] = value
    try:
        decode_message(memoryview(body))
    except ProtocolError:
        pass


def test_an_error_of_a_newer_program_keeps_its_text() -> None:
    body = encode_failure(NotFound("no such file", "/a"), Usage()).replace(b"NotFound", b"NotBound")
    error = decode_failure(memoryview(body))
    assert type(error) is EmberError
    assert str(error) == "no such file: '/a'"


def test_a_window_counts_large_calls_in_bytes_and_all_calls() -> None:
    window = Window(calls_max=3, bytes_max=1 << 20)
    window.take(1 << 20)
    assert not window.has_room(SMALL_BYTES_MAX + 1)
    assert window.has_room(SMALL_BYTES_MAX)
    window.take(SMALL_BYTES_MAX)
    window.take(SMALL_BYTES_MAX)
    assert not window.has_room(1)
    window.give(1 << 20)
    assert window.has_room(1 << 20)
